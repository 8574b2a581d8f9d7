"""Time and memory of a training step of DPO or SFT: minidpo's and other people's, on the same weights and rows.

    python -m experiments.bench --json docs/bench/bench.json --markdown docs/bench.md            # on a CPU
    python -m experiments.bench --device cuda --rounds 1 --json gpu.json                         # GPT-2's four sizes
    python -m experiments.bench --ablation --shapes W1,W2,W3 --dtypes bfloat16 --rounds 2 --cache runs/ablation
    python -m experiments.bench --precision runs/toy/sft --markdown docs/fast.md                 # errors of bf16

docs/bench.md explains the shapes, the implementations and the figures.
"""

import dataclasses
import itertools

from experiments.bench.ablation import WITHOUT
from experiments.bench.measure import Settings, as_row, measure_all, table, tell
from experiments.bench.shapes import DEFAULTS, DPO_ONLY, DTYPES, IMPLEMENTATIONS, OURS, SHAPES, work_of
from experiments.common import figure, names_in, save_figure
from minidpo.device import pick_device
from minidpo.settings import UserError, knob, parse_settings, run_main

IDEAS = (OURS, *(f"{OURS} without {idea}" for idea in WITHOUT))
# The losses of two implementations may differ by this much. fp32 sums run in another order. bf16 rounds to 8 bits, and
# the first steps of AdamW depend on the signs of gradients, which rounding can change.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
COLUMNS = {  # header: key and format
    "shape": "shape", "implementation": "implementation", "precision": "dtype",
    "seconds per step": "seconds_median:.3g", "min": "seconds_min:.3g", "max": "seconds_max:.3g",
    "timed steps": "timed_steps", "pairs/s": "pairs_per_second:.3g", "tokens/s": "tokens_per_second:,.0f",
    "MFU": "mfu:.1%", "pairs at once": "micro_batch", "peak MB": "peak_mb:,.0f", "libraries MB": "libraries_mb:,.0f",
    "state MB": "state_mb:,.0f", "plan MB": "plan_mb:,.0f", "first loss": "first_loss:.6f",
    "last loss": "last_loss:.6f", "error": "error",
}  # fmt: skip
RATIOS = {
    "shape": "shape", "implementation": "implementation", "precision": "dtype", "precision of minidpo": "ours",
    "its time / ours": "time:.2f", "our peak / its": "peak:.2f", "same, less libraries": "above:.2f",
}  # fmt: skip


@dataclasses.dataclass
class BenchSettings(Settings):
    device: str = knob("cpu", "cpu or cuda", choices=tuple(DEFAULTS))
    shapes: str = knob("", f"which of {', '.join(SHAPES)}; empty: W1-W3 and S1-S3, on cuda GPT-2's sizes")
    implementations: str = knob("", f"which of {', '.join(IMPLEMENTATIONS)}; empty: those that suit the device")
    dtypes: str = knob("", "float32,bfloat16: precision of the matrix products; empty: both, on cuda bfloat16")
    ablation: bool = knob(False, "measure minidpo without each idea of its fast path (on a CPU)")
    precision: str = knob("", "only compare bf16 with fp32: a run folder, trained on --data")
    data: str = knob("toy", "dataset of --precision, or a JSONL file with prompt, chosen, rejected")


def disagreements(rows):
    """Returns a line for each row whose losses differ from the first of the same shape, precision and optimizer."""
    lines, first = [], {}
    for row in rows:
        other = first.setdefault((row["shape"], row["dtype"], row["optimizer"]), row)
        gaps = [abs(a - b) for a, b in zip(row["losses"], other["losses"], strict=True)]
        if not all(gap <= TOLERANCE[row["dtype"]] for gap in gaps):  # true for NaN, too
            names = f"{other['implementation']} and {row['implementation']}"
            lines.append(f"{row['shape']} {row['dtype']}: the losses of {names} differ by up to {max(gaps):.2g}")
    return lines


def ratios(rows):
    """Compares each implementation with minidpo, both in the precision that is faster for them -> rows of RATIOS."""
    faster, result = {}, []
    for row in sorted(rows, key=lambda row: row["seconds_median"]):
        faster.setdefault((row["shape"], row["implementation"]), row)
    for shape, name in dict.fromkeys((row["shape"], row["implementation"]) for row in rows):
        row, ours = faster[shape, name], faster.get((shape, OURS))
        if not ours or row is ours:
            continue
        line = dict(shape=shape, implementation=name, dtype=row["dtype"], ours=ours["dtype"])
        line["time"] = row["seconds_median"] / ours["seconds_median"]
        line["peak"] = ours["peak_mb"] / row["peak_mb"]
        line["above"] = (ours["peak_mb"] - ours["libraries_mb"]) / (row["peak_mb"] - row["libraries_mb"])
        result.append(line)
    return result


def report(rows):
    """Returns the tables of everything measured, as Markdown."""
    figures = [row for row in rows if "error" not in row]
    if not figures:
        return table(rows, COLUMNS) if rows else "nothing is measured yet"
    first = figures[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    parts = [f"{first.get('card') or first['cpu']}, {first['threads']} threads; {versions}.", table(rows, COLUMNS)]
    if compared := ratios(figures):
        parts += [f"Against {OURS}, each in the precision that is faster for it:", table(compared, RATIOS)]
    agree = " and ".join(f"{TOLERANCE[d]:g} ({d})" for d in dict.fromkeys(row["dtype"] for row in figures))
    differ = "\n".join(disagreements(figures))
    return "\n\n".join([*parts, differ or f"The losses agree at every step of a process, within {agree}."])


def ablation_report(rows):
    """Returns time and peak memory without each idea, as multiples of those with all of them, as Markdown."""
    tables = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines, columns = {}, {f"left out ({dtype})": "idea"}
        for row in (row for row in rows if row["dtype"] == dtype):
            shape, idea = row["shape"], row["implementation"].partition(" without ")[2]
            whole = next(r for r in rows if (r["implementation"], r["dtype"], r["shape"]) == (OURS, dtype, shape))
            multiples = [f"{row[name] / whole[name]:.2f}" for name in ("seconds_median", "peak_mb")]
            time, peak = multiples if idea else (f"{row['seconds_median']:.3g} s", f"{row['peak_mb']:,.0f} MB")
            lines.setdefault(idea, {"idea": idea or "nothing"}).update({f"{shape} time": time, f"{shape} peak": peak})
            columns |= {f"{shape} {what}": f"{shape} {what}" for what in ("time", "peak")}
        tables.append(table(list(lines.values()), columns))
    return "\n\n".join(tables)


def draw(path, rows):
    """Draws seconds and memory as bars, a column per shape."""
    rows = [row for row in rows if "error" not in row]
    shapes, names = (list(dict.fromkeys(row[name] for row in rows)) for name in ("shape", "implementation"))
    if not rows or not (picture := figure(path, (4.2 * len(shapes), 6.4))):
        return
    axes = picture.subplots(2, len(shapes), squeeze=False, sharey=True)
    for row in rows:
        i = DTYPES.index(row["dtype"])
        above, below = axes[:, shapes.index(row["shape"])]
        y, style = names.index(row["implementation"]) + 0.4 * i - 0.2, dict(height=0.36, color=f"C{i}")
        middle = row["seconds_median"]
        spread = [[middle - row["seconds_min"]], [row["seconds_max"] - middle]]
        above.barh(y, middle, xerr=spread, ecolor="0.3", label=row["dtype"], **style)
        below.barh(y, row["peak_mb"] / 1e3, **style)
        below.plot([row["libraries_mb"] / 1e3] * 2, [y - 0.18, y + 0.18], color="0.2")
    for column, shape in enumerate(shapes):
        side = "rows" if SHAPES[shape].get("sft") else "pairs, prompt {prompt[0]}-{prompt[1]}"
        what = f"{shape}: {{pairs}} {side},\nresponse {{response[0]}}-{{response[1]}} tokens"
        axes[0, column].set(title=what.format(**SHAPES[shape]), xlabel="seconds per step (whisker: min to max)")
        axes[1, column].set(xlabel="peak memory, GB (stroke: libraries)")
    for cell in axes.flat:
        cell.grid(axis="x", alpha=0.25)
        cell.set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    handles = dict(zip(*reversed(axes[0, -1].get_legend_handles_labels()), strict=True))  # one of each label
    axes[0, -1].legend(handles.values(), handles.keys(), frameon=False)
    save_figure(path, picture)


def main():
    settings = parse_settings(BenchSettings, __doc__)
    pick_device(settings.device)
    if settings.precision:
        from experiments.bench import precision  # needs transformers and TRL

        text = precision.report(settings.precision, settings.data)
        return tell(settings, "precision", text, text, lambda *_: None, {})
    sizes, names, dtypes = DEFAULTS[settings.device]
    names = names_in("--implementations", settings.implementations, IMPLEMENTATIONS, names)
    sizes = names_in("--shapes", settings.shapes, SHAPES, sizes)
    dtypes = names_in("--dtypes", settings.dtypes, DTYPES, dtypes)
    works = {}
    for shape, dtype, name in itertools.product(sizes, dtypes, IDEAS if settings.ablation else names):
        if not (SHAPES[shape].get("sft") and name in DPO_ONLY):
            works[shape, dtype, name] = work_of(SHAPES[shape], name, dtype, settings.device, settings.threads)
    if not works:
        raise UserError(f"nothing to measure: {', '.join(names)} has no SFT step. Add a shape of DPO, such as W1.")
    measured = measure_all(works, settings)
    rows = [as_row(*cell, works[cell], processes) for cell, processes in measured.items() if processes]
    mark, text = ("ablation", ablation_report(rows)) if settings.ablation else ("bench", report(rows))
    tell(settings, mark, rows, text, draw, measured)


if __name__ == "__main__":
    run_main(main)
