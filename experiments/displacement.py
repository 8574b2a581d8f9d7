"""Why do my chosen rewards go down? Likelihood displacement, on a language small enough to count every response.

    python -m experiments.displacement --out runs/displacement

Five words and the end-of-text make a language of 1,365 responses, so nothing is estimated by samples: at every step the
probability of the chosen, of the rejected, and of all responses in neither column is a sum. Three questions, one
function each, in this order; docs/displacement.md tells what came out.

    displaced   DPO as train_dpo.py has it, from three starts: what becomes of log pi(chosen) while the margin grows?
    at_optimum  the best policy of Eq. 4, exactly: are its chosen rewards above 0?
    by_length   log-probabilities summed over the response, and (a mistake) averaged: which lengths gain?
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minidpo import dataset
from minidpo.files import atomic, atomic_write
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.settings import knob, parse_settings, run_main
from train_dpo import dpo_loss, response_logps, token_logps


@dataclasses.dataclass
class Settings:
    out: str = knob(dataclasses.MISSING, "folder for displacement.json and the pictures")
    seeds: int = knob(3, "repeat everything with so many seeds (weights, pairs, rewards)", least=1)
    pairs: int = knob(24, "pairs to train on, all of them at every step", least=1)
    sft_steps: int = knob(200, "steps of SFT, where there is SFT", least=1)
    steps: int = knob(300, "steps of DPO", least=1)
    lr: float = knob(1e-3, "learning rate of DPO (a tenth where lengths are compared); SFT has 3e-3")
    beta: float = knob(0.1, "of DPO where the chosen fall")
    margin: float = knob(1.0, "compare the runs at the first step with this margin")
    length_beta: float = knob(1.0, "of DPO and of the exact optima where lengths are compared", least=1e-3)
    overwrite: bool = knob(False, "replace an earlier result in --out")


# ---- 1. The language: every response and its probability ----

EOT, WORDS, LONGEST = 0, (1, 2, 3, 4), 5
NAMES = (".", "good", "bad", "film", "cast")  # for people to read; the model sees five numbers
RESPONSES = [(*y, EOT) for n in range(LONGEST) for y in itertools.product(WORDS, repeat=n)]
RESPONSES += list(itertools.product(WORDS, repeat=LONGEST))  # cut off at the limit, as sampling would
INDEX = {y: i for i, y in enumerate(RESPONSES)}
LENGTHS = torch.tensor([len(y) for y in RESPONSES], dtype=torch.float64)  # in tokens, the eot included
EVERY = dataset.sft_batch([([EOT], list(y)) for y in RESPONSES])  # the prompt is empty: the document's first eot


@torch.no_grad()
def every_logp(model):
    """log pi(y) of every response -> (1365,). Their exponentials sum to 1."""
    if isinstance(model, Free):
        return model.logits.log_softmax(-1)
    return token_logps(model(EVERY.ids), EVERY.targets).masked_fill(~EVERY.mask, 0.0).sum(-1)


def tiny_gpt(seed):
    """Fresh weights: every word and the end are about equally likely, everywhere."""
    config = GPTConfig(vocab_size=len(NAMES), block_size=1 + LONGEST, n_layer=2, n_head=2, n_embd=16)
    return GPT(config, torch.Generator().manual_seed(seed)).double()


class Free(nn.Module):
    """Not a language model but a control: a logit for each whole response, so that no two share a word or a weight."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(RESPONSES), dtype=torch.float64))


def twin_pairs(n, seed):
    """n pairs (chosen, rejected) of 2 to 4 words that differ in one word, which of them is better being chance.

    No response is in two pairs. So each side is as ordinary as the other, and they share all but one word.
    """
    draw = torch.Generator().manual_seed(seed)

    def pick(choices):
        return choices[torch.randint(len(choices), (1,), generator=draw).item()]

    pairs, used = [], set()
    while len(pairs) < n:
        chosen = [pick(WORDS) for _ in range(pick((2, 3, 4)))]
        rejected, at = list(chosen), pick(range(len(chosen)))
        rejected[at] = pick([word for word in WORDS if word != chosen[at]])
        pair = (*chosen, EOT), (*rejected, EOT)
        if used.isdisjoint(pair):
            pairs.append(pair)
            used.update(pair)
    return pairs


def length_pairs(seed):
    """32 pairs, two of each combination of 1 to 4 words: chosen starts with "good", rejected with "bad".

    The words after the first are chance. So which side is better has nothing to do with which one is longer.
    """
    draw = torch.Generator().manual_seed(seed)
    return [
        tuple((first, *(1 + torch.randint(4, (n - 1,), generator=draw)).tolist(), EOT) for first, n in ((1, a), (2, b)))
        for a, b in list(itertools.product((1, 2, 3, 4), repeat=2)) * 2
    ]


# ---- 2. The two stages ----


def as_batch(pairs):
    return dataset.preference_batch([([EOT], list(chosen), list(rejected)) for chosen, rejected in pairs])


def sft(model, rows, steps):
    """Maximum likelihood of the responses `rows`, all at every step."""
    batch = dataset.sft_batch([([EOT], list(row)) for row in rows])
    optimizer = make_optimizer(model, "adamw", 3e-3)
    for _ in range(steps):
        loss = -token_logps(model(batch.ids), batch.targets)[batch.mask].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def pair_logps(model, pairs):
    """log pi of both responses of each pair -> (chosen (B,), rejected (B,)): as train_dpo.py has it."""
    if isinstance(model, Free):
        logps = model.logits.log_softmax(-1)
        return tuple(logps[[INDEX[pair[side]] for pair in pairs]] for side in (0, 1))
    return response_logps(model, as_batch(pairs))


def dpo(model, pairs, beta, lr, steps, mean=False, until=math.inf):
    """DPO with the model as it comes as reference -> what was measured before each step and at the end.

    A list of dicts. It ends after `steps` steps or at the margin `until`. Margin and logps are averages over the pairs,
    mass is the probability of all the different responses in a column, added up, and of all in neither. With `mean`
    log-probabilities are divided by the response's length: THE MISTAKE, here to be looked at. (The logps reported
    remain sums.)
    """
    different = [list({pair[side]: i for i, pair in enumerate(pairs)}.values()) for side in (0, 1)]  # one place of each
    lengths = [torch.tensor([len(pair[side]) if mean else 1 for pair in pairs]) for side in (0, 1)]
    optimizer = make_optimizer(model, "adamw", lr)
    curve, reference = [], None
    for step in range(steps + 1):
        logps = pair_logps(model, pairs)
        scores = [side / length for side, length in zip(logps, lengths, strict=True)]
        reference = reference or [side.detach() for side in scores]
        losses, chosen, rejected = dpo_loss(*scores, *reference, beta)
        masses = [side[places].exp().sum().item() for side, places in zip(logps, different, strict=True)]
        curve.append(
            {
                "step": step,
                "loss": losses.mean().item(),
                "margin": (chosen - rejected).mean().item(),
                "logps/chosen": logps[0].mean().item(),
                "logps/rejected": logps[1].mean().item(),
                "mass/chosen": masses[0],
                "mass/rejected": masses[1],
                "mass/neither": 1 - sum(masses),
                "fallen": (chosen < 0).double().mean().item(),  # share of the pairs
            }
        )
        if step == steps or curve[-1]["margin"] >= until:
            return curve
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()


# ---- 3. The three questions ----

STARTS = ("fresh GPT", "GPT after SFT", "GPT after SFT, one pair", "free control")


def displaced(start, seed, settings):
    """DPO on pairs that differ in one word, from one of STARTS -> the curve, and which responses gained most.

    The fresh GPT gives the pairs as little probability as other responses; the one after SFT was trained on the chosen
    ones first, as the paper does. "compared" is the first point of the curve with the margin asked for, or the last.
    """
    pairs = twin_pairs(1 if "one pair" in start else settings.pairs, seed)
    model = Free() if start == "free control" else tiny_gpt(seed)
    if "SFT" in start:
        sft(model, [chosen for chosen, _ in pairs], settings.sft_steps)
    before = every_logp(model).exp()
    # Adam moves a weight by about lr a step: many of them make a logit of the GPT, a single one is the control's
    curve = dpo(model, pairs, settings.beta, settings.lr * (25 if start == "free control" else 1), settings.steps)
    after = every_logp(model).exp()
    column = {response: name for pair in pairs for response, name in zip(pair, ("chosen", "rejected"), strict=True)}
    gained = [
        {
            "response": " ".join(NAMES[word] for word in RESPONSES[i]),
            "column": column.get(RESPONSES[i], "neither"),
            "before": before[i].item(),
            "after": after[i].item(),
        }
        for i in (after - before).topk(2).indices.tolist()
    ]
    compared = next((point for point in curve if point["margin"] >= settings.margin), curve[-1])
    return {"start": start, "seed": seed, "curve": curve, "compared": compared, "gained": gained}


def optimum(reference, reward, beta):
    """Eq. 4: log pi* (Y,) for log pi_ref (Y,) and reward (Y,)."""
    return (reference + reward / beta).log_softmax(-1)


def at_optimum(seed, settings):
    """What a perfect DPO run would log, summed over every pair of responses -> a dict for each of some betas.

    Both responses of a pair come from the reference, an SFT model; the choices follow Bradley-Terry (Eq. 1) with a
    reward drawn from N(0, 1) for each response; the policy is pi* itself. Averages over both columns are averages over
    the reference, and the average of log pi*/pi_ref over the reference is -KL(pi_ref || pi*): never positive.
    """
    model = sft(tiny_gpt(seed), [chosen for chosen, _ in twin_pairs(settings.pairs, seed)], settings.sft_steps)
    reference = every_logp(model)
    reward = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = reference.exp()
    wins = 2 * p * (torch.sigmoid(reward[:, None] - reward) @ p)  # (Y,): how likely y is to be the chosen one
    rows = []
    for beta in (0.1, 0.3, 1.0, 3.0):
        best = optimum(reference, reward, beta)
        implicit = beta * (best - reference)
        chosen, rejected = (wins * implicit).sum().item(), ((2 * p - wins) * implicit).sum().item()
        rows.append(
            {
                "beta": beta,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "beta KL(ref, pi*)": beta * (p * (reference - best)).sum().item(),
                "reward gained": ((best.exp() - p) * reward).sum().item(),
            }
        )
    return rows


def mean_optimum(reference, reward, lengths, beta):
    """What averaged log-probabilities have in place of Eq. 4: pi_ref(y) exp(|y| (reward(y) - c) / beta), as logs.

    The loss is lowest where beta/|y| log pi/pi_ref is the reward up to a constant: each response has a beta of its own,
    beta/|y|. The constant c is what makes the sum 1: no factor Z can, since it would not cancel.
    """
    lowest, highest = reward.min(), reward.max()  # all the exponents are above 0, or all below
    for _ in range(100):  # halves the interval down to the last bit
        c = (lowest + highest) / 2
        logps = reference + lengths * (reward - c) / beta
        lowest, highest = (c, highest) if logps.logsumexp(-1) > 0 else (lowest, c)
    return logps


def by_length(seed, settings):
    """What the sum and the mean do to the lengths, where labels know nothing of them -> a dict for each policy.

    Exact: the optima for a reward of 1, -1 or 0, as the first word is "good", "bad" or another; the reference is the
    fresh model, in which the first word says nothing about the length, without the empty response.
    Trained: DPO on `length_pairs` from a model after SFT on both columns, so that it can write every length.
    """
    beta = settings.length_beta
    scaled = 3.5 * beta  # the pairs' responses have 2, 3, 4 or 5 tokens: 3.5 on average
    rows = []

    def add(kind, name, logps, reference, lengths, good):
        p = logps.exp()
        shares = [p[lengths == n].sum().item() for n in range(1, LONGEST + 1)]
        kl = (p * (logps - reference)).sum().item()
        rows.append(
            {"kind": kind, "policy": name, "length": (p * lengths).sum().item(), "good": p[good].sum().item(), "kl": kl}
            | {"shares": shares}
        )

    first = torch.tensor([y[0] for y in RESPONSES])
    words = first != EOT
    reference, lengths, good = every_logp(tiny_gpt(seed))[words].log_softmax(-1), LENGTHS[words], first[words] == 1
    reward = good.double() - (first[words] == 2).double()
    add("exact", "reference", reference, reference, lengths, good)
    add("exact", "sum", optimum(reference, reward, beta), reference, lengths, good)
    add("exact", "mean", mean_optimum(reference, reward, lengths, beta), reference, lengths, good)
    add("exact", "mean, beta x 3.5", mean_optimum(reference, reward, lengths, scaled), reference, lengths, good)

    pairs = length_pairs(seed)
    chosen = as_batch(pairs).chosen.mask.sum(-1)

    def start():
        return sft(tiny_gpt(seed), [response for pair in pairs for response in pair], settings.sft_steps)

    reference = every_logp(start())
    add("trained", "reference", reference, reference, LENGTHS, first == 1)
    for name, its_beta, mean in (("sum", beta, False), ("mean", beta, True), ("mean, beta x 3.5", scaled, True)):
        model = start()
        curve = dpo(model, pairs, its_beta, settings.lr / 10, settings.steps, mean, until=settings.margin)
        logps = every_logp(model)
        add("trained", name, logps, reference, LENGTHS, first == 1)
        ratios = (logps - reference)[[INDEX[w] for w, _ in pairs]]
        rows[-1]["log-ratios of the chosen"] = [ratios[chosen == n].mean().item() for n in range(2, LONGEST + 1)]
        rows[-1] |= {"margin": curve[-1]["margin"], "step": curve[-1]["step"]}
    return rows


# ---- 4. Tables, pictures, the command ----

POLICIES = ("reference", "sum", "mean", "mean, beta x 3.5")
GROUPS = {"chosen": "C0", "rejected": "C3", "neither": "0.75"}  # name: colour


def spread(values, digits=2):
    """Mean (lowest to highest), as text."""
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), sum(values) / len(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(head, rows):
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join(lines) + "\n"


def tables(result):
    """The result as Markdown: mean (lowest to highest) over the seeds."""
    text = ["**The chosen fall.** log pi: nats a response, averaged over the pairs; then probability in all.\n"]
    keys = ("margin", "logps/chosen", "logps/rejected", "mass/chosen", "mass/rejected", "mass/neither", "fallen")
    rows = []
    for start in STARTS:
        runs = [r for r in result["displaced"] if r["start"] == start]
        for when, points in (("before", [r["curve"][0] for r in runs]), ("after", [r["compared"] for r in runs])):
            rows.append([f"{start}, {when}", *(spread([point[key] for point in points]) for key in keys)])
    head = ["", "margin", "log pi(chosen)", "log pi(rejected)", *GROUPS, "share of chosen that fell"]
    text += [table(head, rows), "**The two responses that gained most**, probability before and at the last step.\n"]
    rows = []
    for r in result["displaced"]:
        gained = [f"`{g['response']}` ({g['column']}) {g['before']:.3f} to {g['after']:.3f}" for g in r["gained"]]
        rows.append([f"{r['start']}, seed {r['seed']}", *gained])
    text += [table(["", "first", "second"], rows), "**At the optimum of Eq. 4**, nothing trained.\n"]

    per_seed = result["at_optimum"]
    keys = list(per_seed[0][0])
    rows = [[spread([row[key] for row in same], 2 if key != "beta" else 1) for key in keys] for same in zip(*per_seed)]  # noqa: B905
    text += [table(keys, rows), "**Lengths.** log-ratio: log pi/pi_ref of the chosen of 2, 3, 4 and 5 tokens.\n"]

    rows = []
    for kind, name in itertools.product(("exact", "trained"), POLICIES):
        same = [row for rows_ in result["by_length"] for row in rows_ if (row["kind"], row["policy"]) == (kind, name)]
        ratios = zip(*(row.get("log-ratios of the chosen", ()) for row in same), strict=True)
        ratios = ", ".join(f"{sum(values) / len(values):.2f}" for values in ratios)
        rows.append(
            [f"{kind}: {name}", *(spread([row[key] for row in same]) for key in ("length", "good", "kl")), ratios]
        )
    text.append(table(["", "expected length", '"good" first', "KL(pi, ref)", "log-ratio"], rows))
    return "\n".join(text)


def draw(folder, result):
    """displacement.png and displacement_more.png. Needs the extra `plot`; without it says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no pictures: matplotlib is not installed (pip install "minidpo[plot]")')
        return
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(3, len(STARTS), sharex=True, sharey="row")
    for column, start in zip(axes.T, STARTS, strict=True):
        column[0].set_title(start)
        for i, curve in enumerate(r["curve"] for r in result["displaced"] if r["start"] == start):
            steps = [point["step"] for point in curve]
            style = dict(linewidth=1.8 if i == 0 else 1, alpha=1 if i == 0 else 0.4)
            column[0].plot(steps, [point["margin"] for point in curve], color="black", **style)
            for name in ("chosen", "rejected"):
                label = name if i == 0 else None
                logps = [point[f"logps/{name}"] for point in curve]
                column[1].plot(steps, logps, color=GROUPS[name], label=label, **style)
            if i == 0:
                masses = [[point[f"mass/{name}"] for point in curve] for name in GROUPS]
                column[2].stackplot(steps, masses, labels=list(GROUPS), colors=list(GROUPS.values()))
        column[2].set(xlabel="steps of DPO", ylim=(0, 1))
    for row, label in zip(axes, ("margin", "log pi, nats", "probability, seed 0"), strict=True):
        row[0].set_ylabel(label)
        for cell in row:
            cell.grid(alpha=0.25)
    axes[1, 0].legend(frameon=False)
    axes[2, 0].legend(loc="upper right", fontsize=9)
    save(figure, folder / "displacement.png")

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    per_seed = result["at_optimum"]
    betas = [row["beta"] for row in per_seed[0]]
    for name in ("chosen", "rejected"):
        for rows in per_seed:
            label = name if rows is per_seed[0] else None
            left.plot(betas, [row[f"rewards/{name}"] for row in rows], "o-", color=GROUPS[name], label=label, ms=3)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xscale="log", xlabel="beta", ylabel="implicit reward", title="at the optimum of Eq. 4")
    for i, name in enumerate(POLICIES):
        for kind, cell in (("exact", middle), ("trained", right)):
            same = [row for rows in result["by_length"] for row in rows if (row["kind"], row["policy"]) == (kind, name)]
            for row in same:
                label = name if row is same[0] else None
                x, y = range(1, LONGEST + 1), row["shares"]
                if kind == "trained":
                    x, y = range(2, LONGEST + 1), row.get("log-ratios of the chosen", [0] * (LONGEST - 1))
                cell.plot(x, y, "o-", color="black" if i == 0 else f"C{i - 1}", label=label, ms=3, linewidth=1)
    middle.set(xlabel="length, tokens", ylabel="probability", title="exact optima: all responses")
    right.set(xlabel="length, tokens", ylabel="log pi / pi_ref, nats", title="trained: the chosen responses")
    for cell in (left, middle, right):
        cell.grid(alpha=0.25)
    for cell in (left, middle):  # the right one has the colours of the middle one
        cell.legend(frameon=False, fontsize=8)
    save(figure, folder / "displacement_more.png")


def save(figure, path):
    with atomic(path) as file:
        figure.savefig(file, dpi=90, format="png")


def main():
    settings = parse_settings(Settings, __doc__)
    torch.set_num_threads(1)  # tensors this small gain nothing from a second, which would round differently
    out = Path(settings.out)
    path = dataset.new_file(out / "displacement.json", settings.overwrite)
    seeds = range(settings.seeds)
    work = [(displaced, start, seed) for start in STARTS for seed in seeds]
    work += [(question, seed) for question in (at_optimum, by_length) for seed in seeds]
    result = {"settings": dataclasses.asdict(settings)} | {f.__name__: [] for f in (displaced, at_optimum, by_length)}
    for question, *arguments in tqdm(work, desc="displacement", unit="run"):
        result[question.__name__].append(question(*arguments, settings))
    atomic_write(path, json.dumps(result) + "\n")
    print(tables(result))
    draw(out, result)
    print(f"everything measured: {path}")


if __name__ == "__main__":
    run_main(main)
