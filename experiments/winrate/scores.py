"""Comparisons of a run's completions with others: who wins, how often, and how far two judges agree."""

import math
import random
from collections import Counter

import numpy


def compare(judge, prompts, ours, theirs, seed):
    """Judges `ours` against `theirs`, in random order -> list of "win", "tie", "loss", or None if unreadable.

    The order depends only on the texts and the seed, so a repeated comparison is the same question to a chat model.
    """
    ours_first, sides = [], []
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        ours_first.append(random.Random(f"{seed}\n{prompt}\n{our}\n{their}").random() < 0.5)
        sides.append((our, their) if ours_first[-1] else (their, our))
    verdicts = judge(prompts, [a for a, _ in sides], [b for _, b in sides])
    outcomes = {True: {"a": "win", "b": "loss"}, False: {"a": "loss", "b": "win"}}  # "tie" and None stay as they are
    return [outcomes[first].get(verdict, verdict) for first, verdict in zip(ours_first, verdicts, strict=True)]


def interval(wins, ties, losses):
    """95 % bootstrap interval of the win rate over prompts, by the percentile method -> (low, high).

    Drawing n prompts with replacement is the same as drawing the three counts from a multinomial distribution.
    """
    n = wins + ties + losses
    counts = numpy.random.default_rng(0).multinomial(n, [wins / n, ties / n, losses / n], size=10_000)
    return tuple(numpy.quantile((counts[:, 0] + counts[:, 1] / 2) / n, [0.025, 0.975]).tolist())


def count(outcomes):
    """Outcomes for different prompts -> counts, win rate (a tie is one half) and its interval, by name."""
    found = Counter(outcomes)
    wins, ties, losses = (found[name] for name in ("win", "tie", "loss"))
    rate = low = high = math.nan
    if judged := wins + ties + losses:
        rate = (wins + ties / 2) / judged
        low, high = interval(wins, ties, losses)
    return dict(win_rate=rate, low=low, high=high, wins=wins, ties=ties, losses=losses, unparsed=found[None])


def agreement(a, b):
    """Agreement of two judges on the same comparisons -> n, the share of equal outcomes, and Cohen's kappa, by name.

    kappa = (share - chance) / (1 - chance). chance is the share that two judges with these frequencies would reach if
    their outcomes were independent (Cohen 1960). kappa is NaN if chance is 1. Unreadable outcomes are left out.
    """
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not (n := len(both)):
        return {"n": 0, "share": math.nan, "kappa": math.nan}
    share = sum(x == y for x, y in both) / n
    of_a, of_b = Counter(x for x, _ in both), Counter(y for _, y in both)
    chance = sum(of_a[outcome] * of_b[outcome] for outcome in of_a) / n**2
    return {"n": n, "share": share, "kappa": (share - chance) / (1 - chance) if chance < 1 else math.nan}
