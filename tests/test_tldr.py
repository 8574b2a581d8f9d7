"""The TL;DR files, from files made here in the published formats: queries worked by hand, splits, counts, errors."""

import csv
import json
import re
from pathlib import Path

import pytest
from tiny import contents, write_jsonl

import data
from data.preparing import LeftOut
from data.tldr import prepare
from minidpo import dataset
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

NAMES = {f"{kind}_{split}.jsonl" for kind in ("pairs", "sft", "prompts") for split in ("train", "valid", "test")}


@pytest.fixture(scope="session")
def bytewise(tmp_path_factory):
    """A tokenizer file without merges: each byte is a token, so lengths are easy to count."""
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    Tokenizer.train([], 257).save(path)
    return path


def post(name, text="We had a car. Now we have none.", summary="No car."):
    """A line of tldr_3_filtered."""
    return {"id": f"t3_{name}", "subreddit": "cars", "title": f"On {name}", "post": text, "summary": summary}


def comparison(name, split="train", texts=(" Good.", " Bad."), choice=0, **changes):
    """A line of comparisons/."""
    info = {key: post(name)[key] for key in ("id", "post", "title", "subreddit")}
    summaries = [
        {"text": text, "policy": policy, "note": None} for text, policy in zip(texts, ("ref", "sup2"), strict=False)
    ]
    record = {"info": info, "summaries": summaries, "choice": choice, "worker": "w", "batch": "b", "split": split}
    return record | {"extra": {"confidence": 8}} | changes


def article_row(name):
    """A line of comparisons/ of the CNN/DailyMail batches."""
    info = {"id": name, "site": "cnn", "title": "News", "article": "It happened."}
    return comparison(name, info=info)


def write_release(folder, **more):
    """5 posts per split and 2 comparisons of each of 5 other posts; `more` adds lines: train=[...], batch3=[...]."""
    for name in ("tldr_3_filtered", "comparisons"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "valid", "test"):
        rows = [post(f"{split} {i}") for i in range(5)]
        write_jsonl(folder / "tldr_3_filtered" / f"{split}.jsonl", rows + more.get(split, []))
    rows = [comparison(f"pair {split} {i}", split) for split in ("train", "valid1", "valid2") for i in range(5)]
    write_jsonl(folder / "comparisons" / "batch3.json", rows + more.get("batch3", []))
    write_jsonl(
        folder / "comparisons" / "batch11.json", [{**row, "choice": 1} for row in rows] + more.get("batch11", [])
    )
    return folder


@pytest.fixture
def prepared(tmp_path, bytewise):
    """prepared(source, *more flags) -> {file name: rows}"""

    def call(source, *more, out=tmp_path / "out"):
        prepare.main(["--source", str(source), "--out", str(out), "--tokenizer", str(bytewise), *map(str, more)])
        return {path.name: dataset.read_jsonl(path, ("prompt",)) for path in Path(out).iterdir()}

    return call


# ---- the query ----


@pytest.fixture
def query(bytewise):
    """query(head, text, limit) of `prepare`, in bytes."""
    return lambda head, text, limit: prepare.query_maker(Tokenizer.load(bytewise), limit, {"cut": 0})(head, text)


def test_query_by_hand(query):
    found = prepare.post_query(post("it", "One.\n\nTwo."), "here", lambda head, text: query(head, text, 512))
    assert found == "SUBREDDIT: r/cars\n\nTITLE: On it\n\nPOST: One.\n\nTwo.\n\nTL;DR:"


def test_long_posts_lose_lines_from_the_end_then_characters(query):
    end = "\n\nTL;DR:"
    text = "first line\nsecond\n\nthird"
    whole = len("HEAD " + text + end)
    assert query("HEAD ", text, whole) == "HEAD " + text + end
    # only the last line break goes, with the text after it; the line break before it stays
    assert query("HEAD ", text, whole - 1) == "HEAD first line\nsecond\n" + end
    assert query("HEAD ", text, whole - 7) == "HEAD first line\nsecond" + end
    assert query("HEAD ", text, len("HEAD first line" + end)) == "HEAD first line" + end
    assert query("HEAD ", text, len("HEAD first" + end)) == "HEAD first" + end
    assert query("HEAD ", text, len("HEAD f" + end)) == "HEAD f" + end
    for room in (-1, 0):  # a query without any text is left out, too
        with pytest.raises(LeftOut, match="no room"):
            query("HEAD ", text, len("HEAD " + end) + room)


def test_characters_are_not_cut_in_two(query):
    end = "\n\nTL;DR:"
    assert query("", "äöü", len("ä".encode() + end.encode()) + 1) == "ä" + end


@pytest.mark.parametrize("limit", range(40, 400, 9))
def test_query_against_one_character_at_a_time(limit, tmp_path):
    """The published rule, step by step, with a BPE that has merges."""
    text = "Why, the car was gone and the dog was gone.\nThe car!  " + "gone, " * 20 + "\n\nWhat can we do?\n" * 3
    tokenizer = Tokenizer.train([text], 300)
    kept = text
    while len(tokenizer.encode("TITLE: x\n\nPOST: " + kept + "\n\nTL;DR:")) > limit:
        kept = kept[: kept.rindex("\n")] if "\n" in kept else kept[:-1]
    counts = {"cut": 0}
    assert prepare.query_maker(tokenizer, limit, counts)("TITLE: x\n\nPOST: ", text) == (
        "TITLE: x\n\nPOST: " + kept + "\n\nTL;DR:"
    )
    assert counts["cut"] == (kept != text)


# ---- one row ----


def pair_of(record):
    return prepare.to_pair(record, "here", lambda head, text: head + text + "\n\nTL;DR:")


@pytest.mark.parametrize("choice", [0, 1])
def test_choice_names_the_chosen_one(choice):
    split, pair = pair_of(comparison("it", "valid2", (" first ", "second"), choice))
    sides = (" first", " second")  # one space before, none after, whatever the release has
    assert split == "test"
    assert (pair["chosen"], pair["rejected"]) == (sides[choice], sides[1 - choice])
    assert pair["prompt"].startswith("SUBREDDIT: r/cars\n\nTITLE: On it\n\nPOST: We had a car.")


@pytest.mark.parametrize(
    "record, reason",
    [
        (comparison("x", texts=("  ", "b")), "an empty summary"),
        (comparison("x", texts=("a", "")), "an empty summary"),
        (comparison("x", texts=(" a", "a ")), "two equal summaries"),
        (article_row("x"), "an article, not a post"),
    ],
)
def test_unusable_rows_say_why(record, reason):
    with pytest.raises(LeftOut, match=reason):
        pair_of(record)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"choice": 2}, "'choice' is 2"),
        ({"choice": None}, "'choice' is None"),
        ({"choice": True}, "'choice' is True"),
        ({"split": "test"}, "'split' is 'test'; it must be one of train, valid1, valid2"),
        ({"split": ["train"]}, "'split' is"),
        ({"summaries": [{"text": "one"}]}, "a list of two"),
        ({"summaries": ["one", "two"]}, "no field 'text'"),
        ({"summaries": [{"text": "one"}, {"text": None}]}, "'text' is a NoneType"),
        ({"info": None}, "'info' must be an object"),
        ({"info": {"post": "x", "title": "y"}}, "no field 'subreddit'"),
        ({"info": {"post": "x", "title": None, "subreddit": "z"}}, "'title' is a NoneType"),
    ],
)
def test_rows_in_another_format_are_errors(changes, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        pair_of(comparison("x", **changes))


# ---- the release ----


def test_release_keeps_its_splits(tmp_path, prepared):
    files = prepared(write_release(tmp_path / "release"))
    assert set(files) == NAMES
    for ours, theirs in (("train", "train"), ("valid", "valid1"), ("test", "valid2")):
        sft, pairs = files[f"sft_{ours}.jsonl"], files[f"pairs_{ours}.jsonl"]
        assert sorted(re.search("TITLE: On (.*)", row["prompt"])[1] for row in sft) == [f"{ours} {i}" for i in range(5)]
        assert all(row["completion"] == " No car." for row in sft)
        assert files[f"prompts_{ours}.jsonl"] == [{"prompt": row["prompt"]} for row in sft]
        expected = sorted((f"pair {theirs} {i}", side) for i in range(5) for side in (" Good.", " Bad."))
        assert sorted((re.search("TITLE: On (.*)", row["prompt"])[1], row["chosen"]) for row in pairs) == expected
        assert all({row["chosen"], row["rejected"]} == {" Good.", " Bad."} for row in pairs)


def test_rows_left_out_are_counted(tmp_path, prepared, capsys):
    long = post("long", "x" * 600)
    more = {
        "train": [post("x", summary=" "), post("y" * 600), long, post("test 3")],
        "batch3": [
            comparison("z", texts=("a", "a")),
            article_row("n"),
            comparison("test 4"),
            comparison("pair valid1 1"),
        ],
    }
    files = prepared(write_release(tmp_path / "release", **more), "--max-query-tokens", 512)
    said = capsys.readouterr().out
    assert "train.jsonl: 9 rows, 2 left out (an empty summary: 1, no room for the text after its title: 1)" in said
    assert "batch3.json: 19 rows, 2 left out (an article, not a post: 1, two equal summaries: 1)" in said
    assert "1 different posts were cut to 512 tokens" in said
    assert "sft_train: 1 rows left out (the same prompt is in valid or test)" in said
    assert "pairs_train: 2 rows left out (the same prompt is in valid or test)" in said
    lengths = [len(row["prompt"]) for row in files["prompts_train.jsonl"]]
    assert len(lengths) == 6 and max(lengths) == 512
    prompts = {name: {row["prompt"] for row in rows} for name, rows in files.items()}
    train = prompts["sft_train.jsonl"] | prompts["pairs_train.jsonl"]
    assert not any(train & prompts[f"{kind}_{split}.jsonl"] for kind in ("sft", "pairs") for split in ("valid", "test"))


def test_twice_gives_the_same_bytes(tmp_path, prepared):
    release = write_release(tmp_path / "release")
    prepared(release, out=tmp_path / "a")
    (release / "comparisons" / "batch3.json").rename(release / "comparisons" / "batch9.json")
    prepared(release, out=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_download_asks_for_the_published_addresses(tmp_path, bytewise, monkeypatch):
    release, asked = write_release(tmp_path / "release"), []
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    monkeypatch.setattr(prepare, "download", lambda url, target, otherwise: asked.append((url, target)))
    release.rename(tmp_path / "download")
    prepare.main(["--out", str(tmp_path / "out"), "--tokenizer", str(bytewise)])
    assert len(asked) == 3 + 20
    for url, target in asked:
        folder = "dataset/comparisons" if url.endswith(".json") else "datasets/tldr_3_filtered"
        assert url == f"https://openaipublic.blob.core.windows.net/summarize-from-feedback/{folder}/{target.name}"
        assert target.parent == tmp_path / "download" / folder.split("/")[1]


def test_out_is_where_the_trainers_look():
    with pytest.raises(UserError, match=f"{prepare.Settings().out}/no_such.jsonl not found.*data.tldr.prepare"):
        data.find("tldr", "no_such")


def test_bad_files_say_where_and_touch_nothing(tmp_path, prepared):
    release = write_release(tmp_path / "release")
    prepared(release)
    before = contents(tmp_path / "out")
    cases = [
        ("tldr_3_filtered/valid.jsonl", b'{"id": "x"', "valid.jsonl, line 1: not JSON"),
        (
            "tldr_3_filtered/valid.jsonl",
            b'\n{"prompt": "x", "chosen": "y"}',
            "valid.jsonl, line 2: no field 'subreddit'",
        ),
        ("tldr_3_filtered/valid.jsonl", b"", "no row is left for sft_valid"),
        ("tldr_3_filtered/train.jsonl", json.dumps(post(1) | {"title": 3}).encode(), "line 1: 'title' is a int"),
        (
            "comparisons/batch3.json",
            b'{"info": {"id": "x"}, "summary": {}}',
            "batch3.json, line 1: no field 'summaries'",
        ),
        ("comparisons/batch3.json", b"\xff\xfe", "batch3.json, line 1: not UTF-8"),
        ("comparisons/batch3.json", b"<?xml version='1.0'?><Error>", "batch3.json, line 1: not JSON"),
        ("tldr_3_filtered/test.jsonl", None, "test.jsonl not found"),
    ]
    for name, content, message in cases:
        path = release / name
        good = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            prepared(release)
        path.write_bytes(good)
    for path in (release / "comparisons").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="comparisons/batch3.json not found"):
        prepared(release)
    with pytest.raises(UserError, match="nowhere/tldr_3_filtered/train.jsonl not found"):
        prepared(tmp_path / "nowhere")
    assert contents(tmp_path / "out") == before


# ---- news articles ----

ARTICLE = "By A. Writer .\n\nIt rained, “a lot”.\n\nThen it stopped."
EXPECTED = {"prompt": f"Article:\n\n{ARTICLE}\n\nTL;DR:", "completion": " It rained. Did it stop? Yes."}


def write_story(folder):
    (folder / "cnn" / "stories").mkdir(parents=True)
    text = f"{ARTICLE}\n\n@highlight\n\nIt rained\n\n@highlight\n\nDid it stop?\n\n@highlight\n\nYes"
    (folder / "cnn" / "stories" / "0a1b.story").write_text(text, encoding="utf-8")
    return folder


def write_csv(path):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "article", "highlights"])
        writer.writerow(["0a1b", ARTICLE, "It rained .\nDid it stop?\nYes .".replace(" .", ".")])
    return path


def write_json(path):
    return write_jsonl(path, [{"id": "0a1b", "article": ARTICLE, "highlights": "It rained\nDid it stop?\nYes"}])


@pytest.mark.parametrize("write, name", [(write_story, "stories"), (write_csv, "test.csv"), (write_json, "test.jsonl")])
def test_articles_become_prompts(tmp_path, prepared, write, name):
    files = prepared(write_release(tmp_path / "release"), "--cnndm", write(tmp_path / name))
    assert set(files) == NAMES | {"cnndm_test.jsonl"}
    assert files["cnndm_test.jsonl"] == [EXPECTED]


def test_bad_articles_say_where(tmp_path, prepared):
    release = write_release(tmp_path / "release")
    (tmp_path / "empty").mkdir()
    latin1 = tmp_path / "latin1.csv"
    latin1.write_bytes("id,article,highlights\n1,é,b\n".encode("latin-1"))
    quote = tmp_path / "quote.csv"
    quote.write_text('id,article,highlights\n1,"a,b', encoding="utf-8")
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("text,label\ngood,1\n", encoding="utf-8")
    short = tmp_path / "short.csv"
    short.write_text("id,article,highlights\n1,a,b\n2,a\n", encoding="utf-8")
    story = write_story(tmp_path / "latin1") / "cnn" / "stories" / "0a1b.story"
    story.write_bytes("é".encode("latin-1"))
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [{"article": " ", "highlights": "x"}])
    for path, message in (
        (tmp_path / "empty", "empty: no usable article"),
        (latin1, "latin1.csv, after line .: not CSV in UTF-8"),
        (quote, "quote.csv, after line .: not CSV"),
        (reviews, "reviews.csv, line 2: no field 'article'"),
        (short, "short.csv, line 3: 'highlights' is a NoneType"),
        (story.parents[2], "0a1b.story: not UTF-8"),
        (nothing, "nothing.jsonl: no usable article"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(release, "--cnndm", path)
    with pytest.raises(FileNotFoundError, match="no_such.csv"):  # `run_main` prints it without a traceback
        prepared(release, "--cnndm", tmp_path / "no_such.csv")
    assert not (tmp_path / "out").exists()
