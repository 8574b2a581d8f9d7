"""What a finished run shows: samples.md, curves.png and report.md, made from metrics.jsonl and the samples."""

import json
import math
from pathlib import Path

from minidpo.files.writing import atomic, atomic_write

PANELS = {  # metrics that share one picture, and their unit
    ("loss",): "nats",
    ("rewards/chosen", "rewards/rejected", "rewards/margins"): "beta x nats per response",
    ("rewards/accuracies",): "share of the pairs",
    ("logps/chosen", "logps/rejected"): "nats per response",
    ("grad_norm",): "L2 norm",
    ("lr",): "",
}


def read_metrics(folder):
    """Returns the lines of metrics.jsonl as dicts. It skips a line that a crash cut short."""
    metrics, path = [], Path(folder) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return metrics


def samples_table(samples):
    """{"prompt": [...], column: [...], ...} -> a Markdown table with one row per prompt."""
    clean = {name: [" ".join(t.replace("|", "\\|").splitlines()) for t in texts] for name, texts in samples.items()}
    lines = ["| " + " | ".join(clean) + " |", "| " + " | ".join("---" for _ in clean) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*clean.values(), strict=True)]
    return "\n".join(lines) + "\n"


def write_report(folder, samples, note, curves):
    """Writes samples.md and report.md. `samples` as in `samples_table`; `curves`: whether curves.png was drawn."""
    table = samples_table(samples)
    atomic_write(folder / "samples.md", f"# Samples at temperature 1\n\n{table}")
    metrics = read_metrics(folder)
    text = [f"# {folder.name}", "", note, ""]
    text += ["![curves](curves.png)", ""] if curves else []
    text += ["| metric | first | last |", "| --- | ---: | ---: |"]
    for name in sorted({k for m in metrics for k in m} - {"step"}):
        values = [m[name] for m in metrics if name in m]
        text.append(f"| {name} | {values[0]:.5g} | {values[-1]:.5g} |")
    text += ["", "## Samples at temperature 1", "", table, "## Settings", "", "```json"]
    text += [(folder / "settings.json").read_text(encoding="utf-8").strip(), "```", ""]
    atomic_write(folder / "report.md", "\n".join(text))


def draw_curves(folder):
    """Draws curves.png from metrics.jsonl: every step faint, the running mean strong, held-out values as dots.

    Needs the extra `plot`. Without it, prints a line and returns False.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no curves.png: matplotlib is not installed (pip install "minidpo[plot]")')
        return False
    metrics = read_metrics(folder)
    panels = [panel for panel in PANELS if any(panel[0] in m for m in metrics)]
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(12.6, 3 * rows), layout="constrained")
    for i, panel in enumerate(panels):
        title = panel[0] if len(panel) == 1 else panel[0].split("/")[0]
        axes = figure.add_subplot(rows, 3, i + 1, title=title, xlabel="optimiser steps", ylabel=PANELS[panel])
        for name, colour in zip(panel, ("C0", "C1", "C2"), strict=False):
            steps, values = zip(*((m["step"], m[name]) for m in metrics if name in m), strict=True)
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, running_mean(values, reach=len(values) // 60), color=colour, label=name.split("/")[-1])
            if held_out := [(m["step"], m[f"eval/{name}"]) for m in metrics if f"eval/{name}" in m]:
                label = "held out" if colour == "C0" else None
                axes.plot(*zip(*held_out, strict=True), "o", color=colour, markeredgecolor="black", label=label)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    with atomic(folder / "curves.png") as file:
        figure.savefig(file, dpi=130, format="png")
    return True


def running_mean(values, reach):
    """Mean of each value and its neighbours up to `reach` places away. Near an end, both sides reach less far."""
    reaches = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - near : i + near + 1]) / (2 * near + 1) for i, near in enumerate(reaches)]
