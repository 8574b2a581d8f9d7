"""GPT-2 weights in and out, in Hugging Face's layout. Needs the extra `hf`.

python -m minidpo.scale.weights --run runs/toy/dpo --out my_policy      exports a run for transformers
"""

import dataclasses
import json
from pathlib import Path

import torch
from tqdm import tqdm

from minidpo.files.vocabulary import load_vocabulary, save_vocabulary
from minidpo.files.writing import atomic, atomic_write, new_file
from minidpo.model import GPT, LAYER_NORM_EPS, PRESETS, GPTConfig
from minidpo.settings import UserError, knob, parse_settings, run_main

NAMES = [prefix + name for prefix in ("", "openai-community/") for name in PRESETS if name.startswith("gpt2")]
NAMES += ["distilgpt2", "distilbert/distilgpt2"]
FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
SHAPE = ("vocab_size", "n_layer", "n_head", "n_embd")  # fields of config.json and of GPTConfig
# the values that minidpo/model.py computes with; a field that is not listed does not change the forward pass
ONLY = dict(activation_function=("gelu_new", "gelu_pytorch_tanh"), layer_norm_epsilon=(LAYER_NORM_EPS,))
ONLY |= {name: (True,) for name in ("scale_attn_weights", "tie_word_embeddings")}
ONLY |= {name: (False,) for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention")}


def load_with_tokenizer(name_or_folder):
    """As `load_pretrained`, but -> (model, tokenizer). Embedding rows without a token are kept, but get no logits."""
    folder = _find_folder(str(name_or_folder))
    config, eos = _read_config(folder / "config.json")
    tokenizer, rows = load_vocabulary(folder, config.vocab_size), config.vocab_size
    if eos in range(rows) and eos != tokenizer.eot:
        raise UserError(f"{folder / 'config.json'}: eos_token_id is {eos}, but <|endoftext|> has id {tokenizer.eot}.")
    model, known = load_pretrained(folder), tokenizer.vocab_size
    if known < rows:  # the softmax runs over the tokens that can be sampled
        print(f"{folder}: the tokenizer has {known} tokens, the model {rows}. Those from id {known} on are never used.")
        model.config.vocab_size, model.config.extra_rows = known, rows - known
    return model, tokenizer


@torch.no_grad()
def load_pretrained(name_or_folder):
    """Folder in Hugging Face's GPT-2 layout, or a name such as "gpt2-large" to download -> GPT on the CPU, in fp32.

    The model has no dropout. Memory holds the model and at most two tensors beside it. Raises UserError if the folder
    does not fit `minidpo.model.GPT`, without the extra `hf`, and without a network for a name.
    """
    folder = _find_folder(str(name_or_folder))
    with torch.device("meta"):  # no memory and no time for initial weights
        model = GPT(_read_config(folder / "config.json")[0])
    missing, path = dict(model.to_empty(device="cpu").named_parameters()), folder / "model.safetensors"
    paths = [path] if path.exists() else sorted(folder.glob("model-*.safetensors"))  # a large model has several
    if not paths:
        how = f"from transformers import GPT2LMHeadModel as M; M.from_pretrained({str(folder)!r}).save_pretrained"
        raise UserError(f'{path} not found. To make it from pytorch_model.bin: python -c "{how}({str(folder)!r})"')
    safetensors, stored = _import("safetensors.torch", path), []
    try:
        for path in paths:
            stored += [(key == "lm_head.weight", key, path) for key in safetensors.safe_open(path, "pt").keys()]
        for is_head, key, path in tqdm(sorted(stored), desc="weights", unit="tensor", delay=1):  # the head comes last
            name = "wte.weight" if is_head and "wte.weight" in missing else key.removeprefix("transformer.")
            # opened for each tensor: what was read from a file stays in memory until the file is closed
            tensor = safetensors.safe_open(path, "pt").get_tensor(key)
            if name in missing:
                target = _stored(name, missing.pop(name))
                if (found := tuple(tensor.shape)) != (wanted := tuple(target.shape)):
                    raise UserError(f"{path}: {key} is {found}, config.json asks for {wanted}.")
                target.copy_(tensor)
            elif not _redundant(name, tensor, model):
                raise UserError(f"{path}: holds {key!r}, which GPT-2 does not have. Its head is the embedding.")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}). Download it again.") from error
    if missing:
        raise UserError(f"{path}: lacks {', '.join(sorted(missing)[:3])} ({len(missing)} tensors in all).")
    return model


@torch.no_grad()
def save_pretrained(model, folder, tokenizer=None):
    """Writes a folder that transformers' AutoModelForCausalLM opens, and AutoTokenizer if a tokenizer is given.

    Raises UserError without the extra `hf`, and OSError if a file cannot be written.
    """
    folder, config, weights = Path(folder), model.config, dict(model.named_parameters())
    safetensors = _import("safetensors.torch", path := folder / "model.safetensors")
    try:
        # safetensors writes a tensor as it lies in memory. Changing that in place needs memory for one tensor at a time
        for name, weight in weights.items():
            weight.data = _stored(name, _stored(name, weight.data).contiguous())  # shape and values stay
        stored = ((f"transformer.{name}", _stored(name, weight.data).cpu()) for name, weight in weights.items())
        with atomic(path) as file:
            safetensors.torch.save_file(dict(stored), file.name, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # the disk is full, for example
        raise OSError(f"{path}: {error}") from error
    finally:
        for weight in weights.values():
            weight.data = weight.data.contiguous()
    values = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", n_positions=config.block_size)
    values |= {name: getattr(config, name) for name in SHAPE} | {"vocab_size": len(model.wte.weight)}
    values |= dict(activation_function="gelu_new", layer_norm_epsilon=LAYER_NORM_EPS)
    values |= {name: config.dropout for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    if tokenizer is not None:
        values |= dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
        save_vocabulary(tokenizer, folder)
        tokenizer.save(folder / "bpe.json")
    atomic_write(folder / "config.json", json.dumps(values, indent=2) + "\n")


def _stored(name, weight):
    """The weight as the file holds it: matrices of a block are (in, out), as in OpenAI's Conv1D, not (out, in)."""
    return weight.T if name.startswith("h.") and weight.dim() == 2 else weight


def _import(package, purpose):
    try:
        return __import__(package)  # for "safetensors.torch" this is safetensors
    except ImportError as error:
        raise UserError(f'{purpose} needs the extra hf: pip install -e ".[hf]"') from error


def _redundant(name, tensor, model):
    """Whether the model can do without the tensor: a head equal to the embedding, or the causal mask of old files."""
    masked = name.endswith(".attn.masked_bias") and (tensor < -1000).all()  # the logit of a masked position
    mask = name.endswith(".attn.bias") and tensor.dim() == 4 and torch.equal(tensor, torch.ones_like(tensor).tril())
    head = name == "lm_head.weight" and torch.equal(tensor.float(), model.wte.weight)
    return masked or mask or head


def _find_folder(name):
    """The folder `name` itself, or the one that the hub's files are downloaded to."""
    if Path(name).is_dir():
        return Path(name)
    if name not in NAMES:
        raise UserError(f"{name} is neither a folder nor one of {', '.join(NAMES)}.")
    hub = _import("huggingface_hub", f"--init {name}")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(FILES)))  # shows a progress bar
    except (OSError, hub.errors.HTTPError) as error:
        how = f"Run `hf download {name} {' '.join(FILES)} --local-dir FOLDER` elsewhere and give that FOLDER."
        raise UserError(f"{name} could not be downloaded and is not in the local cache ({error}). {how}") from error


def _read_config(path):
    """config.json -> (GPTConfig, its eos_token_id)."""
    if not path.exists():
        raise UserError(f"{path} not found: a GPT-2 folder holds the shape of the model in that file.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = GPTConfig(block_size=values["n_positions"], **{name: values[name] for name in SHAPE})
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a GPT-2 config ({error!r}).") from error
    for name, allowed in {**ONLY, "n_inner": (None, 4 * config.n_embd)}.items():
        if name in values and values[name] not in allowed:
            raise UserError(f"{path}: {name} is {values[name]!r}, which this model does not have, only {allowed[0]!r}.")
    return config, values.get("eos_token_id")


@dataclasses.dataclass
class Settings:
    run: str = knob(dataclasses.MISSING, "the run folder to export")
    out: str = knob(dataclasses.MISSING, "the folder to write, in Hugging Face's GPT-2 layout")
    overwrite: bool = knob(False, "replace an earlier export in --out")


def main():
    settings = parse_settings(Settings, "Exports a run for Hugging Face's libraries.")
    from minidpo import checkpoint  # not above: checkpoint imports this module

    if checkpoint.exists(settings.out):
        raise UserError(f"--out {settings.out} is a run. Give another folder.")
    out = new_file(settings.out, settings.overwrite)
    model, tokenizer, _ = checkpoint.load(settings.run)
    save_pretrained(model, out, tokenizer)
    print(f"wrote {out}: AutoModelForCausalLM.from_pretrained({str(out)!r}) opens it")


if __name__ == "__main__":
    run_main(main)
