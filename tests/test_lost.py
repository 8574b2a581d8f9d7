"""Nothing lost: runs that replace a run, two processes on one folder, processes that share a cache, runs that go on.

The chaos test starts, resumes, overwrites, reads and kills runs in one folder at random.
"""

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from children import start, start_stage
from tiny import call, contents, fails, write_data

import experiments.bench.__main__
import experiments.evaluate
import experiments.frontier.__main__
import experiments.frontier.accuracy
import experiments.frontier.gap
import experiments.frontier.limit
import experiments.frontier.unit
import experiments.make_pairs
import experiments.mistakes.__main__
import experiments.rewards
import experiments.winrate.__main__
import minidpo.dataset
import minidpo.files.writing
import minidpo.run
import minidpo.sampling
import minidpo.scale.weights
import train_dpo
import train_sft
from minidpo import checkpoint
from minidpo.files.writing import atomic, atomic_write, claim
from minidpo.report import read_metrics
from minidpo.settings import NEW, UserError, at_end

SHORT = ("--batch-size", 6, "--warmup-steps", 2, "--samples", 1, "--sample-tokens", 3)
MAINS = {"sft": train_sft.main, "dpo": train_dpo.main}
STAGES = pytest.mark.parametrize("stage", list(MAINS))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data of `write_data` and `start`, an SFT model."""
    folder = tmp_path_factory.mktemp("lost")
    write_data(folder)
    call(train_sft.main, "--data", folder / "sft.jsonl", "--out", folder / "start", "--preset", "toy", *SHORT)
    return folder


def flags_of(stage, home, out, *flags):
    data = home / {"sft": "sft.jsonl", "dpo": "pairs.jsonl"}[stage]
    return ("--data", data, "--init", home / "start", "--out", out, *SHORT, *flags)


@pytest.fixture(params=list(MAINS))
def old(request, home, tmp_path):
    """(stage, folder of a finished run of it)."""
    call(MAINS[request.param], *flags_of(request.param, home, tmp_path / "run", "--epochs", 1))
    return request.param, tmp_path / "run"


def wait_for(condition):
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


# ---- --overwrite ----


def test_a_run_that_fails_before_its_first_save_leaves_the_old_one(home, old, capsys):
    stage, out = old
    before = contents(out.parent)
    message = fails(capsys, MAINS[stage], *flags_of(stage, home, out, "--overwrite", "--lr", 1e18, "--epochs", 9))
    assert "not a finite number" in message
    assert {name: data for name, data in contents(out.parent).items() if "reference_logps" not in name} == {
        name: data for name, data in before.items() if "reference_logps" not in name
    }


def test_a_run_that_is_killed_before_its_first_save_leaves_the_old_one(home, old):
    stage, out = old
    for mine in ("new/settings.json", "download.part"):  # the user's own: nobody touches them
        (out / mine).parent.mkdir(exist_ok=True)
        (out / mine).write_text("mine")
    before, log = contents(out), out.parent / "log"
    flags = flags_of(stage, home, out, "--overwrite", "--seed", 1)
    assert start_stage(stage, flags, log, doom=("step", 3, 0)).join() == -signal.SIGKILL
    assert {name: data for name, data in contents(out).items() if not name.startswith(NEW)} == before
    assert start_stage(stage, flags, log).join() == 0, log.read_text(encoding="utf-8")
    assert set(contents(out)) == set(before) and json.loads((out / "settings.json").read_text())["seed"] == 1
    assert not (out / NEW).exists() and not list(out.parent.glob("*.lock"))


@pytest.mark.parametrize("moment", range(7))
def test_a_run_that_is_killed_while_it_replaces_the_old_one_goes_on(home, old, monkeypatch, moment):
    """Three files are removed and four are moved. Whatever was done, --resume finds the new run whole."""
    stage, out = old
    calls = iter(range(99))

    def deadly(function):
        def call_or_die(path, *args):
            if out in path.parents and (NEW in path.parts or not args) and next(calls) == moment:
                raise KeyboardInterrupt
            return function(path, *args)

        return call_or_die

    replaces = minidpo.run.Run._replace

    def replace_and_die(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(minidpo.run.os, "replace", deadly(os.replace))
            patch.setattr(minidpo.run.Path, "unlink", lambda p, missing_ok: deadly(os.unlink)(p) if p.exists() else 0)
            replaces(self)

    monkeypatch.setattr(minidpo.run.Run, "_replace", replace_and_die)
    monkeypatch.setattr(minidpo.run, "at_end", at_end_of_nobody := type(at_end)())
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        call(MAINS[stage], *flags_of(stage, home, out, "--overwrite", "--seed", 1, "--max-steps", 2))
    at_end_of_nobody.pop_all()  # the process is dead: it does nothing at its end
    monkeypatch.undo()
    call(MAINS[stage], "--out", out, "--resume", "--max-steps", 3)
    assert json.loads((out / "settings.json").read_text())["seed"] == 1
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3] and not (out / NEW).exists()


# ---- two processes ----


def test_two_processes_on_one_folder(home, tmp_path, capsys, monkeypatch):
    out, log = tmp_path / "run", tmp_path / "log"
    first = start_stage("sft", flags_of("sft", home, out, "--epochs", 500, "--save-every", 2), log)
    wait_for(lambda: len(read_metrics(out)) > 3)
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(out)
    for spelled in (out, f"{out}/", tmp_path / "link", ".", "../run"):
        for stage, *flags in (("dpo", "--overwrite"), ("sft", "--resume"), ("dpo",)):
            message = fails(capsys, MAINS[stage], *flags_of(stage, home, spelled, *flags))
            assert (
                f"{spelled}".rstrip("/") in message
                and f"in use by process {first.pid} on {os.uname().nodename}. Wait" in message
            )
    os.kill(first.pid, signal.SIGTERM)
    first.join()
    state = checkpoint.load(out)[2]
    assert state["step"] == len(read_metrics(out)) and not list(tmp_path.glob("*.lock"))
    again = start_stage("sft", flags_of("sft", home, out, "--resume", "--epochs", 500), log)
    wait_for(lambda: len(read_metrics(out)) > state["step"] + 2)
    os.kill(again.pid, signal.SIGKILL)  # the lock dies with its process
    again.join()
    call(train_sft.main, *flags_of("sft", home, out, "--overwrite"))
    assert not list(tmp_path.glob("*.lock"))


def hold(path, seconds):
    claim(path)
    print("claimed", flush=True)
    time.sleep(float(seconds))


@pytest.mark.parametrize(
    ("main", "claimed", "flags"),
    [
        (experiments.frontier.__main__.main, "out", "--data toy --out out --sft start"),
        (
            experiments.frontier.unit.main,
            "out/units/dpo_0.7_0.json",
            "--method dpo --setting 0.7 --out out --sft start",
        ),
        (experiments.frontier.gap.main, "gap.csv", "--csv gap.csv"),
        (experiments.frontier.limit.main, "limit.csv", "--out limit.csv --reference start --data toy --reward toy"),
        (
            experiments.frontier.accuracy.main,
            "a.json",
            "--json a.json --policy x --reference x --reward-model x --data x",
        ),
        (experiments.evaluate.main, "e.json", "--json e.json --policy x --reference x --data toy --reward toy"),
        (experiments.rewards.main, "out", "--out out --train x.jsonl"),
        (experiments.mistakes.__main__.main, "out", "--curves out"),
        (experiments.winrate.__main__.main, "out", "--out out --run start --data toy --judge toy"),
        (experiments.bench.__main__.main, "cache", "--cache cache --shapes trial"),
        (experiments.make_pairs.main, "out.jsonl", "--out out.jsonl --policy start --prompts toy --reward toy"),
        (minidpo.scale.weights.main, "out", "--out out --run start"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_every_command_that_writes_results_takes_part(tmp_path, monkeypatch, capsys, main, claimed, flags):
    monkeypatch.chdir(tmp_path)
    holder = start(hold, tmp_path / claimed, 60, log=tmp_path / "log")
    (tmp_path / "log").touch()
    wait_for(lambda: (tmp_path / "log").read_text() == "claimed\n")
    before = contents(tmp_path)
    assert f"in use by process {holder.pid}" in fails(capsys, main, *flags.split())
    assert contents(tmp_path) == before
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()


def test_a_lock_that_its_owner_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between our open and our lock, the owner ended and another process may have made a new lock file."""
    path, flock = tmp_path / "file", minidpo.files.writing.fcntl.flock
    (tmp_path / "file.lock").write_text("1")

    def late(file, how):
        if (tmp_path / "file.lock").read_text() == "1":
            (tmp_path / "file.lock").unlink()
        flock(file, how)

    monkeypatch.setattr(minidpo.files.writing.fcntl, "flock", late)
    claim(path)
    other = start(hold, path, 0, log=tmp_path / "log")
    assert other.join() == 1 and f"in use by process {os.getpid()}" in (tmp_path / "log").read_text()
    at_end.close()
    assert not (tmp_path / "file.lock").exists()
    assert start(hold, path, 0, log=tmp_path / "log").join() == 0


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(minidpo.files.writing.fcntl, "flock", no_locks)
    claim(tmp_path / "file")
    monkeypatch.setattr(minidpo.files.writing, "fcntl", None)  # Windows
    claim(tmp_path / "other")


def write_slowly(path, text, seconds):
    with atomic(path) as file:
        file.write(text.encode())
        print("writing", flush=True)
        time.sleep(float(seconds))
        file.write(text.encode())


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "cache" / "file"
    writers = [start(write_slowly, path, text, 0.3, log=tmp_path / text) for text in "abc"]
    assert [writer.join() for writer in writers] == [0, 0, 0]
    assert path.read_text() in ("aa", "bb", "cc") and [p.name for p in path.parent.iterdir()] == ["file"]


def test_runs_of_a_sweep_share_the_reference(home, tmp_path):
    """The use that README proposes: several betas at once, on one cached reference."""
    logs = {beta: tmp_path / f"log{beta}" for beta in ("0.1", "0.3", "1.0")}
    runs = [start_stage("dpo", flags_of("dpo", home, tmp_path / b, "--beta", b), log) for b, log in logs.items()]
    for run, log in zip(runs, logs.values(), strict=True):
        assert run.join() == 0, log.read_text(encoding="utf-8")
    assert len(list((tmp_path / "reference_logps").iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning(home, tmp_path, capsys):
    (tmp_path / "reference_logps").write_text("not a folder")
    call(train_dpo.main, *flags_of("dpo", home, tmp_path / "run"))
    assert f"warning: {tmp_path / 'reference_logps'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.md").exists()


def make_toy(folder):
    from data.toy_sentiment.generate import ensure

    ensure(folder, {"prompts_test": 3, "pairs_test": 200})


def test_the_toy_made_by_several_processes_at_once(tmp_path):
    makers = [start(make_toy, tmp_path / "toy", log=tmp_path / "log") for _ in range(4)]
    assert [maker.join() for maker in makers] == [0] * 4, (tmp_path / "log").read_text()
    names = {path.name for path in (tmp_path / "toy").iterdir()}
    assert names == {"prompts_test.jsonl", "pairs_test.jsonl", "fingerprint.txt"}


@STAGES
@pytest.mark.parametrize("how", [(), ("--overwrite",)])
def test_out_is_the_model_to_start_from(home, tmp_path, capsys, monkeypatch, stage, how):
    shutil.copytree(home / "start", tmp_path / "start")
    (tmp_path / "start" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    flags = [*flags_of(stage, home, "start", *how)]
    before = contents(tmp_path)
    for spelled in ("start", "./start/", tmp_path / "start", "link", "start/../link"):
        flags[flags.index("--init") + 1] = spelled
        message = fails(capsys, MAINS[stage], *flags)
        assert ("--out is the model to start from" in message) or not how and "already holds a run" in message
        for name in ("settings.json", "checkpoint.pt", "bpe.json"):  # a Hugging Face folder has none of our files
            (tmp_path / "start" / name).rename(tmp_path / name)
        held = [p for p in (tmp_path / "start").iterdir() if p.name != "config.json"]
        for path in held:
            path.rename(tmp_path / path.name)
        assert "--out is the model to start from" in fails(capsys, MAINS[stage], *flags)
        for path in (*held, *(tmp_path / "start" / n for n in ("settings.json", "checkpoint.pt", "bpe.json"))):
            (tmp_path / path.name).rename(tmp_path / "start" / path.name)
    assert contents(tmp_path) == before


# ---- --resume ----


def test_what_a_resumed_run_may_change(home, tmp_path, capsys, monkeypatch):
    """Paths in another spelling, another folder to start in, and what changes no result by more than rounding."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home, tmp_path / "a")
    flags = ("--data", "a/pairs.jsonl", "--init", "a/start", "--eval-data", "a/held_out.jsonl", *SHORT)
    call(train_dpo.main, *flags, "--out", "run", "--max-steps", 1)
    capsys.readouterr()
    other_paths = ("--data", tmp_path / "a/pairs.jsonl", "--init", "start/", "--eval-data", "./held_out.jsonl")
    rounding = ("--micro-batch-size", 2, "--micro-tokens", 200, "--recompute", "--fast", "--device", "cpu")
    monkeypatch.chdir(tmp_path / "a")
    call(train_dpo.main, *other_paths, *rounding, "--out", "../run", "--resume", "--max-steps", 2)
    out = capsys.readouterr().out
    assert "--micro-batch-size 2 differs from the 0 in" in out and "differ by rounding" in out
    assert out.count("From here on") == 4  # --device cpu was the device
    call(train_dpo.main, "--out", tmp_path / "run", "--resume", "--max-steps", 3)  # --out alone is enough
    call(train_dpo.main, "--out", tmp_path / "run", "--resume", "--max-steps", 0, "--epochs", 2)
    assert "The learning rate now follows the new number of steps" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))
    before = contents(tmp_path)
    for changed in (("--beta", 0.2), ("--init", "../other"), ("--data", "held_out.jsonl"), ("--seed", 1)):
        message = fails(capsys, train_dpo.main, "--out", "../run", "--resume", "--epochs", 3, *changed)
        assert f"{changed[0]} {changed[1]} differs from the" in message
    (tmp_path / "a/pairs.jsonl").write_bytes((tmp_path / "a/held_out.jsonl").read_bytes())
    before["a/pairs.jsonl"] = before["a/held_out.jsonl"]
    message = fails(capsys, train_dpo.main, "--out", "../run", "--resume", "--epochs", 3)
    assert "was started with other data" in message and contents(tmp_path) == before


def test_a_run_begun_on_cuda_goes_on_here(home, tmp_path, capsys, monkeypatch):
    call(train_sft.main, *flags_of("sft", home, tmp_path / "run", "--max-steps", 1))
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    (tmp_path / "run/settings.json").write_text(json.dumps(settings | {"device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resume = ("--out", tmp_path / "run", "--resume", "--max-steps", 2)
    assert "Add --device auto" in fails(capsys, train_sft.main, *resume)
    call(train_sft.main, *resume, "--device", "auto")
    assert len(read_metrics(tmp_path / "run")) == 2


# ---- the command line ----


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (("--bata", 0.1), "unknown flag '--bata'. Did you mean '--data' or '--beta'"),
        (("--data", "toy", "--learning_rate=3"), "unknown flag '--learning_rate'"),
        (("toy",), "unknown flag 'toy'"),
        (("--data", "toy"), "--init and --out must be given"),
        (("--data", "toy", "--init", "x", "--out", ""), "--out must be given"),
        (("--resume",), "error: --out must be given"),
    ],
)
def test_flags_that_are_wrong_or_missing(tmp_path, monkeypatch, capsys, argv, what):
    monkeypatch.chdir(tmp_path)
    assert what in fails(capsys, train_dpo.main, *argv) and not contents(tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_is_not_utf8(home, tmp_path, monkeypatch, encoding):
    rows = '{"prompt": "Ж", "chosen": " é 漢", "rejected": " ∎"}\n' * 3
    (tmp_path / "pairs.jsonl").write_text(rows, encoding="utf-8")
    for main, *argv in (
        (minidpo.dataset.main, tmp_path / "pairs.jsonl"),
        (minidpo.sampling.main, "--run", home / "start", "--prompt", "Жé漢", "--max-new-tokens", 9),
        (train_dpo.main, "--data", tmp_path / "pairs.jsonl", "--init", home / "start", "--out", tmp_path / "Ж", *SHORT),
        (train_dpo.main, "--data", tmp_path / "漢.jsonl", "--init", home / "start", "--out", tmp_path / "new"),
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with contextlib.suppress(SystemExit):
            call(main, *argv)
        shown = b"".join((stream.flush(), stream.buffer.getvalue())[1] for stream in streams)
        monkeypatch.undo()
        assert b"?" in shown and b"Traceback" not in shown


def test_every_help_on_a_console_that_is_not_utf8(monkeypatch):
    """Every command is tried: a module with a line that calls run_main."""
    root, tried = Path(train_dpo.__file__).parent, 0
    for path in sorted(p for name in ("minidpo", "data", "experiments", "course") for p in (root / name).rglob("*.py")):
        if "\n    run_main(main)" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
        stream = io.TextIOWrapper(io.BytesIO(), "ascii")
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdout", stream)
            call(module.main, "--help")
        stream.flush()
        assert not stop.value.code and b"usage:" in stream.buffer.getvalue(), path
        tried += 1
    assert tried > 20


# ---- chaos ----


def read(folder):
    """Loads a run as `--init` does, if there is one."""
    if checkpoint.exists(folder):
        try:
            checkpoint.load(folder)
        except UserError as error:  # replaced between two lines
            assert "not found" in str(error) or "neither" in str(error)


def whole(folder):
    """Asserts that the files of a run belong together: weights, log and settings of one run."""
    _, _, state = checkpoint.load(folder)
    settings = json.loads((folder / "settings.json").read_text())
    lines = read_metrics(folder)
    assert [line["step"] for line in lines][: state["step"]] == list(range(1, state["step"] + 1))
    assert lines[0]["lr"] == pytest.approx(settings["lr"] / 2)  # of the same run: every run has its own rate
    assert state["optimizer"]["param_groups"][0]["lr"] == lines[state["step"] - 1]["lr"]


def test_chaos(home, tmp_path):
    """20 rounds of four processes in one folder."""
    draw, out, log = random.Random(0), tmp_path / "runs" / "run", tmp_path / "log"
    out.parent.mkdir()
    ended = {}
    for _ in range(20):
        processes = []
        for _ in range(4):
            how = draw.choice(["--overwrite", "--overwrite", "--resume", "read"])
            if how == "read":
                processes.append((how, start(read, out, log=log)))
            else:
                fresh = ("--lr", draw.uniform(1e-5, 1e-3), "--epochs", 2) if how == "--overwrite" else ()
                flags = flags_of("sft", home, out, how, *fresh) if fresh else ("--out", out, how, "--epochs", 99)
                doom = draw.choice([None, None, "step", "save", "move", "begin", "finish"])
                doom = doom and (doom, draw.randint(1, 3) if doom in ("step", "save", "move") else 1, draw.randrange(9))
                flags = (
                    *flags,
                    "--save-every",
                    draw.randint(1, 4),
                    *(("--max-steps", draw.randint(5, 60)) if how == "--resume" else ()),
                )
                processes.append((how, start_stage("sft", flags, log, doom=doom)))
            time.sleep(draw.uniform(0, 0.1))
        for how, process in processes:
            code = process.join()
            ended[how, code] = ended.get((how, code), 0) + 1
            assert code in ((0,) if how == "read" else (0, 2, -signal.SIGKILL)), log.read_text(encoding="utf-8")[-3000:]
        if checkpoint.exists(out):
            whole(out)
    print(ended)
    assert "Traceback" not in log.read_text(encoding="utf-8")
    call(train_sft.main, *flags_of("sft", home, out, "--overwrite", "--lr", 1e-4))
    whole(out)
    assert {path.name for path in out.parent.iterdir()} == {"run"}
    assert {path.name for path in out.iterdir()} == set(minidpo.run.WRITTEN) - {"curves.png"}


def test_atomic_write_replaces_whole_files(tmp_path):
    atomic_write(tmp_path / "a", "one")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a") as file:
        file.write(b"two")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"a": b"one"}
