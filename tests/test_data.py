"""From JSONL to batches: what a file may hold, what truncation keeps, and which position is scored."""

import csv
import gzip
import itertools
import json
import os
import random
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import write_jsonl

import data
from data import convert
from data.toy_sentiment import generate as toy
from minidpo import checkpoint, dataset
from minidpo.dataset import PAIR, Rows, encode, preference_batch, read_jsonl, sft_batch
from minidpo.dataset import cut_to_context as cut
from minidpo.files.jsonl import texts
from minidpo.model import GPT, GPTConfig
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

ROOT = Path(dataset.__file__).parent.parent
BYTES = Tokenizer.train([], 257)  # one token per byte, and eot, which is 256
EOT = 256


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def ids(text):
    return list(text.encode())


# ---- files ----


def test_read_jsonl_takes_any_text_and_any_further_field(tmp_path):
    texts = [
        "plain",
        "",
        "Größe, 映画, фильм, 😀👩‍👩‍👧, e\u0301",
        "NUL \0, line \u2028 and paragraph \u2029 separators, NEL \x85, \v, \f, tab\t, \r\n",
        "<|endoftext|> \\ \" ' {}",
        "a line of one megabyte " * 50_000,
    ]
    records = [{"prompt": text, "completion": text, "n": 1, "more": None} for text in texts]
    raw = "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    path = tmp_path / "rows.jsonl"
    for content in (raw, raw + "\n", "\ufeff" + raw, "\n \t\n" + raw.replace("\n", "\r\n\r\n"), raw + "\n\n\n"):
        path.write_bytes(content.encode("utf-8"))
        assert read_jsonl(path, ("prompt", "completion")) == records
    path.write_bytes("\n".join(map(json.dumps, records)).encode("ascii"))  # with escapes: "\ud83d\ude00" is one emoji
    assert read_jsonl(path, ("prompt", "completion")) == records


GOOD_LINE = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "a", "completion": "b"', "not JSON"),
        (b'{"prompt": "a"} {"completion": "b"}', "not JSON"),
        (b"prompt,completion", "not JSON"),
        (b'{"prompt": "a raw \0 NUL", "completion": "b"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"prompt": "a"}', "no field 'completion'"),
        (b'{"prompt": "a", "completion": 3}', "'completion' is a int; it must be a string"),
        (b'{"prompt": null, "completion": "b"}', "'prompt' is a NoneType; it must be a string"),
        (b'{"prompt": ["a"], "completion": "b"}', "'prompt' is a list; it must be a string"),
        (b'["a", "b"]', "a list. Each line must be an object with prompt, completion"),
        (b'"a"', "a str. Each line must be an object"),
        (b"null", "a NoneType. Each line must be an object"),
        ('{"prompt": "größer", "completion": "b"}'.encode("latin-1"), "not UTF-8"),
        ('{"prompt": "a", "completion": "b"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "half: \\ud83d", "completion": "b"}', "'prompt' holds half a character"),
        (b'{"prompt": "a", "completion": "\xed\xa0\xbd"}', "not UTF-8"),
    ],
)
def test_read_jsonl_names_file_line_and_fault(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD_LINE + b"\n" + GOOD_LINE + line + b"\n" + GOOD_LINE)
    with pytest.raises(UserError) as error:
        read_jsonl(path, ("prompt", "completion"))
    assert f"{path}, line 4: " in str(error.value) and message in str(error.value)
    path.write_bytes(line)  # as the first line, without an end
    with pytest.raises(UserError, match="line 1: "):
        read_jsonl(path, ("prompt", "completion"))


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n"])
def test_read_jsonl_refuses_an_empty_file(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="rows.jsonl is empty.*prompt, chosen, rejected"):
        read_jsonl(path, dataset.PAIR)


def test_find_says_how_to_get_what_is_missing(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "mine.jsonl", [{}])
    assert data.find(str(path), "pairs_train") == path
    with pytest.raises(UserError, match=r"nothing\.jsonl not found"):
        data.find(str(tmp_path / "nothing.jsonl"), "pairs_train")
    with pytest.raises(UserError, match="unknown data 'imbd'. Did you mean 'imdb'"):
        data.find("imbd", "pairs_train")
    monkeypatch.setattr(data, "HERE", tmp_path / "data")  # a copy without data
    with pytest.raises(UserError, match="sft_train.jsonl not found. Make it first: python -m data.imdb.prepare"):
        data.find("imdb", "sft_train")
    with pytest.raises(UserError, match="pairs_train.jsonl not found.*python -m experiments.make_pairs"):
        data.find("imdb", "pairs_train")


# ---- the forms of rows and files that people have (docs/data.md) ----


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASK, GREEN, SPOON = user("Name a colour."), assistant("Green."), assistant("A spoon.")
HH = "\n\nHuman: Name a colour.\n\nAssistant:"
COLOUR = pair(HH, " Green.", " A spoon.")
LONG_HH = "\n\nHuman: Hi\n\nAssistant: Hello!" + HH
LONG_CHAT = [user("Hi"), assistant("Hello!"), ASK]
PAIR_FORMS = {
    "prompt and responses as messages": (pair([ASK], [GREEN], [SPOON]), COLOUR),
    "messages, several turns": (pair(LONG_CHAT, [GREEN], [SPOON]), pair(LONG_HH, " Green.", " A spoon.")),
    "whole chats, no prompt": ({"chosen": [ASK, GREEN], "rejected": [ASK, SPOON]}, COLOUR),
    "whole chats beside the first message": (pair("Name a colour.", [ASK, GREEN], [ASK, SPOON]), COLOUR),
    "empty keys, as Parquet fills them": (pair([{**ASK, "tool_calls": None}], [GREEN], [SPOON]), COLOUR),
    "an empty response": (pair([ASK], [assistant("")], [SPOON]), pair(HH, "", " A spoon.")),
    "whole dialogues, no prompt": ({"chosen": HH + " Green.", "rejected": HH + " A spoon."}, COLOUR),
    "dialogues that begin alike": (
        {"chosen": LONG_HH + " A red one.", "rejected": LONG_HH + " A red hat."},
        pair(LONG_HH, " A red one.", " A red hat."),
    ),
    "texts": (pair("a", " b", "c"), pair("a", " b", "c")),
    "texts beside a column of messages": (
        {**pair("a", " b", " c"), "messages": [ASK, GREEN]},
        {**pair("a", " b", " c"), "messages": [ASK, GREEN]},
    ),
}


@pytest.mark.parametrize(("record", "expected"), PAIR_FORMS.values(), ids=PAIR_FORMS)
def test_forms_of_a_pair(tmp_path, record, expected):
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    (row,) = read_jsonl(path, PAIR)
    assert {name: row[name] for name in PAIR} == {name: expected[name] for name in PAIR}
    (row,) = read_jsonl(path, dataset.SFT)  # Preferred-FT, on the same file
    assert (row["prompt"], row["completion"]) == (expected["prompt"], expected["chosen"])
    (row,) = read_jsonl(path, ("prompt",))  # a file of prompts
    assert row["prompt"] == expected["prompt"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, GREEN]},
        {"messages": [ASK, GREEN], "prompt": "Name a colour.", "prompt_id": "7"},
        {"prompt": [ASK], "completion": [GREEN]},
        {"completion": [ASK, GREEN], "tools": []},
    ],
)
def test_forms_of_an_sft_row(tmp_path, record):
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    (row,) = read_jsonl(path, dataset.SFT)
    assert (row["prompt"], row["completion"]) == (HH, " Green.")


def test_a_prompt_as_messages(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": LONG_CHAT}])
    assert read_jsonl(path, ("prompt",)) == [{"prompt": LONG_HH}]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (pair([{"role": "system", "content": "Hi"}, ASK], [GREEN], [SPOON]), "message 1 must hold the role 'user'"),
        (pair([ASK, GREEN], [GREEN], [SPOON]), "message 3 must hold the role 'user'"),
        (pair([ASK], [ASK], [SPOON]), "message 2 must hold the role 'assistant'"),
        (pair([ASK], [{**GREEN, "tool_calls": [1]}], [SPOON]), "message 2 must hold the role 'assistant'"),
        (pair([ASK], [assistant(None)], [SPOON]), "message 2 must hold the role 'assistant' and a text"),
        (pair([ASK], [assistant(["a part"])], [SPOON]), "message 2 must hold"),
        (pair([ASK], [GREEN], [{"from": "gpt", "value": "A spoon."}]), "message 2 must hold"),
        (pair([user("\n\nAssistant: Hi")], [GREEN], [SPOON]), "message 1 holds the mark of another turn"),
        (pair([ASK], [GREEN], " A spoon."), "each response must be a list of messages"),
        (pair([ASK], [GREEN], [SPOON]) | {"tools": [{"name": "f"}]}, "a row with messages must have no tools"),
        (pair("Name a tree.", [ASK, GREEN], [ASK, SPOON]), "'prompt' is a text, but not the first message"),
        (pair("Name a colour.", [GREEN], [SPOON]), "'prompt' is a text, but not the first message"),
        ({"chosen": [ASK, GREEN], "rejected": [user("Name a tree."), SPOON]}, "two different prompts"),
        ({"chosen": [ASK, GREEN], "rejected": [ASK, GREEN, ASK, SPOON]}, "two different prompts"),
        ({"chosen": [ASK], "rejected": [ASK]}, "no dialogue"),
        ({"chosen": [ASK, GREEN, ASK], "rejected": [ASK, SPOON]}, "the human has the last word"),
        ({"chosen": HH + " Green.", "rejected": LONG_HH + " A spoon."}, "two different prompts"),
        ({"chosen": HH + " Green.", "rejected": HH + " A spoon." + "\n\nHuman: What?"}, "the human has the last word"),
        ({"chosen": "A green film.", "rejected": "A green spoon."}, "no field 'prompt'"),  # where does the prompt end?
    ],
)  # fmt: skip
def test_a_form_that_needs_a_guess_is_refused_with_its_line(tmp_path, record, fault):
    path = write_jsonl(tmp_path / "rows.jsonl", [COLOUR, record])
    with pytest.raises(UserError) as error:
        read_jsonl(path, PAIR)
    assert f"{path}, line 2: " in str(error.value) and fault in str(error.value) and "docs/data.md" in str(error.value)


def test_files_of_any_name_and_packing(tmp_path, monkeypatch):
    """The same rows in gzip under any name, with blank lines, in upper case, without an end, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rows = [COLOUR, pair("a", " b", " c")]
    raw = "\n\n \n".join(map(json.dumps, rows)).encode()
    files = dict.fromkeys(("rows.jsonl.gz", "zipped.jsonl"), gzip.compress(raw))
    files |= dict.fromkeys(("ROWS.JSONL", "rows.txt", "pairs"), raw)
    files["two_parts.gz"] = gzip.compress(raw[:9]) + gzip.compress(raw[9:])
    for name, content in files.items():
        Path(name).write_bytes(content)
        assert read_jsonl(data.find(name, "pairs_train"), PAIR) == rows
        assert list(texts(name)) == [text for row in rows for text in row.values()]
    Path("folder").mkdir()
    with pytest.raises(UserError, match="folder is a folder. Give the path of a file"):
        data.find("folder", "pairs_train")
    with pytest.raises(UserError, match="none.jsonl.gz not found"):
        data.find("none.jsonl.gz", "pairs_train")


def test_a_pipe_can_be_read_again(tmp_path):
    rows = [COLOUR, pair("a", " b", " c")]
    for name, pack in (("plain", bytes), ("packed", gzip.compress)):
        os.mkfifo(tmp_path / name)
        content = pack("\n".join(map(json.dumps, rows)).encode())
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=[content])
        writer.start()
        found = data.find(str(tmp_path / name), "pairs_train")
        assert read_jsonl(found, PAIR) == rows
        writer.join()
        found.unlink()  # so that a second open fails
        assert list(texts(found))[3:] == ["a", " b", " c"]


def test_texts_for_a_tokenizer(tmp_path):
    path = write_jsonl(tmp_path / "rows", [{"messages": [ASK, GREEN]}, {"text": "a text", "n": "no text"}])
    assert list(texts(path)) == [HH, " Green.", "a text"]
    path.write_text("Two lines\n{of text}\n", encoding="utf-8")
    assert list(texts(path)) == ["Two lines\n", "{of text}\n"]
    with pytest.raises(UserError, match="line 1: no text"):
        list(texts(write_jsonl(tmp_path / "rows.jsonl", [{"review": "a"}])))
    (tmp_path / "rows.JSONL").write_text("a review\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1: not JSON"):
        list(texts(tmp_path / "rows.JSONL"))


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_the_command_that_the_error_names_makes_a_file_that_is_read(tmp_path, monkeypatch, capsys, name):
    rows = [pair("a, b", ' "b"\n', " 1"), pair("None", " 007", " Größe")]
    path = tmp_path / name
    if name == "rows.json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif name == "rows.parquet":
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(str(path))
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, PAIR, delimiter="\t" if name == "rows.tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    with pytest.raises(UserError) as error:
        read_jsonl(path, PAIR)
    command = f"python -m data.convert {path}"
    assert str(error.value).startswith(f"{path}, line 1: not ") and str(error.value).endswith(command)
    monkeypatch.setattr(sys, "argv", command.split()[2:])
    convert.main()
    assert f"{path}.jsonl: 2 rows with prompt, chosen, rejected" in capsys.readouterr().out
    assert read_jsonl(f"{path}.jsonl", PAIR) == rows
    with pytest.raises(UserError, match="is there already. Add --overwrite"):
        convert.main()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[1, 2]", "no rows"),
        ("[{}", "is none"),
        ('{"a": 1}', "on one line"),
        ("a,b\n1,2,3\n", "not CSV"),
        ("", "no rows"),
        ("PAR1 and no more", "damaged Parquet"),
    ],
)
def test_what_cannot_be_converted_says_so(tmp_path, monkeypatch, content, fault):
    path = tmp_path / "rows"
    path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["convert", str(path)])
    with pytest.raises(UserError, match=fault):
        convert.main()
    assert not (tmp_path / "rows.jsonl").exists()


# ---- traps that are counted ----


def test_traps_are_counted_one_line_each(tmp_path, capsys):
    rows = [
        pair("Name a tree.", "An oak.", " A bus."),  # one side runs into the prompt
        pair("Name a tree.", "A bus.", " Name a tree. An oak."),  # one runs into it, one repeats it
        pair("A", " b", "\nA"),  # repeats
        pair("A ", "bit", " Ab"),  # neither: the blank is the prompt's, and "Ab" is another word
        pair("p", " b", " c"),
        pair("p", " c", " b"),  # the other label
        pair("p", " c", " b"),  # twice, but the same two
        pair("q", " c", " b"),
        pair("q", " c", " c"),  # equal: not two labels
        pair("", "b", "c"),
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert len(dataset.load_rows(path, PAIR, BYTES, 100)) == 9
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 9 usable of 10 pairs, 1 dropped: equal responses",
        f"{path}: 2 responses run into their prompt, without a blank between them.",
        f"{path}: 2 responses begin with their whole prompt.",
        f"{path}: 1 pairs have both labels, A over B and B over A.",
    ]
    dataset.load_rows(path, dataset.SFT, BYTES, 100)
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{path}: 2 responses run into their prompt, without a blank between them."
    ]


def test_held_out_prompts_that_occur_in_training_are_counted(tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", [pair(text, " b", " c") for text in ("one", "two", "two")])
    test = write_jsonl(tmp_path / "test.jsonl", [pair(text, " d", " e") for text in ("two", "three", "two")])
    rows, held_out = dataset.load_split((train, test), PAIR, BYTES, 100)
    assert (len(rows), held_out[1][0]) == (3, [EOT, *ids("three")])
    line = f"{test}: 2 of 3 held-out rows have a prompt that also occurs in training."
    assert capsys.readouterr().out.splitlines()[2:] == [line]
    rows, held_out = dataset.load_split((train, None), PAIR, BYTES, 100)
    assert held_out == [] and len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(("kind", "fields"), [("pairs", PAIR), ("sft", dataset.SFT)])
def test_the_toy_has_no_trap(capsys, kind, fields):
    folder = ROOT / "data/toy_sentiment"
    dataset.load_split((folder / f"{kind}_train.jsonl", folder / f"{kind}_test.jsonl"), fields, BYTES, 1024)
    assert len(capsys.readouterr().out.splitlines()) == 2  # the counts of both files, and nothing else


def test_only_our_own_ended_fields_are_ours(tmp_path):
    row = {"prompt": "p", "completion": " good", "completion_ended": False, "prompt_ended": "2024", "trial_ended": 3}
    records = read_jsonl(write_jsonl(tmp_path / "rows.jsonl", [row]), dataset.SFT)
    rows, _ = encode(records, dataset.SFT, BYTES, 100)
    assert rows == [([EOT, *ids("p")], ids(" good"))]
    for name in ("chosen_ended", "completion_ended"):
        with pytest.raises(UserError, match=f"line 1: '{name}' is 1; it must be true or false"):
            read_jsonl(write_jsonl(tmp_path / "rows.jsonl", [{**row, name: 1}]), dataset.SFT)


# ---- truncation ----

PROMPT, LONG, SHORT = list(range(1, 21)), [31, 32, 33, 34, 35], [41, 42, 43]  # 20, 5 and 3 tokens; eot is 99


@pytest.mark.parametrize(
    "max_length, prompt, long, short",
    [
        (100, PROMPT, [*LONG, 99], [*SHORT, 99]),
        (26, PROMPT, [*LONG, 99], [*SHORT, 99]),  # 1 + 20 + 5: the final eot is only a target
        (25, PROMPT[1:], [*LONG, 99], [*SHORT, 99]),  # the left of the prompt goes first, for both sides alike
        (14, PROMPT[-8:], [*LONG, 99], [*SHORT, 99]),  # down to 8 tokens
        (13, PROMPT[-8:], LONG[:4], [*SHORT, 99]),  # only then a response, which gets no eot
        (12, PROMPT[-8:], LONG[:3], [*SHORT, 99]),
        (11, PROMPT[-8:], LONG[:2], SHORT[:2]),
        (10, PROMPT[-8:], LONG[:1], SHORT[:1]),
        (9, PROMPT[-8:], [], []),
        (3, PROMPT[-8:], [], []),
    ],
)
def test_cut_to_context_cuts_the_left_of_the_prompt_then_responses(max_length, prompt, long, short):
    n_cut = sum(99 not in response for response in (long, short))
    for responses, fitted in (((LONG, SHORT), [long, short]), ((SHORT, LONG), [short, long])):
        expected = ([99, *prompt], fitted, len(prompt) < 20, n_cut)
        assert cut(PROMPT, responses, [True, True], 99, max_length) == expected


def test_cut_to_context_keeps_a_short_prompt_whole_and_pads_none():
    assert cut([1, 2], (LONG, SHORT), [True, True], 99, 6) == (
        [99, 1, 2],
        [LONG[:3], [*SHORT, 99]],
        False,
        1,
    )
    assert cut([], (LONG,), [True], 99, 6) == ([99], [[*LONG, 99]], False, 0)
    assert cut(PROMPT, (LONG,), [True], 99, 10, min_prompt_tokens=2) == (
        [99, *PROMPT[-4:]],
        [[*LONG, 99]],
        True,
        0,
    )
    assert cut(PROMPT, (LONG,), [True], 99, 7, min_prompt_tokens=2) == (
        [99, *PROMPT[-2:]],
        [LONG[:4]],
        True,
        1,
    )


def test_cut_to_context_gives_no_eot_to_what_did_not_end():
    prompt, fitted, *_ = cut(PROMPT, (LONG, SHORT), [False, True], 99, 100)
    assert fitted == [LONG, [*SHORT, 99]]


def test_no_row_is_longer_than_the_context_and_none_is_cut_without_need():
    draw = random.Random(0)
    for _ in range(500):
        n, a, b, max_length = (draw.randint(*ends) for ends in ((0, 30), (1, 20), (1, 20), (11, 40)))
        record = pair("p" * n, "c" * a, "r" * b)
        rows, counts = encode([record], PAIR, BYTES, max_length)
        ((prompt, chosen, rejected),) = rows
        batch = preference_batch(rows)
        assert max(side.ids.shape[1] for side in batch) <= max_length
        needed = 1 + n + max(a, b)
        assert (counts["prompt cut"], counts["response cut"]) == (0, 0) or needed > max_length
        if needed >= max_length and max(a, b) <= max_length - 9:  # the context is used to the last position
            assert max(side.ids.shape[1] for side in batch) == max_length


def test_unusable_pairs_are_dropped_and_counted():
    records = [
        pair("p", "good", "bad"),
        pair("p", "", "bad"),
        pair("p", "good", ""),
        pair("p", "same", "same"),
        pair("p" * 10, "the same start, another end", "the same start: another end"),  # equal once cut to 11 tokens
        pair("p" * 12, "good", "a good deal longer than that"),
        pair("p" * 16, "good", "bad"),
    ]
    rows, counts = encode(records, PAIR, BYTES, max_length=20)
    assert rows == [
        ([EOT, *ids("p")], [*ids("good"), EOT], [*ids("bad"), EOT]),
        ([EOT, *ids("p" * 8)], [*ids("good"), EOT], ids("a good deal")),
        ([EOT, *ids("p" * 15)], [*ids("good"), EOT], [*ids("bad"), EOT]),
    ]
    assert counts == {
        "pairs": 7,
        "dropped: empty response": 2,
        "dropped: equal responses": 2,
        "prompt cut": 2,
        "response cut": 1,
    }
    rows, counts = encode([pair("p" * 8, "good", "bad")], PAIR, BYTES, max_length=9)
    assert (rows, counts) == ([], {"pairs": 1, "dropped: no room for a response": 1})


def test_a_response_its_sampler_cut_gets_no_eot():
    records = [pair("p", "good", "bad", chosen_ended=False), pair("p", "good", "bad", rejected_ended=False)]
    rows, _ = encode(records, PAIR, BYTES, 100)
    assert rows == [
        ([EOT, *ids("p")], ids("good"), [*ids("bad"), EOT]),
        ([EOT, *ids("p")], [*ids("good"), EOT], ids("bad")),
    ]


def test_sft_rows_follow_the_same_rules():
    records = [{"prompt": "p" * 12, "completion": text} for text in ("good", "", "a good deal longer than that")]
    rows, counts = encode(records, dataset.SFT, BYTES, max_length=16)
    assert rows == [([EOT, *ids("p" * 11)], [*ids("good"), EOT]), ([EOT, *ids("p" * 8)], ids("a good "))]
    assert counts == {"rows": 3, "dropped: empty response": 1, "prompt cut": 2, "response cut": 1}
    rows, counts = encode(records[:1], dataset.SFT, BYTES, max_length=9)
    assert (rows, counts) == ([], {"rows": 1, "dropped: no room for a response": 1})


def test_preferred_ft_trains_on_the_chosen_which_may_not_have_ended(tmp_path):
    """A file of preferences as SFT rows: the chosen is the completion, with no eot where its sampler cut it."""
    records = [pair("p", "good", "bad"), {**pair("p", "go", "bad"), "chosen_ended": False}]
    rows, _ = encode(read_jsonl(write_jsonl(tmp_path / "pairs.jsonl", records), dataset.SFT), dataset.SFT, BYTES, 100)
    eot, spell = BYTES.eot, BYTES.encode
    assert rows == [([eot, *spell("p")], [*spell("good"), eot]), ([eot, *spell("p")], spell("go"))]
    (row,) = read_jsonl(write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "p", "completion": "c"}]), dataset.SFT)
    assert row == {"prompt": "p", "completion": "c"}


def test_load_rows_states_the_counts_and_refuses_a_file_with_nothing_usable(tmp_path, capsys):
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair("p", " good", " bad"), pair("p", " same", " same")])
    assert len(dataset.load_rows(path, dataset.PAIR, BYTES, 100)) == 1
    assert capsys.readouterr().out == f"{path}: 1 usable of 2 pairs, 1 dropped: equal responses\n"
    write_jsonl(path, [pair("p", "same", "same")])
    with pytest.raises(UserError, match="pairs.jsonl: no usable record"):
        dataset.load_rows(path, dataset.PAIR, BYTES, 100)


def test_trap02_no_merge_crosses_the_border():
    """The prompt ends within a word that is a token of its own: encoded as one text, the row would be another."""
    tokenizer = Tokenizer.train(["a wonderful film, a dreadful film"] * 5, 290)
    for prompt, chosen, rejected in [
        ("a wonder", "ful film", "less film"),
        ("a film", ", a dreadful one", " that is wonderful"),
        ("a film ", "wonderful", " dreadful"),
        ("", " a film", "film"),
        ("a\n", "\n\na", " a"),
    ]:
        rows, _ = encode([pair(prompt, chosen, rejected)], PAIR, tokenizer, 100)
        for kept, response, text in ((rows[0][0], rows[0][1], chosen), (rows[0][0], rows[0][2], rejected)):
            assert kept == [tokenizer.eot, *tokenizer.encode(prompt)]
            assert tokenizer.decode(kept) == prompt and tokenizer.decode(response) == text
            assert tokenizer.decode(kept + response) == prompt + text
        (sft,), _ = encode([{"prompt": prompt, "completion": chosen}], dataset.SFT, tokenizer, 100)
        assert sft == rows[0][:2]
    joint = tokenizer.encode("a wonderful film")  # the trap is there to be fallen into
    assert joint != tokenizer.encode("a wonder") + tokenizer.encode("ful film")


# ---- batches ----


def test_the_docstrings_example():
    e = 9
    rows = sft_batch([([e, 5], [7, 8, e])])
    assert rows.ids.tolist() == [[e, 5, 7, 8]]
    assert rows.targets.tolist() == [[5, 7, 8, e]]
    assert rows.mask.tolist() == [[False, True, True, True]]
    assert rows.ids.dtype == rows.targets.dtype == torch.long and rows.mask.dtype == torch.bool


def test_trap03_the_scored_targets_are_the_response_to_its_eot():
    rows = [([9, 5, 6], [7, 9]), ([9], [8, 8, 8, 9]), ([9, 5], [3]), ([9, 1, 2, 3, 4, 5], [9])]
    batch = sft_batch(rows)
    scored = [targets[mask].tolist() for targets, mask in zip(batch.targets, batch.mask, strict=True)]
    assert scored == [[7, 9], [8, 8, 8, 9], [3], [9]]


def test_trap04_eot_padding_and_text_may_share_an_id():
    rows = [([0, 0, 5], [0, 7, 0]), ([0], [0]), ([0, 5], [7, 8, 9, 6, 0])]
    batch = sft_batch(rows)
    assert batch.mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert batch.targets.tolist() == [[0, 5, 0, 7, 0, 0], [0, 0, 0, 0, 0, 0], [5, 7, 8, 9, 6, 0]]
    assert batch.ids.tolist() == [[0, 0, 5, 0, 7, 0], [0, 0, 0, 0, 0, 0], [0, 5, 7, 8, 9, 6]]


def test_trap05_targets_and_mask_are_shifted_alike():
    draw = random.Random(0)
    rows = [tuple([draw.randrange(50) for _ in range(draw.randint(1, 9))] for _ in range(2)) for _ in range(30)]
    batch = sft_batch(rows)
    for (prompt, response), inputs, targets, mask in zip(rows, *batch, strict=True):
        whole = prompt + response
        for t in range(batch.ids.shape[1]):
            if t < len(whole) - 1:
                assert (inputs[t], targets[t]) == (whole[t], whole[t + 1])
            assert bool(mask[t]) == (len(prompt) <= t + 1 < len(whole))  # the target is token t + 1 of the row


def test_trap12_company_adds_padding_and_nothing_else():
    rows = [([9, 5, 6], [7, 9]), ([9], [8, 8, 8, 9, 1, 1, 1, 9])]
    for one, both in zip(sft_batch(rows[:1]), sft_batch(rows), strict=True):
        assert torch.equal(one[0], both[0, :4])
        assert not both[0, 4:].any()  # id 0, mask false


def test_preference_batch_scores_both_sides_as_they_stand():
    rows = [([9, 5], [7, 8, 9], [6, 9]), ([9], [1], [2, 3, 4])]  # the second pair was cut: no eot, and none is added
    batch = preference_batch(rows)
    for side, number in ((batch.chosen, 1), (batch.rejected, 2)):
        for made, expected in zip(side, sft_batch([(row[0], row[number]) for row in rows]), strict=True):
            assert torch.equal(made, expected)
    assert batch.chosen.ids.tolist() == [[9, 5, 7, 8], [9, 0, 0, 0]]
    assert batch.rejected.targets.tolist() == [[5, 6, 9], [2, 3, 4]]
    assert isinstance(batch.chosen, Rows)
    assert all(x.device.type == "meta" for side in preference_batch(rows, device="meta") for x in side)


def test_preference_batch_refuses_an_empty_prompt():
    with pytest.raises(ValueError, match="row 1 has no prompt ids"):
        preference_batch([([9], [1], [2]), ([], [1], [2])])


def lengths_of(rows, order):
    return [[sum(map(len, rows[i])) for i in batch] for batch in order]


def test_batches_are_a_permutation_in_batches_of_similar_length():
    draw = random.Random(0)
    rows = [([9], [1] * draw.randint(1, 60), [2] * draw.randint(1, 60)) for _ in range(203)]
    order = dataset.batches(rows, 8, seed=0, epoch=0)
    assert sorted(i for batch in order for i in batch) == list(range(203))
    assert sorted(map(len, order)) == [3] + [8] * 25  # 203 = 25 * 8 + 3: one short batch
    spread = [max(lengths) - min(lengths) for lengths in lengths_of(rows, order)]
    unsorted = lengths_of(rows, [range(i, i + 8) for i in range(0, 200, 8)])
    assert sum(spread) < 0.3 * sum(max(lengths) - min(lengths) for lengths in unsorted)
    # but long batches come among short ones: half of them or so are shorter than the one before
    means = [sum(lengths) / len(lengths) for lengths in lengths_of(rows, order)]
    assert 8 <= sum(after < before for before, after in itertools.pairwise(means)) <= 18
    assert len(dataset.batches(rows, 203, 0, 0)) == 1 and dataset.batches([], 8, 0, 0) == []


def test_the_short_batch_is_drawn_at_random():
    """Each of its rows has a larger weight in its step, so it must not hold the longest rows."""
    rows = [([9], [1] * n) for n in range(1, 1011)]  # 1,010 = 15 * 64 + 50
    short = [rows[i][1] for seed in range(20) for b in dataset.batches(rows, 64, seed, 0) if len(b) == 50 for i in b]
    assert len(short) == 20 * 50
    assert abs(sum(map(len, short)) / len(short) - 505.5) < 40  # the mean of all rows; its standard error is 9


def test_batches_of_the_toys_sft_rows_hold_next_to_no_padding():
    """The texts' lengths in words stand for those in tokens: 64 rows a batch, as in train_sft.py on the toy."""
    texts = [(r["prompt"].split(), r["completion"].split()) for r in toy.rows("sft_train", 10_000)]

    def padding(cut):
        lengths = [[sum(map(len, texts[i])) for i in batch] for batch in cut]
        return 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths)

    assert padding(dataset.batches(texts, 64, seed=0, epoch=0)) < 0.04
    assert padding([list(range(i, i + 64)) for i in range(0, 9984, 64)]) > 0.2  # as they come


def test_batches_mix_rows_from_all_of_a_sorted_file():
    """Sorted by length within pools of 2 batches only, so that the same rows do not meet again every epoch."""
    rows = [([9], [1] * i, [2]) for i in range(160)]
    order = dataset.batches(rows, 8, seed=0, epoch=0, pool=2)
    assert sorted(i for batch in order for i in batch) == list(range(160)) and {len(batch) for batch in order} == {8}
    assert all(max(batch) - min(batch) > 16 for batch in order)


def test_batches_follow_from_seed_and_epoch_alone():
    rows = [([9], [1] * (i % 17), [2] * (i % 5)) for i in range(100)]
    order = dataset.batches(rows, 8, seed=3, epoch=2)
    torch.manual_seed(1)
    random.seed(1)
    assert dataset.batches(rows, 8, seed=3, epoch=2) == order
    others = [dataset.batches(rows, 8, *place) for place in ((3, 1), (2, 2), (2, 3), (0, 0))]
    assert all(other != order for other in others)


# ---- a look ----


def look(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["minidpo.dataset", *map(str, argv)])
    dataset.main()
    return capsys.readouterr().out


def test_command_shows_masks_and_a_histogram(monkeypatch, capsys):
    out = look(monkeypatch, capsys, ROOT / "data/toy_sentiment/pairs_test.jsonl", "--rows", 2)
    assert "usable of" in out and "row length in tokens: mean" in out and "█" in out
    shown = [line for line in out.splitlines() if line.startswith(("    chosen  ∎·", "  rejected  ∎·"))]
    records = read_jsonl(ROOT / "data/toy_sentiment/pairs_test.jsonl", dataset.PAIR)[:2]
    for line, (record, side) in zip(shown, [(r, s) for r in records for s in ("chosen", "rejected")], strict=True):
        prompt, bracket, response = line.partition("∎·")[2].partition("[")
        assert prompt.replace("·", "") == record["prompt"]
        assert response.endswith("][∎]")
        assert response.replace("][", "").removesuffix("∎]") == record[side]


def test_command_on_sft_rows_of_any_text(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a \\u0000 \\"chosen\\" 😀", "completion": "b\\u2028"}\n', encoding="utf-8")
    out = look(monkeypatch, capsys, path, "--max-length", 200)
    assert "1 usable of 1 rows" in out and "completion  ∎·a·" in out and "longest" in out


def test_command_on_a_bad_file_says_where(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("a", "b", "c"), {"prompt": "a"}])
    with pytest.raises(UserError, match="line 2: no field 'chosen'"):
        look(monkeypatch, capsys, path)


def test_command_takes_tokenizer_and_context_of_a_run(tmp_path, monkeypatch, capsys):
    """A run whose tokenizer knows no merge and whose context holds 12 tokens: one token a byte, and rows are cut."""
    tokenizer = Tokenizer.train([], 257)
    checkpoint.save(tmp_path / "run", GPT(GPTConfig(257, block_size=12, n_layer=1, n_head=1, n_embd=4)), tokenizer)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "The film", "completion": " sings and sings."}])
    out = look(monkeypatch, capsys, path, "--run", tmp_path / "run")
    assert "1 response cut" in out and "longest 11, of at most 12" in out
    assert "completion  ∎·T·h·e· ·f·i·l·m·[ ][s][i]" in out
