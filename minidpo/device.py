"""Where the numbers live: device and precision, chosen once and stated."""

import contextlib

import torch
import torch.nn.functional as F

from minidpo.settings import UserError, unknown

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")


def pick_device(name="auto"):
    """ "auto" takes a CUDA card, else Apple's MPS if it calculates as the CPU does, else the CPU.

    Raises UserError for one that is not there, and for an MPS asked for by name that calculates wrongly.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name not in DEVICES:
        raise unknown("device", name, list(DEVICES))
    if name != "auto" and not there[name]:
        raise UserError(f"no {name} device on this machine. Leave out --device to take what is there.")
    picked = name if name != "auto" else next(device for device, available in there.items() if available)
    if picked == "mps" and (error := difference_from_cpu("mps")) > 1e-3:
        wrong = f"this machine's MPS calculates wrongly (relative error {error:.1g} against the CPU)"
        if name == "mps":
            raise UserError(f"{wrong}. Update macOS and PyTorch, or take --device cpu.")
        print(f"{wrong}: using the CPU. Newer versions of macOS and PyTorch may mend it.")
        picked = "cpu"
    return picked


def difference_from_cpu(device):
    """The largest relative error of `device` against the CPU, over what DPO calculates; about 1e-6 if all is well.

    A small layer with attention and log-softmax, forward and backward, and a head of GPT-2's size: MPS has given wrong
    numbers without a word for linear layers as wide (github.com/pytorch/pytorch, issues 116331 and 193487).
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def small(x, w):
        q, k, v = F.linear(x, w).view(4, 32, 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(4 * q, k, v, is_causal=True).transpose(1, 2).reshape(4, 32, 32)
        logps = F.gelu(y + x, approximate="tanh").log_softmax(-1)
        return logps, *torch.autograd.grad(logps[..., 5].sum(), (x, w))

    def head(x, w):
        logits = F.linear(x, w)
        return logits, torch.autograd.grad(logits.square().sum(), x)[0]  # each row of x by itself

    x, w = random(4, 32, 32), random(96, 32)
    wide_x, wide_w, rows = random(1040, 64), random(50257, 64), [0, 1, 1023, 1039]
    expected = *small(x.requires_grad_(), w.requires_grad_()), *head(wide_x[rows].requires_grad_(), wide_w)
    # one of the errors is to read past the end of a factor: let there be something large to read
    torch.full((2**26,), 1e9, device=device)
    got = [t.to(device).detach().requires_grad_() for t in (x, w, wide_x)]
    got = *small(*got[:2]), *(t[rows] for t in head(got[2], wide_w.to(device)))
    errors = [(a.detach() - b.detach().cpu()).abs().max() / a.abs().max() for a, b in zip(expected, got, strict=True)]
    return torch.stack(errors).nan_to_num(nan=float("inf")).max().item()


def pick_dtype(name, device, n_embd):
    """ "auto" is bfloat16 for the matrix products where it pays, else float32. States device and precision.

    It pays on cards that have it, and on a CPU with bf16 instructions once the layers are wide enough. A card without
    (a T4, say) would imitate it slowly: it gets float32 even where bfloat16 was asked for.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, list(DTYPES))
    chip, note = {"mps": "Apple's GPU", "cpu": f"{torch.get_num_threads()} threads"}.get(device), ""
    if device == "cuda":
        chip = torch.cuda.get_device_name()
        picked = "bfloat16" if name == "auto" else name
        if picked == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            picked, note = "float32", ": this card has no bfloat16"
        # TF32 rounds the factors of a fp32 product to 11 bits and is several times as fast. Beside bf16, with its 8
        # bits, the only fp32 product is the head; there TF32 moves log-probabilities by a tenth of what bf16 in the
        # blocks does (tests/test_gpu.py). Who asks for float32 gets fp32.
        torch.set_float32_matmul_precision("high" if picked == "bfloat16" else "highest")
    else:
        has_bf16 = device == "cpu" and torch.cpu._is_avx512_bf16_supported()  # any chip with AMX has these as well
        picked = name if name != "auto" else "bfloat16" if has_bf16 and n_embd >= 256 else "float32"
    print(f"on {device} ({chip}), matrix products in {picked}{note}")
    return picked


def autocast(device, dtype):
    """The context in which forward passes run: bf16 matrix products, weights and sums in fp32; or nothing at all."""
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
