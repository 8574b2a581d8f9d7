"""Win rates over sampling temperatures: runs against the dataset's own completions (as in the paper's Figures 2 and 3).

    python -m experiments.winrate --run runs/toy/sft --run runs/toy/dpo --data toy --judge toy --out runs/toy/winrate

Every run completes the same prompts at every temperature, and a judge (judges.py; --judge may be repeated)
compares each completion with the one that the dataset has for that prompt:

    toy             a sample of the grammar with that opening
    tldr, hh, imdb  the completion in sft_test.jsonl: the human summary, the chosen response, the rest of the review
    FILE.jsonl      its "completion", or else its "chosen"

    win rate = (wins + ties / 2) / (wins + ties + losses)

Which of the two the judge sees first is drawn at random. An answer that could not be read is no comparison and is
counted apart. The intervals are 95 % bootstrap intervals over prompts; at a rate of 0 or 1 the bootstrap sees no
variance, and they have no width. With two judges or more, the command also says how often they agree.

--out receives winrate.csv, winrate.png, agreement.csv and comparisons.jsonl (every pair of texts with its outcomes).
The work itself is kept in samples.jsonl and answers.jsonl as it is done: a command that was stopped goes on where it
was, and one that is repeated samples nothing and asks no chat model. Beside the counts stand the share of completions
that ended by themselves, their mean length in tokens, and how many different ones there are.
"""

import csv
import dataclasses
import io
import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

import data
from experiments.winrate.judges import Journal, load_judge
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, pick_device
from minidpo.files import atomic, atomic_write
from minidpo.sampling import generate
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    run: list = knob(dataclasses.MISSING, "a model to judge: a run folder, a GPT-2 folder or name; may be repeated")
    data: str = knob(dataclasses.MISSING, "toy, imdb, hh, tldr, or a JSONL file with prompt and completion or chosen")
    judge: list = knob(
        dataclasses.MISSING,
        "toy, the file of a trained reward, the run folder of a reward model, implicit:RUN,REFERENCE, "
        "or chat:simple, chat:concise, chat:helpful; "
        "may be repeated",
    )
    out: str = knob(dataclasses.MISSING, "folder for the results")
    temperatures: str = knob("0,0.25,0.5,0.75,1", "sampling temperatures, with commas between them; 0 is greedy")
    limit: int = knob(500, "use the first so many prompts; 0: all")
    max_new_tokens: int = knob(64, "longest completion, in tokens", least=1)
    batch_size: int = knob(128, "completions sampled at once", least=1)
    endpoint: str = knob("", "of a chat judge: base URL, such as https://api.openai.com/v1")
    model: str = knob("", "of a chat judge: the model's name at that endpoint")
    key_env: str = knob("OPENAI_API_KEY", "of a chat judge: the environment variable that holds the key")
    timeout: float = knob(60.0, "of a chat judge: seconds to wait for one answer", least=0.001)
    seed: int = knob(0, "of the sampling, the toy's own completions and the order of the two sides")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    overwrite: bool = knob(False, "replace results in --out that other settings gave; samples and answers are kept")


# ---- 1. The two sides: what the dataset says, and what the runs say ----


def own_completions(name, limit, seed):
    """The first `limit` (0: all) different prompts of a dataset -> list of (prompt, the dataset's own completion)."""
    if name == "toy":
        from data.toy_sentiment.grammar import complete

        prompts = [record["prompt"] for record in dataset.read_jsonl(data.find(name, "prompts_test"), ("prompt",))]
        return [(prompt, complete(prompt, random.Random(f"{seed} {prompt}"))) for prompt in prompts[: limit or None]]
    path = data.find(name, "sft_test")
    field = "completion" if "completion" in dataset.read_jsonl(path, ("prompt",))[0] else "chosen"
    first = {}  # a prompt may come back with other responses; prompts are what is resampled, so each counts once
    for record in dataset.read_jsonl(path, ("prompt", field)):
        first.setdefault(record["prompt"], record[field])
    return list(itertools.islice(first.items(), limit or None))


def prompt_ids(model, tokenizer, prompts, max_new_tokens):
    """Prompts as `generate` takes them, cut on the left so that max_new_tokens have room after 8 tokens at least.

    -> (list of ids, how many were cut)
    """
    room = max(8, model.config.block_size - max_new_tokens)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    return [[tokenizer.eot, *ids[-room:]] for ids in encoded], sum(len(ids) > room for ids in encoded)


def sample(journal, name, model, tokenizer, ids, temperature, settings):
    """Completions of all prompts `ids` at one temperature -> list of {"text", "ended", "tokens"}.

    Each batch has a seed of its own, so one that is in the journal is taken from there without changing the others.
    """
    weights = checkpoint.fingerprint(model, tokenizer.fingerprint)
    device = model.wte.weight.device
    completions = []
    batches = range(0, len(ids), settings.batch_size)
    for i in tqdm(batches, desc=f"{name} at temperature {temperature:g}", unit="batch"):
        batch = ids[i : i + settings.batch_size]
        key = checkpoint.fingerprint(weights, batch, temperature, settings.max_new_tokens, settings.seed, i)
        if key not in journal.entries:
            seed = random.Random(f"{settings.seed} {temperature} {i}").getrandbits(63)
            generator = torch.Generator(device).manual_seed(seed)
            new = generate(model, batch, settings.max_new_tokens, tokenizer.eot, temperature, generator=generator)
            done = [{"text": tokenizer.decode(s), "ended": s[-1:] == [tokenizer.eot], "tokens": len(s)} for s in new]
            journal.add(key, run=name, temperature=temperature, completions=done)
        completions += journal.entries[key]["completions"]
    return completions


# ---- 2. Judging ----


def shown_first(prompt, ours, theirs, seed):
    """Whether the judge sees `ours` first: a coin that the texts and the seed decide,

    so that the same comparison is shown in the same order whenever it comes up, and a kept answer still holds.
    """
    return random.Random(f"{seed}\n{prompt}\n{ours}\n{theirs}").random() < 0.5


def compare(judge, prompts, ours, theirs, seed):
    """`ours` against `theirs`, sides swapped at random before the judge -> list of "win", "tie", "loss" or None."""
    first = [shown_first(*texts, seed) for texts in zip(prompts, ours, theirs, strict=True)]
    a = [x if is_first else y for is_first, x, y in zip(first, ours, theirs, strict=True)]
    b = [y if is_first else x for is_first, x, y in zip(first, ours, theirs, strict=True)]
    outcomes = {True: {"a": "win", "b": "loss"}, False: {"a": "loss", "b": "win"}}
    return [
        outcomes[is_first].get(verdict, verdict)  # "tie" and None have no side
        for is_first, verdict in zip(first, judge(prompts, a, b), strict=True)
    ]


def interval(wins, ties, losses, seed=0, resamples=10_000):
    """95 % bootstrap interval of the win rate over prompts -> (low, high).

    To draw as many prompts with replacement is to draw the three counts from a multinomial. Percentile method.
    """
    n = wins + ties + losses
    counts = numpy.random.default_rng(seed).multinomial(n, [wins / n, ties / n, losses / n], size=resamples)
    return tuple(numpy.quantile((counts[:, 0] + counts[:, 1] / 2) / n, [0.025, 0.975]).tolist())


def count(outcomes):
    """Outcomes of comparisons with different prompts -> the counts, the win rate (ties one half) and its interval.

    If no outcome could be read, the rate and its interval are NaN.
    """
    found = Counter(outcomes)
    wins, ties, losses = (found[name] for name in ("win", "tie", "loss"))
    judged = wins + ties + losses
    low, high = interval(wins, ties, losses) if judged else (math.nan, math.nan)
    return {
        "win_rate": (wins + ties / 2) / judged if judged else math.nan,
        "low": low,
        "high": high,
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "unparsed": found[None],
    }


def agreement(a, b):
    """Two judges' outcomes of the same comparisons -> n, share of equal ones, and Cohen's kappa.

    kappa = (share - chance) / (1 - chance); chance is the share that two judges would reach who drew their outcomes
    independently, each with its own frequencies (Cohen 1960). 1: always equal, 0: no more than chance. NaN if chance
    is 1, or there is nothing to compare. Comparisons on which either judge could not be read are left out.
    """
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    n = len(both)
    if not n:
        return {"n": 0, "share": math.nan, "kappa": math.nan}
    share = sum(x == y for x, y in both) / n
    of_a, of_b = Counter(x for x, _ in both), Counter(y for _, y in both)
    chance = sum(of_a[outcome] * of_b[outcome] for outcome in of_a) / n**2
    return {"n": n, "share": share, "kappa": (share - chance) / (1 - chance) if chance < 1 else math.nan}


# ---- 3. Results ----


def as_csv(rows):
    """List of dicts with the same keys -> the text of a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_table(rows):
    """The rows of winrate.csv -> a Markdown table."""
    names = ("judge", "run", "temperature", "win rate", "95 % interval", "wins", "ties", "losses", "unparsed", "ended")
    lines = ["| " + " | ".join((*names, "tokens", "distinct")) + " |", "| --- | --- " + "| ---: " * 10 + "|"]
    for row in rows:
        lines.append(
            "| {judge} | {run} | {temperature:g} | {win_rate:.3f} | {low:.3f} to {high:.3f} | {wins} | {ties} "
            "| {losses} | {unparsed} | {ended:.1%} | {tokens:.1f} | {distinct} |".format(**row)
        )
    return "\n".join(lines) + "\n"


def draw(path, rows, subject):
    """The picture: a panel for each judge, a line for each run, with its intervals. Needs the extra `plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f'no {path}: matplotlib is not installed (pip install "minidpo[plot]")')
        return
    judges, runs = (list(dict.fromkeys(row[name] for row in rows)) for name in ("judge", "run"))
    figure = Figure(figsize=(4.8 * len(judges), 3.6), layout="constrained")
    panels = figure.subplots(1, len(judges), sharey=True, squeeze=False)[0]
    for axes, judge in zip(panels, judges, strict=True):
        axes.axhline(0.5, color="black", linestyle="--", linewidth=1)
        for i, name in enumerate(runs):
            line = [row for row in rows if (row["judge"], row["run"]) == (judge, name)]
            line.sort(key=lambda row: row["temperature"])
            x, y, low, high = ([row[key] for row in line] for key in ("temperature", "win_rate", "low", "high"))
            axes.plot(x, y, "o-", color=f"C{i}", markersize=4, label=name)
            axes.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        axes.set_title(f"judge: {judge}", fontsize=10)
        axes.set_xlabel("sampling temperature")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(f"win rate against {subject}")
    panels[0].legend(loc="lower left", fontsize=8, frameon=False)
    with atomic(path) as file:
        figure.savefig(file, dpi=130, format="png")


# ---- 4. The command ----


def parse_temperatures(text):
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]; UserError for anything else."""
    try:
        temperatures = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        temperatures = []
    if not temperatures or not all(0 <= t < math.inf for t in temperatures):
        raise UserError(f"--temperatures {text!r}: write numbers from 0 with commas between them, such as 0,0.5,1")
    return temperatures


def check_out(settings):
    """Folder of the results; UserError if those in it are of other settings and --overwrite was not given."""
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder.")
    asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "overwrite"}
    path = out / "settings.json"
    if path.exists() and not settings.overwrite and path.read_text(encoding="utf-8") != json.dumps(asked, indent=2):
        raise UserError(
            f"{out} holds results of other settings ({path}). Give another --out, or replace them with --overwrite: "
            "the samples and answers in it are kept and used."
        )
    return out, asked


def main():
    settings = parse_settings(Settings, __doc__)
    temperatures = parse_temperatures(settings.temperatures)
    out, asked = check_out(settings)
    device = pick_device(settings.device)
    answers = Journal(out / "answers.jsonl")
    chat = {name: getattr(settings, name) for name in ("endpoint", "model", "key_env", "timeout")}
    judges = {name: load_judge(name, answers, device=device, **chat) for name in settings.judge}
    models = {name: checkpoint.load(name)[:2] for name in settings.run}
    prompts, own = zip(*own_completions(settings.data, settings.limit, settings.seed), strict=True)

    journal = Journal(out / "samples.jsonl")
    comparisons = []
    for name, (model, tokenizer) in models.items():
        ids, n_cut = prompt_ids(model, tokenizer, prompts, settings.max_new_tokens)
        if n_cut:
            print(f"{name}: {n_cut:,} of {len(prompts):,} prompts cut on the left, to leave room for a completion")
        model.to(device)
        for temperature in temperatures:
            completions = sample(journal, name, model, tokenizer, ids, temperature, settings)
            comparisons += [
                {"run": name, "temperature": temperature, "prompt": prompt, "own": text, "completion": done}
                for prompt, text, done in zip(prompts, own, completions, strict=True)
            ]
        model.cpu()

    texts = [[c["prompt"] for c in comparisons], [c["completion"]["text"] for c in comparisons]]
    texts.append([c["own"] for c in comparisons])
    outcomes = {name: compare(judge, *texts, settings.seed) for name, judge in judges.items()}

    rows = []
    for judge, (run_name, temperature) in itertools.product(judges, itertools.product(models, temperatures)):
        chosen = [i for i, c in enumerate(comparisons) if (c["run"], c["temperature"]) == (run_name, temperature)]
        done = [comparisons[i]["completion"] for i in chosen]
        rows.append(
            {
                "judge": judge,
                "run": run_name,
                "temperature": temperature,
                **count(outcomes[judge][i] for i in chosen),
                "ended": sum(c["ended"] for c in done) / len(done),
                "tokens": sum(c["tokens"] for c in done) / len(done),
                "distinct": len({c["text"] for c in done}),
            }
        )
    for i, comparison in enumerate(comparisons):
        comparison["outcomes"] = {name: outcomes[name][i] for name in judges}
    agreements = [
        {"judge_a": a, "judge_b": b, **agreement(outcomes[a], outcomes[b])}
        for a, b in itertools.combinations(judges, 2)
    ]

    atomic_write(out / "comparisons.jsonl", "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in comparisons))
    atomic_write(out / "winrate.csv", as_csv(rows))
    draw(out / "winrate.png", rows, "the grammar" if settings.data == "toy" else "the dataset's own completion")
    print("\n" + as_table(rows))
    if agreements:
        atomic_write(out / "agreement.csv", as_csv(agreements))
    for a in agreements:
        print(
            f"{a['judge_a']} and {a['judge_b']}: the same verdict on {a['share']:.1%} of {a['n']:,} comparisons, "
            f"Cohen's kappa {a['kappa']:.3f}"
        )
    atomic_write(out / "settings.json", json.dumps(asked, indent=2))
    print(f"results: {out}")


if __name__ == "__main__":
    run_main(main)
