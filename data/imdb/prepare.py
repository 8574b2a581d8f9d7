"""Makes the JSONL files for both training stages from the Large Movie Review Dataset (Maas et al., ACL 2011).

    python -m data.imdb.prepare                    downloads the official archive (84 MB) first
    python -m data.imdb.prepare --archive FILE     reads an archive you have, or a part of it in the same layout

One official training review in 25 of each label is held out. No model and no classifier is trained on these. The
official test reviews have one use: the final accuracy of the classifiers.

    official training reviews, 24 in 25    sft_train, prompts_train, reviews_train
    official training reviews, 1 in 25     sft_test, prompts_test, reviews_heldout (to tune the classifiers)
    official test reviews                  reviews_test

    sft_*        {"prompt", "completion"}: a whole review, cut in two. The prompt is its first 2 to 8 words
    prompts_*    {"prompt"}: the same prompts
    reviews_*    {"text", "label", "rating", "id"}: label 1 is positive (7 to 10 stars), 0 negative (1 to 4 stars)

The space after the prompt belongs to the completion. The paper's prompts are 2 to 8 tokens; we count words, because no
tokenizer exists yet. Every random choice is a hash of the review's file name, so the same archive gives the same bytes.
"""

import dataclasses
import gzip
import re
import tarfile
import zlib
from pathlib import Path

from tqdm import tqdm

from data.download import download
from data.preparing import hash_number, write_rows
from minidpo.settings import UserError, knob, parse_settings, run_main

FOLDER = Path(__file__).parent
URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
DIGEST = "md5:7c2ac02c03563afcf9b574c7e56c153a"
MEMBER = re.compile(r"(?:.*/)?((train|test)/(pos|neg)/\d+_(\d+))\.txt")  # the other files are not used
HELD_OUT_ONE_IN = 25
SEED = "minidpo imdb 1"  # another string gives another split, order and set of prompts


@dataclasses.dataclass
class Settings:
    archive: str = knob("", "an aclImdb .tar.gz, or a part of it; empty: download the official one (84 MB)")
    out: str = knob(str(FOLDER), "folder for the JSONL files")


# ---- 1. The archive ----


def clean(text):
    """Replaces `<br />` tags and every run of whitespace by one space; strips both ends."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def read_archive(path):
    """Reads the reviews without unpacking the archive to disk.

    Returns:
        A list of {"text", "label", "rating", "id"}, in the archive's order.

    Raises:
        UserError: the archive is missing, damaged, or not the IMDb archive.
    """
    reviews = []
    try:
        with gzip.open(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tqdm(tar, desc="reading", unit=" files"):
                    match = MEMBER.fullmatch(member.name)
                    if match and member.isfile():
                        text = clean(tar.extractfile(member).read().decode("utf-8"))
                        name, _, label, rating = match.groups()
                        reviews.append({"text": text, "label": int(label == "pos"), "rating": int(rating), "id": name})
            while stream.read(1 << 20):  # tarfile stops early; gzip checks its checksum at the end of the file
                pass
    except FileNotFoundError:
        raise UserError(f"{path} not found. Correct the path, or leave out --archive to download it.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or not a .tar.gz archive ({error}). Download it again.") from error
    for name in ("train/pos", "train/neg", "test/pos", "test/neg"):
        if sum(review["id"].startswith(name) for review in reviews) < 2:  # train: one to train on, one held out
            raise UserError(f"{path}: fewer than 2 reviews under aclImdb/{name}/. Is it the aclImdb archive?")
    return reviews


# ---- 2. The split ----


def _hash(purpose, review):
    """A pseudo-random integer for this review, independent from one purpose to the next."""
    return hash_number(f"{SEED}/{purpose}/{review['id']}")


def split(reviews):
    """Splits the reviews into {"train", "heldout", "test"}, and counts those left out.

    Of equal texts one is kept, in train rather than in test: no classifier may be tested on a review it was trained
    on. Reviews of fewer than 3 words are left out, because they cannot be cut into a prompt and a completion.

    Returns:
        (splits, number left out). Each split is a shuffled list of reviews.
    """
    texts = set()
    parts = {"train/pos": [], "train/neg": [], "test/pos": [], "test/neg": []}
    for review in sorted(reviews, key=lambda r: (r["id"].startswith("test"), _hash("order", r))):
        if review["text"] not in texts and review["text"].count(" ") >= 2:
            texts.add(review["text"])
            parts[review["id"].rpartition("/")[0]].append(review)

    train, heldout = [], []
    for part in (parts["train/pos"], parts["train/neg"]):
        count = -(-len(part) // HELD_OUT_ONE_IN)  # rounded up
        drawn = sorted(part, key=lambda r: _hash("heldout", r))
        heldout += drawn[:count]
        train += drawn[count:]
    splits = {"train": train, "heldout": heldout, "test": parts["test/pos"] + parts["test/neg"]}
    splits = {name: sorted(part, key=lambda r: _hash("order", r)) for name, part in splits.items()}
    return splits, len(reviews) - len(texts)


def cut_prompt(review):
    """Cuts a review after its first 2 to 8 words; at least one word is left for the completion.

    Returns:
        {"prompt", "completion"}; the completion begins with the space between the two.
    """
    text = review["text"]
    words = text.split(" ")
    count = min(2 + _hash("prompt", review) % 7, len(words) - 1)
    end = len(" ".join(words[:count]))
    return {"prompt": text[:end], "completion": text[end:]}


def main(argv=None):
    settings = parse_settings(Settings, __doc__, argv)
    archive = settings.archive or download(URL, FOLDER / "aclImdb_v1.tar.gz", DIGEST, "pass --archive FILE")
    reviews = read_archive(archive)
    splits, left_out = split(reviews)
    print(f"{archive}: {len(reviews):,} reviews read, {left_out} of them left out (equal texts, or under 3 words)")

    files = {f"reviews_{name}": part for name, part in splits.items()}
    for name, part in (("train", splits["train"]), ("test", splits["heldout"])):
        files[f"sft_{name}"] = [cut_prompt(review) for review in part]
        files[f"prompts_{name}"] = [{"prompt": row["prompt"]} for row in files[f"sft_{name}"]]
    write_rows(settings.out, files)
    train_prompts = {row["prompt"] for row in files["prompts_train"]}
    shared = sum(row["prompt"] in train_prompts for row in files["prompts_test"])
    print(f"{shared} of the {len(files['prompts_test'])} test prompts are also training prompts")


if __name__ == "__main__":
    run_main(main)
