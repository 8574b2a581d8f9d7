"""One unit of the sweep: one method, one setting, one seed.

    python -m experiments.frontier.unit --method dpo --setting 0.3 --seed 0 --data toy --sft runs/toy/sft \
        --out runs/frontier/toy

It starts from the SFT model, trains, is evaluated on the way, and writes its points to --out/units/NAME.json. The sweep
(`python -m experiments.frontier`) runs this command once for each unit. A unit that needs a reward model, or the
log-probabilities of the reference, finds them in --out: the units "reward-model" and "reference-logps" write them.
"""

import copy
import dataclasses
import functools
import json
import re
import statistics
import time
from pathlib import Path

import torch

import train_dpo
import train_sft
from experiments import common
from experiments.evaluate import sequence_kl
from experiments.frontier import limit
from experiments.frontier.baselines import best_of_n, fit, ppo, reward_model, unlikelihood
from experiments.frontier.sweeps import METHODS, SWEEPS, Unit, number, read_pairs, training
from experiments.rewards import load_reward
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, pick_device, pick_dtype
from minidpo.files.writing import atomic, atomic_write, claim
from minidpo.run import count_steps, place
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass(kw_only=True)
class SweepSettings:
    """What the sweep and each of its units are told: together with the unit it decides the points."""

    data: str = knob("toy", "toy or imdb", choices=tuple(SWEEPS))
    sft: str = knob("", "the SFT model: a run folder, a GPT-2 folder or name; empty: runs/DATA/sft")
    out: str = knob("", "folder for the points, the reward models and the policies; empty: runs/frontier/DATA")
    reward: str = knob("", "the true reward: toy, or the file of a trained classifier; empty: the dataset's own")
    second_reward: str = knob("", "another reward to report: the file of a classifier that labelled no pair")
    pairs_file: str = knob("", "a JSONL file of pairs to train on; empty: the dataset's own")
    pairs: int = knob(0, "train on the first so many pairs; 0: 30,000 for the toy, all for imdb")
    prompts: int = knob(500, "evaluate on the first so many held-out prompts", least=2)
    samples: int = knob(4, "completions per prompt for the last point of a unit; one on the way", least=1)
    points: int = knob(4, "points along a training, evenly spaced, the last included", least=1)
    ppo_steps: int = knob(0, "steps of PPO; 0: as many as the dataset's settings say")
    ppo_lr: float = knob(0.0, "learning rate of PPO, half that of its value model; 0: the dataset's")
    max_new_tokens: int = knob(0, "longest completion, in tokens; 0: 96 for the toy, 64 for imdb")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)

    def __post_init__(self):
        self.sft, self.out = self.sft or f"runs/{self.data}/sft", self.out or f"runs/frontier/{self.data}"
        for name in ("pairs", "max_new_tokens", "reward"):
            if self.data in SWEEPS and not getattr(self, name):
                setattr(self, name, getattr(SWEEPS[self.data], name))


@dataclasses.dataclass(kw_only=True)
class Settings(SweepSettings):
    method: str = knob(dataclasses.MISSING, "what to run", choices=(*METHODS, "reward-model", "reference-logps"))
    setting: str = knob("", "alpha of unlikelihood, beta of dpo (1.0-adamw: by AdamW), KL target of ppo, ppo-gt")
    seed: int = knob(0, "of the order of the pairs, and of all sampling")


# ---- 1. What every unit starts from, and how it is evaluated ----


class Setup:
    """The SFT model, the true reward and the held-out prompts; writes nothing."""

    def __init__(self, settings):
        if not settings.reward:
            raise UserError(f"--data {settings.data} has no true reward of its own: give a classifier, --reward FILE.")
        self.settings, self.sweep, self.out = settings, SWEEPS[settings.data], Path(settings.out)
        self.device = pick_device(settings.device)
        (self.sft,), self.tokenizer = common.load_models(settings.sft, device=self.device)
        self.sft.set_dropout(0.0)
        self.reward = load_reward(settings.reward)
        self.second_reward = load_reward(settings.second_reward) if settings.second_reward else None
        self.prompts = common.read_prompts(settings.data, "prompts_test", settings.prompts)

    @functools.cached_property
    def records(self):
        file, n = self.settings.pairs_file, self.settings.pairs
        return read_pairs(file, n) if file else self.sweep.records(n)

    @functools.cached_property
    def pairs(self):
        return dataset.encode(self.records, dataset.PAIR, self.tokenizer, self.sft.config.block_size)[0]

    @functools.cached_property
    def contents(self):
        """Fingerprints of all that a unit's points are made from, since files change under their names."""
        prompts = self.prompts, common.read_prompts(self.settings.data, "prompts_train")
        rewards = {"--reward": self.settings.reward, "--second-reward": self.settings.second_reward}
        return {
            "weights of --sft": checkpoint.fingerprint(self.sft),
            **{f"content of {flag}": limit.content(reward) for flag, reward in rewards.items() if reward},
            "content of the pairs": checkpoint.fingerprint(self.records),
            "content of the prompts": checkpoint.fingerprint(prompts),
        }

    def sample(self, model, prompts, seed, per_prompt=1):
        longest = self.settings.max_new_tokens
        return common.sample(model, self.tokenizer, prompts, longest, seed, per_prompt, batch_size=limit.ROWS)

    def judge(self, samples, per_prompt, kls=None):
        """Mean true reward and KL of samples, the share that is grammatical, mean second reward -> columns by name."""
        rewards = self.reward(samples.prompts, samples.texts)
        reviews = [prompt + text for prompt, text in zip(samples.prompts, samples.texts, strict=True)]
        accepted = statistics.mean(map(self.sweep.grammatical, reviews)) if self.sweep.grammatical else ""
        second = statistics.mean(self.second_reward(samples.prompts, samples.texts)) if self.second_reward else ""
        kls = torch.zeros(len(rewards)) if kls is None else kls
        return {**limit.moments(rewards, kls, per_prompt), "grammatical": accepted, "second_reward": second}

    def evaluate(self, policy, per_prompt, seed):
        """A policy's point -> columns by name. KL and reward are of the same samples, for `limit.share_of_gain`."""
        samples = self.sample(policy, self.prompts, seed, per_prompt)
        kls, _ = sequence_kl(policy, self.sft, samples.prompt_ids, samples.ids)
        return self.judge(samples, per_prompt, kls)


class Watch:
    """`on_step` of a training: evaluates at evenly spaced steps, and counts the seconds without evaluations."""

    def __init__(self, setup, policy, last_step, seed):
        self.setup, self.policy, self.last_step, self.seed = setup, policy, last_step, seed
        points = min(setup.settings.points, last_step)
        self.at = {round(last_step * (i + 1) / points) for i in range(points)}
        self.rows, self.seconds, self.since = [], 0.0, time.perf_counter()

    def __call__(self, step, *_):
        if step in self.at:
            self.seconds += time.perf_counter() - self.since
            per_prompt = self.setup.settings.samples if step == self.last_step else 1
            figures = self.setup.evaluate(self.policy, per_prompt, seed=self.seed * 1_000_003 + step)
            self.rows.append({"step": step, **figures, "seconds": self.seconds})
            self.since = time.perf_counter()


# ---- 2. The methods: each takes the set-up and the unit, and returns its points ----


def sft(setup, unit):
    """The SFT model itself, 0 nats from itself."""
    return [{"step": 0, **setup.evaluate(setup.sft, setup.settings.samples, unit.seed), "seconds": 0.0}]


def pairwise(setup, unit):
    """DPO, Unlikelihood or Preferred-FT: the loop is the same, the step differs."""
    policy, rows, made = copy.deepcopy(setup.sft), setup.pairs, training(unit, setup.settings)
    place(policy, made)
    if unit.method == "preferred-ft":  # SFT on the chosen responses
        rows, step = [(prompt, chosen) for prompt, chosen, _ in rows], train_sft.train_step
    else:
        loss = unlikelihood.unlikelihood_loss if unit.method == "unlikelihood" else train_dpo.dpo_loss
        reference = checkpoint.read(setup.out / "reference_logps.pt", keys=("logps",))["logps"]
        train_dpo.check_start(policy, rows, reference, list(range(min(len(rows), made.batch_size))), made, loss)
        step = functools.partial(train_dpo.train_step, reference=reference, loss=loss)
    watch = Watch(setup, policy, count_steps(rows, made)[-1], unit.seed)
    fit(policy, rows, step, made, watch)
    checkpoint.save(setup.out / "policies" / unit.name, policy, setup.tokenizer)
    return watch.rows


def best_of(setup, unit):
    """Best-of-N for all N, from one batch of samples."""
    began, sizes = time.perf_counter(), setup.sweep.settings["best-of-n"]
    k = max(sizes)
    model, _ = reward_model.load(setup.out / f"reward_model_{unit.seed}", setup.tokenizer)
    samples = setup.sample(setup.sft, setup.prompts, unit.seed, k)
    scores = model.to(setup.device).score(samples.prompt_ids, samples.ids, limit.ROWS).view(-1, k)
    seconds, points = time.perf_counter() - began, []
    for n in sizes:
        best = setup.judge(best_of_n.best_samples(samples, scores, n), k // n)
        points.append({**best, "setting": n, "step": 0, "kl": best_of_n.kl_bound(n), "seconds": seconds * n / k})
    return points


def by_ppo(setup, unit):
    """PPO on the learned reward, or on the true one."""
    policy, made = copy.deepcopy(setup.sft), training(unit, setup.settings)
    if unit.method == "ppo":
        model = reward_model.load(setup.out / f"reward_model_{unit.seed}", setup.tokenizer)[0].to(setup.device)
        reward = lambda samples: model.score(samples.prompt_ids, samples.ids).tolist()  # noqa: E731
        if setup.sweep.rescale:
            reward = to_scale(setup, reward, unit.seed)
    else:
        reward = lambda samples: setup.reward(samples.prompts, samples.texts)  # noqa: E731
    made.dtype = pick_dtype("auto", setup.device, policy.config.n_embd)
    watch = Watch(setup, policy, made.steps, unit.seed)
    prompts = common.read_prompts(setup.settings.data, "prompts_train")
    ppo.train(policy, setup.sft, reward, prompts, setup.tokenizer, made, watch)
    checkpoint.save(setup.out / "policies" / unit.name, policy, setup.tokenizer)
    return watch.rows


def to_scale(setup, reward, seed, samples=256):
    """Returns the reward times the factor that gives it the SD `reward_sd` over samples of the SFT model.

    Hard labels do not say how large a learned reward is. So it is brought to one scale, whatever the labels are, as in
    Ziegler et al. 2019.
    """
    prompts = common.read_prompts(setup.settings.data, "prompts_train", samples)
    factor = setup.sweep.reward_sd / statistics.stdev(reward(setup.sample(setup.sft, prompts, seed)))
    return lambda samples: [factor * score for score in reward(samples)]


def learn_reward(setup, unit):
    """Trains the reward model of a seed, for best-of-n and ppo. It is no policy, so it has no points."""
    model, made = reward_model.RewardModel(copy.deepcopy(setup.sft)), training(unit, setup.settings)
    place(model, made)
    reward_model.train(model, setup.pairs, made)
    reward_model.save(setup.out / f"reward_model_{unit.seed}", model, setup.tokenizer)
    return []


def reference_logps(setup, unit):
    """The SFT model's log-probabilities of all pairs, for dpo and unlikelihood of every seed; no points."""
    made = training(unit, setup.settings)
    place(setup.sft, made)
    with atomic(setup.out / "reference_logps.pt") as file:
        torch.save({"logps": train_dpo.reference_logps(setup.sft, setup.pairs, made)}, file)
    return []


RUN = {"sft": sft, "best-of-n": best_of, "reward-model": learn_reward, "reference-logps": reference_logps}
RUN |= {"preferred-ft": pairwise, "unlikelihood": pairwise, "dpo": pairwise, "ppo": by_ppo, "ppo-gt": by_ppo}

# ---- 3. The file ----


def unit_path(out, unit, kind="json"):
    return Path(out) / "units" / f"{unit.name}.{kind}"


def made_of(setup, unit):
    """What decides a unit's points, by name."""
    names = ("data", "reward", "second_reward", "pairs", "prompts", "samples", "points", "max_new_tokens")
    knobs = dataclasses.asdict(training(unit, setup.settings)) if unit.method not in ("sft", "best-of-n") else {}
    knobs |= {"N": setup.sweep.settings["best-of-n"]} if unit.method == "best-of-n" else {}
    needed = made_of(setup, unit.needs) if unit.method in ("best-of-n", "ppo") else {}
    elsewhere = {field.name for field in dataclasses.fields(Settings)} | {"init", "dtype"}
    return {
        **setup.contents,
        **{f"--{name.replace('_', '-')}": getattr(setup.settings, name) for name in names},
        **{name: value for name, value in knobs.items() if name not in elsewhere},
        **{f"reward model: {name}": value for name, value in needed.items()},
    }


def is_done(setup, unit):
    """Whether a unit's points are on disk. UserError if they were made with other settings than those asked for now."""
    path = unit_path(setup.out, unit)
    if not path.exists():
        return False
    before, now = json.loads(path.read_text(encoding="utf-8"))["made_of"], made_of(setup, unit)
    # a knob that only one of the two has is not compared: the code has got or lost it since
    compared = before.keys() & now.keys() | setup.contents.keys()
    if changed := [name for name in now if name in compared and before.get(name) != now[name]]:
        what = ", ".join(f"{name} {before.get(name)!r} in place of {now[name]!r}" for name in changed)
        raise UserError(f"{path} was made with {what}. Delete it to make it again, or give another --out.")
    return True


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    torch.set_num_threads(1)  # two processes of one thread get more done than one of two: the matrices are small
    above_0 = settings.method in ("dpo", "ppo", "ppo-gt")
    takes = above_0 or settings.method == "unlikelihood"
    pattern = (r"\d*\.?\d+" if takes else "") + ("(-adamw)?" if settings.method == "dpo" else "")
    if not re.fullmatch(pattern, settings.setting) or (above_0 and not number(settings.setting)):
        what = "a number above 0" if above_0 else "a number" if takes else "none"
        raise UserError(f"--setting {settings.setting!r}: {settings.method} takes {what}.")
    plain = takes and not settings.setting.endswith("-adamw")
    unit = Unit(settings.method, float(settings.setting) if plain else settings.setting, settings.seed)
    claim(unit_path(settings.out, unit))
    setup, began = Setup(settings), time.perf_counter()
    if unit.needs and not is_done(setup, unit.needs):
        raise UserError(f"{settings.out} lacks the unit {unit.needs.name}: run --method {unit.needs.method} first.")
    points = [{**unit._asdict(), **row} for row in RUN[unit.method](setup, unit)]
    found = {"made_of": made_of(setup, unit), "seconds": time.perf_counter() - began, "points": points}
    atomic_write(unit_path(setup.out, unit), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
