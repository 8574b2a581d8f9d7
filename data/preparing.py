"""What the prepare scripts share: counting rows that are left out, a fixed shuffle, writing the files."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from minidpo.files.writing import atomic_write


class LeftOut(Exception):
    """A valid row that cannot be used. The message is the reason; rows are counted by reason."""


def usable(records, convert, path):
    """Converts the rows of one file, and prints how many were left out and why.

    Args:
        records: pairs (where, record), as `minidpo.files.jsonl.json_lines` yields them.
        convert: convert(record, where) returns a row, or raises LeftOut. Any other error is passed on.
        path: the file's name, for the printed line.

    Returns:
        The list of converted rows.
    """
    rows, reasons = [], Counter()
    for where, record in tqdm(records, desc=Path(path).name, unit=" rows"):
        try:
            rows.append(convert(record, where))
        except LeftOut as reason:
            reasons[str(reason)] += 1
    why = ", ".join(f"{reason}: {n:,}" for reason, n in sorted(reasons.items()))
    print(f"{path}: {len(rows) + reasons.total():,} rows, {reasons.total():,} left out{f' ({why})' if why else ''}")
    return rows


def hash_number(text):
    """A pseudo-random integer below 2^64 that depends only on `text`: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shuffled(rows, seed):
    """The rows in a random order that depends on `seed` and on their contents, not on the order they come in."""
    return sorted(rows, key=lambda row: hash_number(f"{seed}/{json.dumps(row)}"))


def write_rows(folder, files):
    """Writes {name: rows} to folder/name.jsonl. A file is either written whole or left as it was."""
    for name, rows in sorted(files.items()):
        path = Path(folder) / f"{name}.jsonl"
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{path}: {len(rows):,} rows")
