"""Chooses device and precision, and prints them."""

import contextlib
import os

import torch

from minidpo.settings import UserError, unknown

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")


def pick_device(name="auto"):
    """ "auto" becomes a CUDA card if there is one, else the CPU.

    "mps", Apple's GPU, is taken only if asked for. Some versions of macOS and PyTorch compute wrong numbers there
    without an error (github.com/pytorch/pytorch, issues 116331 and 193487). tests/test_gpu.py compares it with the CPU.
    Raises UserError if the machine does not have device `name`.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    picked = ("cuda" if there["cuda"] else "cpu") if name == "auto" else name
    if picked not in there:
        raise unknown("device", name, list(DEVICES))
    if not there[picked]:
        raise UserError(f"no {name} device on this machine. Add --device auto to use the best one there is.")
    return picked


def pick_dtype(name, device, n_embd):
    """ "auto" becomes bfloat16 for the matrix products where it is faster, else float32. Prints device and precision.

    It is faster on a CUDA card that has it, and on a CPU with bf16 instructions if the layers are wide (docs/bench.md).
    Other cards (a T4, for example) would emulate it slowly, and get float32 even if bfloat16 was asked for.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, list(DTYPES))
    chip, note = {"mps": "Apple's GPU", "cpu": f"{torch.get_num_threads()} threads"}.get(device), ""
    if device == "cuda":
        chip = torch.cuda.get_device_name()
        picked = "bfloat16" if name == "auto" else name
        if picked == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            picked, note = "float32", ": this card has no bfloat16"
        # "high" is TF32: the factors of a fp32 product are rounded to 11 bits. With bf16 (8 bits) in the blocks, the
        # only fp32 product is the head. There TF32 is several times as fast, and its error in the log-probabilities
        # is a tenth of the blocks' (tests/test_gpu.py).
        torch.set_float32_matmul_precision("high" if picked == "bfloat16" else "highest")
    else:
        has_bf16 = device == "cpu" and torch.cpu._is_avx512_bf16_supported()  # chips with AMX have it too
        picked = name if name != "auto" else "bfloat16" if has_bf16 and n_embd >= 128 else "float32"
        for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            # for each shape of a bf16 product, PyTorch and oneDNN keep about 1 MB, for up to 1,024 shapes. Nearly every
            # batch has new shapes, and the blocks of a model share them: 64 are enough for one step
            os.environ.setdefault(cache, "64")
    print(f"on {device} ({chip}), matrix products in {picked}{note}")
    return picked


def autocast(device, dtype):
    """Context for a forward pass: bf16 matrix products with fp32 weights and sums, or no change for float32."""
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
