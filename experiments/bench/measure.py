"""The benchmark's processes: runs them in turns, keeps what they measured, and writes it as rows and tables."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from experiments.bench.shapes import count, mfu_flops, random_pairs
from minidpo.files.writing import atomic_write, claim
from minidpo.run import CatchInterrupt
from minidpo.settings import UserError, knob

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # per second, dense bf16, by a part of the card's name


@dataclasses.dataclass
class Settings:
    """The flags that the benchmark and growth.py share."""

    rounds: int = knob(3, "how often every process is run", least=1)
    threads: int = knob(0, "threads of each process; 0: PyTorch's choice")
    cache: str = knob("runs/bench", "folder that keeps what each process measured; delete it to measure again")
    json: str = knob("", "file for the numbers, with a picture beside it (.png); empty: print them only")
    markdown: str = knob("", "page whose marked block becomes the tables, such as docs/bench.md")
    measure: bool = knob(True, "--no-measure: only show what --cache holds")


def child(work):
    """Runs worker.py on `work` in a process of its own -> what it measured, a dict; None for the work "weights"."""
    command = [sys.executable, "-m", "experiments.bench.worker", json.dumps(work)]
    root, environment = Path(__file__).parents[2], {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-8:])
        raise UserError(f"{work['implementation']} ended with exit code {done.returncode}:\n{tail}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


def measure_all(works, settings):
    """Runs a process for each work and round, in turns -> {cell: [what its processes measured]}.

    works: {cell: work}; a cell is a tuple of names. Ctrl-C lets the running process finish and leaves out the others.
    """
    claim(settings.cache)
    names = {f"{'-'.join(cell).replace(' ', '_')}-{i}": cell for i in range(settings.rounds) for cell in works}
    turns = {Path(settings.cache) / f"{name}.json": cell for name, cell in names.items()}
    measured = {}
    for path, cell in turns.items():  # a file of an earlier command is used only if its work was exactly the same
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if record.get("work") == json.loads(json.dumps(works[cell])):
            measured[path] = record["measured"]
    if measured:
        print(f"{len(measured)} of {len(turns)} processes ran before: {settings.cache}")
    todo = [path for path in turns if path not in measured] if settings.measure else []
    with tempfile.TemporaryDirectory() as weights, CatchInterrupt() as interrupt, tqdm(todo, unit="process") as bar:
        for path in bar:
            if interrupt.requested:
                break
            bar.set_postfix_str(path.stem)
            work = works[turns[path]]
            folder = Path(weights) / "-".join(map(str, work.get("model", {}).values()))
            if not folder.exists():  # random weights of each shape, made once
                child({"implementation": "weights", "folder": str(folder), "model": work["model"]})
            measured[path] = child({**work, "folder": str(folder)})
            atomic_write(path, json.dumps({"work": work, "measured": measured[path]}, indent=1) + "\n")
    return {cell: [measured[path] for path in turns if turns[path] == cell and path in measured] for cell in works}


def as_row(shape, dtype, implementation, work, processes):
    """Makes a row of the JSON from what the processes of one cell measured (see worker.py).

    Times are in seconds per step, memory is in MB (1e6 bytes). `mfu` is there if the peak rate of the card is known. A
    row of what did not fit has an `error` in place of the figures.
    """
    row = {"shape": shape, "implementation": implementation, "dtype": dtype, "optimizer": work["optimizer"]}
    if failed := next((process for process in processes if "error" in process), None):
        return row | failed
    seconds = [s for process in processes for s in process["seconds"][work["warmup"] :]]
    median, pairs = statistics.median(seconds), random_pairs(work)
    row |= processes[0] | dict(
        seconds_median=median, seconds_min=min(seconds), seconds_max=max(seconds), seconds=seconds,
        timed_steps=len(seconds), rounds=len(processes), pairs_per_second=work["pairs"] / median,
        tokens_per_second=count(pairs, shared=False)[0] / work["batches"] / median,
        peak_mb=max(process["peak_mb"] for process in processes),
        libraries_mb=max(process["libraries_mb"] for process in processes),
        first_loss=processes[0]["losses"][0], last_loss=processes[0]["losses"][-1],
    )  # fmt: skip
    for card, peak in PEAK_FLOPS.items():
        if card in (row["card"] or ""):
            shared = work.get("flags", {}).get("fast", False)
            row["mfu"] = mfu_flops(work["model"], pairs, shared) / work["batches"] / median / peak
    return row


def table(rows, columns):
    """Returns rows (dicts) as a Markdown table. columns: {header: "key:format"}; empty columns are left out."""
    texts = {}
    for header, column in columns.items():
        key, _, form = column.partition(":")
        texts[header] = ["" if row.get(key) is None else format(row[key], form) for row in rows]
    texts = {header: column for header, column in texts.items() if any(column)}
    sides = ["---:" if all(text[:1] in "0123456789" for text in column) else "---" for column in texts.values()]
    lines = [texts, sides, *zip(*texts.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tell(settings, mark, figures, text, draw, measured):
    """Prints `text`; writes the numbers to --json, the picture beside it, and the text into the page --markdown.

    In the page, the text replaces the lines between `<!-- mark -->` and `<!-- /mark -->`. Raises UserError if Ctrl-C
    left out some of the processes.
    """
    print(text)
    if settings.json:
        atomic_write(settings.json, json.dumps(figures, indent=1) + "\n")
        draw(Path(settings.json).with_suffix(".png"), figures)
    if settings.markdown:
        before, opening, rest = Path(settings.markdown).read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
        _, closing, after = rest.partition(f"<!-- /{mark} -->\n")
        if not closing:
            raise UserError(f"{settings.markdown} has no lines <!-- {mark} --> and <!-- /{mark} -->. Add them.")
        atomic_write(settings.markdown, f"{before}{opening}{text}\n{closing}{after}")
    if settings.measure and any(len(processes) < settings.rounds for processes in measured.values()):
        raise UserError("stopped before the end. Give the same command again to continue.")
