"""Settings as a dataclass that is also a command line, and errors that say what to do."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
from pathlib import Path


class UserError(ValueError):
    """An error that the user can correct. `run_main` prints it without a traceback."""


def unknown(kind, name, valid):
    """Returns a UserError for a name that is not one of `valid`. It suggests the nearest valid names."""
    near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}.")


def run_main(main):
    """Runs `main()`. A UserError or OSError becomes one message and exit code 2, Ctrl-C becomes exit code 130."""
    try:
        main()
    except UserError as error:
        message, code = f"error: {error}", 2
    except BrokenPipeError:  # `... | head` has closed the pipe: no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"error: {where}{error.strerror or error}. Check the path, its permissions and the free space."
        code = 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    else:
        return
    print(message, file=sys.stderr)
    sys.exit(code)


def knob(default, help, choices=None, least=0):
    """A field of a settings dataclass that is also a flag: `beta: float = knob(0.1, "what it does")`.

    The value must be one of `choices`, if given. A number must be finite and at least `least`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least})


def parse_settings(cls, description, argv=None, sets=None):
    """Command line -> an instance of the settings dataclass `cls`.

    A field without a default is a required flag. Flags of the class itself come first in --help, inherited ones last.

    `sets` maps a name to {field: value}: a named set of settings. --settings picks one. Without it, --data picks the
    set of its own name; "tldr" picks "paper-tldr", and other data "paper". Flags override the set.

    With --resume, the run's own settings.json takes the place of the set. Only the fields in `MAY_CHANGE` can differ.

    Raises:
        UserError: a value is not allowed, or differs from the setting of the run that is resumed.
    """
    sets = sets or {}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name not in cls.__annotations__)
    for field in fields:
        flag = "--" + field.name.replace("_", "-")
        required = field.default is dataclasses.MISSING
        text = field.metadata["help"]
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
        by_data = given["data"] if given["data"] in sets else {"tldr": "paper-tldr"}.get(given["data"], "paper")
        name = given.get("settings") or by_data
        if name not in sets:
            raise unknown("settings", name, list(sets))
        base = {**sets[name], "settings": name}
    settings = cls(**{**base, **given})
    for field in fields:
        flag, value = "--" + field.name.replace("_", "-"), getattr(settings, field.name)
        choices, least = field.metadata["choices"], field.metadata["least"]
        if choices and value not in choices:
            raise unknown(flag, value, list(choices))
        if field.type in (int, float) and not least <= value < math.inf:
            raise UserError(f"{flag} {value}: must be a finite number, {least} at least.")
    return settings


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
                f"({path}). A resumed run keeps its settings. To change them, start a new run with another --out."
            )
    return saved
