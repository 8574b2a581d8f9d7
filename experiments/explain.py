"""The anatomy of one DPO step on one pair: every token, every number, before the step and after it.

    python -m experiments.explain --policy runs/toy/dpo --reference runs/toy/sft --row 3 --html step.html

Three tables, prompt, chosen and rejected, with a line for each token:

    mask       x if the token is scored, . if not (the prompt is given, nobody asks the model to write it)
    log pi     log-probability of the token after everything before it, in nats, under the policy
    log ref    the same under the reference
    diff       log pi - log ref: what this token adds to the response's log-ratio
    change     log pi after the step - log pi before it

Below them what the loss makes of the two sums, each number with its formula and the numbers filled in. The step is one
call of `train_dpo.train_step` with this pair alone as the batch, on a copy of the policy with a new optimiser, so
nothing on disk changes. AdamW's first step moves nearly every weight by the learning rate, however small the gradient:
the step is larger than one in mid-training, where the warm-up, other pairs and other steps have their say. --lr makes
it smaller. With the SFT run as both models one sees the first step of a training: all differences 0, loss ln 2.

Beta, loss and optimiser are those of the policy's settings.json; for a policy that is no DPO run, those that
train_dpo.py takes for its data. Everything is computed in the precision of the weights. In tokens, ␣ is a space, ∎ the
end-of-text token, and what cannot be seen, or is part of a character, stands as Python would write it: \\n, \\xe2.
"""

import copy
import dataclasses
import html
import io
import json
import os
import sys
import unicodedata
from pathlib import Path

import torch

import data
import train_dpo
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, pick_device
from minidpo.files import atomic, atomic_write
from minidpo.optim import make_optimizer
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    policy: str = knob(dataclasses.MISSING, "the model that takes the step: a run folder, a GPT-2 folder or name")
    reference: str = knob(dataclasses.MISSING, "the reference, as a rule the model that the policy was trained from")
    data: str = knob("", "toy, imdb, hh, tldr, or a JSONL file of pairs; empty: the policy's own held-out pairs")
    row: int = knob(0, "which pair of the file, counted from 0")
    beta: float = knob(0.0, "price of a nat of distance from the reference; 0: as the policy was trained")
    lr: float = knob(0.0, "learning rate of the step; 0: as the policy was trained, after its warm-up")
    html: str = knob("", "write a page to this file")
    png: str = knob("", "write a picture to this file")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)


# ---- 1. The numbers ----


def training_settings(settings):
    """The `train_dpo.Settings` for the step: the policy's own if it is a DPO run, else those of its data."""
    path = Path(settings.policy) / "settings.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        name = settings.data or saved.get("eval_data") or saved.get("data")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). Restore it.") from error
    if not name:
        raise UserError(f"{settings.policy} has no settings.json that names its data. Give --data, toy or FILE.jsonl.")
    flags = ["--data", saved.get("data", name), "--init", settings.reference, "--out", settings.policy]
    train = parse_settings(train_dpo.Settings, "", flags, sets=train_dpo.SETS)
    if "beta" in saved:  # else it is an SFT run: its learning rate is another stage's
        names = {field.name for field in dataclasses.fields(train)}
        train = dataclasses.replace(train, **{k: v for k, v in saved.items() if k in names})
    given = {k: getattr(settings, k) for k in ("beta", "lr") if getattr(settings, k)}
    device = pick_device(settings.device)
    return dataclasses.replace(train, data=name, device=device, dtype="float32", micro_batch_size=0, **given)


def read_pair(settings, train, tokenizer, max_length):
    """The pair that was asked for -> ((prompt_ids, chosen_ids, rejected_ids), one line about where it comes from)."""
    path = data.find(train.data, "pairs_test")
    records = dataset.read_jsonl(path, dataset.PAIR)
    if settings.row >= len(records):
        raise UserError(f"--row {settings.row}: {path} holds {len(records):,} pairs, rows 0 to {len(records) - 1}.")
    rows, counts = dataset.encode_pairs([records[settings.row]], tokenizer, max_length)
    notes = [name for name, n in counts.items() if n and name != "pairs"]
    if not rows:
        raise UserError(f"--row {settings.row} of {path} is no usable pair: {', '.join(notes)}. Take another row.")
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return rows[0], ", ".join([f"row {settings.row} of {len(records):,} in {here}", *notes])


@torch.no_grad()
def every_token_logp(model, row, device):
    """log pi of each token after everything before it -> {"prompt", "chosen", "rejected"}: lists of floats.

    The prompt's first token, the eot before it, is what the model starts from, and has no log-probability: None.
    """
    batch = dataset.preference_batch([row], device)
    logps = {}
    for side, rows in (("chosen", batch.chosen), ("rejected", batch.rejected)):
        line = train_dpo.token_logps(model(rows.ids), rows.targets)[0]
        logps[side] = line[rows.mask[0]].tolist()
        logps["prompt"] = [None, *line[~rows.mask[0]].tolist()]  # the same on both sides, up to rounding
    return logps


def loss_figures(policy, reference, variant):
    """What the loss makes of the sums: policy, reference (2,) log pi(y|x) of chosen and rejected -> dict of floats.

    `weight` is sigmoid(r_l - r_w) for the plain loss (gradient of Eq. 7, A.4): the loss's slope in log pi(y_w|x) is
    -beta weight, in log pi(y_l|x) it is +beta weight. It is taken by autograd, so it holds for every variant.
    """
    policy = policy.detach().requires_grad_()
    losses, chosen_rewards, rejected_rewards = train_dpo.dpo_loss(
        *policy[:, None], *reference[:, None], **variant
    )  # a batch of one pair
    losses.sum().backward()
    chosen_reward, rejected_reward = chosen_rewards.item(), rejected_rewards.item()
    return {
        "chosen_logp": policy[0].item(),
        "rejected_logp": policy[1].item(),
        "chosen_reference_logp": reference[0].item(),
        "rejected_reference_logp": reference[1].item(),
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": chosen_reward - rejected_reward,
        "loss": losses.item(),
        "weight": -policy.grad[0].item() / variant["beta"],
    }


def anatomy(policy, reference, row, train):
    """Every number of the step: {"tokens", "before", "after", "grad_norm"}.

    tokens: {"prompt", "chosen", "rejected"}, each a list of {"id", "scored", "log_pi", "log_ref", "log_pi_after"};
    before, after: `loss_figures`; grad_norm: of all weights, before clipping. Both models are left as they were, but
    for dropout, which is set to 0.
    """
    stepped = copy.deepcopy(policy)
    for model in (policy, reference, stepped):
        model.set_dropout(0.0)
    with torch.no_grad():
        before, reference_sums = (
            torch.cat(train_dpo.logps_of(model, [row], [0], train)) for model in (policy, reference)
        )
    optimizer = make_optimizer(stepped, train.optimizer, train.lr)
    metrics = train_dpo.train_step(stepped, optimizer, [row], reference_sums[None], [0], train)
    with torch.no_grad():
        after = torch.cat(train_dpo.logps_of(stepped, [row], [0], train))

    columns = [every_token_logp(model, row, train.device) for model in (policy, reference, stepped)]
    names = ("id", "scored", "log_pi", "log_ref", "log_pi_after")
    tokens = {
        part: [
            dict(zip(names, (token, part != "prompt", *logps), strict=True))
            for token, *logps in zip(ids, *(column[part] for column in columns), strict=True)
        ]
        for part, ids in zip(("prompt", "chosen", "rejected"), row, strict=True)
    }
    return {
        "tokens": tokens,
        "before": loss_figures(before, reference_sums, train.variant),
        "after": loss_figures(after, reference_sums, train.variant),
        "grad_norm": metrics["grad_norm"],
    }


# ---- 2. The words: what is shown, whatever it is shown on ----


def number(value, signed=False):
    """ "-1.234", or with its sign if positive too; never "-0.000". None, for a token without one, is a dash."""
    if value is None:
        return "-"
    value = round(value, 3) + 0.0
    return format(value, f"{'+' if signed and value else ''}.{3 if abs(value) < 1000 else 2}f")


def figure(value):
    """As `number`, but a loss or a weight that is small without being 0 says how small: "1.2e-05"."""
    return format(value, ".1e") if 0 < abs(value) < 0.0005 else number(value)


def visible(token):
    """The bytes of a token -> text in which everything shows, a mark without its letter on a dotted circle."""
    text = token.decode("utf-8", "backslashreplace")  # BPE works on bytes: a token may be part of a character
    shown = ""
    for char in text:
        unseen = not char.isprintable() or "VARIATION SELECTOR" in unicodedata.name(char, "")
        shown += "␣" if char == " " else char.encode("unicode_escape").decode() if unseen else char
    return "◌" + shown if unicodedata.category(shown[0]).startswith("M") else shown


TITLES = {"prompt": "PROMPT x, not scored", "chosen": "CHOSEN y_w", "rejected": "REJECTED y_l"}
HEADS = ("token", "mask", "log pi", "log ref", "diff", "log pi", "diff", "change")
SIGNED = (4, 6, 7)  # the columns whose sign matters, and is coloured


def tables(found, tokenizer):
    """{part: list of lines}; a line is [token, mask, six numbers], as in HEADS. A response ends with its sums."""
    shown = {}
    for part, tokens in found["tokens"].items():
        lines = []
        for t in tokens:
            text = "∎" if t["id"] == tokenizer.eot else visible(tokenizer.tokens[t["id"]])
            lines.append([text, "x" if t["scored"] else ".", *six(t["log_pi"], t["log_ref"], t["log_pi_after"])])
        if part != "prompt":
            before, after = found["before"], found["after"]
            sums = before[f"{part}_logp"], before[f"{part}_reference_logp"], after[f"{part}_logp"]
            lines.append([f"sum of {len(tokens)}", "", *six(*sums)])
        shown[part] = lines
    return shown


def six(log_pi, log_ref, log_pi_after):
    """The six numbers of a line; None for all if the token has none."""
    if log_pi is None:
        return [None] * 6
    return [log_pi, log_ref, log_pi - log_ref, log_pi_after, log_pi_after - log_ref, log_pi_after - log_pi]


def formulas(figures, train):
    """[(name, formula, the same with the numbers filled in, value)], from the log-ratios to the gradient."""
    n = {name: figure(value) for name, value in figures.items()}
    beta, e = f"{train.beta:g}", f"{train.label_smoothing:g}"
    found = []
    for side, y, r in (("chosen", "y_w", "r_w"), ("rejected", "y_l", "r_l")):
        if train.reference_free:
            formula, filled = f"{r} = beta log pi({y}|x)", f"{beta} x {n[f'{side}_logp']}"
        else:
            formula = f"{r} = beta (log pi({y}|x) - log pi_ref({y}|x))"
            filled = f"{beta} x ({n[f'{side}_logp']} - {n[f'{side}_reference_logp']})"
        found.append((f"{side} reward", formula, filled, figures[f"{side}_reward"]))
    m = n["margin"]
    found.append(("margin", "m = r_w - r_l", f"{n['chosen_reward']} - {n['rejected_reward']}", figures["margin"]))
    if train.loss_type == "ipo":
        loss = "L = (m / beta - 1 / (2 beta))^2", f"({m} / {beta} - 1 / (2 x {beta}))^2"
        weight = "w = -2 (m / beta - 1 / (2 beta)) / beta", f"-2 x ({m} / {beta} - 1 / (2 x {beta})) / {beta}"
    elif train.label_smoothing:
        loss = (
            "L = -(1 - e) log sigmoid(m) - e log sigmoid(-m)",
            f"-{1 - train.label_smoothing:g} log sigmoid({m}) - {e} log sigmoid({figure(-figures['margin'])})",
        )
        weight = "w = sigmoid(-m) - e", f"sigmoid(-({m})) - {e}"
    else:
        loss = "L = -log sigmoid(m)", f"-log sigmoid({m})"
        weight = "w = sigmoid(r_l - r_w)", f"sigmoid({n['rejected_reward']} - {n['chosen_reward']})"
    found.append(("loss", *loss, figures["loss"]))
    found.append(("gradient weight", *weight, figures["weight"]))
    pull = "dL/dlog pi = -beta w, rejected: +beta w"
    found.append(("pull on a token", pull, f"-{beta} x {n['weight']}", -train.beta * figures["weight"]))
    return found


def steps(found, train):
    """[(name, formula, filled in before, value before, filled in after, value after)]"""
    before, after = formulas(found["before"], train), formulas(found["after"], train)
    return [(*a, *b[2:]) for a, b in zip(before, after, strict=True)]


def headlines(found, settings, train, source):
    """What was computed from what: [(label, text)]."""
    clipped = f", cut to {train.grad_clip:g}" if found["grad_norm"] > train.grad_clip else ""
    kind = train.loss_type + (f", label smoothing {train.label_smoothing:g}" if train.label_smoothing else "")
    return [
        ("policy", settings.policy),
        ("reference", settings.reference + (" (counted as 0 in the loss)" if train.reference_free else "")),
        ("pair", source),
        ("loss", f"{kind}, beta {train.beta:g}"),
        ("step", f"{train.optimizer}, learning rate {train.lr:g}; gradient norm {found['grad_norm']:.3g}{clipped}"),
    ]


# ---- 3. The terminal ----

WIDTH = 80
BOLD, DIM, RED, GREEN = "1", "2", "31", "32"  # of the 16 base colours only what reads on light and on dark


def wants_colour(stream):
    """Whether to send escape codes: to a terminal that knows them, unless NO_COLOR (no-color.org) is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns(text):
    """How many columns of a terminal `text` takes: two for a wide character, none for a mark on the one before it."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def fit(text, width):
    """`text` in exactly `width` columns, cut with an ellipsis if it is longer."""
    if columns(text) > width:
        while columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns(text))


def fold(label, text, width=WIDTH, indent=11):
    """Lines of at most `width` columns, the first with the label; cut anywhere, since a path has no spaces."""
    lines, line = [], fit(label, indent)
    for char in text:
        if columns(line + char) > width:
            lines.append(line)
            line = " " * indent
        line += char
    return [*lines, line]


def sign_style(value, bold_from=1.0):
    """Style of a number whose sign matters: green above 0, red below, bold from one nat on, dim at 0.000."""
    shown = round(value, 3)
    return (GREEN if shown > 0 else RED, *([BOLD] if abs(shown) >= bold_from else [])) if shown else (DIM,)


def terminal(found, settings, train, source, tokenizer, colour):
    """Everything as lines of at most 80 columns, with escape codes if `colour`."""

    def paint(text, *styles):
        return f"\x1b[{';'.join(styles)}m{text}\x1b[0m" if colour and styles else text

    def line_of(cells, *style):
        """token 17, mask 5, then three numbers of 9 columns on either side of a bar."""
        painted = [paint(f"{fit(cells[0], 17)}{cells[1]:>5}", *style)]
        for i, value in enumerate(cells[2:], start=2):
            text = f"{number(value, signed=i in SIGNED):>9}"
            signs = sign_style(value) if i in SIGNED and DIM not in style else ()  # colour on dim is hard to read
            painted.append(paint(text, *signs, *style))
        return "".join(painted[:4]) + paint(" |", DIM) + "".join(painted[4:])

    lines = [line for headline in headlines(found, settings, train, source) for line in fold(*headline)]
    for part, rows in tables(found, tokenizer).items():
        title = f"{fit(TITLES[part], 22)}{'before the step':>27} |{'after it':>27}"
        lines += ["", paint(title, BOLD)]
        heads = "".join(f"{head:>9}" for head in HEADS[2:])
        lines.append(paint(f"{'token':18}mask{heads[:27]} |{heads[27:]}", DIM))
        for cells in rows:
            lines.append(line_of(cells, *((DIM,) if part == "prompt" else (BOLD,) if not cells[1] else ())))
    lines += ["", paint("WHAT THE LOSS MAKES OF THE SUMS", BOLD)]
    for name, formula, *sides in steps(found, train):
        lines.append(paint(f"{name:17}", BOLD) + formula)
        for when, filled, value in (("before", *sides[:2]), ("after", *sides[2:])):
            lines.append(f"  {when:8}{filled:57} = {paint(f'{figure(value):>9}', BOLD)}")
    return lines


# ---- 4. The page ----

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --faint: #6b6b6b; --rule: #ddd;
        --up: 0, 140, 60; --down: 210, 40, 40; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181c; --faint: #9a9a9a; --rule: #3a3d44;
          --up: 60, 200, 110; --down: 255, 95, 95; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
       max-width: 82rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-bottom: .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
dt, .faint, .prompt td { color: var(--faint); }
.side { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; }
th { font-weight: 600; text-align: right; color: var(--faint); }
th, td { padding: .08rem .45rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
td { text-align: right; } td:first-child, th:first-child, .words td, .words th { text-align: left; }
td:first-child, code { font-family: ui-monospace, monospace; } .after { border-left: 2px solid var(--rule); }
.sum td { font-weight: 700; } .words td.value { text-align: right; font-weight: 700; }
.up { background: rgba(var(--up), calc(var(--much) * .55)); }
.down { background: rgba(var(--down), calc(var(--much) * .55)); }
"""


def page(found, settings, train, source, tokenizer):
    """A self-contained HTML page: no script, nothing fetched, light or dark as the reader's system is."""

    def cell(i, value):
        kind = ["after"] if i == 5 else []
        style = ""
        if i in SIGNED and value and round(value, 3):
            kind.append("up" if value > 0 else "down")
            style = f' style="--much: {strength(value):.2f}"'
        attribute = f' class="{" ".join(kind)}"' if kind else ""
        return f"<td{attribute}{style}>{number(value, signed=i in SIGNED)}</td>"

    body = ["<h1>One DPO step on one pair</h1>", "<dl>"]
    body += [f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in headlines(found, settings, train, source)]
    body += ["</dl>", '<div class="side">']
    for part, rows in tables(found, tokenizer).items():
        body.append(f'<div class="wide"><h2>{TITLES[part]}</h2><table class="{part}">')
        body.append('<tr><th colspan="2"></th><th colspan="3">before</th><th colspan="3" class="after">after</th></tr>')
        heads = "".join(f"<th{' class=after' if i == 5 else ''}>{h}</th>" for i, h in enumerate(HEADS))
        body.append(f"<tr>{heads}</tr>")
        for text, mask, *values in rows:
            numbers = "".join(cell(i, value) for i, value in enumerate(values, start=2))
            kind = "" if mask else ' class="sum"'
            body.append(f"<tr{kind}><td><bdi>{html.escape(text)}</bdi></td><td>{mask}</td>{numbers}</tr>")
        body.append("</table></div>")
    body += ["</div>", "<h2>What the loss makes of the sums</h2>", '<div class="wide"><table class="words">']
    body.append("<tr><th></th><th>formula</th><th>before</th><th></th><th>after</th><th></th></tr>")
    for name, formula, *sides in steps(found, train):
        cells = "".join(
            f'<td class="after"><code>{html.escape(filled)}</code> =</td><td class="value">{figure(value)}</td>'
            for filled, value in (sides[:2], sides[2:])
        )
        body.append(f"<tr><td>{name}</td><td><code>{html.escape(formula)}</code></td>{cells}</tr>")
    body += ["</table></div>", f'<p class="faint">{html.escape(CAPTION)}</p>']
    return HEAD + "\n".join(body) + "\n</body>\n</html>\n"


HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>One DPO step on one pair</title>
<style>{STYLE}</style>
</head>
<body>
"""
CAPTION = (
    "In nats. diff = log pi - log pi_ref; change = log pi after the step - log pi before it; x marks a scored token; "
    "␣ is a space, ∎ the end-of-text token. Numbers are computed unrounded and shown with three decimals."
)


def strength(value):
    """How strongly to colour a difference in nats: 0 to 1, half at one nat."""
    return abs(value) / (1 + abs(value))


# ---- 5. The picture ----


def fonts_for(text):
    """(names of fonts for matplotlib that together hold the characters of `text`, characters that no font here has)."""
    from matplotlib import font_manager

    names, missing = ["DejaVu Sans Mono"], set(text)  # DejaVu comes with matplotlib
    first = [f for f in font_manager.fontManager.ttflist if f.name == names[0]]
    for font in first + font_manager.fontManager.ttflist:
        if missing and "Last Resort" not in font.name:  # which has a box for every character there is
            has = {char for char in missing if font_manager.get_font(font.fname).get_char_index(ord(char))}
            names += [font.name] if has and font.name not in names else []
            missing -= has
    return names, missing


def picture(path, found, settings, train, source, tokenizer):
    """The three tables side by side and the formulas below, on a grid of characters. Needs the extra `plot`.

    A character that no installed font has stands as its escape.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
        from PIL import Image
    except ImportError:
        print(f'no {path}: matplotlib is not installed (pip install "minidpo[plot]")')
        return
    shown = tables(found, tokenizer)
    facts = headlines(found, settings, train, source)
    fonts, missing = fonts_for(
        "".join(row[0] for rows in shown.values() for row in rows) + "".join(f[1] for f in facts)
    )
    escape = {ord(c): c.encode("unicode_escape").decode() for c in missing}

    each, top = 78, len(facts) + 2  # characters a table takes; the tables' first line
    bottom = top + max(map(len, shown.values())) + 3
    height, width = bottom + len(steps(found, train)) + 4, 3 * each - 5
    canvas = Figure(figsize=(width * 4.82 / 72, height * 11 / 72))  # 8 points: 4.82 wide, in lines of 11
    axes = canvas.add_axes((0.01, 0.01, 0.98, 0.98), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")

    def write(x, y, text, **style):
        style = {"family": fonts, "fontsize": 7.7, "va": "center", "parse_math": False, **style}  # "$" is no formula
        axes.text(x, y + 0.5, text, **style)

    for y, (label, text) in enumerate(facts):
        write(0, y, label, color="gray")
        write(11, y, fit(text.translate(escape), width - 11))
    right = (None, 18, 27, 36, 45, 55, 64, 73)  # where the columns end
    for i, (part, rows) in enumerate(shown.items()):
        x, colour = i * each, "gray" if part == "prompt" else "black"
        write(x, top, TITLES[part], weight="bold")
        write(x + 45, top, "before", ha="right", color="gray")
        write(x + 73, top, "after", ha="right", color="gray")
        for end, head in zip(right[2:], HEADS[2:], strict=True):
            write(x + end, top + 1, head, ha="right", color="gray")
        for y, (text, mask, *values) in enumerate(rows, start=top + 2):
            style = {"color": colour, "weight": "normal" if mask else "bold"}
            write(x, y, fit(text.translate(escape), 16).rstrip(), **style)
            write(x + 18, y, mask, ha="right", **style)
            for c, value in enumerate(values, start=2):
                if c in SIGNED and value:
                    shade = {"color": "#0a8c3c" if value > 0 else "#d22828", "alpha": 0.55 * strength(value)}
                    axes.add_patch(Rectangle((x + right[c] - 8.3, y), 8.6, 1, linewidth=0, **shade))
                write(x + right[c], y, number(value, signed=c in SIGNED), ha="right", **style)
    write(0, bottom, "WHAT THE LOSS MAKES OF THE SUMS", weight="bold")
    write(78 + 73, bottom, "before", ha="right", color="gray")
    write(156 + 73, bottom, "after", ha="right", color="gray")
    for y, (name, formula, *sides) in enumerate(steps(found, train), start=bottom + 1):
        write(0, y, name)
        write(18, y, formula, color="gray")
        for x, (filled, value) in ((78, sides[:2]), (156, sides[2:])):
            write(x + 62, y, f"{filled} =", ha="right")
            write(x + 73, y, figure(value), ha="right", weight="bold")
    write(0, height - 1.5, CAPTION, color="gray", fontsize=6.6)
    drawn = io.BytesIO()
    canvas.savefig(drawn, dpi=110, format="png", facecolor="white")
    with atomic(path) as file:  # with a palette: a third of the bytes
        Image.open(drawn).convert("RGB").quantize(128).save(file, "png", optimize=True)


def main():
    settings = parse_settings(Settings, __doc__)
    sys.stdout.reconfigure(errors="backslashreplace")  # a pipe that is not UTF-8 shall not stop us
    train = training_settings(settings)
    policy, tokenizer, _ = checkpoint.load(settings.policy)
    reference, reference_tokenizer, _ = checkpoint.load(settings.reference)
    if tokenizer.fingerprint != reference_tokenizer.fingerprint:
        raise UserError(f"{settings.policy} and {settings.reference} have different tokenizers: no pair fits both.")
    limits = [policy.config.block_size, reference.config.block_size, *([train.max_length] if train.max_length else [])]
    row, source = read_pair(settings, train, tokenizer, min(limits))
    found = anatomy(policy.to(train.device), reference.to(train.device), row, train)
    everything = found, settings, train, source, tokenizer
    print("\n".join(terminal(*everything, colour=wants_colour(sys.stdout))))
    if settings.html:
        atomic_write(settings.html, page(*everything))
    if settings.png:
        picture(settings.png, *everything)


if __name__ == "__main__":
    run_main(main)
