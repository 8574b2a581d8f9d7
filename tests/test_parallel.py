"""Two processes on one CPU, over gloo: together they make the run that one process makes.

Two runs go through torchrun, as people start them. The rest takes forks that are told what torchrun would tell them.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from children import start, start_stage
from tiny import call, write_data, write_jsonl

import train_dpo
import train_sft
from minidpo import checkpoint, dataset
from minidpo.model import GPT, GPTConfig
from minidpo.report import read_metrics
from minidpo.scale import fast, parallel

ROOT = Path(train_dpo.__file__).parent
# 22 pairs or 25 rows: the last batch of an epoch has 1 or 4, so that a process can be left without a pair, and
# micro-batches of 4 divide neither the 11 nor the 10 of the other batches
FLAGS = ("--batch-size", 21, "--micro-batch-size", 4, "--epochs", 3, "--warmup-steps", 2, "--lr", 1e-3)
FLAGS = (*FLAGS, "--eval-every", 2, "--samples", 2, "--sample-tokens", 5)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data of `write_data` and `start`, an SFT model in float64, where rounding hides nothing."""
    folder = tmp_path_factory.mktemp("parallel")
    write_data(folder)
    flags = ("--preset", "toy", "--epochs", 1, "--batch-size", 6, "--samples", 1, "--sample-tokens", 2)
    call(train_sft.main, "--data", folder / "sft.jsonl", "--out", folder / "sft", *flags)
    model, tokenizer, _ = checkpoint.load(folder / "sft")
    checkpoint.save(folder / "start", model.double(), tokenizer)
    return folder


def flags_of(stage, home, out, *flags):
    rows, held_out = {"sft": ("sft", "sft_held_out"), "dpo": ("pairs", "held_out")}[stage]
    given = ("--data", home / f"{rows}.jsonl", "--eval-data", home / f"{held_out}.jsonl", "--init", home / "start")
    return (*given, "--out", out, *FLAGS, *flags)


def torchrun(script, *flags):
    """Two processes, started as people start them, at a port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *flags]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def told():
    """What torchrun tells its two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]


def by_two(stage, flags, folder, dooms=(None, None)):
    """Both processes of a run, what they print in folder/log0 and log1; waits for them and returns their exit codes."""
    children = [start_stage(stage, flags, folder / f"log{r}", told_to, dooms[r]) for r, told_to in enumerate(told())]
    return [child.join() for child in children]


def assert_same_run(one, two):
    """Weights, optimiser state and metrics up to rounding, which in float64 leaves nine digits; the same samples."""
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, two)]
    assert list(saved[0]["model"]) == list(saved[1]["model"])  # trap 19: no `module.` in front
    for part in (lambda s: s["model"], lambda s: s["state"]["optimizer"]["state"]):
        torch.testing.assert_close(part(saved[1]), part(saved[0]), rtol=1e-9, atol=1e-12)
    metrics = [
        [{k: v for k, v in m.items() if not k.endswith("_per_second")} for m in read_metrics(folder)]
        for folder in (one, two)
    ]
    assert len(metrics[0]) == len(metrics[1]) == 6
    for first in (metrics[0][0], metrics[1][0]):
        if abs(first.get("rewards/margins", 1)) < 1e-12:  # at the start every pair is a tie up to rounding
            del first["rewards/accuracies"]
    for a, b in zip(*metrics, strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-12)
    assert (one / "samples.md").read_bytes() == (two / "samples.md").read_bytes()
    names = [{path.name for path in folder.iterdir()} - {"curves.png"} for folder in (one, two)]
    assert names[0] == names[1]


def wait_for_steps(folder, n):
    give_up = time.monotonic() + 300
    while len(read_metrics(folder)) < n:
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_trap19_dpo_under_torchrun_is_the_run_of_one_process(home, tmp_path):
    call(train_dpo.main, *flags_of("dpo", home, tmp_path / "one" / "run"))
    process = torchrun("train_dpo.py", *flags_of("dpo", home, tmp_path / "two" / "run"))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "one" / "run", tmp_path / "two" / "run")
    (one,), (two,) = ((tmp_path / name / "reference_logps").iterdir() for name in ("one", "two"))
    assert one.name == two.name  # either run may use the other's
    one, two = (torch.load(path, weights_only=True)["tensor"] for path in (one, two))
    assert torch.equal(one, two)
    # one of them speaks
    assert [out.count(said) for said in ("settings paper: ", "report: ", "log-ratios within")] == [1, 1, 1]
    assert err.count("dpo:   0%") == 1


def test_sft_by_two_is_the_run_of_one_process(home, tmp_path):
    call(train_sft.main, *flags_of("sft", home, tmp_path / "one"))
    assert by_two("sft", flags_of("sft", home, tmp_path / "two"), tmp_path) == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "log1").read_bytes() == b""


@pytest.mark.parametrize(("stage", "main"), [("sft", train_sft.main), ("dpo", train_dpo.main)])
def test_one_row_for_two_processes(home, tmp_path, stage, main):
    """One of them has nothing to do in any step."""
    row = {"prompt": "The film", "completion": " is fun.", "chosen": " is fun.", "rejected": " is dull."}
    data = write_jsonl(tmp_path / "one.jsonl", [row])
    flags = ("--data", data, "--init", home / "start", "--epochs", 6, "--warmup-steps", 2, "--lr", 1e-3)
    call(main, *flags, "--out", tmp_path / "one" / "run")
    assert by_two(stage, (*flags, "--out", tmp_path / "two" / "run"), tmp_path) == [0, 0]
    assert_same_run(tmp_path / "one" / "run", tmp_path / "two" / "run")


def test_an_error_is_shown_once(home, tmp_path):
    process = torchrun("train_dpo.py", *flags_of("dpo", home, tmp_path / "run", "--beta", 0))
    _, err = process.communicate(timeout=300)
    assert process.returncode and err.count("error: --beta 0.0: must be above 0") == 1


def test_ctrl_c_stops_both_after_the_same_step_and_one_process_goes_on(home, tmp_path):
    flags = flags_of("dpo", home, tmp_path / "run", "--epochs", 10_000)
    process = torchrun("train_dpo.py", *flags)
    wait_for_steps(tmp_path / "run", 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    _, _, state = checkpoint.load(tmp_path / "run")
    assert process.returncode != 0
    assert set(re.findall(r"stopped after step (\d+) and saved", err)) == {str(state["step"])}
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == list(range(1, state["step"] + 1))
    steps = ("--max-steps", state["step"] + 2)
    call(train_dpo.main, *flags, *steps, "--resume")
    call(train_dpo.main, *flags_of("dpo", home, tmp_path / "whole", "--epochs", 10_000), *steps)
    weights = [dict(checkpoint.load(tmp_path / name)[0].state_dict()) for name in ("run", "whole")]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("one", [0, 1])
def test_a_signal_to_one_stops_both_after_the_same_step(home, tmp_path, one):
    flags = flags_of("dpo", home, tmp_path / "run", "--epochs", 10_000)
    children = [start_stage("dpo", flags, tmp_path / f"log{r}", told_to) for r, told_to in enumerate(told())]
    wait_for_steps(tmp_path / "run", 3)
    os.kill(children[one].pid, signal.SIGTERM)
    assert [child.join() for child in children] == [2, 2]
    step = checkpoint.load(tmp_path / "run")[2]["step"]
    assert len(read_metrics(tmp_path / "run")) == step
    for rank in (0, 1):
        assert f"stopped after step {step} and saved" in (tmp_path / f"log{rank}").read_text(encoding="utf-8")


def test_a_process_that_dies_takes_the_other_with_it(home, tmp_path):
    """Killed in its third step, in the midst of an exchange; what was saved before is there to go on from, by two."""
    flags = flags_of("dpo", home, tmp_path / "run", "--save-every", 1)
    codes = by_two("dpo", flags, tmp_path, dooms=(None, ("step", 3, 200)))
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    assert checkpoint.load(tmp_path / "run")[2]["step"] in (1, 2)  # the other may have been in the midst of saving
    assert by_two("dpo", (*flags, "--resume"), tmp_path) == [0, 0]
    call(train_dpo.main, *flags_of("dpo", home, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_error_that_both_meet_ends_both(home, tmp_path):
    assert by_two("dpo", flags_of("dpo", home, tmp_path / "run", "--max-length", 2), tmp_path) == [2, 2]
    for rank in (0, 1):
        assert (tmp_path / f"log{rank}").read_text(encoding="utf-8").count("error: ") == 1


# ---- the functions ----


def in_two(function, folder):
    """[what function() gives in process 0, in process 1]."""
    children = [
        start(in_one, function.__name__, folder / str(rank), log=folder / f"log{rank}", environment=told_to)
        for rank, told_to in enumerate(told())
    ]
    for rank, child in enumerate(children):
        assert child.join() == 0, (folder / f"log{rank}").read_text(encoding="utf-8")
    return [torch.load(folder / str(rank), weights_only=True) for rank in (0, 1)]


def in_one(name, path):
    with parallel.joined():
        torch.save(globals()[name](), path)


def model_and_rows():
    model = GPT(GPTConfig(23, 16, 2, 2, 8), torch.Generator().manual_seed(0)).double()
    draw = torch.Generator().manual_seed(1)
    rows = [
        tuple(torch.randint(23, (int(n),), generator=draw).tolist() for n in torch.randint(1, 6, (3,), generator=draw))
        for _ in range(5)
    ]
    return model, rows


def reaching_in(model, batch):
    """Log-probs by a function that uses the model's parts and never calls the model."""
    sums = []
    for rows in batch:
        hidden = model.wte(rows.ids) + model.wpe.weight[: rows.ids.shape[1]]
        for block in model.h:
            hidden = hidden + block.mlp(block.ln_2(hidden + block.attn(block.ln_1(hidden))))
        logps = train_dpo.token_logps(model.logits(model.ln_f(hidden)), rows.targets)
        sums.append((logps * rows.mask).sum(-1))
    return sums


def a_step(function, n, size):
    """Gradient of the mean margin over `n` pairs in micro-batches of `size`, and how often gradients were exchanged."""
    model, rows = model_and_rows()
    exchanges, all_reduce = [], dist.all_reduce
    mine = parallel.share(list(range(n)))
    with mock.patch.object(dist, "all_reduce", lambda *args, **how: exchanges.append(1) or all_reduce(*args, **how)):
        for i in range(0, len(mine), size):
            chosen, rejected = function(model, dataset.preference_batch([rows[j] for j in mine[i : i + size]]))
            ((chosen - rejected).sum() / n).backward()
        parallel.sum_gradients(model)
    return torch.nn.utils.parameters_to_vector(p.grad for p in model.parameters()), len(exchanges)


def steps():
    functions = (train_dpo.response_logps, fast.response_logps, reaching_in)
    return [a_step(function, n, size) for function in functions for n in (5, 4, 1) for size in (1, 2, 9)]


def test_trap10_gradients_are_the_mean_over_the_pairs_of_all_exchanged_once(tmp_path):
    """Whatever function computes the log-probs, however many pairs each process has: 3 and 2, 2 and 2, 1 and none."""
    alone, both = steps(), in_two(steps, tmp_path)
    for (expected, none), (first, one), (second, other) in zip(alone, *both, strict=True):
        torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-14)
        assert torch.equal(first, second) and (none, one, other) == (0, 1, 1)


def draws():
    parallel.seed(3, 7)
    first = torch.rand(4)
    parallel.seed(3, 8)
    second = torch.rand(4)
    parallel.seed(3, 7)
    flag = parallel.anywhere(parallel.rank() == 1), parallel.anywhere(False)
    shares = parallel.share([10, 11, 12]), parallel.all_sum(float(parallel.rank() + 1)), parallel.all_sum(torch.ones(2))
    return dict(first=first, second=second, again=torch.rand(4), flag=flag, shares=shares)


def test_shares_totals_flags_and_seeds(tmp_path):
    first, second = in_two(draws, tmp_path)
    for one in (first, second):
        assert torch.equal(one["first"], one["again"]) and not torch.equal(one["first"], one["second"])
        assert one["flag"] == (True, False)
        assert one["shares"][1] == 3.0 and one["shares"][2].tolist() == [2.0, 2.0]
    assert not torch.equal(first["first"], second["first"])  # dropout differs between them
    assert (first["shares"][0], second["shares"][0]) == ([10, 12], [11])
    alone = draws()
    assert alone["shares"][:2] == ([10, 11, 12], 1.0) and torch.equal(alone["first"], first["first"])
