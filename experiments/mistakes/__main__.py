"""Runs the test of every mistake in a broken copy of the code; with --curves, trains with every mistake instead."""

import dataclasses
import sys

from experiments.mistakes import GALLERY, caught, curves
from minidpo.settings import knob, parse_settings, run_main, unknown


@dataclasses.dataclass
class Settings:
    only: str = knob("", "the name of one mistake; empty: all")
    curves: str = knob("", "train with each mistake into this folder instead, and write the page")
    page: str = knob("docs/mistakes.md", "with --curves: the page with the numbers; its picture goes beside it")
    init: str = knob("runs/toy/sft", "with --curves: the SFT run of the toy to start from")


def main():
    settings = parse_settings(Settings, __doc__)
    mistakes = [mistake for mistake in GALLERY if settings.only in ("", mistake.name)]
    if not mistakes:
        raise unknown("mistake", settings.only, [mistake.name for mistake in GALLERY])
    if settings.curves:
        curves.train_all(mistakes, settings.init, settings.curves)
        curves.write_page(settings.curves, settings.page)
        return

    missed = []
    for mistake in mistakes:
        found, seconds = caught(mistake)
        missed += [] if found else [mistake.name]
        print(f"{'caught' if found else 'MISSED'} {seconds:5.1f} s  {mistake.name}\n{'':16}{mistake.test}")
    print(f"{len(mistakes) - len(missed)} of {len(mistakes)} mistakes caught")
    if missed:
        sys.exit(f"missed: {', '.join(missed)}. The tests need one that fails with this mistake.")


if __name__ == "__main__":
    run_main(main)
