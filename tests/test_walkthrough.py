"""The notebook: its source runs, the two files agree, and it can be read without running it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import need

import data
from course import notebook, show
from minidpo import dataset
from minidpo.tokenizer import Tokenizer

CELLS = notebook.cells(notebook.SOURCE.read_text(encoding="utf-8"))
SHIPPED = notebook.ROOT / "data" / "toy_sentiment"


@pytest.fixture(scope="module", autouse=True)
def plotting():
    need(importlib.util.find_spec("matplotlib"), "the notebook draws pictures and needs matplotlib")


def code(beginning):
    """The code cell with this beginning."""
    (cell,) = [text for kind, text in CELLS if kind == "code" and text.startswith(beginning)]
    return cell


def printed(outputs):
    return "".join(output.get("text", "") for output in outputs)


def kinds(outputs):
    """What a cell shows: a list of "text" and lists of MIME types."""
    return ["text" if "text" in output else sorted(output["data"]) for output in outputs]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The outputs of each cell, from a run of all cells on the 300 rows in the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "find", lambda name, file: SHIPPED / f"{file}.jsonl")
        patch.chdir(notebook.ROOT)
        patch.setenv("TQDM_DISABLE", "1")  # the notebook sets it; this takes it back
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(
            subprocess, "run", lambda *command, **how: pytest.fail(f"{command}, although everything is installed")
        )
        runs = tmp_path_factory.mktemp("runs")
        return notebook.execute(CELLS, RUNS=runs, SFT_EPOCHS=0.5, DPO_EPOCHS=0.8, PROMPTS=8)


@pytest.fixture(scope="module")
def shipped():
    return json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))


# ---- the notebook ----


def test_it_runs_and_shows_what_the_text_describes(executed):
    shown = {text: outputs for (kind, text), outputs in zip(CELLS, executed, strict=True) if kind == "code"}
    assert "[0.7000, 0.6000]" in printed(shown[code("logits =")])
    assert printed(shown[code("logits =")]).count("[0.7000, 0.6000]") == 2
    slopes = printed(shown[code("beta = 0.7")])
    assert "losses: tensor([0.6931, 0.6931])" in slopes
    assert "chosen:   tensor([-0.3500, -0.3500])" in slopes and "rejected: tensor([0.3500, 0.3500])" in slopes
    scored = [line.split()[-1] for line in printed(shown[code("boundary =")]).splitlines()[1:]]
    assert scored == ["no", "no", "yes", "yes", "yes", "yes"]
    assert "-log sigmoid(0.000)" in printed(shown[code("asked =")])
    assert "loss 0.693147 (ln 2 = 0.693147)" in printed(shown[code("BETA =")])
    assert "kl_exact" in printed(shown[code("print(f\"{'':14}")])


def test_it_agrees_with_its_source(executed, shipped):
    assert shipped == notebook.notebook(CELLS, [cell.get("outputs", []) for cell in shipped["cells"]])
    for (_, text), now, cell in zip(CELLS, executed, shipped["cells"], strict=True):
        assert kinds(cell.get("outputs", [])) == kinds(now), text


def test_it_can_be_read_without_running_it(shipped):
    outputs = [output for cell in shipped["cells"] for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}
    mimes = [mime for output in outputs for mime in output.get("data", {})]
    assert mimes.count("image/png") == 3 and mimes.count("text/html") == 2 and mimes.count("text/markdown") == 1
    assert (shipped["nbformat"], shipped["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in shipped["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[0-9a-f]{12}", i) for i in ids)


def test_it_names_no_folder_of_the_machine_that_made_it(shipped):
    texts = [line for cell in shipped["cells"] for line in cell["source"]]
    for cell in shipped["cells"]:
        for output in cell.get("outputs", []):
            texts += [output.get("text", "")]
            texts += [text for mime, text in output.get("data", {}).items() if mime != "image/png"]
    for text in texts:
        assert not re.search(r"(?<![\w.:/<])(/[\w.-]+/|[A-Z]:\\)", text), text


def test_the_commands_in_it_are_those_of_the_project(shipped):
    texts = [printed(cell.get("outputs", [])) for cell in shipped["cells"]]
    commands = [line for text in texts for line in re.findall(r"^\$ python (\S+)", text, flags=re.MULTILINE)]
    assert commands == ["train_sft.py", "train_dpo.py"]


def test_in_a_hosted_notebook_the_first_cell_downloads_and_installs(tmp_path, monkeypatch):
    ran = []

    def run(command, check):
        ran.append([str(word) for word in command])
        if command[0] == "git":
            Path(command[-1]).mkdir()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook.execute([("code", code("import importlib.util"))])
    root = str(tmp_path / "minidpo")
    assert [command[0] for command in ran] == ["git", sys.executable]
    assert ran[0][-1] == root and ran[1][-2:] == ["-e", f"{root}[plot]"]
    assert os.getcwd() == root and sys.path[0] == root


# ---- how it is generated ----


def test_cells():
    source = '"""Of the file."""\n\n# %% [markdown]\n# # A title\n#\n# text # 1\n\n# %%\nx = 1\n\n\ny = 2\n# %%\nx\n'
    assert notebook.cells(source) == [
        ("markdown", "# A title\n\ntext # 1"),
        ("code", "x = 1\n\n\ny = 2"),
        ("code", "x"),
    ]


def test_outputs_have_jupyters_format():
    outputs = notebook.execute(
        [
            ("code", "x = 1\nprint('a', x)"),
            ("markdown", "text"),
            ("code", "x + 1"),
            ("code", "import matplotlib.pyplot as plt\nf = plt.plot([1, 2])"),
            ("code", "from course import show\nshow.markdown('**b**')"),
            ("code", "None"),
            ("code", f"path = {str(notebook.ROOT / 'train_dpo.py')!r}\nprint(path)\npath"),
        ],
        x=5,
    )
    assert outputs[0] == [{"output_type": "stream", "name": "stdout", "text": "a 1\n"}]
    assert outputs[1] == outputs[5] == []
    assert outputs[2][0]["data"] == {"text/plain": "6"}  # the given x replaces that of the cell
    assert outputs[3][0]["output_type"] == "display_data" and outputs[3][0]["data"]["image/png"].startswith("iVBOR")
    assert outputs[4][0]["data"] == {"text/plain": "<text/markdown>", "text/markdown": "**b**"}
    assert outputs[6][0]["text"] == "train_dpo.py\n" and outputs[6][1]["data"] == {"text/plain": "'train_dpo.py'"}


def test_an_error_in_a_cell_stops_it():
    with pytest.raises(ZeroDivisionError):
        notebook.execute([("code", "1 / 0")])


def test_tokens_in_colour_are_those_of_the_mask():
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    rows = dataset.sft_batch([([256, 65], [60, 256]), ([256], [67, 68, 69, 256])])
    page = show.tokens(rows, tokenizer).data
    spans = re.findall(r'background:(#\w+)">([^<]*)</span>', page)
    names = {colour: name for name, colour in show.COLOURS.items()}
    assert [name for _, name in spans[:3]] == list(show.COLOURS)
    assert [(names[colour], text) for colour, text in spans[3:]] == [
        ("prompt", "A"), ("scored", "&lt;"), ("scored", "∎"), ("padding", "·"),
        ("scored", "C"), ("scored", "D"), ("scored", "E"), ("scored", "∎"),
    ]  # fmt: skip
    assert rows.mask.sum() == 6 and torch.equal(rows.mask[0], torch.tensor([False, True, True, False]))


def test_jupyter_runs_it(tmp_path):
    """The stored notebook with smaller runs, in a real kernel beside a downloaded project, exported to HTML."""
    need(
        importlib.util.find_spec("nbconvert") and importlib.util.find_spec("ipykernel"), "it needs nbconvert, ipykernel"
    )
    text = notebook.NOTEBOOK.read_text(encoding="utf-8")
    smaller = {
        "SFT_EPOCHS = 1.0": "SFT_EPOCHS = 0.02",
        "DPO_EPOCHS = 1.0": "DPO_EPOCHS = 0.02",
        "PROMPTS = 200": "PROMPTS = 4; data.find = lambda name, file: Path(f'data/toy_sentiment/{file}.jsonl')",
        "runs/walkthrough": tmp_path.as_posix() + "/runs",
    }
    for old, new in smaller.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "small.ipynb").write_text(text, encoding="utf-8")
    (tmp_path / "minidpo").symlink_to(notebook.ROOT)  # what the first cell downloads, before the kernel was restarted
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--execute", str(tmp_path / "small.ipynb")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "small.html").read_text(encoding="utf-8")
    assert "(ln 2 = 0.693147)" in page and page.count("image/png") >= 3
    assert page.count("\n") < 20_000 and "Traceback" not in page


def test_its_mathematics_needs_no_network():
    """nbconvert's HTML loads MathJax from a server, so the text cells contain no LaTeX."""
    assert not [text for kind, text in CELLS if kind == "markdown" and "$" in text]
