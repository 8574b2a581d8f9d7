"""Makes JSONL of a JSON array, a CSV file (with a line of column names) or a Parquet file.

    python -m data.convert FILE [--out FILE.jsonl]

The columns keep their names; docs/data.md lists those that training reads. The texts of a CSV file stay texts.
"""

import argparse
import csv
import io
import json
from pathlib import Path

from minidpo.files.writing import atomic_write, new_file
from minidpo.settings import UserError, run_main


def read(path):
    """The rows of the file as a list of dicts. Raises UserError if it is none of the three kinds."""
    with open(path, "rb") as file:
        begin = file.read(64)
    if begin.startswith(b"PAR1"):
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"{path} is Parquet. To read it: pip install datasets") from error
        try:
            return datasets.Dataset.from_parquet(str(path)).to_list()
        except Exception as error:  # of a dozen classes
            raise UserError(f"{path}: damaged Parquet ({error}).") from error
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}). Save the file as UTF-8.") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: begins as a JSON array, but is none ({error}).") from error
    elif text.lstrip().startswith("{"):
        raise UserError(f"{path}: begins with a JSON object. Write each object of the file on one line: that is JSONL.")
    else:
        csv.field_size_limit(1 << 30)  # the default limit, 128 kB, is too short for some texts
        delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        try:
            rows = list(lines)
        except csv.Error as error:
            raise UserError(f"{path}, after line {lines.line_num}: not CSV ({error}).") from error
        if any(None in row or None in row.values() for row in rows):
            raise UserError(f"{path}: not CSV, since its lines do not all have as many columns as the first.")
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: no rows with named columns. Is it a JSON array of objects, CSV or Parquet?")
    return rows


def main():
    parser = argparse.ArgumentParser(description="Makes JSONL of a JSON array, a CSV file or a Parquet file.")
    parser.add_argument("file", help="the file to read; CSV needs a line of column names, .tsv has tabs for commas")
    parser.add_argument("--out", help="the file to write (default FILE.jsonl)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    args = parser.parse_args()
    out = new_file(args.out or f"{args.file}.jsonl", args.overwrite)
    rows = read(args.file)
    atomic_write(out, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    print(f"{out}: {len(rows):,} rows with {', '.join(rows[0])}")


if __name__ == "__main__":
    run_main(main)
