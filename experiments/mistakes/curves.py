"""What each mistake looks like: short DPO runs on the toy. They write the tables of docs/mistakes.md and its picture.

Every run starts from the same SFT model and sees the same pairs in the same order, once. Beside each mistake the
healthy code runs with the same flags. The healthy code also draws and scores the samples of both.
"""

import contextlib
import io
import json
import shutil
import tempfile
import textwrap
from pathlib import Path

from tqdm import tqdm

import data
from experiments import common, evaluate
from experiments.mistakes import PAGE, Mistake, broken, copy, read_page, read_section, run_in
from experiments.rewards import load_reward
from minidpo import checkpoint
from minidpo.files.writing import atomic_write, claim
from minidpo.report import read_metrics, running_mean
from train_dpo import SETS

STEPS, BATCH_SIZE, PROMPTS, LAST, SMOOTH = 80, 32, 200, 10, 3
METRICS = ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm")


def healthy(mistake):
    """The run beside a mistake's: no mistake, the same flags."""
    name = "-".join(["healthy", *(flag.strip("-") for flag in mistake.flags)])
    return Mistake(name, "train_dpo.py", "def dpo_loss(", "def dpo_loss(", "", mistake.flags)


def train_all(mistakes, init, folder):
    """Trains with each mistake and, for its flags, without. A run that is finished is not repeated."""
    claim(folder)
    folder, init = Path(folder).resolve(), Path(init).resolve()
    model, tokenizer, _ = checkpoint.load(init)
    pairs = data.find("toy", "pairs_train").read_text(encoding="utf-8").splitlines(keepends=True)
    pairs = "".join(pairs[: STEPS * BATCH_SIZE])
    atomic_write(folder / "pairs.jsonl", pairs)
    runs = {run.name: run for mistake in mistakes if mistake.shows for run in (healthy(mistake), mistake)}
    for name, run in tqdm(runs.items(), desc="runs", unit="run"):
        how = (STEPS, LAST, PROMPTS), SETS["toy"], broken(run), run.flags, run.resumed
        made_of = checkpoint.fingerprint(model, pairs, *how)
        if made_of != read(folder, run).get("made_of"):
            result = train(run, init, folder)
            if "stopped" not in result:
                result |= judge(folder / name / "run", model, tokenizer)
            atomic_write(folder / name / "result.json", json.dumps({"made_of": made_of, **result}, indent=2) + "\n")


def read(folder, run):
    """What was measured of a run; {} if it was not trained."""
    path = folder / run.name / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def train(run, init, folder):
    """Trains in a copy of the code with the mistake -> the means of the last metrics, or {"stopped": its message}."""
    command = ["train_dpo", f"--data={folder}/pairs.jsonl", f"--init={init}", f"--out={folder}/{run.name}/run"]
    command += ["--settings=toy", "--device=cpu", f"--batch-size={BATCH_SIZE}", "--epochs=1", "--samples=0", *run.flags]
    shutil.rmtree(folder / run.name, ignore_errors=True)
    parts = [["--max-steps", str(STEPS // 2)], ["--max-steps", str(STEPS), "--resume"]] if run.resumed else [[]]
    with tempfile.TemporaryDirectory() as code:
        copy(code, run)
        for part in parts:
            status, output = run_in(code, *command, *part)
            _, error, why = output.rpartition("error: ")
            if status == 2 and error:  # a message to the user, not a traceback
                return {"stopped": why.strip()}
            if status:
                raise RuntimeError(f"{run.name}: {output}")
    last = read_metrics(folder / run.name / "run")[-LAST:]
    return {metric: sum(m[metric] for m in last) / len(last) for metric in METRICS}


def judge(run, reference, tokenizer):
    """Reward, KL and length of the run's samples, by the healthy code."""
    policy, _, _ = checkpoint.load(run)
    settings = evaluate.Settings("", "", "", "toy", max_new_tokens=96, device="cpu")
    prompts, reward = common.read_prompts("toy", limit=PROMPTS), load_reward("toy")
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        figures, *_ = evaluate.evaluate(policy, reference, tokenizer, prompts, reward, settings)
    measured = {"reward": figures["reward_mean"], "kl": figures["kl_exact"], "length": figures["length_mean"]}
    return {**measured, "start": {k: figures["reference"][k] for k in ("reward_mean", "reward_se", "length_mean")}}


# ---- The picture ----


def draw(path, mistakes, folder):
    """One cell per mistake, the healthy run in grey: the margins, and below them the metric in which it shows."""
    columns, rows = 4, -(-len(mistakes) // 4)
    if not (figure := common.figure(path, (3.3 * columns, 2.9 * rows))):
        return
    cells = figure.subfigures(rows, columns, squeeze=False, hspace=0.02).ravel()
    for cell, mistake in zip(cells, mistakes, strict=False):
        cell.suptitle(mistake.name, fontsize=10, fontweight="bold", x=0.02, ha="left")
        for axes, metric in zip(cell.subplots(2, 1, sharex=True), ("rewards/margins", mistake.shows), strict=True):
            for run, colour, width in ((healthy(mistake), "0.6", 3), (mistake, "C3", 1.2)):
                metrics = read_metrics(folder / run.name / "run")
                steps, values = [m["step"] for m in metrics], [m[metric] for m in metrics]
                axes.plot(steps, values, color=colour, linewidth=width / 2, alpha=0.35)
                axes.plot(steps, running_mean(values, SMOOTH), color=colour, linewidth=width)
            axes.set_title(metric, fontsize=8, loc="right", pad=2)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            axes.set_xlabel("optimiser steps" if axes.get_subplotspec().is_last_row() else "", fontsize=7)
            if "stopped" in read(folder, mistake):
                axes.text(0.5, 0.1, "the run stopped", transform=axes.transAxes, ha="center", color="C3", fontsize=8)
    common.save_figure(path, figure, dpi=90)


# ---- The page ----

COLUMNS = (*METRICS, "reward", "kl", "length")


def measured(mistake, folder):
    """What was measured of the mistake, as paragraphs of its section."""
    result = read(folder, mistake)
    if "stopped" in result:
        message = textwrap.fill("> " + result["stopped"], 120, subsequent_indent="> ", break_on_hyphens=False)
        return ["Measured: the run stopped with", message]
    flags = f"`{' '.join(mistake.flags)}`" if mistake.flags else ""
    lines = [f"| {flags} | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, figures in (("mistake", result), ("healthy", read(folder, healthy(mistake)))):
        lines.append(f"| {name} | {' | '.join(format(figures[column], '.3g') for column in COLUMNS)} |")
    return ["\n".join(lines)]


def write_page(folder, page):
    """Writes docs/mistakes.md with what was measured in its sections to `page`, and the picture beside it."""
    above, sections = read_page(PAGE)
    folder, page, trained = Path(folder), Path(page), []
    for i, section in enumerate(sections):
        mistake = read_section(section)
        if read(folder, mistake):
            trained.append(mistake)
            paragraphs = section.rstrip("\n").split("\n\n")
            kept = [text for text in paragraphs if not text.startswith(("| ", "Measured:", "> "))]
            sections[i] = "\n\n".join([*kept[:-1], *measured(mistake, folder), kept[-1]]) + "\n"
    atomic_write(page, "\n## ".join([above, *sections]))
    print(f"{page}: {len(trained)} mistakes trained")
    if trained:
        print(f"samples of the SFT model: {read(folder, healthy(trained[0]))['start']}")
    draw(page.with_suffix(".png"), trained, folder)
