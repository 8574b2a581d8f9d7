"""Our own code with one mistake at a time, and the test that catches each mistake.

    python -m experiments.mistakes                                         runs each mistake's test in a broken copy
    python -m experiments.mistakes --curves FOLDER --init runs/toy/sft     trains with each mistake

A test that has never failed has shown nothing. Each section of docs/mistakes.md is a mistake. This file reads the page
and tries a mistake; curves.py trains with it and writes what it measured into the page.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "mistakes.md"
COPIED = ("*.py", "pyproject.toml", "minidpo/**/*.py", "data/**/*.py", "data/toy_sentiment/*.jsonl")
COPIED += ("experiments/**/*.py", "docs/mistakes.md", "tests/*.py")


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake: where it is, what it does, and the test that catches it."""

    name: str
    file: str  # from the root of the repository
    old: str  # source text, which occurs once in the file
    new: str  # the same place with the mistake
    test: str  # the pytest node id of a test that fails because of it
    flags: tuple = ()  # flags of train_dpo.py, if the mistake shows only with them
    resumed: bool = False  # whether the run is stopped half-way and resumed
    shows: str = ""  # the metric to draw below the margins; empty: not trained, as it cannot change such a run


def read_page(path):
    """The page -> (what stands above its first section, its sections as texts)."""
    above, *sections = path.read_text(encoding="utf-8").split("\n## ")
    return above, sections


def read_section(section):
    """A section of the page -> Mistake. `old` and `new` are the two sides of its diff."""

    def found(pattern):
        match = re.search(pattern, section, re.MULTILINE)
        return match[1] if match else ""

    diff = found(r"^```diff\n((?:.*\n)*?)```").splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in diff if line[0] in signs) for signs in ("- ", "+ "))
    return Mistake(
        section.partition("\n")[0], found("^In `(.*)`:$"), old, new, found(r"^Caught by `(.*)`\.$"),
        flags=tuple(found("^Trained with `(.*?)`").split()), resumed=bool(found("^Trained.*(resumed)")),
        shows=found("^Trained.* shows `(.*)`"),
    )  # fmt: skip


GALLERY = [read_section(section) for section in read_page(PAGE)[1]]


def broken(mistake):
    """The source of the mistake's file with the mistake in it. ValueError unless `old` is there exactly once."""
    source = (ROOT / mistake.file).read_text(encoding="utf-8")
    if source.count(mistake.old) != 1:
        raise ValueError(f"{mistake.name}: {mistake.file} has this {source.count(mistake.old)} times:\n{mistake.old}")
    return source.replace(mistake.old, mistake.new)


def copy(folder, mistake=None):
    """Copies code and tests to `folder`, with the mistake in them if one is given."""
    for source in {path for pattern in COPIED for path in ROOT.glob(pattern)}:
        target = Path(folder) / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if mistake:
        (Path(folder) / mistake.file).write_text(broken(mistake), encoding="utf-8")


def caught(mistake):
    """Runs the mistake's test in a copy with the mistake -> (whether the test failed, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        copy(folder, mistake)
        started = time.perf_counter()
        return run_tests(folder, [mistake.test])[0], time.perf_counter() - started


# Imports take longer than most tests. Where the system can fork, every process below is a fork of one that has already
# made these imports.
_CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
IMPORTED = ["torch._dynamo", "torch.distributed.tensor", "tiktoken", "pytest", "transformers", "matplotlib.pyplot"]
_CONTEXT.set_forkserver_preload(IMPORTED)


def run_tests(folder, tests):
    """Runs the tests (pytest node ids) in a copy -> (whether one failed, pytest's output). RuntimeError if none ran."""
    quick = ["-x", "--assert=plain", "--tb=line", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    code, output = run_in(folder, "pytest", *quick, *tests)
    if code not in (0, 1):  # 0: all passed, 1: one failed
        raise RuntimeError(f"pytest ended with code {code} for {tests}:\n{output}")
    return code == 1, output


def run_in(folder, *command):
    """Runs `python -m COMMAND` in a copy, in a process of its own -> (exit code, output)."""
    with ProcessPoolExecutor(1, _CONTEXT) as process:
        return process.submit(_run_in, str(folder), command).result()


def _run_in(folder, command):
    ours = {path.stem for path in Path(folder).iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]  # it was imported from the healthy tree
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv[:] = command
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        try:
            runpy.run_module(command[0], run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0), output.getvalue()
    return 0, output.getvalue()
