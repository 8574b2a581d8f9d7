"""Helpers of the notebook: to show HTML, Markdown, pictures and coloured tokens, and to run a command."""

import base64
import html
import shlex
import sys
from pathlib import Path
from unittest import mock


class Shown:
    """A value that Jupyter displays. `kind` is a MIME type, `data` a string (base64 for a picture)."""

    def __init__(self, kind, data):
        self.kind, self.data = kind, data

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {self.kind: self.data}

    def __repr__(self):
        return f"<{self.kind}>"


def markdown(text):
    return Shown("text/markdown", text)


def picture(path):
    """Shows a PNG file."""
    return Shown("image/png", base64.b64encode(Path(path).read_bytes()).decode())


CELL = "padding:1px 4px;margin:1px;border-radius:3px;display:inline-block;font-family:monospace;color:#111;background:"
COLOURS = {"scored": "#9fdfb0", "prompt": "#d5d5d5", "padding": "#f6e6c9"}


def tokens(rows, tokenizer):
    """Shows the targets of `rows` (ids, targets, mask) in colour, one line per row.

    Green tokens are scored, grey ones belong to the prompt, sand-coloured ones are padding.
    """
    from experiments.explain import visible

    legend = "".join(f'<span style="{CELL}{colour}">{name}</span>' for name, colour in COLOURS.items())
    lines = [f"<p>{legend}</p>"]
    for targets, mask in zip(rows.targets.tolist(), rows.mask.tolist(), strict=True):
        end = max(t for t, scored in enumerate(mask) if scored)
        spans = []
        for t, (target, scored) in enumerate(zip(targets, mask, strict=True)):
            kind = "scored" if scored else "prompt" if t < end else "padding"
            text = "∎" if target == tokenizer.eot else visible(tokenizer.tokens[target])
            text = "·" if kind == "padding" else html.escape(text)
            spans.append(f'<span style="{CELL}{COLOURS[kind]}">{text}</span>')
        lines.append(f"<p>{''.join(spans)}</p>")
    return Shown("text/html", "\n".join(lines))


def call(main, flags):
    """Runs a command of the project in this process: call(train_dpo.main, "--data toy ...")."""
    print(f"$ python {main.__module__}.py {flags}")
    with mock.patch.object(sys, "argv", [f"{main.__module__}.py", *shlex.split(flags)]):
        main()
