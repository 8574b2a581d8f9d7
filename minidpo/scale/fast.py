"""The log-probabilities of both stages, with less time and memory (--fast).

`response_logps` at the end returns the numbers of train_dpo.response_logps, but skips work that does not change them.
The two rows of a pair begin with the same tokens: these are computed once. One matrix (N, C) holds all tokens, so only
attention has rows and padding. Logits are computed only where a response token is predicted. There is no dropout.
docs/fast.md measures each idea. `row_logps` serves both stages: SFT gives it one side of rows, DPO gives it two, chosen
and rejected.

Shapes: B rows per side, R rows in all, T positions, N tokens (a shared one counts once), n scored tokens, C channels,
V vocabulary.
"""

import ctypes
import functools
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from minidpo.model import causal_attention
from minidpo.settings import UserError

CHUNK = 2**22  # number of logits that are computed at a time, in fp32


class Packed(NamedTuple):
    """The N tokens of a batch, and where each stands in the rows.

    The chosen rows come first, then the rejected rows. For one pair with the inputs  e 5 7 8  and  e 5 6  the shared
    prompt is  e 5,  so ids is  e 5 7 8 6,  and

        field       value        meaning
        place       0 1 2 3      per row and position: the index of its token in ids (padding: any index)
                    0 1 4 .
        home        0 1 2 3 6    per token: its first position among the R * T positions of all rows
    """

    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,), in their rows
    place: torch.Tensor  # (R, T)
    home: torch.Tensor  # (N,)
    scored: torch.Tensor  # (n,): index of the token that predicts each scored target
    targets: torch.Tensor  # (n,)
    row: torch.Tensor  # (n,): the row of each scored target


def pack(*sides):
    """Rows -> Packed; for pairs the Rows of the chosen and the Rows of the rejected responses."""
    T = max(rows.ids.shape[1] for rows in sides)
    padded = [[F.pad(tensor, (0, T - tensor.shape[1])) for tensor in rows] for rows in sides]
    ids, targets, mask = map(torch.stack, zip(*padded, strict=True))  # each (sides, B, T)
    real = real_positions(mask)
    shared = shared_prefix(ids, real)
    own = real & ~shared
    number = own.flatten().cumsum(0).view_as(own) - 1  # the index in `ids` of each own token
    place = torch.where(shared, number[0], number).clamp(min=0)  # a shared token is the chosen row's
    return Packed(
        ids=ids[own],
        positions=torch.arange(T, device=ids.device).expand_as(own)[own],
        place=place.flatten(0, 1),
        home=own.flatten().nonzero()[:, 0],
        scored=place[mask],
        targets=targets[mask],
        row=mask.flatten(0, 1).nonzero()[:, 0],
    )


def real_positions(mask):
    """mask (sides, B, T) -> true where a token is. Everything after the last scored position is padding."""
    return mask.flip(-1).cumsum(-1).flip(-1) > 0


def shared_prefix(ids, real):
    """ids, real (sides, B, T) -> true where the second side repeats the first, up to the first different token."""
    equal = ((ids == ids[0]) & real & real[0]).cumprod(-1).bool()  # cumprod: 1 until the first difference
    equal[0] = False
    return equal


class ScoredLogps(torch.autograd.Function):
    """hidden (n, C), embedding (V, C), targets (n,) -> log-probabilities of the targets (n,), in fp32 or float64.

    Logits are computed for a few tokens at a time. Only the gradient with respect to them is kept (n, V), in `dtype`:
    onehot(target) - softmax. Under autocast this is bf16, and so are both products of the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, embedding, targets, dtype):
        gradient = hidden.new_empty(len(hidden), len(embedding) if ctx.needs_input_grad[0] else 0, dtype=dtype)
        size, found = max(1, CHUNK // len(embedding)), []
        parts = (tensor.split(size) for tensor in (hidden.to(embedding.dtype), targets[:, None], gradient))
        for x, target, kept in zip(*parts, strict=True):
            logps = F.linear(x, embedding).log_softmax(-1)
            found.append(logps.gather(-1, target))
            if kept.numel():
                kept.copy_(logps.exp_().neg_().scatter_add_(-1, target, torch.ones_like(found[-1])))
        ctx.save_for_backward(hidden, embedding, gradient)
        return torch.cat(found).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        hidden, embedding, gradient = ctx.saved_tensors
        weight, grad = embedding, grad[:, None]
        if gradient.dtype != embedding.dtype:
            # a row of `gradient` sums to 0, so the mean of the weights adds nothing; smaller weights round less
            weight = torch.sub(weight, weight.mean(0), out=torch.empty_like(weight, dtype=gradient.dtype))
        to_hidden = grad * (gradient @ weight)
        to_embedding = gradient.T @ (grad * hidden).to(gradient.dtype)
        return to_hidden.to(hidden.dtype), to_embedding.to(embedding.dtype), None, None


def hidden_states(model, packed):
    """`model.hidden` at the scored tokens -> (n, C)."""
    x = model.wte(packed.ids) + model.wpe(packed.positions)
    for block in model.h:
        # after the last attention no token reads another, so only the scored ones continue
        scored = packed.scored if block is model.h[-1] else None
        function = compiled_through() if block.compiled else through
        if block.recompute and torch.is_grad_enabled():
            function = functools.partial(recompute, function, use_reentrant=False)
        x = function(block, x, packed, scored)
    return model.ln_f(x)


def through(block, x, packed, scored=None):
    """Block.forward on packed tokens: x (N, C) -> the residual stream of the tokens `scored` (None: of all)."""
    R, T = packed.place.shape
    # index_select, not x[index]: on a CPU its backward pass is several times as fast
    qkv = block.attn.c_attn(block.ln_1(x)).index_select(0, packed.place.flatten())  # (R T, 3C)
    y = causal_attention(*qkv.view(R, T, 3, block.attn.n_head, -1).permute(2, 0, 3, 1, 4))  # (R, H, T, C/H)
    home = packed.home  # y is read at these positions only, so never at padding
    if scored is not None:
        x, home = x.index_select(0, scored), home[scored]
    y = y.transpose(1, 2).reshape(R * T, -1).index_select(0, home)
    x = x + block.attn.c_proj(y)
    return x + block.mlp(block.ln_2(x))


@functools.cache
def compiled_through():
    """`through` by torch.compile. It compiles once for all blocks and sizes, and once more for the last block."""
    return torch.compile(through, dynamic=True)


def row_logps(model, *sides):
    """Rows -> log pi(y|x) of each row (R,), summed over its response; for pairs the chosen, then the rejected."""
    if model.training and model.config.dropout:
        raise UserError(f"--fast has no dropout. Leave out --fast, or --dropout {model.config.dropout}.")
    packed = pack(*sides)
    hidden = hidden_states(model, packed)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.wte.weight.dtype
    with torch.autocast(device, enabled=False):
        logps = ScoredLogps.apply(hidden, model.head, packed.targets, dtype)
    return logps.new_zeros(len(packed.place)).index_add(0, packed.row, logps)


def response_logps(model, batch):
    """PreferenceBatch -> log pi(y|x) of the chosen and of the rejected responses (B,), (B,), summed per response."""
    return row_logps(model, batch.chosen, batch.rejected).chunk(2)


def keep_freed_memory():
    """Makes glibc keep freed memory for the next step. It changes the whole process, so only the scripts call it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX = 0: no block gets its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give back nothing below 2 GiB
