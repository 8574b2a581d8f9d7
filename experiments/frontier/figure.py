"""The sweep's table as a picture and as a summary."""

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import common
from experiments.frontier import limit
from experiments.frontier.sweeps import METHODS, number
from minidpo.settings import UserError, unknown


class Point(NamedTuple):
    """A row of the CSV: one policy, at one step of its training."""

    method: str
    setting: str
    seed: int
    step: int
    kl: float  # nats per response; for Best-of-N the upper bound
    kl_se: float
    reward: float
    reward_se: float
    grammatical: float  # share of the samples; NaN without a grammar
    second_reward: float  # mean reward by another judge; NaN without one
    seconds: float  # of training


class Covariance(NamedTuple):
    """A row of NAME_cov.csv: the covariance of the errors of kl and reward, means over the same samples."""

    method: str
    setting: str
    seed: int
    step: int
    cov: float


def covariance_path(path):
    return Path(path).with_name(Path(path).stem + "_cov.csv")


def read_covariances(path):
    """Reads the covariances of the sweep's CSV `path` -> {(method, setting, seed, step): cov}; {} if it has none."""
    if not covariance_path(path).exists():
        return {}
    rows = common.read_csv(covariance_path(path), Covariance, "python -m experiments.frontier --help")
    return {row[:-1]: row.cov for row in rows if not math.isnan(row.cov)}


def read_csv(path):
    """Reads the sweep's CSV -> list of Points. UserError if it is missing, empty, or another kind of file."""
    points = common.read_csv(path, Point, "python -m experiments.frontier --help")
    for line, point in enumerate(points, 2):
        if point.method not in METHODS:
            raise UserError(f"{path}, line {line}: {unknown('method', point.method, list(METHODS))}")
    if not points:
        raise UserError(f"{path} holds no points yet.")
    return points


def last_points(points):
    """Returns the points at the end of their unit's training."""
    last = {(p.method, p.setting, p.seed): p.step for p in sorted(points, key=lambda p: p.step)}
    return [p for p in points if last[p.method, p.setting, p.seed] == p.step]


LOOKS = {  # colours of Okabe and Ito, which the colour-blind can tell apart, and a marker each
    "dpo": ("DPO", "#0072B2", "o"),
    "dpo-adamw": ("DPO by AdamW", "#0072B2", "X"),
    "ppo-gt": ("PPO on the true reward", "#009E73", "s"),
    "ppo": ("PPO on the learned reward", "#D55E00", "D"),
    "best-of-n": ("Best-of-N (upper bound of its KL)", "#56B4E9", "^"),
    "preferred-ft": ("Preferred-FT", "#E69F00", "P"),
    "unlikelihood": ("Unlikelihood", "#CC79A7", "v"),
    "sft": ("SFT", "#000000", "*"),
}


def kind(point):
    """The key of a point in LOOKS."""
    return "dpo-adamw" if point.setting.endswith("-adamw") else point.method


TICKS = (0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000)


def draw(points, curve, path, kl_end=20.0, bradley_terry=False):
    """Draws the figure: reward against KL, and below it the share of grammatical samples and the second reward, if any.

    curve: the limit's Points, or None. Points beyond a KL of kl_end are named in the figure.
    """
    final = set(last_points(points))
    columns = {"reward": "mean true reward", "grammatical": "grammatical", "second_reward": "second reward"}
    columns = {name: label for name, label in columns.items() if has(points, name)}
    beyond = sorted(p for p in final if p.kl > kl_end)
    points, final = [p for p in points if p.kl <= kl_end], final - set(beyond)
    if not (figure := common.figure(path, (7.5, 4.5 + 2 * (len(columns) - 1)))):
        return
    axes = figure.subplots(len(columns), sharex=True, squeeze=False, height_ratios=(5, 2, 2)[: len(columns)])[:, 0]
    for axis, column in zip(axes, columns, strict=True):
        for order, (method, (label, colour, marker)) in enumerate(reversed(LOOKS.items())):
            on_the_way = set(points) - final, dict(s=8, alpha=0.35, linewidths=0)
            at_the_end = final, dict(s=42, edgecolors="white", linewidths=0.6, label=label)
            for chosen, look in (on_the_way, at_the_end):
                if shown := [p for p in points if kind(p) == method and p in chosen]:
                    x, y = [max(0, p.kl) for p in shown], [getattr(p, column) for p in shown]
                    axis.scatter(x, y, color=colour, marker=marker, zorder=3 + order, **look)
        axis.set_ylabel(columns[column])
        axis.grid(alpha=0.25)
    if curve and points:
        axes[0].plot([p.kl for p in curve], [p.reward for p in curve], "k-", linewidth=1.2, label="the limit")
        if rings := list(theory(points, curve, bradley_terry).values()):
            label, look = "where theory puts DPO", dict(facecolors="none", edgecolors=LOOKS["dpo"][1], s=42)
            axes[0].scatter(*zip(*rings, strict=True), zorder=2.5, label=label, **look)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles[::-1], labels[::-1], fontsize=8, loc="lower right", framealpha=0.9)
    longest = max((p.kl for p in points), default=kl_end)
    # if the reward is normally distributed, the limit is sd sqrt(2 KL): a straight line over the root of the KL
    root, square = lambda kl: np.sign(kl) * np.sqrt(np.abs(kl)), lambda x: np.sign(x) * np.square(x)
    axes[-1].set_xscale("function", functions=(root, square))
    ticks = [tick for tick in TICKS if tick <= 1.3 * longest]
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[-1].minorticks_off()
    axes[-1].set_xlim(-0.004, 1.05 * longest)
    axes[-1].set_xlabel("KL from the SFT model, nats per response (axis: its square root)")
    if beyond:
        line = "{} {}, seed {}: {:.0f} nats, reward {:.1f}".format
        names = [line(LOOKS[kind(p)][0], p.setting, p.seed, p.kl, p.reward) for p in beyond]
        text = "\n".join(["beyond the right edge:", *names])
        axes[0].text(0.01, 0.98, text, transform=axes[0].transAxes, va="top", fontsize=7)
    common.save_figure(path, figure)


def has(points, column):
    """Whether all points have a number in this column."""
    return not any(math.isnan(getattr(p, column)) for p in points)


def theory(points, curve, bradley_terry=False):
    """Returns {beta: (KL, reward)} of the optima of DPO's betas, where the limit is drawn.

    {} unless the labels were drawn by Bradley-Terry from the true reward, as those of the toy (which has a grammar).
    """
    if not bradley_terry and not has(points, "grammatical"):
        return {}
    betas = sorted({number(p.setting) for p in points if p.method == "dpo"})
    return {beta: at for beta in betas if not math.isnan((at := limit.at_beta(curve, beta))[0])}


def summary(points, curve, covariances, bradley_terry=False):
    """Returns a table as text: means over the seeds of the last points, and which points lie above the limit.

    "of the limit": the gain in reward over the reference as a share of the limit's gain at the same KL, with the
    standard error of its mean over the seeds. "s": the shortest time of training, in seconds.
    """
    groups = defaultdict(list)
    for point in last_points(points):
        groups[point.method, point.setting].append(point)
    names = f"{'KL':>9}{'reward':>8}{'of the limit':>17}{'grammatical':>13}{'s':>7}"
    two_judges = has(points, "second_reward")
    names += f"{'second reward':>15}" if two_judges else ""
    lines = [f"{'method':14}{'setting':>10}{'seeds':>6}{names}"]
    for (method, setting), group in groups.items():
        columns = ("kl", "reward", "grammatical", "second_reward")
        kl, reward, grammatical, second = (statistics.mean(getattr(p, name) for p in group) for name in columns)
        seconds = min(p.seconds for p in group)  # of the seed that other work disturbed least
        compared = group if curve and method != "sft" else []
        shares = [limit.share_of_gain(curve, p.kl, p.reward) for p in compared]
        share = f"{statistics.mean(shares):.1%}" if shares and not math.isnan(sum(shares)) else ""
        if share and len(shares) > 1:
            share += f" +- {statistics.stdev(shares) / len(shares) ** 0.5:.1%}"
        accepted = "" if math.isnan(grammatical) else f"{grammatical:.1%}"
        cells = f"{kl:9.3g}{reward:8.2f}{share:>17}{accepted:>13}{seconds:7.0f}"
        cells += f"{second:15.2f}" if two_judges else ""
        lines.append(f"{method:14}{setting:>10}{len(group):6}{cells}")
    if curve:
        for beta, (kl, reward) in theory(points, curve, bradley_terry).items():
            lines.append(f"DPO's optimum at beta {beta:g} is at a KL of {kl:.2f} and a reward of {reward:.2f}")
        heights = {p: height(p, curve, covariances.get(p[:4])) for p in points}
        look = "standard errors above the limit, look for the bug:"
        above = [f"{heights[p]:.1f} {look} {p}" for p in points if heights[p] > 2]
        lines += above or ["no point is above the limit by more than two standard errors"]
    return "\n".join(lines)


def height(point, curve, cov=None):
    """Returns how far a point is above the limit at its KL, in standard errors; NaN where the limit is not drawn.

    cov: of the errors of kl and reward. None: the largest possible, which gives the smallest error.
    """
    best, slope = limit.reward_at(curve, point.kl), limit.slope_at(curve, point.kl)
    cov = point.kl_se * point.reward_se if cov is None else cov
    error = math.hypot(limit.height_se(slope, point.kl_se, point.reward_se, cov), curve[0].reward_se)
    above = point.reward - best
    return above / error if error else above * math.inf
