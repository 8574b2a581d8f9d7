"""Optimiser and learning rate, the same for both stages."""

import torch

from minidpo.settings import unknown

OPTIMIZERS = ("adamw", "rmsprop", "sgd")


def make_optimizer(model, name, lr, weight_decay=0.0):
    """AdamW (betas 0.9 and 0.99), or RMSprop with PyTorch's defaults as in the DPO paper, which holds half the state;
    or SGD with a momentum of 0.9, which unlike the two does not give noise the same step as signal.

    Weight decay, AdamW's alone, spares what is not a matrix: biases and LayerNorms.
    """
    if name == "rmsprop":
        # one tensor at a time. The for-each form, PyTorch's choice on CUDA, makes a copy of all the state on the way
        # (3.1 GB for gpt2-large) to save some thousand kernel launches: milliseconds in a step of seconds
        return torch.optim.RMSprop(model.parameters(), lr=lr, foreach=False)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if name != "adamw":
        raise unknown("optimizer", name, list(OPTIMIZERS))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)  # one pass over the weights, not a dozen


def learning_rate(step, total, peak, warmup_steps, decay):
    """The rate of optimiser step `step` of `total` (both counted from 0): a linear rise, then flat or linearly to 0."""
    rise = min(1.0, (step + 1) / max(1, warmup_steps))
    fall = (total - step) / max(1, total - warmup_steps) if decay and step >= warmup_steps else 1.0
    return peak * rise * min(1.0, fall)
