"""Chooses device and precision, and prints them."""

import contextlib

import torch
import torch.nn.functional as F

from minidpo.settings import UserError, unknown

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")


def pick_device(name="auto"):
    """ "auto" becomes a CUDA card, else Apple's MPS if its results are right, else the CPU.

    Raises UserError if the machine does not have device `name`, or has an MPS with wrong results.
    """
    if name not in DEVICES:
        raise unknown("device", name, list(DEVICES))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    picked = next(device for device in there if there[device]) if name == "auto" else name
    if not there[picked]:
        raise UserError(f"no {name} device on this machine. Leave out --device to use the best one there is.")
    if picked == "mps" and (error := difference_from_cpu("mps")) > 1e-3:
        wrong = f"this machine's MPS calculates wrongly (relative error {error:.1g} against the CPU)"
        if name == "mps":
            raise UserError(f"{wrong}. Update macOS and PyTorch, or take --device cpu.")
        print(f"{wrong}: using the CPU. Newer versions of macOS and PyTorch may be right.")
        return "cpu"
    return picked


def difference_from_cpu(device):
    """Largest relative error of `device` against the CPU, forward and backward; about 1e-6 if all is well.

    Computes a small layer and a head of GPT-2's size. MPS has given wrong numbers, without an error, for linear layers
    of this width (github.com/pytorch/pytorch, issues 116331 and 193487).
    """

    def compute(device):
        generator = torch.Generator().manual_seed(0)
        shapes = (4, 32, 32), (96, 32), (1040, 64), (50257, 64)
        tensors = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
        x, w, wide_x, wide_w = (tensor.to(device).requires_grad_() for tensor in tensors)
        q, k, v = F.linear(x, w).view(4, 32, 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(4 * q, k, v, is_causal=True).transpose(1, 2).reshape(4, 32, 32)
        logps = F.gelu(y + x, approximate="tanh").log_softmax(-1)
        logits = F.linear(wide_x, wide_w)
        gradients = torch.autograd.grad((logps[..., 5].sum(), logits), (x, w, wide_x), grad_outputs=(None, logits))
        return [tensor.detach().cpu() for tensor in (logps, logits[[0, 1, 1023, 1039]], *gradients)]

    expected = compute("cpu")
    torch.full((2**26,), 1e9, device=device)  # one bug reads past the end of a factor: into these large numbers
    errors = [(a - b).abs().max() / a.abs().max() for a, b in zip(expected, compute(device), strict=True)]
    return torch.stack(errors).nan_to_num(nan=float("inf")).max().item()


def pick_dtype(name, device, n_embd):
    """ "auto" becomes bfloat16 for the matrix products where it is faster, else float32. Prints device and precision.

    It is faster on a CUDA card that has it, and on a CPU with bf16 instructions if the layers are wide. Other cards (a
    T4, for example) would emulate it slowly, and get float32 even if bfloat16 was asked for.
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
        picked = name if name != "auto" else "bfloat16" if has_bf16 and n_embd >= 256 else "float32"
    print(f"on {device} ({chip}), matrix products in {picked}{note}")
    return picked


def autocast(device, dtype):
    """Context for a forward pass: bf16 matrix products with fp32 weights and sums, or no change for float32."""
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
