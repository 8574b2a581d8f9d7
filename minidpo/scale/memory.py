"""Memory of a DPO run: a plan before it starts, and advice if memory runs out.

    python -m minidpo.scale.memory --preset gpt2-large --fast --recompute

The plan adds up the tensors of one training step, in bytes. It is within 15 % of the measured peak: docs/large.md.
"""

import contextlib
import dataclasses
import math
from collections import namedtuple
from pathlib import Path

import torch

from minidpo import dataset
from minidpo.device import DEVICES, DTYPES
from minidpo.model import GPT, PRESETS, GPTConfig
from minidpo.optim import OPTIMIZERS
from minidpo.scale import parallel
from minidpo.scale.fast import CHUNK
from minidpo.settings import UserError, knob, parse_settings, run_main

GIB = 2**30
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
ACCURACY = 0.15  # of the plan, against the measured peak
STATE = {"sgd": 1, "rmsprop": 1, "adamw": 2}  # numbers that the optimiser keeps per weight
Plan = namedtuple("Plan", "weights copies gradients optimizer activations head peak")  # bytes; peak: at most at once
Size = namedtuple("Size", "positions aligned tokens scored longest")


def size_of(pairs):
    """Size of a micro-batch of pairs (prompt_ids, chosen_ids, rejected_ids), in tokens."""
    chosen, rejected = (max(len(pair[0]) + len(pair[side]) - 1 for pair in pairs) for side in (1, 2))
    scored = sum(len(chosen) + len(rejected) for _, chosen, rejected in pairs)  # response tokens
    tokens = sum(len(prompt) for prompt, *_ in pairs) + scored - 2 * len(pairs)  # no padding, each prompt once
    longest = max(chosen, rejected)
    # positions: with padding, chosen and rejected rows apart; aligned: with padding, all rows as long as the longest
    return Size(len(pairs) * (chosen + rejected), 2 * len(pairs) * longest, tokens, scored, longest)


def plan(config, optimizer, dtype, size, recompute=False, accumulate=True, fast=False, device="cuda"):
    """The memory of one training step of train_dpo.py with these settings -> Plan.

    size: of the largest micro-batch. accumulate: whether a step has several of them, so that the gradients of the first
    are kept while the second is computed.
    """
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    with torch.device("meta"):  # shapes without memory
        weights = 4 * GPT(config).n_parameters
    half = dtype == "bfloat16"
    width = 2 if half else 4  # bytes of a number in matrix products
    copies = 2 * 12 * L * C**2 if half else 0  # of the blocks' matrices, which autocast keeps in bfloat16
    embedding = 4 * V * C
    kept = weights if accumulate else 0  # gradients of earlier micro-batches

    # What a block keeps of a token for its backward pass: what goes into both LayerNorms, in fp32 (2 C), and what goes
    # into and out of its products: both LayerNorms' results (2 C), query, key, value (3 C), attention's result (C), and
    # the MLP before and after GELU (4 C + 4 C).
    if fast:  # attention's part is laid out in rows; without a fused kernel it keeps the heads' weights, not the result
        n = size.tokens
        in_rows = 3 * C + config.n_head * size.longest if half and device == "cpu" else 4 * C
        mlp = C * (4 + 9 * width)
        block = n * (C * (4 + 2 * width) + mlp) + size.aligned * width * in_rows
        activations = L * block - (n - size.scored) * mlp  # the last MLP sees scored tokens only
        # logits; in bfloat16 also the embedding's copy, its gradient before it is raised, and a chunk of fp32 logits
        head = size.scored * V * width + (embedding + 4 * min(CHUNK, size.scored * V) if half else 0)
    else:
        n = size.positions
        block = n * C * (8 + 14 * width)
        activations = L * block
        head = 4 * (4 * V * n / 2)  # logits of chosen, of rejected, log-softmax and gradient
    again = 0
    if recompute:  # each block's input, and one block with the gradients in its MLP; of one side, if not fast
        activations, again = 4 * n * C * L, (block + 8 * n * C * width) / (1 if fast else 2)

    start = kept + copies + activations + max(head, again)  # of the backward pass
    if fast:
        peak = embedding + max(start, weights)
    else:  # two passes over the same weights: the gradients of one wait for those of the other
        peak = max(start, kept + weights + activations / 2 + max(head, 2 * embedding))
    state = STATE[optimizer] * weights
    return Plan(*map(int, (weights, copies, weights, state, activations + again, head, weights + state + peak)))


def plan_of(config, pairs, settings):
    """The Plan of the largest micro-batch that a run of train_dpo.py with these settings will meet."""
    epochs = range(max(1, math.ceil(settings.epochs)))
    steps = [step for epoch in epochs for step in dataset.batches(pairs, settings.batch_size, settings.seed, epoch)]
    cut = settings.cut([parallel.mine(indices) for indices in steps], pairs)
    sizes = [size_of([pairs[i] for i in indices]) for indices in cut if indices]
    largest = Size(*(max(numbers) for numbers in zip(*sizes, strict=True)))
    how = {name: getattr(settings, name) for name in ("optimizer", "dtype", "recompute", "fast", "device")}
    return plan(config, size=largest, accumulate=len(cut) > len(steps), **how)


def check(policy, pairs, settings):
    """Prints the plan of a run before it starts, and a warning if it may not fit. The policy is on its device."""
    planned = plan_of(policy.config, pairs, settings)
    print(f"memory plan: {describe(planned)}")
    free = available(settings.device)
    if free is not None and planned.peak > (1 - ACCURACY) * (free + planned.weights):  # the weights are there already
        room = (free + planned.weights) / GIB
        print(f"warning: {settings.device} has {room:.2f} GiB, so memory may run out. {advice(settings)}")


def describe(planned):
    return ", ".join(f"{name} {value / GIB:.2f}" for name, value in planned._asdict().items()) + " GiB"


def advice(settings):
    """A sentence that names the flags that save most memory, as far as they are not set."""
    saves = {
        "--fast": not getattr(settings, "fast", True),
        "--micro-batch-size 1": settings.micro_batch_size != 1,
        "--recompute": not settings.recompute,
        "--optimizer rmsprop": settings.optimizer == "adamw",
    }
    flags = " ".join(flag for flag, helps in saves.items() if helps)
    return f"To need less, add {flags}." if flags else "To need less, take a smaller model or shorten rows by --max-length."


@contextlib.contextmanager
def advise(settings):
    """Within it (or a function that it decorates), running out of memory raises UserError with the flags that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # PyTorch's allocators raise RuntimeError
        reason = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and not any(words in reason for words in OUT_OF_MEMORY):
            raise
        raise UserError(f"out of memory on {settings.device} ({reason}). {advice(settings)}") from error


def available(device):
    """Bytes that this process can still take on `device`; None where the system does not say."""
    if device == "cuda":  # what the card has free, and what PyTorch holds of it without using it
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if not Path("/proc/meminfo").exists():  # not Linux
        return None
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    return 1024 * int(text.partition("MemAvailable:")[2].split()[0])
