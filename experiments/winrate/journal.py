"""A file of results that took time or money to get."""

import json
from pathlib import Path

from minidpo.files.writing import atomic_write
from minidpo.settings import UserError


class Journal:
    """A JSONL file that only grows: `entries` is {key: entry}, and `add` writes an entry to the disk at once."""

    def __init__(self, path):
        self.path, self.entries = Path(path), {}
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a killed process leaves an incomplete last line
        if whole != text:
            atomic_write(self.path, whole)
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{path}, line {number}: damaged ({error}). Delete this line and try again.") from error

    def add(self, key, **fields):
        self.entries[key] = {"key": key, **fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write((json.dumps(self.entries[key]) + "\n").encode())
