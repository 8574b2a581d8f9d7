"""What DPO's distance to the limit is made of: the gap at equal KL against the number of pairs, on the toy.

    python -m experiments.frontier.gap --init runs/toy/sft

The command trains what the CSV lacks, then draws it. With endless pairs DPO's optimum is the limit's own policy (Eq. 4
of the paper). Each of `CAUSES` changes one thing. The gap is 1 - (DPO's gain in reward over the reference) / (the
limit's gain at DPO's own KL).
"""

import copy
import dataclasses
import functools
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import train_dpo
from data.toy_sentiment import generate as toy
from data.toy_sentiment import grammar
from experiments import common
from experiments.evaluate import sequence_kl
from experiments.frontier import limit
from experiments.frontier.baselines import fit
from minidpo import checkpoint, dataset
from minidpo.files.writing import claim
from minidpo.run import count_steps
from minidpo.settings import UserError, knob, parse_settings, run_main

# the knobs that each line of the figure changes; soft: with `soft_loss`
CAUSES = {
    "DPO": {},
    "no label noise": {"soft": True},
    "AdamW": {"optimizer": "adamw", "lr": 7e-4},
    "two epochs": {"epochs": 2.0},
    "batches of 32": {"batch_size": 32},
}
DEFAULT = ("DPO", "no label noise", "AdamW")
PAIRS = (1000, 3000, 10000, 30000)
LONGEST = 96  # tokens of a sampled response
SAMPLES = 4  # of each of the 500 held-out prompts


@dataclasses.dataclass
class Settings:
    init: str = knob("runs/toy/sft", "the toy's SFT model: a run folder")
    limit: str = knob("docs/frontier/toy_limit.csv", "the limit of that model, made by experiments.frontier.limit")
    csv: str = knob("docs/frontier/gap.csv", "a row for each run; runs that it has are not repeated")
    figure: str = knob("docs/frontier/gap.png", "the picture")
    cause: str = knob(",".join(DEFAULT), f"what to change, with commas between: {', '.join(CAUSES)}")
    pairs: list = knob(None, f"pairs to train on; may be repeated (default: {', '.join(map(str, PAIRS))})")
    seeds: int = knob(3, "runs of each kind, each with pairs of its own", least=1)
    beta: float = knob(0.9, "of DPO", least=1e-3)
    lr: float = knob(0.0037, "learning rate of DPO: 0.003 / beta^2")


class Run(NamedTuple):
    """One policy, trained and judged; a row of the CSV."""

    cause: str
    pairs: int
    seed: int
    beta: float
    lr: float  # the flag: a cause can have a learning rate of its own
    kl: float  # nats per response
    reward: float
    gap: float
    gap_se: float  # sampling error only
    grammatical: float  # share of the samples
    steps: int
    seconds: float  # of training
    sft: str  # fingerprint of the weights of --init


# ---- 1. The pairs ----


def grammar_pairs(n, seed):
    """Returns the first n pairs of this seed from the toy's generator."""
    first = seed * max(PAIRS)  # seed 0 begins with the toy's own 10,000
    return list(itertools.islice(toy.rows("pairs_train", first + n), first, None))


def preference(record):
    """Bradley-Terry's probability of the choice that was made (Eq. 1)."""
    return 1 / (1 + math.exp(grammar.reward(record["rejected"]) - grammar.reward(record["chosen"])))


# ---- 2. Training and judging ----


def soft_loss(chosen, rejected, reference_chosen, reference_rejected, preferred, **variant):
    """dpo_loss, averaged over the label and its reverse with the weights `preferred` (B,) and 1 - `preferred`.

    With Bradley-Terry's probabilities as weights its gradient has no label noise. With 1 it is dpo_loss.
    """
    labelled, *rewards = train_dpo.dpo_loss(chosen, rejected, reference_chosen, reference_rejected, **variant)
    reversed_, *_ = train_dpo.dpo_loss(rejected, chosen, reference_rejected, reference_chosen, **variant)
    return preferred * labelled + (1 - preferred) * reversed_, *rewards


def train_step(model, optimizer, rows, reference, preferred, indices, settings):
    """train_dpo.train_step with `soft_loss`; preferred: (N,). The step must be one micro-batch."""
    loss = functools.partial(soft_loss, preferred=preferred[indices])
    return train_dpo.train_step(model, optimizer, rows, reference, indices, settings, loss)


def judge(policy, reference, tokenizer, prompts, points, seed):
    """Judges SAMPLES responses to each prompt -> kl, reward, gap, gap_se and grammatical, by name."""
    samples = common.sample(policy, tokenizer, prompts, LONGEST, seed, SAMPLES, batch_size=limit.ROWS)
    kls, _ = sequence_kl(policy, reference, samples.prompt_ids, samples.ids)
    found = limit.moments([grammar.reward(text) for text in samples.texts], kls, SAMPLES)
    kl, reward = found.pop("kl"), found.pop("reward")
    gap = 1 - limit.share_of_gain(points, kl, reward)
    gap_se = limit.height_se(limit.slope_at(points, kl), **found) / (limit.reward_at(points, kl) - points[0].reward)
    accepted = [grammar.grammatical(p + t) for p, t in zip(samples.prompts, samples.texts, strict=True)]
    return dict(kl=kl, reward=reward, gap=gap, gap_se=gap_se, grammatical=statistics.mean(accepted))


def training(settings, **knobs):
    """Returns the Settings of one DPO training, in fp32 on the CPU."""
    values = train_dpo.SETS["toy"] | dict(beta=settings.beta, optimizer="sgd", lr=settings.lr) | knobs
    return train_dpo.Settings(data="toy", init="", out="", device="cpu", dtype="float32", fast=True, **values)


@functools.lru_cache(maxsize=1)  # the causes take turns on the same pairs
def prepared(model, tokenizer, pairs, seed):
    """Returns records, token rows, and the reference's log-probabilities of both sides (N, 2)."""
    records = grammar_pairs(pairs, seed)
    rows, _ = dataset.encode(records, dataset.PAIR, tokenizer, model.config.block_size)
    return records, rows, train_dpo.reference_logps(model, rows, training(Settings()))


def one_run(cause, pairs, seed, model, tokenizer, points, settings):
    """Trains a copy of `model` by DPO and judges it -> Run."""
    knobs = dict(CAUSES[cause])
    records, rows, reference = prepared(model, tokenizer, pairs, seed)
    soft = knobs.pop("soft", False)
    preferred = torch.tensor([preference(record) if soft else 1.0 for record, _ in zip(records, rows, strict=True)])
    policy, made, began = copy.deepcopy(model), training(settings, seed=seed, **knobs), time.perf_counter()
    fit(policy, rows, functools.partial(train_step, reference=reference, preferred=preferred), made)
    seconds = round(time.perf_counter() - began, 1)
    prompts = [record["prompt"] for record in toy.rows("prompts_test", toy.ROWS["prompts_test"])]
    figures = {name: round(value, 5) for name, value in judge(policy, model, tokenizer, prompts, points, seed).items()}
    figures |= dict(steps=count_steps(rows, made)[1], seconds=seconds, sft=checkpoint.fingerprint(model))
    return Run(cause, pairs, seed, settings.beta, settings.lr, **figures)


# ---- 3. The file and the picture ----


def read(path):
    return common.read_csv(path, Run, "python -m experiments.frontier.gap --csv FILE") if Path(path).exists() else []


def write(path, runs):
    common.write_csv(path, sorted(runs, key=lambda run: (list(CAUSES).index(run.cause), run.pairs, run.seed)))


def draw(path, runs):
    """Draws the gap against the number of pairs: per cause the mean over the seeds as a line, and each run as a dot."""
    if not (figure := common.figure(path, (6.4, 4.4))):
        return
    axes = figure.add_subplot()
    for i, cause in enumerate(CAUSES):
        shown = [run for run in runs if run.cause == cause]
        if sizes := sorted({run.pairs for run in shown}):
            means = [statistics.mean(run.gap for run in shown if run.pairs == size) for size in sizes]
            axes.plot(sizes, [100 * gap for gap in means], "o-", color=f"C{i}", label=cause)
            axes.plot([run.pairs for run in shown], [100 * run.gap for run in shown], ".", color=f"C{i}", alpha=0.5)
    axes.plot([], [], ".", color="0.3", alpha=0.5, label="single runs; lines: their means")
    axes.axhline(3, color="black", linewidth=0.8, linestyle="--", label="a gap of 3%")
    axes.set(xscale="log", xlabel="pairs", ylabel="gap to the limit at equal KL, %", ylim=(0, None))
    axes.set_xticks(PAIRS, [f"{n:,}" for n in PAIRS])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    common.save_figure(path, figure)


def table(runs):
    """Returns means over the seeds as text, one line per cause and number of pairs."""
    lines = [f"{'':34}{'pairs':>7}{'seeds':>6}{'KL':>7}{'gap':>8}{'grammatical':>13}"]
    for (cause, pairs), same in itertools.groupby(runs, lambda run: (run.cause, run.pairs)):
        same = list(same)
        kl, gap, share = (statistics.mean(getattr(run, name) for run in same) for name in ("kl", "gap", "grammatical"))
        lines.append(f"{cause:34}{pairs:7,}{len(same):6}{kl:7.2f}{gap:8.1%}{share:13.1%}")
    return "\n".join(lines)


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    claim(settings.csv)
    causes = common.names_in("--cause", settings.cause, CAUSES, DEFAULT)
    points = limit.read(settings.limit)
    gap = lambda run: round(1 - limit.share_of_gain(points, run.kl, run.reward), 5)  # noqa: E731
    runs = [run._replace(gap=gap(run)) for run in read(settings.csv)]  # by this --limit
    if any(run[3:5] != (settings.beta, settings.lr) for run in runs):
        raise UserError(f"{settings.csv} holds runs of another --beta or --lr. Give those, or another --csv.")
    if not all(str(size).isdigit() and 0 < int(size) <= max(PAIRS) for size in settings.pairs or PAIRS):
        raise UserError(f"--pairs: give whole numbers from 1 to {max(PAIRS)}, the number of pairs of one seed.")
    done = {run[:3] for run in runs}
    kinds = itertools.product(map(int, settings.pairs or PAIRS), range(settings.seeds), causes)
    work = [(cause, pairs, seed) for pairs, seed, cause in dict.fromkeys(kinds) if (cause, pairs, seed) not in done]
    if work:
        (model,), tokenizer = common.load_models(settings.init)
        model.set_dropout(0.0)
        if {run.sft for run in runs} - {checkpoint.fingerprint(model)}:
            raise UserError(f"{settings.csv} holds runs from another SFT model. Give another --csv.")
    for kind in tqdm(work, desc="gap", unit="run"):
        runs.append(one_run(*kind, model, tokenizer, points, settings))
        write(settings.csv, runs)  # a stopped study continues after its last run
    write(settings.csv, runs)
    runs = read(settings.csv)
    draw(settings.figure, runs)
    print(table(runs))
    print(f"{settings.csv}, {settings.figure}")


if __name__ == "__main__":
    run_main(main)
