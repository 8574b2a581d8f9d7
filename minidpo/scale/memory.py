"""Memory of a DPO run: a plan before it starts, and advice if memory runs out.

python -m minidpo.scale.memory --preset gpt2-large --fast      plans a run on one GPU
"""

import contextlib
import dataclasses
import re
from collections import namedtuple
from pathlib import Path

import torch

from minidpo.model import PRESETS, GPTConfig
from minidpo.optim import OPTIMIZERS
from minidpo.run import steps
from minidpo.scale import parallel
from minidpo.scale.fast import CHUNK
from minidpo.settings import UserError, knob, parse_settings, run_main


class Plan(namedtuple("Plan", "weights copies gradients optimizer activations head peak")):  # peak: the sum
    def __str__(self):
        return "memory in GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self._asdict().items())


def plan(config, pairs, settings, accumulate=True):
    """Plan of a training step, in bytes. pairs: its largest micro-batch. accumulate: whether it has several of them."""
    L, C, V, bf16 = config.n_layer, config.n_embd, config.vocab_size, settings.dtype == "bfloat16"
    width, embedding = 2 if bf16 else 4, 4 * V * C  # bytes: of a number in matrix products, of the token embedding
    weights = 4 * (V * C + config.block_size * C + L * (12 * C**2 + 13 * C) + 2 * C)
    copies = bf16 * 2 * 12 * L * C**2  # autocast keeps the matrices of the blocks in bfloat16 as well
    longest = [max(len(pair[0]) + len(pair[side]) - 1 for pair in pairs) for side in (1, 2)]  # row, in tokens
    scored = sum(len(chosen) + len(rejected) for _, chosen, rejected in pairs)  # response tokens
    # What a block keeps per token for its backward pass: the inputs of both LayerNorms in fp32 (2 C), then the results
    # of both (2 C), query, key, value (3 C), the result of attention (C), and the MLP before and after GELU (4 C each).
    if settings.fast:  # only attention has rows, with query, key, value and result (4 C)
        n = sum(len(prompt) for prompt, *_ in pairs) + scored - 2 * len(pairs)  # no padding, each prompt once
        block = n * C * (8 + 11 * width) + 2 * len(pairs) * max(longest) * 4 * C * width
        # logits. In bfloat16 also the embedding's copy and the gradient of that, and some logits in fp32
        head = scored * V * width + bf16 * (embedding + 4 * min(CHUNK, scored * V))
    else:
        n = len(pairs) * sum(longest)
        block = n * C * (8 + 14 * width)
        # log-softmax of chosen and of rejected, and logits and gradient of one; later both gradients of the embedding
        head = max(8 * V * n, 2 * embedding)
    # --recompute keeps the inputs of all blocks, and one block is computed again after the memory of the head is free
    activations, head = (4 * n * C * L, max(head, block)) if settings.recompute else (L * block, head)
    state = weights * {"sgd": 1, "rmsprop": 1, "adamw": 2}[settings.optimizer]
    # New gradients wait to be added to earlier ones: in two passes all (matrices in bfloat16), if fast only the head's
    gradients = weights + accumulate * (embedding if settings.fast else weights - copies)
    parts = (weights, copies, gradients, state, activations, head)
    return Plan(*parts, sum(parts))


def plan_of(config, pairs, settings):
    """The Plan of a run of train_dpo.py: of the largest micro-batch that these pairs and settings give."""
    batches = [parallel.share(indices) for _, indices in steps(pairs, settings)]
    cut = settings.cut(batches, pairs)
    plans = (plan(config, [pairs[i] for i in indices], settings, len(cut) > len(batches)) for indices in cut if indices)
    return max(plans, key=lambda planned: planned.peak, default=plan(config, pairs[:1], settings))


def check(policy, pairs, settings):
    """Prints the plan of a run before it starts, and a warning if it may not fit. The policy is on its device."""
    print(planned := plan_of(policy.config, pairs, settings))
    room = available(settings.device) + planned.weights  # which are there already
    if planned.peak > 0.85 * room:  # the plan is within 15 % of the measured peak
        print(f"warning: {settings.device} has {room / 2**30:.2f} GiB. Memory may run out. {advice(settings)}")


def available(device):
    """Bytes that this process can still take on the device; infinite where the system does not say."""
    if device == "cuda":  # what the GPU has free, and what PyTorch has taken but does not use
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if device == "cpu" and (file := Path("/proc/meminfo")).exists():  # Linux
        return 1024 * int(file.read_text(encoding="utf-8").partition("MemAvailable:")[2].split()[0])
    return float("inf")


def advice(settings):
    """Names the flags that save most memory and are not set yet."""
    flags = {"--fast": not getattr(settings, "fast", True), "--micro-batch-size 1": settings.micro_batch_size != 1}
    flags |= {"--recompute": not settings.recompute, "--optimizer rmsprop": settings.optimizer == "adamw"}
    add = " ".join(flag for flag, saves in flags.items() if saves)
    return f"To save memory, add {add}." if add else "Take a smaller model, or shorter rows by --max-length."


@contextlib.contextmanager
def advise(settings):
    """As a `with` block or a decorator: if memory runs out there, raises UserError with the flags that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # PyTorch's allocators raise RuntimeError
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if not re.search("MemoryError|(out of|not enough|can't allocate) memory", reason):
            raise
        raise UserError(f"out of memory on {settings.device} ({reason}). {advice(settings)}") from error


@dataclasses.dataclass
class Settings:
    preset: str = knob("gpt2-large", "shape of the model", choices=tuple(PRESETS))
    optimizer: str = knob("rmsprop", "optimiser", choices=OPTIMIZERS)
    dtype: str = knob("bfloat16", "precision of the matrix products", choices=("float32", "bfloat16"))
    micro_batch_size: int = knob(1, "pairs per forward pass; a step has several of them", least=1)
    length: int = knob(512, "tokens per row, half of them response", least=2)
    recompute: bool = knob(False, "compute each block again in the backward pass")
    fast: bool = knob(False, "minidpo/scale/fast.py in place of response_logps")


def main():
    settings = parse_settings(Settings, "Plans the memory of a training step of DPO.")
    half = [0] * (settings.length // 2)
    pairs = [([0, *half], half, half)] * settings.micro_batch_size  # the last token of a row is only a target
    print(plan(GPTConfig.preset(settings.preset), pairs, settings))


if __name__ == "__main__":
    run_main(main)
