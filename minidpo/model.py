"""GPT-2 (Radford et al. 2019), exactly: the transformer of both training stages. Read `GPT.hidden` first, then `Block`.

Shapes: B rows, T tokens, C channels, H heads, V vocabulary. Weights have the names of OpenAI's release.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minidpo.settings import UserError, unknown

PRESETS = {  # GPT-2's four sizes have 124 M, 355 M, 774 M and 1.6 B weights
    "toy": dict(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=64),
    "toy-wide": dict(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=128),
    "imdb": dict(vocab_size=4096, block_size=256, n_layer=2, n_head=4, n_embd=256),
    "imdb-wide": dict(vocab_size=4096, block_size=256, n_layer=2, n_head=8, n_embd=512),
    "gpt2": dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(vocab_size=50257, block_size=1024, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(vocab_size=50257, block_size=1024, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(vocab_size=50257, block_size=1024, n_layer=48, n_head=25, n_embd=1600),
}
LAYER_NORM_EPS = 1e-5
SHORT = {torch.float32: 64, torch.bfloat16: 512}  # longest rows (tokens) whose attention is written out on a CPU


@dataclasses.dataclass
class GPTConfig:
    """The shape of a model."""

    vocab_size: int
    block_size: int  # the context: the longest row, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0  # probability, in train mode only
    extra_rows: int = dataclasses.field(default=0, repr=False)  # rows of the embedding without a token

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} does not divide into {self.n_head} heads.")

    @classmethod
    def preset(cls, name, **overrides):
        """Returns the shape `name`, with some fields replaced: GPTConfig.preset("toy", vocab_size=600)."""
        if name not in PRESETS:
            raise unknown("preset", name, list(PRESETS))
        return cls(**{**PRESETS[name], **overrides})


def causal_attention(q, k, v, dropout=0.0):
    """q, k, v (B, H, T, D) -> (B, H, T, D): softmax(q k^T / sqrt(D)) v, without the keys of later positions."""
    T, D = q.shape[-2:]
    if q.device.type != "cpu" or T > SHORT.get(q.dtype, 0) or dropout:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # The same, written out: on a CPU this is faster for short rows, above all the backward pass in bf16. For long rows
    # the fused kernel saves memory, because it does not keep the scores.
    later = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(later, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=D**-0.5)  # (B H, T, T)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(q.shape)


class Attention(nn.Module):
    """Causal self-attention with H heads of C / H channels."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):  # x: (B, T, C)
        B, T, C = x.shape
        # q, k, v: (B, H, T, C/H)
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)  # eval() does not reach a function
        else:
            k, v, mask = cache.extend(self, k, v)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers, with 4 C channels and the tanh form of GELU between them."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Adds the outputs of attention and MLP to the residual stream x (B, T, C). Each reads x after a LayerNorm."""

    recompute = compiled = False  # see GPT.prepare

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, cache, use_reentrant=False)
        return self._forward(x, cache)

    def _forward(self, x, cache):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, V). The logits at position t predict the token at t + 1."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size + config.extra_rows, config.n_embd)  # token embedding, tied head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embedding
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        # Initial weights: matrices normal, std 0.02; biases 0; LayerNorms 1. Each block adds to the stream twice, by
        # the two c_proj. Their weights are smaller, so that the stream's variance does not grow with the depth.
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def hidden(self, ids, cache=None):
        """ids (B, T) -> (B, T, C), the stream after the final LayerNorm. With a cache, ids continue the rows in it."""
        T = ids.shape[1]
        if cache is None and T > self.config.block_size:
            raise UserError(f"a row of {T} tokens is longer than the model's context of {self.config.block_size}.")
        positions = torch.arange(T, device=ids.device) if cache is None else cache.start(ids)
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for block in self.h:
            x = block(x) if cache is None else block.forward(x, cache)  # .forward is not compiled
        return self.ln_f(x)

    @property
    def head(self):  # (V, C). A slice of all rows would cost a copy in the backward pass
        return self.wte.weight[: self.config.vocab_size] if self.config.extra_rows else self.wte.weight

    def logits(self, hidden):
        """(..., C) -> (..., V), in the precision of the weights (fp32), even under autocast.

        GPT-2's logits are -30 to -100. There, bf16 has steps of 0.125 to 0.5, an error of up to 1 nat per response.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.wte.weight.dtype), self.head)

    def forward(self, ids):
        return self.logits(self.hidden(ids))

    def set_dropout(self, p):
        """Sets the probability of every dropout, also of attention's, which is a plain number."""
        self.config.dropout = p
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, Attention):
                module.dropout = p

    def prepare(self, compile=False, recompute=False):
        """Sets how the blocks run in training. The names of the weights stay the same. Returns self.

        recompute: compute each block again in the backward pass (arXiv 1604.06174): a third more work, less memory.
        compile: torch.compile, block by block, so that all layers share one compilation. Only rounding changes.
        """
        for block in self.h:
            block.recompute, block.compiled = recompute, compile
            if compile:
                block.compile()
        return self
