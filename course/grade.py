"""Grades solutions of exercises.py: ten random cases for each of the twelve functions, one point per case.

    python -m course.grade my_dpo.py
    python -m course.grade submissions/*.py --json grades.json

A wrong answer is compared with the known mistakes in oracles.py. If it matches one, the report names the mistake. A
function gets no points at all if one of its cases ends in an error, None, NaN, the wrong shape or dtype, takes too long
or changes something outside the function. The other functions are graded as usual.

A copy of the student's file runs in a temporary folder, in a separate process (child.py, sandbox.py) that receives the
cases but not the oracles. If a function takes too long, the process is killed and a new one continues with the next
function. Whatever goes wrong with a file costs that file's points only. The exit code is 0 if all files were graded,
whatever their scores, and 2 if the command cannot be carried out.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import stat
import statistics
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

from course import sandbox
from minidpo.files.writing import atomic_write
from minidpo.settings import UserError, run_main

# Importing torch takes seconds. Where the system can fork, each process is forked from one that has imported it.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PROCESSES = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    _PROCESSES.set_forkserver_preload(["torch", "numpy", "tiktoken", "regex", "tqdm"])
START_LIMIT = 120  # seconds for a process to import torch
REPLY_LIMIT = 50 * 1024**2  # bytes in one reply
TRANSFER_LIMIT = 10  # seconds to send a request, or to receive a reply that has begun
FILE_LIMIT = 1024**2  # bytes in a student's file
NAN = ": 0/0, 0 * inf or inf - inf, after exp or log in two steps?"
UNREADABLE = "the reply of its process cannot be read"
COURSE = Path(__file__).resolve().parent

# ---- 1. Grade a file ----


def draw_cases(seed):
    """Returns {name of the exercise: its cases}. One seed gives the same cases for every file."""
    from course.oracles import CASES, EXERCISES  # imported here, so that the student's process does not import them

    return {e.name: [e.case(random.Random(f"{seed} {e.name} {i}"), i) for i in range(CASES)] for e in EXERCISES}


def grade(path, cases, time_limit, tick=lambda: None):
    """Grades one file; returns a dict with the field names of Gradescope's results.json.

    Args:
        path: the student's file.
        cases: {name of the exercise: list of cases}, as `draw_cases` returns.
        time_limit: seconds for importing the file, and again for each function.
        tick: called without arguments after each function.
    """
    from course.oracles import EXERCISES

    started = time.perf_counter()
    student, tests, imports, failed = Student(path, time_limit), [], set(), refusal(path)
    for exercise in EXERCISES:
        score, output = 0, ""
        failed = failed or student.start()
        if not failed:
            reply = student.ask(request(exercise, cases[exercise.name]))
            imports.update(student.imports)
            try:
                score, output = judge(exercise, cases[exercise.name], reply)
            except Exception:  # the file itself wrote to the pipe, and that can be anything
                output = UNREADABLE
        max_score = len(cases[exercise.name])
        tests.append({"name": exercise.name, "score": score, "max_score": max_score, "output": printable(output)})
        tick()
    student.stop()
    output = failed or (f"imports {', '.join(sorted(imports))}" if imports else "")
    return {
        "file": printable(str(path)),
        "score": sum(test["score"] for test in tests),
        "max_score": sum(test["max_score"] for test in tests),
        "output": printable(output),
        "execution_time": round(time.perf_counter() - started, 2),
        "tests": tests,
    }


def refusal(path):
    """Why a file is not graded at all, or None."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "it is a folder, not a file" if os.path.isdir(path) else "it is not a file"
        if os.path.getsize(path) > FILE_LIMIT:
            return f"the file has {os.path.getsize(path):,} bytes; at most {FILE_LIMIT:,} are read"
        own = Path(os.path.abspath(path))
        if any(
            os.path.samefile(own, file) for file in COURSE.rglob("*.py") if file != own.resolve() or own.is_symlink()
        ):
            return "the file is a link to a file of the course"
    except OSError as error:
        return f"the file cannot be read: {error.strerror}"
    return None


def printable(text):
    """The text of a submission without control characters, which a terminal would obey, and without surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)[:500]


def request(exercise, cases):
    """The message to the child: the cases of one exercise, as values that JSON can hold."""

    def as_json(argument):
        if hasattr(argument, "eot"):
            return {"tokens": [token.decode("latin-1") for token in argument.tokens]}
        return argument._asdict() if hasattr(argument, "_asdict") else argument

    encoded = [[as_json(argument) for argument in case] for case in cases]
    gradient = exercise.inputs if exercise.gradient else 0
    return {"name": exercise.name, "gradient": gradient, "by_hand": exercise.by_hand, "cases": encoded}


class Student:
    """The process that runs a copy of the student's file, alone in a temporary folder."""

    def __init__(self, path, time_limit):
        self.path, self.time_limit = Path(path), time_limit
        self.process, self.imports = None, []

    def start(self):
        """Starts a process unless one is running; returns why the file cannot be used, or None."""
        if self.process:
            return None
        self.folder = tempfile.mkdtemp(prefix="minidpo-grade-")
        try:
            copy = shutil.copyfile(self.path, Path(self.folder, "submission.py"))
        except OSError as error:
            self._remove_folder()
            return f"the file cannot be read: {error.strerror}"
        if not (self._fork(copy) or self._fork(copy, afresh=True)):
            self._remove_folder()
            return f"no process could be started within {START_LIMIT} seconds; grade the file again"
        reply = checked(self._receive(self.time_limit))
        if reply["failed"]:
            self.stop(wait=0)
            return f"the file does not import: {reply['failed']}" if reply["died"] else reply["failed"]
        self.imports = reply["imports"]
        return None

    def _fork(self, copy, afresh=False):
        """Starts the process and waits until it has imported torch; returns whether it did. It imports `copy` next."""
        if afresh:
            forget_forkserver()
        self.connection, theirs = _PROCESSES.Pipe()
        self.process = _PROCESSES.Process(target=_serve, args=(str(copy), theirs), daemon=True)
        try:
            with silent():
                self.process.start()
            theirs.close()
            if "ready" in (self._receive(START_LIMIT) or {}):
                return True
            self.process.kill()
            self.process.join()
        except (OSError, EOFError):  # the process that forks has ended
            theirs.close()
        self.connection.close()
        self.process = None
        return False

    def ask(self, request):
        """Sends a request and returns the reply; kills the process unless it may continue with the next function."""
        number = secrets.token_hex(8)  # so that no reply is taken for that of another function
        reply = checked(self._receive(self.time_limit, {**request, "id": number}), number)
        self.imports = reply["imports"]
        if reply["failed"] and not reply["missing"]:
            self.stop(wait=0)  # so that nothing it left behind reaches the next function
        return reply

    def _receive(self, seconds, request=None):
        try:
            if request:
                self._or_kill(self.connection.send_bytes, json.dumps(request).encode())
            # in steps of 0.1 seconds, so that time does not count while the machine sleeps or the grader is stopped
            if not any(self.connection.poll(0.1) for _ in range(math.ceil(seconds / 0.1))):
                return {"failed": f"no answer within {seconds:g} seconds", "died": True}
            return json.loads(self._or_kill(self.connection.recv_bytes, REPLY_LIMIT))
        except (EOFError, OSError):
            self.process.join(1)
            return {"failed": f"its process ended (exit code {self.process.exitcode})", "died": True}
        except (ValueError, RecursionError):
            return None

    def _or_kill(self, transfer, argument):
        """Calls `transfer`, and kills the process if that does not end: it may write half a reply and then wait."""
        timer = threading.Timer(TRANSFER_LIMIT, self.process.kill)
        timer.start()
        try:
            return transfer(argument)
        finally:
            timer.cancel()

    def stop(self, wait=2):
        """Gives the process `wait` seconds to end, then kills it."""
        if self.process:
            self.connection.close()
            self.process.join(wait)
            self.process.kill()
            self.process.join()
            self.process = None
            self._remove_folder()

    def _remove_folder(self):
        with contextlib.suppress(RecursionError):  # folders in folders in folders
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def silent():
    """Discards stderr, which a process that starts here keeps: its messages may contain what a student's file sent."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def forget_forkserver():
    """Ends the process from which the others are forked, so that the next start makes a new one."""
    if _METHOD == "forkserver":
        from multiprocessing.forkserver import _forkserver

        with contextlib.suppress(OSError, TypeError):  # it has ended, or was never started
            os.kill(_forkserver._forkserver_pid, signal.SIGKILL)
            _forkserver._stop()


def checked(reply, number=None):
    """The reply with exactly the fields that the grader reads, whatever the process sent.

    Returns:
        A dict with `failed` (str or None), `died`, `missing` (bool), `imports` (list of names) and `answers` (list).
    """
    if not isinstance(reply, dict):
        reply = {}
    failed, imports, answers = reply.get("failed"), reply.get("imports"), reply.get("answers")
    died = reply.get("died") is True
    if not (isinstance(failed, str) or failed is None and (isinstance(answers, list) or number is None)):
        failed = UNREADABLE
    if not died and (reply.get("id") != number or not isinstance(imports, list)):
        failed, died = UNREADABLE, True
    names = [name for name in sandbox.PROJECT if name in imports] if isinstance(imports, list) else []
    missing = reply.get("missing") is True and failed != UNREADABLE
    return {"failed": failed, "died": died, "missing": missing, "imports": names, "answers": answers}


def _serve(path, connection):
    from course import child  # imports torch

    connection.send_bytes(b'{"ready": true}')
    child.serve(path, connection)


# ---- 2. Judge the answers ----


def judge(exercise, cases, reply):
    """The child's reply -> (points, message for the student)."""
    if reply.get("failed"):
        hints = [hint for part, hint in exercise.hints.items() if part in reply["failed"]]
        return 0, "; ".join([reply["failed"], *hints])
    plain = [[a.values if hasattr(a, "values") else a for a in case] for case in cases]
    dtypes = [next((a.dtype for a in case if getattr(a, "dtype", "").startswith("float")), None) for case in cases]
    if all(kind.startswith("number") for kind in exercise.returns.values()):
        dtypes = [None] * len(cases)  # a plain number may be a float, or a tensor of either dtype
    expected = [exercise.oracle(*case) for case in plain]
    answers, slopes = [], []
    for number, (answer, right, dtype) in enumerate(zip(reply["answers"], expected, dtypes, strict=True), start=1):
        answer = answer if len(exercise.returns) > 1 else [answer]
        wrong = malformed(exercise, answer, right, dtype)
        if wrong:
            return 0, f"{wrong} (case {number})"
        slopes.append(wrong_gradient(exercise, answer, plain[number - 1], dtype))
        answers.append([value_of(item) for item in answer])
    agree = [alike(*case) for case in zip(answers, expected, dtypes, strict=True)]
    if not all(agree):
        right = sum(a and not wrong for a, wrong in zip(agree, slopes, strict=True))
        return right, diagnosis(exercise, plain, answers, expected, dtypes)
    return slopes.count(""), next(filter(None, slopes), "")


def wrong_gradient(exercise, answer, case, dtype):
    """What is wrong with the gradients of an answer, or ""."""
    for name, item in zip(exercise.returns, answer, strict=True):
        if name in exercise.gradient:
            gradient, right = item["gradient"], list(exercise.gradient[name](*case))
            if not close(gradient, right, dtype, loose=True):
                if any(math.isnan(x) for x in flat(gradient)):
                    return f"the gradient of {name} is NaN: exp overflows (torch.where passes on both of its branches)"
                return f"the value is right, but the gradient is not that of {name}: is a part of the formula detached?"
    return ""


def alike(answer, other, dtype):
    """Whether two answers to one case agree; each is a sequence of the returned values."""
    return all(close(a, o, dtype) for a, o in zip(answer, other, strict=True))


def diagnosis(exercise, cases, answers, expected, dtypes):
    """Names the known mistake that gives exactly these answers in every case.

    If no mistake matches the whole answers, each returned value is compared by itself. A value that no mistake matches
    is shown in its first wrong case.
    """
    made = {}  # (number of the mistake, of the case) -> its answer, when it is needed

    def agrees(i, n, part):
        """Whether mistake i gives the slice `part` of the answer to case n."""
        if (i, n) not in made:
            made[i, n] = exercise.mistakes[i][1](*cases[n])
        return alike(answers[n][part], made[i, n][part], dtypes[n])

    def likely_mistake(part):
        """The name of the first mistake that agrees in all cases, or else in all of float64, where it is not exact."""
        for exact in (range(len(cases)), [n for n, dtype in enumerate(dtypes) if dtype == "float64"]):
            wrong = any(not alike(answers[n][part], expected[n][part], dtypes[n]) for n in exact)
            for i, (words, _) in enumerate(exercise.mistakes * wrong):
                if all(agrees(i, n, part) for n in exact):
                    return f"likely mistake: {words}"
        return ""

    whole = likely_mistake(slice(None))
    if whole:
        return whole
    said = []
    for i, name in enumerate(exercise.returns):
        part = slice(i, i + 1)
        wrong = [n for n in range(len(cases)) if not alike(answers[n][part], expected[n][part], dtypes[n])]
        if wrong:
            words = likely_mistake(part) or shown(
                wrong[0] + 1, answers[wrong[0]][i], expected[wrong[0]][i], dtypes[wrong[0]]
            )
            said.append(f"{name}: {words}" if len(exercise.returns) > 1 else words)
    return "; ".join(said)


def shown(number, answer, right, dtype):
    """A wrong answer beside the right one, or where both are cut, the first place that differs."""
    place, x, y = "", answer, right
    while short(x) == short(y) and isinstance(x, list) and len(x) == len(y):
        i = next(i for i, pair in enumerate(zip(x, y, strict=True)) if not close(*pair, dtype))
        place, x, y = f"{place}[{i}]", x[i], y[i]
    words = f"case {number}{place and f', at {place}'}: got {short(x)}, expected {short(y)}"
    infinite = [math.isinf(x) for x in flat(answer) if type(x) is float]
    return (
        f"{words} (infinite where the right value is finite: exp, log or division in two steps?)" * any(infinite)
        or words
    )


def short(value):
    """A value as text of at most 80 characters."""
    if isinstance(value, list):
        text = "[" + ", ".join(short(v) for v in value) + "]"
    else:
        text = f"{value:.6g}" if type(value) is float else str(value)
    return text if len(text) <= 80 else text[:75] + " ...]"


def value_of(item):
    """The plain numbers of an encoded item."""
    if isinstance(item, list):
        return [v["value"] for v in item]
    return item["values"] if "values" in item else item["value"]


def malformed(exercise, answer, expected, dtype):
    """Why an answer cannot count, or "".

    Args:
        answer: the encoded items that the student's function returned.
        expected: the oracle's values.
        dtype: of the float arguments, which float tensors in the answer must have.
    """
    names = list(exercise.returns)
    if not isinstance(answer, list) or (len(answer) != len(names)):
        what = f"{len(answer)} values" if isinstance(answer, list) else kind_of(answer)
        return f"returns {what}; expected {len(names)} values: {', '.join(names)}"
    for (name, kind), item, right in zip(exercise.returns.items(), answer, expected, strict=True):
        if kind == "ids":
            others = [v for v in item if type(v) is not dict or type(v.get("value")) is not int]
            if not isinstance(item, list) or others:
                what = f"a list that contains {kind_of(others[0])}" if isinstance(item, list) else kind_of(item)
                return f"{name} is {what}; expected a list of ids (int)"
            continue
        if kind.startswith("number"):
            if isinstance(item, dict) and item.get("shape") == [] and "values" in item:
                item["value"] = item.pop("values")
            number = item.get("value", "no") if isinstance(item, dict) else "no"
            if number == "no" or number is None and kind == "number":
                return f"{name} is {kind_of(item)}; expected a number"
            if type(number) is float and math.isnan(number):
                return f"{name} is NaN{NAN}"
            continue
        if not isinstance(item, dict) or "dtype" not in item:
            return f"{name} is {kind_of(item)}; expected a torch.Tensor"
        wanted = dtype if kind == "float" else kind
        if item["dtype"] != wanted:
            return f"{name} has dtype {item['dtype']}; expected {wanted}"
        if item["shape"] != shape(right):
            return f"{name} has shape {tuple(item['shape'])}; expected {tuple(shape(right))}"
        if kind == "float" and any(math.isnan(v) for v in flat(item["values"])):
            return f"{name} contains NaN{NAN}"
        if name in exercise.gradient and not item["gradient"]:
            return f"{name} has lost a gradient, so it cannot train (.item(), .detach(), torch.tensor(...) or no_grad?)"
    return ""


def kind_of(item):
    """Describes an encoded item in words."""
    if isinstance(item, list):
        return f"a list or tuple of length {len(item)}"
    if "dtype" in item:
        return f"a torch.Tensor of shape {tuple(item['shape'])}"
    if "other" in item:
        return f"a value of type {item['other']}"
    if item["value"] is None:
        return "None (is the return statement missing?)"
    return f"a value of type {type(item['value']).__name__}"


def shape(values):
    return [len(values), *shape(values[0])] if isinstance(values, list) else []


def flat(values):
    return [x for v in values for x in flat(v)] if isinstance(values, list) else [values]


def close(answer, expected, dtype, loose=False):
    """Whether all numbers agree, within a tolerance that depends on the dtype. `loose`: a larger one, for gradients."""
    if answer is None or expected is None:
        return answer is expected
    tolerance = (1e-8 if dtype == "float64" else 1e-4) * (10 if loose else 1)
    a, e = flat(answer), flat(expected)
    agree = (math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance) for x, y in zip(a, e, strict=False))
    return len(a) == len(e) and all(agree)


# ---- 3. The command ----


def report(result):
    """The result of one file as text, one line per function."""
    lines = [f"{result['file']}: {result['score']} of {result['max_score']} points"]
    lines += [f"  {result['output']}"] * bool(result["output"])
    for test in result["tests"]:
        lines.append(f"  {test['name']:16} {test['score']:2} of {test['max_score']}   {test['output']}".rstrip())
    return "\n".join(lines)


def table(results):
    """The results of all files as a table: one line per file, one column per function, and the means."""
    names = [test["name"] for test in results[0]["tests"]]
    width = max(len(result["file"]) for result in results)
    lines = [f"{i}: {name}" for i, name in enumerate(names, start=1)]
    lines += ["", f"{'':{width}} points " + "".join(f"{i:5}" for i in range(1, len(names) + 1))]
    for result in results:
        scores = "".join(f"{test['score']:5}" for test in result["tests"])
        lines.append(f"{result['file']:{width}} {result['score']:6} {scores}  {result['output']}".rstrip())
    columns = zip(*([test["score"] for test in result["tests"]] for result in results), strict=True)
    means = "".join(f"{statistics.mean(column):5.1f}" for column in columns)
    lines.append(f"{'mean':{width}} {statistics.mean(result['score'] for result in results):6.1f} {means}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m course.grade"
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a solution; several give a table at the end")
    parser.add_argument("--json", help="write the results to this file: an object for one FILE, a list for several")
    parser.add_argument("--time-limit", type=float, default=3.0, help="seconds per function (default 3)")
    parser.add_argument("--seed", type=int, help="seed of the random cases (default: a new seed each time)")
    args = parser.parse_args()
    for file in args.files:
        if not os.path.lexists(file) or len(args.files) == 1 and not Path(file).is_file():
            hint = f" It is a folder; write {file}/*.py" if Path(file).is_dir() else ""
            raise UserError(f"{file} is not a file.{hint}")
    if not 0 < args.time_limit < math.inf:
        raise UserError(f"--time-limit {args.time_limit} must be a number of seconds above 0.")
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    cases = draw_cases(seed)
    results = []
    steps = len(args.files) * len(cases)
    with tqdm(total=steps, desc="grading", unit="function", disable=None) as bar:
        for file in args.files:
            results.append({"seed": seed, **grade(file, cases, args.time_limit, bar.update)})
            bar.write(report(results[-1]))
            if args.json:  # written after each file, so that an interruption loses at most one result
                whole = results if len(args.files) > 1 else results[0]
                atomic_write(args.json, json.dumps(whole, indent=2) + "\n")
    if len(results) > 1:
        print("\n" + table(results))
    print(f"to repeat these cases: --seed {seed}")


if __name__ == "__main__":
    run_main(main)
