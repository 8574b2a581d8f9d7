"""The displacement experiment: its numbers against loops and values by hand, and what its page says on a short run."""

import importlib.util
import json
import math

import pytest
import torch
from conftest import need
from tiny import call, fails

from experiments import displacement
from experiments.displacement import (
    EOT,
    LENGTHS,
    LONGEST,
    RESPONSES,
    STARTS,
    WORDS,
    Free,
    Settings,
    at_optimum,
    dpo,
    every_logp,
    length_pairs,
    mean_optimum,
    optimum,
    sft,
    tiny_gpt,
    twin_pairs,
)
from train_dpo import dpo_loss

SETTINGS = Settings(out="unused")


@torch.no_grad()
def by_loop(model, response, known=None):
    """log pi(y) from the chain rule, one token at a time; `known` keeps what the model said after each beginning."""
    known, total = {} if known is None else known, 0.0
    for i, token in enumerate(response):
        begun = (EOT, *response[:i])
        if begun not in known:
            known[begun] = model(torch.tensor([begun]))[0, -1].log_softmax(-1).tolist()
        total += known[begun][token]
    return total


def test_every_response_is_there_once_and_the_masses_sum_to_1():
    assert len(set(RESPONSES)) == len(RESPONSES) == 1 + 4 + 16 + 64 + 256 + 1024
    assert all((y[-1] == EOT) == (EOT in y) and y.count(EOT) <= 1 and len(y) <= LONGEST for y in RESPONSES)
    model = tiny_gpt(0)
    for weight in model.parameters():  # far from uniform
        weight.data += 0.3 * torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logps = every_logp(model)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert every_logp(Free()).exp().sum().item() == pytest.approx(1, abs=1e-12)
    for i in range(0, len(RESPONSES), 17):
        assert logps[i].item() == pytest.approx(by_loop(model, RESPONSES[i]), abs=1e-10)


def test_twin_pairs_differ_in_one_word_and_share_no_response():
    pairs = twin_pairs(24, seed=1)
    assert len({response for pair in pairs for response in pair}) == 48
    for chosen, rejected in pairs:
        assert len(chosen) == len(rejected) and sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1
        assert chosen[-1] == EOT and set(chosen[:-1]) <= set(WORDS)
    assert pairs != twin_pairs(24, seed=2)


def test_labels_of_length_pairs_know_nothing_of_the_length():
    lengths = [(len(chosen), len(rejected)) for chosen, rejected in length_pairs(3)]
    assert sorted(lengths) == sorted((b, a) for a, b in lengths) and len(set(lengths)) == 16


@pytest.mark.parametrize("mean", [False, True])
def test_curve_against_loops_and_by_hand(mean):
    """Two steps of DPO: masses by a loop over the whole language, margin and loss from the four logps."""
    pairs, beta = length_pairs(0)[:6] if mean else twin_pairs(6, 0), 0.3
    model = tiny_gpt(0)
    before = [[by_loop(model, response) for response in pair] for pair in pairs]
    curve = dpo(model, pairs, beta, 0.02, 2, mean)
    after = [[by_loop(model, response) for response in pair] for pair in pairs]
    assert len(curve) == 3 and curve[0]["margin"] == 0 and curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)

    rewards = [
        [beta * (a - b) / (len(y) if mean else 1) for a, b, y in zip(*rows, strict=True)]
        for rows in zip(after, before, pairs, strict=True)
    ]
    margins = [chosen - rejected for chosen, rejected in rewards]
    last = curve[-1]
    assert last["margin"] == pytest.approx(sum(margins) / 6, abs=1e-10)
    assert abs(last["margin"]) > 1e-3
    assert last["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 6, abs=1e-10)
    assert last["fallen"] == sum(chosen < 0 for chosen, _ in rewards) / 6
    assert last["logps/chosen"] == pytest.approx(sum(row[0] for row in after) / 6, abs=1e-10)  # sums, mean or not
    assert last["logps/rejected"] == pytest.approx(sum(row[1] for row in after) / 6, abs=1e-10)

    columns = {"chosen": {pair[0] for pair in pairs}, "rejected": {pair[1] for pair in pairs}}
    columns["neither"] = set(RESPONSES) - columns["chosen"] - columns["rejected"]
    known = {}
    for name, responses in columns.items():
        mass = sum(math.exp(by_loop(model, response, known)) for response in responses)
        assert last[f"mass/{name}"] == pytest.approx(mass, abs=1e-10)


def test_a_response_in_two_pairs_counts_once_in_the_mass():
    a, b, c = (1, EOT), (2, EOT), (3, EOT)
    point = dpo(tiny_gpt(0), [(a, b), (a, c)], 0.1, 0.01, 0)[0]
    assert point["mass/chosen"] == pytest.approx(math.exp(by_loop(tiny_gpt(0), a)), abs=1e-12)


def test_until_ends_at_the_margin():
    curve = dpo(Free(), twin_pairs(4, 0), 0.5, 0.1, 100, until=0.4)
    assert len(curve) < 100 and curve[-2]["margin"] < 0.4 <= curve[-1]["margin"]


def test_rewards_at_the_optimum_against_every_pair(monkeypatch):
    """Both columns average to -beta KL(ref, pi*), and the margin is the same for each beta: E[r_w - r_l]."""
    monkeypatch.setattr(displacement, "SFT_STEPS", 20)
    rows = at_optimum(0, SETTINGS)
    reference = every_logp(sft(tiny_gpt(0), [chosen for chosen, _ in twin_pairs(24, 0)]))
    reward = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = (reference[:, None] + reference).exp()  # how likely a pair is to be drawn, first and second
    first_wins = reward.exp()[:, None] / (reward.exp()[:, None] + reward.exp())  # Eq. 1
    for row in rows:
        best = optimum(reference, reward, row["beta"])
        assert best.exp().sum().item() == pytest.approx(1, abs=1e-12)
        implicit = row["beta"] * (best - reference)
        chosen = (both * (first_wins * implicit[:, None] + (1 - first_wins) * implicit)).sum().item()
        rejected = (both * (first_wins * implicit + (1 - first_wins) * implicit[:, None])).sum().item()
        assert (row["rewards/chosen"], row["rewards/rejected"]) == pytest.approx((chosen, rejected), abs=1e-10)
        assert row["rewards/margins"] == pytest.approx(rows[0]["rewards/margins"], abs=1e-10)
        middle = (row["rewards/chosen"] + row["rewards/rejected"]) / 2
        assert middle == pytest.approx(-row["beta KL(ref, pi*)"], abs=1e-10) and middle < 0
        assert row["reward gained"] > 0
    # what the page says: below beta 1 the chosen rewards of the perfect policy are negative
    assert [row["rewards/chosen"] < 0 for row in rows] == [True, True, True, False]


def test_mean_optimum_is_where_the_averaged_loss_is_lowest():
    """The gradient of the population loss of averaged log-probabilities is 0 there, and not at Eq. 4's optimum."""
    n, beta = 40, 0.7
    reference = every_logp(tiny_gpt(0))[:n].log_softmax(-1)
    reward = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lengths = LENGTHS[:n]
    first_wins = torch.sigmoid(reward[:, None] - reward)

    def gradient(logps):
        logits = logps.clone().requires_grad_()
        scores, base = logits.log_softmax(-1) / lengths, reference / lengths
        grids = [side.expand(n, n) for side in (scores[:, None], scores, base[:, None], base)]
        (first_wins * dpo_loss(*grids, beta)[0]).mean().backward()
        return logits.grad.abs().max().item()

    best = mean_optimum(reference, reward, lengths, beta)
    assert best.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert gradient(best) < 1e-14
    assert gradient(optimum(reference, reward, beta)) > 1e-4


def test_sum_keeps_the_lengths_and_mean_does_not():
    rows = {row["policy"]: row for row in displacement.by_length(0, SETTINGS) if row["kind"] == "exact"}
    start = rows["reference"]["length"]
    assert abs(rows["sum"]["length"] - start) < 0.02 < 0.2 < rows["mean"]["length"] - start
    assert rows["mean"]["kl"] > 4 * rows["sum"]["kl"]
    for row in rows.values():
        assert sum(row["shares"]) == pytest.approx(1, abs=1e-12)
        assert row["length"] == pytest.approx(sum(n * share for n, share in enumerate(row["shares"], 1)), abs=1e-12)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("displacement")
    call(displacement.main, "--out", out, "--seeds", 1, "--steps", 100, "--lr", 2e-3, "--margin", 0.5)
    return out, json.loads((out / "displacement.json").read_text(encoding="utf-8"))


def test_chosen_fall_while_the_margin_grows_unless_nothing_is_shared(short_run):
    _, result = short_run
    assert [run["start"] for run in result["displaced"]] == list(STARTS)
    for run in result["displaced"]:
        first, last = run["curve"][0], run["compared"]
        assert last["margin"] >= 0.5 > first["margin"]
        assert last["logps/rejected"] < first["logps/rejected"]
        if run["start"] == "free control":
            assert last["logps/chosen"] > first["logps/chosen"] and last["fallen"] == 0
        else:
            assert last["logps/chosen"] < first["logps/chosen"] and last["fallen"] > 0.25
    after_sft = result["displaced"][2]  # one pair: what the two lose can only be in neither column
    assert after_sft["compared"]["mass/neither"] > after_sft["curve"][0]["mass/neither"]


def test_picture_json_and_tables_are_there(short_run, capsys):
    out, result = short_run
    need(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    assert (out / "displacement.png").read_bytes().startswith(b"\x89PNG")
    text = displacement.tables(result)
    run = result["displaced"][0]
    assert f"| {run['compared']['margin']:.2f} | {run['compared']['logps/chosen']:.2f} |" in text
    assert f"{run['gained'][0]['after']:.3f}" in text and text.count("| trained: ") == 4
    assert "displacement.json is there already" in fails(capsys, displacement.main, "--out", out)
