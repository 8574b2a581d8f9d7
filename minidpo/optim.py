"""Optimiser and learning rate of both stages."""

import torch

from minidpo.settings import unknown

OPTIMIZERS = ("adamw", "rmsprop", "sgd")


def make_optimizer(model, name, lr, weight_decay=0.0):
    """Returns the optimiser `name`.

    rmsprop: PyTorch's defaults, as in the DPO paper. Its state is half as large as AdamW's.
    adamw: betas 0.9 and 0.99. Weight decay applies to matrices only, not to biases and LayerNorms.
    sgd: momentum 0.9. Unlike the other two, it takes a small step where the gradient is small.
    """
    if name == "rmsprop":
        # foreach=True, PyTorch's default on CUDA, copies the state (3.1 GB for gpt2-large) and saves only milliseconds
        return torch.optim.RMSprop(model.parameters(), lr=lr, foreach=False)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if name != "adamw":
        raise unknown("optimizer", name, list(OPTIMIZERS))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)  # fused: one pass over the weights


def learning_rate(step, total, peak, warmup_steps, decay):
    """Learning rate of a step, counted from 0: a linear rise to `peak`, then constant, or with `decay` linear to 0."""
    rise = min(1.0, (step + 1) / max(1, warmup_steps))
    fall = (total - step) / (total - warmup_steps) if decay and step >= warmup_steps else 1.0
    return peak * rise * fall


def set_learning_rate(optimizer, lr):
    """Sets the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
