"""The gap study: its pairs, its loss without label noise, its figures from the samples, and the command."""

import csv
import math
import statistics

import pytest
import tiny
import torch

import train_dpo
import train_sft
from data.toy_sentiment import grammar
from experiments import common
from experiments.frontier import gap, limit
from minidpo import checkpoint, dataset
from minidpo.sampling import generate
from train_dpo import dpo_loss, response_logps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with an SFT run on the toy's text, hardly trained."""
    folder = tmp_path_factory.mktemp("gap")
    rows = gap.grammar_pairs(100, 0)
    tiny.write_jsonl(folder / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])
    argv = ["--data", folder / "sft.jsonl", "--out", folder / "sft", "--preset", "toy", "--vocab-size", 300]
    argv += ["--epochs", 10, "--lr", 1e-2, "--warmup-steps", 0, "--samples", 0, "--device", "cpu"]
    tiny.call(train_sft.main, *argv)
    return folder / "sft"


@pytest.fixture
def curve():
    """A made-up limit: reward -1 at 0 nats, then 2 sqrt(kl) more."""
    points = [limit.Point(math.inf, 0.0, 0.0, -1.0, 0.0, 0.0, 900.0, 900.0)]
    for i in range(1, 400):
        kl = i / 50
        points.append(limit.Point(kl**-0.5, kl, 0.0, 2 * kl**0.5 - 1, 0.0, 0.0, 900.0, 900.0))
    return points


# ---- pairs ----


def test_pairs_are_nested_by_number_and_apart_by_seed(monkeypatch):
    monkeypatch.setattr(gap, "PAIRS", (50, 100))
    toy = list(gap.toy.rows("pairs_train", 50))
    assert gap.grammar_pairs(50, 0) == toy and gap.grammar_pairs(20, 0) == toy[:20]
    assert gap.grammar_pairs(30, 1)[:20] == gap.grammar_pairs(20, 1)
    assert gap.grammar_pairs(20, 1) == list(gap.toy.rows("pairs_train", 120))[-20:]


def test_preference_is_bradley_terrys():
    good, bad = " is great and warm.", " is dull and long."
    assert grammar.reward(good) - grammar.reward(bad) == 3
    assert gap.preference({"chosen": good, "rejected": bad}) == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-12)
    assert gap.preference({"chosen": bad, "rejected": good}) == pytest.approx(1 / (1 + math.exp(3)), abs=1e-12)


# ---- the loss ----


def test_loss_without_label_noise_is_the_mean_over_the_labels(model):
    """At p it is p (loss as labelled) + (1 - p) (loss of the reversed pair), at 1 train_dpo.py's own loss."""
    policy, tokenizer, _ = checkpoint.load(model)
    policy.double()
    rows, _ = dataset.encode(gap.grammar_pairs(6, 0), dataset.PAIR, tokenizer, 40)
    reference = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 60
    batch = dataset.preference_batch([rows[i] for i in (4, 1)])
    logps = response_logps(policy, batch)
    for p in (1.0, 0.8, 0.5):
        preferred = torch.tensor([1 - p, p], dtype=torch.float64)
        losses, *_ = gap.soft_loss(*logps, *reference[[4, 1]].T, preferred, beta=0.3)
        for j, (i, q) in enumerate(((4, 1 - p), (1, p))):
            margin = 0.3 * ((logps[0][j] - reference[i, 0]) - (logps[1][j] - reference[i, 1])).item()
            expected = q * math.log(1 + math.exp(-margin)) + (1 - q) * math.log(1 + math.exp(margin))
            assert losses[j].item() == pytest.approx(expected, abs=1e-9)
        # the step finds the weights of its own pairs
        weights = torch.tensor([9, p, 9, 9, 1 - p, 9], dtype=torch.float64)
        knobs = gap.training(gap.Settings(beta=0.3))
        step = gap.train_step(
            policy, torch.optim.SGD(policy.parameters(), lr=0.0), rows, reference, weights, [4, 1], knobs
        )
        assert step["loss"] == pytest.approx(losses.mean().item(), abs=1e-9)
    own, *_ = dpo_loss(*logps, *reference[[4, 1]].T, 0.3)
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(gap.soft_loss(*logps, *reference[[4, 1]].T, ones, beta=0.3)[0], own)


def test_policy_and_reference_are_equal_before_training_and_in_bf16(model):
    """Whatever a cause changes, its reference comes from the path and the precision of its policy."""
    policy, tokenizer, _ = checkpoint.load(model)
    policy.set_dropout(0.0)
    gap.prepared.cache_clear()
    _, rows, reference = gap.prepared(policy, tokenizer, 70, 0)
    for dtype in ("float32", "bfloat16"):
        knobs = [{k: v for k, v in cause.items() if k != "soft"} for cause in gap.CAUSES.values()]
        for made in (gap.training(gap.Settings(), **cause) for cause in knobs):
            assert made.fast == gap.training(gap.Settings()).fast and made.dtype == "float32"
            made.dtype = dtype
            own = reference if dtype == "float32" else train_dpo.reference_logps(policy, rows, made)
            train_dpo.check_start(policy, rows, own, list(range(64)), made)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = gap.sequence_kl(policy, policy, [row[0] for row in rows], [row[1] for row in rows])
    assert (plain == 0).all()


# ---- the figures ----


def test_judge_against_one_sample_at_a_time(model, curve):
    reference, tokenizer, _ = checkpoint.load(model)
    policy, *_ = checkpoint.load(model)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    prompts = [row["prompt"] for row in gap.toy.rows("prompts_test", 10) for _ in range(gap.SAMPLES)]
    figures = gap.judge(policy, reference, tokenizer, prompts[:: gap.SAMPLES], curve, seed=4)

    # this model's context is shorter than LONGEST, so a prompt keeps its last 8 tokens
    ids = [[tokenizer.eot, *tokenizer.encode(prompt)[-8:]] for prompt in prompts]
    samples = generate(policy, ids, gap.LONGEST, tokenizer.eot, generator=torch.Generator().manual_seed(4))
    kls = []
    for x, y in zip(ids, samples, strict=True):
        logps = [m(torch.tensor([x + y[:-1]]))[0, len(x) - 1 :].double().log_softmax(-1) for m in (policy, reference)]
        kls.append(sum((logps[0][t, token] - logps[1][t, token]).item() for t, token in enumerate(y)))
    rewards = [grammar.reward(tokenizer.decode(y)) for y in samples]
    kl, reward = sum(kls) / 40, sum(rewards) / 40
    assert figures["kl"] == pytest.approx(kl, abs=1e-3) and kl > 0.1
    assert figures["reward"] == pytest.approx(reward, abs=1e-12)
    assert figures["gap"] == pytest.approx(1 - (reward + 1) / (2 * kl**0.5), rel=1e-2)
    residuals = [r - k / kl**0.5 for r, k in zip(rewards, kls, strict=True)]  # the made-up slope there: kl^-1/2
    means = [sum(residuals[i : i + 4]) / 4 for i in range(0, 40, 4)]  # the four samples of a prompt go together
    se = statistics.stdev(means) / 10**0.5
    assert figures["gap_se"] == pytest.approx(se / (2 * kl**0.5), rel=2e-2)


# ---- the command ----


@pytest.fixture
def argv(model, curve, tmp_path, monkeypatch):
    monkeypatch.setattr(gap, "PAIRS", (60, 90))
    monkeypatch.setitem(gap.toy.ROWS, "prompts_test", 6)
    monkeypatch.setattr(gap, "LONGEST", 8)
    common.write_csv(tmp_path / "limit.csv", curve, digits=6)
    files = ["--limit", tmp_path / "limit.csv", "--csv", tmp_path / "gap.csv", "--figure", tmp_path / "gap.png"]
    return ["--init", model, "--seeds", 2, "--lr", 0.02, *files]


def test_command_trains_once_and_goes_on_where_it_was(argv, tmp_path, capsys, monkeypatch):
    real, trained = gap.one_run, []

    def one_run(cause, pairs, seed, *rest):
        trained.append((cause, pairs, seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return real(cause, pairs, seed, *rest)

    monkeypatch.setattr(gap, "one_run", one_run)
    with pytest.raises(SystemExit):
        tiny.call(gap.main, *argv)
    first = gap.read(tmp_path / "gap.csv")
    assert len(first) == 3 and not (tmp_path / "gap.png").exists()
    tiny.call(gap.main, *argv)
    rows = gap.read(tmp_path / "gap.csv")
    assert len(trained) == 4 + 9 and len({r[:3] for r in rows}) == len(rows) == 12
    assert {r.cause for r in rows} == set(gap.DEFAULT)
    trained_once = [r._replace(gap=0, gap_se=0) for r in rows]  # computed again, from the rounded KL, or NaN
    assert all(r._replace(gap=0, gap_se=0) in trained_once for r in first)
    assert (tmp_path / "gap.png").read_bytes()[:4] == b"\x89PNG"
    one, other = ([r for r in rows if r.cause == cause and r.pairs == 90] for cause in ("DPO", "no label noise"))
    assert one[0].kl != other[0].kl and one[0].kl != one[1].kl  # the labels matter, and the seed
    assert one[0].steps == 2  # 90 pairs, 64 a step

    capsys.readouterr()
    (tmp_path / "gap.png").unlink()
    tiny.call(gap.main, *argv, "--init", "/nowhere")  # nothing is left to train, so no model is loaded
    assert len(trained) == 13 and (tmp_path / "gap.png").exists()
    other = [r.gap for r in gap.read(tmp_path / "gap.csv") if r[:2] == ("no label noise", 90)]
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("no label noise") and "90" in line
    )
    assert f"{statistics.mean(other):.1%}" in line


def test_runs_of_the_csv_are_measured_by_the_limit_asked_for(argv, curve, tmp_path):
    argv += ["--seeds", 1, "--pairs", 60, "--pairs", 60, "--cause", "DPO,DPO"]  # a value given twice is run once
    for _ in range(2):  # the second time the KL comes from the file, rounded, as it does below
        tiny.call(gap.main, *argv)
    (first,) = gap.read(tmp_path / "gap.csv")
    higher = [p._replace(reward=p.reward + p.kl**0.5) for p in curve]  # a gain of 3 sqrt(kl) in place of 2
    common.write_csv(tmp_path / "limit.csv", higher, digits=6)
    tiny.call(gap.main, *argv)
    (again,) = gap.read(tmp_path / "gap.csv")
    assert 1 - again.gap == pytest.approx((1 - first.gap) * 2 / 3, abs=1e-3)


def test_runs_made_otherwise_are_not_mixed_in(argv, model, tmp_path, capsys):
    argv += ["--seeds", 1, "--pairs", 60, "--cause", "DPO"]
    tiny.call(gap.main, *argv)
    for flag in ("--beta", "--lr"):
        assert "another --beta or --lr" in tiny.fails(capsys, gap.main, *argv, flag, 0.5)
    sft, tokenizer, _ = checkpoint.load(model)
    with torch.no_grad():
        sft.wte.weight += 0.1
    checkpoint.save(tmp_path / "other", sft, tokenizer)
    assert "another SFT model" in tiny.fails(capsys, gap.main, *argv, "--init", tmp_path / "other", "--pairs", 70)


def test_every_cause_changes_the_run(argv, tmp_path):
    tiny.call(gap.main, *argv, "--seeds", 1, "--pairs", 70, "--cause", ",".join(gap.CAUSES))
    rows = {row.cause: row for row in gap.read(tmp_path / "gap.csv")}
    assert list(rows) == list(gap.CAUSES) and len({row.kl for row in rows.values()}) == len(rows)
    assert rows["two epochs"].steps == 4 and rows["batches of 32"].steps == 3


def test_command_refuses(argv, tmp_path, capsys):
    assert "did you mean" in tiny.fails(capsys, gap.main, *argv, "--cause", "no label nois").lower()
    for pairs in ("abc", 0, 91):  # seed 0 has 90 pairs here; the next ones are those of seed 1
        assert "from 1 to 90" in tiny.fails(capsys, gap.main, *argv, "--pairs", pairs)
    with open(tmp_path / "gap.csv", "w", encoding="utf-8") as file:
        csv.writer(file).writerows([["a"], ["1"]])
    assert "columns must be cause,pairs" in tiny.fails(capsys, gap.main, *argv)
