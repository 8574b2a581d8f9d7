"""Files of rows: bytes -> lines -> JSON objects -> records whose prompt and responses are texts."""

import functools
import gzip
import io
import json
import zlib
from pathlib import Path

from minidpo.files.forms import PAIR, plain
from minidpo.settings import UserError

CONVERT = "Each line must be one JSON object; to convert a JSON array, CSV or Parquet: python -m data.convert"


@functools.cache
def pipe_bytes(path):
    """The bytes of a pipe such as /dev/stdin. They are kept, since a pipe can be read only once."""
    return Path(path).read_bytes()


def text_lines(path):
    """Yields (where, line) for each line of UTF-8 text: plain or gzip, a file or a pipe. `where` is for error messages.

    Raises UserError, with file and line number, for a line that is not UTF-8 and for damaged gzip data.
    """
    where = path
    try:
        with open(path, "rb") if Path(path).is_file() else io.BufferedReader(io.BytesIO(pipe_bytes(path))) as file:
            is_gzip = str(path).endswith(".gz") or file.peek(2)[:2] == b"\x1f\x8b"
            # as bytes: a line ends at "\n" and at no other character
            for number, line in enumerate(gzip.open(file) if is_gzip else file, 1):
                where = f"{path}, line {number}"
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error}). Save the file as UTF-8. {CONVERT} {path}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{where}: damaged gzip data here or later ({error}). Fetch the file again.") from error


def json_lines(path, fields, as_is=False):
    """Yields (where, object) for each line of a JSONL file that is not blank: with texts (see `plain`), unless `as_is`.

    Raises UserError as `text_lines` does, and for a line that is not a JSON object or lacks one of `fields`.
    """
    for where, line in text_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: a JSONDecodeError, a number of 5,000 digits
            raise UserError(f"{where}: not JSON ({error}). {CONVERT} {path}") from error
        needs = f"Each line must be an object with {', '.join(fields)}."
        if not isinstance(record, dict):
            raise UserError(f"{where}: a {type(record).__name__}. {needs} {CONVERT} {path}")
        try:
            record = record if as_is else plain(record, fields)
        except UserError as error:
            raise UserError(f"{where}: {error}. Correct the row or take it out (docs/data.md).") from error
        for field in fields:
            if field not in record:
                raise UserError(f"{where}: no field {field!r}. {needs} docs/data.md lists other forms.")
        yield where, record


def check_text(record, field, where):
    """Raises UserError unless record[field] is a text that can be written as UTF-8."""
    if not isinstance(record[field], str):
        raise UserError(f"{where}: {field!r} is a {type(record[field]).__name__}; it must be a string.")
    try:
        record[field].encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {field!r} holds half a character (a lone surrogate): {error}") from error


def read_jsonl(path, fields):
    """A JSONL file -> a list of dicts in which `fields` are texts. Raises UserError as `json_lines` does."""
    records = []
    for where, record in json_lines(path, fields):
        for field in fields:
            check_text(record, field, where)
        for name in ("chosen_ended", "rejected_ended", "completion_ended"):
            if not isinstance(record.get(name, True), bool):
                raise UserError(f"{where}: {name!r} is {record[name]!r}; it must be true or false.")
        records.append(record)
    if not records:
        raise UserError(f"{path} is empty. It needs one JSON object per line with {', '.join(fields)}.")
    return records


def texts(path):
    """Yields the texts to learn a tokenizer from: those in the rows of a JSONL file, or all lines of any other file.

    A file is JSONL if its name says so, or if it begins with {". Raises UserError as `json_lines` does.
    """
    first = next((line for _, line in text_lines(path) if line.strip()), "")
    if ".jsonl" not in Path(path).name.lower() and not first.startswith('{"'):
        yield from (line for _, line in text_lines(path))
        return
    names = (*PAIR, "completion", "text")
    for where, record in json_lines(path, ()):
        found = [record[name] for name in names if isinstance(record.get(name), str)]
        if not found:
            raise UserError(f"{where}: no text. One of {', '.join(names)} must hold one.")
        yield from found
