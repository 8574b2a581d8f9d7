"""The grader: right answers get full marks, wrong ones are named, and a bad function costs only its own points."""

import json
import os
import random
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_mistakes import load
from tiny import call, fails
from tqdm import tqdm

import course.grade as command
from course import child, sandbox
from course.grade import close, draw_cases, grade, judge, request
from course.oracles import CASES, EXERCISES
from experiments import mistakes

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # no thread, as in the student's process
SOLUTION = mistakes.ROOT / "course" / "instructor" / "solution.py"
SOURCE = SOLUTION.read_text(encoding="utf-8")
NAMES = [exercise.name for exercise in EXERCISES]
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
FEW = 2  # cases per function, where many files are graded
LONG = 600  # seconds, more than any test here needs
SEED = random.SystemRandom().randrange(10**6)  # a new one each time, as in the grader; pytest shows it on failure


def write(tmp_path, code, without=()):
    """Writes a submission: the solution, then `code`, which may replace functions; those in `without` are deleted."""
    deleted = "".join(f"\ndel {name}" for name in without)
    path = tmp_path / "mine.py"
    path.write_text(f"{SOURCE}{deleted}\n\n{textwrap.dedent(code)}\n", encoding="utf-8")
    return path


def scores(result):
    return {test["name"]: test["score"] for test in result["tests"]}


def words(result, name):
    return next(test["output"] for test in result["tests"] if test["name"] == name)


def only_loses(result, *names):
    """Checks that the functions `names` have no points and all others have full marks."""
    full = {test["name"]: test["max_score"] for test in result["tests"]}
    assert list(full) == NAMES and set(full.values()) in ({CASES}, {FEW})
    assert scores(result) == {name: 0 if name in names else full[name] for name in NAMES}, result


def points(functions, seed=SEED, only=None):
    """Grades a dict of functions in this process; returns {name: (points, message)}."""
    results = {}
    for name, cases in draw_cases(seed).items():
        if only in (None, name):
            asked = json.loads(json.dumps(request(BY_NAME[name], cases)))
            reply = json.loads(json.dumps(child.answer(functions.get(name), asked, "")))
            results[name] = judge(BY_NAME[name], cases, reply)
    return results


def solution(**modules):
    """The functions of the solution, with `modules` in place of the project's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name.replace("__", "."), module)
            parent, _, last = name.rpartition("__")
            if parent:
                patch.setattr(sys.modules[parent.replace("__", ".")], last, module)
        functions = {}
        exec(compile(SOURCE, str(SOLUTION), "exec"), functions)
    return functions


# ---- right and wrong answers ----


@pytest.mark.parametrize("seed", [SEED, 0, 1, 2, 3], ids=["a random seed", "0", "1", "2", "3"])
def test_the_projects_own_functions_get_full_marks(seed):
    assert points(solution(), seed) == {name: (CASES, "") for name in NAMES}


def test_full_marks_by_the_command(tmp_path, capsys):
    call(command.main, SOLUTION, "--json", tmp_path / "r.json", "--time-limit", LONG)
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    only_loses(result)
    assert result["score"] == result["max_score"] == 120
    assert result["output"] == "imports data, experiments, minidpo, train_dpo"
    assert [set(test) for test in result["tests"]] == [{"name", "score", "max_score", "output"}] * 12
    out = capsys.readouterr().out
    assert f"{SOLUTION}: 120 of 120 points" in out and f"--seed {result['seed']}" in out


MESSAGES = {  # name of a mistake in the gallery: the exercise that loses points, and the grader's message
    "log-ratios-added": ("margin_and_loss", "the two rewards are added"),
    "reference-added": ("implicit_reward", "the reference is added instead of subtracted"),
    "beta-inverted": ("implicit_reward", "divided by beta instead of multiplied"),
    "beta-missing-from-the-rewards": ("implicit_reward", "beta is missing"),
    "no-log-sigmoid": ("margin_and_loss", "the log-sigmoid is missing: this is minus the margin"),
    "log-of-sigmoid": ("margin_and_loss", "in two steps is infinite at large margins"),
    "robust-for-conservative": ("smoothed_loss", "this is robust DPO"),
    "mean-over-tokens": ("sum_logps", "the mean over the response's tokens"),
    "mask-left-out": ("sum_logps", "the mask is not used"),
    "softmax-over-positions": ("gather_logps", "normalised over the positions"),
    "raw-logits": ("gather_logps", "raw logits"),
    "log-softmax-in-bf16": ("gather_logps", "logps has dtype float32; expected float64"),
    "merge-across-the-border": ("tokenise_pair", "a token crosses the boundary"),
    "no-end-of-response": ("tokenise_pair", "no eot after the response"),
    "targets-not-shifted": ("build_batch", "the targets are not shifted"),
    "mask-off-by-one": ("build_batch", "the targets are shifted but the mask is not"),
    "mask-by-id": ("build_batch", "every eot is treated as padding"),
    "prompt-scored": ("build_batch", "the prompt is scored"),
    "padding-scored": ("build_batch", "the padding is scored"),
    "left-padding": ("build_batch", "padded on the left"),
    "ties-lost": ("accuracy", "ties count as losses"),
    "accuracy-without-the-reference": ("accuracy", "the reference is missing"),
    "kl-per-token": ("kl_estimates", "plain: likely mistake: averaged over the tokens"),
}
ELSEWHERE = {  # mistakes in what no exercise asks for: the model, the loop, files, the order within a pair
    "chosen-and-rejected-swapped", "ipo-with-beta-in-the-margin", "rejected-detached", "dropout-missed-in-attention",
    "dropout-left-on", "reference-follows-the-policy", "cache-without-the-weights", "optimizer-of-another-copy",
    "exact-gelu", "head-tied-by-its-data", "mean-of-each-micro-batch", "zero-grad-forgotten", "average-of-averages",
    "kl-on-the-references-samples", "warm-up-again", "evaluation-moves-the-rng", "wrapped-names-saved",
    "logits-in-bf16",
}  # fmt: skip


def test_the_gallerys_mistakes_are_all_listed():
    assert set(MESSAGES) | ELSEWHERE == {mistake.name for mistake in mistakes.GALLERY}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_of_the_gallery_loses_points_and_is_named(name):
    mistake = next(mistake for mistake in mistakes.GALLERY if mistake.name == name)
    module = mistake.file.removesuffix(".py").replace("/", "__")
    exercise, message = MESSAGES[name]
    score, said = points(solution(**{module: load(mistake)}), only=exercise)[exercise]
    assert score < CASES and message in said


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_each_known_mistake_loses_points_and_gets_its_own_message(exercise):
    """For any seed, it differs from the oracle in at least one case, and no other mistake is named."""
    for seed in range(SEED, SEED + 5):
        cases = draw_cases(seed)[exercise.name]
        plain = [[a.values if hasattr(a, "values") else a for a in case] for case in cases]
        dtypes = [next((a.dtype for a in case if hasattr(a, "dtype") and "float" in a.dtype), None) for case in cases]
        for said, mistake in exercise.mistakes:
            wrong = [judge(exercise, cases, as_reply(exercise, mistake, plain, dtypes))]
            assert wrong[0][0] < CASES and said in wrong[0][1], (seed, said, wrong)


def as_reply(exercise, function, plain, dtypes):
    """The reply that the child would send for a function that works on lists."""
    answers = []
    for case, dtype in zip(plain, dtypes, strict=True):
        items = []
        for kind, value in zip(exercise.returns.values(), function(*case), strict=True):
            if kind == "ids":
                items.append([{"value": v} for v in value])
            elif kind.startswith("number"):
                items.append({"value": value})
            else:
                tensor = torch.tensor(value, dtype=getattr(torch, dtype if kind == "float" else kind))
                items.append({**child.encode(tensor), "gradient": True})
        answers.append(items if len(items) > 1 else items[0])
    return {"answers": answers}


EDGES = [  # (exercise, a wrong answer that only an edge of the stub tells, part of the message)
    (
        "smoothed_loss",
        lambda m, e: -(1 - e) * torch.sigmoid(m).log() - e * (1 - torch.sigmoid(m)).log(),
        "in two steps is infinite",
    ),
    (
        "smoothed_loss",
        lambda m, e: -(1 - e) * (torch.sigmoid(m) + 1e-8).log() - e * (torch.sigmoid(-m) + 1e-8).log(),
        "eps",
    ),
    ("gather_logps", lambda x, t: x.softmax(-1).log().gather(-1, t[..., None])[..., 0], "log(softmax(x)) in two steps"),
    ("gather_logps", lambda x, t: x.log_softmax(-1).gather(-1, t[..., None]).squeeze(), "logps has shape"),
    ("gather_logps", lambda x, t: (x - x.exp().sum(-1, keepdim=True).log()).gather(-1, t[..., None])[..., 0], ""),
    ("pick_beta", lambda f, budget: _pick(f, lambda kl: kl < budget), "<= instead of <"),
    ("pick_beta", lambda f, budget: _pick(f, lambda kl: kl <= budget, by="kl"), "the largest KL within the budget"),
    ("implicit_reward", lambda p, r, beta: beta * (p.detach() - r), "has lost a gradient"),
    ("implicit_reward", lambda p, r, beta: beta**2 * (p - r), "beta is used twice"),
    ("margin_and_loss", lambda c, r: (c - r, (1 - c + r).relu()), "the hinge loss"),
    ("margin_and_loss", lambda c, r: (c - r, 1 - (c - r).sigmoid()), "1 - sigmoid(margin)"),
    ("sum_logps", lambda logps, mask: (logps * mask.roll(1, 1)).sum(-1), "one position too late"),
    ("sum_logps", lambda logps, mask: (logps * mask).sum(-1).exp(), "the probability of the response"),
    (
        "gradient_weight",
        lambda c, r, beta: (-(beta**2) * (r - c).sigmoid(), beta**2 * (r - c).sigmoid()),
        "beta is used twice",
    ),
    # the values are right, and a gradient is there, but not the right one
    ("gather_logps", lambda x, t: x.gather(-1, t[..., None])[..., 0] - x.logsumexp(-1).detach(), "gradient"),
    ("sum_logps", lambda logps, mask: (logps.detach() * mask).sum(-1) + 0 * logps.sum(), "gradient"),
    ("implicit_reward", lambda p, r, beta: beta * (p.detach() - r) + 0 * p, "gradient"),
    ("margin_and_loss", lambda c, r: (c - r, torch.where(c - r < -50, r - c, (r - c).exp().log1p())), "gradient"),
    (
        "smoothed_loss",
        lambda m, e: -(1 - e) * F.logsigmoid(m) - e * F.logsigmoid(-m).detach(),
        "gradient",
    ),
]


def _pick(frontier, allowed, by="reward"):
    means = {}
    for beta in {run["beta"] for run in frontier}:
        runs = [run for run in frontier if run["beta"] == beta]
        means[beta] = {key: sum(run[key] for run in runs) / len(runs) for key in ("kl", "reward")}
    return max((b for b in means if allowed(means[b]["kl"])), key=lambda b: means[b][by], default=None)


@pytest.mark.parametrize("name,wrong,said", EDGES, ids=range(len(EDGES)))
def test_a_wrong_answer_that_only_an_edge_tells(name, wrong, said):
    score, words_ = points({name: wrong}, only=name)[name]
    assert score < CASES and said in words_


def test_a_wrong_gradient_costs_its_case_whatever_the_other_cases_are():
    detached = lambda m, e: -(1 - e) * F.logsigmoid(m) - e * F.logsigmoid(-m).detach()  # noqa: E731
    in_two_steps = lambda m, e: -(1 - e) * m.sigmoid().log() - e * F.logsigmoid(-m).detach()  # noqa: E731
    (one, _), (both, _) = (
        points({"smoothed_loss": f}, only="smoothed_loss")["smoothed_loss"] for f in (detached, in_two_steps)
    )
    assert both <= one < CASES


def test_for_an_unknown_mistake_the_first_case_is_shown():
    functions = solution() | {"implicit_reward": lambda policy, reference, beta: beta * (policy - reference) + 1}
    score, said = points(functions, only="implicit_reward")["implicit_reward"]
    assert score == 0 and said.startswith("case 1: got [") and ", expected [" in said


def test_an_accuracy_in_float32_is_right_too():
    functions = solution()
    right = functions["accuracy"]
    functions["accuracy"] = lambda *logps: torch.tensor(right(*logps), dtype=torch.float32)
    assert points(functions, only="accuracy")["accuracy"] == (CASES, "")


@pytest.mark.parametrize("kind", ["float64", "float32", "longdouble", "asarray"])
def test_a_numpy_scalar_is_a_number(kind):
    functions = solution()
    right, cast = functions["accuracy"], getattr(np, kind)
    functions["accuracy"] = lambda *logps: cast(float(right(*logps)))
    assert points(functions, only="accuracy")["accuracy"] == (CASES, "")


def test_a_numpy_integer_is_an_id():
    functions = solution()
    right = functions["tokenise_pair"]
    functions["tokenise_pair"] = lambda *case: [[np.int64(i) for i in ids] for ids in right(*case)]
    assert points(functions, only="tokenise_pair")["tokenise_pair"] == (CASES, "")


def test_if_one_returned_value_is_wrong_the_message_names_it():
    functions = solution()
    right = functions["kl_estimates"]
    functions["kl_estimates"] = lambda p, q, targets, mask: (
        right(p, q, targets, mask)[0],
        -right(p, q, targets, mask)[1],
    )
    assert points(functions, only="kl_estimates")["kl_estimates"] == (0, "exact: likely mistake: the sign is wrong")


def test_close():
    assert close([1.0, float("inf")], [1.0, float("inf")], "float64")
    assert not close([1.0], [float("inf")], "float64") and not close([float("inf")], [1.0], "float32")
    assert close([1.0], [1 + 5e-5], "float32") and not close([1.0], [1 + 5e-5], "float64")
    assert not close([1.0], [1.0, 2.0], "float64") and not close(None, 1.0, None) and close(None, None, None)


# ---- answers that cannot count ----

BAD = [  # (code of a function, part of the grader's message)
    (
        "def shift(row): return None",
        "returns None (is the return statement missing?); expected 2 values: ids, targets",
    ),
    ("def shift(row): return row[:-1]", "returns a torch.Tensor of shape"),
    ("def shift(row): return row[:-1], row[1:].tolist()", "targets is a list or tuple of"),
    ("def shift(row): return row[:-1], row", "targets has shape"),
    ("def shift(row): return row[:-1], row[1:].int()", "targets has dtype int32; expected int64"),
    ("def shift(row): return row[:-1], row[1:].numpy()", "targets is a value of type ndarray; expected a torch.Tensor"),
    ("def shift(): pass", "has the wrong signature; number of arguments in exercises.py: 1"),
    ("shift = 3", "is of type int; expected a function"),
    ("def shift(row): raise KeyError('x y')", "KeyError: 'x y' (line "),
    ("def shift(row): raise NotImplementedError", "not done yet"),
    ("def shift(row): import sys; sys.exit(0)", "SystemExit: 0 (line "),
    ("def shift(row): raise SystemExit", "SystemExit (line "),
    ("def shift(row): return input(), row", "EOFError"),
    ("def tokenise_pair(t, p, w, l): return torch.tensor([1]), [1], [1]", "prompt_ids is a torch.Tensor of shape (1,)"),
    (
        "def tokenise_pair(t, p, w, l): return [1.0], [1], [1]",
        "prompt_ids is a list that contains a value of type float; expected",
    ),
    (
        "def tokenise_pair(t, p, w, l): return [10**400], [1], [1]",
        "prompt_ids is a list that contains a value of type int with 1329 bits",
    ),
    ("def implicit_reward(p, r, beta): return (beta * (p - r)).mean()", "rewards has shape (); expected"),
    (
        "def implicit_reward(p, r, beta): return (p - r) * float('nan')",
        "rewards contains NaN: 0/0, 0 * inf or inf - inf, after exp or log in two steps? (case 1)",
    ),
    ("def implicit_reward(p, r, beta): return (p - r).half()", "rewards has dtype float16; expected float64"),
    ("def implicit_reward(p, r, beta): return torch.zeros(400, 400).to(p)", "rewards has shape (400, 400)"),
    ("def sum_logps(logps, mask): return (logps * mask).detach().sum(-1)", "logps has lost a gradient"),
    (
        "def margin_and_loss(c, r): return c - r, -torch.nn.functional.logsigmoid(c - r.detach())",
        "losses has lost a gradient",
    ),
    ("def accuracy(*a): return float('nan')", "accuracy is NaN"),
    ("def accuracy(*a): return None", "accuracy is None"),
    ("def accuracy(*a): return 'all'", "accuracy is a value of type str; expected a number"),
    ("def accuracy(*a): return 10**400", "accuracy is a value of type int with 1329 bits"),
    ("def pick_beta(frontier, kl_budget): return [1.0]", "beta is a list or tuple of length 1"),
    # changes outside the function
    ("def pick_beta(frontier, kl_budget): return frontier.pop()['beta']", "it changes its argument 1 in place"),
    ("def shift(row): row[0] = 5; return row[:-1], row[1:]", "it changes its argument 1 in place"),
    ("def shift(row): torch.manual_seed(0); return row[:-1], row[1:]", "it draws or seeds torch's random numbers"),
    ("def shift(row): torch.set_default_dtype(torch.float64); return 1", "it changes torch's default dtype"),
    ("def shift(row): torch.set_grad_enabled(False); return 1", "it leaves gradients switched off or on"),
    ("def shift(row): torch.log = torch.exp; return 1", "it replaces torch.log"),
    ("def shift(row): torch.Tensor.tolist = 1; return 1", "it replaces Tensor.tolist"),
    ("def shift(row): import builtins; builtins.sum = max; return 1", "it replaces builtins.sum"),
    ("def shift(row): import random; random.random(); return 1", "it draws or seeds Python's random numbers"),
    ("def shift(row): import numpy; numpy.random.seed(0); return 1", "it draws or seeds numpy's random numbers"),
    (
        "def shift(row): import threading, time; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "it leaves threads running",
    ),
    # access to the grader, other processes and programs
    ("def shift(row): from course import oracles; return oracles.shift(row)", "it imports the grader (course.oracles)"),
    (
        "def shift(row): return open(train_dpo.__file__[:-12] + 'course/oracles.py').read()",
        "it opens the grader's files (oracles.py)",
    ),
    (
        "def shift(row):\n try: open(train_dpo.__file__[:-12] + 'course/grade.py')\n except OSError: pass\n"
        " return row[:-1], row[1:]",
        "grader's files",
    ),
    ("def shift(row): import inspect, sys; return inspect.getsource(sys.modules['course.child'])", "OSError"),
    ("def shift(row): import os; return open(f'/proc/{os.getppid()}/mem', 'rb')", "it reads another process"),
    ("def shift(row): import os; os.kill(os.getppid(), 9)", "it sends signals to other processes"),
    ("def shift(row): import subprocess; subprocess.run(['ls'])", "it starts or calls other programs"),
    ("def shift(row): import os; return os.fork()", "it starts or calls other programs"),
    # files of others, and what Python's own checks do not see
    ("def shift(row): import os; return os.link(train_dpo.__file__, 'mine.py')", "your code makes a link"),
    (
        "def shift(row): open('mine.txt', 'w').write('x'); return open('../mine.txt', 'w')",
        "writes outside its own folder",
    ),
    ("def shift(row): import os; os.remove(train_dpo.__file__)", "changes files outside its own folder (os.remove)"),
    ("def shift(row): import os; os.killpg(os.getpgid(os.getppid()), 9)", "it sends signals to other processes"),
    ("def shift(row): import socket; socket.socket().sendto(b'x', ('127.0.0.1', 9))", "it uses the network"),
    ("def shift(row): import ctypes; ctypes.CDLL(None).kill(1, 0)", "by ctypes"),
    # texts that a terminal would obey, and what JSON or UTF-8 cannot hold
    (r"def shift(row): raise ValueError('\x1b[2J\udcff\u202e')", r"ValueError: \x1b[2J\udcff\u202e (line "),
    (
        "def gradient_weight(c, r, beta):\n c, r = c.clone().requires_grad_(), r.clone().requires_grad_()\n"
        " return torch.autograd.grad(-torch.nn.functional.logsigmoid(c - r).sum() * beta, (c, r))",
        "it uses autograd; write the derivative as a formula",
    ),
    (
        "def gradient_weight(c, r, beta):\n"
        " c = c.detach().requires_grad_(); y = -torch.nn.functional.logsigmoid(c - r) * beta\n"
        " g = y.grad_fn(torch.ones_like(y))[0]; return g, -g",
        "it uses autograd; write the derivative as a formula",
    ),
    (
        "def gradient_weight(c, r, beta):\n"
        " f = lambda c: -torch.nn.functional.logsigmoid(c - r) * beta\n"
        " g = torch.func.jvp(f, (c,), (torch.ones_like(c),))[1]; return g, -g",
        "it uses autograd; write the derivative as a formula",
    ),
    # its process ends
    ("def shift(row): import os; os._exit(0)", "its process ended (exit code 0)"),
    ("def shift(row): import ctypes; ctypes.string_at(0)", "its process ended (exit code -11)"),
    ("def shift(row): import os; os.closerange(3, 99); return row[:-1], row[1:]", ""),
    ("def shift(row): return [0] * 10**10", "MemoryError"),
    ("def shift(row): return torch.zeros(10**10), row", "RuntimeError: "),
]


@pytest.fixture(scope="module")
def cases():
    """FEW cases per function, in float64 and float32: these tests grade many files."""
    return {name: drawn[:FEW] for name, drawn in draw_cases(SEED).items()}


@pytest.mark.parametrize("code,said", BAD, ids=[code[4:60] for code, _ in BAD])
def test_a_bad_function_costs_only_its_own_points(code, said, tmp_path, cases):
    name = code.removeprefix("def ").partition("(")[0].partition(" ")[0]
    if "/proc" in code or "10**10" in code:
        from conftest import need

        need(sys.platform == "linux", "only Linux has /proc and enforces the limit on memory")
    result = grade(write(tmp_path, code), cases, time_limit=LONG)
    only_loses(result, name)
    assert said in words(result, name)


def test_endless_loops_are_stopped(tmp_path, cases):
    code = """
    def shift(row):
        while True:
            pass
    def accuracy(*logps):
        while True:
            print("x" * 10_000)
    """
    result = grade(write(tmp_path, code), cases, time_limit=2)
    only_loses(result, "shift", "accuracy")
    assert words(result, "shift") == words(result, "accuracy") == "no answer within 2 seconds"


def test_printing_costs_nothing(tmp_path, cases, capfd):
    code = """
    import os, sys
    print("hello")
    right = shift
    def shift(row):
        print("x" * 1_000_000)
        os.write(1, b"below Python")
        sys.stderr.write("more")
        return right(row)
    """
    only_loses(grade(write(tmp_path, code), cases, time_limit=LONG))
    assert "hello" not in capfd.readouterr().out


def test_missing_and_many_at_once(tmp_path, cases):
    code = "def shift(row):\n    import os; os._exit(1)\ndef accuracy(*x): pass"
    result = grade(write(tmp_path, code, without=("build_batch", "pick_beta")), cases, time_limit=LONG)
    only_loses(result, "shift", "accuracy", "build_batch", "pick_beta")
    assert words(result, "build_batch") == words(result, "pick_beta") == "not defined"


@pytest.mark.parametrize(
    "code,said",
    [
        ("1 / 0", "the file does not import: ZeroDivisionError: division by zero (line "),
        ("def f(:", "the file does not import: SyntaxError: "),
        (
            "import not_there_at_all",
            "the file does not import: ModuleNotFoundError: No module named 'not_there_at_all'",
        ),
        ("while True: pass", "the file does not import: no answer within 1 seconds"),
        ("import os; os._exit(3)", "the file does not import: its process ended (exit code 3)"),
        ("raise SystemExit('bye')", "the file does not import: SystemExit: bye"),
        ("torch.exp = torch.log", "on import the file replaces torch.exp"),
        ("torch.set_default_dtype(torch.float64)", "on import the file changes torch's default dtype"),
        ("import course.oracles", "on import the file imports the grader (course.oracles)"),
    ],
)
def test_a_file_that_does_not_import(code, said, tmp_path, cases):
    result = grade(write(tmp_path, code), cases, time_limit=1 if "while" in code else LONG)
    only_loses(result, *NAMES)
    assert result["output"].startswith(said)


def test_a_file_that_is_not_python(tmp_path, cases):
    path = tmp_path / "x.py"
    path.write_bytes(b"\xff\x00\xfe" * 9)
    result = grade(path, cases, time_limit=LONG)
    assert result["score"] == 0 and result["output"].startswith("the file does not import: ")


def test_seeding_at_the_top_is_allowed(tmp_path, cases):
    only_loses(grade(write(tmp_path, "torch.manual_seed(0)"), cases, time_limit=LONG))


@pytest.mark.parametrize(
    "late",
    ["torch.compile(lambda x: x + 1, backend='eager')(row)", "torch.func.grad(lambda x: (x * x).sum())(row.double())"],
)
@pytest.mark.parametrize("where", ["in the function", "at the top"])
def test_what_torch_wraps_on_first_use_is_not_the_students_doing(late, where, tmp_path, cases):
    """On its first import, torch._dynamo puts a wrapper in the place of torch.manual_seed."""
    top = f"row = torch.ones(3)\n{late}\n" if where == "at the top" else ""
    code = f"{top}right = shift\ndef shift(row):\n    {late}\n    return right(row)"
    only_loses(grade(write(tmp_path, code), cases, time_limit=LONG))


def test_a_wrapper_of_the_students_own_is_told(tmp_path, cases):
    code = """
    import functools
    def shift(row):
        right = torch.log
        torch.log = functools.wraps(right)(lambda x: right(x))
        return row[:-1], row[1:]
    """
    assert words(grade(write(tmp_path, code), cases, time_limit=LONG), "shift") == "it replaces torch.log"


FORGED = [
    '{"imports": 5}',
    '{"answers": [[{"dtype": "int64", "shape": [1], "values": [%s]}]], "imports": []}' % ("9" * 400),
    "[" * 5000,
]


@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_a_function_that_writes_to_the_pipe_costs_only_its_own_points(forged, tmp_path, cases):
    code = f"""
    def shift(row):
        import gc
        from multiprocessing.connection import Connection
        for thing in gc.get_objects():
            if isinstance(thing, Connection) and thing.writable:
                thing.send_bytes({forged!r}.encode())
        return row[:-1], row[1:]
    """
    result = grade(write(tmp_path, code), cases, time_limit=LONG)
    only_loses(result, "shift")
    assert words(result, "shift") == "the reply of its process cannot be read"


def test_half_a_reply_does_not_stop_the_grader(tmp_path, cases, monkeypatch):
    monkeypatch.setattr(command, "TRANSFER_LIMIT", 0.2)
    code = """
    import gc, os, time
    from multiprocessing.connection import Connection
    def shift(row):
        for thing in gc.get_objects():
            if isinstance(thing, Connection) and thing.writable:
                os.write(thing.fileno(), b"\\0\\0\\x10\\0 less than 4,096 bytes")
        time.sleep(99)
    """
    only_loses(grade(write(tmp_path, code), cases, time_limit=LONG), "shift")


@pytest.mark.parametrize(
    "reply", [None, 5, {}, {"imports": 5}, {"failed": {}}, {"answers": 5, "imports": [], "id": "x"}]
)
def test_a_reply_is_data_to_be_checked(reply):
    assert command.checked(reply, "x")["failed"] == command.UNREADABLE
    right = command.checked({"answers": [], "imports": ["train_dpo", 3, "os"], "id": "x"}, "x")
    assert right == {"failed": None, "died": False, "missing": False, "imports": ["train_dpo"], "answers": []}


def test_each_file_is_alone_and_harms_nothing(tmp_path, cases):
    """Also where the code that reads and writes is not Python: the kernel refuses it, if it can."""
    (tmp_path / "neighbour.py").write_text(SOURCE, encoding="utf-8")
    code = f"""
    import os, pathlib
    def shift(row):
        import neighbour
    def accuracy(*logps):
        return pathlib.Path({str(tmp_path)!r}, "neighbour.py").read_text()
    def pick_beta(frontier, kl_budget):
        return -float(os.listdir(".") == ["submission.py"])
    def gather_logps(logits, targets):
        torch.save(logits, {str(tmp_path / "neighbour.py")!r})
    """
    path = write(tmp_path, code, without=("sum_logps",))
    result = grade(path, cases, time_limit=LONG)
    only_loses(result, "shift", "accuracy", "pick_beta", "gather_logps", "sum_logps")
    assert "No module named 'neighbour'" in words(result, "shift")
    assert "opens files outside its own folder" in words(result, "accuracy")
    assert words(result, "pick_beta").startswith("case 1: got -1, ")
    if sandbox.landlock_version():
        assert (tmp_path / "neighbour.py").read_text(encoding="utf-8") == SOURCE
    assert sorted(os.listdir(tmp_path)) == ["mine.py", "neighbour.py"]


def test_the_grader_and_its_helpers_cannot_be_written_to(tmp_path, cases, capfd):
    """Pipes of the resource tracker and of the fork server came with the process: none but the reply's is left."""
    code = """
    import os, stat
    for i in range(3, 64):
        try:
            if stat.S_ISFIFO(os.fstat(i).st_mode):
                os.write(i, b"REGISTER:x:\\x1b[31mHELLO\\x07\\n")
                raise SystemExit("a pipe")
        except OSError:
            pass
    """
    only_loses(grade(write(tmp_path, code), cases, time_limit=LONG))
    assert "HELLO" not in capfd.readouterr().err


@pytest.mark.skipif(command._METHOD != "forkserver", reason="this system has no fork server")
def test_if_the_fork_server_ends_a_new_one_is_started(tmp_path, cases):
    from multiprocessing.forkserver import _forkserver

    grade(write(tmp_path, "1 / 0"), cases, time_limit=LONG)
    _forkserver._forkserver_address = str(tmp_path / "nobody")  # as if it had just ended
    only_loses(grade(write(tmp_path, ""), cases, time_limit=LONG))


def test_a_link_to_the_solution_and_a_hidden_import_are_told(tmp_path, cases):
    os.link(SOLUTION, tmp_path / "hard.py") if SOLUTION.stat().st_dev == tmp_path.stat().st_dev else None
    os.symlink(SOLUTION, tmp_path / "soft.py")
    for path in tmp_path.iterdir():
        result = grade(path, cases, time_limit=LONG)
        assert (result["score"], result["output"]) == (0, "the file is a link to a file of the course")
    path = write(tmp_path, "import sys\ndel sys.modules['train_dpo'], sys.modules['minidpo.dataset']")
    assert grade(path, cases, time_limit=LONG)["output"] == "imports data, experiments, minidpo, train_dpo"


@pytest.mark.parametrize(
    "source,said",
    [
        ("# größe\nx = 1\n".encode("latin-1"), "not in utf-8: save the file as UTF-8"),
        ("# -*- coding: latin-1 -*-\nx = 'größe'\n".encode("latin-1"), ""),
        ("x = 'größe'\n".encode("utf-16"), ""),
        ("x = 'größe'\n".encode("utf-8-sig"), ""),
        (b"import torch\n%matplotlib inline\n", "delete the lines that begin with %, ! or get_ipython"),
        (b"get_ipython().run_line_magic('matplotlib', 'inline')\n", "delete the lines that begin with %, ! or"),
        (b'{"cells": [], "metadata": {"x": true}}', "this is a notebook: export it as a .py file"),
        (b"x" * 2_000_000, "the file has 2,000,000 bytes"),
    ],
    ids=["latin-1", "declared", "utf-16", "bom", "magic", "exported magic", "notebook", "large"],
)
def test_encodings_and_notebooks(source, said, tmp_path, cases):
    path = tmp_path / "x.py"
    path.write_bytes(source)
    result = grade(path, cases, time_limit=LONG)
    assert result["score"] == 0 and said in result["output"]
    assert said or {test["output"] for test in result["tests"]} == {"not defined"}


# ---- the command ----


def test_several_files_a_table_and_one_json(tmp_path, capsys):
    stubs = mistakes.ROOT / "course" / "exercises.py"
    broken = tmp_path / "broken.py"
    broken.write_text("oops", encoding="utf-8")
    files = [SOLUTION, stubs, broken]
    call(command.main, *files, "--json", tmp_path / "all.json", "--seed", 7, "--time-limit", LONG)
    results = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert [(r["file"], r["score"], r["seed"]) for r in results] == [
        (str(f), s, 7) for f, s in zip(files, (120, 0, 0), strict=True)
    ]
    assert all(test["output"] == "not done yet" for test in results[1]["tests"])
    table = capsys.readouterr().out.split("\n\n")[2].splitlines()
    assert table[0].split() == ["points", *map(str, range(1, 13))]
    assert table[1].split()[:3] == [str(SOLUTION), "120", "10"] and table[2].split() == [str(stubs)] + ["0"] * 13
    assert "NameError: name 'oops' is not defined (line 1)" in table[3]
    assert table[4].split() == ["mean", "40.0"] + ["3.3"] * 12


def test_a_class_goes_on_whatever_one_file_does(tmp_path, capsys):
    bad = {
        "name\x1b[2J.py": "raise ValueError('\\x1b[2J\\udcff')",
        "killer.py": "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
        "forger.py": "import gc\nfrom multiprocessing.connection import Connection\n"
        "[c.send_bytes(b'5') for c in gc.get_objects() if isinstance(c, Connection) and c.writable]",
    }
    for name, code in bad.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    files = [*(tmp_path / name for name in bad), SOLUTION]
    call(command.main, *files, "--json", tmp_path / "all.json", "--time-limit", LONG)
    assert [r["score"] for r in json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))] == [0, 0, 0, 120]
    out = capsys.readouterr().out
    assert "mean" in out and all(c.isprintable() or c == "\n" for c in out)


def test_bad_commands(tmp_path, capsys):
    assert "is not a file" in fails(capsys, command.main, tmp_path / "nobody.py")
    assert "It is a folder; write" in fails(capsys, command.main, tmp_path)
    assert "--time-limit 0.0 must be" in fails(capsys, command.main, SOLUTION, "--time-limit", 0)


def test_the_same_seed_gives_the_same_cases_and_another_does_not():
    asked = [request(e, draw_cases(seed)[e.name]) for seed in (1, 1, 2) for e in EXERCISES]
    n = len(EXERCISES)
    assert asked[:n] == asked[n : 2 * n]
    assert all(a != b for a, b in zip(asked[:n], asked[2 * n :], strict=True))
