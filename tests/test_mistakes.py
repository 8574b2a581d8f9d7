"""The tests tested: each mistake is caught by the test it names, and that test fails for no other reason."""

import math
import re
import types
from multiprocessing import forkserver, set_forkserver_preload
from pathlib import Path

import pytest
import torch
from tiny import call, fails, write_data

import experiments.mistakes.__main__ as command
import train_dpo
import train_sft
from course.grade import forget_forkserver
from experiments.mistakes import (
    GALLERY,
    IMPORTED,
    PAGE,
    ROOT,
    Mistake,
    broken,
    caught,
    copy,
    curves,
    read_page,
    read_section,
    run_tests,
)
from minidpo.report import read_metrics

BY_NAME = {mistake.name: mistake for mistake in GALLERY}
EACH = pytest.mark.parametrize("mistake", GALLERY, ids=lambda mistake: mistake.name)
HARMLESS = Mistake("harmless", "train_dpo.py", "# (7)", "# 7", "tests/test_loss.py::test_loss_starts_at_ln_2")


@pytest.fixture(scope="module", autouse=True)
def fork_server():
    """A fork server that has made the gallery's imports. The grader's has made fewer, and a process has only one."""
    before = forkserver._forkserver._preload_modules
    forget_forkserver()
    set_forkserver_preload(IMPORTED)
    yield
    forget_forkserver()
    set_forkserver_preload(before)


def load(mistake):
    """The mistake's file as a new module: `load(m).dpo_loss(...)`. The healthy module stays as it is."""
    module = types.ModuleType(f"broken_{Path(mistake.file).stem}")
    module.__file__ = str(ROOT / mistake.file)
    exec(compile(broken(mistake), f"{mistake.file} with {mistake.name}", "exec"), module.__dict__)
    return module


@EACH
def test_old_text_is_there_once_and_the_new_one_is_python(mistake):
    source = (ROOT / mistake.file).read_text(encoding="utf-8")
    assert source.count(mistake.old) == 1
    compile(broken(mistake), mistake.file, "exec")


@EACH
def test_mistake_is_caught(mistake):
    found, _ = caught(mistake)
    assert found, f"{mistake.test} does not catch {mistake.name}"


def test_the_healthy_code_passes(tmp_path):
    """The same tests on a copy without a mistake all pass: they fail because of the mistake."""
    copy(tmp_path)
    failed, output = run_tests(tmp_path, sorted({mistake.test for mistake in GALLERY}))
    assert not failed
    passed = re.search(r"(\d+) passed", output)
    assert int(passed[1]) >= len({mistake.test for mistake in GALLERY})  # none was skipped


def test_a_missed_mistake_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(command, "GALLERY", [HARMLESS, BY_NAME["no-log-sigmoid"]])
    with pytest.raises(SystemExit, match="missed: harmless. The tests need one that fails with this mistake."):
        call(command.main)
    out = capsys.readouterr().out
    assert "1 of 2 mistakes caught" in out
    assert re.search(r"^MISSED .* harmless$", out, re.M) and re.search(r"^caught .* no-log-sigmoid$", out, re.M)
    call(command.main, "--only", "no-log-sigmoid")
    assert "1 of 1 mistakes caught" in capsys.readouterr().out
    assert "Did you mean 'no-log-sigmoid'" in fails(capsys, command.main, "--only", "no-logsigmoid")
    assert "/nowhere not found" in fails(capsys, command.main, "--curves", "x", "--init", "/nowhere")


def test_what_is_no_failed_test_is_an_error(tmp_path):
    copy(tmp_path)
    with pytest.raises(RuntimeError, match="not_there"):
        run_tests(tmp_path, ["tests/test_loss.py::not_there"])
    (tmp_path / "train_dpo.py").write_text("def", encoding="utf-8")
    with pytest.raises(RuntimeError, match="SyntaxError"):
        run_tests(tmp_path, ["tests/test_loss.py"])
    with pytest.raises(ValueError, match="twice: train_dpo.py has this 0 times"):
        load(Mistake("twice", "train_dpo.py", "not to be found", "", ""))


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
    monkeypatch.setattr(curves, "STEPS", 4)
    monkeypatch.setattr(curves, "BATCH_SIZE", 4)
    monkeypatch.setattr(curves, "PROMPTS", 3)
    shipped = ROOT / "data" / "toy_sentiment"
    monkeypatch.setattr(curves.data, "find", lambda name, file: shipped / f"{file}.jsonl")
    flags = ("--init", tmp_path / "sft", "--curves", tmp_path / "runs", "--page", tmp_path / "page.md")
    sections = [section for section in read_page(PAGE)[1] if read_section(section).name in names]
    sections[2] = sections[2].replace("\nCaught by", "\n| mistake | gone |\n\n> gone\n\nCaught by")
    page = "\n## ".join(["# By hand\n\nThis stays.\n", *sections])
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(curves, "PAGE", tmp_path / "page.md")
    call(command.main, *flags)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# By hand\n\nThis stays.\n\n## dropout-left-on\n") and "gone" not in page
    assert page.count("**In the curves:**") == page.count("Caught by `") == 3
    runs, healthy = tmp_path / "runs", curves.healthy(BY_NAME["warm-up-again"])
    resumed, beside = (curves.read(runs, run) for run in (BY_NAME["warm-up-again"], healthy))
    for name, figures in (("mistake", resumed), ("healthy", beside)):
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
    monkeypatch.setattr(curves, "broken", lambda run: "# the code has changed")
    with pytest.raises(TypeError):  # all is trained again
        call(command.main, *flags)


def test_every_section_of_the_page_is_whole():
    above, sections = read_page(PAGE)
    assert f"{len(GALLERY)} ways to get DPO wrong" in above and len(BY_NAME) == len(GALLERY) == len(sections)
    for section, mistake in zip(sections, GALLERY, strict=True):
        assert mistake.file and mistake.old and mistake.test, mistake.name
        assert section.count("\n**In the curves:** ") == 1 and section.count("\nIn `") == 1, mistake.name
        assert bool(mistake.shows) == ("\n| mistake |" in section or "\nMeasured: " in section), mistake.name


def test_a_section_is_read():
    section = "name\n\nWhat.\n\nIn `a.py`:\n\n```diff\n-x\n+y\n+\n z\n```\n\n"
    section += "Trained with `--a 1 --b`, and resumed half-way; the picture shows `lr`.\n\nCaught by `t.py::t[1.]`.\n"
    expected = Mistake("name", "a.py", "x\nz\n", "y\n\nz\n", "t.py::t[1.]", ("--a", "1", "--b"), True, "lr")
    assert read_section(section) == expected
