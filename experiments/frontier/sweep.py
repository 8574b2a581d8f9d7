"""Reward against KL, every method: the paper's Figure 2 (left), with the theoretical limit drawn in.

    python -m experiments.frontier --data toy --sft runs/toy/sft --out runs/frontier/toy --csv docs/frontier/toy.csv
    python -m experiments.frontier --plot-only --csv docs/frontier/toy.csv

A point of the figure is a policy: its mean true reward on held-out prompts, and its KL from the SFT model it started
from. A method is better than another if it earns more at the same KL, and none can pass the limit (limit.py).

The sweep is a list of units: one method, one setting, one seed. A unit starts from the SFT model, trains, is evaluated
on the way, and its points are on disk when it is done; a sweep that was stopped goes on with the units that are
missing. All units share the SFT model, hence the reference and the limit, and the pairs; a seed is that of the order of
the pairs, and of all sampling. --out holds

    units/NAME.json    the points of a unit, and what they were made with: delete it to make them again
    units/NAME.log     what the unit had to say
    policies/NAME      the policies of the methods that learn from pairs: DPO's are the limit's proposals
    reward_model_SEED, reference_logps.pt
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import statistics
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import train_dpo
from data.toy_sentiment import generate as toy
from data.toy_sentiment import grammar
from experiments.evaluate import prompt_mean_se, sequence_kl
from experiments.frontier import limit
from experiments.frontier.baselines import (
    best_of_n,
    count_steps,
    fit,
    ppo,
    preferred_ft,
    reward_model,
    settle,
    unlikelihood,
)
from experiments.rewards import load_reward
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, pick_device
from minidpo.files import atomic, atomic_write
from minidpo.sampling import generate
from minidpo.settings import UserError, knob, parse_settings, run_main, unknown

COLUMNS = ("method", "setting", "seed", "step", "kl", "kl_se", "reward", "reward_se", "grammatical", "seconds")
METHODS = ("sft", "preferred-ft", "unlikelihood", "best-of-n", "ppo", "ppo-gt", "dpo")
TRAINED = {
    "preferred-ft": preferred_ft,
    "unlikelihood": unlikelihood,
    "reward-model": reward_model,
    "dpo": train_dpo,
    "ppo": ppo,
    "ppo-gt": ppo,
}

# ---- 1. What is swept. The paper: beta 0.05, 0.1, 1, 5; alpha 0.05, 0.1, 0.5, 1; KL targets 3, 6, 9, 12 ----

ADAMW = dict(optimizer="adamw", lr=7e-4, warmup_steps=20, decay=True)
IMDB_PPO = dict(steps=100, rollouts=256, epochs=2, lr=1e-4, value_lr=2e-4, warmup_steps=5, value_clip=1.0)


def by_sgd(beta):
    """DPO on the toy by SGD with momentum: AdamW's equal steps for all weights learn the labels' noise as well.

    The loss's gradient goes with beta, and the log-ratios it is to reach with 1/beta: so lr beta^2 says how far a run
    gets. Below 0.5 it does not get as far: the first steps, which go with lr beta, would be too long.
    """
    lr = 0.003 / beta**2 if beta > 0.5 else 0.006 / beta
    return dict(optimizer="sgd", lr=lr, warmup_steps=20, decay=True, fast=True)


SWEEPS = {
    "toy": {
        "settings": {  # alpha of Unlikelihood, N, beta, and PPO's target of the KL, in nats
            "preferred-ft": [""],
            "unlikelihood": [0.05, 0.1, 0.5, 1.0],
            "best-of-n": [2, 4, 16, 64],
            "ppo": [0.5, 1.0, 2.0, 4.0],
            "ppo-gt": [0.5, 1.0, 2.0, 4.0],
            "dpo": [0.05, 0.1, 0.3, 0.5, 0.62, 0.75, 1.0, 1.4, 5.0],
        },
        # knobs of each method's Settings, over train_dpo.py's (or ppo.py's) own for this dataset
        "training": {
            "dpo": by_sgd,
            "preferred-ft": lambda _: ADAMW,
            "unlikelihood": lambda alpha: dict(ADAMW, fast=True),
            "reward-model": lambda _: ADAMW,
        },
        "pairs": 30_000,
        "max_new_tokens": 96,
        "reward_sd": 1.5,  # of the SFT model's samples: PPO's first price of a nat goes by it
    },
    "imdb": {
        "settings": {
            "preferred-ft": [""],
            "unlikelihood": [0.05, 0.1, 0.5, 1.0],
            "best-of-n": [2, 4, 16, 64],
            "ppo": [3.0, 6.0, 9.0, 12.0],
            "ppo-gt": [3.0, 6.0, 9.0, 12.0],
            "dpo": [0.05, 0.1, 0.3, 1.0, 5.0],
        },
        "training": {
            **{method: lambda target: IMDB_PPO for method in ("ppo", "ppo-gt")},
            **{method: lambda setting: dict(fast=True) for method in ("dpo", "unlikelihood")},
        },
        "pairs": 0,
        "max_new_tokens": 64,
        "reward_sd": 1.5,
    },
}


@dataclasses.dataclass
class Settings:
    data: str = knob("toy", "toy or imdb", choices=tuple(SWEEPS))
    sft: str = knob("runs/toy/sft", "the SFT model that every method starts from: a run folder, a GPT-2 folder or name")
    out: str = knob("runs/frontier/toy", "folder for what is found on the way, and the policies")
    reward: str = knob("toy", "the true reward: toy, or the file of a trained classifier")
    csv: str = knob("", "the points as a table; empty: frontier.csv in --out. The figure goes beside it, as a .png")
    limit: str = knob("", "CSV of experiments.limit to draw in; empty: NAME_limit.csv beside --csv, if it is there")
    methods: str = knob("", f"sweep these only, with commas between: {', '.join(METHODS)}; empty: all")
    seeds: int = knob(3, "how many seeds, 0 the first", least=1)
    pairs: int = knob(0, "train on the first so many pairs; 0: 30,000 for the toy, all for imdb")
    prompts: int = knob(500, "evaluate on the first so many held-out prompts", least=2)
    samples: int = knob(4, "completions of each prompt for the last point of a unit; one on the way", least=1)
    points: int = knob(4, "points along a training, evenly spaced, the last included", least=1)
    ppo_steps: int = knob(0, "steps of PPO; 0: as many as the dataset's settings say")
    max_new_tokens: int = knob(0, "longest completion, in tokens; 0: 96 for the toy, 64 for imdb")
    kl_end: float = knob(20.0, "the figure ends at this KL, in nats; points beyond are named in it", least=1)
    jobs: int = knob(1, "units at a time; above 1 each has a process, of one thread, to itself", least=1)
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    plot_only: bool = knob(False, "draw the figure from --csv and print the summary, nothing else")

    def __post_init__(self):
        for method in self.chosen_methods:
            if method not in METHODS:
                raise unknown("--methods", method, list(METHODS))
        for name in ("pairs", "max_new_tokens"):
            if self.data in SWEEPS and not getattr(self, name):
                setattr(self, name, SWEEPS[self.data][name])
        if self.data != "toy" and self.reward == "toy" and not self.plot_only:
            raise UserError(f"--data {self.data} has no true reward of its own: give --reward FILE, a classifier's.")

    @property
    def chosen_methods(self):
        return [method.strip() for method in self.methods.split(",")] if self.methods else list(METHODS)

    @property
    def csv_path(self):
        return Path(self.csv or Path(self.out) / "frontier.csv")

    @property
    def limit_path(self):
        return Path(self.limit or self.csv_path.with_name(self.csv_path.stem + "_limit.csv"))


class Unit(NamedTuple):
    method: str  # one of METHODS, or what others need first: "reward-model", "reference-logps"
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
        return Unit("reference-logps", "", 0) if self.method == "dpo" else None


def units(settings):
    """All that is asked for, seed by seed, what others need first."""
    found = []
    for seed in range(settings.seeds):
        # the long ones first, so that no process is left alone with one at the end
        for method in sorted(settings.chosen_methods, key=lambda method: "ppo" not in method):
            one_setting = [""] if method in ("sft", "best-of-n") else None  # one batch of samples serves every N
            for setting in one_setting or SWEEPS[settings.data]["settings"][method]:
                unit = Unit(method, setting, seed)
                found += [unit.needs, unit] if unit.needs else [unit]
    return list(dict.fromkeys(found))


# ---- 2. One unit ----


class World:
    """What every unit starts from."""

    def __init__(self, settings):
        self.settings = settings
        self.out = Path(settings.out)
        self.device = pick_device(settings.device)
        self.sft, self.tokenizer, _ = checkpoint.load(settings.sft)
        self.sft.set_dropout(0.0)
        self.sft.to(self.device).eval()
        self.fingerprint = checkpoint.fingerprint(self.sft)
        self.reward = load_reward(settings.reward)
        self.prompts = self.read_prompts("prompts_test")[: settings.prompts]
        self.prompt_ids = [[self.tokenizer.eot, *self.tokenizer.encode(prompt)] for prompt in self.prompts]

    def read_prompts(self, file):
        return [record["prompt"] for record in dataset.read_jsonl(data.find(self.settings.data, file), ("prompt",))]

    @functools.cached_property
    def pairs(self):
        """Token rows of the training pairs. The toy's come from its generator, which has more than the file."""
        n = self.settings.pairs
        if self.settings.data == "toy":
            records = list(toy.rows("pairs_train", n))  # those of the file first
        else:
            records = dataset.read_jsonl(data.find(self.settings.data, "pairs_train"), dataset.PAIR)[: n or None]
        rows, _ = dataset.encode_pairs(records, self.tokenizer, self.sft.config.block_size)
        return rows

    def training(self, unit):
        """The Settings that a unit trains with; None for one that trains nothing."""
        if unit.method not in TRAINED:
            return None
        sweep, module = SWEEPS[self.settings.data], TRAINED[unit.method]
        values = {**module.SETS.get(self.settings.data, {}), "seed": unit.seed}
        if unit.method == "dpo":
            values["beta"] = unit.setting
        elif unit.method == "unlikelihood":
            values["alpha"] = unit.setting
        elif module is ppo:
            # the price at which a reward of normal distribution is worth so many nats: what the controller would find
            values |= {"kl_target": unit.setting, "kl_coef": sweep["reward_sd"] / math.sqrt(2 * unit.setting)}
            values["max_new_tokens"] = self.settings.max_new_tokens
        if unit.method in sweep["training"]:
            values |= sweep["training"][unit.method](unit.setting)
        if module is ppo and self.settings.ppo_steps:
            values["steps"] = self.settings.ppo_steps
        return module.Settings(data=self.settings.data, init=self.settings.sft, out="", **values)

    def made_of(self, unit):
        """All that decides what a unit's points are, by name, as JSON has it."""
        names = ("data", "reward", "pairs", "prompts", "samples", "points", "max_new_tokens")
        training = self.training(unit)
        knobs = dataclasses.asdict(training) if training else {}
        elsewhere = {field.name for field in dataclasses.fields(Settings)} | {"init", "dtype"}
        return {
            "weights of --sft": self.fingerprint,
            **{f"--{name.replace('_', '-')}": getattr(self.settings, name) for name in names},
            **{name: value for name, value in knobs.items() if name not in elsewhere},
        }

    def judge(self, samples, per_prompt):
        """The true reward and the grammar on lists of ids, `per_prompt` neighbours to a prompt -> columns by name."""
        prompts = [prompt for prompt in self.prompts for _ in range(per_prompt)]
        texts = [self.tokenizer.decode(ids) for ids in samples]
        reward, se = prompt_mean_se(self.reward(prompts, texts), per_prompt)
        accepted = ""
        if self.settings.data == "toy":
            accepted = statistics.mean(grammar.grammatical(p + t) for p, t in zip(prompts, texts, strict=True))
        return {"reward": reward, "reward_se": se, "grammatical": accepted}

    def evaluate(self, policy, per_prompt, seed):
        """A policy's point, on samples of its own -> columns by name.

        The KL is the plain estimator, on the samples that the reward is of. The sum of exact KLs has the smaller error,
        but for the distance to the limit the plain one is better: by chance too many samples that are unlikely under
        the reference mean too high a reward as well, and the point moves along the limit, hardly across it.
        """
        ids = [prompt for prompt in self.prompt_ids for _ in range(per_prompt)]
        generator = torch.Generator(self.device).manual_seed(seed)
        longest = self.settings.max_new_tokens
        samples = generate(policy, ids, longest, self.tokenizer.eot, generator=generator, batch_size=limit.ROWS)
        plain, _ = sequence_kl(policy, self.sft, ids, samples)
        kl, se = prompt_mean_se(plain, per_prompt)
        return {"kl": kl, "kl_se": se, **self.judge(samples, per_prompt)}


class Watch:
    """`on_step` of a training: evaluates at evenly spaced steps, and counts the seconds between the evaluations."""

    def __init__(self, world, policy, last_step, seed):
        self.world, self.policy, self.last_step, self.seed = world, policy, last_step, seed
        points = min(world.settings.points, last_step)
        self.at = {round(last_step * (i + 1) / points) for i in range(points)}
        self.rows, self.seconds, self.since = [], 0.0, time.perf_counter()

    def __call__(self, step, *_):
        if step in self.at:
            self.seconds += time.perf_counter() - self.since
            per_prompt = self.world.settings.samples if step == self.last_step else 1
            figures = self.world.evaluate(self.policy, per_prompt, seed=self.seed * 1_000_003 + step)
            self.rows.append({"step": step, **figures, "seconds": self.seconds})
            self.since = time.perf_counter()


def run_unit(world, unit):
    """Trains and evaluates one unit, and writes what came of it to --out."""
    began = time.perf_counter()
    policy = copy.deepcopy(world.sft)
    if unit.method == "sft":
        own = world.evaluate(policy, world.settings.samples, unit.seed)
        rows = [{"step": 0, **own, "kl": 0.0, "kl_se": 0.0, "seconds": 0.0}]
    elif unit.method == "best-of-n":
        rows = best_of(world, unit.seed)
    elif unit.method == "reference-logps":
        made = train_dpo.Settings(data="", init="", out="", **train_dpo.SETS[world.settings.data])
        settle(made, world.sft)
        logps = train_dpo.reference_logps(world.sft, world.pairs, made)
        with atomic(world.out / "reference_logps.pt") as file:
            torch.save({"logps": logps}, file)
        rows = []
    elif unit.method == "reward-model":
        made = world.training(unit)
        model = reward_model.RewardModel(policy)
        settle(made, model)
        reward_model.train(model, world.pairs, made)
        reward_model.save(world.out / f"reward_model_{unit.seed}", model, world.tokenizer)
        rows = []
    elif unit.method in ("ppo", "ppo-gt"):
        rows = run_ppo(world, policy, unit)
    else:
        rows = run_pairs(world, policy, unit)
        checkpoint.save(world.out / "policies" / unit.name, policy, world.tokenizer)
    points = [{"method": unit.method, "setting": unit.setting, "seed": unit.seed, **row} for row in rows]
    found = {"made_of": world.made_of(unit), "seconds": time.perf_counter() - began, "points": points}
    atomic_write(unit_path(world.settings, unit), json.dumps(found, indent=1) + "\n")


def run_pairs(world, policy, unit):
    """DPO, Unlikelihood or Preferred-FT -> rows."""
    made = world.training(unit)
    settle(made, policy)
    *_, last_step = count_steps(world.pairs, made)
    watch = Watch(world, policy, last_step, unit.seed)
    if unit.method == "dpo":
        reference = checkpoint.read(world.out / "reference_logps.pt", keys=("logps",))["logps"]
        fit(policy, world.pairs, functools.partial(train_dpo.train_step, reference=reference), made, watch)
    else:
        TRAINED[unit.method].train(policy, world.pairs, made, watch)
    return watch.rows


def run_ppo(world, policy, unit):
    """PPO on the learned reward, or on the true one -> rows."""
    made = world.training(unit)
    learned = str(world.out / f"reward_model_{unit.seed}")
    reward = ppo.load(learned if unit.method == "ppo" else world.settings.reward, world.tokenizer, world.device)
    if unit.method == "ppo" and world.settings.data != "toy":
        reward = to_scale(world, reward, unit.seed)  # the toy's labels are drawn by the true reward, at its scale
    watch = Watch(world, policy, made.steps, unit.seed)
    ppo.train(policy, world.sft, reward, world.read_prompts("prompts_train"), world.tokenizer, made, watch)
    return watch.rows


def to_scale(world, reward, seed, samples=256):
    """The reward times what gives it the SD `reward_sd` over the SFT model's samples, as Ziegler et al. 2019 do.

    Labels that are never wrong do not say how large a learned reward is; PPO's first price of a nat goes by that SD.
    """
    prompts = world.read_prompts("prompts_train")[:samples]
    longest = world.settings.max_new_tokens
    ids = ppo.encode(prompts, world.tokenizer, world.sft.config.block_size - longest)
    generator = torch.Generator(world.device).manual_seed(seed)
    responses = generate(world.sft, ids, longest, world.tokenizer.eot, generator=generator, batch_size=limit.ROWS)
    scores = reward(prompts, [world.tokenizer.decode(response) for response in responses], ids, responses)
    factor = SWEEPS[world.settings.data]["reward_sd"] / statistics.stdev(scores)
    return lambda *batch: [factor * score for score in reward(*batch)]


def best_of(world, seed):
    """Best-of-N for all N from one batch of samples -> rows. Their KL is the upper bound log N - (N-1)/N."""
    began = time.perf_counter()
    sizes = SWEEPS[world.settings.data]["settings"]["best-of-n"]
    k = max(sizes)
    model = reward_model.load_matching(world.out / f"reward_model_{seed}", world.tokenizer).to(world.device)
    generator = torch.Generator(world.device).manual_seed(seed)
    longest = world.settings.max_new_tokens
    samples, scores = best_of_n.sample(
        world.sft, model, world.prompt_ids, k, longest, world.tokenizer.eot, generator, limit.ROWS
    )
    seconds = time.perf_counter() - began
    rows = []
    for n in sizes:
        places = best_of_n.best_of(scores, n)  # (P, groups), within the k of a prompt
        chosen = (places + k * torch.arange(len(places))[:, None]).flatten().tolist()
        figures = world.judge([samples[i] for i in chosen], places.shape[1])
        kl = {"kl": best_of_n.kl_bound(n), "kl_se": 0.0}
        rows.append({"setting": n, "step": 0, **kl, **figures, "seconds": seconds * n / k})
    return rows


# ---- 3. The sweep ----


def unit_path(settings, unit, kind="json"):
    return Path(settings.out) / "units" / f"{unit.name}.{kind}"


def is_done(world, unit):
    """Whether a unit's points are on disk. UserError if they were made otherwise than is asked for now."""
    path = unit_path(world.settings, unit)
    if not path.exists():
        return False
    before, now = json.loads(path.read_text(encoding="utf-8"))["made_of"], world.made_of(unit)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        what = ", ".join(f"{name} {before.get(name)!r} in place of {now.get(name)!r}" for name in changed)
        raise UserError(f"{path} was made with {what}. Delete it to make it again, or give another --out.")
    return True


def sweep(settings):
    """Runs the units that are not on disk yet, `settings.jobs` at a time."""
    world = World(settings)
    todo = units(settings)
    done = [unit for unit in todo if is_done(world, unit)]
    (world.out / "units").mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(todo), initial=len(done), desc="sweep", unit="unit") as bar:

        def finished(unit):
            done.append(unit)
            write_csv(settings)
            bar.update()

        todo = [unit for unit in todo if unit not in done]
        if settings.jobs > 1:
            in_processes(todo, done, finished, settings, bar)
        else:
            for unit in todo:
                bar.set_postfix_str(unit.name)
                with open(unit_path(settings, unit, "log"), "w", encoding="utf-8") as log:
                    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                        run_unit(world, unit)
                finished(unit)
    write_csv(settings)


def in_processes(todo, done, finished, settings, bar):
    """Each unit in a process of its own, `settings.jobs` at a time, none before the unit it needs."""
    # started afresh, not forked: torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    running = {}
    try:
        while todo or running:
            ready = [unit for unit in todo if unit.needs is None or unit.needs in done]
            for unit in ready[: settings.jobs - len(running)]:
                todo.remove(unit)
                running[unit] = context.Process(target=child, args=(settings, unit))
                running[unit].start()
            bar.set_postfix_str(", ".join(unit.name for unit in running))
            ended = multiprocessing.connection.wait([process.sentinel for process in running.values()])
            for unit in [unit for unit, process in running.items() if process.sentinel in ended]:
                running[unit].join()
                if running.pop(unit).exitcode:
                    log = unit_path(settings, unit, "log")
                    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
                    raise UserError(f"{unit.name} broke off; {log} ends with\n{last}")
                finished(unit)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def child(settings, unit):
    """What a unit's process does. It ends with the sweep, even if that is killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)  # two processes of one thread get more done than one of two: the matrices are small
    with open(unit_path(settings, unit, "log"), "w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        run_main(lambda: run_unit(World(settings), unit))


# ---- 4. The file ----


def write_csv(settings):
    """The points of all units on disk -> --csv."""
    rows = []
    for path in (Path(settings.out) / "units").glob("*.json"):
        rows += json.loads(path.read_text(encoding="utf-8"))["points"]
    rows.sort(key=lambda r: (METHODS.index(r["method"]), float(r["setting"] or 0), r["seed"], r["step"]))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})
    atomic_write(settings.csv_path, text.getvalue())


class Point(NamedTuple):
    """A row of the CSV. KL in nats a response (of Best-of-N its upper bound); grammatical is NaN without a grammar."""

    method: str
    setting: str
    seed: int
    step: int
    kl: float
    kl_se: float
    reward: float
    reward_se: float
    grammatical: float
    seconds: float


def read_csv(path):
    """--csv -> Points. UserError if it is missing, empty or not of this kind."""
    if not Path(path).exists():
        raise UserError(f"{path} not found. Make it: python -m experiments.frontier --help")
    points = []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != COLUMNS:
            raise UserError(f"{path}, line 1: the columns must be {','.join(COLUMNS)}.")
        for number, row in enumerate(reader, 2):
            try:
                method, setting, seed, step, *numbers = row
                numbers = [float(number or "nan") for number in numbers]
                points.append(Point(method, setting, int(seed), int(step), *numbers))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}, line {number}: {error}.") from error
            if method not in METHODS:
                raise UserError(f"{path}, line {number}: {unknown('method', method, list(METHODS))}")
    if not points:
        raise UserError(f"{path} holds no points yet.")
    return points


def last_points(points):
    """The points at the end of their unit's training."""
    last = {(p.method, p.setting, p.seed): p.step for p in sorted(points, key=lambda p: p.step)}
    return [p for p in points if last[p.method, p.setting, p.seed] == p.step]


# ---- 5. The figure and the summary ----

LOOKS = {  # colours of Okabe and Ito, told apart by the colour-blind, and a marker each
    "dpo": ("DPO", "#0072B2", "o"),
    "ppo-gt": ("PPO on the true reward", "#009E73", "s"),
    "ppo": ("PPO on the learned reward", "#D55E00", "D"),
    "best-of-n": ("Best-of-N (upper bound of its KL)", "#56B4E9", "^"),
    "preferred-ft": ("Preferred-FT", "#E69F00", "P"),
    "unlikelihood": ("Unlikelihood", "#CC79A7", "v"),
    "sft": ("SFT", "#000000", "*"),
}
TICKS = (0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000)


def draw(points, curve, path, kl_end=Settings.kl_end):
    """The figure; curve: the limit's Points, or None. Points on the way are small, those at the end large."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "minidpo[plot]")')
        return
    final = set(last_points(points))
    columns = {"reward": "mean true reward", "grammatical": "grammatical"}
    if any(math.isnan(p.grammatical) for p in points):
        del columns["grammatical"]
    beyond = sorted(p for p in final if p.kl > kl_end)
    points, final = [p for p in points if p.kl <= kl_end], final - set(beyond)
    figure = Figure(figsize=(7.5, 4.5 + 2 * (len(columns) - 1)), layout="constrained")
    axes = figure.subplots(len(columns), sharex=True, squeeze=False, height_ratios=(5, 2)[: len(columns)])[:, 0]
    for axis, column in zip(axes, columns, strict=True):
        for order, (method, (label, colour, marker)) in enumerate(reversed(LOOKS.items())):
            for chosen, look in (
                (set(points) - final, dict(s=8, alpha=0.35, linewidths=0)),
                (final, dict(s=42, edgecolors="white", linewidths=0.6, label=label)),
            ):
                mine = [p for p in points if p.method == method and p in chosen]
                if mine:
                    x, y = [max(0, p.kl) for p in mine], [getattr(p, column) for p in mine]
                    axis.scatter(x, y, color=colour, marker=marker, zorder=3 + order, **look)
        axis.set_ylabel(columns[column])
        axis.grid(alpha=0.25)
    if curve:
        axes[0].plot([p.kl for p in curve], [p.reward for p in curve], "k-", linewidth=1.2, label="the limit")
        rings = list(theory(points, curve).values())
        if rings:
            label, look = "where theory puts DPO", dict(facecolors="none", edgecolors=LOOKS["dpo"][1], s=42)
            axes[0].scatter(*zip(*rings, strict=True), zorder=2.5, label=label, **look)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles[::-1], labels[::-1], fontsize=8, loc="lower right", framealpha=0.9)
    longest = max(p.kl for p in points)
    # the limit of a reward of normal distribution is sd sqrt(2 KL): over the root of the KL, a straight line
    root, square = lambda kl: np.sign(kl) * np.sqrt(np.abs(kl)), lambda x: np.sign(x) * np.square(x)
    axes[-1].set_xscale("function", functions=(root, square))
    ticks = [tick for tick in TICKS if tick <= 1.3 * longest]
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[-1].minorticks_off()
    axes[-1].set_xlim(-0.004, 1.05 * longest)
    axes[-1].set_xlabel("KL from the SFT model, nats a response (axis: its square root)")
    if beyond:
        names = [
            f"{LOOKS[p.method][0]} {p.setting}, seed {p.seed}: {p.kl:.0f} nats, reward {p.reward:.1f}" for p in beyond
        ]
        axes[0].text(
            0.01, 0.98, "\n".join(["beyond the right edge:", *names]), transform=axes[0].transAxes, va="top", fontsize=7
        )
    with atomic(path) as file:
        figure.savefig(file, dpi=110, format="png")


def theory(points, curve):
    """{beta: (KL, reward)} of the optima of DPO's betas, where the limit is drawn; {} unless the data are the toy's.

    The toy's labels are drawn by Bradley-Terry from the true reward, so that DPO's optimum is the limit's own policy.
    """
    if math.isnan(points[0].grammatical):
        return {}
    betas = sorted({float(p.setting) for p in points if p.method == "dpo"})
    return {beta: at for beta in betas if not math.isnan((at := limit.at_beta(curve, beta))[0])}


def summary(points, curve):
    """Means over the seeds of the last points, and what lies above the limit -> text.

    "of the limit": the gain in reward over the reference as a share of the limit's gain at the same KL, with the
    standard error of its mean over the seeds.
    """
    groups = defaultdict(list)
    for point in last_points(points):
        groups[point.method, point.setting].append(point)
    lines = [
        f"{'method':14}{'setting':>8}{'seeds':>6}{'KL':>9}{'reward':>8}{'of the limit':>17}{'grammatical':>13}{'s':>7}"
    ]
    for (method, setting), group in groups.items():
        kl, reward, grammatical, seconds = (
            statistics.mean(getattr(p, name) for p in group) for name in ("kl", "reward", "grammatical", "seconds")
        )
        shares = (
            [limit.share_of_gain(curve, p.kl, p.reward) for p in group] if curve and method != "sft" else [math.nan]
        )
        share = "" if math.isnan(sum(shares)) else f"{statistics.mean(shares):.1%}"
        if share and len(shares) > 1:
            share += f" +- {statistics.stdev(shares) / len(shares) ** 0.5:.1%}"
        accepted = "" if math.isnan(grammatical) else f"{grammatical:.1%}"
        lines.append(
            f"{method:14}{setting:>8}{len(group):6}{kl:9.3g}{reward:8.2f}{share:>17}{accepted:>13}{seconds:7.0f}"
        )
    for beta, (kl, reward) in theory(points, curve).items() if curve else ():
        lines.append(f"DPO's optimum at beta {beta:g} is at a KL of {kl:.2f} and a reward of {reward:.2f}")
    above = [p for p in points if curve and height(p, curve) > 2]
    lines += [f"{height(p, curve):.1f} standard errors above the limit, look for the bug: {p}" for p in above]
    if curve and not above:
        lines.append("no point is above the limit by more than two standard errors")
    return "\n".join(lines)


def height(point, curve):
    """How far a point is above the limit at its KL, in standard errors; NaN where the limit is not drawn.

    Those of reward and KL are taken as independent. They are not, and it is mostly too many.
    """
    best, slope = limit.reward_at(curve, point.kl), limit.slope_at(curve, point.kl)
    return (point.reward - best) / math.hypot(point.reward_se, slope * point.kl_se, curve[0].reward_se)


def limit_command(settings):
    """The command that makes the limit, from this sweep's SFT model and DPO policies."""
    proposals = sorted((Path(settings.out) / "policies").glob("dpo_*_0"))
    words = [f"--reference {settings.sft} --data {settings.data} --reward {settings.reward}"]
    words += [f"--max-new-tokens {settings.max_new_tokens} --out {settings.limit_path}"]
    return " ".join(["python -m experiments.frontier.limit", *words, *(f"--proposal {folder}" for folder in proposals)])


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    if not settings.plot_only:
        sweep(settings)
    points = read_csv(settings.csv_path)
    curve = limit.read(settings.limit_path) if settings.limit_path.exists() else None
    picture = settings.csv_path.with_suffix(".png")
    draw(points, curve, picture, settings.kl_end)
    print(summary(points, curve))
    print(f"{settings.csv_path}, {picture}")
    if not curve:
        print(f"no limit is drawn: {settings.limit_path} is not there. {limit_command(settings)}")


if __name__ == "__main__":
    run_main(main)
