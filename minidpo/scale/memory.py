"""Memory of a training run: a plan before it starts, and advice if memory runs out."""

import contextlib
import dataclasses
import re
from collections import namedtuple
from pathlib import Path

import torch

from minidpo.dataset import count_tokens
from minidpo.model import SHORT
from minidpo.run import steps
from minidpo.scale import parallel
from minidpo.scale.fast import CHUNK
from minidpo.settings import UserError


class Plan(namedtuple("Plan", "weights copies gradients optimizer activations head step samples peak")):
    def __str__(self):
        return "memory in GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self._asdict().items())


def plan(config, rows, settings):
    """Plan of a run on these rows, training and held-out, in bytes. `step` is the sum of the parts before it.

    Nothing but sampling can take more than a training step: loading, saving, the check before the first update,
    reference and evaluation hold less, since they forward micro-batches of the same size without gradients.
    """

    def padded(micro):  # input positions
        lengths = [[len(rows[i][0]) + len(response) - 1 for response in rows[i][1:]] for i in micro]
        return len(micro) * sum(map(max, zip(*lengths, strict=True)))

    micros = settings.cut([parallel.share(batch) for _, batch in steps(rows, settings)], rows)
    size = (lambda micro: count_tokens(rows, micro)) if settings.fast else padded  # --fast has no padding
    rows = [rows[i] for i in max(micros, key=size, default=[0])]
    L, C, V, bf16 = config.n_layer, config.n_embd, config.vocab_size, settings.dtype == "bfloat16"
    width, embedding = 2 if bf16 else 4, 4 * V * C  # bytes: of a number in matrix products, of the token embedding
    weights = 4 * (V * C + config.block_size * C + L * (12 * C**2 + 13 * C) + 2 * C)
    copies = bf16 * 2 * 12 * L * C**2  # autocast keeps the matrices of the blocks in bfloat16 as well
    sides = len(rows[0]) - 1  # a row has one response in SFT and two in DPO
    longest = [max(len(row[0]) + len(row[i + 1]) - 1 for row in rows) for i in range(sides)]  # in tokens
    scored = sum(len(response) for _, *responses in rows for response in responses)  # response tokens
    # What a block keeps per token for its backward pass: the inputs of both LayerNorms in fp32 (2 C), then the results
    # of both (2 C), query, key, value (3 C), the result of attention (C), and the MLP before and after GELU (4 C each).
    if settings.fast:  # only attention has rows, with query, key, value and result (4 C)
        longest = [max(longest)] * sides
        n = sum(len(prompt) for prompt, *_ in rows) + scored - sides * len(rows)  # no padding, each prompt once
        block = n * C * (8 + 11 * width) + len(rows) * sum(longest) * 4 * C * width
        # logits. In bfloat16 also the embedding's copy and the gradient of that, and some logits in fp32
        head = scored * V * width + bf16 * (embedding + 4 * min(CHUNK, scored * V))
    else:
        n = len(rows) * sum(longest)
        block = n * C * (8 + 14 * width)
        # pairs: log-softmax of both sides, and for one side at a time the gradients of log-softmax and of logits.
        # SFT: these three at the scored tokens only
        head = max(8 * V * n if sides == 2 else 12 * V * scored, 2 * embedding)
    if settings.device == "cpu":  # the scores of attention, where they are written out
        short = SHORT[getattr(torch, settings.dtype)]
        block += len(rows) * config.n_head * sum(T * T for T in longest if T <= short) * width
    # --recompute keeps the inputs of all blocks, and one block is computed again after the memory of the head is free
    activations, head = (4 * n * C * L, max(head, block)) if settings.recompute else (L * block, head)
    state = weights * {"sgd": 1, "rmsprop": 1, "adamw": 2}[settings.optimizer]
    # With several micro-batches, new gradients wait beside the sum of the old ones: for pairs without --fast those of
    # all weights, else only the head's
    waiting = weights - copies if sides == 2 and not settings.fast else embedding
    several = 0 < settings.micro_batch_size < settings.batch_size or settings.micro_tokens > 0
    parts = (weights, copies, weights + several * waiting, state, activations, head)
    # Sampling keeps keys and values, in fp32. When half of the samples have ended, the others are copied
    tokens = min(max(len(prompt) for prompt, *_ in rows) + settings.sample_tokens, config.block_size)
    at_once = min(settings.samples, settings.micro_batch_size or settings.samples)
    samples = weights + state + 12 * L * C * tokens * at_once
    return Plan(*parts, sum(parts), samples, max(sum(parts), samples))


def check(model, rows, settings):
    """Prints the plan, and a warning if the run may need more memory than there is. The model is on its device.

    If neither --micro-batch-size nor --micro-tokens is given, it sets the first to the most rows that fit.
    """
    room = available(settings.device) + 4 * sum(weight.numel() for weight in model.parameters())  # already there
    room = parallel.all_sum(room) / parallel.all_sum(1)  # one answer for all processes
    planned, asked = plan(model.config, rows, settings), settings.micro_batch_size or settings.micro_tokens
    while planned.peak > 0.8 * room and not asked and settings.micro_batch_size != 1:  # the plan may be 20 % too low
        settings.micro_batch_size = (settings.micro_batch_size or settings.batch_size) // 2 or 1
        planned = plan(model.config, rows, settings)
    print(planned)
    if settings.micro_batch_size and not asked:
        print(f"--micro-batch-size {settings.micro_batch_size}, because no more rows fit into {room / 2**30:.2f} GiB")
    if planned.peak > 0.8 * room:
        how = advice(model, rows, settings)
        print(f"warning: {settings.device} has {room / 2**30:.2f} GiB. Memory may run out. {how}")


def available(device):
    """Bytes that this process can still take on the device; infinite where the system does not say."""
    if device == "cuda":  # what the GPU has free, and what PyTorch has taken but does not use
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if device == "cpu" and (file := Path("/proc/meminfo")).exists():  # Linux
        return 1024 * int(file.read_text(encoding="utf-8").partition("MemAvailable:")[2].split()[0])
    return float("inf")


def advice(model, rows, settings):
    """Names the flags that save memory, with what each of them alone would save."""
    peak, found = plan(model.config, rows, settings).peak, []
    for name, value in dict(fast=True, micro_batch_size=1, recompute=True, optimizer="rmsprop").items():
        other = dataclasses.replace(settings, **{name: value})
        if (saved := peak - plan(model.config, rows, other).peak) > 0:
            flag = "--" + name.replace("_", "-") + (f" {value}" if value is not True else "")
            found.append(f"{flag} saves {saved / 2**30:.2f} GiB")
    return f"{', '.join(found)}." if found else "Take a smaller model, or shorter rows by --max-length."


@contextlib.contextmanager
def advise(model, rows, settings):
    """`with` block: if memory runs out there, raises UserError with the flags that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # PyTorch's allocators raise RuntimeError
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if not re.search("MemoryError|(out of|not enough|can't allocate) memory", reason):
            raise
        how = advice(model, rows, settings)
        raise UserError(f"out of memory on {settings.device} ({reason}). {how}") from error
