"""GPT-2, exactly: the transformer that both training stages use, and GPT-2 weights in and out.

Read `GPT.forward` first, then `Block`. Shapes: B rows, T tokens, C channels, H heads, V vocabulary.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names of weights as in OpenAI's release.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from minidpo.cli import UserError, unknown
from minidpo.files import atomic, atomic_write

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
PIECE = 2**21  # numbers that are read from a file at once: 8 MB of fp32


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

    # ---- GPT-2 weights in and out (Hugging Face's layout) ----

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """A GPT from a folder in Hugging Face's GPT-2 layout (config.json, model.safetensors), or from the hub.

        A hub name such as "gpt2-large" is downloaded. Needs the extra `hf`. The weights are read in small pieces, so
        that memory never holds much more than the model. Raises UserError for a config.json value that changes the
        forward pass in a way we do not have, for a tensor that is missing, left over or of another shape, and without
        the extra or, for a name, without a network.
        """
        folder = _folder(name_or_folder)
        config = _read_config(folder / "config.json")
        with torch.device("meta"):  # shapes without memory, and no time spent on first weights
            model = cls(config)
        model.to_empty(device="cpu")
        path = folder / "model.safetensors"
        if not path.exists():
            raise UserError(f"{path} not found: a GPT-2 folder holds its weights in that file.")
        _read_weights(path, dict(model.named_parameters()))
        return model

    def save_pretrained(self, folder, tokenizer=None):
        """Writes Hugging Face's GPT-2 layout, so that transformers' AutoModelForCausalLM opens it."""
        folder = Path(folder)
        with atomic(folder / "model.safetensors") as file:
            _write_weights(file, self.named_parameters())
        config = self.config
        values = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.block_size,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": LAYER_NORM_EPS,
            **{pdrop: config.dropout for pdrop in ("attn_pdrop", "embd_pdrop", "resid_pdrop")},
        }
        if tokenizer is not None:
            values |= {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
            tokenizer.save_hf(folder)
            tokenizer.save(folder / "bpe.json")
        atomic_write(folder / "config.json", json.dumps(values, indent=2) + "\n")


def _folder(name_or_folder):
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    if str(name_or_folder) not in PRESETS or not str(name_or_folder).startswith("gpt2"):
        raise UserError(
            f"{name_or_folder} is neither a folder nor one of {', '.join(n for n in PRESETS if 'gpt2' in n)}."
        )
    files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(f"--init {name_or_folder} takes the extra hf: {_EXTRA}") from error
    try:
        return Path(snapshot_download(str(name_or_folder), allow_patterns=files))  # with a progress bar of its own
    except (OSError, errors.HTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{name_or_folder} could not be fetched from huggingface.co ({reason}) and is not in the local cache. Try "
            f"again with a network; or run `hf download {name_or_folder} {' '.join(files)} --local-dir FOLDER` where "
            "there is one, copy the folder here and give it in place of the name."
        ) from error


_EXTRA = 'pip install -e ".[hf]"'


# ---- the weights' file: safetensors. 8 bytes with the header's length, a header in JSON, the tensors' bytes ----


def _stored(name, weight):
    """The weight as the file has it: a block's matrices are (in, out), as in OpenAI's Conv1D; nn.Linear's (out, in)."""
    return weight.T if name.startswith("h.") and weight.dim() == 2 else weight


@torch.no_grad()
def _read_weights(path, weights):
    """Fills `weights` (name -> parameter) from a safetensors file, piece by piece."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"{path} takes the extra hf: {_EXTRA}") from error
    missing = dict(weights)
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
        with tqdm(keys, desc="weights", unit="tensor", delay=1) as bar:
            for key in bar:
                name = key.removeprefix("transformer.")
                # buffers of old files (the causal mask), and the head where it was saved beside its tied twin
                if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
                    continue
                if name not in missing:
                    raise UserError(f"{path}: holds {key!r}, which GPT-2 does not have.")
                target = _stored(name, missing.pop(name))
                step = max(1, PIECE // target[0].numel())  # rows
                for i in range(0, len(target), step):
                    # opened for each piece: the file is mapped, and what was read stays in memory until it is closed
                    with safe_open(path, framework="pt") as file:
                        source = file.get_slice(key)
                        shape = tuple(source.get_shape())
                        if shape != target.shape:
                            raise UserError(f"{path}: {key} is {shape}, config.json asks for {tuple(target.shape)}.")
                        target[i : i + step].copy_(source[i : i + step])
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}). Fetch it again.") from error
    if missing:
        raise UserError(f"{path}: lacks {', '.join(sorted(missing)[:3])} ({len(missing)} tensors in all).")


def _write_weights(file, named_weights):
    """Writes (name, weight) pairs as safetensors, under Hugging Face's names, one tensor at a time."""
    weights = {name: _stored(name, weight.detach()) for name, weight in named_weights}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        begin, end = end, end + weight.numel() * weight.element_size()
        dtype = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}[weight.dtype]
        header["transformer." + name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8
    file.write(len(header).to_bytes(8, "little") + header)
    for weight in weights.values():
        file.write(weight.cpu().contiguous().view(torch.uint8).numpy())


# what a config.json may say about the forward pass, since it is what the code above computes
ONLY = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (LAYER_NORM_EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def _read_config(path):
    if not path.exists():
        raise UserError(f"{path} not found: a GPT-2 folder has its shape in that file.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = GPTConfig(
            **{k: values[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")}, block_size=values["n_positions"]
        )
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a GPT-2 config ({error!r}).") from error
    for name, allowed in {**ONLY, "n_inner": (None, 4 * config.n_embd)}.items():
        if name in values and values[name] not in allowed:
            raise UserError(
                f"{path}: {name} is {values[name]!r}, which this model does not have (only {allowed[0]!r})."
            )
    return config
