"""Supervised fine-tuning: stage 1, the language model that DPO starts from and measures its distance to.

    python train_sft.py --data toy --out runs/sft
    python train_sft.py --data my_rows.jsonl --init gpt2 --out runs/my_sft

Plain maximum likelihood: the mean of -log pi(token | everything before it) over the response tokens, the final eot
included and the prompt not (it is given, nobody asks the model to write it).
"""

import dataclasses
import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, DTYPES, autocast, pick_device, pick_dtype
from minidpo.model import GPT, PRESETS, GPTConfig
from minidpo.optim import OPTIMIZERS, learning_rate, make_optimizer
from minidpo.run import Run
from minidpo.sampling import complete
from minidpo.scale import parallel
from minidpo.settings import CatchInterrupt, UserError, knob, parse_settings, run_main
from minidpo.tokenizer import Tokenizer

# ---- 1. Settings. The defaults suit a pretrained GPT-2; each dataset has a set of its own, flags override ----

SETS = {
    "paper": {},
    "paper-tldr": {},
    # the toy: each word becomes a token of its own, at 1,232. A narrow model and many steps learn its grammar soonest;
    # rows seen twice, not more, let DPO keep it
    "toy": dict(preset="toy", vocab_size=2048, batch_size=32, lr=4e-3, weight_decay=0.0, epochs=2.0, eval_every=1000),
    "imdb": dict(preset="imdb", batch_size=16, lr=2e-3, warmup_steps=150, epochs=1.0, eval_every=500, sample_tokens=64),
}


@dataclasses.dataclass
class Settings:
    data: str = knob(dataclasses.MISSING, "toy, imdb, hh, tldr, or a JSONL file with prompt, completion")
    out: str = knob(dataclasses.MISSING, "the run folder to write")
    settings: str = knob("", "named set of training settings; empty: the one of --data", choices=("", *SETS))
    init: str = knob(
        "", "start from a run folder, a GPT-2 folder or name; empty: from scratch, in the shape of --preset"
    )
    preset: str = knob("gpt2", f"shape of a model from scratch: {', '.join(PRESETS)}", choices=tuple(PRESETS))
    tokenizer: str = knob("", "a bpe.json, or gpt2, for a model from scratch; empty: train a BPE on the data")
    vocab_size: int = knob(0, "size of the BPE trained on the data; 0: the preset's")
    optimizer: str = knob("adamw", "adamw or rmsprop", choices=OPTIMIZERS)
    lr: float = knob(5e-5, "learning rate after the warm-up; it then falls linearly to 0")
    warmup_steps: int = knob(100, "optimiser steps over which the learning rate rises")
    weight_decay: float = knob(0.1, "AdamW's, on matrices only")
    grad_clip: float = knob(1.0, "longest gradient, in L2 norm")
    dropout: float = knob(0.0, "probability of GPT-2's dropouts, in this stage only")
    epochs: float = knob(1.0, "passes over the rows; 0.5 is half a pass")
    batch_size: int = knob(64, "rows per optimiser step", least=1)
    micro_batch_size: int = knob(0, "rows per forward pass, to save memory; 0: all of the step")
    recompute: bool = knob(False, "save memory: compute each block again in the backward pass (a third more work)")
    compile: bool = knob(False, "torch.compile the blocks: faster on a GPU, after a minute of compiling")
    max_length: int = knob(0, "longest row in tokens; 0: the model's context")
    max_steps: int = knob(0, "stop after this many optimiser steps, on the way of --epochs; 0: go all the way")
    eval_data: str = knob("", "held-out rows for the curves; empty: the dataset's own, none for a file")
    eval_every: int = knob(200, "optimiser steps between evaluations on the held-out rows; 0: at the end only")
    save_every: int = knob(200, "optimiser steps between checkpoints", least=1)
    samples: int = knob(8, "held-out prompts completed at the end, for the report")
    sample_tokens: int = knob(128, "longest of these completions, in tokens", least=1)
    seed: int = knob(0, "of the first weights, the order of the rows, the sampling and dropout")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    dtype: str = knob("auto", "precision of the matrix products", choices=DTYPES)
    resume: bool = knob(False, "go on with the run in --out, with its settings")
    overwrite: bool = knob(False, "replace the run in --out")

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout}: must be at least 0 and below 1.")


# ---- 2. The pieces of the loop ----


def start_model(settings):
    """(model, tokenizer, state) to start or go on from."""
    if settings.resume or settings.init:
        model, tokenizer, state = checkpoint.load(settings.out if settings.resume else settings.init)
        model.set_dropout(settings.dropout)
        return model, tokenizer, state
    if settings.tokenizer == "gpt2":
        tokenizer = Tokenizer.gpt2()
    elif settings.tokenizer:
        tokenizer = Tokenizer.load(settings.tokenizer)
    else:
        records = dataset.read_jsonl(data.find(settings.data, "sft_train"), dataset.SFT)
        size = settings.vocab_size or PRESETS[settings.preset]["vocab_size"]
        tokenizer = Tokenizer.train((r["prompt"] + r["completion"] for r in records), size)
    config = GPTConfig.preset(settings.preset, vocab_size=tokenizer.vocab_size, dropout=settings.dropout)
    return GPT(config, generator=torch.Generator().manual_seed(settings.seed)), tokenizer, {}


def response_loss(model, batch, settings):
    """Summed cross-entropy over the response tokens of Rows, in nats, and how many there are."""
    with autocast(settings.device, settings.dtype):
        hidden = model.hidden(batch.ids)[batch.mask]  # (n, C): no logits are made where none is scored
    loss = F.cross_entropy(model.logits(hidden), batch.targets[batch.mask], reduction="sum")
    return loss, len(hidden)


def train_step(model, optimizer, rows, indices, settings):
    """One optimiser step on the rows `indices`; returns the loss before it, in nats a response token."""
    n = sum(len(rows[i][1]) for i in indices)  # response tokens: each counts the same, however the step is cut
    size = settings.micro_batch_size or len(indices)
    mine = parallel.mine(indices)  # all of them, unless several processes share the step
    total = 0.0
    for micro in parallel.exchange_once(model, [mine[i : i + size] for i in range(0, len(mine), size)]):
        batch = dataset.sft_batch([rows[i] for i in micro], settings.device)
        loss, _ = parallel.call(response_loss, model, batch, settings)
        (loss / n).backward()
        total += loss.item() / n
    total = parallel.total(total)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip).item()
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        raise UserError(
            f"loss {total}, grad_norm {grad_norm} in the batch of rows {sorted(indices)} (usable rows, from 0)."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": total, "grad_norm": grad_norm}


@torch.no_grad()
def evaluate(model, rows, settings):
    """Mean loss over the response tokens of all `rows`, dropout off."""
    model.eval()
    loss, tokens = 0.0, 0
    for indices in parallel.mine(dataset.batches(rows, settings.batch_size, seed=0, epoch=0)):
        batch_loss, n = response_loss(model, dataset.sft_batch([rows[i] for i in indices], settings.device), settings)
        loss, tokens = loss + batch_loss.item(), tokens + n
    model.train()
    return {"eval/loss": parallel.total(loss) / parallel.total(tokens)}


@parallel.joined()
def main():
    # -- what was asked for
    settings = parse_settings(Settings, __doc__.split("\n\n")[0], sets=SETS)
    folder = Run(settings)
    settings.device = pick_device(settings.device)

    # -- model, rows, optimiser
    model, tokenizer, state = start_model(settings)
    model.to(settings.device)
    model.prepare(settings.compile, settings.recompute)
    settings.dtype = pick_dtype(settings.dtype, settings.device, model.config.n_embd)
    max_length = min(settings.max_length or model.config.block_size, model.config.block_size)
    rows, held_out = dataset.load_sft(data.find_split("sft", settings.data, settings.eval_data), tokenizer, max_length)
    data_fingerprint = checkpoint.fingerprint(rows)
    optimizer = make_optimizer(model, settings.optimizer, settings.lr, settings.weight_decay)
    first_step = 0
    if settings.resume:
        if state.get("data") != data_fingerprint:
            raise UserError(f"{settings.out} was started with other rows. Restore them, or start a new run.")
        first_step = state["step"]
        optimizer.load_state_dict(state["optimizer"])

    # -- the loop: the order of the rows follows from seed and epoch, so a resumed run finds its place by counting
    steps_per_epoch = math.ceil(len(rows) / settings.batch_size)
    total = math.ceil(settings.epochs * steps_per_epoch)
    last_step = min(total, settings.max_steps or total)
    if total <= settings.warmup_steps:
        print(f"warning: all {total} steps are warm-up. Lower --warmup-steps {settings.warmup_steps}, or --batch-size.")
    if first_step >= last_step and (folder.path / "report.md").exists():
        raise UserError(f"{settings.out} has made {first_step} of {last_step} steps. Raise --epochs or --max-steps.")
    order = dataset.batches(rows, settings.batch_size, settings.seed, first_step // steps_per_epoch)
    folder.begin(first_step, tokenizer)

    model.train()
    trained = parallel.wrap(model)
    with CatchInterrupt() as interrupt, tqdm(total=last_step, initial=first_step, desc="sft", unit="step") as bar:
        for step in range(first_step, last_step):
            started = time.perf_counter()
            if step % steps_per_epoch == 0:
                order = dataset.batches(rows, settings.batch_size, settings.seed, step // steps_per_epoch)
            indices = order[step % steps_per_epoch]
            lr = learning_rate(step, total, settings.lr, settings.warmup_steps, decay=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
            parallel.seed(settings.seed, step)  # dropout's, so that a resumed run draws it again
            metrics = train_step(trained, optimizer, rows, indices, settings)

            tokens = sum(len(prompt) + len(response) - 1 for prompt, response in (rows[i] for i in indices))
            metrics |= {"lr": lr, "tokens_per_second": tokens / (time.perf_counter() - started)}
            done = step + 1
            if held_out and (done == last_step or settings.eval_every and done % settings.eval_every == 0):
                metrics |= evaluate(model, held_out, settings)
            folder.log(done, metrics)
            bar.update()
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
            stop = parallel.anywhere(interrupt.requested)
            if done == last_step or done % settings.save_every == 0 or stop:
                folder.save(model, tokenizer, dict(step=done, optimizer=optimizer.state_dict(), data=data_fingerprint))
            if stop and done < last_step:
                raise UserError(f"stopped after step {done} and saved. Go on with the same command and --resume.")

    # -- what came of it
    sample_rows = (held_out or rows)[: settings.samples]
    prompts = [prompt for prompt, _ in sample_rows]
    columns = {
        "prompt": [tokenizer.decode(prompt) for prompt in prompts],
        "model": complete(model, tokenizer, prompts, settings.sample_tokens, settings.seed),
        "data": [tokenizer.decode(response) for _, response in sample_rows],
    }
    notes = [f"SFT on {len(rows):,} rows of {settings.data}: {last_step} steps of {settings.batch_size} rows."]
    folder.finish(columns, notes)


if __name__ == "__main__":
    run_main(main)
