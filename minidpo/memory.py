"""What a training run will hold in memory, told before it starts.

    python -m minidpo.memory --preset gpt2-large --optimizer rmsprop --micro-batch-size 1 --length 512

Counted, not measured: `plan` adds up what PyTorch keeps for GPT-2's forward and backward pass, in bytes; it is within
15 % of the measured peak (tests/test_memory.py, docs/large.md). N weights, L layers, C channels, V vocabulary.
"""

import dataclasses
import os
from pathlib import Path

import torch

from minidpo.cli import UserError, knob, parse_settings, run
from minidpo.device import DTYPES
from minidpo.model import GPT, PRESETS, GPTConfig
from minidpo.optim import OPTIMIZERS

GIB = 2**30
ACCURACY = 0.15  # of the plan, against the measured peak


@dataclasses.dataclass
class Plan:
    """Bytes, by what they hold. `peak` is not their sum: not all of it is held at once, and some of it twice."""

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    peak: int

    def table(self, optimizer):
        """The plan as text, in GiB."""
        lines = {
            "weights": self.weights,
            "their copies in bfloat16": self.copies,
            "gradients": self.gradients,
            f"optimiser state ({optimizer})": self.optimizer,
            "activations": self.activations,
            "head (logits)": self.head,
            "at most at once": self.peak,
        }
        return "\n".join(f"  {name:28}{value / GIB:8.2f} GiB" for name, value in lines.items())


def plan(config, optimizer, dtype, tokens, recompute=False, accumulate=True):
    """The memory of one training step of DPO on the plain path -> Plan.

    tokens: input positions of the largest micro-batch, padding and both responses counted. accumulate: whether a step
    has several micro-batches, so that the gradients of the first are there while the second is computed.
    """
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    bf16 = dtype == "bfloat16"
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    weights = 4 * model.n_parameters
    state = weights * {"sgd": 1, "rmsprop": 1, "adamw": 2}[optimizer]  # momentum; a mean of squares; both
    matrices = sum(p.numel() for p in model.h.parameters() if p.dim() == 2)
    copies = 2 * matrices if bf16 else 0

    # What a block keeps of a token for its backward pass, in multiples of C. In fp32 the stream before each LayerNorm
    # (2 of them); in the precision of the products what goes in and out of them: LayerNorms (1 + 1), query, key, value
    # (3) and what attention makes of them (1), MLP before and after GELU (4 + 4).
    block = tokens * C * (2 * 4 + 14 * (2 if bf16 else 4))
    kept = 4 * tokens * C * L if recompute else L * block
    again = block / 2 if recompute else 0  # computed again for one response at a time
    logits = 4 * tokens / 2 * V  # of one response, in fp32

    # Chosen and rejected are two passes over the same weights. Going backward, the second is done first, and all its
    # gradients wait to be added to those of the other before they reach .grad: in bf16 where both passes used the same
    # bf16 copy of a matrix, else in fp32
    waiting = weights - 2 * matrices if bf16 and not recompute else weights
    table = 4 * V * C  # the embedding's gradient comes in parts, as embedding and as head, and takes space to add up
    held_copies = 0 if recompute else copies
    forward = copies + kept + 3 * logits  # both log-softmaxes, and the logits of the second
    first = held_copies + kept + max(4 * logits, 2 * logits + again)  # gradients before and after log-softmax
    second = held_copies + kept / 2 + waiting + max(3 * logits, logits + again)
    if accumulate:
        work = weights + max(forward, first, second, waiting + 2 * table)
    else:  # a layer's gradients come as its activations go
        work = max(forward, first, second, weights + 2 * table)
    return Plan(*map(int, (weights, copies, weights, state, kept + again, 4 * logits, weights + state + work)))


def largest_micro_batch(rows, settings):
    """Input positions of the largest micro-batch that `rows` (pairs) can make, padding and both responses counted."""
    chosen, rejected = (max(len(row[0]) + len(row[side]) - 1 for row in rows) for side in (1, 2))
    pairs = min(len(rows), settings.micro_batch_size or settings.batch_size)
    tokens = pairs * (chosen + rejected)
    return min(tokens, max(settings.micro_tokens, chosen + rejected)) if settings.micro_tokens else tokens


def check(model, rows, settings):
    """Prints the plan of a DPO run before it starts; the model is already on its device.

    `settings` are those of train_dpo.py. Raises UserError, with the changes that would help most and what each would
    come to, if the run cannot fit by more than the plan's own error; within that it warns.
    """
    held = 4 * model.n_parameters
    room = available(settings.device)

    def plan_with(**changes):
        changed = dataclasses.replace(settings, **changes)
        tokens = largest_micro_batch(rows, changed)
        every_pair = dataclasses.replace(changed, micro_batch_size=0, micro_tokens=0)
        accumulate = tokens < largest_micro_batch(rows, every_pair)
        return plan(model.config, changed.optimizer, changed.dtype, tokens, changed.recompute, accumulate)

    mine = plan_with()
    print(f"memory plan:\n{mine.table(settings.optimizer)}")
    if room is None:
        return
    room += held
    print(f"  {'there is on ' + settings.device:28}{room / GIB:8.2f} GiB")
    if mine.peak < (1 - ACCURACY) * room:
        return
    smaller = max(1, (settings.micro_batch_size or settings.batch_size) // 4)
    changes = {
        f"--micro-batch-size {smaller}": dict(micro_batch_size=smaller, micro_tokens=0),
        "--micro-batch-size 1": dict(micro_batch_size=1, micro_tokens=0),
        "--recompute": dict(recompute=True),
        "--optimizer rmsprop": dict(optimizer="rmsprop"),
    }
    peaks = {flag: plan_with(**change).peak for flag, change in changes.items()}
    everything = dict(micro_batch_size=1, micro_tokens=0, recompute=True, optimizer="rmsprop")
    peaks["--micro-batch-size 1 --recompute --optimizer rmsprop"] = plan_with(**everything).peak
    advice = [f"  {flag}: {peak / GIB:.2f} GiB" for flag, peak in peaks.items() if peak < 0.98 * mine.peak]
    advice = "What would make it less:\n" + "\n".join(advice) if advice else "Nothing makes it less but shorter rows."
    advice += "\nShorter rows (--max-length) or a smaller model take less as well."
    message = f"the run needs about {mine.peak / GIB:.2f} GiB, and {settings.device} has {room / GIB:.2f}. {advice}"
    if mine.peak > (1 + ACCURACY) * room:
        raise UserError(message)
    print(f"warning: {message}")


def available(device):
    """Bytes that a process can still take on `device`; None where the system does not tell."""
    if device == "cuda":  # what the card has free, and what PyTorch holds of it without using it
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if not (meminfo := Path("/proc/meminfo")).exists():  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = (Path("/sys/fs/cgroup/memory." + name) for name in ("max", "current"))  # of a container
    if limit.exists() and used.exists() and (most := limit.read_text(encoding="utf-8").strip()) != "max":
        free = min(free, int(most) - int(used.read_text(encoding="utf-8")))
    return free


@dataclasses.dataclass
class Settings:
    preset: str = knob("gpt2-large", "shape of the model", choices=tuple(PRESETS))
    optimizer: str = knob("rmsprop", "rmsprop or adamw", choices=OPTIMIZERS)
    dtype: str = knob("bfloat16", "precision of the matrix products", choices=DTYPES[1:])
    batch_size: int = knob(64, "pairs per optimiser step", least=1)
    micro_batch_size: int = knob(1, "pairs per forward pass; 0: all of the step")
    length: int = knob(512, "tokens of each row, prompt and response", least=2)
    recompute: bool = knob(False, "keep only each block's input and compute the rest again going backward")


def main():
    settings = parse_settings(Settings, "What one training step of DPO will hold in memory.")
    pairs = settings.micro_batch_size or settings.batch_size
    config = GPTConfig.preset(settings.preset)
    if settings.length > config.block_size:
        raise UserError(f"--length {settings.length}: {settings.preset} has a context of {config.block_size} tokens.")
    planned = plan(
        config, settings.optimizer, settings.dtype, 2 * pairs * settings.length, settings.recompute,
        accumulate=pairs < settings.batch_size,
    )  # fmt: skip
    print(f"{settings.preset}, {pairs} pairs of 2 x {settings.length} tokens at a time, {settings.dtype}")
    print(planned.table(settings.optimizer))


if __name__ == "__main__":
    run(main)
