"""The run folder: settings.json, metrics.jsonl, samples.md, curves.png, report.md."""

import dataclasses
import json
import math
import os
from pathlib import Path

from minidpo import checkpoint
from minidpo.checkpoint import FILE, PREVIOUS
from minidpo.files import atomic, atomic_write
from minidpo.scale import parallel
from minidpo.settings import UserError

# what a run writes, beside bpe.json and its checkpoint: --overwrite removes these and nothing else
WRITTEN = ("settings.json", "bpe.json", FILE, PREVIOUS, "metrics.jsonl", "samples.md", "curves.png", "report.md")


class Run:
    """One run's folder. Nothing in it changes before `begin`, so that bad input leaves an older run as it was.

    Of several processes only the first writes.
    """

    def __init__(self, settings):
        self.settings = settings
        self.path = Path(settings.out)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file. Give a folder.")
        held = [name for name in WRITTEN if (self.path / name).exists()]
        if settings.overwrite and settings.init and Path(settings.init).resolve() == self.path.resolve():
            raise UserError(f"--out is the model to start from, --init {settings.init}. Give another folder as --out.")
        if settings.resume and settings.overwrite:
            raise UserError("--resume continues a run and --overwrite removes it: give one of them.")
        if settings.resume and not checkpoint.exists(self.path):
            raise UserError(f"{self.path / FILE} not found: nothing was saved to resume. Start again with --overwrite.")
        if held and not settings.resume and not settings.overwrite:
            raise UserError(
                f"{self.path} already holds a run ({held[0]}). Add --resume to go on, or --overwrite to replace it."
            )

    def begin(self, step, tokenizer):
        """Opens the folder for a run that goes on from `step` (0: a fresh one)."""
        parallel.total(0)  # by now every process has seen the folder as it was
        if parallel.rank() > 0:
            return
        path = self.path / "metrics.jsonl"
        lines = []
        if step:  # a killed run may have logged steps that its checkpoint does not hold
            lines = [m for m in read_metrics(self.path) if m["step"] <= step]
            (self.path / "report.md").unlink(missing_ok=True)  # written last: a run that has one is done
        else:
            for name in WRITTEN:
                (self.path / name).unlink(missing_ok=True)
            tokenizer.save(self.path / "bpe.json")
        values = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in ("resume", "overwrite")}
        atomic_write(self.path / "settings.json", json.dumps(values, indent=2) + "\n")
        atomic_write(path, "".join(json.dumps(m) + "\n" for m in lines))
        self._metrics = open(path, "ab", buffering=0)  # each line reaches the file at once
        print("settings: " + ", ".join(f"{name} {value!r}" for name, value in values.items()))

    @parallel.by_the_first
    def log(self, step, metrics):
        """Appends one line to metrics.jsonl; `step` counts finished optimiser steps."""
        try:
            self._metrics.write((json.dumps({"step": step, **metrics}) + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._metrics.name) from error

    @parallel.by_the_first
    def save(self, model, tokenizer, state):
        """A checkpoint, once the log is on the disk: a power cut may leave lines too many, never too few."""
        os.fsync(self._metrics.fileno())
        checkpoint.save(self.path, model, tokenizer, state)

    @parallel.by_the_first
    def finish(self, samples, notes):
        """Writes samples.md, curves.png and report.md. samples: {"prompt": [...], column name: [...], ...} of texts."""
        self._metrics.close()
        (self.path / PREVIOUS).unlink(missing_ok=True)  # its work is done
        table = samples_table(samples)
        atomic_write(self.path / "samples.md", f"# Samples at temperature 1\n\n{table}")
        drawn = draw_curves(self.path)
        metrics = read_metrics(self.path)
        text = [f"# {self.path.name}", "", *notes, ""]
        text += ["![curves](curves.png)", ""] if drawn else []
        text += ["| metric | first | last |", "| --- | ---: | ---: |"]
        for name in sorted({k for m in metrics for k in m} - {"step"}):
            values = [m[name] for m in metrics if name in m]
            text.append(f"| {name} | {values[0]:.5g} | {values[-1]:.5g} |")
        text += ["", "## Samples at temperature 1", "", table, "## Settings", "", "```json"]
        text += [(self.path / "settings.json").read_text(encoding="utf-8").strip(), "```", ""]
        atomic_write(self.path / "report.md", "\n".join(text))
        print(f"report: {self.path / 'report.md'}")


def samples_table(samples):
    """{"prompt": [...], column: [...], ...} -> a Markdown table, a row a prompt."""
    clean = {name: [" ".join(t.replace("|", "\\|").splitlines()) for t in texts] for name, texts in samples.items()}
    lines = ["| " + " | ".join(clean) + " |", "| " + " | ".join("---" for _ in clean) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*clean.values(), strict=True)]
    return "\n".join(lines) + "\n"


def read_metrics(folder):
    """The lines of metrics.jsonl as dicts; a line that a crash cut short is passed over."""
    metrics = []
    path = Path(folder) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return metrics


PANELS = (  # what belongs in one picture
    ("loss",),
    ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    ("rewards/accuracies",),
    ("reward",),
    ("kl",),
    ("kl_coef",),
    ("logps/chosen", "logps/rejected"),
    ("grad_norm",),
    ("lr",),
)


def draw_curves(folder):
    """curves.png from metrics.jsonl: each step faint, its running mean strong, held-out values as dots.

    Needs the extra `plot`; without it says so and returns False.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no curves.png: matplotlib is not installed (pip install "minidpo[plot]")')
        return False
    metrics = read_metrics(folder)
    panels = [panel for panel in PANELS if any(panel[0] in m for m in metrics)]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3 * rows), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for j, name in enumerate(panel):
            points = [(m["step"], m[name]) for m in metrics if name in m]
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=f"C{j}", alpha=0.25, linewidth=0.8)
            smooth = running_mean(values, reach=len(values) // 60)
            axes.plot(steps, smooth, color=f"C{j}", linewidth=1.6, label=name.split("/")[-1])
            held_out = [(m["step"], m[f"eval/{name}"]) for m in metrics if f"eval/{name}" in m]
            if held_out:
                label = "held out" if j == 0 else None
                axes.plot(
                    *zip(*held_out, strict=True), "o", color=f"C{j}", markeredgecolor="black", markersize=5, label=label
                )
        axes.set_title(panel[0].split("/")[0] if len(panel) > 1 else panel[0], fontsize=10)
        axes.set_xlabel("optimiser steps", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if len(panel) > 1 or any(f"eval/{panel[0]}" in m for m in metrics):
            axes.legend(fontsize=8, frameon=False)
    with atomic(Path(folder) / "curves.png") as file:
        figure.savefig(file, dpi=130, format="png")
    return True


def running_mean(values, reach):
    """Mean of each value and its neighbours up to `reach` places away; nearer the ends, as far as both sides go."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = values[i - near : i + near + 1]
        means.append(sum(window) / len(window))
    return means
