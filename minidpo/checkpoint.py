"""Models on disk: saved whole or not at all, loaded without executing anything, and fingerprinted.

A run folder holds `checkpoint.pt` (shape, weights and training state; tensors and plain values only), `bpe.json` and,
until the run is finished, `checkpoint.prev.pt`: the checkpoint before, in case the newest turns out damaged.
"""

import dataclasses
import hashlib
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from minidpo.files import atomic
from minidpo.model import GPT, GPTConfig
from minidpo.scale import parallel
from minidpo.scale.weights import load_pretrained
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

FILE, PREVIOUS = "checkpoint.pt", "checkpoint.prev.pt"


def save(folder, model, tokenizer, state=None):
    """Writes folder/checkpoint.pt, atomically, and folder/bpe.json if it is not there yet.

    The checkpoint that was there becomes checkpoint.prev.pt. `state` is a dict of tensors and plain values: what `load`
    gives back for the training to go on from.
    """
    # torch.compile and DistributedDataParallel put their own name in front of every weight
    weights = {
        name.replace("_orig_mod.", "").replace("module.", ""): weight.detach().cpu()
        for name, weight in model.state_dict().items()
    }
    config = dataclasses.asdict(model.config if hasattr(model, "config") else model.module.config)
    if not (Path(folder) / "bpe.json").exists():
        tokenizer.save(Path(folder) / "bpe.json")
    with atomic(Path(folder) / FILE, keep=Path(folder) / PREVIOUS) as file:
        torch.save({"config": config, "model": weights, "state": state or {}}, file)


def load(folder):
    """A run folder, a Hugging Face GPT-2 folder or a name such as "gpt2" -> (model, tokenizer, state).

    The model is on the CPU, in train mode, in the precision it was saved in; `state` is what `save` was given ({} for
    Hugging Face's). If the newest checkpoint is damaged the one before is taken, and that is said. In memory the file
    is held once: its tensors become the model's and the state's. Raises UserError if the folder is missing, the file
    is cut short or damaged and none before it is left, or the tokenizer and the model disagree.
    """
    folder = Path(folder)
    if exists(folder):
        saved = _newest_whole(folder)
        try:
            with torch.device("meta"), Unfilled():  # shapes without memory: what was read becomes the weights
                model = GPT(GPTConfig(**saved["config"]))
            model.load_state_dict(saved["model"], assign=True)
        except (TypeError, RuntimeError) as error:
            raise UserError(f"{folder / FILE} does not hold one of our models: {error}") from error
        tokenizer, state = Tokenizer.load(folder / "bpe.json"), saved["state"]
    elif folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{folder} holds neither {FILE} nor config.json, so there is no model to load. {_TRAIN_FIRST}")
    elif not folder.exists() and not str(folder).startswith("gpt2"):
        raise UserError(f"{folder} not found: there is no run there yet. {_TRAIN_FIRST}")
    else:
        model = load_pretrained(str(folder))
        tokenizer, state = _pretrained_tokenizer(folder, model.config.vocab_size), {}
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}. "
            "They do not belong together: restore the bpe.json that was saved with this model."
        )
    return model, tokenizer, state


_TRAIN_FIRST = "Train one first: python train_sft.py --data toy --out runs/sft"


class Unfilled(TorchFunctionMode):
    """Within it the functions of torch.nn.init do nothing, which saves time where weights are about to be replaced."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def exists(folder):
    """Whether a run in `folder` has saved a checkpoint."""
    return any((Path(folder) / name).exists() for name in (FILE, PREVIOUS))


def _newest_whole(folder):
    keys = ("config", "model", "state")
    try:
        return read(folder / FILE, keys)
    except UserError as error:  # damaged, or the power went between the two moves of `save`
        if not (folder / PREVIOUS).exists():
            raise
        saved = read(folder / PREVIOUS, keys)
        print(f"warning: {error} Taking the checkpoint before it, {folder / PREVIOUS}.")
        return saved


def _pretrained_tokenizer(folder, vocab_size):
    if (folder / "bpe.json").exists():
        return Tokenizer.load(folder / "bpe.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return Tokenizer.from_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")
    if vocab_size == 50257:
        return Tokenizer.gpt2()
    raise UserError(
        f"{folder} has no bpe.json and no vocab.json with merges.txt, and {vocab_size} tokens are not GPT-2's."
    )


# what zipfile and torch.load have been seen to raise on a file cut short or with a few bytes changed
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError,
    LookupError, TypeError, AttributeError, AssertionError,
)  # fmt: skip


def read(path, keys):
    """torch.load that executes nothing; UserError if the file is missing, cut short or lacks one of `keys`."""
    if not Path(path).exists():
        raise UserError(f"{path} not found.")
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load does not look at the checksums
                if wrong := archive.testzip():
                    raise ValueError(f"{wrong} does not match its checksum")
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except _DAMAGED as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path} is cut short or damaged ({reason}). Restore it, or train again.") from error
    if not isinstance(saved, dict) or not set(keys) <= set(saved):
        raise UserError(f"{path} is not a file of ours: it lacks one of {', '.join(keys)}.")
    return saved


def cached(path, compute):
    """The tensor kept at `path`; on first use `compute()` makes it. The path must name all that it depends on."""
    if parallel.anywhere(Path(path).exists()):
        print(f"using {path}")
        return read(path, keys=("tensor",))["tensor"]
    tensor = compute()
    if parallel.rank() == 0:
        with atomic(path) as file:
            torch.save({"tensor": tensor}, file)
    return tensor


def fingerprint(*things):
    """Hex digest of `things`: a model counts by its shape and its weights, bit for bit, anything else by its repr."""
    digest = hashlib.sha256()
    for thing in things:
        if not isinstance(thing, torch.nn.Module):
            digest.update(repr(thing).encode())
            continue
        if hasattr(thing, "config"):  # without dropout, which the numbers of a trained model do not depend on
            digest.update(repr(dataclasses.replace(thing.config, dropout=0.0)).encode())
        for name, weight in thing.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]
