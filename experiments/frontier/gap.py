"""What DPO's distance to the limit is made of: the gap at equal KL against the number of pairs, on the toy.

    python -m experiments.frontier.gap --init runs/sft --limit limit.csv   trains what the CSV lacks, and draws
    python -m experiments.frontier.gap --figure-only                          draws the figure from the CSV again

DPO's loss is a classifier's: with endless pairs its optimum is the limit's own policy (Eq. 4 of the paper), and no gap
is left. Each of `CAUSES` changes one thing about the pairs or the training and nothing else: the same pairs in the same
order, where it can be. The gap is 1 - (DPO's gain in reward over the reference) / (the limit's gain at DPO's own KL).
Reward and KL are means over the same samples, the KL by its plain estimator: a sample that happens to lie far from the
reference has a high reward, too, and such errors run along the curve, not away from it.
"""

import copy
import csv
import dataclasses
import functools
import io
import itertools
import math
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import train_dpo
from data.toy_sentiment import generate as toy
from data.toy_sentiment import grammar
from experiments.evaluate import sequence_kl
from experiments.frontier import limit
from experiments.frontier.baselines import SETS, PairSettings, fit, pair_step
from experiments.make_pairs import pairs_of
from experiments.rewards import load_reward
from minidpo import checkpoint, dataset
from minidpo.files import atomic, atomic_write
from minidpo.optim import OPTIMIZERS
from minidpo.sampling import generate
from minidpo.settings import UserError, knob, parse_settings, run_main, unknown
from train_dpo import dpo_loss, logps_of

# what each line of the figure does differently from DPO as the settings have it: knobs of training, or
#   soft     no label noise: the loss is averaged over the labels that Bradley-Terry could have drawn
#   sampled  both responses are samples of the reference, not the grammar's
CAUSES = {
    "DPO": {},
    "no label noise": {"soft": True},
    "AdamW": {"optimizer": "adamw", "lr": 7e-4},
    "half the learning rate": {"lr": 0.003},
    "two epochs": {"epochs": 2.0},
    "batches of 32": {"batch_size": 32},
    "pairs sampled from the reference": {"sampled": True},
}
DEFAULT = ("DPO", "no label noise", "AdamW")
PAIRS = (1000, 3000, 10000, 30000)
FIELDS = ("cause", "pairs", "seed", "beta", "kl", "reward", "gap", "gap_se", "grammatical", "steps", "seconds")
LONGEST = 96  # tokens of a sampled response
TARGET = 0.03  # a gap of 3 %


@dataclasses.dataclass
class Settings:
    init: str = knob("runs/toy/sft", "the toy's SFT model: a run folder")
    limit: str = knob("docs/frontier/toy_limit.csv", "the limit of that model, made by experiments.limit")
    csv: str = knob("docs/frontier/gap.csv", "a row for each run; runs that it has are not repeated")
    figure: str = knob("docs/frontier/gap.png", "the picture")
    cause: list = knob(None, f"what to change: {', '.join(CAUSES)}; may be repeated (default: {', '.join(DEFAULT)})")
    pairs: list = knob(None, f"pairs to train on; may be repeated (default: {', '.join(map(str, PAIRS))})")
    seeds: int = knob(3, "runs of each kind, each with pairs of its own", least=1)
    beta: float = knob(0.7, "of DPO", least=1e-3)
    optimizer: str = knob("sgd", "of DPO", choices=OPTIMIZERS)
    lr: float = knob(0.006, "learning rate of DPO")
    samples_per_prompt: int = knob(4, "completions of each of the 500 held-out prompts", least=1)
    figure_only: bool = knob(False, "train nothing")


@dataclasses.dataclass
class Training(PairSettings):
    """Of one run: the knobs of every method that learns from pairs, and DPO's own."""

    beta: float = 0.7


# ---- 1. The pairs ----


def grammar_pairs(n, seed):
    """n pairs of a seed from the toy's generator -> records. Those of fewer pairs are the first of those of more."""
    first = seed * max(PAIRS)  # seed 0 begins with the toy's own 10,000
    return list(itertools.islice(toy.rows("pairs_train", first + n), first, None))


def sampled_pairs(model, tokenizer, n, seed):
    """The same with both responses sampled from `model`, as experiments.make_pairs does it with --k 2 --labels bt."""
    openings = itertools.cycle(record["prompt"] for record in toy.rows("prompts_train", toy.ROWS["prompts_train"]))
    prompts = [prompt for prompt in itertools.islice(openings, n) for _ in range(2)]
    ids = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
    sampling, labelling = (torch.Generator().manual_seed(seed) for _ in range(2))
    samples = generate(model, ids, LONGEST, tokenizer.eot, generator=sampling, batch_size=limit.ROWS)
    texts = [tokenizer.decode(sample) for sample in samples]
    ended = [sample[-1] == tokenizer.eot for sample in samples]
    both = list(zip(texts, ended, load_reward("toy")(prompts, texts), strict=True))
    pairs = [pairs_of(prompts[2 * i], both[2 * i : 2 * i + 2], "bt", labelling, Counter()) for i in range(n)]
    return [pair for pair in itertools.chain(*pairs)]


def preference(record):
    """Bradley-Terry's probability of the choice that was made (Eq. 1)."""
    return 1 / (1 + math.exp(grammar.reward(record["rejected"]) - grammar.reward(record["chosen"])))


# ---- 2. Training and judging ----


def measure(model, rows, indices, settings, reference, preferred):
    """DPO's loss with each label believed as far as `preferred` (N,) says; 1 everywhere is train_dpo.py's.

    The expected loss over the labels that Bradley-Terry could have drawn: its gradient has no label noise.
    """
    chosen, rejected = logps_of(model, rows, indices, settings)
    reference_chosen, reference_rejected = reference[indices].T
    p = preferred[indices]
    as_labelled, *_ = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, settings.beta)
    reversed_, *_ = dpo_loss(rejected, chosen, reference_rejected, reference_chosen, settings.beta)
    return {"loss": p * as_labelled + (1 - p) * reversed_}


def train(start, rows, reference, preferred, settings):
    """DPO from a copy of `start` on token rows -> the policy, its optimiser steps, and the seconds they took."""
    policy = copy.deepcopy(start)
    policy.set_dropout(0.0)
    steps = []
    began = time.perf_counter()
    step = functools.partial(pair_step, functools.partial(measure, reference=reference, preferred=preferred))
    fit(policy, rows, step, settings, lambda step, metrics: steps.append(step))
    return policy, len(steps), time.perf_counter() - began


@torch.no_grad()
def judge(policy, reference, tokenizer, prompts, points, seed):
    """Samples one completion of each prompt -> kl, reward, gap, gap_se and grammatical, by name.

    gap_se is the sampling's: where the policy is near the limit, the limit's slope beta takes the noise of the rewards
    out with that of the KL.
    """
    ids = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    samples = generate(policy, ids, LONGEST, tokenizer.eot, generator=generator, batch_size=limit.ROWS)
    texts = [tokenizer.decode(sample) for sample in samples]
    rewards = torch.tensor(load_reward("toy")(prompts, texts), dtype=torch.float64)
    kls, _ = sequence_kl(policy, reference, ids, samples)
    kl, reward = kls.mean().item(), rewards.mean().item()
    slope = limit.slope_at(points, kl)
    return {
        "kl": kl,
        "reward": reward,
        "gap": 1 - limit.share_of_gain(points, kl, reward),
        "gap_se": ((rewards - slope * kls).std() / len(prompts) ** 0.5).item()
        / (limit.reward_at(points, kl) - points[0].reward),
        "grammatical": sum(grammar.grammatical(p + t) for p, t in zip(prompts, texts, strict=True)) / len(prompts),
    }


@functools.lru_cache(maxsize=1)  # the causes take turns on the same pairs
def prepared(model, tokenizer, pairs, seed, sampled):
    """Records, token rows, and the reference's log-probabilities of both sides (N, 2)."""
    records = sampled_pairs(model, tokenizer, pairs, seed) if sampled else grammar_pairs(pairs, seed)
    rows, _ = dataset.encode_pairs(records, tokenizer, model.config.block_size)
    settings = train_dpo.Settings(data="toy", init="", out="", device="cpu", dtype="float32", fast=True)
    return records, rows, train_dpo.reference_logps(model, rows, settings)


def one_run(cause, pairs, seed, model, tokenizer, points, settings):
    """Trains and judges one policy -> its row of the CSV."""
    changes = CAUSES[cause]
    records, rows, reference = prepared(model, tokenizer, pairs, seed, changes.get("sampled", False))
    preferred = torch.ones(len(rows))
    if changes.get("soft"):
        preferred = torch.tensor([preference(record) for record, _ in zip(records, rows, strict=True)])
    how = dict(SETS["toy"], optimizer=settings.optimizer, lr=settings.lr, seed=seed)
    how |= dict(device="cpu", dtype="float32", fast=True)
    how |= {name: value for name, value in changes.items() if name not in ("soft", "sampled")}
    training = Training(data="toy", init=settings.init, out="", beta=settings.beta, **how)
    policy, steps, seconds = train(model, rows, reference, preferred, training)
    held_out = toy.rows("prompts_test", toy.ROWS["prompts_test"])
    prompts = [record["prompt"] for record in held_out for _ in range(settings.samples_per_prompt)]
    figures = judge(policy, model, tokenizer, prompts, points, seed)
    row = dict(cause=cause, pairs=pairs, seed=seed, beta=settings.beta, steps=steps, seconds=round(seconds, 1))
    return row | {name: round(value, 5) for name, value in figures.items()}


# ---- 3. The file and the picture ----


def read(path):
    """The rows of the CSV as dicts, numbers as numbers; [] if there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {"cause": str, "pairs": int, "seed": int, "steps": int}
    try:
        return [{name: kinds.get(name, float)(row[name]) for name in FIELDS} for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or of another kind ({error!r}). Remove it, or name another --csv."
        ) from error


def write(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (list(CAUSES).index(row["cause"]), row["pairs"], row["seed"])))
    atomic_write(path, text.getvalue())


def draw(path, rows):
    """The gap against the number of pairs, a line a cause: the mean over the seeds, and each run as a dot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "minidpo[plot]")')
        return
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for i, cause in enumerate(CAUSES):
        mine = [row for row in rows if row["cause"] == cause]
        if not mine:
            continue
        sizes = sorted({row["pairs"] for row in mine})
        means = [statistics.mean(row["gap"] for row in mine if row["pairs"] == size) for size in sizes]
        axes.plot(sizes, [100 * gap for gap in means], "o-", color=f"C{i}", label=cause)
        axes.plot([row["pairs"] for row in mine], [100 * row["gap"] for row in mine], ".", color=f"C{i}", alpha=0.5)
    axes.axhline(100 * TARGET, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="pairs", ylabel="gap to the limit at equal KL, %", ylim=(0, None))
    axes.set_xticks(PAIRS, [f"{n:,}" for n in PAIRS])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with atomic(path) as file:
        figure.savefig(file, dpi=110, format="png")


def table(rows):
    """Means over the seeds, a line for each cause and number of pairs."""
    lines = [f"{'':34}{'pairs':>7}{'seeds':>6}{'KL':>7}{'gap':>8}{'grammatical':>13}"]
    key = lambda row: (row["cause"], row["pairs"])  # noqa: E731
    for (cause, pairs), same in itertools.groupby(rows, key):
        same = list(same)
        kl, gap, share = (statistics.mean(row[name] for row in same) for name in ("kl", "gap", "grammatical"))
        lines.append(f"{cause:34}{pairs:7,}{len(same):6}{kl:7.2f}{gap:8.1%}{share:13.1%}")
    return "\n".join(lines)


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    for cause in settings.cause or []:
        if cause not in CAUSES:
            raise unknown("--cause", cause, list(CAUSES))
    rows = read(settings.csv)
    points = limit.read(settings.limit)
    for row in rows:  # of the limit as it is now
        row["gap"] = round(1 - limit.share_of_gain(points, row["kl"], row["reward"]), 5)
    if not settings.figure_only:
        model, tokenizer, _ = checkpoint.load(settings.init)
        model.set_dropout(0.0)
        sizes = [int(n) for n in settings.pairs or PAIRS]
        done = {(row["cause"], row["pairs"], row["seed"]) for row in rows}
        kinds = itertools.product(sizes, range(settings.seeds), settings.cause or DEFAULT)
        work = [(cause, pairs, seed) for pairs, seed, cause in kinds if (cause, pairs, seed) not in done]
        for kind in tqdm(work, desc="gap", unit="run"):
            rows.append(one_run(*kind, model, tokenizer, points, settings))
            write(settings.csv, rows)  # a stopped study goes on behind its last run
    if not rows:
        raise UserError(f"{settings.csv} holds no runs. Leave out --figure-only to make them.")
    write(settings.csv, rows)
    rows = read(settings.csv)
    draw(settings.figure, rows)
    print(table(rows))
    print(f"{settings.csv}, {settings.figure}")


if __name__ == "__main__":
    run_main(main)
