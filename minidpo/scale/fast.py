"""The fast path: `response_logps` of train_dpo.py, the same numbers in less time and memory (--fast).

Read train_dpo.response_logps first; this computes the same sums. What it leaves out is work whose result is known or
never looked at, and what that gains: a step's time without it over the time with it, on the shapes W1 / W2 / W3 of
docs/bench.md (the toy; short reviews and long prompts with GPT-2 small) in bf16 on two cores. docs/fast.md has more.

    the shared prompt    1.04 / 1.06 / 1.58   chosen and rejected rows begin alike, and a causal model sees nothing else
                                              there: these positions are computed once a pair
    padding              1.40 / 1.22 / 1.19   the tokens of all rows stand in one matrix (N, C); only attention needs
                                              rows
    unscored positions   1.13 / 1.07 / 1.32   logits (V numbers each) are made where a response token is predicted, and
                                              nowhere else
    copies of logits     1.0                  their gradient is written over them: 9 % of W2's peak memory

Dropout is not applied: train_dpo.py has it at 0.

Shapes: B pairs, R = 2B rows, T positions in the longest, N different tokens, n scored tokens, C channels, V vocabulary.
"""

import ctypes
import functools
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 2**22  # logits that are raised to fp32 at a time


class Packed(NamedTuple):
    """The N different tokens of a batch, and where the rows find them. Rows are counted chosen first, then rejected.

    For one pair with inputs  e 5 7 8  and  e 5 6  (the shared prompt is  e 5):  ids = e 5 7 8 6, and

        place       0 1 2 3      which of the N tokens stands at each position of each row (padding: any)
                    0 1 4 .
        home        0 1 2 3 6    the position, of the R * T, that each token's attention is read at
        again_at    4 5          the other positions that shared tokens stand at ...
        again_of    0 1          ... and which tokens these are
    """

    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,), in their rows
    place: torch.Tensor  # (R, T)
    own: torch.Tensor  # (R, T), true at the homes
    home: torch.Tensor  # (N,)
    again_at: torch.Tensor
    again_of: torch.Tensor
    scored: torch.Tensor  # (n,): at which token each scored target is predicted
    targets: torch.Tensor  # (n,)
    row: torch.Tensor  # (n,): whose response it belongs to


def pack(batch):
    """PreferenceBatch -> Packed."""
    T = max(rows.ids.shape[1] for rows in batch)
    ids, targets, scored = (
        torch.stack([F.pad(rows[i], (0, T - rows[i].shape[1])) for rows in batch]) for i in range(3)
    )  # each (2, B, T)
    real = real_positions(scored)
    shared = shared_prefix(ids, real)  # (B, T)
    own = torch.stack([real[0], real[1] & ~shared])
    number = own.flatten().cumsum(0).view_as(own) - 1
    place = torch.stack([number[0], torch.where(shared, number[0], number[1])]).clamp(min=0).view(-1, T)
    again = torch.stack([torch.zeros_like(shared), shared]).flatten().nonzero().squeeze(-1)
    scored = scored.view(-1, T)
    return Packed(
        ids=ids[own],
        positions=torch.arange(T, device=ids.device).expand_as(own)[own],
        place=place,
        own=own.view(-1, T),
        home=own.flatten().nonzero().squeeze(-1),
        again_at=again,
        again_of=place.flatten()[again],
        scored=place[scored],
        targets=targets.view(-1, T)[scored],
        row=scored.nonzero()[:, 0],
    )


def real_positions(scored):
    """scored (2, B, T) -> where a token stands (2, B, T): what follows the last scored position is padding."""
    return scored.flip(-1).cumsum(-1).flip(-1) > 0


def shared_prefix(ids, real):
    """Where chosen and rejected row are the same from the start on: (2, B, T) each -> (B, T).

    Found by comparing them, so nothing is assumed of prompts, and responses that begin alike share that, too.
    """
    return ((ids[0] == ids[1]) & real[0] & real[1]).cumprod(-1).bool()


class ToRows(torch.autograd.Function):
    """(N, K) -> (R, T, K): every position gets its token. Backward adds up the places of each token.

    Indexing would do the same; but its backward adds row by row into zeros, while here all but the shared tokens have
    one place, and fetching from there is a copy. Gain, with FromRows: 1.22 / 1.02 / 1.05.
    """

    @staticmethod
    def forward(ctx, x, packed):
        ctx.packed = packed
        return x[packed.place]

    @staticmethod
    def backward(ctx, grad):
        grad = grad.flatten(0, 1)
        out = grad[ctx.packed.home]
        return out.index_add_(0, ctx.packed.again_of, grad[ctx.packed.again_at]), None


class FromRows(torch.autograd.Function):
    """(R, T, K) -> (N, K): every token is read at its home. Backward leaves zeros everywhere else."""

    @staticmethod
    def forward(ctx, x, packed):
        ctx.packed = packed
        return x.flatten(0, 1)[packed.home]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.packed.place] * ctx.packed.own[..., None], None


class ScoredLogps(torch.autograd.Function):
    """hidden (n, C), the embedding (V, C), targets (n,) -> log-probabilities of the targets (n,), at least fp32.

    Its one large tensor is the logits (n, V), and backward turns them into their gradient where they lie (so it can run
    once): d logp_t / d logits = onehot(target) - softmax. In bf16 the vocabulary's mean is taken out of the embedding
    first: it adds the same to all logits of a token, which log-softmax ignores, and GPT-2's -30 to -100 is mostly that;
    what is left is small, where bf16 has fine steps. Everything after the product is fp32.
    """

    @staticmethod
    def forward(ctx, hidden, embedding, targets, dtype):
        ctx.dtypes = hidden.dtype, embedding.dtype
        if dtype.itemsize == 2:
            mean, full, embedding = embedding.mean(0), embedding, torch.empty_like(embedding, dtype=dtype)
            for part, kept in zip(full.split(CHUNK // len(mean)), embedding.split(CHUNK // len(mean)), strict=True):
                kept.copy_(part - mean)
        hidden, embedding = hidden.to(dtype), embedding.to(dtype)
        logits = hidden @ embedding.T
        raised = torch.promote_types(dtype, torch.float32)
        log_z = torch.cat([part.to(raised).logsumexp(-1) for part in logits.split(max(1, CHUNK // logits.shape[1]))])
        ctx.save_for_backward(hidden, embedding, targets, logits, log_z)
        return logits.gather(-1, targets[:, None]).squeeze(-1).to(raised) - log_z

    @staticmethod
    def backward(ctx, grad):
        hidden, embedding, targets, logits, log_z = ctx.saved_tensors
        size = max(1, CHUNK // logits.shape[1])
        for part, z, g in zip(logits.split(size), log_z.split(size), grad.split(size), strict=True):
            p = part if part.dtype == z.dtype else part.to(z.dtype)
            part.copy_(p.sub_(z[:, None]).exp_().mul_(-g[:, None]))
        logits[torch.arange(len(targets), device=grad.device), targets] += grad.to(logits.dtype)
        hidden_dtype, embedding_dtype = ctx.dtypes
        # no gradient of the mean is missing: over the vocabulary those of the logits add up to 0
        return (logits @ embedding).to(hidden_dtype), (logits.T @ hidden).to(embedding_dtype), None, None


def hidden_states(model, packed):
    """As `model.hidden`, but of the scored tokens alone -> (n, C)."""
    # sparse: the gradient of N rows is added to the head's, where a dense one would be (V, C), and mostly zeros: 4 % of
    # W2's peak memory
    x = F.embedding(packed.ids, model.wte.weight, sparse=True) + model.wpe(packed.positions)
    for block in model.h:
        # after the last attention no token looks at another: only the scored ones go on (1.0 / 1.0 / 1.09)
        goes_on = packed.scored if block is model.h[-1] else slice(None)
        function = compiled_through() if block.compiled else through
        if block.recompute and torch.is_grad_enabled():
            x = checkpoint(function, block, x, packed, goes_on, use_reentrant=False)
        else:
            x = function(block, x, packed, goes_on)
    return model.ln_f(x)


def through(block, x, packed, goes_on):
    """Block.forward on packed tokens: x (N, C) -> the stream of the tokens `goes_on`."""
    qkv = ToRows.apply(block.attn.c_attn(block.ln_1(x)), packed)  # (R, T, 3C)
    y = causal_attention(*qkv.unflatten(-1, (3, block.attn.n_head, -1)).permute(2, 0, 3, 1, 4))  # (R, H, T, C/H)
    y = FromRows.apply(y.transpose(1, 2).flatten(2), packed)  # (N, C); padding stands behind: nothing real sees it
    x = x[goes_on] + block.attn.c_proj(y[goes_on])
    return x + block.mlp(block.ln_2(x))


@functools.cache
def compiled_through():
    """`through` by torch.compile: one compilation for all blocks and sizes, another for the last block."""
    return torch.compile(through, dynamic=True)


def causal_attention(q, k, v):
    """q, k, v (R, H, T, D) -> (R, H, T, D)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # written out: the CPU's fused kernel takes several times as long for the backward in bf16 (1.77 / 1.14 / 1.26)
    R, H, T, D = q.shape
    bias = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    q, k, v = (t.reshape(R * H, T, D) for t in (q, k, v))
    return (torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1) @ v).view(R, H, T, D)


def response_logps(model, batch):
    """log pi(y|x) of both responses of each pair, as train_dpo.response_logps: a PreferenceBatch -> (B,), (B,)."""
    keep_freed_memory()
    packed = pack(batch)
    hidden = hidden_states(model, packed)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.wte.weight.dtype
    with torch.autocast(device, enabled=False):
        logps = ScoredLogps.apply(hidden, model.wte.weight, packed.targets, dtype)
    sums = logps.new_zeros(len(packed.place)).index_add(0, packed.row, logps)
    return sums.chunk(2)


@functools.cache
def keep_freed_memory():
    """Has the C library keep large blocks for the next step: from the kernel each costs a page fault every 4 KiB.

    Of use on a CPU, where a step's gradients and logits are made anew (1.08 / 1.12 / 1.17). glibc only.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel, however large
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give back nothing below 2 GiB
