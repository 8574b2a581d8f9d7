"""How fast, how lean: one training step of DPO, ours and other people's, on the same weights and the same pairs.

    python -m experiments.bench --json docs/bench/bench.json --markdown docs/bench.md

A step is the log-probs of the policy, the reference's where they were not computed before, loss, backward, clipping
and AdamW. Token ids and weights are random. Each measurement is a process of its own, alone: the implementations take
turns, for several rounds, so that a slow minute of the machine hits all of them. Nothing else should run meanwhile.

    minidpo          train_dpo.py --fast (minidpo/scale/fast.py)
    minidpo-plain    train_dpo.py with the function that its reader sees
    trl-precomputed  TRL's DPOTrainer, reference log-probs computed before training
    trl              TRL's DPOTrainer with the reference model's forward in each step
    hf-plain         Hugging Face's GPT-2, both responses padded together, a reference model's forward in each step
    matmul-floor     the matrix products alone, at the fast path's shapes: what no implementation of it can beat

What a process measured is kept in --cache: the command given again goes on where it was stopped, and more --rounds
add to what is there. The peers' packages come with the extra `bench`; what is not installed is left out.
bench_worker.py has the runners; docs/bench.md says what the figures mean.
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from experiments.bench.worker import random_pairs
from minidpo.files import atomic, atomic_write
from minidpo.settings import CatchInterrupt, UserError, knob, parse_settings, run_main, unknown

GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
# Model; pairs in a batch, batches that are visited in turn; least and most ids of a prompt and of a response; steps of
# a process, and how many of the first are not timed. The learning rate moves the loss and leaves the step stable.
SHAPES = {
    "W1": dict(
        model=dict(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=128),
        pairs=64, batches=2, prompt=(4, 8), response=(16, 48), steps=16, warmup=4, lr=3e-5,
    ),
    "W2": dict(model=GPT2, pairs=8, batches=1, prompt=(4, 8), response=(32, 64), steps=2, warmup=1, lr=1e-6),
    "W3": dict(model=GPT2, pairs=4, batches=1, prompt=(200, 350), response=(25, 60), steps=2, warmup=1, lr=1e-6),
}  # fmt: skip
TRIAL = dict(  # --quick: every shape becomes this one
    model=dict(vocab_size=90, block_size=64, n_layer=2, n_head=2, n_embd=16),
    pairs=3, batches=2, prompt=(2, 9), response=(1, 7), steps=4, warmup=1, lr=1e-2,
)  # fmt: skip
OURS, PEER, FLOOR = "minidpo", "trl-precomputed", "matmul-floor"
NEEDS = {  # implementation: the packages it takes
    OURS: ("safetensors",),
    "minidpo-plain": ("safetensors",),
    PEER: ("transformers", "trl"),
    "trl": ("transformers", "trl"),
    "hf-plain": ("transformers",),
    FLOOR: (),
}
DTYPES = ("float32", "bfloat16")
# losses of two implementations may differ by this much: fp32 sums in another order; bf16 rounds to 8 bits, and the
# first AdamW steps are signs of gradients, so that rounding turns some of them
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}


@dataclasses.dataclass
class Settings:
    shapes: str = knob("", "which of W1,W2,W3; empty: all")
    implementations: str = knob("", "which implementations, with commas between; empty: all that are installed")
    dtypes: str = knob("", "float32,bfloat16, precision of the matrix products (weights are float32); empty: both")
    rounds: int = knob(3, "how often all of them take their turn", least=1)
    threads: int = knob(0, "threads of each process; 0: as PyTorch picks them")
    quick: bool = knob(False, "a trial of the command: models of 7,000 weights, one round; its figures mean nothing")
    cache: str = knob("runs/bench", "folder that keeps what each process measured")
    json: str = knob("", "file for the figures, with a picture beside it (.png); empty: print them only")
    markdown: str = knob("", "page whose marked block becomes the tables, such as docs/bench.md")
    measure: bool = knob(True, "--no-measure: only tell what --cache holds")
    overwrite: bool = knob(False, "forget what --cache holds of these shapes, implementations and dtypes")


# ---- 1. Measuring ----


def child(work):
    """Runs bench_worker.py on `work` (see there) in a process of its own -> what it printed last, a dict or None."""
    root = str(Path(__file__).parent.parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench_worker", json.dumps(work)],
        capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-8:])
        raise UserError(f"{work['implementation']} ended with exit code {done.returncode}:\n{tail}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


class Weights:
    """`with Weights() as weights:` ... `weights.folder(model)`: random weights of that shape, made once.

    They are gone at the end of the block.
    """

    def __enter__(self):
        self.temporary = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_):
        self.temporary.cleanup()

    def folder(self, model):
        path = Path(self.temporary.name) / "-".join(str(n) for n in model.values())
        if not path.exists():
            child({"implementation": "weights", "folder": str(path), "model": model})  # memory of its own for this, too
        return str(path)


def kept(path, work):
    """What an earlier process measured on just this `work`, if the file at `path` has it; else None."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["measured"] if record["work"] == json.loads(json.dumps(work)) else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Delete it, and it is measured again.") from error


def measure(path, work, weights):
    """Runs a process on `work`, keeps what it measured at `path`, and returns it."""
    folder = weights.folder(work["model"]) if "model" in work else ""
    measured = child({**work, "folder": folder})
    atomic_write(path, json.dumps({"work": work, "measured": measured}, indent=1) + "\n")
    return measured


def measure_all(turns, desc, overwrite=False, run_missing=True):
    """{key: (path, work)}, in the order to be run -> {key: what its process measured}.

    What is at the path already is not measured again, unless `overwrite`. Ctrl-C lets the process that runs finish;
    then, and without `run_missing`, those that are missing are left out.
    """
    if overwrite:
        for path, _ in turns.values():
            path.unlink(missing_ok=True)
    measured = {key: found for key, (path, work) in turns.items() if (found := kept(path, work))}
    todo = [key for key in turns if key not in measured] if run_missing else []
    if measured:
        print(f"{len(measured)} of {len(turns)} processes ran before: {next(iter(turns.values()))[0].parent}")
    with Weights() as weights, CatchInterrupt() as interrupt, tqdm(todo, desc=desc, unit="process") as bar:
        for key in bar:
            path, work = turns[key]
            bar.set_postfix_str(path.stem)
            measured[key] = measure(path, work, weights)
            if interrupt.requested:
                break
    return {key: measured[key] for key in turns if key in measured}


def must_be_all(measured, turns):
    """UserError if Ctrl-C left some of `turns` out."""
    if len(measured) < len(turns):
        raise UserError("stopped; the same command goes on from here.")


def installed(implementations):
    """Those whose packages are there; says what is left out."""
    present = []
    for name in implementations:
        missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
        if missing:
            print(f'{name} is left out: {", ".join(missing)} not installed (pip install -e ".[bench,hf]")')
        else:
            present.append(name)
    return present


def as_row(shape, dtype, implementation, work, measured):
    """What the processes of one cell measured (a list of what bench_worker.py prints) -> a row of the JSON.

    Seconds are of a step, over the timed steps of all rounds; tokens are input positions of a step, padding not counted
    and each prompt counted twice, whatever the implementation does with it. Memory, in MB (1e6 bytes): `peak_mb` the
    highest resident memory during the timed steps, everything in the process counted; `libraries_mb` what was resident
    once the libraries were imported, before the model; `state_mb` fp32 weights, gradients and AdamW's two moments.
    """
    seconds = [s for process in measured for s in process["seconds"][work["warmup"] :]]
    median = statistics.median(seconds)
    tokens = sum(2 * len(p) + len(w) + len(l) - 2 for p, w, l in random_pairs(work)) / work["batches"]
    return {
        "shape": shape,
        "implementation": implementation,
        "dtype": dtype,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "pairs_per_second": work["pairs"] / median,
        "tokens_per_second": tokens / median,
        "peak_mb": max(process["peak_mb"] for process in measured),
        "libraries_mb": max(process["libraries_mb"] for process in measured),
        "state_mb": measured[0]["state_mb"],
        "losses": measured[0]["losses"],
        "rounds": len(measured),
        "seconds": seconds,
        **{name: measured[0][name] for name in ("cpu", "threads", "versions")},
    }


# ---- 2. Telling ----


def disagreements(rows):
    """Lines for losses that differ between implementations by more than TOLERANCE, at one shape and precision."""
    lines, first = [], {}
    for row in rows:
        if row["implementation"] == FLOOR:
            continue
        other = first.setdefault((row["shape"], row["dtype"]), row)
        gaps = [abs(a - b) for a, b in zip(row["losses"], other["losses"], strict=True)]
        if not all(gap <= TOLERANCE[row["dtype"]] for gap in gaps):  # so that a NaN is told, too
            names = f"{other['implementation']} and {row['implementation']}"
            lines.append(f"{row['shape']} {row['dtype']}: the losses of {names} differ by up to {max(gaps):.2g}")
    return lines


def better(rows, shape, implementation):
    """The row of the precision in which the implementation is faster at this shape, or None."""
    found = [row for row in rows if (row["shape"], row["implementation"]) == (shape, implementation)]
    return min(found, key=lambda row: row["seconds_median"], default=None)


def ratios(rows):
    """[(shape, implementation, its precision, its time over ours, our peak memory over its, the same above libraries)]

    Both in the precision that is faster for them. The last ratio leaves out what was resident before the model was.
    """
    result = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        ours = better(rows, shape, OURS)
        for name in NEEDS:
            row = better(rows, shape, name)
            if ours and row and name != OURS:
                above = [r["peak_mb"] - r["libraries_mb"] for r in (ours, row)]
                times = row["seconds_median"] / ours["seconds_median"]
                result.append((shape, name, row["dtype"], times, ours["peak_mb"] / row["peak_mb"], above[0] / above[1]))
    return result


def report(rows):
    """The tables of everything measured, as Markdown."""
    if not rows:
        return "nothing measured"
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items() if version)
    lines = [
        f"{rows[0]['cpu']}, {rows[0]['threads']} threads; {versions}.",
        "",
        "| shape | implementation | precision | s a step (least to most) | steps | pairs/s | tokens/s | peak MB "
        "| libraries MB | state MB | loss, first and last step |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        floor = row["implementation"] == FLOOR
        losses = "" if floor else f"{row['losses'][0]:.6f}, {row['losses'][-1]:.6f}"
        lines.append(
            f"| {row['shape']} | {row['implementation']} | {row['dtype']} | {row['seconds_median']:.3g} "
            f"({row['seconds_min']:.3g} to {row['seconds_max']:.3g}) | {len(row['seconds'])} | "
            f"{row['pairs_per_second']:.3g} | {row['tokens_per_second']:,.0f} | {row['peak_mb']:,.0f} | "
            f"{row['libraries_mb']:,.0f} | {'' if floor else format(row['state_mb'], ',.0f')} | {losses} |"
        )
    compared = ratios(rows)
    if compared:
        shapes = dict.fromkeys(shape for shape, *_ in compared)
        ours = ", ".join(f"{shape} {better(rows, shape, OURS)['dtype']}" for shape in shapes)
        lines += ["", f"Against {OURS}, each in the precision that is faster for it (ours: {ours}):", ""]
        lines += ["| shape | implementation | precision | its time / ours | our peak / its | same, less libraries |"]
        lines += ["| --- | --- | --- | ---: | ---: | ---: |"]
        lines += [
            f"| {shape} | {name} | {dtype} | {times:.2f} | "
            + ("| |" if name == FLOOR else f"{peak:.2f} | {above:.2f} |")
            for shape, name, dtype, times, peak, above in compared
        ]
    agree = " and ".join(f"{TOLERANCE[d]:g} ({d})" for d in dict.fromkeys(row["dtype"] for row in rows))
    return "\n".join(
        [*lines, "", *(disagreements(rows) or [f"The losses agree at every step of a process, within {agree}."])]
    )


def draw(path, rows):
    """Seconds and memory as bars. Needs the extra `plot`; without it says so and returns False."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "minidpo[plot]")')
        return False
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = [name for name in NEEDS if any(row["implementation"] == name for row in rows)]
    figure = Figure(figsize=(4.2 * len(shapes), 6.4), layout="constrained")
    axes = figure.subplots(2, len(shapes), squeeze=False, sharey=True)
    for row in rows:
        i = DTYPES.index(row["dtype"])
        above, below = axes[:, shapes.index(row["shape"])]
        y, style = names.index(row["implementation"]) + 0.4 * i - 0.2, dict(height=0.36, color=f"C{i}")
        middle = row["seconds_median"]
        spread = [[middle - row["seconds_min"]], [row["seconds_max"] - middle]]
        above.barh(y, middle, xerr=spread, ecolor="0.3", label=row["dtype"], **style)
        if row["implementation"] != FLOOR:
            below.barh(y, row["peak_mb"] / 1e3, **style)
            below.plot([row["libraries_mb"] / 1e3] * 2, [y - 0.18, y + 0.18], color="0.2")
    for column, shape in enumerate(shapes):
        axes[0, column].set(title=shape, xlabel="seconds a step (whisker: least to most)")
        axes[1, column].set(xlabel="peak resident memory, GB (stroke: libraries)")
    for cell in axes.flat:
        cell.grid(axis="x", alpha=0.25)
        cell.set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    handles = dict(zip(*reversed(axes[0, -1].get_legend_handles_labels()), strict=True))  # one of each label
    axes[0, -1].legend(handles.values(), handles.keys(), frameon=False)
    with atomic(path) as file:
        figure.savefig(file, dpi=90, format="png")
    return True


def put_into(page, name, text):
    """Replaces what stands in the file `page` between `<!-- name -->` and `<!-- /name -->` by `text`."""
    whole = Path(page).read_text(encoding="utf-8")
    before, opening, rest = whole.partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->\n")
    if not closing:
        raise UserError(f"{page} has no block <!-- {name} --> ... <!-- /{name} -->, each on a line of its own. Add it.")
    atomic_write(page, f"{before}{opening}{text}\n{closing}{after}")


def tell(settings, block, figures, text, draw):
    """Prints `text`; writes the figures to --json, the picture beside it, and the text into the --markdown page."""
    print(text)
    if settings.json:
        atomic_write(settings.json, json.dumps(figures, indent=1) + "\n")
        picture = Path(settings.json).with_suffix(".png")
        if draw(picture, figures):
            print(f"figures: {settings.json}, picture: {picture}")
    if settings.markdown:
        put_into(settings.markdown, block, text)


def chosen(flag, text, valid):
    """ "a,b" -> ["a", "b"], each of them one of `valid`, UserError otherwise; "" -> all of them."""
    names = [name.strip() for name in text.split(",")] if text else list(valid)
    for name in names:
        if name not in valid:
            raise unknown(flag, name, list(valid))
    return names


def main():
    settings = parse_settings(Settings, __doc__)
    shapes = chosen("--shapes", settings.shapes, SHAPES)
    dtypes = chosen("--dtypes", settings.dtypes, DTYPES)
    implementations = installed(chosen("--implementations", settings.implementations, NEEDS))
    works = {
        (shape, dtype, name): dict(
            TRIAL if settings.quick else SHAPES[shape], implementation=name, dtype=dtype, threads=settings.threads
        )
        for shape in shapes for dtype in dtypes for name in implementations
    }  # fmt: skip
    rounds = 1 if settings.quick else settings.rounds
    paths = {(*cell, i): Path(settings.cache) / f"{'-'.join(cell)}-{i}.json" for i in range(rounds) for cell in works}
    turns = {turn: (path, works[turn[:3]]) for turn, path in paths.items()}
    measured = measure_all(turns, "bench", settings.overwrite, settings.measure)
    rows = []
    for cell, work in works.items():
        processes = [found for turn, found in measured.items() if turn[:3] == cell]
        if processes:
            rows.append(as_row(*cell, work, processes))
    tell(settings, "bench", rows, report(rows), draw)
    if settings.measure:
        must_be_all(measured, turns)


if __name__ == "__main__":
    run_main(main)
