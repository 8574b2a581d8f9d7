"""The process in which a student's file runs. It receives requests in JSON and answers in JSON.

The grader (grade.py) starts it with `serve`, sends one request per function, and kills it when it takes too long. The
oracles are not loaded in this process. Replies are JSON, so that nothing a student returns is executed. Printed output
is discarded. sandbox.py says what the process may do.
"""

import builtins
import codecs
import contextlib
import functools
import inspect
import io
import json
import math
import os
import random
import re
import sys
import threading
import tokenize
import traceback
import types
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from course.sandbox import close_walls
from minidpo.tokenizer import Tokenizer

LARGEST = 100_000  # numbers in one answer
autograd_calls = []  # grows with each call of autograd, which one exercise forbids


def serve(path, connection):
    """Imports the file, reports whether that worked, then answers requests until the grader ends or kills it."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of tqdm, which would look like a thread of the student's
    count_autograd()
    refused, imports = close_walls(os.path.dirname(path), connection.fileno())
    before = Globals()
    try:
        source = read_source(path)
        module = types.ModuleType("submission")
        module.__file__ = str(path)
        sys.modules["submission"] = module
        exec(compile(source, str(path), "exec"), module.__dict__)
        failed = None
    except BaseException as error:  # a student's file may raise anything, even SystemExit
        failed = "the file does not import: " + describe(error, path) + hint(error, path)
    harm = [change for change in before.changes() if "random" not in change]  # seeding at the top is allowed
    if refused or harm:
        failed = "on import the file " + " and ".join(refused + harm)
    send(connection, {"failed": failed, "imports": imports})
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        refused.clear()
        reply = answer(getattr(module, request["name"], None), request, path)
        if refused:
            reply = {"failed": "it " + " and ".join(refused)}
        send(connection, {**reply, "id": request["id"], "imports": imports})


def read_source(path):
    """The text of the file, in UTF-8, in UTF-16 as some editors write it, or in the encoding that it declares."""
    source = Path(path).read_bytes()
    if source.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return source.decode("utf-16")
    encoding = "utf-8"
    try:
        with contextlib.suppress(SyntaxError):  # the first two lines declare nothing, or what does not exist
            encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        return source.decode(encoding)
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise SyntaxError(f"line {line} is not in {encoding}: save the file as UTF-8") from error


def hint(error, path):
    """What to do about a file that comes from a notebook."""
    if not isinstance(error, (SyntaxError, NameError)):
        return ""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("{") and '"cells"' in text:
        return "; this is a notebook: export it as a .py file"
    if re.search(r"^\s*([%!]|get_ipython\()", text, flags=re.MULTILINE):
        return "; delete the lines that begin with %, ! or get_ipython: they work in a notebook only"
    return ""


def count_autograd():
    """From now on, each use of autograd is noted in `autograd_calls`: backward, forward, by hand along the graph."""

    class Engine(type(torch.autograd.Variable._execution_engine)):
        def run_backward(self, *args, **kwargs):
            autograd_calls.append("backward")
            return super().run_backward(*args, **kwargs)

    forward, graph = torch.autograd.forward_ad.make_dual, torch.Tensor.grad_fn

    @functools.wraps(forward)
    def make_dual(*args, **kwargs):
        autograd_calls.append("forward")
        return forward(*args, **kwargs)

    def grad_fn(tensor):
        node = graph.__get__(tensor)
        if node is not None:
            autograd_calls.append("graph")
        return node

    torch.autograd.Variable._execution_engine = Engine()
    torch.autograd.forward_ad.make_dual = make_dual
    torch.Tensor.grad_fn = property(grad_fn)


def send(connection, reply):
    connection.send_bytes(json.dumps(reply).encode())


def answer(function, request, path):
    """Calls the function with each case; returns {"answers": [...]}, or {"failed": why} at the first failure."""
    if function is None:
        return {"failed": "not defined", "missing": True}
    if not callable(function):
        return {"failed": f"is of type {type(function).__name__}; expected a function"}
    answers = []
    for case in request["cases"]:
        before = Globals()
        arguments = [decode(a, i < request["gradient"]) for i, a in enumerate(case)]
        if not takes(function, arguments):
            return {"failed": f"has the wrong signature; number of arguments in exercises.py: {len(arguments)}"}
        autograd_calls.clear()
        try:
            value = function(*arguments)
        except NotImplementedError:
            return {"failed": "not done yet", "missing": True}
        except BaseException as error:  # a student's function may raise anything, even SystemExit
            return {"failed": changes_in_place(error) + describe(error, path)}
        if request["by_hand"] and autograd_calls:
            return {"failed": "it uses autograd; write the derivative as a formula"}
        changes = before.changes()
        if changes:
            return {"failed": "it " + " and ".join(changes)}
        for number, (argument, given) in enumerate(zip(arguments, case, strict=True), start=1):
            if changed(argument, given):
                return {"failed": f"it changes its argument {number} in place"}
        try:
            answers.append(encode(value, [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]))
        except RuntimeError as error:  # the gradient cannot be computed
            return {"failed": changes_in_place(error) + describe(error, path)}
    return {"answers": answers}


def changes_in_place(error):
    """What PyTorch's errors about changes in place mean here, or ""."""
    if "leaf Variable" in str(error):
        return "it changes its argument in place: "
    return "it changes in place what the gradient needs: " * ("modified by an inplace operation" in str(error))


def takes(function, arguments):
    """Whether the function accepts these positional arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a function written in C may have no signature
        pass
    return True


def describe(error, path):
    """Describes an exception in one line, with the line number in the student's file."""
    trace = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in trace if frame.f_code.co_filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno] if error.lineno else []
    try:
        words = str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines()
    except Exception:  # an error of the student's own may not be able to say what it is
        words = []
    text = f"{type(error).__name__}{': ' if words else ''}{words[0] if words else ''}"
    return text[:200] + (f" (line {lines[-1]})" if lines else "")


# ---- arguments and answers as JSON ----


def decode(argument, gradient):
    """The argument that the student's function receives. `gradient`: whether a float tensor asks for one."""
    if isinstance(argument, dict) and "tokens" in argument:
        return Tokenizer([token.encode("latin-1") for token in argument["tokens"]])
    if isinstance(argument, dict) and "dtype" in argument:
        tensor = torch.tensor(argument["values"], dtype=getattr(torch, argument["dtype"]))
        return tensor.requires_grad_(gradient and tensor.is_floating_point())
    return json.loads(json.dumps(argument))  # a copy, so that a change in place can be found


def changed(argument, given):
    if isinstance(argument, Tokenizer):
        return False
    if isinstance(argument, torch.Tensor):
        return argument.tolist() != given["values"]
    return argument != given


def encode(value, inputs=()):
    """Encodes a returned value for JSON. "gradient" is that of its sum by each of `inputs`, or None."""
    if isinstance(value, torch.Tensor):
        tensor = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if value.numel() <= LARGEST:
            tensor |= {"values": value.tolist(), "gradient": gradient_of(value, inputs)}
        return tensor
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:  # a numpy scalar is the number that it holds
        value = float(value) if isinstance(value, np.floating) else value.item()
    if type(value) is int and abs(value) >= 2**63:
        return {"other": f"int with {value.bit_length()} bits"}
    if value is None or type(value) in (bool, int, float):
        return {"value": value}
    if isinstance(value, (list, tuple)) and len(value) <= LARGEST:
        return [encode(v, inputs) for v in value]
    return {"other": type(value).__name__}


def gradient_of(value, inputs):
    """The gradient of the sum of `value` by each of the inputs, as lists. None if it does not reach all of them."""
    if not (value.requires_grad and inputs):
        return None
    gradients = torch.autograd.grad(value.sum(), inputs, retain_graph=True, allow_unused=True)
    return None if any(gradient is None for gradient in gradients) else [gradient.tolist() for gradient in gradients]


# ---- what a file may change ----


def wrapped_by_torch(value, former):
    """Whether torch wrapped a function itself, as it does with torch.manual_seed when torch._dynamo is imported."""
    own = isinstance(value, types.FunctionType) and value.__code__.co_filename == torch._compile.__file__
    return own and value.__wrapped__ is former


class Globals:
    """A snapshot of the state that all functions share; `changes` compares it with the present."""

    WATCHED = (builtins, math, random, torch, torch.Tensor, torch.nn.functional)

    def __init__(self):
        self.names = [dict(vars(module)) for module in self.WATCHED]
        self.state = self.now()

    def now(self):
        _, numbers, *rest = np.random.get_state()
        return {
            "changes torch's default dtype": torch.get_default_dtype(),
            "leaves gradients switched off or on": torch.is_grad_enabled(),
            "draws or seeds torch's random numbers": torch.get_rng_state().tolist(),
            "draws or seeds Python's random numbers": random.getstate(),
            "draws or seeds numpy's random numbers": (numbers.tolist(), rest),
            "leaves threads running": threading.active_count(),
        }

    def changes(self):
        """Describes what has changed since the snapshot, one text per change."""
        found = []
        for module, before in zip(self.WATCHED, self.names, strict=True):
            for name, value in vars(module).items():
                # A new name in a module is allowed (modules may load parts of themselves late), in a class it is not.
                # Storage follows the default dtype.
                former = before.get(name, None if module is torch.Tensor else value)
                if value is not former and name != "Storage" and not wrapped_by_torch(value, former):
                    found.append(f"replaces {module.__name__}.{name}")
        if found:  # `now` may use one of the replaced functions
            return found
        now = self.now()
        return [words for words, value in self.state.items() if value != now[words]]
