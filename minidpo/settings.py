"""What the commands share: settings as a dataclass, errors that say what to do, and a Ctrl-C that loses nothing."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
from pathlib import Path


class UserError(ValueError):
    """Something the person at the keyboard can mend. `run` prints it without a traceback."""


def unknown(kind, name, valid):
    """UserError for a name that is not one of `valid`, with the nearest valid ones first."""
    near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}.")


def run_main(main):
    """Runs `main()`. An error a person can mend becomes one message on stderr and exit code 2; Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        sys.exit(_fail(f"error: {error}"))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `... | head` closed the pipe: not worth a word
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(f"error: {where}{error.strerror or error}. Check the path, its permissions and the free space."))
    except KeyboardInterrupt:
        _fail("interrupted")
        sys.exit(130)


def _fail(message):
    print(message, file=sys.stderr)
    return 2


class CatchInterrupt:
    """`with CatchInterrupt() as interrupt:` turns the first Ctrl-C (or SIGTERM) into `interrupt.requested = True`,

    so that a loop can finish its step and save; a second one stops at once.
    """

    def __enter__(self):
        self.requested = False
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _on_signal(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing this step, then saving (once more to stop at once)", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def knob(default, help, choices=None, least=0):
    """A field of a settings dataclass that is also a flag: `beta: float = knob(0.1, "what it does")`.

    The value must be one of `choices`, if given; a number must be finite and at least `least`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least})


def parse_settings(cls, description, argv=None, sets=None):
    """Command line -> an instance of the settings dataclass `cls`.

    A field without a default is a required flag. `sets` maps a name to {field: value}: named settings, chosen by
    --settings, or by --data where that is a key (any other data takes "paper"); flags override them.
    With --resume the run folder's own settings.json is the base, and only the fields in `MAY_CHANGE` can be overridden.
    """
    sets = sets or {}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):
        flag = "--" + field.name.replace("_", "-")
        required = field.default is dataclasses.MISSING
        text = field.metadata["help"] if field.metadata else ""
        if not required:
            per_set = [f"{name}: {values[field.name]}" for name, values in sets.items() if field.name in values]
            text += f" (default {field.default!r}{'; ' if per_set else ''}{', '.join(per_set)})"
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        kind = {"action": "append"} if field.type is list else kind  # given several times: a list of texts
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), required=required, **kind)
    given = vars(parser.parse_args(argv))

    base = {}
    if given.get("resume"):
        base = _settings_of_run(given, cls)
    elif sets:
        name = given.get("settings") or (
            given["data"] if given["data"] in sets else DATA_SETS.get(given["data"], "paper")
        )
        if name not in sets:
            raise unknown("settings", name, list(sets))
        base = {**sets[name], "settings": name}
    settings = cls(**{**base, **given})
    for field in dataclasses.fields(cls):
        flag, value = "--" + field.name.replace("_", "-"), getattr(settings, field.name)
        choices, least = field.metadata["choices"], field.metadata["least"]
        if choices and value not in choices:
            raise unknown(flag, value, list(choices))
        if field.type in (int, float) and not least <= value < math.inf:
            raise UserError(f"{flag} {value}: must be a finite number, {least} at least.")
    return settings


DATA_SETS = {"tldr": "paper-tldr"}
MAY_CHANGE = {"out", "resume", "max_steps", "save_every", "eval_every", "epochs"}


def _settings_of_run(given, cls):
    path = Path(given["out"]) / "settings.json"
    if not path.exists():
        raise UserError(
            f"{path} not found: there is no run to resume in {given['out']}. Leave out --resume to start one."
        )
    names = {field.name for field in dataclasses.fields(cls)}
    try:
        saved = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k in names}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). Restore it, or start again with --overwrite.") from error
    for name, value in given.items():
        if name in saved and value not in (saved[name], "auto") and name not in MAY_CHANGE:
            raise UserError(
                f"--{name.replace('_', '-')} {value} differs from the {saved[name]!r} this run was started with "
                f"({path}). A resumed run keeps its settings; start a new run with another --out to change them."
            )
    return saved
