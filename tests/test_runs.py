"""Both training stages as commands, on a model of 24,000 weights: what they write, that runs repeat and resume."""

import ast
import dataclasses
import errno
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import call, contents, fails, write_data

import minidpo.checkpoint
import minidpo.files.writing
import train_dpo
import train_sft
from minidpo import checkpoint, dataset
from minidpo.model import GPT, GPTConfig
from minidpo.optim import learning_rate, make_optimizer
from minidpo.report import read_metrics, running_mean
from minidpo.run import CatchInterrupt
from minidpo.sampling import complete
from minidpo.settings import parse_settings, settings_of
from minidpo.tokenizer import Tokenizer

ROOT = Path(train_dpo.__file__).parent
RUN_FILES = {"settings.json", "bpe.json", "checkpoint.pt", "metrics.jsonl", "samples.md", "report.md"}
# 25 rows or 22 pairs in batches of 6 are epochs of 5 or 4 steps, the last of 1 or 4; the rate rises for 3 steps
SHORT = ("--batch-size", 6, "--epochs", 4, "--warmup-steps", 3, "--samples", 2, "--sample-tokens", 5)
SFT = ("--preset", "toy", *SHORT, "--lr", 3e-3)
DPO = (*SHORT, "--lr", 1e-3)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data of `write_data` and `sft`, a run of stage 1."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder)
    call(train_sft.main, "--data", folder / "sft.jsonl", "--out", folder / "sft", *SFT)
    return folder


def sft(home, out, *flags, **how):
    own = SFT[2:] if "--init" in flags else SFT  # a model to start from has its own shape
    call(train_sft.main, "--data", home / "sft.jsonl", "--out", out, *own, *flags, **how)


def dpo(home, out, *flags, **how):
    call(train_dpo.main, "--data", home / "pairs.jsonl", "--init", home / "sft", "--out", out, *DPO, *flags, **how)


STAGES = pytest.mark.parametrize("stage", [sft, dpo])


def state_of(folder):
    """All that checkpoint.pt holds: shape, weights, optimiser state and the rest."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def metrics_of(folder):
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in line.items() if not k.endswith("_per_second")} for line in read_metrics(folder)]


def equal(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def same_run(a, b):
    samples = [(folder / "samples.md").read_bytes() for folder in (a, b)]
    return equal(state_of(a), state_of(b)) and metrics_of(a) == metrics_of(b) and samples[0] == samples[1]


def same_weights(a, b):
    return equal(state_of(a)["model"], state_of(b)["model"])


# ---- what a run writes ----


def test_both_stages_from_scratch_to_report(tmp_path, capsys):
    write_data(tmp_path)
    sft(tmp_path, tmp_path / "sft", "--eval-data", tmp_path / "sft_held_out.jsonl", draw=True)
    dpo(tmp_path, tmp_path / "dpo", "--eval-data", tmp_path / "held_out.jsonl", "--eval-every", 5, draw=True)
    for name in ("sft", "dpo"):
        assert {path.name for path in (tmp_path / name).iterdir()} == RUN_FILES | {"curves.png"}
        assert (tmp_path / name / "curves.png").read_bytes().startswith(b"\x89PNG")
        report = (tmp_path / name / "report.md").read_text(encoding="utf-8")
        assert "![curves](curves.png)" in report and "| loss |" in report and '"batch_size": 6' in report
        assert str(tmp_path / name / "report.md") in capsys.readouterr().out or name == "dpo"

    first = {"step", "loss", "grad_norm", "lr", "tokens_per_second"}
    preferences = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    preferences |= {"loss", "logps/chosen", "logps/rejected"}
    stage1, stage2 = read_metrics(tmp_path / "sft"), read_metrics(tmp_path / "dpo")
    assert [m["step"] for m in stage1] == list(range(1, 21)) and [m["step"] for m in stage2] == list(range(1, 17))
    assert all(set(m) == first for m in stage1[:-1]) and set(stage1[-1]) == first | {"eval/loss"}
    for m in stage2:
        held_out = {f"eval/{name}" for name in preferences} if m["step"] in (5, 10, 15, 16) else set()
        assert set(m) == first | {"pairs_per_second"} | preferences | held_out

    # both learn: the text, and then which side was chosen
    assert stage1[-1]["loss"] < stage1[0]["loss"] - 0.5
    assert stage2[-1]["rewards/margins"] > 0.2 and stage2[-1]["rewards/accuracies"] == 1
    header = (tmp_path / "dpo" / "samples.md").read_text(encoding="utf-8").splitlines()[2]
    assert header == "| prompt | before | after |"


def test_settings_are_printed_and_saved(home, tmp_path, capsys):
    dpo(home, tmp_path / "dpo", "--beta", 0.25, "--max-steps", 1)
    saved = json.loads((tmp_path / "dpo" / "settings.json").read_text(encoding="utf-8"))
    out = capsys.readouterr().out
    assert (saved["beta"], saved["batch_size"], saved["optimizer"], saved["settings"]) == (0.25, 6, "rmsprop", "paper")
    (line,) = [line for line in out.splitlines() if line.startswith("settings paper: ")]
    assert all(f"{name} {saved[name]!r}" in line for name in ("data", "init", "out", "beta", "batch_size", "max_steps"))
    assert "label_smoothing" not in line and line.endswith("The others have their defaults.")


def test_without_matplotlib_a_line_says_so(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    dpo(home, tmp_path / "dpo", "--max-steps", 1, draw=True)
    assert "no curves.png: matplotlib is not installed" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "dpo").iterdir()} == RUN_FILES
    assert "curves.png" not in (tmp_path / "dpo" / "report.md").read_text(encoding="utf-8")


def test_curves_are_smoothed_without_lag():
    """A straight line stays itself, and a single peak stays where it is."""
    assert running_mean([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], reach=2) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert running_mean([0.0, 0.0, 0.0, 6.0, 0.0, 0.0, 0.0], reach=1) == [0.0, 0.0, 2.0, 2.0, 2.0, 0.0, 0.0]
    assert running_mean([5.0], reach=3) == [5.0]


def test_samples_before_are_the_sft_models_and_after_the_policys(home, tmp_path):
    dpo(home, tmp_path / "dpo")
    rows = (tmp_path / "dpo" / "samples.md").read_text(encoding="utf-8").splitlines()[4:]
    before, after = [], []
    for folder, texts in ((home / "sft", before), (tmp_path / "dpo", after)):
        model, tokenizer, _ = checkpoint.load(folder)
        prompts = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in ("The film", "This story")]
        texts += complete(model, tokenizer, prompts, 5, seed=0)
    shown = [[text.replace("|", "\\|").replace("\n", " ") for text in texts] for texts in (before, after)]
    assert rows == [f"| {p} | {b} | {a} |" for p, b, a in zip(("The film", "This story"), *shown, strict=True)]


# ---- the reference ----


def online(home, rows):
    """The SFT model's log-probabilities of each pair, one row at a time, token by token, in float64 -> (N, 2)."""
    model, _, _ = checkpoint.load(home / "sft")
    model.double().eval()
    with torch.no_grad():
        logps = []
        for prompt, *responses in rows:
            for response in responses:
                logits = model(torch.tensor([prompt + response[:-1]]))[0]
                at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
                logps.append(sum(logits[t].log_softmax(-1)[i].item() for t, i in zip(at, response, strict=True)))
    return torch.tensor(logps, dtype=torch.float64).view(-1, 2)


def test_trap08_log_ratios_are_0_before_the_first_update(home, tmp_path, capsys):
    dpo(home, tmp_path / "dpo", "--max-steps", 2)
    assert "before the first update: log-ratios within" in capsys.readouterr().out
    first, second = metrics_of(tmp_path / "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/rejected"]) < 1e-5
    assert second["rewards/margins"] > 1e-4


def test_trap08_reference_is_untouched_by_training(home, tmp_path):
    start = contents(home / "sft")
    dpo(home, tmp_path / "dpo")
    (cache,) = (tmp_path / "reference_logps").iterdir()
    kept = cache.read_bytes()
    dpo(home, tmp_path / "again", "--beta", 3)
    assert cache.read_bytes() == kept and contents(home / "sft") == start
    assert not same_weights(home / "sft", tmp_path / "dpo")
    state = state_of(tmp_path / "dpo")["state"]
    assert torch.equal(state["reference"], torch.load(cache, weights_only=True)["tensor"])


def test_trap08_start_is_checked_against_a_reference_from_elsewhere(home, tmp_path, capsys):
    dpo(home, tmp_path / "dpo", "--max-steps", 1)
    (cache,) = (tmp_path / "reference_logps").iterdir()
    torch.save({"tensor": torch.load(cache, weights_only=True)["tensor"] + 0.01}, cache)
    before = contents(tmp_path)
    message = fails(
        capsys, train_dpo.main, "--data", home / "pairs.jsonl", "--init", home / "sft", "--out", tmp_path / "new", *DPO
    )
    assert "0.01 nats from the reference" in message and "Likely causes" in message
    assert contents(tmp_path) == before
    dpo(home, tmp_path / "free", "--reference-free", "--max-steps", 1)  # counts the reference as 0: nothing to check
    assert "no check that policy and reference agree: no reference" in capsys.readouterr().out


def test_trap09_cached_equals_online(home, tmp_path):
    dpo(home, tmp_path / "dpo", "--max-steps", 1, "--eval-data", home / "held_out.jsonl")
    (cache,) = (tmp_path / "reference_logps").iterdir()
    _, tokenizer, _ = checkpoint.load(home / "sft")
    rows, held_out = (
        dataset.load_rows(home / f"{name}.jsonl", dataset.PAIR, tokenizer, 40) for name in ("pairs", "held_out")
    )
    cached = torch.load(cache, weights_only=True)["tensor"]
    torch.testing.assert_close(cached.double(), online(home, rows + held_out), rtol=1e-5, atol=1e-4)


def test_trap09_fingerprint_names_all_that_the_numbers_depend_on(home, tmp_path, capsys):
    pairs, start = home / "pairs.jsonl", home / "sft"

    def new_files(*flags, pairs=pairs, init=start):
        """How many files a run adds to the cache."""
        before = set((tmp_path / "reference_logps").glob("*"))
        new_files.runs += 1
        out = tmp_path / f"dpo{new_files.runs}"
        call(train_dpo.main, "--data", pairs, "--init", init, "--out", out, *DPO, "--max-steps", 1, *flags)
        return len(set((tmp_path / "reference_logps").glob("*")) - before)

    new_files.runs = 0
    assert new_files() == 1
    capsys.readouterr()
    assert new_files("--beta", 2, "--lr", 1e-4, "--seed", 3, "--optimizer", "adamw") == 0
    assert "using" in capsys.readouterr().out

    sft(home, tmp_path / "other", "--seed", 1)
    assert new_files(init=tmp_path / "other") == 1  # other weights
    lines = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    assert new_files(pairs=tmp_path / "other.jsonl") == 1  # other pairs
    assert new_files("--eval-data", home / "held_out.jsonl") == 1  # more pairs
    assert new_files("--max-length", 20) == 1  # other truncation
    assert new_files("--dtype", "bfloat16") == 1  # other precision
    assert new_files("--batch-size", 4) == 1  # other rounding: a run must not depend on which runs came before it

    model, tokenizer, _ = checkpoint.load(start)  # another tokeniser of the same size
    tokenizer.tokens[ord("a")], tokenizer.tokens[ord("b")] = b"b", b"a"
    checkpoint.save(tmp_path / "renamed", model, Tokenizer(tokenizer.tokens))
    assert new_files(init=tmp_path / "renamed") == 1


def test_trap09_one_bit_of_one_weight_changes_the_fingerprint():
    model = GPT(GPTConfig(vocab_size=7, block_size=5, n_layer=1, n_head=2, n_embd=4), torch.Generator().manual_seed(0))
    start = checkpoint.fingerprint(model, [1, 2], "float32")
    assert checkpoint.fingerprint(model, [1, 2], "float32") == start
    with torch.no_grad():
        for weight in model.parameters():
            kept = weight.view(-1)[-1].clone()
            weight.view(-1)[-1] = torch.nextafter(kept, torch.tensor(9.0))
            assert checkpoint.fingerprint(model, [1, 2], "float32") != start
            weight.view(-1)[-1] = kept
    assert checkpoint.fingerprint(model, [1, 2], "float32") == start
    assert checkpoint.fingerprint(model, [1, 3], "float32") != start
    assert checkpoint.fingerprint(model, [1, 2], "bfloat16") != start
    assert checkpoint.fingerprint(model.double(), [1, 2], "float32") != start


# ---- the same numbers again ----


def test_trap10_micro_batches_give_the_same_dpo_run(home, tmp_path):
    flags = (
        "--eval-data",
        home / "held_out.jsonl",
        "--max-steps",
        6,
    )  # the optimiser makes rounding grow with each step
    for size in (0, 1, 4):  # 4 does not divide the batch of 6
        dpo(home, tmp_path / str(size), "--micro-batch-size", size, *flags)
    runs = {size: metrics_of(tmp_path / str(size)) for size in (0, 1, 4)}
    for metrics in runs.values():
        del metrics[0]["rewards/accuracies"]  # all ties at first, broken by rounding
    for size in (1, 4):
        for a, b in zip(runs[0], runs[size], strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-5), f"micro batches of {size}, step {a['step']}"


def test_trap10_micro_batches_give_the_same_sft_run(home, tmp_path):
    """Rows differ in length: only if every token weighs the same is a cut batch the same batch."""
    for size in (0, 1, 4):
        sft(home, tmp_path / str(size), "--micro-batch-size", size)
    whole = metrics_of(tmp_path / "0")
    for size in ("1", "4"):
        for a, b in zip(whole, metrics_of(tmp_path / size), strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-5), f"micro batches of {size}, step {a['step']}"


def test_trap10_sft_loss_is_the_mean_over_response_tokens(home, tmp_path):
    """The first step of a run from the SFT model, against a loop over the tokens of its batch in float64."""
    sft(home, tmp_path / "more", "--init", home / "sft", "--max-steps", 1, "--micro-batch-size", 4)
    model, tokenizer, _ = checkpoint.load(home / "sft")
    rows = dataset.load_rows(home / "sft.jsonl", dataset.SFT, tokenizer, 40)
    total = tokens = 0
    with torch.no_grad():
        for i in dataset.batches(rows, 6, seed=0, epoch=0)[0]:
            prompt, response = rows[i]
            logps = model.double()(torch.tensor([prompt + response[:-1]]))[0].log_softmax(-1)
            total -= sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(response))
            tokens += len(response)
    assert metrics_of(tmp_path / "more")[0]["loss"] == pytest.approx(total / tokens, rel=1e-6)


def test_trap11_held_out_metrics_are_means_over_pairs_not_batches(home, tmp_path):
    settings = train_dpo.Settings("", "", "", batch_size=4, device="cpu", dtype="float32")
    policy, tokenizer, _ = checkpoint.load(home / "sft")
    rows = dataset.load_rows(home / "pairs.jsonl", dataset.PAIR, tokenizer, 40)  # 22: the last batch has 2
    reference = online(home, rows) + torch.linspace(-3, 3, 44).view(22, 2)  # a policy that has moved
    ratio = 0.1 * (online(home, rows) - reference)
    margins = ratio[:, 0] - ratio[:, 1]
    got = train_dpo.evaluate(policy, rows, reference, settings)
    assert got["eval/loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins.tolist()) / 22, abs=1e-5)
    assert got["eval/rewards/chosen"] == pytest.approx(ratio[:, 0].mean().item(), abs=1e-5)
    assert got["eval/rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert got["eval/rewards/accuracies"] == pytest.approx((margins > 0).double().mean().item())


def test_trap11_ties_are_half_a_win(home):
    settings = train_dpo.Settings("", "", "", device="cpu", dtype="float32")
    policy, _, _ = checkpoint.load(home / "sft")
    rows = [([299, 5], [6, 299], [6, 299])] * 3  # each response against itself
    got = train_dpo.evaluate(policy, rows, torch.zeros(3, 2), settings)
    assert got["eval/rewards/accuracies"] == 0.5


@STAGES
def test_trap17_evaluating_and_sampling_change_no_weights(home, tmp_path, stage):
    flags = ["--eval-data", home / ("sft_held_out.jsonl" if stage is sft else "held_out.jsonl")]
    chance = ("--dropout", 0.1) if stage is sft else ()  # the only one in the loop itself
    stage(home, tmp_path / "without", *chance, "--samples", 0)
    stage(home, tmp_path / "at the end", *chance, *flags, "--samples", 1, "--eval-every", 0)
    stage(home, tmp_path / "always", *chance, *flags, "--samples", 4, "--eval-every", 1)
    assert ["eval/loss" in m for m in metrics_of(tmp_path / "at the end")].count(True) == 1
    assert all("eval/loss" in m for m in metrics_of(tmp_path / "always"))
    assert same_weights(tmp_path / "without", tmp_path / "always")
    assert same_weights(tmp_path / "at the end", tmp_path / "always")


@STAGES
def test_same_seed_same_bits_other_seed_other_run(home, tmp_path, stage):
    stage(home, tmp_path / "a", "--seed", 5)
    torch.rand(3)  # whatever the process has drawn before
    stage(home, tmp_path / "b", "--seed", 5)
    stage(home, tmp_path / "c", "--seed", 6)
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert metrics_of(tmp_path / "a") != metrics_of(tmp_path / "c")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        (sft, ()),
        (sft, ("--dropout", 0.2)),
        (sft, ("--optimizer", "rmsprop", "--init", "HOME/sft")),
        (dpo, ("--decay",)),
        (dpo, ("--optimizer", "adamw", "--eval-data", "HOME/held_out.jsonl", "--eval-every", 5)),
        (dpo, ("--reference-free", "--micro-batch-size", 4)),
    ],
)
@pytest.mark.parametrize("steps", [3, 5, 8])  # before, at and behind the end of an epoch: 5 steps in stage 1, 4 in 2
def test_trap18_10_steps_are_some_and_resume_and_the_rest(home, tmp_path, stage, flags, steps):
    flags = [str(flag).replace("HOME", str(home)) for flag in flags]
    if "--eval-data" in flags and steps != 5:
        flags[-1] = "1"  # the first part evaluates at its last step, whatever --eval-every says
    stage(home, tmp_path / "whole", *flags, "--max-steps", 10)
    stage(home, tmp_path / "parts", *flags, "--max-steps", steps)
    stage(home, tmp_path / "parts", *flags, "--max-steps", 10, "--resume")
    assert len(metrics_of(tmp_path / "whole")) == 10
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@STAGES
def test_trap18_steps_logged_but_not_saved_are_not_logged_twice(home, tmp_path, stage, monkeypatch):
    """Stopped dead in step 8, with 5 saved, 7 logged and half a line more."""
    stage(home, tmp_path / "whole", "--max-steps", 10)
    module, steps = train_sft if stage is sft else train_dpo, []
    train_step = module.train_step

    def die(*args):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(module, "train_step", die)
    with pytest.raises(SystemExit) as stop:
        stage(home, tmp_path / "parts", "--max-steps", 10, "--save-every", 5)
    assert stop.value.code == 130 and len(read_metrics(tmp_path / "parts")) == 7
    with open(tmp_path / "parts" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 8, "lo')
    stage(home, tmp_path / "parts", "--max-steps", 10, "--resume", "--save-every", 5)
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_needs_only_what_names_the_run(home, tmp_path):
    """`same command and --resume` works, and so does the short form; the folder may have moved, "auto" stays auto."""
    dpo(home, tmp_path / "whole", "--beta", 0.3, "--max-steps", 6)
    dpo(home, tmp_path / "parts", "--beta", 0.3, "--max-steps", 3, "--device", "auto", "--dtype", "auto")
    (tmp_path / "parts").rename(tmp_path / "moved")
    must = ("--data", home / "pairs.jsonl", "--init", home / "sft", "--out", tmp_path / "moved", "--resume")
    call(train_dpo.main, *must, "--max-steps", 6, "--device", "auto", "--dtype", "auto")
    assert same_run(tmp_path / "whole", tmp_path / "moved")


def test_a_resumed_run_keeps_its_precision(home, tmp_path):
    dpo(home, tmp_path / "run", "--max-steps", 2, "--dtype", "bfloat16")  # "auto" would take float32: 64 channels
    dpo(home, tmp_path / "run", "--max-steps", 3, "--dtype", "auto", "--resume")
    assert settings_of(tmp_path / "run")["dtype"] == "bfloat16"


@STAGES
def test_nothing_to_do_says_so_and_a_missing_report_is_written(home, tmp_path, stage, capsys):
    stage(home, tmp_path / "run", "--max-steps", 3)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        stage(home, tmp_path / "run", "--max-steps", 3, "--resume")
    assert stop.value.code == 2 and "has made 3 of 3 steps" in capsys.readouterr().err
    assert contents(tmp_path) == before
    (tmp_path / "run" / "report.md").unlink()  # killed while it wrote the report
    stage(home, tmp_path / "run", "--max-steps", 3, "--resume")
    assert contents(tmp_path) == before


def test_trap19_saved_names_are_those_of_the_plain_model(tmp_path):
    tokenizer = Tokenizer.train(["ab ab"], 258)
    config = GPTConfig(vocab_size=258, block_size=5, n_layer=1, n_head=2, n_embd=4)
    model = GPT(config, torch.Generator().manual_seed(0))

    class Wrapped(torch.nn.Module):  # as DistributedDataParallel wraps
        def __init__(self, module):
            super().__init__()
            self.module = module

    for i, wrapped in enumerate((torch.compile(model), Wrapped(model), Wrapped(torch.compile(model)))):
        checkpoint.save(tmp_path / str(i), wrapped, tokenizer)
        loaded, _, _ = checkpoint.load(tmp_path / str(i))
        assert equal(dict(loaded.state_dict()), dict(model.state_dict())) and loaded.config == config


# ---- settings ----

# flag: (another value, what it changes). "order" is which pairs share a batch, "saves" the steps that were saved.
BOTH = {
    "lr": (2e-3, "weights"),
    "warmup_steps": (1, "weights"),
    "grad_clip": (0.01, "weights"),
    "epochs": (0.4, "steps"),
    "batch_size": (5, "order"),
    "micro_batch_size": (2, "forward sizes"),
    "micro_tokens": (60, "forward sizes"),
    "max_length": (14, "row lengths"),
    "max_steps": (2, "steps"),
    "eval_every": (2, "held out"),
    "save_every": (2, "saves"),
    "samples": (1, "samples"),
    "sample_tokens": (3, "samples"),
    "seed": (1, "order"),
    "dtype": ("bfloat16", "weights"),
    "compile": (True, "how the blocks run"),
    "recompute": (True, "how the blocks run"),
}
CHANGES = {
    sft: BOTH
    | {
        "optimizer": ("rmsprop", "weights"),
        "eval_data": ("HOME/sft.jsonl", "held out"),
        "init": ("HOME/sft", "weights"),
        "preset": ("imdb", "shape"),
        "tokenizer": ("HOME/small.json", "shape"),
        "vocab_size": (260, "shape"),
        "weight_decay": (0.9, "weights"),
        "dropout": (0.2, "weights"),
    },
    dpo: BOTH
    | {
        "optimizer": ("adamw", "weights"),
        "eval_data": ("HOME/pairs.jsonl", "held out"),
        "beta": (0.2, "weights"),
        "loss_type": ("ipo", "weights"),
        "label_smoothing": (0.1, "weights"),
        "reference_free": (True, "weights"),
        "decay": (True, "weights"),
    },
}
# what a run cannot do without, how it treats its folder, what cannot be changed here: see the other tests
ELSEWHERE = {sft: {"data", "settings", "out", "resume", "overwrite", "device", "fast"}}
ELSEWHERE[dpo] = ELSEWHERE[sft] | {"init", "dropout"}


def observe(stage, home, out, flags):
    """What a short run did, by the names that `CHANGES` uses."""
    seen = {"forward sizes": [], "row lengths": set(), "order": [], "saves": [], "how the blocks run": None}
    sft_batch, batches, save = dataset.sft_batch, dataset.batches, checkpoint.save

    def watch_blocks(self, *how):  # test_model.py has what comes of it; a compiler would take a minute
        seen["how the blocks run"] = how

    def watch_rows(rows, device="cpu"):
        seen["forward sizes"].append(len(rows))
        seen["row lengths"] |= {sum(map(len, row)) for row in rows}
        return sft_batch(rows, device)

    def watch_order(*args, **knobs):
        seen["order"].append(batches(*args, **knobs))
        return seen["order"][-1]

    def watch_save(folder, model, tokenizer, state):
        seen["saves"].append(state["step"])
        save(folder, model, tokenizer, state)

    with (
        mock.patch.object(dataset, "sft_batch", watch_rows),
        mock.patch.object(dataset, "batches", watch_order),
        mock.patch.object(checkpoint, "save", watch_save),
        mock.patch.object(GPT, "prepare", watch_blocks),
    ):
        stage(home, out, "--epochs", 1.2, *flags)
    saved, metrics = state_of(out), metrics_of(out)
    seen["weights"], seen["shape"] = saved["model"], saved["config"]
    seen["steps"] = len(metrics)
    seen["held out"] = [{k: v for k, v in m.items() if k.startswith("eval/")} for m in metrics]
    seen["samples"] = (out / "samples.md").read_text(encoding="utf-8")
    return seen


@pytest.fixture(scope="module")
def observed(home, tmp_path_factory):
    """The run that the others are compared with, of each stage."""
    folder = tmp_path_factory.mktemp("observed")
    Tokenizer.train(["the film is dull, the film is fun"], 262).save(home / "small.json")
    eval_data = {sft: home / "sft_held_out.jsonl", dpo: home / "held_out.jsonl"}
    base = {stage: ["--eval-data", file] for stage, file in eval_data.items()}
    return {stage: (base[stage], observe(stage, home, folder / stage.__name__, base[stage])) for stage in base}


EVERY = [pytest.param(stage, name, id=f"{stage.__name__}-{name}") for stage in CHANGES for name in CHANGES[stage]]


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_every_flag_changes_what_it_says(home, tmp_path, observed, stage, name):
    value, effect = CHANGES[stage][name]
    base, usual = observed[stage]
    flag = "--" + name.replace("_", "-")
    flags = [*base, flag] + ([] if value is True else [str(value).replace("HOME", str(home))])
    seen = observe(stage, home, tmp_path / "run", flags)
    assert not equal(seen[effect], usual[effect]), effect
    if effect in ("samples", "saves", "held out"):  # looking changes nothing
        assert equal(seen["weights"], usual["weights"])


def test_no_flag_is_left_out():
    for stage, module in ((sft, train_sft), (dpo, train_dpo)):
        fields = {field.name for field in dataclasses.fields(module.Settings)}
        assert fields == set(CHANGES[stage]) | ELSEWHERE[stage]
        assert not set(CHANGES[stage]) & ELSEWHERE[stage]


def test_trap10_sft_evaluation_is_cut_into_micro_batches(home, monkeypatch):
    """At most --micro-batch-size rows are in memory at once, and the mean is the same."""
    model, tokenizer, _ = checkpoint.load(home / "sft")
    rows = dataset.load_rows(home / "sft.jsonl", dataset.SFT, tokenizer, 40)
    sizes, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda model, ids: sizes.append(len(ids)) or hidden(model, ids))
    losses = []
    for micro in (0, 2):
        sizes.clear()
        settings = train_sft.Settings(
            data="", out="", batch_size=8, micro_batch_size=micro, device="cpu", dtype="float32"
        )
        losses.append(train_sft.evaluate(model.double(), rows, settings)["eval/loss"])
        assert max(sizes) == (micro or 8) and sum(sizes) == len(rows)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


@STAGES
def test_grad_clip_0_is_off(home, tmp_path, stage):
    """0 means no limit. It used to multiply every gradient by 0."""
    for name, clip in (("off", 0), ("far", 1e9), ("near", 1e-3)):
        stage(home, tmp_path / name, "--max-steps", 3, "--grad-clip", clip)
    assert same_weights(tmp_path / "off", tmp_path / "far") and not same_weights(tmp_path / "off", tmp_path / "near")


@STAGES
def test_any_integer_is_a_seed(home, tmp_path, stage):
    for seed in (20261125, -7, 2**62):
        stage(home, tmp_path / str(seed), "--max-steps", 2, "--seed", seed)
    assert not same_weights(tmp_path / "20261125", tmp_path / "-7")


@STAGES
def test_a_run_without_a_step_is_refused(home, tmp_path, capsys, stage):
    with pytest.raises(SystemExit):
        stage(home, tmp_path / "run", "--epochs", 0)
    assert "has made 0 of 0 steps. Raise --epochs" in capsys.readouterr().err


@STAGES
def test_an_unfinished_run_cannot_end_before_its_checkpoint(home, tmp_path, capsys, stage):
    """It wrote a report of fewer steps than its checkpoint holds."""
    stage(home, tmp_path / "run", "--max-steps", 4)
    (tmp_path / "run" / "report.md").unlink()  # as if it had been killed before its report
    with pytest.raises(SystemExit):
        stage(home, tmp_path / "run", "--max-steps", 2, "--resume")
    assert "has made 4 of 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.md").exists()
    stage(home, tmp_path / "run", "--max-steps", 4, "--resume")
    assert (tmp_path / "run" / "report.md").exists()


def test_reference_free_computes_no_reference(home, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train_dpo, "all_logps", lambda *args, **kwargs: calls.append(args))
    dpo(home, tmp_path / "run", "--reference-free", "--max-steps", 2)
    assert not calls


def test_a_users_own_column_that_ends_like_ours_is_left_alone(home, tmp_path):
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({**row, "trial_ended": "2024-05-01"}) + "\n" for row in rows), encoding="utf-8")
    dpo(home, tmp_path / "run", "--data", mine, "--max-steps", 1)


def stage1(*argv):
    return vars(parse_settings(train_sft.Settings, "", ["--out", "y", *map(str, argv)], train_sft.SETS))


def stage2(*argv, init="gpt2"):
    argv = ["--init", init, "--out", "y", *argv]
    return vars(parse_settings(train_dpo.Settings, "", [str(arg) for arg in argv], train_dpo.SETS))


def test_a_model_from_scratch_takes_the_set_of_its_data_if_it_has_its_shape():
    assert (stage1("--data", "toy")["settings"], stage1("--data", "imdb")["preset"]) == ("toy", "imdb")
    assert stage1("--data", "imdb", "--preset", "imdb")["settings"] == "imdb-small"
    assert stage1("--data", "imdb", "--preset", "gpt2-large")["settings"] == "paper"
    assert stage1("--data", "toy", "--preset", "toy-wide")["settings"] == "paper"
    assert stage1("--data", "toy", "--settings", "")["settings"] == "toy"  # empty: the one that fits, also when given
    assert (stage1("--data", "hh")["settings"], stage1("--data", "tldr")["settings"]) == ("paper", "paper-tldr")
    mine = stage1("--data", "mine.jsonl", "--settings", "toy", "--lr", "0.5")
    assert mine["lr"] == 0.5 and {k: mine[k] for k in train_sft.SETS["toy"]} == train_sft.SETS["toy"] | {"lr": 0.5}


def test_a_pretrained_model_takes_the_papers_set_whatever_its_data(tmp_path):
    """The paper's own experiment is GPT-2-large on IMDb: its settings are not those of our small models."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")  # a Hugging Face folder
    for data_name in ("imdb", "toy", "hh", "mine.jsonl"):
        for init in ("gpt2-large", tmp_path):
            assert stage1("--data", data_name, "--init", init)["settings"] == "paper"
            assert stage1("--data", data_name, "--init", init)["lr"] == 5e-5
            assert (found := stage2("--data", data_name, init=init))["settings"] == "paper"
            assert (found["optimizer"], found["lr"], found["beta"]) == ("rmsprop", 1e-6, 0.1)


def test_a_run_that_starts_from_a_run_keeps_to_its_set(tmp_path):
    def start(name):
        (tmp_path / "settings.json").write_text(json.dumps({"settings": name}), encoding="utf-8")
        return tmp_path

    for name in ("toy", "imdb-small"):
        for data_name in ("toy", "imdb", "mine.jsonl", "tldr"):
            got = stage2("--data", data_name, init=start(name))
            assert got["settings"] == name and {k: got[k] for k in train_dpo.SETS[name]} == train_dpo.SETS[name]
            assert stage1("--data", data_name, "--init", start(name))["settings"] == name
    assert stage2("--data", "tldr", init=start("paper"))["settings"] == "paper-tldr"
    assert stage2("--data", "hh", init=start("paper-tldr"))["settings"] == "paper"
    assert stage2("--data", "toy", "--settings", "paper", init=start("toy"))["beta"] == 0.1
    both = stage2("--data", "toy", "--beta", "3", "--no-decay", init=start("toy"))
    assert (both["beta"], both["decay"], both["optimizer"]) == (3.0, False, "adamw")
    assert stage2("--data", "toy", init=start("toy"))["beta"] != 0.1  # at the paper's beta the toy breaks


def test_the_papers_settings_are_the_papers():
    """Rafailov et al. 2023, appendix B; what it does not name is PyTorch's default, or off."""
    for data_name, name, beta in (("hh", "paper", 0.1), ("mine.jsonl", "paper", 0.1), ("tldr", "paper-tldr", 0.5)):
        asked = parse_settings(
            train_dpo.Settings, "", ["--data", data_name, "--init", "x", "--out", "y"], train_dpo.SETS
        )
        named = parse_settings(
            train_dpo.Settings, "", ["--data", "toy", "--init", "x", "--out", "y", "--settings", name], train_dpo.SETS
        )
        for settings in (asked, named):
            assert (settings.settings, settings.beta, settings.batch_size) == (name, beta, 64)
            assert settings.variant == dict(beta=beta, label_smoothing=0.0, loss_type="sigmoid", reference_free=False)
            model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4))
            optimizer = make_optimizer(model, settings.optimizer, settings.lr)
            assert type(optimizer) is torch.optim.RMSprop
            (group,) = optimizer.param_groups
            assert {k: group[k] for k in ("lr", "alpha", "eps", "momentum", "weight_decay", "centered")} == dict(
                lr=1e-6, alpha=0.99, eps=1e-8, momentum=0, weight_decay=0, centered=False
            )
            rates = [learning_rate(s, 1000, settings.lr, settings.warmup_steps, settings.decay) for s in range(1000)]
            assert rates[:150] == pytest.approx([1e-6 * (s + 1) / 150 for s in range(150)])
            assert set(rates[149:]) == {1e-6}


COMMANDS = [
    "train_sft", "train_dpo", "experiments.make_pairs", "experiments.evaluate",
    "minidpo.dataset", "minidpo.sampling", "minidpo.tokenizer", "experiments.rewards",
    "data.imdb.prepare", "data.toy_sentiment.generate",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_states_every_default(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setenv("COLUMNS", "2000")  # a line a flag
    with pytest.raises(SystemExit) as stop:
        call(module.main, "--help")
    assert not stop.value.code
    out = capsys.readouterr().out
    usage, lines = out.split("\n\n")[0], re.findall(r"^  --[a-z].*(?:\n {8,}.*)*", out, flags=re.MULTILINE)
    lines = [re.sub(r"\s+", " ", line).strip() for line in lines]
    assert lines
    for line in lines:
        flag = line.split()[0].rstrip(",")
        assert f"[{flag}" not in usage or "(default" in line or "(required)" in line, line

    if not hasattr(module, "Settings"):
        return
    stated = {}
    for line in lines:
        if default := re.search(r"\(default ('[^']*'|[^;) ]+)(;.*)?\)$", line):
            stated[line.split()[0].rstrip(",")[2:].replace("-", "_")] = ast.literal_eval(default[1])
    required = [f.name for f in dataclasses.fields(module.Settings) if f.default is dataclasses.MISSING]
    argv = [word for field in required for word in ("--" + field.replace("_", "-"), "x.jsonl")]
    sets = getattr(module, "SETS", None)
    got = vars(parse_settings(module.Settings, "", argv, sets)) | ({"settings": ""} if sets else {})
    assert {k: v for k, v in got.items() if k not in required} == stated
    for set_name, values in (sets or {}).items():
        for field, value in values.items():
            (line,) = (line for line in lines if re.match(rf"--{field.replace('_', '-')}[ ,]", line))
            assert f"{set_name}: {value}" in line


# ---- when something comes in between ----


def start(home, out, *flags):
    """`python train_dpo.py`, a process of its own."""
    command = [sys.executable, "train_dpo.py", "--data", home / "pairs.jsonl", "--init", home / "sft", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [str(word) for word in (*command, *flags)],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for(condition, process):
    for _ in range(2400):
        if condition():
            return
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.kill()
    pytest.fail("the process did not come so far in two minutes")


LONG = (*DPO, "--epochs", 100000)


def test_ctrl_c_saves_and_the_resumed_run_is_the_same(home, tmp_path):
    process = start(home, tmp_path / "run", *LONG)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) > 2, process)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    message = message.decode()
    done = state_of(tmp_path / "run")["state"]["step"]
    assert process.returncode not in (0, None) and "Traceback" not in message
    how = f"To continue, run this script with --out {tmp_path / 'run'} --resume."
    assert f"error: stopped after step {done} and saved. {how}" in message
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == list(range(1, done + 1))
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES - {"samples.md", "report.md"}
    call_long = ("--data", home / "pairs.jsonl", "--init", home / "sft", *LONG, "--max-steps", done + 3)
    call(train_dpo.main, *call_long, "--out", tmp_path / "run", "--resume")
    call(train_dpo.main, *call_long, "--out", tmp_path / "whole")
    assert same_run(tmp_path / "run", tmp_path / "whole")


@STAGES
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_in_a_step_lets_it_finish(home, tmp_path, stage, number, monkeypatch, capsys):
    """In the third step of ten: saved and resumed. In the last, nothing is left to resume: the run ends as always."""
    module = train_sft if stage is sft else train_dpo
    stage(home, tmp_path / "whole", "--max-steps", 10)
    train_step, steps = module.train_step, []

    def press(*args):
        steps.append(1)
        if len(steps) in (3, 10):
            assert callable(signal.getsignal(number))  # or the signal would end the tests
            os.kill(os.getpid(), number)
        return train_step(*args)

    monkeypatch.setattr(module, "train_step", press)
    with pytest.raises(SystemExit) as stop:
        stage(home, tmp_path / "run", "--max-steps", 10)
    assert stop.value.code == 2 and "stopped after step 3 and saved" in capsys.readouterr().err
    stage(home, tmp_path / "run", "--max-steps", 10, "--resume")
    assert len(steps) == 10 and same_run(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "report.md").exists()


def test_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), CatchInterrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@STAGES
def test_nan_stops_and_names_the_batch(home, tmp_path, stage, monkeypatch, capsys):
    module, poisoned = (train_sft, "response_loss") if stage is sft else (train_dpo, "logps_of")
    function, calls = getattr(module, poisoned), []

    def nan(*args, **kwargs):
        calls.append(1)
        value, factor = function(*args, **kwargs), math.nan if len(calls) == (3 if stage is sft else 8) else 1  # step 3
        return value * factor if stage is sft else (value[0] * factor, value[1])

    monkeypatch.setattr(module, poisoned, nan)
    with pytest.raises(SystemExit) as stop:
        stage(home, tmp_path / "run", "--save-every", 1)
    _, tokenizer, state = checkpoint.load(tmp_path / "run")
    file, fields = ("sft.jsonl", dataset.SFT) if stage is sft else ("pairs.jsonl", dataset.PAIR)
    rows = dataset.load_rows(home / file, fields, tokenizer, 40)
    batch = sorted(dataset.batches(rows, 6, seed=0, epoch=0)[2])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and str(batch) in message and "nan" in message
    assert state["step"] == 2  # the weights from before are safe


def test_a_margin_that_never_leaves_the_start_is_said(home, tmp_path, capsys):
    """50 steps after twice the warm-up."""
    dpo(home, tmp_path / "still", "--lr", 0, "--epochs", 20, "--max-steps", 57)
    assert "warning: after 56 steps the margin is still" in capsys.readouterr().out
    dpo(home, tmp_path / "moving", "--epochs", 20, "--max-steps", 57)
    assert "warning" not in capsys.readouterr().out


def test_a_run_that_is_all_warm_up_is_said(home, tmp_path, capsys):
    for stage in (sft, dpo):
        stage(home, tmp_path / stage.__name__, "--epochs", 1, "--warmup-steps", 0)
        assert "warm-up" not in capsys.readouterr().out
        steps = len(read_metrics(tmp_path / stage.__name__))
        for warmup, said in ((steps - 1, False), (steps, True)):
            stage(home, tmp_path / stage.__name__, "--epochs", 1, "--warmup-steps", warmup, "--overwrite")
            warning = f"warning: all {steps} steps are warm-up. Lower --warmup-steps {warmup}, or --batch-size."
            assert (warning in capsys.readouterr().out) == said
        stage(home, tmp_path / stage.__name__, "--epochs", 1, "--warmup-steps", 2, "--max-steps", 2, "--overwrite")
        assert "warning: all 2 steps are warm-up" in capsys.readouterr().out


class FullDisk:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, chunk):
        self.room -= len(chunk)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(chunk)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@STAGES
@pytest.mark.parametrize("room", [0, 100, 50_000, "replace"])
def test_full_disk_is_one_message_and_leaves_the_last_checkpoint(home, tmp_path, stage, room, monkeypatch, capsys):
    """The third checkpoint does not fit any more."""
    stage(home, tmp_path / "two", "--max-steps", 2)
    saved, replace = [], os.replace

    def full_open(path, mode, **how):
        if mode == "wb" and re.fullmatch(r"checkpoint\.pt\.\d+\.part", Path(path).name):
            saved.append(path)
        file = open(path, mode, **how)
        return FullDisk(file, room) if room != "replace" and len(saved) > 2 else file

    def full_replace(source, target):
        if room == "replace" and len(saved) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(minidpo.files.writing, "open", full_open, raising=False)
    monkeypatch.setattr(minidpo.files.writing.os, "replace", full_replace)
    with pytest.raises(SystemExit) as stop:
        stage(home, tmp_path / "run", "--save-every", 1)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("error:") == 1
    assert f"{tmp_path / 'run' / 'checkpoint.pt'}: No space left on device. Check the path" in message
    assert equal(state_of(tmp_path / "run"), state_of(tmp_path / "two"))
    assert not list((tmp_path / "run").glob("*.part"))


def test_full_disk_in_the_log_is_one_message_with_its_name(home, tmp_path, monkeypatch, capsys):
    room = iter([1000, 500, 0])

    def full_open(path, mode, **how):
        file = open(path, mode, **how)
        return FullDisk(file, next(room)) if Path(path).name == "metrics.jsonl" and mode == "a" else file

    monkeypatch.setattr(minidpo.run, "open", full_open, raising=False)
    with pytest.raises(SystemExit) as stop:
        dpo(home, tmp_path / "run")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: {tmp_path / 'run' / 'metrics.jsonl'}: No space left on device" in message


@STAGES
def test_unwritable_folder_is_one_message(home, tmp_path, stage, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        stage(home, tmp_path / "file" / "run")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "file") in message and message.count("error:") == 1

    def denied(path, mode, **how):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(minidpo.files.writing, "open", denied, raising=False)  # root may write anywhere
    with pytest.raises(SystemExit) as stop:
        stage(home, tmp_path / "run")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("error:") == 1
    assert str(tmp_path) in message and "Permission denied. Check the path, permissions" in message
    assert (tmp_path / "file").read_text(encoding="utf-8") == "not a folder"


def test_a_write_that_fails_for_another_reason_says_which_and_leaves_the_file(tmp_path):
    """`atomic` names the file in an OSError; any other error passes as it is."""
    minidpo.files.writing.atomic_write(tmp_path / "file", "before")
    with pytest.raises(RuntimeError, match="^mine$"), minidpo.files.writing.atomic(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError("mine")
    assert contents(tmp_path) == {"file": b"before"}


def test_gpt2s_tokenizer_for_a_model_from_scratch(home, tmp_path, monkeypatch):
    """`--tokenizer gpt2`: a model of another shape that reads and writes GPT-2's tokens."""
    tokenizer = Tokenizer.train(["The film sings."] * 3, 262)
    monkeypatch.setattr(Tokenizer, "gpt2", lambda: tokenizer)  # GPT-2's 50,257 would make a model of 1.6 M weights
    sft(home, tmp_path / "sft", "--tokenizer", "gpt2", "--max-steps", 1)
    model, its_tokenizer, _ = checkpoint.load(tmp_path / "sft")
    assert its_tokenizer.fingerprint == tokenizer.fingerprint and model.config.vocab_size == 262
