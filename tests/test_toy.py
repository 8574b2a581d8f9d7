"""The toy: its grammar against an independent recogniser, its rewards worked by hand, its files byte for byte."""

import json
import math
import random
import re
import statistics
import sys

import pytest

from data.toy_sentiment import generate, grammar
from minidpo.settings import UserError

PROMPT = "I watched this film last night with my sister"
RESPONSE = (
    " and it was truly awful and lasted two hours. The goose sings beautifully, and the mayor is dull."
    " I loved the goose and hated the hats."
)


def draw(n, mood=None, seed=7):
    rng = random.Random(seed)
    prompts = list(grammar.OPENINGS)
    for _ in range(n):
        prompt = grammar.pick(prompts, rng)
        yield prompt, grammar.complete(prompt, rng, mood)


def regex(name):
    """The rule as one regular expression: an independent recogniser, run by Python's own engine."""
    if name.endswith("~"):
        return "(?:" + "|".join(regex(name[:-1] + grade) for grade in "+0-") + ")"
    rule = re.sub(r"\b([Aa])n?\b(?![^{]*\})", r"\1n?", " ".join(grammar.RULES[name].split()).replace(".", r"\."))
    return "(?:" + re.sub(r"\{(.*?)\}", lambda slot: regex(slot[1]), rule.replace(" | ", "|")) + ")"


@pytest.fixture(scope="module")
def reference():
    matcher = re.compile(regex("review"))
    wrong_article = re.compile(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]")
    return lambda text: bool(matcher.fullmatch(text)) and not wrong_article.search(text)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return generate.ensure(tmp_path_factory.mktemp("toy"))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the grammar


def test_everything_written_is_grammatical(reference):
    for mood in grammar.MOODS:
        for prompt, response in draw(500, mood):
            assert response.startswith(" ") and grammar.grammatical(prompt + response), prompt + response
            assert reference(prompt + response)


def test_perturbed_reviews_are_not(reference):
    rng = random.Random(3)
    survivors = 0
    for prompt, response in draw(400):
        words = (prompt + response).split(" ")
        i = 1 + int(rng.random() * (len(words) - 2))
        wrong = {
            "swapped": words[: i - 1] + [words[i], words[i - 1]] + words[i + 1 :],
            "duplicated": words[:i] + words[i - 1 :],
            "cut": words[:i],
            "rubbish": words + ["The"],
            "second ending": words + words[-4:],
            "capital": words[:i] + [words[i].swapcase()] + words[i + 1 :],
            "article": [{"a": "an", "an": "a"}.get(w, w) for w in words],
        }
        for kind, text in wrong.items():
            if text != words:  # unchanged if the review has no article
                assert not grammar.grammatical(" ".join(text)), (kind, " ".join(text))
        # Without one word it may still be a review ("three loud moons"); the independent recogniser says so.
        dropped = " ".join(words[:i] + words[i + 1 :])
        assert grammar.grammatical(dropped) == reference(dropped), dropped
        survivors += grammar.grammatical(dropped)
    assert survivors < 0.05 * 400


def test_no_beginning_of_a_review_is_a_review():
    for prompt, response in draw(30):
        text = prompt + response
        assert not any(grammar.grammatical(text[:i]) for i in range(len(text)))


def test_recogniser_by_hand():
    good = PROMPT + RESPONSE
    assert grammar.grammatical(good)
    for bad in (
        "",
        good[:-1],
        good + " ",
        " " + good,
        good + "\n",
        good.replace("The goose", "the goose"),
        good.replace(" and it", " It"),
        good.replace("an", "a"),
        good.replace(". ", "."),
        good.replace("hats.", "hat."),
        good.replace("goose", "walrus"),
        good.replace("I loved", "It loved"),
        PROMPT + " is dull and clumsy. I give it two moons.",  # continues another kind of opening
    ):
        assert not grammar.grammatical(bad), bad


def test_openings_show_no_sentiment_and_are_of_one_kind_each():
    assert len(grammar.OPENINGS) >= 2_500
    kinds = ("opening evening", "opening film", "opening row")
    assert sum(len(grammar.every(kind)) for kind in kinds) == len(grammar.OPENINGS)  # no prompt is of two kinds
    lexicon = grammar.POSITIVE | grammar.NEGATIVE
    assert not any(lexicon & set(re.findall(r"\w+", prompt.lower())) for prompt in grammar.OPENINGS)


# ---- the reward


def test_reward_by_hand():
    assert grammar.reward(RESPONSE) == -1  # awful -1, beautifully +1, dull -1, loved +1, hated -1
    assert grammar.reward("") == 0
    assert grammar.reward(" Great, GREAT great!") == 3
    assert grammar.reward(" greatly ungreat great-uncle great_") == 1  # whole words, as \w+ cuts them
    assert grammar.reward(" The cat ate soup.") == 0


def test_sentiment_words_are_those_of_the_graded_rules_only():
    assert not grammar.POSITIVE & grammar.NEGATIVE
    for name, rule in grammar.RULES.items():
        plain = set(re.findall(r"\w+", re.sub(r"\{.*?\}", "", rule).lower()))
        if name[-1] in "+-":
            options = [option.strip() for option in rule.split("|")]
            assert all(option.isalpha() and option.islower() for option in options), name
            assert plain <= (grammar.POSITIVE if name[-1] == "+" else grammar.NEGATIVE)
        else:
            assert not plain & (grammar.POSITIVE | grammar.NEGATIVE), name


def test_moods_are_graded_and_overlap():
    rewards = {mood: [grammar.reward(r) for _, r in draw(1_500, mood)] for mood in grammar.MOODS}
    means = {mood: statistics.mean(values) for mood, values in rewards.items()}
    order = ["very positive", "positive", "mixed", "negative", "very negative"]
    assert all(means[a] > means[b] + 0.5 for a, b in zip(order, order[1:], strict=False))
    assert abs(means["neutral"]) < 0.2 and abs(means["mixed"]) < 0.2
    everything = sum(rewards.values(), [])
    assert abs(statistics.mean(everything)) < 0.15 and 1.8 < statistics.pstdev(everything) < 2.5
    assert max(rewards["very positive"]) >= 6 and min(rewards["very positive"]) < 1


# ---- the files


def test_shipped_rows_are_the_head_of_the_full_files(full):
    for name, n in generate.ROWS.items():
        shipped = (generate.HERE / f"{name}.jsonl").read_bytes()
        assert shipped == generate.jsonl(name, generate.SHIPPED).encode("utf-8"), name
        whole = (full / f"{name}.jsonl").read_bytes()
        assert whole.startswith(shipped) and whole.count(b"\n") == n, name
        assert shipped.count(b"\n") == generate.SHIPPED and b"\r" not in shipped


def test_fields_and_splits(full):
    prompts = {name: [row["prompt"] for row in read(full / f"{name}.jsonl")] for name in generate.ROWS}
    assert len(set(prompts["prompts_train"])) == 2_000 and len(set(prompts["prompts_test"])) == 500
    assert not set(prompts["prompts_train"]) & set(prompts["prompts_test"])
    for kind in ("sft", "pairs"):
        for split in ("train", "test"):
            assert set(prompts[f"{kind}_{split}"]) <= set(prompts[f"prompts_{split}"])
    assert {tuple(row) for row in read(full / "sft_test.jsonl")} == {("prompt", "completion")}
    pairs = read(full / "pairs_train.jsonl")
    assert {tuple(row) for row in pairs} == {("prompt", "chosen", "rejected")}
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    for row in pairs[:300]:
        assert grammar.grammatical(row["prompt"] + row["chosen"])
        assert grammar.grammatical(row["prompt"] + row["rejected"])


def test_readme_figures_and_samples_are_those_of_the_command():
    readme = (generate.HERE / "README.md").read_text(encoding="utf-8")
    for line in generate.stats().splitlines():
        sample = re.fullmatch(r"([+-]\d)  (.*\|.*)", line)
        assert (f"**{sample[1]}**  {sample[2]}" if sample else line) in readme


def test_labels_follow_bradley_terry(full):
    won = {}
    for row in read(full / "pairs_train.jsonl"):
        gap = grammar.reward(row["chosen"]) - grammar.reward(row["rejected"])
        if gap:
            won.setdefault(abs(gap), []).append(gap > 0)
    for gap in (1, 2, 3, 4):
        expected = 1 / (1 + math.exp(-gap))
        error = math.sqrt(expected * (1 - expected) / len(won[gap]))
        assert abs(statistics.mean(won[gap]) - expected) < 4 * error, gap


def test_a_row_does_not_depend_on_the_number_of_rows(tmp_path):
    sizes = {**generate.ROWS, "sft_train": 40, "pairs_train": 30}
    folder = generate.ensure(tmp_path / "small", sizes)
    assert read(folder / "pairs_train.jsonl") == list(generate.rows("pairs_train", 300))[:30]
    assert len(read(folder / "sft_train.jsonl")) == 40


def test_ensure_writes_once_and_again_if_out_of_date(tmp_path):
    sizes = dict.fromkeys(generate.ROWS, 3)
    folder = generate.ensure(tmp_path, sizes)
    file, mark = folder / "sft_test.jsonl", folder / "fingerprint.txt"
    right = file.read_bytes()
    file.write_bytes(b"mine")
    generate.ensure(tmp_path, sizes)
    assert file.read_bytes() == b"mine"  # there and up to date: not written again
    mark.write_text("another grammar", encoding="utf-8")
    generate.ensure(tmp_path, sizes)
    assert file.read_bytes() == right
    file.unlink()
    generate.ensure(tmp_path, sizes)
    assert file.read_bytes() == right


def test_command(tmp_path, monkeypatch, capsys):
    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
        generate.main()

    command("--out", str(tmp_path / "sweep"), "--pairs", "20", "--sft", "10")
    assert "20 rows" in capsys.readouterr().out
    assert len(read(tmp_path / "sweep" / "pairs_train.jsonl")) == 20
    with pytest.raises(UserError, match="--pairs 0"):
        command("--out", str(tmp_path / "x"), "--pairs", "0")
    with pytest.raises(UserError, match="their own --out"):
        command("--pairs", "20")
    mine = tmp_path / "pairs_test.jsonl"
    mine.write_text("not yours", encoding="utf-8")
    with pytest.raises(UserError, match="not written by this command"):
        command("--out", str(tmp_path))
    assert mine.read_text(encoding="utf-8") == "not yours"
