"""Runs of both stages killed with SIGKILL at random moments, and resumed: in the end they are the unbroken run's equal.

Some moments are a time: the process is killed from outside, so many steps and milliseconds after it started. The
others are a place, such as the write of a checkpoint, and there a random one of the calls of Python functions, so that
each kind of place is met for certain.
"""

import json
import os
import random
import re
import signal
import time

import pytest
import torch
from children import start_stage
from tiny import call, write_data

import train_dpo
import train_sft
from minidpo import checkpoint
from minidpo.report import read_metrics

# 22 pairs or 25 rows in batches of 6: 4 or 5 steps an epoch, the last of 4 or 1; the rate rises, then falls
COMMON = ("--batch-size", 6, "--epochs", 20, "--warmup-steps", 5, "--eval-every", 7, "--samples", 2)
MAINS = {"sft": train_sft.main, "dpo": train_dpo.main}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data of `write_data` and `start`, an SFT model."""
    folder = tmp_path_factory.mktemp("kill")
    write_data(folder)
    flags = ("--preset", "toy", "--epochs", 1, "--samples", 1, "--sample-tokens", 2)
    call(train_sft.main, "--data", folder / "sft.jsonl", "--out", folder / "start", *flags)
    return folder


def flags_of(stage, home):
    """With all that a run has to carry on: optimiser state, a reference, dropout's random numbers, held-out rows."""
    if stage == "sft":
        data = ("--data", home / "sft.jsonl", "--eval-data", home / "sft_held_out.jsonl", "--dropout", 0.1)
    else:
        data = ("--data", home / "pairs.jsonl", "--eval-data", home / "held_out.jsonl", "--decay", "--lr", 1e-3)
    return (*data, "--init", home / "start", *COMMON, "--sample-tokens", 5)


@pytest.fixture(scope="module")
def whole(home):
    """The unbroken run of each stage."""
    for stage in MAINS:
        flags, log = (*flags_of(stage, home), "--out", home / stage / "run"), home / f"{stage}.log"
        assert start_stage(stage, flags, log).join() == 0, log.read_text(encoding="utf-8")
    return {stage: home / stage / "run" for stage in MAINS}


def go_on(stage, home, out, *flags, **how):
    """Starts the run in `out`, or goes on with it if it has saved something."""
    saved = checkpoint.exists(out) and (out / "settings.json").exists()
    mode = "--resume" if saved else "--overwrite"
    return start_stage(stage, (*flags_of(stage, home), "--out", out, mode, *flags), out.parent / "log", **how)


def differences(a, b):
    """What two finished runs do not share, by name; what depends on the clock does not count."""
    names = []
    left, right = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    for part in ("config", "model", "state"):
        names += [f"{part}/{name}" for name in unequal(left[part], right[part])]
    lines = [
        [json.dumps({k: v for k, v in line.items() if not k.endswith("_per_second")}) for line in read_metrics(folder)]
        for folder in (a, b)
    ]
    names += ["metrics"] * (lines[0] != lines[1])
    names += ["samples"] * ((a / "samples.md").read_bytes() != (b / "samples.md").read_bytes())
    names += ["files"] * ({p.name for p in a.iterdir()} != {p.name for p in b.iterdir()})
    return names


def unequal(a, b, name=""):
    """Names of the entries of two nested dicts or lists that are not the same bits."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [n for key in a.keys() | b.keys() for n in unequal(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [n for i, (x, y) in enumerate(zip(a, b, strict=True)) for n in unequal(x, y, f"{name}.{i}")]
    same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]


# place: the visits drawn from, all of which come for certain, and the calls of functions in a visit, about
PLACES = {
    "load": (1, 25_000),
    "begin": (1, 3_300),
    "step": (3, 1_500),
    "log": (3, 15),
    "save": (2, 8_000),
    "move": (2, 2),
}
DRAWN = ["load", "begin", "step", "step", "log", "save", "save", "move", "move", *4 * ["time"]]
CERTAIN = [("save", 2, 4_000), ("move", 2, 0), ("finish", 1, 250)]  # mid-write, before the move, in the report


@pytest.mark.parametrize("save_every", [1, 3])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_trap18_killed_at_random_and_resumed_is_the_unbroken_run(home, whole, tmp_path, stage, save_every):
    """17 times each."""
    draw = random.Random(f"{stage} {save_every}")
    out, log = tmp_path / "run", tmp_path / "log"
    dooms = [("begin", 1, 1_000)]
    for place in draw.sample(DRAWN, len(DRAWN)):
        visits, calls = PLACES.get(place, (1, 1))
        dooms.append((place, draw.randint(1, visits), draw.randrange(calls)))
    found = []  # which checkpoints each death left
    for doom in dooms + CERTAIN:
        before = len(read_metrics(out))
        process = go_on(stage, home, out, "--save-every", save_every, doom=doom)
        if doom[0] == "time":  # from outside
            steps, seconds = draw.randint(-2, 4), draw.uniform(0, 0.05)
            give_up = time.monotonic() + 60
            while len(read_metrics(out)) < before + steps and time.monotonic() < give_up:
                time.sleep(0.001)
            time.sleep(seconds)
            os.kill(process.pid, signal.SIGKILL)
        assert process.join() == -signal.SIGKILL, (doom, log.read_text(encoding="utf-8"))
        found.append({re.sub(r"\d+", "N", path.name) for path in out.glob("checkpoint.*")})
    assert found[0] == set()
    assert found[-3:] == [{"checkpoint.pt", "checkpoint.pt.N.part"}] * 2 + [{"checkpoint.pt"}]
    assert go_on(stage, home, out, "--save-every", save_every).join() == 0, log.read_text(encoding="utf-8")
    assert differences(out, whole[stage]) == []
