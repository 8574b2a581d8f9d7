"""Large Movie Review Dataset (Maas et al., ACL 2011) -> the JSONL files that both training stages read.

    python -m data.imdb.prepare                    downloads the official archive (84 MB) first
    python -m data.imdb.prepare --archive FILE     takes an archive that is there, or a slice of it in the same layout

Who gets which review decides what an evaluation is worth. Of the official training reviews one in 25 of each label is
held out; no model and no classifier is trained on those. The official test reviews serve for one thing, the final
accuracy of the classifiers.

    the other 24 in 25    sft_train.jsonl, prompts_train.jsonl, reviews_train.jsonl
    the held-out ones     sft_test.jsonl,  prompts_test.jsonl,  reviews_heldout.jsonl (to tune the classifiers on)
    official test         reviews_test.jsonl

sft_*: {"prompt", "completion"}, the whole review; prompts_*: {"prompt"}, the same prompts; reviews_*: {"text", "label",
"rating", "id"}, label 1 for positive (7 to 10 stars) and 0 for negative (1 to 4 stars). A prompt is the review's first
2 to 8 words. (The paper takes 2 to 8 tokens; no tokenizer exists yet at this point.) The space after it belongs to the
completion. Everything follows from a hash of the review's name: same archive, same bytes, whatever the archive's order.
"""

import dataclasses
import gzip
import hashlib
import json
import re
import tarfile
import zlib
from pathlib import Path

from tqdm import tqdm

from data.download import download
from minidpo.files import atomic_write
from minidpo.settings import UserError, knob, parse_settings, run_main

FOLDER = Path(__file__).parent
URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
DIGEST = "md5:7c2ac02c03563afcf9b574c7e56c153a"
MEMBER = re.compile(r"(?:.*/)?((train|test)/(pos|neg)/\d+_(\d+))\.txt")  # not unsup/, not the vocabulary
HELD_OUT_ONE_IN = 25
SEED = "minidpo imdb 1"  # another string gives another split, order and set of prompts


@dataclasses.dataclass
class Settings:
    archive: str = knob("", "an aclImdb .tar.gz or a slice of it; empty: download the official one (84 MB)")
    out: str = knob(str(FOLDER), "folder for the JSONL files")


# ---------------------------------------------------------------------------------------------------------------------
# 1. The archive, read in place


def clean(text):
    """`<br />` tags become spaces; then every run of whitespace is one space, none at the ends."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def read_archive(path):
    """-> list of {"text", "label", "rating", "id"}, in the archive's order. Extracts nothing to disk."""
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
            while stream.read(1 << 20):  # to the end, where gzip's checksum is: tarfile takes a bad header for the end
                pass
    except FileNotFoundError:
        raise UserError(f"{path} not found. Pass the archive's path, or leave out --archive to download it.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or no .tar.gz archive ({error}). Fetch it again.") from error
    for name in ("train/pos", "train/neg", "test/pos", "test/neg"):
        if sum(review["id"].startswith(name) for review in reviews) < 2:  # of train, one to train on and one held out
            raise UserError(f"{path}: fewer than 2 reviews under aclImdb/{name}/. Is it the aclImdb archive?")
    return reviews


# ---------------------------------------------------------------------------------------------------------------------
# 2. Who gets which review


def _hash(purpose, review):
    """A whole number, as good as random, the same on every machine, independent from one purpose to the next."""
    return int.from_bytes(hashlib.sha256(f"{SEED}/{purpose}/{review['id']}".encode()).digest()[:8], "big")


def split(reviews):
    """-> {"train", "heldout", "test"}: lists of reviews, all different in text; and how many were left out.

    Of equal texts one stays, in train rather than in test: a review that a classifier saw must not test it.
    Reviews of under 3 words, which cannot be cut into a prompt and a completion, go too.
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
    test = parts["test/pos"] + parts["test/neg"]
    splits = {"train": train, "heldout": heldout, "test": test}
    shuffled = {name: sorted(part, key=lambda r: _hash("order", r)) for name, part in splits.items()}
    return shuffled, len(reviews) - len(texts)


def cut_prompt(review):
    """-> {"prompt", "completion"}: the text cut before the space after 2 to 8 words; at least one word is left over."""
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
    print(f"{archive}: {len(reviews):,} reviews read, {left_out} of them left out (duplicates, or under 3 words)")

    files = {f"reviews_{name}": part for name, part in splits.items()}
    for name, part in (("train", splits["train"]), ("test", splits["heldout"])):
        files[f"sft_{name}"] = [cut_prompt(review) for review in part]
        files[f"prompts_{name}"] = [{"prompt": row["prompt"]} for row in files[f"sft_{name}"]]
    for name, rows in sorted(files.items()):
        path = Path(settings.out) / f"{name}.jsonl"
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        positive = f", {sum(row['label'] for row in rows):,} of them positive" if name.startswith("reviews") else ""
        print(f"{path}: {len(rows):,} rows{positive}")
    known = {row["prompt"] for row in files["prompts_train"]}
    shared = sum(row["prompt"] in known for row in files["prompts_test"])
    print(f"{shared} of the {len(files['prompts_test'])} test prompts also open a training review, word for word")


if __name__ == "__main__":
    run_main(main)
