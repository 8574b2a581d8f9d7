"""Settings as a dataclass that is also a command line, and errors that say what to do."""

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import json
import os
import sys
import time
from pathlib import Path

at_end = contextlib.ExitStack()  # at_end.callback(f, ...): what a command must do at its end, even after an error
atexit.register(at_end.close)
NEW = ".new-run"  # subfolder of a run folder, with a new run's files; after its first save they replace the old run's


class UserError(ValueError):
    """An error that the user can correct. `run_main` prints it without a traceback."""


def unknown(kind, name, valid):
    """Returns a UserError for a name that is not one of `valid`. It suggests the nearest valid names."""
    near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}.")


def run_main(main):
    """Runs `main()`. A UserError or OSError becomes one message and exit code 2, Ctrl-C becomes exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that is not UTF-8 shows "?" for what it lacks
    try:
        with at_end:
            main()
    except UserError as error:
        message, code = f"error: {error}", 2
    except BrokenPipeError:  # `... | head` has closed the pipe: no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"error: {where}{error.strerror or error}. Check the path, permissions and free space.", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    else:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # process 0 of torchrun prints the same error, and then torchrun ends this process
    print(message, file=sys.stderr)
    sys.exit(code)


def knob(default, help, choices=None, least=0, below=2**63):
    """A field of a settings dataclass that is also a flag: `beta: float = knob(0.1, "what it does")`.

    The value must be one of `choices`, if given. A number must be at least `least` and below `below`.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, below=below))


def flag_of(field):
    """The flag of a field: "--batch-size" of `batch_size`."""
    return "--" + field.name.replace("_", "-")


def parse_settings(cls, description, argv=None, sets=None):
    """Command line -> an instance of the settings dataclass `cls`.

    A field without a default is a required flag. Flags of the class itself come first in --help, inherited ones last.

    `sets` maps a name to {field: value}: a named set of settings. --settings picks one, else `fitting_set` does. Flags
    override the set. With --resume, the run's own settings.json takes the place of the set, and --out is enough.

    Raises:
        UserError: a flag is unknown or missing, or a value is not allowed. With --resume, a value differs from the
            run's, unless `MAY_CHANGE` or `ROUNDING` has the field.
    """
    sets = sets or {}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name not in cls.__annotations__)
    for field in fields:
        per_set = [f"{name}: {values[field.name]}" for name, values in sets.items() if field.name in values]
        default = "required" if field.default is dataclasses.MISSING else f"default {field.default!r}"
        text = f"{field.metadata['help']} ({'; '.join(filter(None, [default, ', '.join(per_set)]))})"
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        kind = {"action": "append"} if field.type is list else kind  # given several times: a list of texts
        parser.add_argument(flag_of(field), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)
    given, others = parser.parse_known_args(argv)
    given = vars(given)
    if others:
        raise unknown("flag", others[0].partition("=")[0], [flag_of(field) for field in fields])
    for one, other in (("init", "preset"), ("init", "tokenizer"), ("init", "vocab-size"), ("tokenizer", "vocab-size")):
        if given.get(one) and given.get(other.replace("-", "_")):
            raise UserError(f"--{other} has no effect: --{one} {given[one]} brings its own. Leave out one of the two.")

    base = _resumed(given, fields) if given.get("resume") and given.get("out") else {}
    required = [f for f in fields if f.default is dataclasses.MISSING and (f.name == "out" or not given.get("resume"))]
    if missing := [flag_of(field) for field in required if not {**base, **given}.get(field.name)]:
        raise UserError(f"{' and '.join(missing)} must be given. --help says what each flag does.")
    if sets and not base:
        name = given.get("settings") or fitting_set(given, sets)
        if name not in sets:
            raise unknown("settings", name, list(sets))
        base, given = sets[name], {**given, "settings": name}
    settings = cls(**{**base, **given})
    for field in fields:
        value, limits = getattr(settings, field.name), field.metadata
        if limits["choices"] and value not in limits["choices"]:
            raise unknown(flag_of(field), value, list(limits["choices"]))
        if field.type in (int, float) and not limits["least"] <= value < limits["below"]:
            limit = f" and below {limits['below']}" if limits["below"] < 2**63 else ""
            raise UserError(f"{flag_of(field)} {value}: must be a finite number, at least {limits['least']}{limit}.")
    return settings


def fitting_set(given, sets):
    """The name of the set that fits the model and the data of the flags `given`, {field: value}.

    A run that starts from a run with the set "toy" or "imdb-small" keeps to that set. A model from scratch takes the
    set of its data, unless --preset gives it another shape. Everything else takes the paper's settings for GPT-2.
    """
    if given.get("init"):
        name = settings_of(given["init"]).get("settings")
    else:
        name = {"toy": "toy", "imdb": "imdb-small"}.get(given["data"])
        name = name if given.get("preset") in (None, sets.get(name, {}).get("preset")) else None
    if name in sets and not name.startswith("paper"):
        return name
    return "paper-tldr" if given["data"] == "tldr" else "paper"


def settings_of(folder):
    """The settings of a run, {field: value}, or {} if the folder has none. Raises UserError for a damaged file."""
    path, new = Path(folder) / "settings.json", Path(folder) / NEW
    if (new / "checkpoint.pt").exists() and (new / "settings.json").exists():
        path = new / "settings.json"  # a process was killed while replacing the older run; the next one goes on
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Restore it, or start again with --overwrite.") from error


MAY_CHANGE = {"out", "max_steps", "save_every", "eval_every", "epochs"}
ROUNDING = {"device", "compile", "fast", "recompute", "micro_batch_size", "micro_tokens"}  # change only the rounding


def _resumed(given, fields):
    """The settings of the run in --out. Raises UserError if a flag of `given` differs from them and must not.

    Paths are compared by their last name only, since the folder may have moved. `Run.plan` checks the data.
    """
    saved = settings_of(given["out"])
    path = Path(given["out"]) / "settings.json"
    if not saved:
        raise UserError(f"{path} not found: there is no run to resume. Leave out --resume to start one.")
    for field in fields:
        name = field.name
        if name not in given or name not in saved or given[name] == saved[name]:
            continue
        change = f"{flag_of(field)} {given[name]} differs from the {saved[name]!r} in {path}."
        same_name = field.type is str and Path(given[name]).resolve().name == Path(saved[name]).resolve().name
        if name == "epochs":
            print(f"{change} The learning rate now follows the new number of steps.")
        elif name in ROUNDING:
            print(f"{change} From here on, results may differ by rounding from those of a run that was not stopped.")
        elif name == "dtype" and given[name] == "auto":
            del given[name]  # the run keeps the precision that was picked for it
        elif name not in MAY_CHANGE and not same_name:
            advice = "A resumed run keeps its settings. To change them, start a new run with another --out."
            raise UserError(f"{change} {advice}")
    return {field.name: saved[field.name] for field in fields if field.name in saved}
