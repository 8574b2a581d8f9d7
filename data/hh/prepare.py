"""Makes the JSONL files for both training stages from Anthropic's HH dialogues (Bai et al. 2022, arXiv 2204.05862).

    python -m data.hh.prepare                     downloads the four official subsets first (79 MB)
    python -m data.hh.prepare --source FOLDER     reads SUBSET/train.jsonl.gz and SUBSET/test.jsonl.gz from a folder
    python -m data.hh.prepare --source FILE       reads one such file, or a part of one, and holds out a fifth of it

Many of the texts are offensive: for harmless-base, people tried to make a model say harmful things.

An official row is {"chosen", "rejected"}: two whole dialogues that should differ only in the assistant's last turn.

    "\\n\\nHuman: Hi\\n\\nAssistant: Hello!\\n\\nHuman: How are you?\\n\\nAssistant: Fine."
     `---------------------------- prompt -----------------------------´`-----´ response, with its space

Each dialogue is cut before its own last response, and the two prompts must then be equal. Some official rows fail this
test; they are left out and counted. (Cutting both sides at the same character would turn them into wrong pairs.)

    pairs_train, pairs_test      {"prompt", "chosen", "rejected"}
    sft_train, sft_test          {"prompt", "completion"}: the chosen responses, as in the paper (section 6)
    prompts_train, prompts_test  {"prompt"}, each prompt once

Official files keep their official split, but a training row is left out if its prompt is in the test files as well. A
single file is split by a hash of the dialogue's first question, so that no dialogue is on both sides. All rows are
ordered by a hash: this mixes the subsets, and the same rows give the same bytes in whatever order they are read.
"""

import dataclasses
import re
from pathlib import Path

from data.download import download
from data.preparing import LeftOut, hash_number, shuffled, usable, write_rows
from minidpo.files.forms import ASSISTANT, HUMAN, PAIR, cut_prompt
from minidpo.files.jsonl import check_text, json_lines
from minidpo.settings import UserError, knob, parse_settings, run_main, unknown

FOLDER = Path(__file__).parent
URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
SHA256 = {  # of SUBSET/SPLIT.jsonl.gz, from the repositories' Git LFS entries
    "helpful-base/train": "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "helpful-base/test": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "helpful-online/train": "0994d18b82083f5c084ce04071b683958a724df8c7215ab1d851986642d36a2a",
    "helpful-online/test": "39a475cc7e0df972902f8e3a0972726fce826ac65369bda8c671de4330c60a10",
    "helpful-rejection-sampled/train": "0cea2d2ab2187624ec1314e8cc6fb579f0fa987b3a33e8102b7556ed4d255f64",
    "helpful-rejection-sampled/test": "abc35dbc56015db1dae0faa484514ccbc3eee0133bfcd557fc69250619b028bb",
    "harmless-base/train": "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
    "harmless-base/test": "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
}
SUBSETS = list(dict.fromkeys(name.split("/")[0] for name in SHA256))
HELD_OUT_ONE_IN = 5  # dialogues of a single file
SEED = "minidpo hh 1"  # another string gives another order, and another split of a single file


@dataclasses.dataclass
class Settings:
    source: str = knob("", "a folder with the official files, or one .jsonl.gz file; empty: download them")
    subsets: str = knob(",".join(SUBSETS), "which subsets of the folder or the download, separated by commas")
    single_turn: str = knob(
        "no",
        "keep only dialogues with one question: no, test (in the test files, as the paper evaluates) or all",
        choices=("no", "test", "all"),
    )
    out: str = knob(str(FOLDER), "folder for the JSONL files")


# ---- 1. One row ----


def to_pair(row, where):
    """Converts an official row to {"prompt", "chosen", "rejected"}; no space is stripped.

    Raises:
        LeftOut: the row is not a usable pair.
        UserError: a side is not a string.
    """
    check_text(row, "chosen", where)
    check_text(row, "rejected", where)
    try:
        prompt, (chosen, rejected) = cut_prompt([row["chosen"], row["rejected"]])
    except UserError as reason:
        raise LeftOut(str(reason)) from reason
    if not chosen.strip() or not rejected.strip():
        raise LeftOut("an empty side")
    if chosen.strip() == rejected.strip():
        raise LeftOut("equal sides")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---- 2. Files ----


def read_file(path):
    """Reads the pairs of one official file; UserError if none is usable."""
    pairs = usable(json_lines(path, ("chosen", "rejected"), as_is=True), to_pair, path)
    if not pairs:
        raise UserError(f"{path}: no usable row. Is it one of HH's SUBSET/train.jsonl.gz or test.jsonl.gz?")
    return pairs


def find_files(source, subsets):
    """Returns {"train": paths, "test": paths} of the subsets, in the folder `source` or downloaded if it is empty.

    Raises:
        UserError: the folder lacks a file.
    """
    files = {"train": [], "test": []}
    for subset in subsets:
        for split, paths in files.items():
            name = f"{subset}/{split}"
            if not source:
                url, target = f"{URL}/{name}.jsonl.gz", FOLDER / "download" / f"{name}.jsonl.gz"
                paths.append(download(url, target, f"sha256:{SHA256[name]}", "fetch it elsewhere and pass --source"))
                continue
            there = [path for end in (".jsonl.gz", ".jsonl") if (path := Path(source) / f"{name}{end}").exists()]
            if not there:
                raise UserError(
                    f"{Path(source) / name}.jsonl.gz not found. Name the subsets you have with --subsets NAME,NAME, "
                    "or give a single file: --source FILE."
                )
            paths.append(there[0])
    return files


def is_held_out(pair):
    """Whether a pair of a single file is for testing. Dialogues with the same first question stay together."""
    return hash_number(f"{SEED}/{pair['prompt'].split(ASSISTANT)[0]}") % HELD_OUT_ONE_IN == 0


def load(source, subsets):
    """Returns {"train": pairs, "test": pairs}: the official split, or our own for a single file."""
    if source and not Path(source).exists():
        raise UserError(f"{source} not found. Correct the path, or leave out --source to download HH.")
    if source and not Path(source).is_dir():
        pairs = read_file(source)
        return {"train": [p for p in pairs if not is_held_out(p)], "test": [p for p in pairs if is_held_out(p)]}
    files = find_files(source, subsets)
    parts = {split: [pair for path in paths for pair in read_file(path)] for split, paths in files.items()}
    test_prompts = {pair["prompt"] for pair in parts["test"]}
    train = [pair for pair in parts["train"] if pair["prompt"] not in test_prompts]
    print(f"{len(parts['train']) - len(train):,} training rows left out (the same prompt is in the test files)")
    return {"train": train, "test": parts["test"]}


def main(argv=None):
    settings = parse_settings(Settings, __doc__, argv)
    subsets = settings.subsets.split(",")
    for subset in subsets:
        if subset not in SUBSETS:
            raise unknown("subset", subset, SUBSETS)
    parts = load(settings.source, subsets)

    files = {}
    for split, pairs in parts.items():
        if settings.single_turn in ("all", split):
            single = [pair for pair in pairs if pair["prompt"].count(HUMAN) == 1]
            print(f"{split}: {len(pairs) - len(single):,} rows left out (more than one question)")
            pairs = single
        if not pairs:
            raise UserError(
                f"{settings.source or 'HH'}: no row is left for {split}, so nothing was written. "
                "Give a larger file, or another --single-turn."
            )
        pairs = shuffled(pairs, SEED)
        named = sum(any(re.search(r"\b(Human|Assistant):", pair[side]) for side in PAIR[1:]) for pair in pairs)
        print(f"{split}: {named:,} rows have a speaker's name inside a response (kept: the model wrote for both)")
        files[f"pairs_{split}"] = pairs
        # several pairs may share a prompt, or a prompt and its chosen response: these two files hold each once
        chosen = dict.fromkeys((pair["prompt"], pair["chosen"]) for pair in pairs)
        files[f"sft_{split}"] = [{"prompt": prompt, "completion": text} for prompt, text in chosen]
        files[f"prompts_{split}"] = [{"prompt": prompt} for prompt in dict.fromkeys(pair["prompt"] for pair in pairs)]
    write_rows(settings.out, files)


if __name__ == "__main__":
    run_main(main)
