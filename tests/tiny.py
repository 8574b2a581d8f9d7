"""Shared by the tests of whole commands: a model of 24,000 weights, a handful of rows, and a way to call a command."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import minidpo.run
from minidpo.model import PRESETS
from minidpo.settings import run_main

torch.set_num_threads(1)  # with tensors this small a second thread only gets in the way
SHAPE = dict(vocab_size=300, block_size=40, n_layer=1, n_head=2, n_embd=32)
SUBJECTS = ("The film", "This story", "Her cast", "Every scene", "The ending")
GOOD = ("is warm and lovely.", "was a joy!", "sings.", "has charm, wit and a heart that nobody resists.", "is fun.")
BAD = ("is dull.", "was a bore, long and cold.", "drags on.", "has no heart.", "fails, and it fails at great length.")


def write_jsonl(path, records):
    path = Path(path)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def write_data(folder):
    """sft.jsonl (25 rows), sft_held_out.jsonl (5), pairs.jsonl (22 pairs) and held_out.jsonl (3), of many lengths."""
    pairs = [
        {"prompt": subject, "chosen": f" {good}", "rejected": f" {bad}"}
        for i, subject in enumerate(SUBJECTS)
        for good, bad in zip(GOOD, BAD[i:] + BAD[:i], strict=True)
    ]
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    write_jsonl(folder / "pairs.jsonl", [pair for i, pair in enumerate(pairs) if i % 10])
    write_jsonl(folder / "held_out.jsonl", pairs[::10])
    write_jsonl(folder / "sft.jsonl", rows)
    write_jsonl(folder / "sft_held_out.jsonl", [{**row, "completion": row["completion"] + " Go."} for row in rows[::5]])


def call(main, *argv, draw=False):
    """Runs a command's main() as the shell would, --preset toy being SHAPE. Curves take long: drawn only on demand."""
    with (
        mock.patch.object(sys, "argv", ["command", *map(str, argv)]),
        mock.patch.dict(PRESETS, toy=SHAPE),
        mock.patch.object(minidpo.run, "draw_curves", minidpo.run.draw_curves if draw else lambda folder: False),
    ):
        run_main(main)


def fails(capsys, main, *argv):
    """Calls a command that must end with a message and an exit code that is not 0; returns the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(main, *argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("error:") == 1 and "Traceback" not in message
    return message[message.index("error:") :]  # behind the progress bars


def contents(folder):
    """Every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
