"""What a training run will hold in memory, told before it starts.

    python -m minidpo.scale.memory --preset gpt2-large --optimizer rmsprop --micro-batch-size 1 --length 512 --fast

Counted, not measured: `plan` adds up what PyTorch keeps for GPT-2's forward and backward pass, in bytes; it is within
15 % of the measured peak (tests/test_memory.py, docs/large.md). L layers, C channels, V vocabulary.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from minidpo import dataset
from minidpo.device import DEVICES, DTYPES
from minidpo.model import GPT, PRESETS, GPTConfig
from minidpo.optim import OPTIMIZERS
from minidpo.scale import fast, parallel
from minidpo.settings import UserError, knob, parse_settings, run_main

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


class Size(NamedTuple):
    """How large a micro-batch of pairs is, in tokens."""

    positions: int  # padding counted, each side as long as its longest row
    aligned: int  # padding counted, both sides as long as the longest row
    tokens: int  # no padding, and the prompt of a pair once
    scored: int  # response tokens, the final eot included
    longest: int  # row


def size_of(rows):
    """The Size of pairs (prompt_ids, chosen_ids, rejected_ids)."""
    chosen, rejected = (max(len(row[0]) + len(row[side]) - 1 for row in rows) for side in (1, 2))
    scored = sum(len(chosen) + len(rejected) for _, chosen, rejected in rows)
    tokens = sum(len(prompt) for prompt, *_ in rows) + scored - 2 * len(rows)  # a last token is only a target
    longest = max(chosen, rejected)
    return Size(len(rows) * (chosen + rejected), 2 * len(rows) * longest, tokens, scored, longest)


def plan(config, optimizer, dtype, size, recompute=False, accumulate=True, fast=False, device="cuda"):
    """The memory of one training step of DPO -> Plan.

    size: of the largest micro-batch. accumulate: whether a step has several of them, so that the gradients of the first
    are there while the second is computed. fast: by minidpo/scale/fast.py.
    """
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    weights = 4 * model.n_parameters
    matrices = sum(p.numel() for p in model.h.parameters() if p.dim() == 2)
    copies = 2 * matrices if dtype == "bfloat16" else 0
    state = weights * {"sgd": 1, "rmsprop": 1, "adamw": 2}[optimizer]  # momentum; a mean of squares; both
    table = 4 * config.vocab_size * config.n_embd  # the token embedding

    if fast:
        activations, head, *moments = _fast(config, dtype, size, recompute, copies, table, device)
    else:
        activations, head, *moments = _plain(config, dtype, size, recompute, copies, table, weights)
    forward, backward, end = moments
    if accumulate:
        work = weights + max(forward, backward, end)
    else:  # a layer's gradients come as its activations go
        work = max(forward, backward, weights + 2 * table)
    return Plan(*map(int, (weights, copies, weights, state, activations, head, weights + state + work)))


def _plain(config, dtype, size, recompute, copies, table, weights):
    """Of train_dpo.response_logps, in bytes: activations, head; and what is held at most beside weights, optimiser

    state and gradients that were there before: going forward, going backward, when the last gradients are added.
    """
    L, C, tokens = config.n_layer, config.n_embd, size.positions
    # What a block keeps of a token for its backward pass, in multiples of C. In fp32 the stream before each LayerNorm
    # (2 of them); in the precision of the products what goes in and out of them: LayerNorms (1 + 1), query, key, value
    # (3) and what attention makes of them (1), MLP before and after GELU (4 + 4).
    block = tokens * C * (2 * 4 + 14 * _bytes(dtype))
    kept = 4 * tokens * C * L if recompute else L * block
    again = block / 2 if recompute else 0  # computed again for one response at a time
    logits = 4 * tokens / 2 * config.vocab_size  # of one response, in fp32

    # Chosen and rejected are two passes over the same weights. Going backward, the second is done first, and all its
    # gradients wait to be added to those of the other before they reach .grad: in bf16 where both passes used the same
    # bf16 copy of a matrix (2 bytes a weight, as that copy has), else in fp32
    waiting = weights if recompute else weights - copies
    held_copies = 0 if recompute else copies
    forward = copies + kept + 3 * logits  # both log-softmaxes, and the logits of the second
    first = held_copies + kept + max(4 * logits, 2 * logits + again)  # gradients before and after log-softmax
    second = held_copies + kept / 2 + waiting + max(3 * logits, logits + again)
    # the embedding's gradient comes in parts, as embedding and as head, and takes space to add up
    return kept + again, 4 * logits, forward, max(first, second), waiting + 2 * table


def _fast(config, dtype, size, recompute, copies, table, device):
    """The same of fast.response_logps."""
    L, C, H = config.n_layer, config.n_embd, config.n_head
    width = _bytes(dtype)
    # As in `_plain`, but query, key, value and attention's result stand in rows, and are read from there (1). Where no
    # kernel spares them (fast.causal_attention), the weights of all heads are kept in place of the result.
    in_rows = 3 * C + H * size.longest if device == "cpu" and dtype == "bfloat16" else 4 * C
    attention = size.tokens * C * (4 + 2 * width) + size.aligned * in_rows * width
    mlp = C * (4 + 9 * width)  # of one token; in the last block only the scored ones go through it
    kept = 4 * size.tokens * C * L if recompute else L * attention + ((L - 1) * size.tokens + size.scored) * mlp
    # and, where that is all there is, the gradients before and after GELU (4 + 4)
    again = attention + size.tokens * (mlp + 8 * C * width) if recompute else 0
    logits = width * size.scored * config.vocab_size  # turned into their gradient where they lie
    embedding = table / 2 if dtype == "bfloat16" else 0  # its copy for the head
    raised = 4 * min(fast.CHUNK, size.scored * config.vocab_size)  # logits in fp32, a piece at a time
    forward = copies + kept + logits + embedding + 2 * raised
    held_copies = 0 if recompute else copies
    # the head's gradient, in bf16 beside itself in fp32, waits for that of the embedding
    head = held_copies + kept + logits + raised + 2 * embedding + table
    blocks = held_copies + kept + table + again
    return kept + again, logits + embedding, forward, max(head, blocks), 2 * table


def _bytes(dtype):
    return 2 if dtype == "bfloat16" else 4


def plan_of(config, rows, settings):
    """The Plan of a run of train_dpo.py on `rows` with its `settings`: of the largest micro-batch it will meet."""
    sizes, accumulate = [], False
    for epoch in range(max(1, math.ceil(settings.epochs))):
        for indices in dataset.batches(rows, settings.batch_size, settings.seed, epoch):
            micro_batches = settings.cut([parallel.share(indices)], rows)
            sizes += [size_of([rows[i] for i in micro]) for micro in micro_batches if micro]
            accumulate |= len(micro_batches) > 1
    largest = Size(*(max(sizes) for sizes in zip(*sizes, strict=True)))
    how = dict(recompute=settings.recompute, accumulate=accumulate, fast=settings.fast, device=settings.device)
    return plan(config, settings.optimizer, settings.dtype, largest, **how)


def check(model, rows, settings):
    """Prints the plan of a DPO run before it starts; the model is already on its device.

    `settings` are those of train_dpo.py. Raises UserError, with the changes that would help most and what each would
    come to, if the run cannot fit by more than the plan's own error; within that it warns.
    """
    mine = plan_of(model.config, rows, settings)
    print(f"memory plan:\n{mine.table(settings.optimizer)}")
    room = available(settings.device)
    if room is None:
        return
    room += 4 * model.n_parameters  # which the plan counts, too
    print(f"  {'there is on ' + settings.device:28}{room / GIB:8.2f} GiB")
    if mine.peak < (1 - ACCURACY) * room:
        return
    smaller = max(1, (settings.micro_batch_size or settings.batch_size) // 4)
    changes = {
        "--fast": dict(fast=True),
        f"--micro-batch-size {smaller}": dict(micro_batch_size=smaller, micro_tokens=0),
        "--micro-batch-size 1": dict(micro_batch_size=1, micro_tokens=0),
        "--recompute": dict(recompute=True),
        "--optimizer rmsprop": dict(optimizer="rmsprop"),
    }
    everything = dict(fast=True, micro_batch_size=1, micro_tokens=0, recompute=True, optimizer="rmsprop")
    changes["--fast --micro-batch-size 1 --recompute --optimizer rmsprop"] = everything
    peaks = {
        flag: plan_of(model.config, rows, dataclasses.replace(settings, **change)).peak
        for flag, change in changes.items()
    }
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
    response: int = knob(0, "of these, tokens of the response; 0: half")
    recompute: bool = knob(False, "keep only each block's input and compute the rest again going backward")
    fast: bool = knob(False, "by minidpo/scale/fast.py")
    device: str = knob("cuda", "cpu, cuda or mps", choices=DEVICES[1:])


def main():
    settings = parse_settings(Settings, "What one training step of DPO will hold in memory.")
    pairs = settings.micro_batch_size or settings.batch_size
    config = GPTConfig.preset(settings.preset)
    if settings.length > config.block_size:
        raise UserError(f"--length {settings.length}: {settings.preset} has a context of {config.block_size} tokens.")
    response = settings.response or settings.length // 2
    if response > settings.length:
        raise UserError(f"--response {response}: a row has {settings.length} tokens.")
    row = [0] * (settings.length - response + 1), [0] * response, [0] * response  # the last token is only a target
    how = {name: getattr(settings, name) for name in ("recompute", "fast", "device")}
    accumulate = pairs < settings.batch_size
    planned = plan(config, settings.optimizer, settings.dtype, size_of([row] * pairs), accumulate=accumulate, **how)
    shape = f"{pairs} pairs of 2 x {settings.length} tokens at a time, {response} of them response"
    print(f"{settings.preset}, {shape}, {settings.dtype}")
    print(planned.table(settings.optimizer))


if __name__ == "__main__":
    run_main(main)
