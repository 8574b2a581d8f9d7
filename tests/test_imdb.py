"""The IMDb files: which review goes where, text and prompts by hand, damaged archives. The commands of docs/imdb.md."""

import gzip
import importlib
import io
import itertools
import json
import os
import random
import re
import shlex
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import need
from tiny import BAD, GOOD, SUBJECTS, call, contents

import data
from data.imdb import prepare
from minidpo.dataset import PAIR, read_jsonl
from minidpo.files.vocabulary import save_vocabulary
from minidpo.report import read_metrics
from minidpo.settings import UserError, settings_of
from minidpo.tokenizer import Tokenizer

try:
    import transformers
except ImportError:
    transformers = None
PAGE = Path(prepare.__file__).parents[2] / "docs" / "imdb.md"

FILES = {
    *(f"{kind}_{name}.jsonl" for kind in ("sft", "prompts") for name in ("train", "test")),
    *(f"reviews_{name}.jsonl" for name in ("train", "heldout", "test")),
}


def make_archive(path, members):
    """Writes an archive; members: {name under aclImdb/: text}."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            data = text.encode("utf-8")
            info = tarfile.TarInfo(f"aclImdb/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def some_reviews(n=60, n_test=5):
    """n training and n_test test reviews of each label, all different, of 3 to 40 words."""
    rng = random.Random(1)
    members = {}
    for part, count in (("train", n), ("test", n_test)):
        for label, stars in (("pos", 9), ("neg", 2)):
            for i in range(count):
                words = [f"w{rng.randrange(10**6)}" for _ in range(rng.randint(3, 40))]
                members[f"{part}/{label}/{i}_{stars}.txt"] = " ".join(words)
    return members


def prepared(archive, out):
    prepare.main(["--archive", str(archive), "--out", str(out)])
    return {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        for path in Path(out).iterdir()
    }


# ---- the split ----


def test_splits_share_no_review_and_lose_none(tmp_path):
    members = some_reviews()
    files = prepared(make_archive(tmp_path / "a.tar.gz", members), tmp_path / "out")
    assert set(files) == FILES
    ids = {name: {row["id"] for row in files[f"reviews_{name}.jsonl"]} for name in ("train", "heldout", "test")}
    assert sorted(i for part in ids.values() for i in part) == sorted(name[:-4] for name in members)
    assert all(i.startswith("test/") for i in ids["test"])
    for label in (0, 1):  # one in 25 of 60, rounded up
        assert sum(row["label"] == label for row in files["reviews_heldout.jsonl"]) == 3
    for ours, reviews in (("train", "train"), ("test", "heldout")):
        whole = [row["prompt"] + row["completion"] for row in files[f"sft_{ours}.jsonl"]]
        assert whole == [row["text"] for row in files[f"reviews_{reviews}.jsonl"]]
        prompts = [{"prompt": row["prompt"]} for row in files[f"sft_{ours}.jsonl"]]
        assert files[f"prompts_{ours}.jsonl"] == prompts
    labels = [row["label"] for row in files["reviews_train.jsonl"]]
    assert 20 < sum(a != b for a, b in zip(labels, labels[1:], strict=False)) < 95, "sorted by label"


def test_rows_hold_what_the_file_names_say(tmp_path):
    members = some_reviews() | {"train/neg/77_4.txt": "one two three four"}
    files = prepared(make_archive(tmp_path / "a.tar.gz", members), tmp_path / "out")
    rows = {row["id"]: row for name in ("train", "heldout") for row in files[f"reviews_{name}.jsonl"]}
    assert rows["train/neg/77_4"] == {"text": "one two three four", "label": 0, "rating": 4, "id": "train/neg/77_4"}
    assert (rows["train/pos/0_9"]["label"], rows["train/pos/0_9"]["rating"]) == (1, 9)


def test_archive_order_does_not_matter(tmp_path):
    members = some_reviews()
    backwards = dict(reversed(members.items()))
    prepared(make_archive(tmp_path / "a.tar.gz", members), tmp_path / "a")
    prepared(make_archive(tmp_path / "b.tar.gz", backwards), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_equal_texts_stay_once_and_in_train(tmp_path, capsys):
    members = some_reviews()
    for i in range(5):
        members[f"test/neg/{i}_2.txt"] = members[f"train/neg/{i}_2.txt"]
    members["train/pos/1_9.txt"] = members["train/pos/2_9.txt"].replace(" ", " <br /><br />", 1)
    members["train/pos/3_9.txt"] = "Too short"
    files = prepared(make_archive(tmp_path / "a.tar.gz", members), tmp_path / "out")
    rows = [row for name in ("train", "heldout", "test") for row in files[f"reviews_{name}.jsonl"]]
    assert len({row["text"] for row in rows}) == len(rows) == len(members) - 7
    assert "7 of them left out" in capsys.readouterr().out
    ids = {row["id"] for row in rows}
    assert all(f"train/neg/{i}_2" in ids and f"test/neg/{i}_2" not in ids for i in range(5))


def test_other_files_in_the_archive_are_ignored(tmp_path):
    members = some_reviews()
    more = {"train/unsup/1_0.txt": "not this one", "imdb.vocab": "the", "train/labeledBow.feat": "9 0:1", "README": "x"}
    more["train/pos/._1_9.txt"] = "a Mac's shadow file"
    prepared(make_archive(tmp_path / "a.tar.gz", members), tmp_path / "a")
    prepared(make_archive(tmp_path / "b.tar.gz", members | more), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ---- text and prompts ----


def test_clean_by_hand():
    assert prepare.clean("  Good.<br /><br />Bad\t\tfilm,<br>  5 < 6 \n") == "Good. Bad film, 5 < 6"


@pytest.mark.parametrize(
    "text", ["one two three", "a b c d e", " ".join("abcdefghijkl"), "Ein 🎬 für “alle”, 映画 ok, ja?"]
)
def test_trap02_prompt_is_2_to_8_whole_words_and_the_space_is_the_completions(text):
    counts = set()
    for i in range(200):
        row = prepare.cut_prompt({"text": text, "id": f"train/pos/{i}"})
        assert row["prompt"] + row["completion"] == text
        assert row["completion"].startswith(" ") and not row["prompt"].endswith(" ")
        counts.add(len(row["prompt"].split()))
    assert counts == {n for n in range(2, 9) if n < len(text.split())}


# ---- bad archives ----


def test_missing_or_damaged_archive_says_so_and_touches_nothing(tmp_path):
    good = make_archive(tmp_path / "good.tar.gz", some_reviews())
    prepared(good, tmp_path / "out")
    before = contents(tmp_path / "out")

    data = good.read_bytes()
    tar = gzip.decompress(data)
    bad_header = bytearray(data)
    bad_header[-8] ^= 1  # gzip's checksum, which comes after everything that tarfile reads
    cases = {
        "cut.tar.gz": data[: len(data) // 2],
        "flipped.tar.gz": bytes(bad_header),
        "cut_tar.tar.gz": gzip.compress(tar[: len(tar) // 2 + 100]),
        "page.tar.gz": b"<html>not found</html>",
        "empty.tar.gz": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    make_archive(tmp_path / "no_neg.tar.gz", {k: v for k, v in some_reviews().items() if "train/neg" not in k})
    for name in [*cases, "no_neg.tar.gz", "not_there.tar.gz"]:
        with pytest.raises(UserError, match=name):
            prepared(tmp_path / name, tmp_path / "out")
        assert contents(tmp_path / "out") == before, name


# ---- the real thing ----


def test_slice(tmp_path):
    archive = os.environ.get("MINIDPO_IMDB_SLICE", "")
    need(archive, "MINIDPO_IMDB_SLICE names no IMDb archive")
    files = prepared(archive, tmp_path)
    counts = {name: len(rows) for name, rows in files.items()}
    assert counts["reviews_train.jsonl"] == counts["sft_train.jsonl"] == counts["prompts_train.jsonl"] > 23_000
    assert counts["reviews_heldout.jsonl"] == counts["sft_test.jsonl"] == counts["prompts_test.jsonl"] > 900
    for name in ("train", "heldout", "test"):
        rows = files[f"reviews_{name}.jsonl"]
        assert 0.49 < sum(row["label"] for row in rows) / len(rows) < 0.51
        assert all((row["rating"] >= 7) == row["label"] for row in rows)
        assert not any("<br" in row["text"] or "  " in row["text"] for row in rows)


# ---- the commands of docs/imdb.md ----


def commands(heading):
    """The commands of one section of the page, in order; a block of Python is one command."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1]

    def unroll(loop):
        return "".join(loop["body"].replace(f"${loop['name']}", value) for value in loop["values"].split())

    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", section, re.M | re.S):
        if language == "python":
            yield block
        else:
            loop = r"^for (?P<name>\w+) in (?P<values>.*); do\n(?P<body>.*?)^done\n"
            yield from re.sub(loop, unroll, block.replace("\\\n", ""), flags=re.M | re.S).splitlines()


def execute(command):
    if "\n" in command:
        exec(command, {})
        return
    python, *arguments = shlex.split(command, comments=True)
    assert python == "python", command
    name, *flags = arguments[1:] if arguments[0] == "-m" else [arguments[0].removesuffix(".py"), *arguments[1:]]
    call(importlib.import_module(name).main, *flags)


def test_the_commands_of_the_papers_set_up(tmp_path, monkeypatch):
    """All of them, as they stand on the page, with a random GPT-2 and 72 invented training reviews."""
    need(transformers, "needs transformers and safetensors: pip install minidpo[hf,bench]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.FOLDERS, "imdb", tmp_path / "data" / "imdb")
    members = {}
    for label, stars, ends in (("pos", 9, GOOD), ("neg", 2, BAD)):
        texts = [" ".join(parts) for parts in itertools.product(SUBJECTS, ends, SUBJECTS, ends)]
        for i, text in enumerate(random.Random(0).sample(texts, 38)):
            members[f"{'train' if i < 36 else 'test'}/{label}/{i}_{stars}.txt"] = text
    make_archive("reviews.tar.gz", members)
    tokenizer = Tokenizer.train(members.values(), 400)
    shape = dict(vocab_size=tokenizer.vocab_size, n_positions=64, n_layer=1, n_head=2, n_embd=32)
    torch.manual_seed(0)
    config = transformers.GPT2Config(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot, **shape)
    transformers.GPT2LMHeadModel(config).save_pretrained("random")
    save_vocabulary(tokenizer, Path("random"))
    smaller = {
        "data.imdb.prepare": "data.imdb.prepare --archive reviews.tar.gz --out data/imdb",
        "--init gpt2-large": "--init random",
        "--eval-every 50": "--eval-every 1",
    }

    run, evaluated = Path("runs/imdb-large"), []
    for command in [*list(commands("The commands"))[:2], *commands("The paper's own set-up: GPT-2-large")]:
        for text, replacement in smaller.items():
            command = command.replace(text, replacement)
        execute(command)
        if "train_sft" in command:
            evaluated.append([line["step"] for line in read_metrics(run / "sft") if "eval/loss" in line])

    assert evaluated == [[1, 2], [1, 2, 3, 4], [1, 2, 3]]  # one pass is 2 steps: one pass, two, and one and a half
    prompts = [row["prompt"] for row in read_jsonl(run / "prompts_train.jsonl", ("prompt",))]
    assert {len(tokenizer.encode(prompt)) for prompt in prompts} == set(range(2, 9))
    pairs = Counter(row["prompt"] for row in read_jsonl(run / "pairs_train.jsonl", PAIR))
    assert max(pairs[prompt] for prompt in prompts if prompts.count(prompt) == 1) == 6
    for beta in (0.05, 0.1, 1, 5):
        settings = settings_of(run / f"dpo-{beta}")
        assert (settings["beta"], settings["settings"], settings["optimizer"]) == (beta, "paper", "rmsprop")
        figures = json.loads((run / f"evaluation-{beta}.json").read_text(encoding="utf-8"))
        assert figures["samples"] == 4 and abs(figures["kl_exact"]) < 1e-3  # 7 steps of the warm-up hardly move it
    assert len(list((run / "reference_logps").iterdir())) == 1  # the four runs share it
