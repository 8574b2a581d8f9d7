"""Why do my chosen rewards go down? Likelihood displacement, in a language small enough to count every response.

    python -m experiments.displacement --out runs/displacement

Four words and the end-of-text token make 1,365 responses of up to five tokens, so every probability is an exact sum.
Three questions, one function each: `displaced`, `at_optimum`, `by_length`. docs/displacement.md discusses the answers.
"""

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from experiments import common
from minidpo import dataset
from minidpo.files.writing import atomic_write, new_file
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.settings import knob, parse_settings, run_main
from train_dpo import dpo_loss, response_logps, token_logps


@dataclasses.dataclass
class Settings:
    out: str = knob(dataclasses.MISSING, "folder for displacement.json and the picture")
    seeds: int = knob(3, "repeat everything with this many seeds (weights, pairs, rewards)", least=1)
    steps: int = knob(300, "steps of DPO", least=1)
    lr: float = knob(1e-3, "learning rate of DPO; a tenth of it where lengths are compared")
    margin: float = knob(1.0, "compare the runs at the first step with this margin")
    overwrite: bool = knob(False, "replace an earlier result in --out")


PAIRS, SFT_STEPS, SFT_LR = 24, 200, 3e-3
BETA, LENGTH_BETA = 0.1, 1.0  # of the first question, and where lengths are compared

# ---- 1. The language: every response and its probability ----

EOT, WORDS, LONGEST = 0, (1, 2, 3, 4), 5
NAMES = (".", "good", "bad", "film", "cast")  # for people to read; the model sees five numbers
RESPONSES = [(*y, EOT) for n in range(LONGEST) for y in itertools.product(WORDS, repeat=n)]
RESPONSES += list(itertools.product(WORDS, repeat=LONGEST))  # cut at the limit, as sampling does
INDEX = {y: i for i, y in enumerate(RESPONSES)}
LENGTHS = torch.tensor([len(y) for y in RESPONSES], dtype=torch.float64)  # in tokens, the eot included
FIRST = torch.tensor([y[0] for y in RESPONSES])  # the first token of each response
EVERY = dataset.sft_batch([([EOT], list(y)) for y in RESPONSES])  # the prompt is empty: only the eot before it


class Free(nn.Module):
    """The control, no language model: one logit for each whole response, so that no two share a word or a weight."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(RESPONSES), dtype=torch.float64))


def tiny_gpt(seed):
    """A GPT with fresh weights: every word and the end are about equally likely, everywhere."""
    config = GPTConfig(vocab_size=len(NAMES), block_size=1 + LONGEST, n_layer=2, n_head=2, n_embd=16)
    return GPT(config, torch.Generator().manual_seed(seed)).double()


@torch.no_grad()
def every_logp(model):
    """log pi(y) of every response -> (1365,), in nats. Their exponentials sum to 1."""
    if isinstance(model, Free):
        return model.logits.log_softmax(-1)
    return token_logps(model(EVERY.ids), EVERY.targets).masked_fill(~EVERY.mask, 0.0).sum(-1)


def pair_logps(model, pairs):
    """log pi of both responses of each pair -> (chosen (B,), rejected (B,)), by `train_dpo.response_logps`."""
    if isinstance(model, Free):
        logps = model.logits.log_softmax(-1)
        return tuple(logps[[INDEX[response] for response in side]] for side in zip(*pairs, strict=True))
    return response_logps(model, dataset.preference_batch([([EOT], *map(list, pair)) for pair in pairs]))


def twin_pairs(n, seed):
    """n pairs (chosen, rejected) of 2 to 4 random words that differ in one word. No response is in two pairs."""
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
    """32 pairs, two of each combination of 1 to 4 words: chosen starts with "good", rejected with "bad"."""
    draw = torch.Generator().manual_seed(seed)

    def response(first, words):
        return (first, *(1 + torch.randint(4, (words - 1,), generator=draw)).tolist(), EOT)

    return [(response(1, a), response(2, b)) for a, b in [*itertools.product((1, 2, 3, 4), repeat=2)] * 2]


# ---- 2. The two stages ----


def sft(model, responses):
    """Trains the model on the responses, all of them at every step, and returns it."""
    batch = dataset.sft_batch([([EOT], list(y)) for y in responses])
    optimizer = make_optimizer(model, "adamw", SFT_LR)
    for _ in range(SFT_STEPS):
        loss = -token_logps(model(batch.ids), batch.targets)[batch.mask].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def dpo(model, pairs, beta, lr, steps, mean=False, until=math.inf):
    """Trains the model by DPO, with itself as the reference -> list of dicts, one before each step and one at the end.

    Stops after `steps` steps, or at the margin `until`. A mass is the probability of all different responses on that
    side together; "fallen" is the share of the pairs whose chosen reward is below 0; the rest are means over the pairs.
    With `mean`, the loss (but not the reported logps) divides log-probabilities by the length: THE MISTAKE to look at.
    """
    sides = list(zip(*pairs, strict=True))
    different = [list({y: i for i, y in enumerate(side)}.values()) for side in sides]  # one place of each response
    lengths = [torch.tensor([len(y) if mean else 1 for y in side]) for side in sides]
    optimizer = make_optimizer(model, "adamw", lr)
    curve, reference = [], None
    for step in range(steps + 1):
        logps = pair_logps(model, pairs)
        scores = [side / length for side, length in zip(logps, lengths, strict=True)]
        reference = reference or [side.detach() for side in scores]
        losses, chosen, rejected = dpo_loss(*scores, *reference, beta)
        masses = [side[places].exp().sum().item() for side, places in zip(logps, different, strict=True)]
        curve.append({
            "step": step, "loss": losses.mean().item(), "margin": (chosen - rejected).mean().item(),
            "logps/chosen": logps[0].mean().item(), "logps/rejected": logps[1].mean().item(),
            "mass/chosen": masses[0], "mass/rejected": masses[1], "mass/neither": 1 - sum(masses),
            "fallen": (chosen < 0).double().mean().item(),
        })  # fmt: skip
        if step == steps or curve[-1]["margin"] >= until:
            return curve
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()


# ---- 3. The three questions ----

STARTS = ("fresh GPT", "GPT after SFT", "GPT after SFT, one pair", "free control")


def displaced(start, seed, settings):
    """DPO on pairs that differ in one word, from one of STARTS -> the curve, and the two responses that gained most.

    "compared" is the first point of the curve with the margin asked for, or the last.
    """
    pairs = twin_pairs(1 if "one pair" in start else PAIRS, seed)
    model = Free() if start == "free control" else tiny_gpt(seed)
    if "SFT" in start:
        sft(model, [chosen for chosen, _ in pairs])
    before = every_logp(model).exp()
    # Adam moves a weight by about lr per step. In the GPT, many weights make up a logit; in the control it is one.
    curve = dpo(model, pairs, BETA, settings.lr * (25 if start == "free control" else 1), settings.steps)
    after = every_logp(model).exp()
    column = {chosen: "chosen" for chosen, _ in pairs} | {rejected: "rejected" for _, rejected in pairs}
    gained = []
    for i in (after - before).topk(2).indices.tolist():
        name, where = " ".join(NAMES[word] for word in RESPONSES[i]), column.get(RESPONSES[i], "neither")
        gained.append({"response": name, "column": where, "before": before[i].item(), "after": after[i].item()})
    compared = next((point for point in curve if point["margin"] >= settings.margin), curve[-1])
    return {"start": start, "seed": seed, "curve": curve, "compared": compared, "gained": gained}


def optimum(reference, reward, beta):
    """Eq. 4: log pi* (Y,) for log pi_ref (Y,) and reward (Y,)."""
    return (reference + reward / beta).log_softmax(-1)


def at_optimum(seed, _):
    """What a perfect DPO run would log, as means over all pairs of responses -> list of dicts, one per beta.

    The reference is an SFT model. Both responses of a pair come from it, each response has a reward drawn from N(0, 1),
    the choices follow Bradley-Terry (Eq. 1), and the policy is pi* itself.
    """
    reference = every_logp(sft(tiny_gpt(seed), [chosen for chosen, _ in twin_pairs(PAIRS, seed)]))
    reward = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = reference.exp()
    wins = 2 * p * (torch.sigmoid(reward[:, None] - reward) @ p)  # (Y,): how often y is the chosen one
    rows = []
    for beta in (0.1, 0.3, 1.0, 3.0):
        best = optimum(reference, reward, beta)
        implicit = beta * (best - reference)
        chosen, rejected = (wins * implicit).sum().item(), ((2 * p - wins) * implicit).sum().item()
        rows.append({
            "beta": beta,
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "beta KL(ref, pi*)": beta * (p * (reference - best)).sum().item(),
            "reward gained": ((best.exp() - p) * reward).sum().item(),
        })  # fmt: skip
    return rows


def mean_optimum(reference, reward, lengths, beta):
    """The optimum of averaged log-probabilities, in place of Eq. 4: log of pi_ref(y) exp(|y| (reward(y) - c) / beta).

    Each response has a beta of its own, beta/|y|. The constant c makes the probabilities sum to 1.
    """
    lowest, highest = reward.min(), reward.max()  # c is between them: else all exponents would have one sign
    for _ in range(100):  # halve the interval until it is as small as float64 allows
        c = (lowest + highest) / 2
        logps = reference + lengths * (reward - c) / beta
        lowest, highest = (c, highest) if logps.logsumexp(-1) > 0 else (lowest, c)
    return logps


MEANS = {"mean": LENGTH_BETA, "mean, beta x 3.5": 3.5 * LENGTH_BETA}  # 3.5 tokens: the mean length in `length_pairs`


def by_length(seed, settings):
    """What sum and mean do to the lengths, where the labels say nothing about them -> list of dicts, one per policy.

    exact    the optima for a reward of 1, -1 or 0 if the first word is "good", "bad" or another. The reference is the
             fresh model without the empty response: in it the first word says nothing about the length.
    trained  DPO on `length_pairs`, from a model after SFT on both sides, so that it can write every length.
    """
    rows = []

    def add(kind, policy, logps, reference, responses, log_ratios=()):
        p, lengths = logps.exp(), LENGTHS[responses]
        rows.append({
            "kind": kind, "policy": policy, "length": (p * lengths).sum().item(),
            "good": p[FIRST[responses] == 1].sum().item(), "kl": (p * (logps - reference)).sum().item(),
            "shares": [p[lengths == n].sum().item() for n in range(1, LONGEST + 1)], "log-ratios": log_ratios,
        })  # fmt: skip

    words = FIRST != EOT
    reference, lengths = every_logp(tiny_gpt(seed))[words].log_softmax(-1), LENGTHS[words]
    reward = (FIRST[words] == 1).double() - (FIRST[words] == 2).double()
    add("exact", "reference", reference, reference, words)
    add("exact", "sum", optimum(reference, reward, LENGTH_BETA), reference, words)
    for policy, beta in MEANS.items():
        add("exact", policy, mean_optimum(reference, reward, lengths, beta), reference, words)

    pairs, every = length_pairs(seed), slice(None)
    chosen = [INDEX[y] for y, _ in pairs]
    start = sft(tiny_gpt(seed), [response for pair in pairs for response in pair])
    reference = every_logp(start)
    add("trained", "reference", reference, reference, every)
    for policy, beta in {"sum": LENGTH_BETA, **MEANS}.items():
        model = copy.deepcopy(start)
        dpo(model, pairs, beta, settings.lr / 10, settings.steps, policy in MEANS, until=settings.margin)
        logps = every_logp(model)
        ratios = (logps - reference)[chosen]
        per_length = [ratios[LENGTHS[chosen] == n].mean().item() for n in range(2, LONGEST + 1)]
        add("trained", policy, logps, reference, every, per_length)
    return rows


# ---- 4. Tables, pictures, the command ----

GROUPS = {"chosen": "C0", "rejected": "C3", "neither": "0.75"}  # name: colour


def spread(values, digits=2):
    """Mean (lowest to highest), as text."""
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), sum(values) / len(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(title, head, rows):
    lines = (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines), "", ""])


def tables(result):
    """The result as Markdown: mean (lowest to highest) over the seeds."""
    keys = ("margin", "logps/chosen", "logps/rejected", "mass/chosen", "mass/rejected", "mass/neither", "fallen")
    fall, gains = [], []
    for start in STARTS:
        runs = [run for run in result["displaced"] if run["start"] == start]
        for when, points in (("before", [r["curve"][0] for r in runs]), ("after", [r["compared"] for r in runs])):
            fall.append([f"{start}, {when}", *(spread([point[key] for point in points]) for key in keys)])
        for run in runs:
            cells = [f"`{g['response']}` ({g['column']}) {g['before']:.3f} to {g['after']:.3f}" for g in run["gained"]]
            gains.append([f"{start}, seed {run['seed']}", *cells])
    keys = list(result["at_optimum"][0][0])
    per_beta = zip(*result["at_optimum"], strict=True)
    best = [[spread([row[key] for row in seeds], 2 if key != "beta" else 1) for key in keys] for seeds in per_beta]
    lengths = []
    for seeds in zip(*result["by_length"], strict=True):
        shares, ratios = (zip(*(row[key] for row in seeds), strict=True) for key in ("shares", "log-ratios"))
        cells = [spread([row[key] for row in seeds]) for key in ("length", "good", "kl")]
        cells += [", ".join(f"{sum(values) / len(values):.2f}" for values in lists) for lists in (shares, ratios)]
        lengths.append([f"{seeds[0]['kind']}: {seeds[0]['policy']}", *cells])

    columns = ["", "margin", "log pi(chosen)", "log pi(rejected)", *GROUPS, "share of chosen that fell"]
    title = "**The chosen fall.** log pi in nats per response, averaged over the pairs; then probabilities."
    text = table(title, columns, fall)
    title = "**The two responses that gained most**, probability before and at the last step."
    text += table(title, ["", "first", "second"], gains)
    text += table("**At the optimum of Eq. 4**, nothing trained.", keys, best)
    columns = ["", "expected length", '"good" first', "KL(pi, ref)", "lengths 1 to 5", "log-ratio, lengths 2 to 5"]
    return text + table("**Lengths.** Then probabilities, and log pi/pi_ref of the chosen.", columns, lengths)


def draw(path, result):
    """One column per start: the margins, the log-probabilities, and where the probability is."""
    if not (figure := common.figure(path, (12, 7))):
        return
    axes = figure.subplots(3, len(STARTS), sharex=True, sharey="row")
    for column, start in zip(axes.T, STARTS, strict=True):
        column[0].set_title(start)
        for i, curve in enumerate(run["curve"] for run in result["displaced"] if run["start"] == start):
            steps, line = [point["step"] for point in curve], dict(linewidth=1, alpha=0.4) if i else dict(linewidth=1.8)
            column[0].plot(steps, [point["margin"] for point in curve], color="black", **line)
            for name in ("chosen", "rejected"):
                logps = [point[f"logps/{name}"] for point in curve]
                column[1].plot(steps, logps, color=GROUPS[name], label=None if i else name, **line)
            if i == 0:
                masses = [[point[f"mass/{name}"] for point in curve] for name in GROUPS]
                column[2].stackplot(steps, masses, labels=list(GROUPS), colors=list(GROUPS.values()))
        column[2].set(xlabel="steps of DPO", ylim=(0, 1))
    for row, label in zip(axes, ("margin", "log pi, nats", "probability, seed 0"), strict=True):
        row[0].set_ylabel(label)
    axes[1, 0].legend(frameon=False)
    axes[2, 0].legend(loc="upper right", fontsize=9)
    for cell in figure.axes:
        cell.grid(alpha=0.25)
    common.save_figure(path, figure, dpi=90)


def main():
    settings = parse_settings(Settings, __doc__)
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread, and it would round differently
    path = new_file(Path(settings.out) / "displacement.json", settings.overwrite)
    work = [(displaced, start, seed) for start in STARTS for seed in range(settings.seeds)]
    work += [(question, seed) for question in (at_optimum, by_length) for seed in range(settings.seeds)]
    result = {"settings": dataclasses.asdict(settings), "displaced": [], "at_optimum": [], "by_length": []}
    for question, *arguments in tqdm(work, desc="displacement", unit="run"):
        result[question.__name__].append(question(*arguments, settings))
    atomic_write(path, json.dumps(result) + "\n")
    print(tables(result))
    draw(path.with_suffix(".png"), result)
    print(f"everything measured: {path}")


if __name__ == "__main__":
    run_main(main)
