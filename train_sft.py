"""Supervised fine-tuning (SFT), stage 1: the language model that DPO starts from.

    python train_sft.py --data toy --out runs/toy/sft
    python train_sft.py --data my_rows.jsonl --init gpt2 --out runs/my_sft

Maximum likelihood: the loss is the mean of -log pi(token | all tokens before it) over the response tokens, the final
eot included. Prompt tokens are not scored, since the prompt is always given.

Preferred-FT, a baseline of the DPO paper, is this script on preferences: in a file with prompt, chosen and rejected,
the chosen response is the completion.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F

import data
from minidpo import dataset
from minidpo.device import autocast
from minidpo.model import GPT, PRESETS, GPTConfig
from minidpo.optim import OPTIMIZERS, learning_rate, make_optimizer, set_learning_rate
from minidpo.run import Run, RunSettings, place
from minidpo.scale import fast, memory, parallel
from minidpo.settings import UserError, knob, parse_settings, run_main
from minidpo.tokenizer import Tokenizer

# ---- 1. Settings. The defaults suit a pretrained GPT-2. A set fits a model and a dataset; flags override it ----

SETS = {
    "paper": {},
    "paper-tldr": {},
    # The toy's BPE ends at 1,232 tokens, when every word is one token. A narrow model and many steps learn its grammar
    # fastest. Each row is seen twice: after more passes, DPO makes the text ungrammatical more easily.
    "toy": dict(preset="toy", vocab_size=2048, batch_size=32, lr=4e-3, weight_decay=0.0, epochs=2.0, eval_every=1000),
    "imdb-small": dict(preset="imdb", batch_size=8, lr=1e-3, epochs=2.75, warmup_steps=300, eval_every=1000),
}


@dataclasses.dataclass(kw_only=True)
class Settings(RunSettings):
    """What SFT adds to `RunSettings`, which holds batch size, seed, device, checkpoints and the like."""

    data: str = knob(dataclasses.MISSING, "toy, imdb, hh, tldr, or a JSONL file with prompt, completion")
    out: str = knob(dataclasses.MISSING, "the run folder to write")
    settings: str = knob("", "named set of training settings; empty: the one that fits", choices=("", *SETS))
    init: str = knob("", "the model to start from: a run or GPT-2 folder, or a name; empty: from scratch, by --preset")
    preset: str = knob("gpt2", f"shape of a model from scratch: {', '.join(PRESETS)}", choices=tuple(PRESETS))
    tokenizer: str = knob("", "a bpe.json, or gpt2, for a model from scratch; empty: train a BPE on the data")
    vocab_size: int = knob(0, "size of the BPE trained on the data; 0: the preset's")
    optimizer: str = knob("adamw", "adamw, rmsprop, or sgd with momentum", choices=OPTIMIZERS)
    lr: float = knob(5e-5, "learning rate after the warm-up; it then falls linearly to 0")
    warmup_steps: int = knob(100, "optimiser steps over which the learning rate rises")
    weight_decay: float = knob(0.1, "AdamW's weight decay, on matrices only")
    grad_clip: float = knob(1.0, "largest L2 norm of the gradient; 0: no limit")
    dropout: float = knob(0.0, "probability of GPT-2's dropouts, in this stage only", below=1)
    eval_every: int = knob(200, "optimiser steps between evaluations on the held-out rows; 0: at the end only")
    save_every: int = knob(200, "optimiser steps between checkpoints", least=1)


# ---- 2. The pieces of the loop. rows: a list of (prompt_ids, response_ids) ----


def new_model(settings):
    """(model, tokenizer, {}) for a run from scratch."""
    if settings.tokenizer == "gpt2":
        tokenizer = Tokenizer.gpt2()
    elif settings.tokenizer:
        tokenizer = Tokenizer.load(settings.tokenizer)
    else:
        records = dataset.read_jsonl(data.find(settings.data, "sft_train"), dataset.SFT)
        size = settings.vocab_size or PRESETS[settings.preset]["vocab_size"]
        tokenizer = Tokenizer.train((r["prompt"] + r["completion"] for r in records), size)
    config = GPTConfig.preset(settings.preset, vocab_size=tokenizer.vocab_size)
    return GPT(config, generator=torch.Generator().manual_seed(settings.seed)), tokenizer, {}


def response_loss(model, rows, indices, settings):
    """Cross-entropy of the rows `indices`, in nats, summed over their response tokens."""
    batch = dataset.sft_batch([rows[i] for i in indices], settings.device)
    with autocast(settings.device, settings.dtype):
        if settings.fast:
            return -fast.row_logps(model, batch).sum()
        hidden = model.hidden(batch.ids)[batch.mask]  # (n, C): logits are needed only where a token is scored
    return F.cross_entropy(model.logits(hidden), batch.targets[batch.mask], reduction="sum")


def train_step(model, optimizer, rows, indices, settings):
    """One optimiser step on the rows `indices`. Returns the metrics from before the update; the loss is per token."""
    n = sum(len(rows[i][1]) for i in indices)  # response tokens: each has the same weight, however the step is cut
    mean_loss = 0.0
    for micro in settings.cut([parallel.share(indices)], rows):
        loss = response_loss(model, rows, micro, settings) / n
        loss.backward()
        mean_loss += loss.item()
    parallel.sum_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
    metrics = {"loss": parallel.all_sum(mean_loss), "grad_norm": grad_norm.item()}
    if not all(math.isfinite(m) for m in metrics.values()):
        raise UserError(f"not a finite number in {metrics}. Lower --lr.\nUsable rows, from 0: {sorted(indices)}.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


@torch.no_grad()
def evaluate(model, rows, settings):
    """Mean loss over the response tokens of all `rows`, without dropout."""
    model.eval()
    batches = settings.cut(dataset.batches(rows, settings.batch_size, seed=0, epoch=0), rows)
    loss = sum(response_loss(model, rows, indices, settings).item() for indices in parallel.share(batches))
    model.train()
    return {"eval/loss": parallel.all_sum(loss) / sum(len(response) for _, response in rows)}


# ---- 3. The run: the loop of train_dpo.py with another step ----


@parallel.joined()
def main():
    # -- settings, model, rows
    settings = parse_settings(Settings, "Stage 1: fine-tunes a language model on text.", sets=SETS)
    run = Run(settings, "sft")
    model, tokenizer, saved = run.load() if settings.resume or settings.init else new_model(settings)
    place(model, settings)
    model.set_dropout(settings.dropout)
    model.prepare(settings.compile, settings.recompute)
    max_length = min(settings.max_length or model.config.block_size, model.config.block_size)
    split = data.find_split("sft", settings.data, settings.eval_data)
    rows, held_out = dataset.load_split(split, dataset.SFT, tokenizer, max_length)
    run.plan(rows, saved, rows)
    memory.check(model, rows + held_out, settings)
    if settings.fast:
        fast.keep_freed_memory()
    optimizer = make_optimizer(model, settings.optimizer, settings.lr, settings.weight_decay)
    if settings.resume:
        optimizer.load_state_dict(saved["optimizer"])
    del saved  # free the loaded checkpoint: with AdamW it is as large as two models

    # -- the loop
    model.train()
    with memory.advise(model, rows + held_out, settings), run.training(model, tokenizer, optimizer) as steps:
        for step, indices in steps:
            lr = learning_rate(step, run.total_steps, settings.lr, settings.warmup_steps, decay=True)
            set_learning_rate(optimizer, lr)
            parallel.seed(settings.seed, step)  # so that a resumed run draws the same dropout masks
            metrics = train_step(model, optimizer, rows, indices, settings)
            metrics |= {"lr": lr, **run.speed(tokens=dataset.count_tokens(rows, indices))}
            if held_out and run.evaluates_after(step):
                metrics |= evaluate(model, held_out, settings)
            run.log(step, metrics)

    # -- the report
    sample_rows = (held_out or rows)[: settings.samples]
    prompts = [prompt for prompt, _ in sample_rows]
    columns = {
        "prompt": [tokenizer.decode(prompt) for prompt in prompts],
        "model": run.complete(model, tokenizer, prompts),
        "data": [tokenizer.decode(response) for _, response in sample_rows],
    }
    note = f"SFT on {len(rows):,} rows of {settings.data}: {run.last_step} steps of {settings.batch_size} rows."
    run.finish(columns, note)


if __name__ == "__main__":
    run_main(main)
