"""Rewards: the classifier's parts by hand and against a float64 Newton fit, its file, the two halves, the interface."""

import json
import math
import os
import random

import numpy as np
import pytest
import torch
from conftest import need

from data.imdb import prepare
from experiments import rewards
from experiments.rewards import SentimentClassifier, load_reward
from minidpo.settings import UserError

GOOD, BAD, PLAIN = ["great", "lovely", "fun"], ["awful", "dull", "bad"], ["the", "film", "was", "a", "night", "out"]


def some_reviews(n=200, seed=0):
    """texts of 8 to 30 words of which every fourth or so gives the label away, labels"""
    rng = random.Random(seed)
    labels = [i % 2 for i in range(n)]
    texts = [
        " ".join(
            rng.choice((GOOD if label else BAD) if rng.random() < 0.25 else PLAIN) for _ in range(rng.randint(8, 30))
        )
        for label in labels
    ]
    return texts, labels


# ---- parts, by hand ----


def test_ngrams_by_hand():
    assert rewards.ngrams("Not good, NOT good!") == ["not", "good", "!", "not good", "good not", "good !"]
    assert rewards.ngrams("It's über_cool 10/10 🎬") == [
        *("it's", "über", "cool", "10"),
        *("it's über", "über cool", "cool 10", "10 10"),
    ]
    assert rewards.ngrams("") == rewards.ngrams(" ... ") == []


def test_log_count_ratios_by_hand():
    got = rewards.log_count_ratios([[0, 1], [1], [2]], [1, 1, 0], 3)
    # 1 + documents: positive [2, 3, 1] of 6, negative [1, 1, 2] of 4
    want = [math.log((2 / 6) / (1 / 4)), math.log((3 / 6) / (1 / 4)), math.log((1 / 6) / (2 / 4))]
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_fit_is_the_optimum_that_newtons_method_finds():
    rng = np.random.default_rng(0)
    n, size, l2 = 80, 12, 0.7
    present = rng.random((n, size)) < 0.3
    labels = rng.integers(0, 2, n)
    scale = rng.normal(size=size)
    documents = [np.flatnonzero(row).tolist() for row in present]
    documents[3], present[3] = [], False  # a text without a known n-gram
    weights, bias = rewards.fit_logistic(documents, labels.tolist(), torch.tensor(scale), l2)

    design = np.concatenate([present * scale, np.ones((n, 1))], axis=1)
    penalty = np.diag([2 * l2] * size + [0.0])  # the bias is free
    theta = np.zeros(size + 1)
    for _ in range(30):
        p = 1 / (1 + np.exp(-design @ theta))
        gradient = design.T @ (p - labels) + penalty @ theta
        theta -= np.linalg.solve((design.T * (p * (1 - p))) @ design + penalty, gradient)
    assert np.abs(gradient).max() < 1e-12
    np.testing.assert_allclose([*weights.tolist(), bias.item()], theta, atol=1e-4)


def test_excerpt_is_a_stretch_of_10_to_60_words():
    words = [str(i) for i in range(200)]
    rng = random.Random(0)
    lengths, starts = set(), set()
    for _ in range(3000):
        got = [int(word) for word in rewards.excerpt(" ".join(words), rng).split()]
        assert got == list(range(got[0], got[0] + len(got)))
        lengths.add(len(got))
        starts.add(got[0])
    assert lengths == set(range(10, 61)) and 0 in starts and max(starts) > 150
    assert rewards.excerpt("only four words here", rng) == "only four words here"


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 3), (450, 500), (1, 7)])
def test_wilson_ends_are_where_the_score_test_is_at_its_limit(hits, n):
    for p in rewards.wilson(hits, n):
        assert (hits / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)
    low, high = rewards.wilson(hits, n)
    assert 0 <= low < high <= 1


# ---- the classifier ----


def test_log_odds_are_those_of_the_probability():
    classifier = SentimentClassifier({"good": 1.5, "not good": -4.0, "film": 0.25}, 0.5)
    assert classifier.log_odds("A GOOD film, a good film") == 0.5 + 1.5 + 0.25  # each n-gram counts once
    assert classifier.log_odds("Not good") == 0.5 + 1.5 - 4.0
    assert classifier.log_odds("") == 0.5
    p = 1 / (1 + math.exp(-classifier.log_odds("good")))
    assert math.log(p / (1 - p)) == pytest.approx(classifier.log_odds("good"), rel=1e-12)


def test_log_odds_make_no_ties_where_the_probability_saturates():
    classifier = SentimentClassifier({"great": 40.0, "superb": 5.0}, 0.0)
    a, b = classifier(["", ""], ["great", "great superb"])
    assert a < b and torch.sigmoid(torch.tensor(a)) == torch.sigmoid(torch.tensor(b)) == 1


def test_prompt_and_response_are_scored_as_one_text():
    classifier = SentimentClassifier({"loved": 2.0, "not good": -3.0}, 0.0)
    assert classifier(["I lo", "It is not"], ["ved it", " good."]) == [2.0, -3.0]
    with pytest.raises(ValueError):
        classifier(["one"], [])


def test_training_learns_whole_reviews_and_excerpts_and_repeats_itself():
    texts, labels = some_reviews()
    classifier = rewards.train_classifier(texts, labels)
    assert all(classifier.weights[word] > 0.2 for word in GOOD)
    assert all(classifier.weights[word] < -0.2 for word in BAD)
    assert all(abs(classifier.weights[word]) < 0.2 for word in PLAIN)
    again = rewards.train_classifier(texts, labels)
    assert again.weights == classifier.weights and again.bias == classifier.bias


def test_reviews_too_few_for_any_ngram_leave_the_bias_alone():
    classifier = rewards.train_classifier(["fine film", "poor film"], [1, 0])
    assert classifier.weights == {} and classifier.log_odds("fine film") == classifier.bias == pytest.approx(
        0, abs=1e-6
    )


def test_training_pairs_each_excerpt_with_its_reviews_label(monkeypatch):
    seen = []
    fit = rewards.fit_logistic
    monkeypatch.setattr(rewards, "fit_logistic", lambda *a: seen.append(a) or fit(*a))
    texts, labels = some_reviews()
    rewards.train_classifier(texts, labels)
    documents, targets, _, _ = seen[0]
    n = len(texts)
    assert len(documents) == len(targets) == n * (1 + rewards.EXCERPTS)
    for k, document in enumerate(documents):
        assert targets[k] == labels[k % n]
        if k >= n:  # all of its words, if not all its pairs' order, come from its review
            assert set(document) <= set(documents[k % n])


def test_save_and_load_give_the_same_rewards(tmp_path):
    texts, labels = some_reviews()
    classifier = rewards.train_classifier(texts, labels)
    classifier.save(tmp_path / "c.pt")
    loaded = load_reward(str(tmp_path / "c.pt"))
    assert loaded.weights == classifier.weights and loaded.bias == classifier.bias
    assert loaded([""] * len(texts), texts) == classifier([""] * len(texts), texts)


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_damaged_and_foreign_files_are_refused_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SentimentClassifier({"a": 1.0, "b": 2.0}, 0.0).save("good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a classifier", encoding="utf-8")
    torch.save({"model": torch.ones(2)}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"ngrams": "a\nb", "weights": torch.ones(3), "bias": 0.0}, "lengths.pt")
    torch.save(Evil(), "evil.pt")
    for name in ("cut.pt", "empty.pt", "text.pt", "other.pt", "list.pt", "lengths.pt", "evil.pt"):
        (tmp_path / "evil").unlink(missing_ok=True)
        with pytest.raises(UserError, match=name):
            load_reward(name)
        assert not (tmp_path / "evil").exists()


# ---- load_reward and the command ----


def test_toy_reward_is_the_grammars():
    from data.toy_sentiment.grammar import reward

    responses = [" and it was truly awful.", " and I loved the goose.", ""]
    got = load_reward("toy")(["I loved it"] * 3, responses)
    assert got == [reward(response) for response in responses] and all(type(r) is float for r in got)


def test_unknown_reward_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'toy'"):
        load_reward("toi")
    SentimentClassifier({"a": 1.0}, 0.0).save(tmp_path / "labelling.pt")
    with pytest.raises(UserError, match="Did you mean '.*/labelling.pt'"):
        load_reward(str(tmp_path / "labeling.pt"))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_command_trains_two_classifiers_on_halves_that_share_no_review(tmp_path, monkeypatch, capsys):
    texts, labels = some_reviews(401)
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    halves = []
    train = rewards.train_classifier
    monkeypatch.setattr(rewards, "train_classifier", lambda t, y: halves.append((t, y)) or train(t, y))
    random.Random(1).shuffle(rows)
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    rewards.main(["--train", file, "--out", str(tmp_path)])
    (a, _), (b, _) = halves
    assert not set(a) & set(b) and sorted(a + b) == sorted(texts)
    for half_texts, half_labels in halves:
        assert [{"text": t, "label": y} for t, y in zip(half_texts, half_labels, strict=True)] == [
            row for row in rows if row["text"] in set(half_texts)
        ]

    rewards.main(["--test", file, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    labelling = load_reward(str(tmp_path / "labelling.pt"))
    right = sum((labelling.log_odds(row["text"]) > 0) == row["label"] for row in rows)
    assert f"whole reviews   labelling: accuracy {right / 401:.1%}" in out and "(n = 401)" in out
    assert "first 40 words  reporting" in out and "agree on" in out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "fine", "label": 1}, {"text": "no label"}], "row 2.*label.*None"),
        ([{"text": "fine", "label": 1}, {"text": "x", "label": "pos"}], "row 2.*label.*'pos'"),
        ([{"text": "fine", "label": 1}, {"text": "x", "label": True}], "row 2.*label.*True"),
        ([{"text": "fine", "label": 1}], "both labels"),
        ([{"text": 3, "label": 1}], "line 1.*text"),
    ],
)
def test_bad_reviews_are_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        rewards.read_reviews(write_jsonl(tmp_path / "bad.jsonl", rows))


def test_bad_test_file_is_found_before_training(tmp_path):
    texts, labels = some_reviews(20)
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": t, "label": y} for t, y in zip(texts, labels, strict=True)])
    bad = write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match="b.jsonl"):
        rewards.main(["--train", good, "--test", bad, "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.pt"))
    with pytest.raises(UserError, match="--train"):
        rewards.main([])


def test_each_half_needs_both_labels(tmp_path):
    rows = [{"text": f"word {i}", "label": i % 2} for i in range(8)]  # labelling.pt would see label 0 only
    with pytest.raises(UserError, match="Shuffle the file"):
        rewards.main(["--train", write_jsonl(tmp_path / "a.jsonl", rows), "--out", str(tmp_path)])


# ---- real reviews ----


def test_a_quarter_of_a_half_already_tells_real_reviews_apart():
    archive = os.environ.get("MINIDPO_IMDB_SLICE", "")
    need(archive, "MINIDPO_IMDB_SLICE names no IMDb archive")
    splits, _ = prepare.split(prepare.read_archive(archive))
    train, heldout = splits["train"][::8], splits["heldout"]
    classifier = rewards.train_classifier([row["text"] for row in train], [row["label"] for row in train])
    for words, floor in ((None, 0.83), (40, 0.68)):
        odds = [classifier.log_odds(" ".join(row["text"].split(" ")[:words])) for row in heldout]
        right = sum((o > 0) == row["label"] for o, row in zip(odds, heldout, strict=True))
        assert right / len(heldout) > floor
