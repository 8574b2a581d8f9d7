"""What the prepare scripts share: a reason for each row that is left out, a fixed shuffle, files written."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from minidpo.files import atomic_write


class LeftOut(Exception):
    """A row that is of no use, though the file is in order; the message is the reason it is counted under."""


def usable(records, convert, path):
    """Pairs (where, record), as `json_lines` gives them -> [convert(record, where), ...] where that raises no LeftOut.

    Prints how many were left out, by reason. UserErrors pass.
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
    """A whole number below 2^64, as good as random, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shuffled(rows, seed):
    """The rows in an order that depends on `seed` and on what they hold, not on the order they come in."""
    return sorted(rows, key=lambda row: hash_number(f"{seed}/{json.dumps(row)}"))


def write_rows(folder, files):
    """files: {name: rows} -> folder/name.jsonl, each whole or not at all."""
    for name, rows in sorted(files.items()):
        path = Path(folder) / f"{name}.jsonl"
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{path}: {len(rows):,} rows")
