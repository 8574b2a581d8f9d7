"""One DPO step on one pair of responses: every token and every number, before the step and after it.

    python -m experiments.explain --policy runs/toy/dpo --reference runs/toy/sft --row 3

Prints three tables: the prompt, the chosen response and the rejected response. Each token has a line:

    mask       x if the token is scored, . if not (the loss scores the response only, not the prompt)
    log pi     log-probability of the token given everything before it, under the policy, in nats
    log ref    the same under the reference
    diff       log pi - log ref: what this token adds to the log-ratio of the response
    change     log pi after the step - log pi before it

Below the tables, each formula of the loss stands with its numbers filled in, before the step and after it. In a token,
␣ is a space and ∎ is the end-of-text token. docs/explain.md shows how to read all this.

The step is one call of `train_dpo.train_step` with this pair as the batch, on a copy of the policy, with a new
optimiser. Nothing on disk changes. Beta, loss and optimiser come from the policy's settings.json. If the policy is not
a DPO run, they are the defaults of train_dpo.py. Everything is computed in the precision of the weights and without
--fast, whatever the run was trained with.
"""

import copy
import dataclasses
import os
import re
import sys
import unicodedata
from pathlib import Path

import torch

import data
import train_dpo
from experiments import common
from minidpo import dataset
from minidpo.device import DEVICES, pick_device
from minidpo.optim import make_optimizer
from minidpo.settings import UserError, knob, parse_settings, run_main, settings_of


@dataclasses.dataclass
class Settings:
    policy: str = knob(dataclasses.MISSING, "the model that takes the step: a run folder, a GPT-2 folder or name")
    reference: str = knob(dataclasses.MISSING, "the reference, usually the model that the policy was trained from")
    data: str = knob("", "toy, imdb, hh, tldr, or a JSONL file of pairs; empty: the run's own, held out if it has any")
    row: int = knob(0, "which pair of the file, counted from 0")
    beta: float = knob(0.0, "beta of the loss: larger stays closer to the reference; 0: as the policy was trained")
    lr: float = knob(0.0, "learning rate of the step; 0: as the policy was trained, after its warm-up")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)


# ---- 1. The numbers ----


def training_settings(settings):
    """The `train_dpo.Settings` of the step: the policy's own if it is a DPO run, else the defaults for --reference.

    Raises UserError if settings.json is damaged or names no data, or `formulas` does not know the loss of the run.
    """
    saved = settings_of(settings.policy)
    name = settings.data or saved.get("eval_data") or saved.get("data")
    if not name:
        raise UserError(f"{settings.policy} has no settings.json that names its data. Give --data, toy or FILE.jsonl.")
    flags = ["--data", saved.get("data", name), "--init", settings.reference, "--out", settings.policy]
    train = parse_settings(train_dpo.Settings, "", flags, sets=train_dpo.SETS)
    if "beta" in saved:  # a DPO run; the learning rate of an SFT run belongs to another stage
        names = {field.name for field in dataclasses.fields(train)}
        train = dataclasses.replace(train, **{name: value for name, value in saved.items() if name in names})
        unknown = sorted(set(saved) - names | set(train.variant) - KEYWORDS)
        unknown += ["loss_type"] if train.loss_type not in LOSSES else []
        if unknown:
            what = ", ".join(f"{name} {saved.get(name)!r}" for name in unknown)
            raise UserError(
                f"{settings.policy} was trained with a loss that explain does not know ({what}). It shows the losses "
                f"{' and '.join(LOSSES)} of train_dpo.py. Add the new loss to `formulas` in experiments/explain.py."
            )
    given = {k: getattr(settings, k) for k in ("beta", "lr") if getattr(settings, k)}
    plain = dict(device=pick_device(settings.device), dtype="float32", fast=False, micro_batch_size=0)
    return dataclasses.replace(train, data=name, **plain, **given)


def read_pair(settings, train, tokenizer, max_length):
    """Reads the pair that was asked for -> ((prompt_ids, chosen_ids, rejected_ids), one line that says where it is)."""
    path = data.find(train.data, "pairs_test")
    records = dataset.read_jsonl(path, dataset.PAIR)
    if settings.row >= len(records):
        raise UserError(f"--row {settings.row}: {path} holds {len(records):,} pairs, rows 0 to {len(records) - 1}.")
    pairs, counts = dataset.encode([records[settings.row]], dataset.PAIR, tokenizer, max_length)
    notes = [name for name, n in counts.items() if n and name != "pairs"]
    if not pairs:
        raise UserError(f"--row {settings.row} of {path} is no usable pair: {', '.join(notes)}. Take another row.")
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return pairs[0], ", ".join([f"row {settings.row} of {len(records):,} in {here}", *notes])


@torch.no_grad()
def every_token_logp(model, pair, device):
    """The log-probability of each token given everything before it -> {"prompt", "chosen", "rejected"}: lists, nats.

    The first token of the prompt, the eot, has none (None): the model starts from it.
    """
    logps = {}
    for side, rows in dataset.preference_batch([pair], device)._asdict().items():
        every = train_dpo.token_logps(model(rows.ids), rows.targets)[0]
        logps[side] = every[rows.mask[0]].tolist()
        logps["prompt"] = [None, *every[~rows.mask[0]].tolist()]  # the same on both sides, up to rounding
    return logps


def loss_figures(policy, reference, variant):
    """What `dpo_loss` with the keywords `variant` computes from the sums of (chosen, rejected) -> dict of floats.

    policy and reference (2,), in nats. The derivative of the loss by log pi(y_w|x) is -beta weight, that by
    log pi(y_l|x) is +beta weight. For the plain loss, weight is sigmoid(r_l - r_w) (A.4).
    """
    policy = policy.detach().requires_grad_()
    losses, *rewards = train_dpo.dpo_loss(*policy[:, None], *reference[:, None], **variant)
    losses.sum().backward()
    figures = {}
    for i, side in enumerate(("chosen", "rejected")):
        figures[f"{side}_logp"] = policy[i].item()
        figures[f"{side}_reference_logp"] = reference[i].item()
        figures[f"{side}_reward"] = rewards[i].item()
    figures["margin"] = figures["chosen_reward"] - figures["rejected_reward"]
    return {**figures, "loss": losses.item(), "weight": -policy.grad[0].item() / variant["beta"]}


def anatomy(policy, reference, pair, train):
    """Makes one step on `pair` with a copy of the policy -> {"tokens", "before", "after", "grad_norm"}.

    tokens: {"prompt", "chosen", "rejected"}, each a list of {"id", "scored", "log_pi", "log_ref", "log_pi_after"}.
    before, after: `loss_figures`. grad_norm: of all weights, before clipping. Sets the dropout of both models to 0 and
    changes nothing else in them.
    """
    stepped = copy.deepcopy(policy)
    for model in (policy, reference, stepped):
        model.set_dropout(0.0)

    def sums(model):
        with torch.no_grad():
            return torch.cat(train_dpo.logps_of(model, [pair], [0], train))  # (2,): chosen, rejected

    fixed = sums(reference)
    before = loss_figures(sums(policy), fixed, train.variant)
    optimizer = make_optimizer(stepped, train.optimizer, train.lr)
    metrics = train_dpo.train_step(stepped, optimizer, [pair], fixed[None], [0], train)

    logps = [every_token_logp(model, pair, train.device) for model in (policy, reference, stepped)]
    tokens = {}
    for part, ids in zip(("prompt", "chosen", "rejected"), pair, strict=True):
        rows = zip(ids, *(of_model[part] for of_model in logps), strict=True)
        names = ("id", "log_pi", "log_ref", "log_pi_after")
        tokens[part] = [{"scored": part != "prompt", **dict(zip(names, row, strict=True))} for row in rows]
    after = loss_figures(sums(stepped), fixed, train.variant)
    return {"tokens": tokens, "before": before, "after": after, "grad_norm": metrics["grad_norm"]}


# ---- 2. The words ----


def number(value, signed=False):
    """ "-1.234"; with `signed`, a positive number has its sign too. None, of a token without a number, is a dash."""
    if value is None:
        return "-"
    value = round(value, 3) + 0.0  # never "-0.000"
    return format(value, f"{'+' if signed and value else ''}.{3 if abs(value) < 1000 else 2}f")


def figure(value):
    """As `number`, but a value that is small and not 0 shows its size: "1.2e-05"."""
    return format(value, ".1e") if 0 < abs(value) < 0.0005 else number(value)


def visible(token):
    """The bytes of a token -> text in which every character shows; an accent without its letter stands on a circle."""
    text = token.decode("utf-8", "backslashreplace")  # BPE works on bytes: a token may be part of a character
    shown = ""
    for char in text:
        unseen = not char.isprintable() or "VARIATION SELECTOR" in unicodedata.name(char, "")
        shown += "␣" if char == " " else char.encode("unicode_escape").decode() if unseen else char
    return "◌" + shown if unicodedata.category(shown[0]).startswith("M") else shown


LOSSES = ("sigmoid", "ipo")  # the values of loss_type, and all keywords of the loss, that `formulas` knows
KEYWORDS = {"beta", "label_smoothing", "loss_type", "reference_free"}


def formulas(figures, train):
    """The loss, from the rewards to the gradient: [(name, formula, the same with its numbers filled in, value)]."""
    n = {name: figure(value) for name, value in figures.items()}
    beta, e, m = f"{train.beta:g}", f"{train.label_smoothing:g}", n["margin"]
    found = []
    for side, y, r in (("chosen", "y_w", "r_w"), ("rejected", "y_l", "r_l")):
        formula = f"{r} = beta (log pi({y}|x) - log pi_ref({y}|x))"
        filled = f"{beta} x ({n[f'{side}_logp']} - {n[f'{side}_reference_logp']})"
        if train.reference_free:
            formula, filled = f"{r} = beta log pi({y}|x)", f"{beta} x {n[f'{side}_logp']}"
        found.append((f"{side} reward", formula, filled, figures[f"{side}_reward"]))
    found.append(("margin", "m = r_w - r_l", f"{n['chosen_reward']} - {n['rejected_reward']}", figures["margin"]))
    if train.loss_type == "ipo":
        loss = "L = (m / beta - 1 / (2 beta))^2", f"({m} / {beta} - 1 / (2 x {beta}))^2"
        weight = "w = -2 (m / beta - 1 / (2 beta)) / beta", f"-2 x ({m} / {beta} - 1 / (2 x {beta})) / {beta}"
    elif train.label_smoothing:
        filled = f"-{1 - train.label_smoothing:g} log sigmoid({m}) - {e} log sigmoid({figure(-figures['margin'])})"
        loss = "L = -(1 - e) log sigmoid(m) - e log sigmoid(-m)", filled
        weight = "w = sigmoid(-m) - e", f"sigmoid(-({m})) - {e}"
    else:
        loss = "L = -log sigmoid(m)", f"-log sigmoid({m})"
        weight = "w = sigmoid(r_l - r_w)", f"sigmoid({n['rejected_reward']} - {n['chosen_reward']})"
    found += [("loss", *loss, figures["loss"]), ("gradient weight", *weight, figures["weight"])]
    pull = "dL/dlog pi = -beta w, rejected: +beta w"
    return [*found, ("pull on a token", pull, f"-{beta} x {n['weight']}", -train.beta * figures["weight"])]


# ---- 3. The tables: 80 columns wide ----

BOLD, DIM, RED, GREEN = "1", "2", "31", "32"  # escape codes; these two colours can be read on light and on dark
ESCAPE = re.compile(r"\x1b\[[\d;]*m")
TITLES = {"prompt": "PROMPT x, not scored", "chosen": "CHOSEN y_w", "rejected": "REJECTED y_l"}
HEADS = "".join(f"{head:>9}" for head in ("log pi", "log ref", "diff", "log pi", "diff", "change"))


def paint(text, *styles):
    return f"\x1b[{';'.join(styles)}m{text}\x1b[0m" if styles else text


def columns(text):
    """How many columns of a terminal `text` takes: a wide character takes two, an accent on the one before it none."""
    kinds = [(unicodedata.category(c), unicodedata.east_asian_width(c)) for c in text]
    return sum(0 if category in ("Mn", "Me") else 2 if width in "WF" else 1 for category, width in kinds)


def fit(text, width):
    """`text` in exactly `width` columns, cut with an ellipsis if it is longer."""
    if columns(text) > width:
        while columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns(text))


def table_line(text, mask, log_pi, log_ref, log_pi_after, *style):
    """One line of a table: the token in 17 columns, the mask in 5, and three numbers of 9 on either side of a bar."""
    values = [None] * 6
    if log_pi is not None:
        values = [log_pi, log_ref, log_pi - log_ref, log_pi_after, log_pi_after - log_ref, log_pi_after - log_pi]
    line = paint(f"{fit(text, 17)}{mask:>5}", *style)
    for i, value in enumerate(values):
        line += paint(" |", DIM) if i == 3 else ""
        signed, sign = i in (2, 4, 5), ()
        if signed and DIM not in style:  # colour on dim is hard to read
            sign = (GREEN if round(value, 3) > 0 else RED if round(value, 3) < 0 else DIM,)
        line += paint(f"{number(value, signed):>9}", *sign, *style)
    return line


def terminal(found, settings, train, source, tokenizer, colour):
    """All that is shown of `anatomy`, as printable lines, with escape codes if `colour`."""
    before, after, norm = found["before"], found["after"], found["grad_norm"]
    clipped = f", cut to {train.grad_clip:g}" if 0 < train.grad_clip < norm else ""
    smoothing = f", label smoothing {train.label_smoothing:g}" if train.label_smoothing else ""
    lines = [
        f"policy     {settings.policy}",
        f"reference  {settings.reference}{' (counted as 0 in the loss)' if train.reference_free else ''}",
        f"pair       {source}",
        f"loss       {train.loss_type}{smoothing}, beta {train.beta:g}",
        f"step       {train.optimizer}, learning rate {train.lr:g}; gradient norm {norm:.3g}{clipped}",
    ]
    for part, tokens in found["tokens"].items():
        lines += ["", paint(f"{fit(TITLES[part], 22)}{'before the step':>27} |{'after it':>27}", BOLD)]
        lines.append(paint(f"{'token':18}mask{HEADS[:27]} |{HEADS[27:]}", DIM))
        for t in tokens:
            text = "∎" if t["id"] == tokenizer.eot else visible(tokenizer.tokens[t["id"]])
            mask, style = ("x", ()) if t["scored"] else (".", (DIM,))
            lines.append(table_line(text, mask, t["log_pi"], t["log_ref"], t["log_pi_after"], *style))
        if part != "prompt":
            sums = before[f"{part}_logp"], before[f"{part}_reference_logp"], after[f"{part}_logp"]
            lines.append(table_line(f"sum of {len(tokens)}", "", *sums, BOLD))
    lines += ["", paint("WHAT THE LOSS MAKES OF THE SUMS", BOLD)]
    both = zip(formulas(before, train), formulas(after, train), strict=True)
    for (name, formula, filled, value), (_, _, filled_after, value_after) in both:
        lines.append(paint(f"{name:17}", BOLD) + formula)
        lines.append(f"  before  {filled:57} = " + paint(f"{figure(value):>9}", BOLD))
        lines.append(f"  after   {filled_after:57} = " + paint(f"{figure(value_after):>9}", BOLD))
    return lines if colour else [ESCAPE.sub("", line) for line in lines]


def main():
    settings = parse_settings(Settings, __doc__)
    sys.stdout.reconfigure(errors="backslashreplace")  # for an output that is not UTF-8
    train = training_settings(settings)
    (policy, reference), tokenizer = common.load_models(settings.policy, settings.reference, device=train.device)
    limits = [policy.config.block_size, reference.config.block_size, *([train.max_length] if train.max_length else [])]
    pair, source = read_pair(settings, train, tokenizer, min(limits))
    found = anatomy(policy, reference, pair, train)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print("\n".join(terminal(found, settings, train, source, tokenizer, colour)))


if __name__ == "__main__":
    run_main(main)
