"""Anthropic's HH dialogues (Bai et al. 2022, arXiv 2204.05862) -> the JSONL files that both training stages read.

    python -m data.hh.prepare                     downloads the four official subsets first (79 MB)
    python -m data.hh.prepare --source FOLDER     takes SUBSET/train.jsonl.gz and SUBSET/test.jsonl.gz from there
    python -m data.hh.prepare --source FILE       takes one such file, or a slice of one, and holds out a fifth of it

Many of the texts are offensive: in harmless-base people tried to make a model say harmful things. An official row is
{"chosen", "rejected"}, two whole dialogues that should differ in the last turn of the assistant alone:

    "\\n\\nHuman: Hi\\n\\nAssistant: Hello!\\n\\nHuman: How are you?\\n\\nAssistant: Fine."
     `---------------------------- prompt -----------------------------´`-----´ response, with its space

That they do is checked row by row: each side is cut before its last response, and what is left must be equal. (Cutting
one side, and the other at the same place, mixes up the rows that differ earlier, which the official files have.) Rows
that fail are left out and counted by reason.

    pairs_train, pairs_test      {"prompt", "chosen", "rejected"}
    sft_train, sft_test          {"prompt", "completion"}: the chosen responses, as in the paper (section 6)
    prompts_train, prompts_test  {"prompt"}, each once

Official files keep their official split, but a training row whose prompt also stands in the test files is left out.
From a single file, dialogues are held out by a hash of their first question, so that no dialogue is on both sides. Rows
are in the order of a hash: the subsets are mixed, and the same rows give the same bytes, whatever their order.
"""

import dataclasses
import re
from pathlib import Path

from data.download import download
from data.preparing import LeftOut, hash_number, shuffled, usable, write_rows
from minidpo.dataset import PAIR, check_text, json_lines
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
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
HELD_OUT_ONE_IN = 5  # of a single file
SEED = "minidpo hh 1"  # another string gives another order, and another split of a single file


@dataclasses.dataclass
class Settings:
    source: str = knob("", "folder with the official files, or one .jsonl.gz file; empty: download them")
    subsets: str = knob(",".join(SUBSETS), "which subsets of a folder or of the download, with commas between them")
    single_turn: str = knob(
        "no",
        "keep only dialogues with one question: no, test (in the test files, as the paper evaluates) or all",
        choices=("no", "test", "all"),
    )
    out: str = knob(str(FOLDER), "folder for the JSONL files")


# ---------------------------------------------------------------------------------------------------------------------
# 1. One row


def split_dialogue(text):
    """A dialogue -> (prompt, response), cut behind the last "Assistant:". Raises LeftOut if that is not its end."""
    end = text.rfind(ASSISTANT)
    if not text.startswith(HUMAN) or end < 0:
        raise LeftOut("no dialogue")
    end += len(ASSISTANT)
    if HUMAN in text[end:]:
        raise LeftOut("the human has the last word")
    return text[:end], text[end:]


def to_pair(row, where):
    """An official row -> {"prompt", "chosen", "rejected"}; nothing is stripped. Raises LeftOut, and UserError."""
    check_text(row, "chosen", where)
    check_text(row, "rejected", where)
    prompt, chosen = split_dialogue(row["chosen"])
    rejected_prompt, rejected = split_dialogue(row["rejected"])
    if prompt != rejected_prompt:
        raise LeftOut("two different prompts")
    if not chosen.strip() or not rejected.strip():
        raise LeftOut("an empty side")
    if chosen.strip() == rejected.strip():
        raise LeftOut("equal sides")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Files


def read_file(path):
    """An official file -> list of pairs. UserError if none is usable."""
    pairs = usable(json_lines(path, ("chosen", "rejected")), to_pair, path)
    if not pairs:
        raise UserError(f"{path}: no usable row. Is it one of HH's SUBSET/train.jsonl.gz or test.jsonl.gz?")
    return pairs


def find_files(source, subsets):
    """-> {"train": paths, "test": paths} in the folder `source`, or downloaded if it is "". UserError for a gap."""
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
                    f"{Path(source) / name}.jsonl.gz not found. --subsets NAME,NAME takes fewer subsets; "
                    "one file alone is taken with --source FILE."
                )
            paths.append(there[0])
    return files


def is_held_out(pair):
    """Of a single file: whether the pair is for testing. Dialogues with the same first question go together."""
    return hash_number(f"{SEED}/{pair['prompt'].split(ASSISTANT)[0]}") % HELD_OUT_ONE_IN == 0


def load(source, subsets):
    """-> {"train": pairs, "test": pairs}, of the official split or, for a single file, of our own."""
    if source and not Path(source).exists():
        raise UserError(f"{source} not found. Give a folder or a file, or leave out --source to download HH.")
    if source and not Path(source).is_dir():
        pairs = read_file(source)
        return {"train": [p for p in pairs if not is_held_out(p)], "test": [p for p in pairs if is_held_out(p)]}
    files = find_files(source, subsets)
    parts = {split: [pair for path in paths for pair in read_file(path)] for split, paths in files.items()}
    test_prompts = {pair["prompt"] for pair in parts["test"]}
    train = [pair for pair in parts["train"] if pair["prompt"] not in test_prompts]
    print(f"{len(parts['train']) - len(train):,} training rows left out (the same prompt in the test files)")
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
        if settings.single_turn == "all" or settings.single_turn == split:
            single = [pair for pair in pairs if pair["prompt"].count(HUMAN) == 1]
            print(f"{split}: {len(pairs) - len(single):,} rows left out (more than one question)")
            pairs = single
        if not pairs:
            raise UserError(f"{settings.source or 'HH'}: no row is left for {split}. Nothing was written.")
        pairs = shuffled(pairs, SEED)
        both = sum(any(re.search(r"\b(Human|Assistant):", pair[side]) for side in PAIR[1:]) for pair in pairs)
        print(f"{split}: {both:,} rows have a speaker's name inside a response (kept: the model wrote for both)")
        files[f"pairs_{split}"] = pairs
        # several pairs may share a prompt, or a prompt and its chosen response: here each stands once
        chosen = dict.fromkeys((pair["prompt"], pair["chosen"]) for pair in pairs)
        files[f"sft_{split}"] = [{"prompt": prompt, "completion": text} for prompt, text in chosen]
        files[f"prompts_{split}"] = [{"prompt": prompt} for prompt in dict.fromkeys(pair["prompt"] for pair in pairs)]
    write_rows(settings.out, files)


if __name__ == "__main__":
    run_main(main)
