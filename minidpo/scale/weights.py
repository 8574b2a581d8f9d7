"""GPT-2's weights in and out, in Hugging Face's layout."""

import dataclasses
import json
from pathlib import Path

import torch
from tqdm import tqdm

from minidpo.files import atomic, atomic_write
from minidpo.model import GPT, LAYER_NORM_EPS, PRESETS, GPTConfig
from minidpo.settings import UserError, knob, parse_settings, run_main

PIECE = 2**21  # numbers that are read from a file at once: 8 MB of fp32


def load_pretrained(name_or_folder):
    """A GPT from a folder in Hugging Face's GPT-2 layout (config.json, model.safetensors), or from the hub.

    A hub name such as "gpt2-large" is downloaded. Needs the extra `hf`. The weights are read in small pieces, so
    that memory never holds much more than the model. Raises UserError for a config.json value that changes the
    forward pass in a way we do not have, for a tensor that is missing, left over or of another shape, and without
    the extra or, for a name, without a network.
    """
    folder = _folder(name_or_folder)
    config = _read_config(folder / "config.json")
    with torch.device("meta"):  # shapes without memory, and no time spent on first weights
        model = GPT(config)
    model.to_empty(device="cpu")
    path = folder / "model.safetensors"
    if not path.exists():
        raise UserError(f"{path} not found: a GPT-2 folder holds its weights in that file.")
    _read_weights(path, dict(model.named_parameters()))
    return model


def save_pretrained(model, folder, tokenizer=None):
    """Writes Hugging Face's GPT-2 layout, so that transformers' AutoModelForCausalLM opens it."""
    folder = Path(folder)
    with atomic(folder / "model.safetensors") as file:
        _write_weights(file, model.named_parameters())
    config = model.config
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


@dataclasses.dataclass
class Settings:
    run: str = knob(dataclasses.MISSING, "the run folder to export")
    out: str = knob(dataclasses.MISSING, "the folder to write, in Hugging Face's GPT-2 layout")


def main():
    settings = parse_settings(Settings, "Exports a run for Hugging Face's libraries.")
    from minidpo import checkpoint

    model, tokenizer, _ = checkpoint.load(settings.run)
    save_pretrained(model, settings.out, tokenizer)
    print(f"wrote {settings.out}: AutoModelForCausalLM.from_pretrained({settings.out!r}) opens it")


if __name__ == "__main__":
    run_main(main)
