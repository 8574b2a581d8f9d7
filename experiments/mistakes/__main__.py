"""Every mutant and the test that kills it, as a table; or, with --curves, what each looks like in training."""

import dataclasses
import shutil
import sys
import textwrap

from tqdm import tqdm

from experiments.mistakes import GALLERY, kill
from minidpo.settings import UserError, knob, parse_settings, run_main, unknown


@dataclasses.dataclass
class Settings:
    only: str = knob("", "the name of one mutant; empty: all")
    curves: str = knob("", "instead of running tests, train with each mistake into this folder and write --page")
    init: str = knob("", "with --curves: the SFT run of the toy to start from")
    page: str = knob("docs/mistakes.md", "with --curves: the page to write, its picture beside it")


def entry(name, killed, mistake, test):
    """Three columns as text: name, killed, and the mistake with the test below it."""
    left, indent = f"{name:32}{killed:14}", " " * 46
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    return textwrap.fill(mistake, width, initial_indent=left, subsequent_indent=indent) + f"\n{indent}{test}"


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    names = [mutant.name for mutant in GALLERY]
    if settings.only and settings.only not in names:
        raise unknown("mutant", settings.only, names)
    mutants = [mutant for mutant in GALLERY if settings.only in ("", mutant.name)]
    if settings.curves:
        from experiments.mistakes.curves import train_all, write_page

        if not settings.init:
            make = "python train_sft.py --data toy --out runs/sft"
            raise UserError(f"--curves needs --init: an SFT run of the toy. Make one: {make}")
        train_all(mutants, settings.init, settings.curves)
        write_page(settings.page, settings.curves)
        return

    alive, rows = [], [entry("name", "killed", "the mistake", "the test that kills it")]
    for mutant in tqdm(mutants, desc="mutants", unit="mutant"):
        killed, seconds = kill(mutant)
        alive += [] if killed else [mutant.name]
        rows.append(entry(mutant.name, f"{'yes' if killed else 'NO'} {seconds:6.1f} s", mutant.mistake, mutant.test))
    print("\n".join(rows))
    print(f"{len(mutants) - len(alive)} of {len(mutants)} killed")
    if alive:
        sys.exit(f"alive: {', '.join(alive)}. A mutant that survives is a hole in the tests.")


if __name__ == "__main__":
    run_main(main)
