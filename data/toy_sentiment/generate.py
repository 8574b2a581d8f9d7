"""Generates the toy's JSONL files from the grammar: the same bytes on every machine, in seconds.

The training scripts call `ensure()`, which generates the full files on first use. The command can also write other
sizes to another folder; with --stats it prints every figure of this folder's README.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
import statistics
from pathlib import Path

from data.toy_sentiment import grammar
from minidpo.files.writing import atomic_write
from minidpo.settings import UserError, knob, parse_settings, run_main

HERE = Path(__file__).resolve().parent
FULL = HERE / "full"  # not in git
ROWS = {
    "sft_train": 70_000,
    "sft_test": 1_000,
    "pairs_train": 10_000,
    "pairs_test": 1_000,
    "prompts_train": 2_000,
    "prompts_test": 500,
}
SHIPPED = 300  # the first rows of each file are in git, for people to read


def split_openings():
    """Returns the grammar's openings, shuffled and split: {"train": 2,000 prompts, "test": 500 others}."""
    rng = random.Random(0)
    prompts = [prompt for _, prompt in sorted((rng.random(), prompt) for prompt in grammar.OPENINGS)]
    n = ROWS["prompts_test"]
    return {"test": prompts[:n], "train": prompts[n : n + ROWS["prompts_train"]]}


def reviews(prompts, rng):
    """Yields SFT rows for ever."""
    while True:
        prompt = grammar.pick(prompts, rng)
        yield {"prompt": prompt, "completion": grammar.complete(prompt, rng)}


def pairs(prompts, rng):
    """Yields preference rows for ever: two reviews of one opening, labelled by Bradley-Terry (DPO paper, Eq. 1).

    Review a is chosen with probability sigmoid(r*(a) - r*(b)): 1/2 if the rewards are equal. Equal texts are skipped.
    """
    while True:
        prompt = grammar.pick(prompts, rng)
        a, b = grammar.complete(prompt, rng), grammar.complete(prompt, rng)
        if a == b:
            continue
        p_a = 1 / (1 + math.exp(grammar.reward(b) - grammar.reward(a)))
        chosen, rejected = (a, b) if rng.random() < p_a else (b, a)
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def rows(name, n):
    """Returns the first `n` rows of the file `name`, a key of ROWS. Row i does not depend on `n` or on other files."""
    kind, split = name.split("_")
    prompts = split_openings()[split]
    rng = random.Random(1 + list(ROWS).index(name))  # each file has its own seed
    if kind == "prompts":
        stream = ({"prompt": prompt} for prompt in prompts)
    else:
        stream = {"sft": reviews, "pairs": pairs}[kind](prompts, rng)
    return itertools.islice(stream, n)


def jsonl(name, n):
    """Returns the first `n` rows of the file `name` as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(name, n))


def ensure(folder=None, sizes=ROWS):
    """Makes sure that `folder` holds the files in these sizes, made by the current code, and returns its path."""
    folder = Path(folder or FULL)
    mark = folder / "fingerprint.txt"
    complete = all((folder / f"{name}.jsonl").exists() for name in sizes)
    if complete and mark.exists() and mark.read_text(encoding="utf-8") == fingerprint(sizes):
        return folder
    mark.unlink(missing_ok=True)  # written again only after every file
    for name, n in sizes.items():
        atomic_write(folder / f"{name}.jsonl", jsonl(name, n))
    atomic_write(mark, fingerprint(sizes))
    return folder


def fingerprint(sizes):
    """A hash of this file, the grammar and the numbers of rows. If it differs, the files are out of date."""
    source = b"".join((HERE / name).read_bytes() for name in ("grammar.py", "generate.py"))
    return hashlib.sha256(source + json.dumps(sizes).encode()).hexdigest() + "\n"


def stats():
    """Returns every figure and sample of README.md, as text."""
    sft = [(row["prompt"], row["completion"]) for row in rows("sft_train", ROWS["sft_train"])]
    rewards = [grammar.reward(response) for _, response in sft]
    lengths = [len(re.findall(r"\w+|[^\w\s]", response)) for _, response in sft]
    low, median, high = (sorted(lengths)[int(share * len(sft))] for share in (0.05, 0.5, 0.95))
    words = {word for review in sft for word in re.findall(r"\w+", "".join(review).lower())}
    gaps = [
        grammar.reward(p["chosen"]) - grammar.reward(p["rejected"]) for p in rows("pairs_train", ROWS["pairs_train"])
    ]
    spread = f"mean {statistics.mean(rewards):.2f}, SD {statistics.pstdev(rewards):.2f}"
    graded = f"{len(grammar.POSITIVE)} positive, {len(grammar.NEGATIVE)} negative"
    lines = [
        f"openings                            {len(grammar.OPENINGS):,}",
        f"distinct words                      {len(words)}, of which {graded}",
        f"distinct reviews in sft_train       {len(set(sft)):,} of {len(sft):,}",
        f"words and punctuation per response  median {median}, 5 % to 95 %: {low} to {high}, longest {max(lengths)}",
        f"reward r*                           {spread}, from {min(rewards):+d} to {max(rewards):+d}",
        f"correlation of r* with length       {statistics.correlation(rewards, lengths):.2f}",
        f"pairs whose chosen has a lower r*   {sum(gap < 0 for gap in gaps) / len(gaps):.1%}",
        f"pairs with equal r*                 {sum(gap == 0 for gap in gaps) / len(gaps):.1%}",
        "",
        "  r*  share of the reviews",
    ]
    for value, count in sorted(collections.Counter(rewards).items()):
        lines.append(f"{value:+4d}  {count / len(sft):6.2%} {'#' * round(200 * count / len(sft))}".rstrip())
    lines.append("\nThe first review of some rewards in sft_train, `|` between prompt and response:\n")
    for value in (6, 4, 3, 1, 0, -1, -3, -5):
        prompt, response = sft[rewards.index(value)]
        lines.append(f"{value:+d}  {prompt}|{response}")
    return "\n".join(lines)


@dataclasses.dataclass
class Settings:
    out: str = knob("", "folder to write to; empty: data/toy_sentiment/full, in the default sizes only")
    sft: int = knob(ROWS["sft_train"], "rows of sft_train.jsonl", least=1)
    pairs: int = knob(ROWS["pairs_train"], "rows of pairs_train.jsonl; more rows keep the first ones", least=1)
    stats: bool = knob(False, "only print the numbers and samples of the README")
    shipped: bool = knob(False, f"only write the files in git: the first {SHIPPED} rows of each")


def main():
    settings = parse_settings(Settings, __doc__)
    if settings.stats:
        print(stats())
        return
    if settings.shipped:
        for name, n in ROWS.items():
            atomic_write(HERE / f"{name}.jsonl", jsonl(name, min(n, SHIPPED)))
        print(f"wrote the first {SHIPPED} rows of each file to {HERE}")
        return
    sizes = {**ROWS, "sft_train": settings.sft, "pairs_train": settings.pairs}
    folder = Path(settings.out or FULL)
    if folder.resolve() == FULL and sizes != ROWS:
        raise UserError(f"{FULL} holds the default sizes, for `--data toy`. Give other sizes their own --out.")
    present = [folder / f"{name}.jsonl" for name in sizes if (folder / f"{name}.jsonl").exists()]
    if present and folder.resolve() != FULL and not (folder / "fingerprint.txt").exists():
        raise UserError(f"{present[0]} exists and was not written by this command. Choose another --out.")
    ensure(folder, sizes)
    for name, n in sizes.items():
        print(f"{folder / name}.jsonl  {n:,} rows")


if __name__ == "__main__":
    run_main(main)
