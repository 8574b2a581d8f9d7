"""Reward against KL, every method: the paper's Figure 2 (left), with the theoretical limit drawn in.

    python -m experiments.frontier --data toy --sft runs/toy/sft --out runs/frontier/toy --csv docs/frontier/toy.csv
    python -m experiments.frontier --plot-only --csv docs/frontier/toy.csv

docs/frontier.md explains the figure. The sweep is a list of units: one method, one setting, one seed (sweeps.py). Each
unit is a command of its own (unit.py), of which --jobs run at a time. A sweep that was stopped continues with the units
that are missing. All units share the SFT model and the pairs. The seed decides the order of the pairs and all sampling.
--out holds

    units/NAME.json    the points of a unit, and what they were made with: delete it to make them again
    units/NAME.log     what the unit printed
    policies/NAME      the trained policies: DPO's are the limit's proposals
    reward_model_SEED, reference_logps.pt
"""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from experiments import common
from experiments.frontier import figure, limit
from experiments.frontier.sweeps import METHODS, SWEEPS, Unit, number
from experiments.frontier.unit import Setup, SweepSettings, is_done, unit_path
from minidpo.files.writing import claim
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass(kw_only=True)
class Settings(SweepSettings):
    csv: str = knob("", "the points as a table; empty: frontier.csv in --out. The figure goes beside it, as a .png")
    methods: str = knob("", f"sweep these only, with commas between: {', '.join(METHODS)}; empty: all")
    ppo_targets: str = knob("", "sweep these of PPO's KL targets only, with commas between, such as 3,6; empty: all")
    seeds: int = knob(3, "how many seeds, counted from 0", least=1)
    kl_end: float = knob(20.0, "the figure ends at this KL, in nats; points beyond are named in it", least=1)
    bradley_terry: bool = knob(False, "labels drawn by Bradley-Terry, as on the toy: show where theory puts DPO")
    jobs: int = knob(1, "units at a time, each in a process of one thread", least=1)
    plot_only: bool = knob(False, "draw the figure from --csv and print the summary, nothing else")

    @property
    def csv_path(self):
        return Path(self.csv or Path(self.out) / "frontier.csv")

    @property
    def limit_path(self):
        return self.csv_path.with_name(self.csv_path.stem + "_limit.csv")  # drawn in, if it is there


# ---- 1. The units and the processes ----


def units(settings):
    """Returns all units that are asked for, seed by seed; what a unit needs comes before it."""
    found, methods = [], common.names_in("--methods", settings.methods, METHODS, METHODS)
    every = [f"{target:g}" for target in SWEEPS[settings.data].settings["ppo"]]
    targets = [float(target) for target in common.names_in("--ppo-targets", settings.ppo_targets, every, every)]
    chosen = {**SWEEPS[settings.data].settings, "ppo": targets, "ppo-gt": targets}
    chosen |= {"sft": [""], "best-of-n": [""]}  # one batch of samples serves every N
    for seed in range(settings.seeds):
        # PPO first: it takes longest, and would run alone at the end
        for method in sorted(methods, key=lambda method: "ppo" not in method):
            for setting in chosen[method]:
                unit = Unit(method, setting, seed)
                found += [unit.needs, unit] if unit.needs else [unit]
    return list(dict.fromkeys(found))


def start(settings, unit):
    """Starts the command of one unit -> its Popen. What it prints goes to its log."""
    flags = {field.name: getattr(settings, field.name) for field in dataclasses.fields(SweepSettings)} | unit._asdict()
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    with open(unit_path(settings.out, unit, "log"), "w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "experiments.frontier.unit", *words]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def sweep(settings):
    """Runs the units that are not on disk yet, `settings.jobs` at a time, none before the unit it needs."""
    claim(settings.out)
    setup, todo = Setup(settings), units(settings)
    waiting, running = [unit for unit in todo if not is_done(setup, unit)], {}
    (setup.out / "units").mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(todo), initial=len(todo) - len(waiting), desc="sweep", unit="unit")
    try:
        while waiting or running:
            ready = [unit for unit in waiting if unit.needs not in waiting and unit.needs not in running]
            for unit in ready[: settings.jobs - len(running)]:
                waiting.remove(unit)
                running[unit] = start(settings, unit)
            bar.set_postfix_str(", ".join(unit.name for unit in running))
            time.sleep(0.1)
            for unit in [unit for unit, process in running.items() if process.poll() is not None]:
                if running.pop(unit).returncode:
                    log = unit_path(settings.out, unit, "log")
                    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
                    raise UserError(f"{unit.name} failed; {log} ends with\n{last}")
                write_csv(setup)
                bar.update()
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
            process.wait()
    write_csv(setup)


# ---- 2. The table and the command ----


def write_csv(setup):
    """Writes the points of all units of this set-up to --csv, and the covariances of their errors beside it."""
    settings, points = setup.settings, []
    for path in (setup.out / "units").glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if setup.contents.items() <= found["made_of"].items():  # not of another SFT model, reward or pairs
            points += found["points"]
    place = lambda p: (METHODS.index(p["method"]), number(p["setting"]), str(p["setting"]), p["seed"], p["step"])  # noqa: E731
    points.sort(key=place)
    paths = {figure.Point: settings.csv_path, figure.Covariance: figure.covariance_path(settings.csv_path)}
    for row, path in paths.items():
        if points:
            rows = [row(*(point.get(name, math.nan) for name in row._fields)) for point in points]
            common.write_csv(path, rows, digits=5)


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    if not settings.plot_only:
        sweep(settings)
    points = figure.read_csv(settings.csv_path)
    curve = limit.read(settings.limit_path) if settings.limit_path.exists() else None
    picture = settings.csv_path.with_suffix(".png")
    figure.draw(points, curve, picture, settings.kl_end, settings.bradley_terry)
    print(figure.summary(points, curve, figure.read_covariances(settings.csv_path), settings.bradley_terry))
    print(f"{settings.csv_path}, {picture}")
    if not curve:
        print(f"no limit is drawn: {settings.limit_path} not found. Make it with experiments.frontier.limit.")


if __name__ == "__main__":
    run_main(main)
