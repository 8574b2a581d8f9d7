"""Grades solutions of exercises.py: ten random cases for each of the twelve functions, a point for each case.

    python -m course.grade my_dpo.py
    python -m course.grade submissions/*.py --json grades.json

A wrong answer is compared with the known mistakes of oracles.py, and the one it looks like is named. An answer that
cannot count in one case (an error, another shape or dtype, None, NaN, too slow, something changed that is not its own)
gets no points for that function; the others are graded as if nothing had happened.

The student's file runs in a process of its own (child.py), which is given the cases and not the oracles. It is killed
when it takes too long, and a new one goes on with the next function. The exit code is 0 if all files were graded,
whatever their points, and 2 if the command cannot be carried out.
"""

import argparse
import json
import math
import multiprocessing
import random
import secrets
import statistics
import time
from pathlib import Path

from tqdm import tqdm

from minidpo.files import atomic_write
from minidpo.settings import UserError, run_main

# Importing torch takes seconds. Where the system can fork, each process is forked from one that has done it.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PROCESSES = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    _PROCESSES.set_forkserver_preload(["torch", "numpy", "tiktoken", "regex", "tqdm"])
STARTING = 120  # seconds for torch to be imported
REPLY = 50 * 1024**2  # bytes, at most
UNREADABLE = "what came back cannot be read"

# ---- 1. A file -> its points ----


def draw_cases(seed):
    """{name of the exercise: its cases}, the same for every file that is graded with this seed."""
    from course.oracles import CASES, EXERCISES  # here, so that the student's process does not import them

    return {e.name: [e.case(random.Random(f"{seed} {e.name} {i}"), i) for i in range(CASES)] for e in EXERCISES}


def grade(path, cases, time_limit, tick=lambda: None):
    """One file -> a dict with the field names of Gradescope's results.json. `tick` is called for each function."""
    from course.oracles import EXERCISES

    started = time.perf_counter()
    student, tests, imports, failed = Student(path, time_limit), [], set(), None
    for exercise in EXERCISES:
        score, output = 0, ""
        failed = failed or student.start()
        if not failed:
            reply = student.ask(request(exercise, cases[exercise.name]))
            imports.update(student.imports)
            try:
                score, output = judge(exercise, cases[exercise.name], reply)
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
                output = UNREADABLE  # the file wrote into the pipe itself
        tests.append({"name": exercise.name, "score": score, "max_score": len(cases[exercise.name]), "output": output})
        tick()
    student.stop()
    output = failed or (f"imports {', '.join(sorted(imports))}" if imports else "")
    return {
        "file": str(path),
        "score": sum(test["score"] for test in tests),
        "max_score": sum(test["max_score"] for test in tests),
        "output": output,
        "execution_time": round(time.perf_counter() - started, 2),
        "tests": tests,
    }


def request(exercise, cases):
    """What the child is sent."""

    def as_json(argument):
        if hasattr(argument, "eot"):
            return {"tokens": [token.decode("latin-1") for token in argument.tokens]}
        return argument._asdict() if hasattr(argument, "_asdict") else argument

    encoded = [[as_json(argument) for argument in case] for case in cases]
    return {"name": exercise.name, "gradient": bool(exercise.gradient), "cases": encoded}


class Student:
    """The process with the student's file. `start` begins one unless one is running, `ask` asks it, `stop` ends it."""

    def __init__(self, path, time_limit):
        self.path, self.time_limit = path, time_limit
        self.process, self.imports = None, []

    def start(self):
        """Why the file cannot be used, or None."""
        if self.process:
            return None
        self.connection, theirs = _PROCESSES.Pipe()
        self.process = _PROCESSES.Process(target=_serve, args=(str(self.path), theirs), daemon=True)
        self.process.start()
        theirs.close()
        if "ready" not in self._receive(STARTING):  # torch is imported; the student's file comes next
            raise UserError(f"no process of the grader was ready within {STARTING} seconds. Is the machine overloaded?")
        reply = self._receive(self.time_limit)
        if reply.get("failed"):
            self.stop(wait=0)
            why = reply["failed"]
            return f"the file does not import: {why}" if reply.get("died") else why
        self.imports = reply["imports"]
        return None

    def ask(self, request):
        reply = self._receive(self.time_limit, request)
        self.imports = reply.get("imports", [])
        if "answers" not in reply and not reply.get("missing"):
            self.stop(wait=0)  # what it left behind is gone with it
        return reply

    def _receive(self, seconds, request=None):
        try:
            if request:
                self.connection.send_bytes(json.dumps(request).encode())
            # in steps, so that the time for which a machine slept, or all was stopped, does not count
            if not any(self.connection.poll(0.1) for _ in range(math.ceil(seconds / 0.1))):
                return {"failed": f"no answer within {seconds:g} seconds", "died": True}
            reply = json.loads(self.connection.recv_bytes(REPLY))
        except (EOFError, OSError):
            self.process.join(1)
            return {"failed": f"its process ended (exit code {self.process.exitcode})", "died": True}
        except (ValueError, RecursionError):
            reply = None
        return reply if isinstance(reply, dict) else {"failed": UNREADABLE, "died": True}

    def stop(self, wait=2):
        """Lets the process end by itself for so many seconds, then kills it."""
        if self.process:
            self.connection.close()
            self.process.join(wait)
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(path, connection):
    from course import child  # imports torch

    connection.send_bytes(b'{"ready": true}')
    child.serve(path, connection)


# ---- 2. Answers -> points and words ----


def judge(exercise, cases, reply):
    """The child's reply -> (points, words)."""
    if "answers" not in reply:
        return 0, reply["failed"]
    plain = [[a.values if hasattr(a, "values") else a for a in case] for case in cases]
    dtypes = [next((a.dtype for a in case if getattr(a, "dtype", "").startswith("float")), None) for case in cases]
    if all(kind.startswith("number") for kind in exercise.returns.values()):
        dtypes = [None] * len(cases)  # a share in float32 is as good
    expected = [exercise.oracle(*case) for case in plain]
    answers = []
    for number, (answer, right, dtype) in enumerate(zip(reply["answers"], expected, dtypes, strict=True), start=1):
        answer = answer if len(exercise.returns) > 1 else [answer]
        wrong = malformed(exercise, answer, right, dtype)
        if wrong:
            return 0, f"{wrong} (case {number})"
        answers.append([value_of(item) for item in answer])
    agree = [alike(*case) for case in zip(answers, expected, dtypes, strict=True)]
    return sum(agree), "" if all(agree) else diagnosis(exercise, plain, answers, expected, dtypes)


def alike(answer, other, dtype):
    """Whether two answers to one case, tuples of what is returned, agree."""
    return all(close(a, o, dtype) for a, o in zip(answer, other, strict=True))


def diagnosis(exercise, cases, answers, expected, dtypes):
    """The known mistake that gives just these answers in every case; if none does, the same for each part of them."""
    made = [(words, [mistake(*case) for case in cases]) for words, mistake in exercise.mistakes]

    def differ(others, part):
        """The cases, from 1, in which that slice of the answer is not the other's."""
        pairs = enumerate(zip(answers, others, dtypes, strict=True), start=1)
        return [number for number, (a, o, dtype) in pairs if not alike(a[part], o[part], dtype)]

    def looks_like(part):
        return next((f"looks like: {words}" for words, others in made if not differ(others, part)), "")

    whole = looks_like(slice(None))
    if whole:
        return whole
    said = []
    for i, name in enumerate(exercise.returns):
        part = slice(i, i + 1)
        wrong = differ(expected, part)
        if wrong:
            answer, right = answers[wrong[0] - 1][i], expected[wrong[0] - 1][i]
            words = looks_like(part) or f"in case {wrong[0]} {short(answer)} where {short(right)} belongs"
            said.append(f"{name}: {words}" if len(exercise.returns) > 1 else words)
    return "; ".join(said)


def short(value):
    """A value in at most 80 characters."""
    if isinstance(value, list):
        text = "[" + ", ".join(short(v) for v in value) + "]"
    else:
        text = f"{value:.6g}" if type(value) is float else str(value)
    return text if len(text) <= 80 else text[:75] + " ...]"


def value_of(item):
    """The numbers of an encoded item."""
    if isinstance(item, list):
        return [v["value"] for v in item]
    return item["values"] if "values" in item else item["value"]


def malformed(exercise, answer, expected, dtype):
    """Why an answer cannot count, or "". answer: the encoded items; expected: the oracle's."""
    names = list(exercise.returns)
    if not isinstance(answer, list) or (len(answer) != len(names)):
        what = f"{len(answer)} things" if isinstance(answer, list) else kind_of(answer)
        return f"returns {what} where {len(names)} belong: {', '.join(names)}"
    for (name, kind), item, right in zip(exercise.returns.items(), answer, expected, strict=True):
        if kind == "ids":
            others = [v for v in item if type(v) is not dict or type(v.get("value")) is not int]
            if not isinstance(item, list) or others:
                what = f"a list with {kind_of(others[0])}" if isinstance(item, list) else kind_of(item)
                return f"{name} is {what} where a list of ids (int) belongs"
            continue
        if kind.startswith("number"):
            if isinstance(item, dict) and item.get("shape") == [] and "values" in item:
                item["value"] = item.pop("values")
            number = item.get("value", "no") if isinstance(item, dict) else "no"
            if number == "no" or number is None and kind == "number":
                return f"{name} is {kind_of(item)} where a number belongs"
            if type(number) is float and math.isnan(number):
                return f"{name} is NaN"
            continue
        if not isinstance(item, dict) or "dtype" not in item:
            return f"{name} is {kind_of(item)} where a torch.Tensor belongs"
        wanted = dtype if kind == "float" else kind
        if item["dtype"] != wanted:
            return f"{name} has dtype {item['dtype']} where {wanted} belongs"
        if item["shape"] != shape(right):
            return f"{name} has shape {tuple(item['shape'])} where {tuple(shape(right))} belongs"
        if kind == "float" and any(math.isnan(v) for v in flat(item["values"])):
            return f"{name} holds NaN"
        if name in exercise.gradient and not item["gradient"]:
            return f"{name} has lost a gradient (.item(), .detach(), torch.tensor(...) or no_grad): no training"
    return ""


def kind_of(item):
    """An encoded item in words."""
    if isinstance(item, list):
        return f"a list or tuple of {len(item)}"
    if "dtype" in item:
        return f"a torch.Tensor of shape {tuple(item['shape'])}"
    if "other" in item:
        return f"a {item['other']}"
    return "None (is the return missing?)" if item["value"] is None else f"a {type(item['value']).__name__}"


def shape(values):
    return [len(values), *shape(values[0])] if isinstance(values, list) else []


def flat(values):
    return [x for v in values for x in flat(v)] if isinstance(values, list) else [values]


def close(answer, expected, dtype):
    """Whether all numbers agree, to what the dtype holds."""
    if answer is None or expected is None:
        return answer is expected
    tolerance = 1e-8 if dtype == "float64" else 1e-4
    a, e = flat(answer), flat(expected)
    agree = (math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance) for x, y in zip(a, e, strict=False))
    return len(a) == len(e) and all(agree)


# ---- 3. The command ----


def report(result):
    """One file, function by function."""
    lines = [f"{result['file']}: {result['score']} of {result['max_score']} points"]
    lines += [f"  {result['output']}"] * bool(result["output"])
    for test in result["tests"]:
        lines.append(f"  {test['name']:16} {test['score']:2} of {test['max_score']}   {test['output']}".rstrip())
    return "\n".join(lines)


def table(results):
    """All files, a line each, and the mean; the columns are the functions in their order."""
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
    parser.add_argument("files", nargs="+", metavar="FILE", help="a solution; with several, a table comes last")
    parser.add_argument("--json", help="write the result to this file: an object, or a list of them for several FILEs")
    parser.add_argument("--time-limit", type=float, default=3.0, help="seconds for each function (default 3)")
    parser.add_argument("--seed", type=int, help="of the random cases (default: a new one each time)")
    args = parser.parse_args()
    for file in args.files:
        if not Path(file).is_file():
            hint = f" It is a folder: give {file}/*.py" if Path(file).is_dir() else ""
            raise UserError(f"{file} is not a file.{hint}")
    if not 0 < args.time_limit < math.inf:
        raise UserError(f"--time-limit {args.time_limit}: must be above 0, in seconds.")
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    cases = draw_cases(seed)
    results = []
    steps = len(args.files) * len(cases)
    with tqdm(total=steps, desc="grading", unit="function", disable=None) as bar:
        for file in args.files:
            results.append({"seed": seed, **grade(file, cases, args.time_limit, bar.update)})
            bar.write(report(results[-1]))
            if args.json:  # after each file, so that an interruption loses one at most
                whole = results if len(args.files) > 1 else results[0]
                atomic_write(args.json, json.dumps(whole, indent=2) + "\n")
    if len(results) > 1:
        print("\n" + table(results))
    print(f"the same cases again: --seed {seed}")


if __name__ == "__main__":
    run_main(main)
