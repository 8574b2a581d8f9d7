"""One run on several cards: torchrun --nproc-per-node 2 train_dpo.py ... Alone, every function here does nothing.

Each process holds the whole model and takes its share of the pairs of every step: `mine`. What they find is added up,
metrics by `total`, gradients by PyTorch's DistributedDataParallel (DDP), set up in `wrap`. So all processes hold the
same gradient, take the same step and keep the same weights. Process 0 alone prints and writes.

The gradients are summed where DDP alone would average them: a loss divided by the pairs of the whole step is then
their mean, however unevenly they are shared.
"""

import contextlib
import functools
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextlib.contextmanager
def joined():
    """Within it (or a function that it decorates) the processes that torchrun started can exchange tensors.

    Over NCCL on CUDA, each process with a card of its own, else over gloo. What is printed there, process 0 alone
    prints; an error that leaves it is for each process that meets it to show.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by torchrun
        yield
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # "cuda" is this card from now on
    dist.init_process_group()  # the default: gloo between tensors on the CPU, NCCL between those on cards
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (contextlib.redirect_stdout, contextlib.redirect_stderr) if rank() else 2 * (contextlib.nullcontext,)
        with out(nowhere), err(nowhere):
            yield
    dist.destroy_process_group()


def rank():
    """Number of this process; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def count():
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def by_the_first(function):
    """Decorator: only process 0 runs the function, in the others a call does nothing."""
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs) if rank() == 0 else None)


@contextlib.contextmanager
def first_before_others():
    """Process 0 runs the block, then the others do: files that it makes there, they find."""
    if rank() > 0:
        total(0)  # returns when all have called it
    yield
    if rank() == 0:
        total(0)


def mine(items):
    """This process's share of a list that all have: every n-th."""
    return items[rank() :: count()]


def total(value):
    """Sum over the processes of a tensor (all of one shape) or a number, the same bits in each of them."""
    if not dist.is_initialized():
        return value
    if not isinstance(value, torch.Tensor):
        return total(torch.tensor(value, dtype=torch.float64)).item()
    summed = value.detach().to(torch.float64, copy=True)
    dist.all_reduce(summed)
    return summed.to(value.dtype)


def anywhere(flag):
    """Whether `flag` is true in any process: all do the same, although Ctrl-C may reach them in different steps."""
    return total(flag) > 0


def seed(*numbers):
    """Seeds dropout on every device from non-negative `numbers`, such as seed and step, apart in each process.

    Called at each step, so that a resumed run draws what it would have drawn.
    """
    torch.manual_seed(functools.reduce(lambda a, b: a * 1_000_003 + b, (*numbers, rank())))


# ---- gradients ----


class Call(nn.Module):
    """A module that calls any function of a model: DDP watches modules, and log-probs come from functions."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(self.model, *args)


def wrap(model):
    """`model` to train; with several processes inside DDP, for `call` and `exchange_once`. Its weights are process 0's.

    The model itself stays as it is: save, evaluate and sample from that.
    """
    if not dist.is_initialized():
        return model
    ddp = DistributedDataParallel(Call(model), gradient_as_bucket_view=True)  # no second copy of the gradients
    ddp.register_comm_hook(None, _sum)
    return ddp


def _sum(_, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def call(function, model, *args):
    """function(model, *args), for a model as it is or from `wrap`."""
    return model(function, *args) if isinstance(model, DistributedDataParallel) else function(model, *args)


def exchange_once(model, micro_batches):
    """Iterates over this process's micro-batches of a step; at the backward pass of the last, gradients are exchanged.

    A process that has none adds zeros: the others wait for it.
    """
    if not isinstance(model, DistributedDataParallel):
        yield from micro_batches
        return
    micro_batches = [micro_batch for micro_batch in micro_batches if micro_batch]
    for i, micro_batch in enumerate(micro_batches):
        with contextlib.nullcontext() if i + 1 == len(micro_batches) else model.no_sync():
            yield micro_batch
    if not micro_batches:
        call(lambda plain: sum((p * 0).sum() for p in plain.parameters()), model).backward()
