"""What the sweep covers: for each dataset the settings of every method, the knobs of training, and the pairs.

The DPO paper takes beta 0.05, 0.1, 1, 5 for DPO, alpha 0.05, 0.1, 0.5, 1 for Unlikelihood, and KL targets 3, 6, 9, 12
for PPO.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import data
import train_dpo
from data.toy_sentiment import generate as toy
from data.toy_sentiment import grammar
from experiments.frontier.baselines import ppo, reward_model, unlikelihood
from minidpo import dataset

METHODS = ("sft", "preferred-ft", "unlikelihood", "best-of-n", "ppo", "ppo-gt", "dpo")

# method -> its class of Settings, their named sets, and the knob that the sweep varies
TRAINED = {
    "preferred-ft": (train_dpo.Settings, train_dpo.SETS, None),  # DPO's optimiser and steps: only the loss differs
    "unlikelihood": (unlikelihood.Settings, train_dpo.SETS, "alpha"),
    "dpo": (train_dpo.Settings, train_dpo.SETS, "beta"),
    "ppo": (ppo.Settings, ppo.SETS, "kl_target"),
    "ppo-gt": (ppo.Settings, ppo.SETS, "kl_target"),
    "reward-model": (reward_model.Settings, reward_model.SETS, None),
    "reference-logps": (train_dpo.Settings, train_dpo.SETS, None),
}


class Unit(NamedTuple):
    """One method, one setting, one seed."""

    method: str  # one of METHODS, or what others need: "reward-model", "reference-logps"
    setting: float | str  # "" where the method has none
    seed: int

    @property
    def name(self):
        return "_".join(str(part) for part in self if part != "")

    @property
    def needs(self):
        """The unit that must be done before this one, or None."""
        if self.method in ("best-of-n", "ppo"):
            return Unit("reward-model", "", self.seed)
        return Unit("reference-logps", "", 0) if self.method in ("dpo", "unlikelihood") else None


@dataclass(frozen=True)
class Sweep:
    settings: dict  # method -> list of settings: alpha, N of Best-of-N, PPO's target of the KL in nats, beta
    training: dict  # method -> function of the setting -> knobs of training, over those of the dataset's named set
    records: Callable  # n -> the first n training pairs (0: all) as records
    pairs: int  # how many of them, unless --pairs says otherwise
    max_new_tokens: int  # longest completion
    reward: str = ""  # the true reward, unless --reward says otherwise; "": there is none of its own
    grammatical: Callable | None = None  # text -> whether the grammar accepts it
    reward_sd: float = 1.5  # of the SFT model's samples: PPO's first price of a nat goes by it
    rescale: bool = False  # bring a learned reward to `reward_sd` first: its own scale says nothing


SETTINGS = {"preferred-ft": [""], "unlikelihood": [0.05, 0.1, 0.5, 1.0], "best-of-n": [2, 4, 16, 64]}
ADAMW = dict(optimizer="adamw", lr=7e-4, warmup_steps=20, decay=True)
IMDB_PPO = dict(steps=100, rollouts=256, epochs=2, lr=1e-4, value_lr=2e-4, warmup_steps=5, value_clip=1.0)


def by_sgd(beta):
    """DPO on the toy by SGD with momentum: AdamW's equal steps for all weights also learn the noise of the labels.

    The gradient grows with beta, and the log-ratios it has to reach with 1/beta. So lr beta^2 decides how far a run
    gets. Below beta 0.5 the first steps, which grow with lr beta, would be too long: there lr beta is fixed.
    """
    lr = 0.003 / beta**2 if beta > 0.5 else 0.006 / beta
    return dict(optimizer="sgd", lr=lr, warmup_steps=20, decay=True, fast=True)


SWEEPS = {
    "toy": Sweep(
        settings={
            **SETTINGS,
            "ppo": [0.5, 1.0, 2.0, 4.0],
            "ppo-gt": [0.5, 1.0, 2.0, 4.0],
            "dpo": [0.05, 0.1, 0.3, 0.5, 0.62, 0.75, 1.0, 1.4, 5.0],
        },
        training={
            "dpo": by_sgd,
            "preferred-ft": lambda _: ADAMW,
            "unlikelihood": lambda alpha: dict(ADAMW, fast=True),
            "reward-model": lambda _: ADAMW,
        },
        records=lambda n: list(toy.rows("pairs_train", n)),  # the generator makes more than the file holds
        pairs=30_000,
        max_new_tokens=96,
        reward="toy",  # the labels are drawn from it by Bradley-Terry, so a learned reward has its scale
        grammatical=grammar.grammatical,
    ),
    "imdb": Sweep(
        settings={
            **SETTINGS,
            "ppo": [3.0, 6.0, 9.0, 12.0],
            "ppo-gt": [3.0, 6.0, 9.0, 12.0],
            "dpo": [0.05, 0.1, 0.3, 1.0, 5.0],
        },
        training={
            **{method: lambda target: IMDB_PPO for method in ("ppo", "ppo-gt")},
            **{method: lambda setting: dict(fast=True) for method in ("dpo", "unlikelihood")},
        },
        records=lambda n: dataset.read_jsonl(data.find("imdb", "pairs_train"), dataset.PAIR)[: n or None],
        pairs=0,
        max_new_tokens=64,
        rescale=True,
    ),
}


def training(unit, settings):
    """Returns the Settings that a unit trains with."""
    sweep, (cls, sets, knob) = SWEEPS[settings.data], TRAINED[unit.method]
    own = {"imdb": "imdb-small"}.get(settings.data, settings.data)  # the set of the small model
    values = {**sets.get(own, {}), "seed": unit.seed}
    if knob:
        values[knob] = unit.setting
    if cls is ppo.Settings:
        # the price at which the optimum is `kl_target` nats away, for a reward of normal distribution
        values["kl_coef"] = sweep.reward_sd / math.sqrt(2 * unit.setting)
        values["max_new_tokens"] = settings.max_new_tokens
    if unit.method in sweep.training:
        values |= sweep.training[unit.method](unit.setting)
    if cls is ppo.Settings and settings.ppo_steps:
        values["steps"] = settings.ppo_steps
    return cls(data=settings.data, init=settings.sft, out="", device=settings.device, **values)
