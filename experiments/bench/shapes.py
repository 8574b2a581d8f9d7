"""What the benchmark runs: shapes of models and rows, implementations, random rows, and counts of their work."""

import random

from minidpo.model import PRESETS

# A shape holds:
#   model             the fields of GPTConfig
#   sft               true for a step of train_sft.py: a row of prompt and response takes the place of each pair
#   pairs, batches    pairs per step, and how many batches the steps visit in turn
#   prompt, response  fewest and most random ids; an eot is added to each prompt and to each response
#   steps, warmup     steps of one process; the first `warmup` steps are not timed
#   lr, optimizer     a rate that moves the loss and keeps the steps stable
#   micro_batch       pairs per forward pass; without it all pairs, on CUDA as many as the memory plan allows
SMALL = dict(batches=2, steps=16, warmup=4, lr=3e-5, optimizer="adamw")
GPT2 = dict(model=PRESETS["gpt2"], batches=1, steps=4, warmup=1, lr=1e-6, optimizer="adamw")
ROWS = dict(sft=True, prompt=(0, 0))  # all tokens after the first eot are scored
CPU_SHAPES = {
    "W1": dict(SMALL, model=PRESETS["toy-wide"], pairs=64, prompt=(4, 8), response=(16, 48)),
    "W2": dict(GPT2, pairs=8, prompt=(4, 8), response=(32, 64)),
    "W3": dict(GPT2, pairs=4, prompt=(200, 350), response=(25, 60)),
    "S1": dict(SMALL, **ROWS, model={**PRESETS["toy"], "vocab_size": 1232}, pairs=32, response=(19, 49)),
    "S2": dict(SMALL, **ROWS, model={**PRESETS["imdb"], "n_layer": 4}, pairs=16, response=(99, 249)),
    "S3": dict(GPT2, **ROWS, pairs=4, response=(99, 249)),
}
LENGTHS = {"full": ((255, 255), (256, 256)), "summaries": ((349, 349), (25, 45)), "reviews": ((3, 7), (32, 64))}
LARGE = dict(batches=1, steps=4, warmup=1, lr=1e-6, optimizer="rmsprop")
GPU_SHAPES = {  # the most important first
    f"{size}-{name}": dict(LARGE, model=PRESETS[size], pairs=64, prompt=prompt, response=response)
    for size in ("gpt2-large", "gpt2", "gpt2-medium", "gpt2-xl")
    for name, (prompt, response) in LENGTHS.items()
}
SHAPES = CPU_SHAPES | GPU_SHAPES
SHAPES["gpt2-large-short"] = dict(  # for the memory of gpt2-large on a CPU: rows of 64 tokens
    LARGE, model=PRESETS["gpt2-large"], pairs=2, micro_batch=1, prompt=(31, 31), response=(32, 32)
)
TRIAL = SHAPES["trial"] = dict(  # a model of 7,000 weights, to try the command
    model=dict(vocab_size=90, block_size=64, n_layer=2, n_head=2, n_embd=16), pairs=3, batches=2, prompt=(2, 9),
    response=(1, 7), steps=4, warmup=1, lr=1e-2, optimizer="adamw",
)  # fmt: skip
SHAPES["trial-sft"] = dict(TRIAL, sft=True)

OURS, PEER = "minidpo", "trl-precomputed"
DPO_ONLY = (PEER, "trl")
LEAN = dict(flags=dict(fast=True, recompute=True), micro_batch=1)
IMPLEMENTATIONS = {  # name: what it adds to a shape or replaces in it; `flags` are those of both scripts
    "minidpo": dict(flags=dict(fast=True)),
    "minidpo-plain": dict(flags={}),
    "minidpo-plain-adamw": dict(flags={}, optimizer="adamw"),
    "minidpo-compiled": dict(flags=dict(fast=True, compile=True)),
    "minidpo-lean": LEAN,
    "minidpo-lean-adamw": dict(LEAN, optimizer="adamw"),
    **{name: {} for name in (*DPO_ONLY, "hf-plain")},
}
DTYPES = ("float32", "bfloat16")
ON_CPU = (OURS, "minidpo-plain", PEER, "trl", "hf-plain")
ON_CUDA = ("minidpo-compiled", PEER, OURS, "minidpo-plain", "minidpo-lean", "minidpo-lean-adamw")
DEFAULTS = {"cpu": (CPU_SHAPES, ON_CPU, DTYPES), "cuda": (GPU_SHAPES, ON_CUDA, ("bfloat16",))}


def work_of(shape, implementation, dtype, device="cpu", threads=0):
    """Returns the work of one process, as worker.py takes it, from an entry of SHAPES and an implementation's name."""
    name, _, idea = implementation.partition(" without ")  # an idea of ablation.py
    how = dict(implementation=name, without=idea, dtype=dtype, device=device, threads=threads)
    return {**shape, **IMPLEMENTATIONS[name], **how}


def random_pairs(work):
    """Returns the pairs (prompt, chosen, rejected) or SFT rows (prompt, response) of all batches, made of random ids.

    The last id of the vocabulary stands for the eot: it opens each prompt and ends each response.
    """
    draw, eot = random.Random(0), work["model"]["vocab_size"] - 1

    def ids(bounds):
        return [draw.randrange(eot) for _ in range(draw.randint(*bounds))]

    return [
        ([eot, *ids(work["prompt"])], *([*ids(work["response"]), eot] for _ in range(1 if work.get("sft") else 2)))
        for _ in range(work["batches"] * work["pairs"])
    ]


def batch_of(step, work):
    """Returns the indices of a step's pairs in `random_pairs`. The steps visit the batches in turn."""
    first = step % work["batches"] * work["pairs"]
    return list(range(first, first + work["pairs"]))


def count(pairs, shared):
    """Counts what a step computes on these pairs -> (tokens, squares, scored).

    tokens: input positions, without padding. squares: the sum of the squared lengths of the rows. scored: response
    tokens. `shared`: the prompt of a pair runs through the model once for both responses, and counts once.
    """
    tokens = squares = scored = 0
    for prompt, *responses in pairs:
        lengths = [len(prompt) + len(response) - 1 for response in responses]  # the last token is only a target
        repeated = len(prompt) if shared else 0
        tokens += sum(lengths) - repeated
        squares += sum(length**2 for length in lengths) - repeated**2
        scored += sum(len(response) for response in responses)
    return tokens, squares, scored


def mfu_flops(model, pairs, shared):
    """Returns the floating-point operations that a training step on these pairs has to do, as MFU counts them.

    A weight takes 2 operations per token, three times: forward, and backward for both factors. Attention counts its
    causal half. Padding and recomputation do not count.
    """
    L, C, V = (model[name] for name in ("n_layer", "n_embd", "vocab_size"))
    tokens, squares, scored = count(pairs, shared)
    blocks = L * (12 * C * C + 13 * C)  # 4 C^2 in attention, 8 C^2 in the MLP, biases and LayerNorms
    return 6 * blocks * tokens + 6 * L * C * squares + 6 * V * C * scored


def fast_flops(model, pairs):
    """Returns the floating-point operations in the matrix products of the fast path: linear layers, head, attention.

    Each product comes three times in a step: forward, and backward for both factors.
    """
    L, C, V = (model[name] for name in ("n_layer", "n_embd", "vocab_size"))
    tokens, squares, scored = count(pairs, shared=True)
    seen = (squares + tokens) // 2  # a token sees itself and those before it: 1 + 2 + ... + n = (n^2 + n) / 2
    before_attention = 3 * C * C * tokens * L
    after_attention = 9 * C * C * (tokens * (L - 1) + scored)  # in the last block at scored tokens only
    return 6 * (before_attention + after_attention + C * V * scored + 2 * L * C * seen)
