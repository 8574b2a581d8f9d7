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
from experiments.frontier.baselines import ppo, unlikelihood
from minidpo import dataset

METHODS = ("sft", "preferred-ft", "unlikelihood", "best-of-n", "ppo", "ppo-gt", "dpo")


class Unit(NamedTuple):
    """One method, one setting, one seed."""

    method: str  # one of METHODS, or what others need: "reward-model", "reference-logps"
    setting: float | str  # "" where the method has none; "1.0-adamw": DPO at beta 1 by AdamW in place of SGD
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
    base: str  # the named set of train_dpo.py that all methods but PPO train with
    training: dict  # method -> a function: it takes the setting, returns the knobs that differ from `base` or PPO's
    records: Callable  # n -> the first n training pairs (0: all) as records
    pairs: int  # how many of them, unless --pairs says otherwise
    max_new_tokens: int  # longest completion
    reward: str = ""  # the true reward, unless --reward says otherwise; "": there is none of its own
    grammatical: Callable | None = None  # text -> whether the grammar accepts it
    reward_sd: float = 1.5  # SD of the SFT model's rewards; it sets PPO's first kl_coef
    rescale: bool = False  # bring a learned reward to `reward_sd` first: see unit.to_scale


def every_setting(kl_targets, betas):
    """Returns the settings of every method: PPO's targets of the KL and DPO's betas differ between the datasets."""
    same = {"preferred-ft": [""], "unlikelihood": [0.05, 0.1, 0.5, 1.0], "best-of-n": [2, 4, 16, 64]}
    return {**same, "ppo": kl_targets, "ppo-gt": kl_targets, "dpo": betas}


def number(setting):
    """The number in a setting: 1.0 of 1.0 and of "1.0-adamw", 0.0 of ""."""
    return float(str(setting).partition("-")[0] or 0)


def dpo_optimizer(setting):
    """DPO on the toy: SGD with momentum, or AdamW with the settings of the other methods.

    The gradient grows with beta, and the log-ratios that a run must reach fall with beta. So with SGD, lr beta^2
    decides how far a run gets. It is the same for all betas above 0.5. Below, the first steps would be too long. They
    are proportional to lr beta, so there lr beta is the same for all betas.
    """
    if str(setting).endswith("-adamw"):
        return {}
    lr = 0.003 / setting**2 if setting > 0.5 else 0.006 / setting
    return {"optimizer": "sgd", "lr": lr}


def read_pairs(path, n):
    """The first n pairs of a JSONL file (0: all) as records."""
    return dataset.read_jsonl(path, dataset.PAIR)[: n or None]


SWEEPS = {
    "toy": Sweep(
        settings=every_setting(
            kl_targets=[0.5, 1.0, 2.0, 4.0],
            betas=[0.05, 0.1, 0.3, 0.5, 0.62, 0.75, 1.0, 1.4, 5.0, "0.5-adamw", "0.75-adamw", "1.0-adamw", "1.4-adamw"],
        ),
        base="toy",
        training={"dpo": dpo_optimizer, "reward-model": lambda _: {"batch_size": 32}},
        records=lambda n: list(toy.rows("pairs_train", n)),  # the generator makes more than the file holds
        pairs=30_000,
        max_new_tokens=96,
        reward="toy",  # the labels are drawn from it by Bradley-Terry, so a learned reward has its scale
        grammatical=grammar.grammatical,
    ),
    "imdb": Sweep(
        settings=every_setting(kl_targets=[1.0, 3.0, 6.0, 9.0, 12.0], betas=[0.05, 0.1, 0.2, 0.5, 1.0]),
        base="imdb-small",
        training=dict.fromkeys(("ppo", "ppo-gt"), lambda _: {"steps": 60, "lr": 1e-4, "value_lr": 2e-4})
        | {"reward-model": lambda _: {"lr": 3e-4}},
        records=lambda n: read_pairs(data.find("imdb", "pairs_train"), n),
        pairs=0,
        max_new_tokens=64,
        rescale=True,
    ),
}


def training(unit, settings):
    """Returns the Settings that a unit trains with."""
    sweep = SWEEPS[settings.data]
    own = sweep.training.get(unit.method, lambda _: {})(unit.setting)
    if unit.method in ("ppo", "ppo-gt"):
        # for a normally distributed reward, the optimum at this price is `kl_target` nats away
        price = sweep.reward_sd / math.sqrt(2 * unit.setting)
        values = dict(kl_target=unit.setting, kl_coef=price, max_new_tokens=settings.max_new_tokens, seed=unit.seed)
        flags = {"steps": settings.ppo_steps, "lr": settings.ppo_lr, "value_lr": 2 * settings.ppo_lr}
        return ppo.Settings(**{**values, **own, **{name: value for name, value in flags.items() if value}})
    cls = unlikelihood.Settings if unit.method == "unlikelihood" else train_dpo.Settings
    knob = {"unlikelihood": "alpha", "dpo": "beta"}.get(unit.method)
    varied = {knob: number(unit.setting)} if knob else {}
    # fast in every unit: in bf16 the fast and the plain path differ, and policy and reference must take the same one
    values = {**train_dpo.SETS[sweep.base], "seed": unit.seed, "fast": True, **varied, **own}
    return cls(data=settings.data, init=settings.sft, out="", device=settings.device, **values)
