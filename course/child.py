"""The process in which a student's file runs: told what to call, it answers in JSON. It knows no oracle.

The grader (grade.py) starts it with `serve`, sends a request for each function and kills it when it takes too long.
What comes back is JSON, so that nothing a student returns is executed. What is printed goes nowhere.

An audit hook refuses what no answer needs: the course's own files, other processes, the network. That stops the curious
and the careless, not an attacker: Python code can do what the user who runs it can. Files from strangers belong in a
container without a network.
"""

import builtins
import inspect
import json
import linecache
import math
import os
import random
import re
import sys
import threading
import traceback
import types
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minidpo.tokenizer import Tokenizer

COURSE = Path(__file__).resolve().parent
LARGEST = 100_000  # numbers in an answer
MEMORY = 2 * 1024**3  # bytes beyond what torch takes itself
NO_PROCESSES = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"}
NO_PROCESSES |= {"pty.spawn", "socket.connect", "socket.bind", "os.startfile"}


def serve(path, connection):
    """Imports the file, says how that went, then answers requests until it is killed or the grader has ended."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread would be taken for the student's
    sys.path.insert(0, str(Path(path).resolve().parent))  # for a second file beside it
    silence()
    limit_memory()
    refused = watch(path)
    known, before = set(sys.modules), Globals()
    try:
        source = Path(path).read_bytes()
        module = types.ModuleType("submission")
        module.__file__ = str(path)
        sys.modules["submission"] = module
        exec(compile(source, str(path), "exec"), module.__dict__)
        failed = None
    except BaseException as error:  # whatever a student's file may raise, sys.exit() among it
        failed = "the file does not import: " + describe(error, path)
    harm = [change for change in before.changes() if "random" not in change]  # a seed at the top does none
    if refused or harm:
        failed = "on import the file " + " and ".join(refused + harm)
    send(connection, {"failed": failed, "imports": imported(known)})
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        refused.clear()
        reply = answer(getattr(module, request["name"], None), request, path)
        if refused:
            reply = {"failed": "it " + " and ".join(refused)}
        send(connection, {**reply, "imports": imported(known)})


def send(connection, reply):
    connection.send_bytes(json.dumps(reply).encode())


def answer(function, request, path):
    """Calls the function with each case -> {"answers": [...]}, or {"failed": why} at the first that cannot count."""
    if function is None:
        return {"failed": "not there", "missing": True}
    if not callable(function):
        return {"failed": f"is a {type(function).__name__}, not a function"}
    answers = []
    for case in request["cases"]:
        before = Globals()
        arguments = [decode(a, request["gradient"]) for a in case]
        if not takes(function, arguments):
            return {"failed": f"has the wrong signature: it is called with {len(arguments)} arguments, as in the stub"}
        try:
            value = function(*arguments)
        except NotImplementedError:
            return {"failed": "not done yet", "missing": True}
        except BaseException as error:  # whatever a student's function may raise
            return {"failed": describe(error, path)}
        changes = before.changes()
        if changes:
            return {"failed": "it " + " and ".join(changes)}
        for number, (argument, given) in enumerate(zip(arguments, case, strict=True), start=1):
            if changed(argument, given):
                return {"failed": f"it changes its argument {number} in place"}
        try:
            answers.append(encode(value, [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]))
        except RuntimeError as error:  # a gradient that cannot be taken
            return {"failed": describe(error, path)}
    return {"answers": answers}


def takes(function, arguments):
    """Whether the function can be called with these arguments, one after the other."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # something from C, which does not say
        pass
    return True


def describe(error, path):
    """An exception in one line, with the line of the student's file that it came from."""
    trace = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in trace if frame.f_code.co_filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    words = str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines()
    text = f"{type(error).__name__}{': ' if words else ''}{words[0] if words else ''}"
    return text[:200] + (f" (line {lines[-1]})" if lines else "")


# ---- arguments and answers as JSON ----


def decode(argument, gradient):
    if isinstance(argument, dict) and "tokens" in argument:
        return Tokenizer([token.encode("latin-1") for token in argument["tokens"]])
    if isinstance(argument, dict) and "dtype" in argument:
        tensor = torch.tensor(argument["values"], dtype=getattr(torch, argument["dtype"]))
        return tensor.requires_grad_(gradient and tensor.is_floating_point())
    return json.loads(json.dumps(argument))  # a copy, to compare with afterwards


def changed(argument, given):
    if isinstance(argument, Tokenizer):
        return False
    if isinstance(argument, torch.Tensor):
        return argument.tolist() != given["values"]
    return argument != given


def encode(value, inputs=()):
    """What a function returned; "gradient" says whether one reaches all of `inputs` from there."""
    if isinstance(value, torch.Tensor):
        tensor = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if value.numel() <= LARGEST:
            tensor |= {"values": value.tolist(), "gradient": reaches(value, inputs)}
        return tensor
    if type(value) is int and abs(value) >= 2**63:
        return {"other": f"int of {value.bit_length()} bits"}
    if value is None or type(value) in (bool, int, float):
        return {"value": value}
    if isinstance(value, (list, tuple)) and len(value) <= LARGEST:
        return [encode(v, inputs) for v in value]
    return {"other": type(value).__name__}


def reaches(value, inputs):
    if not (value.requires_grad and inputs):
        return False
    gradients = torch.autograd.grad(value.sum(), inputs, retain_graph=True, allow_unused=True)
    return all(gradient is not None for gradient in gradients)


# ---- what a file may do, and what it leaves behind ----


def silence():
    """stdout and stderr go nowhere, also for what is written below Python."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def limit_memory():
    """MEMORY more than now, where the system can say and keep it (Linux)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        used = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def watch(path):
    """Installs the audit hook; returns the list to which it writes what it refused."""
    refused, own, me = [], os.path.realpath(path), str(os.getpid())
    for file in COURSE.rglob("*.py"):  # libraries that look at the stack read the source: let them find none
        linecache.cache[str(file)] = (0, None, [], str(file))

    def refuse(what):
        refused.append(what)
        raise PermissionError(f"not in an exercise: your code {what}")

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            file = os.path.realpath(os.fsdecode(arguments[0]))
            other = re.match(r"/proc/(\d+)/", file)
            if COURSE in Path(file).parents and file != own:
                refuse(f"opens the grader's files ({Path(file).name})")
            if other and other[1] != me:
                refuse("looks into another process")
        elif event == "import" and arguments[0].partition(".")[0] == "course":
            refuse(f"imports the grader ({arguments[0]})")
        elif event == "os.kill" and arguments[0] != os.getpid():
            refuse("sends signals to other processes")
        elif event in NO_PROCESSES:
            refuse(f"starts or calls other programs ({event})")

    sys.addaudithook(hook)
    return refused


def imported(known):
    """What the student's file brought in of the project: train_dpo, minidpo, ..."""
    ours = {path.stem for path in COURSE.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return sorted({name.partition(".")[0] for name in set(sys.modules) - known} & ours)


class Globals:
    """What all functions share, as it is now."""

    WATCHED = (builtins, math, random, torch, torch.Tensor, torch.nn.functional)

    def __init__(self):
        self.names = [dict(vars(module)) for module in self.WATCHED]
        self.state = self.now()

    def now(self):
        return {
            "changes torch's default dtype": torch.get_default_dtype(),
            "leaves gradients switched off or on": torch.is_grad_enabled(),
            "moves torch's random numbers": torch.get_rng_state().tolist(),
            "moves Python's random numbers": random.getstate(),
            "moves numpy's random numbers": str(np.random.get_state()),
            "leaves threads running": threading.active_count(),
        }

    def changes(self):
        """What has changed since, in words."""
        found = []
        for module, before in zip(self.WATCHED, self.names, strict=True):
            for name, value in vars(module).items():
                # a module may load parts of itself late, a class has no reason to; Storage follows the default dtype
                if before.get(name, None if module is torch.Tensor else value) is not value and name != "Storage":
                    found.append(f"replaces {module.__name__}.{name}")
        if found:  # among it may be what `now` is made with
            return found
        now = self.now()
        return [words for words, value in self.state.items() if value != now[words]]
