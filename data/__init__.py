"""Datasets by name: where their files are, and how to make one that is missing.

Each folder here makes one dataset. `minidpo` knows files only; the programs ask here for the files of a name.
"""

from pathlib import Path

from minidpo.scale import parallel
from minidpo.settings import UserError, unknown

FOLDERS = {"toy": "toy_sentiment", "imdb": "imdb", "hh": "hh", "tldr": "tldr"}
HERE = Path(__file__).parent


def find(name, file):
    """Returns the path of one file of a dataset, for example find("toy", "pairs_train").

    A `name` that is the path of a file or a pipe is returned as a path. The toy is generated on first use.

    Raises:
        UserError: the name is unknown, or the file is missing. The message says how to make it.
    """
    if name not in FOLDERS:
        if Path(name).is_dir():
            raise UserError(f"{name} is a folder. Give the path of a file, or one of the names {', '.join(FOLDERS)}.")
        if Path(name).exists():
            return Path(name)
        if Path(name).suffix or "/" in name:
            raise UserError(f"{name} not found.")
        raise unknown("data", name, [*FOLDERS, "FILE.jsonl"])
    folder = HERE / FOLDERS[name]
    if name == "toy":
        from data.toy_sentiment.generate import ensure

        with parallel.first_before_others():
            folder = ensure()
    path = folder / f"{file}.jsonl"
    if not path.exists():
        if file == "pairs_train" and name == "imdb":
            make = "sample pairs from an SFT run: python -m experiments.make_pairs --help"
        else:
            make = f"python -m data.{FOLDERS[name]}.prepare --help"
        raise UserError(f"{path} not found. Make it first: {make}")
    return path


def find_split(kind, name, eval_data=""):
    """Returns (training file, held-out file or None) of a dataset; kind is "pairs" or "sft".

    A JSONL file has no held-out part of its own: name one with `eval_data`.
    """
    train = find(name, f"{kind}_train")
    held_out = eval_data or (name if name in FOLDERS else None)
    return train, held_out and find(held_out, f"{kind}_test")
