"""Models on disk: a checkpoint is saved whole or not at all, and loading one runs no code from the file.

A run folder holds `checkpoint.pt` (shape, weights and training state; tensors and plain values only) and `bpe.json`.
"""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import torch

from minidpo.files.writing import atomic
from minidpo.model import GPT, GPTConfig
from minidpo.scale import parallel
from minidpo.scale.weights import load_with_tokenizer
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

FILE = "checkpoint.pt"


def save(folder, model, tokenizer, state=None):
    """Writes folder/checkpoint.pt and folder/bpe.json.

    `state` is a dict of tensors and plain values. `load` returns it, so that the training can continue.
    """
    # torch.compile(model) and wrappers for several GPUs put a prefix before every name
    weights = {
        name.replace("_orig_mod.", "").replace("module.", ""): weight.detach().cpu()
        for name, weight in model.state_dict().items()
    }
    config = dataclasses.asdict(model.config if hasattr(model, "config") else model.module.config)
    tokenizer.save(Path(folder) / "bpe.json")
    with atomic(Path(folder) / FILE) as file:
        torch.save({"config": config, "model": weights, "state": state or {}}, file)


def load(folder):
    """A run folder, a Hugging Face GPT-2 folder or a name such as "gpt2" -> (model, tokenizer, state).

    The model is on the CPU, in train mode, in the precision it was saved in. `state` is what `save` was given, or {}
    for a Hugging Face folder. Memory holds the file once: its tensors become the model's weights.

    Raises:
        UserError: the folder is missing, its checkpoint is damaged, or tokenizer and model do not match.
    """
    folder = Path(folder)
    if exists(folder):
        saved = read(folder / FILE, keys=("config", "model", "state"))
        try:
            with torch.device("meta"):  # shapes without memory: the tensors of the file become the weights
                model = GPT(GPTConfig(**saved["config"]))
            model.load_state_dict(saved["model"], assign=True)
        except (TypeError, RuntimeError) as error:
            raise UserError(f"{folder / FILE} does not hold one of our models: {error}") from error
        tokenizer, state = Tokenizer.load(folder / "bpe.json"), saved["state"]
    elif folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{folder} holds neither {FILE} nor config.json, so there is no model to load. {_TRAIN_FIRST}")
    elif folder.is_file():
        raise UserError(f"{folder} is a file. Give its folder, {folder.parent}.")
    elif not folder.exists() and "gpt2" not in folder.name:
        raise UserError(f"{folder} not found: there is no run there yet. {_TRAIN_FIRST}")
    else:
        (model, tokenizer), state = load_with_tokenizer(folder.as_posix()), {}
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}. "
            "They do not belong together. Restore the bpe.json that was saved with this model."
        )
    return model, tokenizer, state


_TRAIN_FIRST = "Train one first: python train_sft.py --data toy --out runs/toy/sft"


def exists(folder):
    """Whether a run in `folder` has saved a checkpoint."""
    return (Path(folder) / FILE).exists()


def read(path, keys):
    """torch.load that runs no code. Raises UserError if the file is missing or damaged, or lacks one of `keys`."""
    if not Path(path).exists():
        raise UserError(f"{path} not found.")
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load does not check the checksums
                if wrong := archive.testzip():
                    raise ValueError(f"{wrong} does not match its checksum")
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can make zipfile and torch.load raise almost anything
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path} is cut short or damaged ({reason}). Restore it, or train again.") from error
    if not isinstance(saved, dict) or not set(keys) <= set(saved):
        raise UserError(f"{path} is not a file of minidpo: it lacks one of {', '.join(keys)}.")
    return saved


def cached(path, compute):
    """Returns the tensor kept at `path`. If there is none, computes it and keeps it, or warns that it cannot.

    The path must name everything that the tensor depends on.
    """
    if parallel.anywhere(Path(path).exists()):
        print(f"using {path}")
        return read(path, keys=("tensor",))["tensor"]
    tensor = compute()
    if parallel.rank() == 0:
        try:
            with atomic(path) as file:
                torch.save({"tensor": tensor}, file)
        except OSError as error:
            print(f"warning: {path} cannot be written ({error.strerror}). The next run computes it again.")
    return tensor


def fingerprint(*things):
    """Hex digest of `things`. A model counts by its shape and every bit of its weights, anything else by its repr.

    The parts are joined without a separator. So give several numbers as one tuple: (1, 23) differs from (12, 3).
    """
    digest = hashlib.sha256()
    for thing in things:
        if not isinstance(thing, torch.nn.Module):
            digest.update(repr(thing).encode())
            continue
        if hasattr(thing, "config"):  # not its dropout: the numbers of a trained model do not depend on it
            digest.update(repr(dataclasses.replace(thing.config, dropout=0.0)).encode())
        for name, weight in thing.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]
