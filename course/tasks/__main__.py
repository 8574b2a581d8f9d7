"""Measures the ends of the three open tasks (course/tasks/README.md): figures, marks, and whether they are reached.

    python -m course.tasks budget --policy runs/mine --reference runs/toy/sft
    python -m course.tasks curves --which a --run runs/mine
    python -m course.tasks displacement --shown runs/displaced --repaired runs/repaired

The exit code is 0 if all marks are reached, 1 if not, 2 for a command that cannot be carried out.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from minidpo.run import read_metrics, running_mean
from minidpo.settings import UserError, run_main

CURVES = Path(__file__).parent / "curves.csv"
SMOOTH = 10  # steps
STEPS = 79  # of the runs in curves.csv


def budget(args):
    """Mean reward above the reference's, at a KL within the budget."""
    import data
    from experiments import evaluate
    from experiments.rewards import load_reward
    from minidpo import checkpoint, dataset

    policy, tokenizer, _ = checkpoint.load(args.policy)
    reference, other, _ = checkpoint.load(args.reference)
    if tokenizer.fingerprint != other.fingerprint:
        raise UserError(f"{args.policy} and {args.reference} have different tokenizers: no KL between them.")
    prompts = [record["prompt"] for record in dataset.read_jsonl(data.find("toy", "prompts_test"), ("prompt",))]
    settings = evaluate.Settings("", "", "toy", "toy", samples_per_prompt=4, max_new_tokens=96)
    figures, *_ = evaluate.evaluate(policy, reference, tokenizer, prompts[:500], load_reward("toy"), settings)
    return [
        ("reward above the reference's", figures["reward_mean"] - figures["reference"]["reward_mean"], ">=", 1.8),
        ("kl_exact, nats a response", figures["kl_exact"], "<=", 1.1),
    ]


def curves(args):
    """How far a run is from a given one, where the healthy run is at 1."""
    metrics = read_metrics(Path(args.run))
    if len(metrics) != STEPS:
        raise UserError(f"{args.run} has {len(metrics)} steps and the curves have {STEPS}. Train as the task says.")
    given = read_curves()
    healthy, wanted = given["healthy"], given[args.which]
    mine = {name: running_mean([m[name] for m in metrics], SMOOTH) for name in wanted}
    scale = {name: spread([v for run_ in given.values() for v in run_[name]]) for name in wanted}
    return [("distance from the given run", apart(mine, wanted, scale) / apart(healthy, wanted, scale), "<=", 0.35)]


def read_curves():
    """{run: {metric: its running means, one a step}} of the runs a, b, c and healthy."""
    given = {}
    with open(CURVES, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            columns = given.setdefault(row.pop("run"), {})
            row.pop("step")
            for name, value in row.items():
                columns.setdefault(name, []).append(float(value))
    return {name: {m: running_mean(v, SMOOTH) for m, v in columns.items()} for name, columns in given.items()}


def spread(values):
    """Standard deviation: what a difference in a metric is measured by."""
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5


def apart(one, other, scale):
    """Mean difference over the steps, each metric on its own scale, added up."""
    total = 0.0
    for name, unit in scale.items():
        differences = [abs(a - b) for a, b in zip(one[name], other[name], strict=True)]
        total += sum(differences) / len(differences) / unit
    return total


def displacement(args):
    """What becomes of the held-out chosen responses, in a run that shows it and in one that does not."""
    (shown, its), (repaired, others) = (last_evaluation(folder) for folder in (args.shown, args.repaired))
    if its["beta"] != others["beta"]:
        raise UserError(f"beta is {its['beta']} in {args.shown} and {others['beta']} in {args.repaired}; keep it.")
    beta, accuracy = its["beta"], "eval/rewards/accuracies"
    return [
        ("shown: change of log pi(chosen), nats", shown["eval/rewards/chosen"] / beta, "<=", -2.0),
        ("repaired: change of log pi(chosen), nats", repaired["eval/rewards/chosen"] / beta, ">=", -0.5),
        ("repaired: accuracy above that of shown", repaired[accuracy] - shown[accuracy], ">=", -0.02),
        ("repaired: steps beyond those of shown", repaired["step"] - shown["step"], ">=", 0),
    ]


def last_evaluation(folder):
    """(the last metrics, settings) of a run folder."""
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
        metrics = read_metrics(Path(folder))[-1]
        return {name: metrics[name] for name in ("step", "eval/rewards/chosen", "eval/rewards/accuracies")}, settings
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{folder} holds no finished DPO run with held-out pairs ({error}).") from error


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
    task.add_argument("--run", required=True, help="your run, with the mistake that you think was made")
    task = tasks.add_parser("displacement", help=displacement.__doc__)
    task.add_argument("--shown", required=True, help="a run in which the chosen fall")
    task.add_argument("--repaired", required=True, help="one with the same beta in which they do not")
    args = parser.parse_args()
    reached = []
    for what, value, sign, mark in globals()[args.task](args):
        reached.append(value >= mark if sign == ">=" else value <= mark)
        print(f"{what:42}{value:8.3f}   {sign} {mark:g}   {'reached' if reached[-1] else 'NOT reached'}")
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    run_main(main)
