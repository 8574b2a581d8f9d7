"""What each mistake looks like: short DPO runs on the toy, a picture, and docs/mistakes.md written from the runs.

Every run starts from the same SFT model and sees the same pairs in the same order for one short epoch. The healthy code
runs beside each mutant, with the same flags; the samples of both are judged by the healthy code.
"""

import contextlib
import difflib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from tqdm import tqdm

import data
from experiments import evaluate
from experiments.mistakes import GALLERY, ROOT, copy, mutated
from experiments.rewards import load_reward
from minidpo import checkpoint, dataset
from minidpo.files import atomic, atomic_write
from minidpo.report import read_metrics, running_mean
from minidpo.settings import UserError
from train_dpo import SETS

STEPS, BATCH_SIZE, PROMPTS, LAST, SMOOTH = 80, 32, 200, 10, 3
METRICS = ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm")


def healthy_name(mutant):
    """The run beside a mutant's: the healthy code with the same flags."""
    return "-".join(["healthy", *(flag.strip("-") for flag in mutant.flags)])


def train_all(mutants, init, folder):
    """Trains each mutant and the healthy code for its flags; a run that is finished is not repeated."""
    folder, init = Path(folder), Path(init).resolve()
    model, tokenizer, _ = checkpoint.load(init)
    records = data.find("toy", "pairs_train").read_text(encoding="utf-8").splitlines(keepends=True)
    if len(records) < STEPS * BATCH_SIZE:
        raise UserError(f"the toy has {len(records)} pairs, and {STEPS * BATCH_SIZE} are needed.")
    pairs = "".join(records[: STEPS * BATCH_SIZE])
    atomic_write(folder / "pairs.jsonl", pairs)
    trained = [mutant for mutant in mutants if mutant.trained]
    runs = {healthy_name(mutant): (None, mutant.flags, False) for mutant in trained}
    runs |= {mutant.name: (mutant, mutant.flags, mutant.resumed) for mutant in trained}
    start = checkpoint.fingerprint(model, pairs, STEPS, SETS["toy"])
    for name, (mutant, flags, resumed) in tqdm(runs.items(), desc="runs", unit="run"):
        made_of = [start, mutant and mutant.new, list(flags), resumed]
        if made_of != (read(folder / name / "result.json") or {}).get("made_of"):
            result = train(mutant, init, folder.resolve(), name, flags, resumed)
            if "stopped" not in result:
                result |= judge(folder / name / "run", model, tokenizer)
            atomic_write(folder / name / "result.json", json.dumps({"made_of": made_of, **result}, indent=2) + "\n")


def read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def train(mutant, init, folder, name, flags, resumed):
    """One run in a copy of the code -> its last metrics, or {"stopped": why} if it refused to run on."""
    command = [sys.executable, "-X", "utf8", "train_dpo.py", "--data", str(folder / "pairs.jsonl"), "--settings", "toy"]
    command += ["--init", str(init), "--out", str(folder / name / "run"), "--device", "cpu"]
    command += ["--batch-size", str(BATCH_SIZE), "--epochs", "1", "--samples", "0", *flags]
    shutil.rmtree(folder / name, ignore_errors=True)
    parts = [["--max-steps", str(STEPS // 2)], ["--max-steps", str(STEPS), "--resume"]]
    with tempfile.TemporaryDirectory() as code:
        copy(code, mutant)
        for part in parts if resumed else [[]]:
            done = subprocess.run([*command, *part], cwd=code, capture_output=True, encoding="utf-8")
            _, error, why = done.stderr.rpartition("error: ")
            if done.returncode == 2 and error:  # a message to the user, not a traceback
                return {"stopped": why.strip()}
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr}")
    last = read_metrics(folder / name / "run")[-LAST:]
    return {metric: sum(m[metric] for m in last) / len(last) for metric in METRICS}


def judge(run, reference, tokenizer):
    """Reward and KL of the run's samples, by the healthy code."""
    policy, _, _ = checkpoint.load(run)
    prompts = [r["prompt"] for r in dataset.read_jsonl(data.find("toy", "prompts_test"), ("prompt",))][:PROMPTS]
    settings = evaluate.Settings("", "", "", "toy", max_new_tokens=96, device="cpu")
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        figures, *_ = evaluate.evaluate(policy, reference, tokenizer, prompts, load_reward("toy"), settings)
    return {
        "reward": figures["reward_mean"],
        "kl": figures["kl_exact"],
        "length": figures["length_mean"],
        "start": {name: figures["reference"][name] for name in ("reward_mean", "reward_se", "length_mean")},
    }


# ---- the picture ----


def draw(path, folder):
    """A cell a mutant: margins above, the metric where the mistake shows below; the healthy run in grey."""
    from matplotlib.figure import Figure

    mutants = [m for m in GALLERY if (folder / m.name / "result.json").exists()]
    columns = 4
    rows = -(-len(mutants) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.9 * rows), layout="constrained")
    cells = figure.subfigures(rows, columns, squeeze=False, hspace=0.02).ravel()
    for cell, mutant in zip(cells, mutants, strict=False):
        cell.suptitle(mutant.name, fontsize=10, fontweight="bold", x=0.02, ha="left")
        result = read(folder / mutant.name / "result.json")
        for axes, metric in zip(cell.subplots(2, 1, sharex=True), ("rewards/margins", mutant.shows), strict=True):
            for name, colour, width in ((healthy_name(mutant), "0.6", 3), (mutant.name, "C3", 1.2)):
                metrics = read_metrics(folder / name / "run")
                steps, values = [m["step"] for m in metrics], [m[metric] for m in metrics]
                axes.plot(steps, values, color=colour, linewidth=width / 2, alpha=0.35)
                axes.plot(steps, running_mean(values, SMOOTH), color=colour, linewidth=width)
            axes.set_title(metric, fontsize=8, loc="right", pad=2)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            if "stopped" in result:
                axes.text(0.5, 0.1, "the run stopped", transform=axes.transAxes, ha="center", color="C3", fontsize=8)
    with atomic(path) as file:
        figure.savefig(file, dpi=90, format="png")


# ---- the page ----

TOP = """\
# The mutant gallery

{n} ways to get DPO wrong, made on purpose: each is our own code with one change of a few lines, and nearly all train
without a complaint. Each has a test that fails because of it. The list is
[`gallery.py`](../experiments/mistakes/gallery.py); this page is written from it and from the runs.

```
python -m experiments.mistakes                                            # runs each mutant's test in a broken copy
python -m experiments.mistakes --curves runs/mutants --init runs/toy/sft  # trains with each mistake, writes this page
```

On one core of a cloud machine (AMD EPYC) the first takes 45 seconds and the second 11 minutes; runs that are finished
are not repeated.

What to take from it: **a falling loss and a rising accuracy prove little.** Some mutants have better curves than the
healthy code, some the very same, and what they have learnt shows only in the samples."""
MEASURED = """
Each cell is one mistake in training, in red, and the healthy code on the same pairs in grey: {steps} steps of {batch}
pairs from one SFT model, with the toy's settings. Above, the margin; below, the metric in which the mistake shows. Each
step is faint, the running mean strong.

![margins and one more metric of every mutant, beside the healthy run]({picture})

The tables below hold means over the last {last} steps. Reward (the toy's, known exactly), KL (nats a response from the
SFT model) and length (tokens) are those of {prompts} samples, drawn and judged by the healthy code. The SFT model's own
have reward {reward:.2f} and length {length:.1f}; with other samples, a mean reward is up to {noise:.1f} higher or lower
(two standard errors).
"""
COLUMNS = (*METRICS, "reward", "kl", "length")


def figures_of(mutant, folder):
    """The measured part of a mutant's section, or nothing if it was not trained."""
    result, healthy = (read(folder / name / "result.json") for name in (mutant.name, healthy_name(mutant)))
    if not result:
        return []
    if "stopped" in result:
        return ["Measured: the run stopped with", "", wrap("> " + result["stopped"], "> "), ""]
    flags = f"`{' '.join(mutant.flags)}`" if mutant.flags else ""
    lines = [f"| {flags} | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, figures in (("mutant", result), ("healthy", healthy)):
        lines.append(f"| {name} | {' | '.join(format(figures[column], '.3g') for column in COLUMNS)} |")
    return [*lines, ""]


def wrap(text, indent=""):
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def diff(mutant):
    """The lines that change, whole, with - and + in front."""
    sources = (ROOT / mutant.file).read_text(encoding="utf-8"), mutated(mutant)
    lines = difflib.unified_diff(*(source.splitlines() for source in sources), lineterm="", n=0)
    return [line for line in list(lines)[2:] if not line.startswith("@@")]


def section(mutant, folder):
    """The mutant's part of the page."""
    lines = [f"## {mutant.name}", "", wrap(mutant.mistake), "", f"In `{mutant.file}`:", "", "```diff", *diff(mutant)]
    lines += ["```", "", wrap(f"**In the curves:** {mutant.see}"), "", *figures_of(mutant, folder)]
    return [*lines, f"Killed by `{mutant.test}`.", ""]


def write_page(path, folder):
    """docs/mistakes.md from the gallery and the runs in `folder`, and the picture beside it."""
    path, folder = Path(path), Path(folder)
    text = [TOP.format(n=len(GALLERY))]
    healthy = read(folder / "healthy" / "result.json")
    if healthy:
        picture = path.with_suffix(".png")
        draw(picture, folder)
        start = healthy["start"]
        text.append(
            MEASURED.format(
                steps=STEPS, batch=BATCH_SIZE, last=LAST, prompts=PROMPTS, picture=picture.name,
                reward=start["reward_mean"], length=start["length_mean"],
                noise=2 * start["reward_se"],
            )
        )  # fmt: skip
    for mutant in GALLERY:
        text += section(mutant, folder)
    atomic_write(path, "\n".join(text))
    print(f"{path}: {len(GALLERY)} mutants" + (f", drawn in {path.with_suffix('.png')}" if healthy else ""))
