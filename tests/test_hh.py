"""The HH files: rows worked by hand, unusable rows, official folders, the split of a single file, damaged files."""

import gzip
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from conftest import need
from tiny import contents

import data
from data.hh import prepare
from data.preparing import LeftOut
from minidpo import dataset
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

NAMES = {f"{kind}_{split}.jsonl" for kind in ("pairs", "sft", "prompts") for split in ("train", "test")}


def dialogue(*turns):
    """ "a", "b", "c" -> "\\n\\nHuman: a\\n\\nAssistant: b\\n\\nHuman: c"."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def row(*turns, rejected):
    return {"chosen": dialogue(*turns), "rejected": dialogue(*turns[:-1], rejected)}


def some_rows(name, n):
    """n rows with one, two or three questions in turn."""
    rows = []
    for i in range(n):
        turns = [f"{name} question {i}?", "Well, yes."] + ["Why?", "Because."] * (i % 3)
        rows.append(row(*turns[:-1], f"good {i}", rejected=f"bad {i}"))
    return rows


def write(path, rows):
    """Writes rows (or raw lines as str) as an official file: gzip, one JSON object per line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode("utf-8")))
    return path


def write_official(folder):
    """The four subsets, 12 training rows and 6 test rows each."""
    for subset in prepare.SUBSETS:
        for split, n in (("train", 12), ("test", 6)):
            write(folder / subset / f"{split}.jsonl.gz", some_rows(f"{subset} {split}", n))
    return folder


def prepared(source, out, *more):
    prepare.main(["--source", str(source), "--out", str(out), *more])
    return {path.name: dataset.read_jsonl(path, ("prompt",)) for path in Path(out).iterdir()}


# ---- one row ----


def test_pair_by_hand():
    chosen, rejected = dialogue("Hi", "Hello!", "How?", "So. "), dialogue("Hi", "Hello!", "How?", "Not\n\nat all")
    assert prepare.to_pair({"chosen": chosen, "rejected": rejected}, "here") == {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How?\n\nAssistant:",
        "chosen": " So. ",
        "rejected": " Not\n\nat all",
    }


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        (dialogue("a", "b", "c", "d"), dialogue("a", "x", "c", "e"), "two different prompts"),
        (dialogue("a", "b"), dialogue("a", "b", "c", "d"), "two different prompts"),
        # as in the official files: one side has another turn that the other does not have
        (dialogue("a", "b") + "\n\nAssistant: more", dialogue("a", "c"), "two different prompts"),
        (dialogue("a", ""), dialogue("a", "b"), "an empty side"),
        (dialogue("a", "b"), dialogue("a", " \n"), "an empty side"),
        (dialogue("a", "b"), dialogue("a", "b "), "equal sides"),
        (dialogue("a", "b", "c"), dialogue("a", "d", "c"), "the human has the last word"),
        (dialogue("a"), dialogue("a"), "no dialogue"),
        ("\n\nAssistant: b", "\n\nAssistant: c", "no dialogue"),
        ("A good film.", "A bad film.", "no dialogue"),
        ("", "", "no dialogue"),
    ],
)
def test_unusable_rows_say_why(chosen, rejected, reason):
    with pytest.raises(LeftOut, match=reason):
        prepare.to_pair({"chosen": chosen, "rejected": rejected}, "here")


def test_a_speakers_name_inside_a_response_cuts_nothing():
    pair = prepare.to_pair(row("a", "Human: no. Assistant: b", rejected="c\nAssistant: d"), "here")
    assert (pair["chosen"], pair["rejected"]) == (" Human: no. Assistant: b", " c\nAssistant: d")


# ---- official files ----


def test_official_folder_keeps_its_split(tmp_path):
    files = prepared(write_official(tmp_path / "hh"), tmp_path / "out")
    assert set(files) == NAMES
    for split, n in (("train", 48), ("test", 24)):
        pairs = files[f"pairs_{split}.jsonl"]
        assert len(pairs) == n and all(f" {split} question" in pair["prompt"] for pair in pairs)
        assert all(
            pair["chosen"][:6] == " good " and pair["rejected"] == " bad " + pair["chosen"][6:] for pair in pairs
        )
        chosen = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
        assert files[f"sft_{split}.jsonl"] == chosen
        assert files[f"prompts_{split}.jsonl"] == [{"prompt": pair["prompt"]} for pair in pairs]
    first = {pair["prompt"].split()[1] for pair in files["pairs_train.jsonl"][:24]}
    assert first == set(prepare.SUBSETS), "not mixed"


def test_subsets_and_plain_files(tmp_path):
    folder = write_official(tmp_path / "hh")
    for split in ("train", "test"):  # as if unpacked by the user
        packed = folder / "helpful-base" / f"{split}.jsonl.gz"
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    files = prepared(folder, tmp_path / "out", "--subsets", "helpful-base,harmless-base")
    assert {row["prompt"].split()[1] for row in files["prompts_train.jsonl"]} == {"helpful-base", "harmless-base"}
    with pytest.raises(UserError, match="'helpful-bass'.*Did you mean 'helpful-base'"):
        prepared(folder, tmp_path / "out", "--subsets", "helpful-bass")
    (folder / "helpful-online" / "test.jsonl.gz").unlink()
    with pytest.raises(UserError, match="helpful-online/test.jsonl.gz not found.*--subsets"):
        prepared(folder, tmp_path / "out")


def test_a_test_prompt_is_never_trained_on(tmp_path, capsys):
    folder = write_official(tmp_path / "hh")
    shared = row("the same question", "good", rejected="bad")
    for name in ("helpful-base/train", "harmless-base/test"):
        write(folder / f"{name}.jsonl.gz", [shared, *some_rows(name, 3)])
    files = prepared(folder, tmp_path / "out")
    prompts = {split: {row["prompt"] for row in files[f"prompts_{split}.jsonl"]} for split in ("train", "test")}
    assert not prompts["train"] & prompts["test"]
    assert "\n\nHuman: the same question\n\nAssistant:" in prompts["test"]
    assert "1 training rows left out (the same prompt" in capsys.readouterr().out


def test_several_pairs_of_one_prompt_give_one_prompt(tmp_path):
    folder = write_official(tmp_path / "hh")
    for split in ("train", "test"):
        rows = [row(split, f"good {i // 2}", rejected=f"bad {i}") for i in range(4)]
        write(
            folder / "helpful-base" / f"{split}.jsonl.gz",
            [{k: v.replace("q", split) for k, v in r.items()} for r in rows],
        )
    files = prepared(folder, tmp_path / "out", "--subsets", "helpful-base")
    assert [len(files[f"{kind}_train.jsonl"]) for kind in ("pairs", "sft", "prompts")] == [4, 2, 1]


@pytest.mark.parametrize(
    "choice, train, test", [("no", {1, 2, 3}, {1, 2, 3}), ("test", {1, 2, 3}, {1}), ("all", {1}, {1})]
)
def test_single_turn(tmp_path, choice, train, test):
    files = prepared(write_official(tmp_path / "hh"), tmp_path / "out", "--single-turn", choice)
    for split, expected in (("train", train), ("test", test)):
        for kind in ("pairs", "sft", "prompts"):
            assert {row["prompt"].count("\n\nHuman:") for row in files[f"{kind}_{split}.jsonl"]} == expected


def test_download_asks_for_the_eight_files(tmp_path, monkeypatch):
    official = write_official(tmp_path / "hh")
    asked = []

    def download(url, target, digest, otherwise):
        asked.append((url, digest))
        return official / Path(*Path(target).parts[-2:])

    monkeypatch.setattr(prepare, "download", download)
    prepare.main(["--out", str(tmp_path / "out")])
    assert len({digest for _, digest in asked}) == 8 and all(re.fullmatch("sha256:[0-9a-f]{64}", d) for _, d in asked)
    assert {"/".join(url.split("/")[-2:]) for url, _ in asked} == {f"{name}.jsonl.gz" for name in prepare.SHA256}


# ---- a single file ----


def test_single_file_is_split_by_first_question(tmp_path):
    rows = some_rows("x", 300)
    rows += [row(f"x question {i}?", "Well, yes.", "And then?", "good again", rejected="bad again") for i in range(300)]
    files = prepared(write(tmp_path / "slice.jsonl.gz", rows), tmp_path / "out")
    first = {
        split: [row["prompt"].split("\n\nAssistant:")[0] for row in files[f"pairs_{split}.jsonl"]]
        for split in ("train", "test")
    }
    assert not set(first["train"]) & set(first["test"])
    assert len(first["train"]) + len(first["test"]) == 600
    assert 80 <= len(first["test"]) <= 160  # a fifth of 600; standard deviation of 300 coins, two rows each: 14


def test_order_in_the_file_does_not_matter(tmp_path):
    rows = some_rows("x", 40)
    prepared(write(tmp_path / "a.jsonl.gz", rows), tmp_path / "a")
    prepared(write(tmp_path / "b.jsonl.gz", rows[::-1]), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_out_is_where_the_trainers_look():
    with pytest.raises(UserError, match=f"{prepare.Settings().out}/no_such.jsonl not found.*data.hh.prepare"):
        data.find("hh", "no_such")


# ---- bad files ----


def tar(path):
    """A small archive in IMDb's layout."""
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("aclImdb/train/pos/0_9.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"Good"))
    return path.read_bytes()


def test_bad_files_say_where_and_touch_nothing(tmp_path):
    good = write(tmp_path / "good.jsonl.gz", some_rows("x", 40))
    prepared(good, tmp_path / "out")
    before = contents(tmp_path / "out")

    packed, text = good.read_bytes(), gzip.decompress(good.read_bytes())
    lines = text.split(b"\n")
    wrong_sum = bytearray(packed)
    wrong_sum[-8] ^= 1
    cases = {
        "cut.jsonl.gz": (packed[: len(packed) // 2], "damaged gzip"),
        "flipped.jsonl.gz": (bytes(wrong_sum), "line 40: damaged gzip"),
        "page.jsonl.gz": (b"<html>not found</html>", "damaged gzip"),
        "empty.jsonl.gz": (b"", "no usable row"),
        "blank.jsonl.gz": (gzip.compress(b"\n\n"), "no usable row"),
        "cut_line.jsonl": (text[:-60], "line 40: not JSON"),
        "half.jsonl.gz": (gzip.compress(b"\n".join([*lines[:2], lines[2][:50], *lines[3:]])), "line 3: not JSON"),
        "latin1.jsonl.gz": (gzip.compress(lines[0] + b"\n" + "{'é'}".encode("latin-1")), "line 2: not UTF-8"),
        "list.jsonl.gz": (gzip.compress(b'[{"transcript": "x"}]'), "line 1: a list"),
        "red_team.jsonl.gz": (gzip.compress(b'{"transcript": "x"}'), "line 1: no field 'chosen'"),
        "messages.jsonl.gz": (gzip.compress(b'{"chosen": [], "rejected": []}'), "line 1: 'chosen' is a list"),
        "reviews.jsonl.gz": (gzip.compress(b'{"chosen": "Good.", "rejected": "Bad."}'), "no usable row"),
        "aclImdb.tar.gz": (tar(tmp_path / "tar"), "line 1: not"),
        "pointer.jsonl.gz": (b"version https://git-lfs.github.com/spec/v1\n", "damaged gzip"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            prepared(tmp_path / name, tmp_path / "out")
    with pytest.raises(UserError, match="not_there not found"):
        prepared(tmp_path / "not_there", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_no_row_left_for_one_side_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no row is left for"):
        prepared(write(tmp_path / "one.jsonl.gz", some_rows("x", 1)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the real thing ----


def slice_path():
    path = os.environ.get("MINIDPO_HH_SLICE", "")
    need(path, "MINIDPO_HH_SLICE names no slice of HH")
    return path


def turns(text):
    """[(speaker, text)], computed in another way than the code does: a blank line and a name start a turn."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    assert parts[0] == ""
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_slice_row_by_row(tmp_path, capsys):
    rows = [json.loads(line) for line in gzip.decompress(Path(slice_path()).read_bytes()).splitlines()]
    files = prepared(slice_path(), tmp_path)
    said = capsys.readouterr().out
    expected, reasons = {}, {"two different prompts": 0, "an empty side": 0, "equal sides": 0}
    for r in rows:
        chosen, rejected = turns(r["chosen"]), turns(r["rejected"])
        assert chosen[-1][0] == rejected[-1][0] == "Assistant"
        if chosen[:-1] != rejected[:-1]:
            reasons["two different prompts"] += 1
        elif not chosen[-1][1].strip() or not rejected[-1][1].strip():
            reasons["an empty side"] += 1
        elif chosen[-1] == rejected[-1]:
            reasons["equal sides"] += 1
        else:
            expected[r["chosen"], r["rejected"]] = chosen[-1][1]
    assert f"{len(rows)} rows, {sum(reasons.values())} left out" in said
    assert all((f"{reason}: {n}" in said) == (n > 0) for reason, n in reasons.items())
    pairs = files["pairs_train.jsonl"] + files["pairs_test.jsonl"]
    whole = {(p["prompt"] + p["chosen"], p["prompt"] + p["rejected"]): p["chosen"] for p in pairs}
    assert whole == expected and len(pairs) == len(expected)
    assert all(p["chosen"].startswith(" ") and p["prompt"].endswith("\n\nAssistant:") for p in pairs)


def test_long_dialogues_lose_their_beginning_not_their_response(tmp_path, capsys):
    """In a short context, training keeps the end of the prompt and both whole responses."""
    prepared(slice_path(), tmp_path)
    records = dataset.read_jsonl(tmp_path / "pairs_test.jsonl", dataset.PAIR)
    tokenizer = Tokenizer.train([text for r in records for text in r.values()], 400)
    rows, counts = dataset.encode(records, dataset.PAIR, tokenizer, 256)
    assert counts["prompt cut"] > 10 and len(rows) == len(records)
    n_cut = 0
    for record, (prompt, *responses) in zip(records, rows, strict=True):
        assert len(prompt) + max(map(len, responses)) - 1 <= 256
        assert record["prompt"].encode().endswith(b"".join(tokenizer.tokens[i] for i in prompt[1:]))
        for side, response in zip(("chosen", "rejected"), responses, strict=True):
            if response[-1] == tokenizer.eot:
                assert tokenizer.decode(response[:-1]) == record[side]
            else:
                n_cut += 1
                assert len(prompt) == 1 + 8, "a response is cut only if the prompt cannot be cut further"
    assert n_cut == counts["response cut"] > 0
