"""Our own code with one mistake at a time, and the test that catches each mistake.

    python -m experiments.mistakes                                         runs each mistake's test in a broken copy
    python -m experiments.mistakes --curves FOLDER --init runs/toy/sft     trains with each mistake

A test that has never failed has shown nothing. gallery.py lists the mistakes, this file tries one, and
docs/mistakes.md shows what each looks like in training.
"""

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from experiments.mistakes.gallery import GALLERY, Mistake

__all__ = ["GALLERY", "ROOT", "Mistake", "broken", "caught", "copy", "load", "run_tests"]

ROOT = Path(__file__).parent.parent.parent
COPIED = ("*.py", "pyproject.toml", "minidpo/**/*.py", "data/**/*.py", "data/toy_sentiment/*.jsonl")
COPIED += ("experiments/**/*.py", "tests/*.py")


def broken(mistake):
    """The source of the mistake's file with the mistake in it. ValueError unless `old` is there exactly once."""
    source = (ROOT / mistake.file).read_text(encoding="utf-8")
    if source.count(mistake.old) != 1:
        raise ValueError(f"{mistake.name}: {mistake.file} has this {source.count(mistake.old)} times:\n{mistake.old}")
    return source.replace(mistake.old, mistake.new)


def load(mistake):
    """The mistake's file as a new module: `load(m).dpo_loss(...)`. The healthy module stays as it is."""
    module = types.ModuleType(f"broken_{Path(mistake.file).stem}")
    module.__file__ = str(ROOT / mistake.file)
    exec(compile(broken(mistake), f"{mistake.file} with {mistake.name}", "exec"), module.__dict__)
    return module


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
        failed, _ = run_tests(folder, [mistake.test])
        return failed, time.perf_counter() - started


# Each test runs in a process of its own. Importing torch takes longer than most tests, so where the system can fork,
# each process is forked from one that has imported it.
_CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(os, "fork"):
    _CONTEXT.set_forkserver_preload(["torch", "tiktoken", "pytest"])


def run_tests(folder, tests):
    """Runs the tests (pytest node ids) in a copy -> (whether one failed, pytest's output).

    Raises:
        RuntimeError: pytest could not run them, for instance because a name is wrong or a file does not import.
    """
    with ProcessPoolExecutor(1, _CONTEXT) as process:
        code, output = process.submit(_pytest, str(folder), tests).result()
    if code not in (0, 1):  # 0: all passed, 1: one failed
        raise RuntimeError(f"pytest ended with code {code} for {tests}:\n{output}")
    return code == 1, output


def _pytest(folder, tests):
    import pytest

    ours = {path.stem for path in Path(folder).iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]  # it was imported from the healthy tree
    os.chdir(folder)
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        code = pytest.main(["-x", "-p", "no:cacheprovider", *tests])
    return int(code), output.getvalue()
