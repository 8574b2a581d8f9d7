"""GPT-2, exactly: the transformer that both training stages use.

Read `GPT.forward` first, then `Block`. Shapes: B rows, T tokens, C channels, H heads, V vocabulary.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names of weights as in OpenAI's release.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minidpo.settings import UserError, unknown

PRESETS = {  # block_size, n_layer, n_head, n_embd; 124 M, 355 M, 774 M and 1.6 B weights for GPT-2's four sizes
    "toy": dict(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=64),
    "toy-wide": dict(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=128),
    "imdb": dict(vocab_size=4096, block_size=256, n_layer=4, n_head=4, n_embd=256),
    "gpt2": dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(vocab_size=50257, block_size=1024, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(vocab_size=50257, block_size=1024, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(vocab_size=50257, block_size=1024, n_layer=48, n_head=25, n_embd=1600),
}
LAYER_NORM_EPS = 1e-5


@dataclasses.dataclass
class GPTConfig:
    """The shape of a model. `dropout` is the probability of GPT-2's three dropouts, in train mode only."""

    vocab_size: int
    block_size: int  # the longest row the position table covers, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} does not divide into {self.n_head} heads.")

    @classmethod
    def preset(cls, name, **overrides):
        """The shape called `name`, with fields replaced: GPTConfig.preset("toy", vocab_size=600)."""
        if name not in PRESETS:
            raise unknown("preset", name, list(PRESETS))
        return cls(**{**PRESETS[name], **overrides})


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
        q, k, v = (
            self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        )  # each (B, H, T, C/H)
        if cache is None:
            # dropout as a number, not a module: it must be switched off by hand outside training
            p = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            k, v, mask = cache.extend(self, k, v)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers, four times as wide in between, with GPT-2's tanh form of GELU."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Pre-LN: what attention and MLP compute from the normalised stream is added to the stream."""

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
    """ids (B, T) -> logits (B, T, V); the logits at position t are the scores of the token at t + 1."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # token embedding, and the head: the two are tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # learned position embedding
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self._initialise(generator)

    def _initialise(self, generator):
        # GPT-2's: N(0, 0.02), biases 0, LayerNorms 1; residual projections smaller, so that the stream's variance
        # does not grow with depth (each layer adds to it twice)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def hidden(self, ids, cache=None):
        """ids (B, T) -> (B, T, C), the stream after the final LayerNorm.

        With `cache` (see sampling.py) the tokens continue the rows that the cache holds.
        """
        T = ids.shape[1]
        if cache is None:
            if T > self.config.block_size:
                raise UserError(f"a row of {T} tokens is longer than the model's context of {self.config.block_size}.")
            positions = torch.arange(T, device=ids.device)
        else:
            positions = cache.start(ids)
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for block in self.h:
            # sampling's cache changes from token to token: nothing there for a compiler
            x = block(x) if cache is None else block.forward(x, cache)
        return self.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> (..., V), in fp32 at least even under autocast.

        GPT-2's logits sit at -30 to -100, where bf16 can only step by 0.25 to 0.5: a bf16 logit would cost up to
        1 nat over a response.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight)

    def forward(self, ids):
        return self.logits(self.hidden(ids))

    @property
    def n_parameters(self):
        """How many weights, the tied embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    def set_dropout(self, p):
        """Sets every dropout, the number inside attention included, so that a walk over modules misses none."""
        self.config.dropout = p
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, Attention):
                module.dropout = p

    def prepare(self, compile=False, recompute=False):
        """How the blocks run in training, not what they compute; the weights keep their names. Returns self.

        recompute: the backward pass finds only each block's input and computes the block again (activation
        checkpointing, Chen et al. 2016, arXiv 1604.06174): a third more work, a fraction of the memory.
        compile: torch.compile, block by block, so that one compilation serves all layers. On a CPU it takes a C++
        compiler, and rounding differs from the plain path's.
        """
        for block in self.h:
            block.recompute, block.compiled = recompute, compile
            if compile:
                block.compile()
        return self
