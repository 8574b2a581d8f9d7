"""Where the numbers live: device and precision, chosen once and stated."""

import contextlib

import torch

from minidpo.cli import UserError, unknown

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")


def pick_device(name="auto"):
    """ "auto" takes a CUDA card, else Apple's MPS, else the CPU. Raises UserError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if name not in there:
        raise unknown("device", name, list(DEVICES))
    if not there[name]:
        raise UserError(f"no {name} device on this machine. Leave out --device to take what is there.")
    return name


def pick_dtype(name, device, n_embd):
    """ "auto" is bfloat16 for the matrix products where it pays, else float32.

    It pays on cards that have it, and on a CPU with bf16 instructions once the layers are wide enough.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, list(DTYPES))
    if name != "auto":
        return name
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_bf16 = device == "cpu" and torch.cpu._is_avx512_bf16_supported()  # any chip with AMX has these as well
    return "bfloat16" if has_bf16 and n_embd >= 256 else "float32"


def autocast(device, dtype):
    """The context in which forward passes run: bf16 matrix products, weights and sums in fp32; or nothing at all."""
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
