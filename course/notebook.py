"""Generates walkthrough.ipynb from walkthrough.py: the source is for editing, the notebook for reading.

    python -m course.notebook

In the source, a line `# %%` starts a code cell and a line `# %% [markdown]` starts a text cell. The text before the
first cell is not part of the notebook.

The cells run here, in order, in one namespace. As in Jupyter, the notebook contains what they print, the value of a
last expression, and pyplot's figures; progress bars (stderr) are left out. If a cell raises an error, the command stops
and nothing is written. Jupyter is not needed. Two runs on one machine give the same file, except for the amount of free
memory that training prints.
"""

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import re
from pathlib import Path

from minidpo.files.writing import atomic_write
from minidpo.settings import run_main

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_name("walkthrough.py")
NOTEBOOK = Path(__file__).with_name("walkthrough.ipynb")


def cells(source):
    """Splits the source into a list of (kind, text), kind "markdown" or "code"."""
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]  # [0] is the text before the first cell
    found = []
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        if mark.strip() == "[markdown]":
            found.append(("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)))
        else:
            found.append(("code", text.strip()))
    return found


def execute(cells, **given):
    """Runs the code cells; returns one list of outputs per cell, in the format of nbformat 4.

    `given` overwrites variables of the notebook after each cell. The tests use it to set smaller sizes.
    """
    import matplotlib

    matplotlib.use("agg")
    namespace, found = {"__name__": "__main__"}, []
    for kind, text in cells:
        found.append(run_cell(text, namespace) if kind == "code" else [])
        namespace.update(given)
    return found


def run_cell(text, namespace):
    from matplotlib import pyplot

    body, outputs, printed, value = ast.parse(text).body, [], io.StringIO(), None
    last = [body.pop()] if isinstance(body[-1], ast.Expr) else []
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
        for expression in last:
            value = eval(compile(ast.Expression(expression.value), "cell", "eval"), namespace)
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": without_root(printed.getvalue())})
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, dpi=90, format="png")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    pyplot.close("all")
    if value is not None:
        data = {"text/plain": without_root(repr(value))}
        if hasattr(value, "_repr_mimebundle_"):
            data |= value._repr_mimebundle_()
        outputs.append({"output_type": "execute_result", "data": data, "metadata": {}})
    return outputs


def without_root(text):
    """Makes the paths in a text relative to the root of the repository."""
    return text.replace(f"{ROOT}{os.sep}", "")


def notebook(cells, outputs):
    """Returns the notebook as a dict in nbformat 4.5."""
    written, count = [], 0
    for (kind, text), shown in zip(cells, outputs, strict=True):
        name = hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()[:12]  # an id that changes only with its cell
        cell = {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
        if kind == "code":
            count += 1
            numbered = [{**o, "execution_count": count} if o["output_type"] == "execute_result" else o for o in shown]
            cell |= {"execution_count": count, "outputs": numbered}
        written.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": written, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m course.notebook"
    )
    parser.parse_args()
    os.chdir(ROOT)
    found = cells(SOURCE.read_text(encoding="utf-8"))
    text = json.dumps(notebook(found, execute(found)), indent=1, ensure_ascii=False)
    atomic_write(NOTEBOOK, text + "\n")
    print(f"{NOTEBOOK}: {len(found)} cells")


if __name__ == "__main__":
    run_main(main)
