"""Broken variants of our own code, and the tests that find them.

    python -m experiments.mistakes                                         runs each mutant's test in a broken copy
    python -m experiments.mistakes --curves FOLDER --init runs/toy/sft     trains with each mistake

A test that has never failed has shown nothing. Read gallery.py for the mistakes, this file for how one is tried, and
docs/mistakes.md for how they look.
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path

from experiments.mistakes.gallery import GALLERY, Mutant

__all__ = ["GALLERY", "ROOT", "Mutant", "copy", "kill", "load", "mutated", "run_tests"]

ROOT = Path(__file__).parent.parent.parent
COPIED = ("*.py", "pyproject.toml", "minidpo/**/*.py", "data/**/*.py", "data/toy_sentiment/*.jsonl")
COPIED += ("experiments/**/*.py", "tests/*.py")


def mutated(mutant):
    """The source of the mutant's file with the mistake in it. ValueError unless `old` is there exactly once."""
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {source.count(mutant.old)} places in {mutant.file} read\n{mutant.old}")
    return source.replace(mutant.old, mutant.new)


def load(mutant):
    """The mutant's file as a fresh module, in this process: `load(m).dpo_loss(...)`. Nothing else is changed by it."""
    module = types.ModuleType(f"mutant_{Path(mutant.file).stem}")
    module.__file__ = str(ROOT / mutant.file)
    exec(compile(mutated(mutant), f"{mutant.file} with {mutant.name}", "exec"), module.__dict__)
    return module


def copy(folder, mutant=None):
    """Code and tests -> `folder`, with the mutant's mistake if one is given."""
    for source in {path for pattern in COPIED for path in ROOT.glob(pattern)}:
        target = Path(folder) / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if mutant:
        (Path(folder) / mutant.file).write_text(mutated(mutant), encoding="utf-8")


def kill(mutant):
    """Runs the mutant's test in a copy with the mistake -> (whether it failed, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        copy(folder, mutant)
        started = time.perf_counter()
        code = run_tests(folder, [mutant.test])
        return code == 1, time.perf_counter() - started


# Each test runs in a process of its own. Importing torch takes longer than most tests, so where the system can fork,
# the processes are forked from one that holds torch, and nothing of ours, already.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PROCESSES = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    _PROCESSES.set_forkserver_preload(["torch", "tiktoken", "pytest"])


_PYTEST = 100  # added to pytest's exit code, since a process that ends in an exception has the 1 of a failed test


def run_tests(folder, tests):
    """pytest's exit code for the node ids `tests` in a copy: 0 all passed, 1 one failed.

    Any other code (no such test, a file that does not import) is a RuntimeError with pytest's output.
    """
    process = _PROCESSES.Process(target=_pytest, args=(str(folder), tests))
    process.start()
    process.join()
    code = process.exitcode - _PYTEST
    if code not in (0, 1):
        output = Path(folder) / "output.txt"
        output = output.read_text(encoding="utf-8") if output.exists() else ""
        raise RuntimeError(f"{tests} ended with code {code}:\n{output}")
    return code


def _pytest(folder, tests):
    import pytest

    ours = {path.stem for path in Path(folder).iterdir()}  # what is loaded of it came from the tree that is not broken
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    os.chdir(folder)
    sys.path.insert(0, folder)
    with open("output.txt", "w", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        with contextlib.redirect_stderr(output):
            code = pytest.main(["-x", "-p", "no:cacheprovider", *tests])
    sys.exit(_PYTEST + int(code))
