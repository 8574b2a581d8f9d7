"""Win rates: counts and intervals against exact values, sides swapped and unswapped, and the whole command."""

import csv
import importlib.util
import itertools
import json
import math
import random

import pytest
import torch
from conftest import need
from test_judges import KEY, Server, good
from tiny import call, contents, fails, write_data, write_jsonl

import experiments.common as common
import experiments.winrate.__main__ as winrate
import train_dpo
import train_sft
from data.toy_sentiment.grammar import grammatical, reward
from experiments.winrate.__main__ import own_completions
from experiments.winrate.scores import agreement, compare, count, interval
from minidpo import checkpoint
from minidpo.sampling import generate
from minidpo.settings import UserError

TRAIN = ("--batch-size", 8, "--lr", 5e-3, "--warmup-steps", 2, "--samples", 1, "--sample-tokens", 4)

# ---- statistics ----


def test_counts_by_hand():
    """3 wins, 2 ties and 1 loss: (3 + 2 / 2) / 6. What could not be read is neither a win nor a loss."""
    figures = count(["win", "tie", None, "loss", "win", "tie", None, "win"])
    assert figures["win_rate"] == 4 / 6
    assert [figures[name] for name in ("wins", "ties", "losses", "unparsed")] == [3, 2, 1, 2]
    assert figures["low"] < 4 / 6 < figures["high"]
    nothing = count([None, None])
    assert nothing["unparsed"] == 2 and math.isnan(nothing["win_rate"]) and math.isnan(nothing["low"])


@pytest.mark.parametrize(("wins", "n"), [(28, 40), (50, 100), (3, 7), (299, 300)])
def test_interval_without_ties_against_the_exact_binomial(wins, n):
    """A resample's wins are Binomial(n, wins / n): the interval's ends are its quantiles, one step of 1 / n aside."""
    p = wins / n
    below = list(itertools.accumulate(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)))
    exact = [next(k for k in range(n + 1) if below[k] >= q) / n for q in (0.025, 0.975)]
    for got, expected in zip(interval(wins, 0, n - wins), exact, strict=True):
        assert abs(got - expected) <= 1 / n + 1e-12


def test_interval_with_ties_against_resampled_prompts():
    """The same from prompts drawn one by one with replacement, as the bootstrap is defined."""
    scores = [1.0] * 30 + [0.5] * 60 + [0.0] * 10
    rng = random.Random(0)
    means = sorted(sum(rng.choices(scores, k=100)) / 100 for _ in range(4000))
    low, high = interval(30, 60, 10)
    assert abs(low - means[100]) <= 0.01 and abs(high - means[3900]) <= 0.01
    assert high - low < 0.13  # ties are known halves: the binomial's interval at a rate of 0.6 is 0.19 wide
    assert interval(5, 0, 0) == (1.0, 1.0) and interval(0, 3, 0) == (0.5, 0.5)


def outcomes(**pairs):
    """outcomes(win_loss=3) -> two judges' outcomes, three times ("win", "loss")."""
    both = [name.split("_") for name, n in pairs.items() for _ in range(n)]
    return [a for a, _ in both], [b for _, b in both]


def test_agreement_by_hand():
    """20 + 15 of 50 equal: 0.7. By chance: 25/50 * 30/50 + 25/50 * 20/50 = 0.5. kappa = 0.2 / 0.5."""
    found = agreement(*outcomes(win_win=20, win_loss=5, loss_win=10, loss_loss=15))
    assert found["n"] == 50 and found["share"] == 0.7 and found["kappa"] == pytest.approx(0.4, abs=1e-12)
    # three outcomes: 4 + 2 + 1 of 10; by chance (5 * 5 + 3 * 3 + 2 * 2) / 100 = 0.38
    three = agreement(*outcomes(win_win=4, tie_tie=2, loss_loss=1, win_loss=1, tie_win=1, loss_tie=1))
    assert three["share"] == 0.7 and three["kappa"] == pytest.approx(0.32 / 0.62, abs=1e-12)
    assert agreement(*outcomes(win_loss=5, loss_win=5))["kappa"] == -1
    equal = agreement(*outcomes(win_win=3, loss_loss=1))
    assert equal["share"] == equal["kappa"] == 1
    always = agreement(*outcomes(win_win=3))
    assert always["share"] == 1 and math.isnan(always["kappa"])  # chance alone makes them equal


def test_agreement_leaves_out_what_could_not_be_read():
    a, b = outcomes(win_win=20, win_loss=5, loss_win=10, loss_loss=15)
    padded = agreement([*a, None, "win", None], [*b, "win", None, None])
    assert padded == agreement(a, b)
    none = agreement([None], ["win"])
    assert none["n"] == 0 and math.isnan(none["share"]) and math.isnan(none["kappa"])


# ---- the order of the two sides ----


def texts(n):
    return [f"p{i}" for i in range(n)], [f"ours {i}" for i in range(n)], [f"theirs {i}" for i in range(n)]


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_judge_that_always_takes_one_place_comes_out_at_one_half(side):
    found = compare(lambda prompts, a, b: [side] * len(a), *texts(4000), seed=0)
    assert abs(found.count("win") / 4000 - 0.5) < 4 * 0.5 / 4000**0.5
    assert found.count("win") + found.count("loss") == 4000
    other = compare(lambda prompts, a, b: [side] * len(a), *texts(4000), seed=1)
    assert 1700 < sum(x == y for x, y in zip(found, other, strict=True)) < 2300  # another seed, another order


def test_the_swap_is_undone():
    """A judge that knows which text is whose, wherever it stands."""
    first = []

    def knows(prompts, a, b):
        first.extend(x.startswith("ours") for x in a)
        assert all(p[1:] == x.split()[1] == y.split()[1] for p, x, y in zip(prompts, a, b, strict=True))
        answers = {"0": None, "1": "tie"}
        return [answers.get(p[1:], "a" if x < y else "b") for p, x, y in zip(prompts, a, b, strict=True)]

    assert compare(knows, *texts(300), seed=0) == [None, "tie"] + ["win"] * 298
    assert 100 < sum(first) < 200  # both orders came up
    prompts, ours, theirs = texts(300)
    assert compare(knows, prompts, theirs, ours, seed=0) == [None, "tie"] + ["loss"] * 298


def test_a_comparison_has_its_order_whatever_stands_beside_it():
    prompts, ours, theirs = texts(50)
    seen = {}

    def note(prompts, a, b):
        for p, x in zip(prompts, a, strict=True):
            seen.setdefault(p, set()).add(x)
        return ["tie"] * len(a)

    compare(note, prompts, ours, theirs, seed=3)
    compare(note, prompts[::-1][:20], ours[::-1][:20], theirs[::-1][:20], seed=3)
    assert all(len(shown) == 1 for shown in seen.values())


# ---- the dataset's own completions ----


def test_toy_completions_are_reviews_of_the_grammar():
    own = own_completions("toy", 60, seed=0)
    assert len(own) == 60 and all(grammatical(prompt + text) for prompt, text in own)
    assert len({text for _, text in own}) > 55  # no two prompts share their draws
    assert own_completions("toy", 20, seed=0) == own[:20]
    other = own_completions("toy", 60, seed=1)
    assert [p for p, _ in other] == [p for p, _ in own] and sum(a != b for a, b in zip(own, other, strict=True)) > 50


def test_file_completions(tmp_path):
    rows = [{"prompt": p, "completion": c} for p, c in (("x", " 1"), ("y", " 2"), ("x", " 3"), ("z", " 4"))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert own_completions(str(path), 0, seed=0) == [("x", " 1"), ("y", " 2"), ("z", " 4")]  # each prompt once
    assert own_completions(str(path), 2, seed=0) == [("x", " 1"), ("y", " 2")]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "x", "chosen": " good", "rejected": " bad"}])
    assert own_completions(str(pairs), 0, seed=0) == [("x", " good")]
    neither = write_jsonl(tmp_path / "neither.jsonl", [{"prompt": "x", "text": " good"}])
    with pytest.raises(UserError, match="line 1: no field 'completion'"):
        own_completions(str(neither), 0, seed=0)


# ---- the command ----


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of each stage, `sft` and `dpo`, and rows.jsonl with 5 prompts."""
    folder = tmp_path_factory.mktemp("winrate")
    write_data(folder)
    sft, pairs = folder / "sft.jsonl", folder / "pairs.jsonl"
    call(train_sft.main, "--data", sft, "--out", folder / "sft", "--preset", "toy", "--epochs", 6, *TRAIN)
    call(train_dpo.main, "--data", pairs, "--init", folder / "sft", "--out", folder / "dpo", "--epochs", 4, *TRAIN)
    prompts = ("The film", "This story", "Her cast", "Every scene", "The ending")
    rows = [{"prompt": prompt, "completion": " is warm, great and fun."} for prompt in prompts]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture
def sweep(home, tmp_path):
    """sweep(*flags, out="out") -> rows of winrate.csv, of two runs and two temperatures."""

    def sweep(*flags, judge=("toy",), out="out"):
        wanted = [word for name in judge for word in ("--judge", name)]
        call(winrate.main, *required(home), *wanted, "--out", tmp_path / out, *flags, draw=True)
        with open(tmp_path / out / "winrate.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    return sweep


def required(home):
    return (
        "--run", home / "sft", "--run", home / "dpo", "--data", home / "rows.jsonl", "--temperatures", "0,0.5",
        "--batch-size", 2, "--max-new-tokens", 12,
    )  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_whole_sweep(home, sweep, tmp_path, capsys):
    implicit = f"implicit:{home / 'dpo'},{home / 'sft'}"
    rows = sweep(judge=("toy", implicit))
    cells = [(row["judge"], row["run"], float(row["temperature"])) for row in rows]
    runs = [str(home / "sft"), str(home / "dpo")]
    assert cells == list(itertools.product(("toy", implicit), runs, (0.0, 0.5)))

    comparisons = read(tmp_path / "out" / "comparisons.jsonl")
    assert len(comparisons) == 2 * 2 * 5 and all(c["own"] == " is warm, great and fun." for c in comparisons)
    for row in rows:  # counted again from the texts on file
        mine = [c for c in comparisons if (c["run"], c["temperature"]) == (row["run"], float(row["temperature"]))]
        found = [c["outcomes"][row["judge"]] for c in mine]
        counts = [found.count(name) for name in ("win", "tie", "loss")]
        assert [int(row[name]) for name in ("wins", "ties", "losses", "unparsed")] == [*counts, 0]
        assert float(row["win_rate"]) == pytest.approx((counts[0] + counts[1] / 2) / 5)
        assert float(row["tokens"]) == pytest.approx(sum(c["completion"]["tokens"] for c in mine) / 5)
        assert int(row["distinct"]) == len({c["completion"]["text"] for c in mine})
        assert float(row["ended"]) == pytest.approx(sum(c["completion"]["ended"] for c in mine) / 5)
    for c in comparisons:
        difference = reward(c["completion"]["text"]) - reward(c["own"])
        assert c["outcomes"]["toy"] == ("tie" if difference == 0 else "win" if difference > 0 else "loss")

    (found,) = csv.DictReader((tmp_path / "out" / "agreement.csv").read_text(encoding="utf-8").splitlines())
    equal = sum(len(set(c["outcomes"].values())) == 1 for c in comparisons)
    assert (int(found["n"]), float(found["share"])) == (20, equal / 20)
    out = capsys.readouterr().out
    assert f"the same verdict on {equal / 20:.1%} of 20 comparisons" in out and "| toy |" in out


def test_samples_are_the_models_own(home, sweep, tmp_path):
    """At temperature 0 the greedy completions; at 0.5 others that the seed alone decides."""
    sweep()
    model, tokenizer, _ = checkpoint.load(home / "dpo")
    comparisons = [c for c in read(tmp_path / "out" / "comparisons.jsonl") if c["run"] == str(home / "dpo")]
    ids = [[tokenizer.eot, *tokenizer.encode(c["prompt"])] for c in comparisons[:5]]
    greedy = generate(model, ids, 12, tokenizer.eot, temperature=0)
    assert [c["completion"]["text"] for c in comparisons[:5]] == [tokenizer.decode(s) for s in greedy]
    assert [c["completion"]["ended"] for c in comparisons[:5]] == [s[-1] == tokenizer.eot for s in greedy]
    again = sweep(out="again")
    assert contents(tmp_path / "again")["samples.jsonl"] == contents(tmp_path / "out")["samples.jsonl"]
    sweep("--seed", 1, out="other")
    other = read(tmp_path / "other" / "comparisons.jsonl")
    assert other != read(tmp_path / "again" / "comparisons.jsonl") and len(again) == 4


def test_a_stopped_sweep_continues_where_it_stopped(sweep, tmp_path, monkeypatch):
    expected = sweep(out="whole")
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(common, "generate", stopping)
    with pytest.raises(SystemExit) as stop:
        sweep()
    assert stop.value.code == 130
    journal = tmp_path / "out" / "samples.jsonl"
    assert journal.read_bytes().count(b"\n") == 7  # of 12: 2 runs, 2 temperatures, 3 batches of 2, 2 and 1
    journal.write_bytes(journal.read_bytes()[:-30])  # killed while it wrote the seventh
    assert sweep() == expected and len(calls) == 8 + 6
    assert contents(tmp_path / "out")["comparisons.jsonl"] == contents(tmp_path / "whole")["comparisons.jsonl"]
    assert sweep() == expected and len(calls) == 8 + 6  # and again: nothing is sampled


def test_more_prompts_and_temperatures_use_what_is_there(sweep, monkeypatch):
    sweep("--limit", 4)
    sizes = []

    def noting(model, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        return generate(model, prompts, *args, **kwargs)

    monkeypatch.setattr(common, "generate", noting)
    sweep("--overwrite")
    assert sizes == [1] * 4  # the fifth prompt, for 2 runs and 2 temperatures
    sweep("--overwrite", "--temperatures", "1,0")
    assert sizes == [1] * 4 + [2, 2, 1] * 2


def test_retrained_weights_are_sampled_again(home, sweep, tmp_path):
    first = sweep("--seed", 5)
    path = home / "dpo" / "checkpoint.pt"
    kept = path.read_bytes()
    try:
        model, tokenizer, state = checkpoint.load(home / "dpo")
        with torch.no_grad():
            model.wte.weight += 0.5 * torch.randn_like(model.wte.weight)
        checkpoint.save(home / "dpo", model, tokenizer, state)
        sweep("--seed", 5)
    finally:
        path.write_bytes(kept)
    assert (tmp_path / "out" / "samples.jsonl").read_bytes().count(b"\n") == 12 + 6 and len(first) == 4


def test_long_prompts_are_cut_on_the_left(home, tmp_path, capsys):
    rows = [
        {"prompt": "The film is dull. " * 30 + "Her cast", "completion": " sings."},
        {"prompt": "It", "completion": ""},
    ]
    long = write_jsonl(tmp_path / "long.jsonl", rows)
    flags = ("--run", home / "sft", "--data", long, "--judge", "toy", "--temperatures", "0", "--out", tmp_path / "out")
    call(winrate.main, *flags, "--max-new-tokens", 12)
    assert "1 of 2 prompts cut on the left" in capsys.readouterr().out
    model, tokenizer, _ = checkpoint.load(home / "sft")
    ids = common.prompt_ids(tokenizer, [row["prompt"] for row in rows], 12, model)
    assert len(ids[0]) == 1 + 40 - 12 and tokenizer.decode(ids[0]).endswith("Her cast")
    assert ids[1] == [tokenizer.eot, *tokenizer.encode("It")]


def test_a_chat_judge_end_to_end(sweep, tmp_path, monkeypatch):
    """A model that always answers "A": near one half of the wins, asked once for each different pair of texts."""
    need(importlib.util.find_spec("openai"), "needs openai: pip install minidpo[judge]")
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    server.script = [(200, {}, good("what?")), (200, {}, good("Better: A"))]
    try:
        flags = ("--endpoint", server.url, "--model", "tiny", "--key-env", "MY_KEY")
        rows = sweep(*flags, judge=("chat:helpful",))
        asked = len(server.requests)
        assert sum(int(row["unparsed"]) for row in rows) >= 1 and 0 < sum(int(row["wins"]) for row in rows) < 19
        assert sweep(*flags, judge=("chat:helpful",)) == rows and len(server.requests) == asked
    finally:
        server.close()
    held = contents(tmp_path / "out")
    assert len(held["answers.jsonl"].splitlines()) == asked <= 20 and b"MY_KEY" in held["settings.json"]
    assert not any(KEY.encode() in data for data in held.values())


def test_overwriting_with_one_judge_leaves_no_old_agreement(home, sweep, tmp_path, monkeypatch):
    sweep(judge=("toy", f"implicit:{home / 'dpo'},{home / 'sft'}"))
    assert {"agreement.csv", "winrate.png"} <= set(contents(tmp_path / "out"))
    monkeypatch.setattr(winrate, "figure", lambda *_, **__: None)  # as without matplotlib
    sweep("--overwrite")
    assert not {"agreement.csv", "winrate.png"} & set(contents(tmp_path / "out"))


def test_picture(sweep, tmp_path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        need(False, "matplotlib is not installed")
    sweep()
    assert contents(tmp_path / "out")["winrate.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--temperatures", "hot"), "--temperatures 'hot': write numbers from 0"),
        (("--temperatures", "0,-1"), "write numbers from 0"),
        (("--temperatures", "0,nan"), "write numbers from 0"),
        (("--temperatures", ""), "write numbers from 0"),
        (("--judge", "tyo"), "unknown judge 'tyo'"),
        (("--judge", "chat:simple"), "needs --endpoint URL and --model NAME"),
        (("--judge", "chat:simple", "--endpoint", "x", "--model", "m"), "plain base URL"),
        (("--run", "/nowhere/run"), "/nowhere/run not found"),
        (("--data", "/nowhere/rows.jsonl"), "/nowhere/rows.jsonl not found"),
        (("--timeout", "0"), "--timeout 0.0"),
    ],
)
def test_bad_input_is_found_before_any_work(home, tmp_path, capsys, flags, says):
    message = fails(capsys, winrate.main, *required(home), "--judge", "toy", "--out", tmp_path / "out", *flags)
    assert says in message and not list(tmp_path.iterdir())


def test_results_of_other_settings_are_not_replaced_without_being_asked(home, sweep, tmp_path, capsys):
    sweep()
    held = contents(tmp_path / "out")
    flags = (*required(home), "--judge", "toy", "--out", tmp_path / "out", "--seed", 1)
    assert "holds results of other settings" in fails(capsys, winrate.main, *flags)
    assert contents(tmp_path / "out") == held
    sweep("--seed", 1, "--overwrite")
    now = contents(tmp_path / "out")
    assert now["comparisons.jsonl"] != held["comparisons.jsonl"]
    assert now["samples.jsonl"].startswith(held["samples.jsonl"]) and now["samples.jsonl"].count(b"\n") == 24
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file" in fails(capsys, winrate.main, *required(home), "--judge", "toy", "--out", tmp_path / "file")
