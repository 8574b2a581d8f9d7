"""Both stages in processes of their own that start in milliseconds: forks of one that has imported PyTorch before.

`start` starts any function so, `start_stage` a training command. The latter can be doomed: to die of SIGKILL inside a
certain function, as from a power cut there. (multiprocessing's fork server will not do: there is one for all tests, and
some of them must import these modules afresh.)
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # noqa: F401  what the first optimiser of a process imports, in seconds
from tiny import call

import minidpo.files.writing
import minidpo.run
import train_dpo
import train_sft
from minidpo import checkpoint

STAGES = {"sft": train_sft, "dpo": train_dpo}
PATIENCE = 300  # seconds until a process that does not end is given up


class Child:
    """A process: its `pid`, and after `join` its `exitcode`, -9 if SIGKILL ended it."""

    def __init__(self, pid):
        self.pid = pid

    def join(self):
        self.exitcode = _ask(wait=self.pid)
        return self.exitcode


def start(function, *args, log, environment=None):
    """Starts function(*args), a function of a module's and plain values; what it prints is added to the file `log`."""
    name = [function.__module__, function.__name__]
    return Child(_ask(run=[*name, [str(a) if isinstance(a, Path) else a for a in args]], log=str(log), env=environment))


def start_stage(stage, argv, log, environment=None, doom=None):
    """Starts the command of stage "sft" or "dpo".

    doom (place, visit, moment): it dies when it enters that one of `PLACES` for the visit-th time, counted from 1,
    before the call of a function in there that is number `moment`, from 0, or at its end.
    """
    return start(_stage, stage, [str(word) for word in argv], doom, log=log, environment=environment)


PLACES = {
    "load": lambda stage: (checkpoint, "load"),
    "begin": lambda stage: (minidpo.run.Run, "_open"),
    "step": lambda stage: (STAGES[stage], "train_step"),
    "log": lambda stage: (minidpo.run.Run, "log"),
    "save": lambda stage: (checkpoint, "save"),
    "move": lambda stage: (minidpo.files.writing.os, "replace"),  # of a checkpoint: from its place or to it
    "finish": lambda stage: (minidpo.run.Run, "finish"),
}


def _stage(stage, argv, doom):
    place, visit, moment = doom or (None, 0, 0)
    with contextlib.ExitStack() as patches:
        if place in PLACES:
            owner, name = PLACES[place](stage)
            patches.enter_context(mock.patch.object(owner, name, _deadly(getattr(owner, name), visit, moment)))
        call(STAGES[stage].main, *argv)


def _deadly(function, visit, moment):
    left = {"visits": visit, "moments": moment}

    def die_at_last(frame, event, arg):
        if event in ("call", "c_call"):
            left["moments"] -= 1
            if left["moments"] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def deadly(*args, **kwargs):
        if function is not os_replace or Path(args[1]).name.startswith("checkpoint."):
            left["visits"] -= 1
        if left["visits"]:
            return function(*args, **kwargs)
        sys.setprofile(die_at_last)
        function(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    return deadly


os_replace = os.replace


# ---- the process that is forked ----


@functools.cache
def _server():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import children; children.serve()"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, encoding="utf-8", bufsize=1
    )


def _ask(**request):
    _server().stdin.write(json.dumps(request) + "\n")
    return json.loads(_server().stdout.readline())


def serve():
    """A request a line, an answer a line: starts a function and tells its pid, or waits for a pid and tells its end."""
    gc.freeze()  # else each fork collects garbage in all of torch
    for line in sys.stdin:
        request = json.loads(line)
        answer = _wait(request["wait"]) if "wait" in request else _fork(request)
        print(json.dumps(answer), flush=True)


def _wait(pid):
    for _ in range(PATIENCE * 200):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def _fork(request):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request["env"] or {})
        torch.set_num_threads(1)
        module, name, args = request["run"]
        getattr(importlib.import_module(module), name)(*args)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:  # it goes to the log: nothing may leave a fork
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
