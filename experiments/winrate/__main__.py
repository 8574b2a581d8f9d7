"""Win rates over sampling temperatures: runs against the dataset's own completions (as in the paper's Figures 2 and 3).

    python -m experiments.winrate --run runs/toy/sft --run runs/toy/dpo --data toy --judge toy --out runs/toy/winrate

Every run completes the same prompts at every temperature. A judge (judges.py) compares each completion with the
dataset's own completion of that prompt. Samples and a chat model's answers are kept in --out as they are made: a
command that was stopped continues where it stopped. docs/winrate.md describes the judges and the results.
"""

import dataclasses
import itertools
import json
import math
import random
from collections import namedtuple
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

import data
from data.toy_sentiment import grammar
from experiments.common import figure, prompt_ids, read_prompts, sample, save_figure, write_csv
from experiments.winrate.journal import Journal
from experiments.winrate.judges import load_judge
from experiments.winrate.scores import agreement, compare, count
from minidpo import checkpoint
from minidpo.dataset import SFT, read_jsonl
from minidpo.device import DEVICES, pick_device
from minidpo.files.writing import atomic_write, claim
from minidpo.report import samples_table
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    run: list = knob(dataclasses.MISSING, "a model to judge: a run folder, a GPT-2 folder or name; may be repeated")
    data: str = knob(dataclasses.MISSING, "toy, imdb, hh, tldr, or a JSONL file with prompt and completion or chosen")
    judge: list = knob(
        dataclasses.MISSING,
        "toy, the file of a trained reward, the run folder of a reward model, implicit:RUN,REFERENCE, "
        "or chat:simple, chat:concise, chat:helpful; may be repeated",
    )
    out: str = knob(dataclasses.MISSING, "folder for the results")
    temperatures: str = knob("0,0.25,0.5,0.75,1", "sampling temperatures, with commas between them; 0 is greedy")
    limit: int = knob(500, "use only the first N prompts; 0: all")
    max_new_tokens: int = knob(64, "longest completion, in tokens", least=1)
    batch_size: int = knob(128, "completions sampled at once", least=1)
    endpoint: str = knob("", "of a chat judge: base URL, such as https://api.openai.com/v1")
    model: str = knob("", "of a chat judge: the model's name at that endpoint")
    key_env: str = knob("OPENAI_API_KEY", "of a chat judge: the environment variable that holds the key")
    timeout: float = knob(60.0, "of a chat judge: seconds to wait for one answer", least=0.001)
    seed: int = knob(0, "seed of the sampling, of the toy's own completions and of the order of the two sides")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    overwrite: bool = knob(False, "replace results in --out that have other settings; samples and answers are kept")


# the rows of winrate.csv and agreement.csv; low and high end the 95 % interval, tokens is the mean length
Row = namedtuple("Row", "judge run temperature win_rate low high wins ties losses unparsed ended tokens distinct")
Agreement = namedtuple("Agreement", "judge_a judge_b n share kappa")


def own_completions(name, limit, seed):
    """The first `limit` (0: all) different prompts of a dataset -> list of (prompt, the dataset's own completion)."""
    if name == "toy":
        prompts = read_prompts(name, limit=limit)
        return [(prompt, grammar.complete(prompt, random.Random(f"{seed} {prompt}"))) for prompt in prompts]
    first = {}  # the bootstrap resamples prompts, so each prompt counts once
    for record in read_jsonl(data.find(name, "sft_test"), SFT):  # of preferences, the chosen response
        first.setdefault(record["prompt"], record["completion"])
    return list(itertools.islice(first.items(), limit or None))


def completions(journal, name, model, tokenizer, prompts, ids, temperature, settings):
    """The run's completions of all prompts (texts) at one temperature -> list of {"text", "ended", "tokens"}."""
    weights = checkpoint.fingerprint(model, tokenizer.fingerprint)
    longest, found = settings.max_new_tokens, []
    batches = range(0, len(prompts), settings.batch_size)
    for i in tqdm(batches, desc=f"{name} at temperature {temperature:g}", unit="batch"):
        batch, batch_ids = (x[i : i + settings.batch_size] for x in (prompts, ids))
        key = checkpoint.fingerprint(weights, batch_ids, (temperature, longest, settings.seed, i))
        if key not in journal.entries:
            seed = random.Random(f"{settings.seed} {temperature} {i}").getrandbits(63)  # each batch has its own
            new = sample(model, tokenizer, batch, longest, seed, 1, batch_ids, temperature, len(batch))
            done = [dict(text=t, ended=e, tokens=len(y)) for t, e, y in zip(new.texts, new.ended, new.ids, strict=True)]
            journal.add(key, run=name, temperature=temperature, completions=done)
        found += journal.entries[key]["completions"]
    return found


def draw(path, rows, other_side):
    """The picture: one panel per judge, one line per run, with its intervals."""
    judges, runs = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("judge", "run"))
    if not (picture := figure(path, (4.8 * len(judges), 3.6))):
        return
    panels = picture.subplots(1, len(judges), sharey=True, squeeze=False)[0]
    for axes, judge in zip(panels, judges, strict=True):
        axes.axhline(0.5, color="black", linestyle="--", linewidth=1)
        for i, run in enumerate(runs):
            line = sorted((row for row in rows if (row.judge, row.run) == (judge, run)), key=lambda r: r.temperature)
            line = Row(*zip(*line, strict=True))  # columns
            axes.plot(line.temperature, line.win_rate, "o-", color=f"C{i}", markersize=4, label=run)
            axes.fill_between(line.temperature, line.low, line.high, color=f"C{i}", alpha=0.2, linewidth=0)
        axes.set_title(f"judge: {judge}", fontsize=10)
        axes.set(xlabel="sampling temperature", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(f"win rate against {other_side}")
    panels[0].legend(loc="lower left", fontsize=8, frameon=False)
    save_figure(path, picture, dpi=130)


def parse_temperatures(text):
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]. Raises UserError for anything else."""
    try:
        temperatures = list(dict.fromkeys(map(float, text.split(","))))
    except ValueError:
        temperatures = []
    if not temperatures or not all(0 <= t < math.inf for t in temperatures):
        raise UserError(f"--temperatures {text!r}: write numbers from 0 with commas between them, such as 0,0.5,1")
    return temperatures


def check_out(settings):
    """Returns --out and the text of its settings.json. Raises UserError if it holds results of other settings."""
    out = Path(settings.out)
    claim(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder.")
    asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "overwrite"}
    text, path = json.dumps(asked, indent=2), out / "settings.json"
    if path.exists() and not settings.overwrite and path.read_text(encoding="utf-8") != text:
        how = "Give another --out, or replace them with --overwrite: samples and answers in it are kept and used."
        raise UserError(f"{out} holds results of other settings ({path}). {how}")
    return out, text


def main():
    settings = parse_settings(Settings, __doc__)
    temperatures = parse_temperatures(settings.temperatures)
    out, asked = check_out(settings)
    device = pick_device(settings.device)
    chat = {name: getattr(settings, name) for name in ("endpoint", "model", "key_env", "timeout")}
    chat["answers"] = Journal(out / "answers.jsonl")
    judges = {name: load_judge(name, device, **chat) for name in settings.judge}
    models = {name: checkpoint.load(name)[:2] for name in settings.run}
    prompts, own = zip(*own_completions(settings.data, settings.limit, settings.seed), strict=True)

    journal, sampled = Journal(out / "samples.jsonl"), {}
    for run, (model, tokenizer) in models.items():
        ids = prompt_ids(tokenizer, prompts, settings.max_new_tokens, model)
        model.to(device)
        for temperature in temperatures:
            sampled[run, temperature] = completions(journal, run, model, tokenizer, prompts, ids, temperature, settings)
        model.cpu()

    rows, outcomes = [], {name: [] for name in judges}  # outcomes in the order of `sampled`
    for name, judge in judges.items():
        for (run, temperature), done in sampled.items():
            texts = [completion["text"] for completion in done]
            found = compare(judge, prompts, texts, own, settings.seed)
            outcomes[name] += found
            shown = {key: fmean(completion[key] for completion in done) for key in ("ended", "tokens")}
            rows.append(Row(name, run, temperature, **count(found), **shown, distinct=len(set(texts))))
    agreements = [Agreement(a, b, **agreement(outcomes[a], outcomes[b])) for a, b in itertools.combinations(judges, 2)]
    lines = []
    for (run, temperature), done in sampled.items():
        for prompt, theirs, completion in zip(prompts, own, done, strict=True):
            found = {name: outcomes[name][len(lines)] for name in judges}
            comparison = dict(run=run, temperature=temperature, prompt=prompt, own=theirs, completion=completion)
            lines.append(json.dumps({**comparison, "outcomes": found}, ensure_ascii=False) + "\n")

    for name in ("settings.json", "agreement.csv", "winrate.png"):  # of other settings; this run may not write them
        (out / name).unlink(missing_ok=True)
    atomic_write(out / "comparisons.jsonl", "".join(lines))
    write_csv(out / "winrate.csv", rows)
    if agreements:
        write_csv(out / "agreement.csv", agreements)
    draw(out / "winrate.png", rows, "the grammar" if settings.data == "toy" else "the dataset's own completion")
    atomic_write(out / "settings.json", asked)
    columns = Row(*zip(*rows, strict=True))._asdict()
    cells = {name: [f"{x:.3g}" if isinstance(x, float) else str(x) for x in column] for name, column in columns.items()}
    print("\n" + samples_table(cells))
    for a in [a for a in agreements if a.n]:
        same = f"the same verdict on {a.share:.1%} of {a.n:,} comparisons, Cohen's kappa {a.kappa:.3f}"
        print(f"{a.judge_a} and {a.judge_b}: {same}")
    print(f"results: {out}")


if __name__ == "__main__":
    run_main(main)
