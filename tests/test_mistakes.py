"""The tests tested: each mutant is found by the test it names, and that test fails for no other reason."""

import math
import re

import pytest
import torch
from tiny import call, fails, write_data

import experiments.mistakes.__main__ as command
import train_dpo
import train_sft
from experiments import mistakes
from experiments.mistakes import GALLERY, ROOT, Mutant, copy, curves, kill, load, run_tests
from minidpo.report import read_metrics

BY_NAME = {mutant.name: mutant for mutant in GALLERY}
EACH = pytest.mark.parametrize("mutant", GALLERY, ids=lambda mutant: mutant.name)
HARMLESS = Mutant(
    "harmless", "train_dpo.py", "# (7)", "# 7", "a comment", "none", "tests/test_loss.py::test_loss_starts_at_ln_2"
)


@EACH
def test_old_text_is_there_once_and_the_new_one_is_python(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    compile(mistakes.mutated(mutant), mutant.file, "exec")


@EACH
def test_mutant_is_killed(mutant):
    killed, _ = kill(mutant)
    assert killed, f"{mutant.test} does not see {mutant.name}"


def test_the_healthy_code_is_not(tmp_path):
    """The same tests on a copy without a mistake all pass: what kills a mutant is the mistake."""
    copy(tmp_path)
    assert run_tests(tmp_path, sorted({mutant.test for mutant in GALLERY})) == 0
    passed = re.search(r"(\d+) passed", (tmp_path / "output.txt").read_text(encoding="utf-8"))
    assert int(passed[1]) >= len({mutant.test for mutant in GALLERY})  # none was skipped


def test_a_mutant_that_survives_is_said(monkeypatch, capsys):
    monkeypatch.setattr(command, "GALLERY", [HARMLESS, BY_NAME["no-log-sigmoid"]])
    with pytest.raises(SystemExit, match="alive: harmless. A mutant that survives is a hole in the tests."):
        call(command.main)
    out = capsys.readouterr().out
    assert "1 of 2 killed" in out and re.search(r"^harmless +NO ", out, re.M) and re.search(" yes ", out)
    call(command.main, "--only", "no-log-sigmoid")
    assert "1 of 1 killed" in capsys.readouterr().out
    assert "Did you mean 'no-log-sigmoid'" in fails(capsys, command.main, "--only", "no-logsigmoid")
    assert "--curves needs --init" in fails(capsys, command.main, "--curves", "x")


def test_what_is_no_failed_test_is_an_error(tmp_path):
    copy(tmp_path)
    with pytest.raises(RuntimeError, match="not_there"):
        run_tests(tmp_path, ["tests/test_loss.py::not_there"])
    (tmp_path / "train_dpo.py").write_text("def", encoding="utf-8")
    with pytest.raises(RuntimeError, match="SyntaxError"):
        run_tests(tmp_path, ["tests/test_loss.py"])
    with pytest.raises(ValueError, match="twice: 0 places in train_dpo.py"):
        load(Mutant("twice", "train_dpo.py", "not to be found", "", "", "", ""))


def test_load_gives_the_broken_module_and_leaves_the_healthy_one():
    """A pair whose margin is 2: log(1 + e^-2) for the healthy code, -2 without the log-sigmoid."""
    logps = torch.tensor([[-10.0], [-20.0], [-11.0], [-19.0]])
    broken = load(BY_NAME["no-log-sigmoid"])
    assert broken.dpo_loss(*logps, beta=1.0)[0].item() == -2
    assert train_dpo.dpo_loss(*logps, beta=1.0)[0].item() == pytest.approx(math.log1p(math.exp(-2)))
    batch = load(BY_NAME["prompt-scored"]).preference_batch([([0, 1, 2], [3, 0], [4, 0])])
    assert batch.chosen.mask.tolist() == [[True] * 4]
    assert broken.Settings(data="", init="", out="").beta == 0.1


def test_curves_train_once_and_the_page_holds_what_was_measured(tmp_path, monkeypatch, capsys):
    write_data(tmp_path)
    short = ("--batch-size", 8, "--epochs", 2, "--samples", 0)
    call(train_sft.main, "--data", tmp_path / "sft.jsonl", "--out", tmp_path / "sft", "--preset", "toy", *short)
    names = ("dropout-left-on", "warm-up-again", "kl-per-token")
    monkeypatch.setattr(command, "GALLERY", [BY_NAME[name] for name in names])
    monkeypatch.setattr(curves, "GALLERY", command.GALLERY)
    monkeypatch.setattr(curves, "STEPS", 4)
    monkeypatch.setattr(curves, "BATCH_SIZE", 4)
    monkeypatch.setattr(curves, "PROMPTS", 3)
    shipped = ROOT / "data" / "toy_sentiment"
    monkeypatch.setattr(curves.data, "find", lambda name, file: shipped / f"{file}.jsonl")
    flags = ("--init", tmp_path / "sft", "--curves", tmp_path / "runs", "--page", tmp_path / "page.md")
    call(command.main, *flags)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    runs = tmp_path / "runs"
    resumed, healthy = (curves.read(runs / name / "result.json") for name in ("warm-up-again", "healthy"))
    for name, figures in (("mutant", resumed), ("healthy", healthy)):
        assert f"| {name} | {figures['loss']:.3g} | {figures['rewards/chosen']:.3g} |" in page
    assert resumed["loss"] == sum(m["loss"] for m in read_metrics(runs / "warm-up-again" / "run")) / 4
    rates = [[m["lr"] for m in read_metrics(runs / name / "run")] for name in ("warm-up-again", "healthy")]
    assert rates[0] == rates[1][:2] * 2 and len(rates[1]) == 4
    assert "> before the first update the policy is" in page and page.count("| healthy |") == 1
    assert "-        plain[indices] = (at_sample.cpu().double() * mask).sum(-1)\n+        plain[indices]" in page
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(curves, "train", None)  # would fail if it were called
    call(command.main, *flags)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page


def test_the_page_in_docs_is_of_this_gallery():
    page = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
    words = " ".join(page.split())  # lines wrapped again
    for mutant in GALLERY:
        for part in (mutant.mistake, mutant.see, mutant.test, *curves.diff(mutant)):
            assert " ".join(part.split()) in words, (
                f"{mutant.name} has changed: python -m experiments.mistakes --curves ... writes it anew"
            )
    assert page.count("\n## ") == len(GALLERY)
