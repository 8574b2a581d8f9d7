"""The exercises as students get them, and the measured goals of the open tasks."""

import doctest
import importlib.util
import inspect
import json
import math
import random
import re

import pytest
from tiny import call, fails

import course.tasks.__main__ as tasks
from course import exercises
from course.instructor import solution
from course.oracles import CASES, EXERCISES
from experiments import mistakes

COURSE = mistakes.ROOT / "course"
NAMES = [exercise.name for exercise in EXERCISES]


def functions(module):
    """The names of the functions that a module defines, in order."""
    return [name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]


# ---- the exercises ----


def test_stubs_oracles_and_solution_have_the_same_functions_with_the_same_arguments():
    assert functions(exercises) == functions(solution) == NAMES
    for exercise in EXERCISES:
        stub, answer = getattr(exercises, exercise.name), getattr(solution, exercise.name)
        assert inspect.signature(stub) == inspect.signature(answer)
        arguments = exercise.case(random.Random(0), 0)
        inspect.signature(stub).bind(*arguments)
        with pytest.raises(NotImplementedError):
            stub(*arguments)


def test_the_examples_are_right():
    """Each example passes with the project's own functions and fails with the stub."""
    examples = [test for test in doctest.DocTestFinder().find(exercises) if test.examples and test.name.count(".") == 2]
    assert len(examples) == len(NAMES)
    for stub in examples:
        for answers, right in ((vars(solution), True), (vars(exercises), False)):
            test = doctest.DocTest(
                stub.examples, {**vars(exercises), **answers}, stub.name, stub.filename, stub.lineno, stub.docstring
            )
            failed = doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed
            assert (failed == 0) == right, stub.name


def test_the_numbers_on_the_pages():
    text = (COURSE / "README.md").read_text(encoding="utf-8")
    assert "twelve functions" in text and len(NAMES) == 12
    assert "ten random cases" in text and CASES == 10


def test_the_course_does_not_tell_students_the_answers():
    """The pages that students read do not name the mistakes of the three runs."""
    for path in (COURSE / "tasks" / "README.md", COURSE / "tasks" / "__main__.py", COURSE / "README.md"):
        text = path.read_text(encoding="utf-8")
        assert not [mistake.name for mistake in mistakes.GALLERY if mistake.name in text]


def test_links_and_commands_exist():
    for page in COURSE.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"


# ---- the open tasks ----


def write_run(folder, metrics, **settings):
    folder.mkdir()
    lines = "".join(json.dumps(m) + "\n" for m in metrics)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def measured(capsys, *argv):
    """The exit code and the printed lines of a measurement."""
    with pytest.raises(SystemExit) as stop:
        call(tasks.main, *argv)
    return stop.value.code, capsys.readouterr().out.splitlines()


def raw_curves(name):
    lines = [line.split(",") for line in tasks.CURVES.read_text(encoding="utf-8").splitlines()]
    return [dict(zip(lines[0][1:], map(float, line[1:]), strict=True)) for line in lines[1:] if line[0] == name]


def test_the_given_runs_start_alike_and_show_what_the_answers_describe():
    healthy, a, b, c = (raw_curves(name) for name in ("healthy", "a", "b", "c"))
    for run in (healthy, a, b, c):
        assert [m["step"] for m in run] == list(range(1, tasks.STEPS + 1))
        assert run[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and run[0]["rewards/accuracies"] == 0.5
        assert run[0]["logps/chosen"] == healthy[0]["logps/chosen"]
    assert all(m["loss"] == pytest.approx(math.log(2), abs=1e-4) and m["rewards/chosen"] == 0 for m in a)
    assert b[0]["grad_norm"] < 0.8 * healthy[0]["grad_norm"] and b[-1]["rewards/chosen"] > 0.1
    late = [sum(m["grad_norm"] for m in run[-10:]) / 10 for run in (c, healthy)]
    assert late[0] > 10 and 2 < late[1] < 3


@pytest.mark.parametrize("which", ["a", "b", "c"])
def test_the_run_with_the_right_mistake_is_at_0_and_the_healthy_run_at_1(which, tmp_path, capsys):
    for name, distance in ((which, 0), ("healthy", 1), *((other, None) for other in "abc" if other != which)):
        run = write_run(tmp_path / name, raw_curves(name))
        code, (line,) = measured(capsys, "curves", "--which", which, "--run", run)
        value = float(re.search(r"(\d+\.\d+) +<= 0.35 ", line)[1])
        assert code == (0 if name == which else 1) and ("NOT" in line) == (name != which)
        assert value == distance if distance is not None else value > 0.7


def test_the_distance_by_hand():
    scale = {"loss": 2.0, "lr": 0.5}
    one, other = {"loss": [1.0, 3.0], "lr": [0.0, 1.0]}, {"loss": [2.0, 0.0], "lr": [0.0, 0.0]}
    assert tasks.apart(one, other, scale) == (1 + 3) / 2 / 2.0 + (0 + 1) / 2 / 0.5
    assert tasks.spread([1.0, 3.0]) == 1.0


def test_curves_of_another_length_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "short", raw_curves("a")[:5])
    assert "has 5 steps and the curves have 79" in fails(capsys, tasks.main, "curves", "--which", "a", "--run", run)
    assert "not found" in fails(capsys, tasks.main, "curves", "--which", "a", "--run", tmp_path / "none")


def evaluation(chosen, accuracy, step=157, margin=0.25):
    margin = {"eval/rewards/margins": margin}
    return {"step": step, "eval/rewards/chosen": chosen, "eval/rewards/accuracies": accuracy, **margin}


def test_displacement(tmp_path, capsys):
    shown = write_run(tmp_path / "shown", [{"step": 1}, evaluation(-0.4, 0.8)], beta=0.1)
    good = write_run(tmp_path / "good", [evaluation(-0.04, 0.79)], beta=0.1)
    code, lines = measured(capsys, "displacement", "--shown", shown, "--repaired", good)
    assert code == 0 and [line.split()[-4:] for line in lines] == [
        ["-4.000", "<=", "-2", "reached"],
        ["-0.400", ">=", "-0.5", "reached"],
        ["2.500", ">=", "2", "reached"],
        ["-0.010", ">=", "-0.02", "reached"],
        ["0.000", ">=", "0", "reached"],
    ]
    for name, metrics, n in (
        ("fell", evaluation(-0.06, 0.8), 1),
        ("lazy", evaluation(0.01, 0.79, margin=0.02), 2),
        ("worse", evaluation(0.1, 0.7), 3),
        ("shorter", evaluation(0.1, 0.8, step=50), 4),
    ):
        code, lines = measured(
            capsys, "displacement", "--shown", shown, "--repaired", write_run(tmp_path / name, [metrics], beta=0.1)
        )
        assert code == 1 and [i for i, line in enumerate(lines) if "NOT reached" in line] == [n]
    other = write_run(tmp_path / "other", [evaluation(0.1, 0.8)], beta=0.7)
    both = ("displacement", "--shown", shown, "--repaired")
    assert "beta is 0.1" in fails(capsys, tasks.main, *both, other)
    slower = write_run(tmp_path / "slower", [evaluation(0.1, 0.8)], beta=0.1, lr=0.00003)
    assert "the same lr" in fails(capsys, tasks.main, *both, slower)
    unfinished = write_run(tmp_path / "unfinished", [{"step": 3}], beta=0.1)
    assert "no finished DPO run" in fails(capsys, tasks.main, *both, unfinished)
    assert "settings.json" in fails(capsys, tasks.main, *both, tmp_path / "nowhere")


def test_budget(monkeypatch, capsys, tmp_path):
    """Compares invented figures with the goals; experiments.evaluate, which measures them, has its own tests."""
    import data
    from experiments import common, evaluate

    monkeypatch.setattr(common, "load_models", lambda *folders: ([None, None], None))
    monkeypatch.setattr(data, "find", lambda name, file: mistakes.ROOT / "data" / "toy_sentiment" / f"{file}.jsonl")
    sft = write_run(tmp_path / "sft", [], data="toy")
    policy = write_run(tmp_path / "policy", [], beta=1.0, init=str(sft))
    worse = write_run(tmp_path / "worse", [], beta=1.0, init=str(sft))
    both = ("budget", "--policy", policy, "--reference")
    assert "must be that run, an SFT model" in fails(capsys, tasks.main, *both, worse)
    for reward, kl, code in ((2.0, 1.0, 0), (1.7, 1.0, 1), (3.0, 1.2, 1)):
        figures = {"reward_mean": reward + 0.5, "reference": {"reward_mean": 0.5}, "kl_exact": kl}

        def evaluated(policy, reference, tokenizer, prompts, reward, settings, figures=figures):
            assert len(prompts) == 300 and settings.samples_per_prompt == 4  # the repository has 300 prompts
            return figures, prompts, {}

        monkeypatch.setattr(evaluate, "evaluate", evaluated)
        assert measured(capsys, *both, sft)[0] == code
