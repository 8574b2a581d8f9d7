"""The methods DPO is compared with (Rafailov et al. 2023, section 6), one file each; here is what they share.

    preferred_ft    SFT on the chosen responses
    unlikelihood    up with the chosen, down with the rejected, unweighted
    reward_model    Bradley-Terry on a scalar head: the reward that best_of_n and ppo go by
    best_of_n       sample N, keep the one the reward model likes best
    ppo             reinforcement learning on a reward, learned or true (a loop of its own)

The first three learn from the pairs that train_dpo.py learns from, the two policies with its optimiser, learning rate
and number of steps too, so that what differs is the loss. `fit` is their loop, `record` writes the run folder around
it.
"""

import dataclasses
import math
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import train_dpo
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, DTYPES, pick_device, pick_dtype
from minidpo.model import GPT
from minidpo.optim import OPTIMIZERS, learning_rate, make_optimizer
from minidpo.run import Run
from minidpo.sampling import complete
from minidpo.settings import CatchInterrupt, UserError, knob
from minidpo.tokenizer import Tokenizer

# train_dpo.py's, all but beta: without a reference there is nothing for it to weigh
SETS = {name: {k: v for k, v in values.items() if k != "beta"} for name, values in train_dpo.SETS.items()}


@dataclasses.dataclass
class PairSettings:
    """Knobs of every method that learns from pairs; defaults and sets are train_dpo.py's."""

    data: str = knob(dataclasses.MISSING, "toy, imdb, hh, tldr, or a JSONL file with prompt, chosen, rejected")
    init: str = knob(dataclasses.MISSING, "the SFT model to start from: a run folder, a GPT-2 folder or name")
    out: str = knob(dataclasses.MISSING, "the run folder to write")
    settings: str = knob("", "named set of training settings; empty: the one of --data", choices=("", *SETS))
    optimizer: str = knob("rmsprop", "rmsprop, adamw, or sgd with momentum", choices=OPTIMIZERS)
    lr: float = knob(1e-6, "learning rate after the warm-up")
    warmup_steps: int = knob(150, "optimiser steps over which the learning rate rises")
    decay: bool = knob(False, "let the learning rate fall linearly to 0 after the warm-up")
    grad_clip: float = knob(10.0, "longest gradient, in L2 norm")
    epochs: float = knob(1.0, "passes over the pairs; 0.5 is half a pass")
    batch_size: int = knob(64, "pairs per optimiser step", least=1)
    micro_batch_size: int = knob(0, "pairs per forward pass, to save memory; 0: all of the step")
    max_length: int = knob(0, "longest row in tokens; 0: the model's context")
    max_steps: int = knob(0, "stop after this many optimiser steps, on the way of --epochs; 0: go all the way")
    eval_data: str = knob("", "held-out pairs for the curves; empty: the dataset's own, none for a file")
    eval_every: int = knob(50, "optimiser steps between evaluations on the held-out pairs; 0: at the end only")
    save_every: int = knob(100, "optimiser steps between checkpoints", least=1)
    samples: int = knob(8, "held-out prompts completed for the report")
    sample_tokens: int = knob(128, "longest of these completions, in tokens", least=1)
    seed: int = knob(0, "of the order of the pairs and of the sampling")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    dtype: str = knob("auto", "precision of the matrix products", choices=DTYPES)
    fast: bool = knob(False, "the log-probabilities by minidpo/scale/fast.py: the same numbers in less time")
    resume: bool = knob(False, "go on with the run in --out, with its settings")
    overwrite: bool = knob(False, "replace the run in --out")


# ---- 1. The loop ----


def settle(settings, model):
    """Replaces "auto" in settings.device and settings.dtype by what is there, and moves the model to that device."""
    settings.device = pick_device(settings.device)
    settings.dtype = pick_dtype(settings.dtype, settings.device, model.config.n_embd)
    model.to(settings.device)


def count_steps(rows, settings):
    """(optimiser steps an epoch, in all epochs, up to --max-steps)."""
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    total = math.ceil(settings.epochs * per_epoch)
    return per_epoch, total, min(total, settings.max_steps or total)


def fit(model, rows, train_step, settings, on_step=None, state=None):
    """The loop of train_dpo.py without its files: trains `model` in place on `rows`, in train mode.

    train_step(model, optimizer, rows, indices=..., settings=...) -> metrics by name: train_sft.train_step,
    partial(train_dpo.train_step, reference=...), partial(pair_step, measure). Device and dtype in `settings` are as
    `settle` leaves them. After each step comes on_step(step, metrics), step counted from 1. `state` is a dict, empty at
    first, that `fit` keeps up to date: its "step" and "optimizer", with the model's weights, are all it takes to go on.
    """
    state = {} if state is None else state
    first_step = state.get("step", 0)
    optimizer = make_optimizer(model, settings.optimizer, settings.lr)
    if first_step:
        optimizer.load_state_dict(state["optimizer"])
    per_epoch, total, last_step = count_steps(rows, settings)
    for step in range(first_step, last_step):
        model.train()  # on_step may have left it in eval mode
        started = time.perf_counter()
        if step == first_step or step % per_epoch == 0:
            order = dataset.batches(rows, settings.batch_size, settings.seed, step // per_epoch)
        indices = order[step % per_epoch]
        lr = learning_rate(step, total, settings.lr, settings.warmup_steps, settings.decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        metrics = train_step(model, optimizer, rows, indices=indices, settings=settings)
        metrics |= {"lr": lr, "pairs_per_second": len(indices) / (time.perf_counter() - started)}
        state.update(step=step + 1, optimizer=optimizer.state_dict())
        if on_step:
            on_step(step + 1, metrics)


def pair_step(measure, model, optimizer, rows, indices, settings):
    """One optimiser step on the pairs `indices`, for `fit` as partial(pair_step, measure).

    measure(model, rows, indices, settings) -> {"loss": (B,), other metrics: (B,)}; returns their means over all pairs
    of the step, however they are cut into micro-batches, before the update. UserError if one of them is not finite.
    """
    size = settings.micro_batch_size or len(indices)
    parts = []
    for i in range(0, len(indices), size):
        values = measure(model, rows, indices[i : i + size], settings)
        (values["loss"].sum() / len(indices)).backward()
        parts.append({name: value.detach() for name, value in values.items()})
    metrics = {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip).item()
    if not all(math.isfinite(m) for m in metrics.values()):
        raise UserError(f"not a finite number in {metrics}\nin the batch of usable pairs {sorted(indices)}, from 0.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


@torch.no_grad()
def pair_means(measure, model, rows, settings):
    """The means of what `measure` gives over all of `rows`, by name, with "eval/" before it."""
    model.eval()
    parts = [
        measure(model, rows, indices, settings)
        for indices in dataset.batches(rows, settings.micro_batch_size or settings.batch_size, seed=0, epoch=0)
    ]
    return {"eval/" + name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


# ---- 2. The run folder ----


class Start(NamedTuple):
    """What a command begins with; nothing is written yet."""

    folder: Run
    model: GPT
    tokenizer: Tokenizer
    state: dict  # `fit`'s, and what else is saved beside the weights
    rows: list
    held_out: list


def start(settings):
    """Loads what a command needs; UserError if it cannot begin, or go on, as `settings` say."""
    folder = Run(settings)
    model, tokenizer, state = checkpoint.load(settings.out if settings.resume else settings.init)
    settle(settings, model)
    max_length = min(settings.max_length or model.config.block_size, model.config.block_size)
    rows, held_out = dataset.load_pairs(
        data.find_split("pairs", settings.data, settings.eval_data), tokenizer, max_length
    )
    fingerprint = checkpoint.fingerprint(rows, held_out)
    if not settings.resume:
        state = {}
    elif state.get("data") != fingerprint:
        raise UserError(f"{settings.out} was started with other pairs. Restore them, or start a new run.")
    *_, last_step = count_steps(rows, settings)
    if state.get("step", 0) >= last_step and (folder.path / "report.md").exists():
        raise UserError(f"{settings.out} has made all its {last_step} steps. Raise --epochs or --max-steps.")
    return Start(folder, model, tokenizer, {**state, "data": fingerprint}, rows, held_out)


def record(begun, model, train, evaluate, save, settings):
    """Trains `model` with a progress bar, metrics.jsonl and checkpoints; a first Ctrl-C saves and stops.

    begun: a Start. train(model, rows, settings, on_step, state), on_step and state as in `fit`; evaluate(model,
    held_out, settings) -> metrics by name; save(folder, model, tokenizer, state).
    """
    folder, _, tokenizer, state, rows, held_out = begun
    first_step, (*_, last_step) = state.get("step", 0), count_steps(rows, settings)
    folder.begin(first_step, tokenizer)
    with (
        CatchInterrupt() as interrupt,
        tqdm(total=last_step, initial=first_step, desc=folder.path.name, unit="step") as bar,
    ):

        def on_step(step, metrics):
            if held_out and (step == last_step or settings.eval_every and step % settings.eval_every == 0):
                metrics |= evaluate(model, held_out, settings)
            folder.log(step, metrics)
            bar.update()
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
            if step == last_step or step % settings.save_every == 0 or interrupt.requested:
                save(settings.out, model, tokenizer, state)
            if interrupt.requested and step < last_step:
                raise UserError(f"stopped after step {step} and saved. Go on with the same command and --resume.")

        train(model, rows, settings, on_step, state)


def policy_run(settings, train, evaluate, method):
    """The whole command of a method that makes a policy of the SFT model. `method` is its name, for the report."""
    begun = start(settings)
    folder, policy, tokenizer, state, rows, held_out = begun
    prompts = prompts_of(held_out or rows, settings.samples)
    if "before" not in state:
        state["before"] = complete(policy, tokenizer, prompts, settings.sample_tokens, settings.seed)
    record(begun, policy, train, evaluate, checkpoint.save, settings)
    after = complete(policy, tokenizer, prompts, settings.sample_tokens, settings.seed)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    notes = [f"{method} on {len(rows):,} pairs of {settings.data} from {settings.init}."]
    folder.finish({"prompt": texts, "before": state["before"], "after": after}, notes)


def prompts_of(rows, n):
    """The first n different prompts of pairs, as ids."""
    return [list(prompt) for prompt in dict.fromkeys(tuple(prompt) for prompt, *_ in rows)][:n]
