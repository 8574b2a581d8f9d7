"""Makes walkthrough.ipynb from walkthrough.py: the source is for diffs, the notebook for reading and running.

    python -m course.notebook

In the source, a line `# %%` begins a cell of code and `# %% [markdown]` one of text; what stands before the first is
for people who edit it. The cells run here, in order, in one namespace, and the notebook holds what they print, the
value of a last expression, and pyplot's figures, as Jupyter would; progress bars (stderr) are left out. An error in a
cell stops the command, and nothing is written. No Jupyter is needed, and the same machine makes
the same file, but for the memory that the training finds free.
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

from minidpo.files import atomic_write
from minidpo.settings import run_main

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_name("walkthrough.py")
NOTEBOOK = Path(__file__).with_name("walkthrough.ipynb")


def cells(source):
    """The source -> list of (kind, text), kind "markdown" or "code"."""
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]  # behind what comes before the first cell
    found = []
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        if mark.strip() == "[markdown]":
            found.append(("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)))
        else:
            found.append(("code", text.strip()))
    return found


def execute(cells, **given):
    """Runs the cells of code -> a list of outputs for each cell, as nbformat 4 has them.

    `given` sets names of the notebook to other values than its cells do: smaller sizes, for the tests.
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
    """Paths below the repository, as seen from its root."""
    return text.replace(f"{ROOT}{os.sep}", "")


def notebook(cells, outputs):
    """Cells and their outputs -> nbformat 4.5, a dict."""
    written, count = [], 0
    for (kind, text), shown in zip(cells, outputs, strict=True):
        name = hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()[:12]  # stays while the cell does
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
