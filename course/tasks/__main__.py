"""Measures the goals of the three open tasks (course/tasks/README.md).

    python -m course.tasks budget --policy runs/mine --reference runs/toy/sft
    python -m course.tasks curves --which a --run runs/mine
    python -m course.tasks displacement --shown runs/displaced --repaired runs/repaired

Each line shows a number, its goal, and whether the goal is reached. The exit code is 0 if all goals are reached, 1 if
not, and 2 if the command cannot be carried out.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from minidpo.report import read_metrics, running_mean
from minidpo.settings import UserError, run_main

CURVES = Path(__file__).parent / "curves.csv"
SMOOTH = 10  # steps on each side in a running mean
STEPS = 79  # length of the runs in curves.csv
SAME = ("beta", "lr", "optimizer", "warmup_steps", "decay", "grad_clip", "batch_size", "loss_type", "label_smoothing")
SAME += ("reference_free", "data", "eval_data", "init")  # settings that both runs of task 3 share


def budget(args):
    """Measures how far the mean reward is above the reference's, and the KL."""
    init = read_settings(args.policy).get("init", "")
    if Path(init).resolve() != Path(args.reference).resolve() or "beta" in read_settings(args.reference):
        raise UserError(f"{args.policy} started from {init}. The reference must be that run, an SFT model.")
    from experiments import common, evaluate
    from experiments.rewards import load_reward

    (policy, reference), tokenizer = common.load_models(args.policy, args.reference)
    prompts = common.read_prompts("toy", limit=500)
    settings = evaluate.Settings("", "", "toy", "toy", samples_per_prompt=4, max_new_tokens=96)
    figures, *_ = evaluate.evaluate(policy, reference, tokenizer, prompts, load_reward("toy"), settings)
    return [
        ("reward above the reference's", figures["reward_mean"] - figures["reference"]["reward_mean"], ">=", 1.8),
        ("kl_exact, nats per response", figures["kl_exact"], "<=", 1.1),
    ]


def curves(args):
    """Measures the distance of a run from run a, b or c; the healthy run has distance 1."""
    if not Path(args.run, "metrics.jsonl").exists():
        raise UserError(f"{args.run}: not found, or not the folder of a run (it has no metrics.jsonl).")
    metrics = read_metrics(Path(args.run))
    if len(metrics) != STEPS:
        raise UserError(
            f"{args.run} has {len(metrics)} steps and the curves have {STEPS}. Use the training command of task 2."
        )
    given = read_curves()
    healthy, wanted = given["healthy"], given[args.which]
    mine = {name: running_mean([m[name] for m in metrics], SMOOTH) for name in wanted}
    scale = {name: spread([v for run_ in given.values() for v in run_[name]]) for name in wanted}
    return [("distance from the given run", apart(mine, wanted, scale) / apart(healthy, wanted, scale), "<=", 0.35)]


def read_curves():
    """Reads curves.csv -> {run: {metric: running means, one per step}}, for the runs a, b, c and healthy."""
    given = {}
    with open(CURVES, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            columns = given.setdefault(row.pop("run"), {})
            row.pop("step")
            for name, value in row.items():
                columns.setdefault(name, []).append(float(value))
    return {name: {m: running_mean(v, SMOOTH) for m, v in columns.items()} for name, columns in given.items()}


def spread(values):
    """Standard deviation: the unit in which differences of a metric are measured."""
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5


def apart(one, other, scale):
    """Distance of two runs: the mean absolute difference of each metric over the steps, in units of `scale`, summed."""
    total = 0.0
    for name, unit in scale.items():
        differences = [abs(a - b) for a, b in zip(one[name], other[name], strict=True)]
        total += sum(differences) / len(differences) / unit
    return total


def displacement(args):
    """Measures how log pi of the held-out chosen responses changes in two runs, and whether the repair is fair."""
    shown, settings = last_evaluation(args.shown)
    repaired, others = last_evaluation(args.repaired)
    for name in SAME:
        if settings.get(name) != others.get(name):
            raise UserError(
                f"{name} is {settings.get(name)} in {args.shown} and {others.get(name)} in {args.repaired}. "
                f"Train both with the same {name}."
            )
    accuracy, margin, beta = "eval/rewards/accuracies", "eval/rewards/margins", settings["beta"]
    return [
        ("shown: change of log pi(chosen), nats", shown["eval/rewards/chosen"] / beta, "<=", -2.0),
        ("repaired: change of log pi(chosen), nats", repaired["eval/rewards/chosen"] / beta, ">=", -0.5),
        ("repaired: change of margin / beta, nats", repaired[margin] / beta, ">=", 2.0),
        ("repaired: accuracy minus that of shown", repaired[accuracy] - shown[accuracy], ">=", -0.02),
        ("repaired: steps minus those of shown", repaired["step"] - shown["step"], ">=", 0),
    ]


def last_evaluation(folder):
    """Run folder -> (its last metrics, its settings)."""
    settings = read_settings(folder)
    names = ("step", *(f"eval/rewards/{name}" for name in ("chosen", "margins", "accuracies")))
    try:
        metrics = read_metrics(Path(folder))[-1]
        return {name: metrics[name] for name in names}, {"beta": settings["beta"], **settings}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{folder} holds no finished DPO run with held-out pairs ({error}).") from error


def read_settings(folder):
    """Run folder -> its settings, a dict."""
    try:
        return json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not found, or not the folder of a run ({error}).") from error


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m course.tasks"
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("budget", help=budget.__doc__)
    task.add_argument("--policy", required=True, help="your run")
    task.add_argument("--reference", required=True, help="the SFT run that it started from")
    task = tasks.add_parser("curves", help=curves.__doc__)
    task.add_argument("--which", required=True, choices=("a", "b", "c"), help="the given run")
    task.add_argument("--run", required=True, help="your run, trained with the mistake that you suspect")
    task = tasks.add_parser("displacement", help=displacement.__doc__)
    task.add_argument("--shown", required=True, help="a run in which the chosen responses become less likely")
    task.add_argument("--repaired", required=True, help="a run with the same beta in which they do not")
    args = parser.parse_args()
    reached = []
    for what, value, sign, mark in globals()[args.task](args):
        reached.append(value >= mark if sign == ">=" else value <= mark)
        print(f"{what:42}{value:8.3f}   {sign} {mark:g}   {'reached' if reached[-1] else 'NOT reached'}")
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    run_main(main)
