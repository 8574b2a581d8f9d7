"""What must not change the result, for whole runs: commands, from files to weights, in float64.

Which test holds what (in which file; none named: this one). "bits" means bit for bit, all else up to the rounding of
sums in another order.

| change                      | what stays                 | test                                                |
|-----------------------------|----------------------------|-----------------------------------------------------|
| more padding                | a row's log-probabilities  | trap12_* (test_loss, test_data, test_model)         |
|                             | samples                    | ragged_cached_logits_* (test_sampling)              |
|                             | both stages' runs          | run_is_the_same                                     |
| order within a batch        | a row's log-probabilities  | trap12_* (test_loss, test_model)                    |
|                             | both stages' runs          | run_is_the_same                                     |
| who shares the batch        | a row's log-probabilities  | trap12_* (test_loss, test_data, test_model)         |
|                             | a sample's KL              | trap15_sum_over_tokens_* (test_experiments)         |
|                             | metrics, the reference     | measuring_does_not_depend_on_the_batches            |
| micro-batches               | one step                   | trap10_a_step_is_* (test_loss)                      |
|                             | both stages' runs          | run_is_the_same; in fp32 trap10_* (test_runs)       |
| cached or online reference  | its log-probabilities      | trap09_cached_equals_online (test_runs)             |
|                             | the run                    | run_is_the_same                                     |
| batches of similar length   | every row once an epoch    | every_row_once_an_epoch; batches_are_* (test_data)  |
|                             | metrics, the reference     | measuring_does_not_depend_on_the_batches            |
| chosen and rejected swapped | metrics, mirrored          | swapped_pairs_mirror_the_metrics                    |
|                             | the first step, reversed   | first_step_on_swapped_pairs_is_the_opposite_step    |
| save and load               | weights, precision: bits   | float64_is_saved_loaded_and_resumed_in_bits         |
|                             | logits, as a GPT-2 folder  | saved_folders_open_* (test_model)                   |
| stop and resume             | both stages' runs: bits    | trap18_* (test_runs); in float64 float64_is_saved_* |
| evaluation or none          | both stages' weights: bits | trap17_* (test_runs)                                |
| the same seed again         | both stages' runs: bits    | same_seed_* (test_runs)                             |
"""

import itertools

import pytest
import torch
from tiny import call, write_data, write_jsonl

import train_dpo
import train_sft
from minidpo import checkpoint, dataset
from minidpo.dataset import Rows, preference_batch
from minidpo.report import read_metrics

# 22 pairs or 25 rows in batches of 6: two epochs of 4 or 5 steps, the last of 4 pairs or 1 row
KNOBS = ("--batch-size", 6, "--epochs", 2, "--lr", 1e-3, "--warmup-steps", 3, "--samples", 1, "--sample-tokens", 4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The data of `write_data` and `start`, a trained model of stage 1 in float64: all that starts from it stays so."""
    folder = tmp_path_factory.mktemp("invariants")
    write_data(folder)
    call(train_sft.main, "--data", folder / "sft.jsonl", "--out", folder / "sft", "--preset", "toy", *KNOBS)
    model, tokenizer, _ = checkpoint.load(folder / "sft")
    checkpoint.save(folder / "start", model.double(), tokenizer)
    return folder


def sft(home, out, *flags):
    files = ("--data", home / "sft.jsonl", "--eval-data", home / "sft_held_out.jsonl")
    call(train_sft.main, *files, "--init", home / "start", "--out", out, "--eval-every", 3, *KNOBS, *flags)


def dpo(home, out, *flags, pairs="pairs.jsonl", held_out="held_out.jsonl"):
    files = ("--data", home / pairs, "--eval-data", home / held_out)
    call(train_dpo.main, *files, "--init", home / "start", "--out", out, "--eval-every", 3, *KNOBS, *flags)


STAGES = pytest.mark.parametrize("stage", [sft, dpo])


def weights_of(folder):
    """All weights of the run, end to end."""
    return torch.nn.utils.parameters_to_vector(checkpoint.load(folder)[0].parameters()).detach()


def metrics_of(folder):
    """metrics.jsonl without the clock's, and without the wins of step 1, where all pairs tie and rounding decides."""
    lines = [{k: v for k, v in line.items() if not k.endswith("_per_second")} for line in read_metrics(folder)]
    lines[0].pop("rewards/accuracies", None)
    return lines


def assert_same_run(a, b):
    """Every metric of every step, and the weights.

    1e-9: float64 rounds sums of 1e-16, and 10 steps of RMSprop or AdamW, which divide a gradient by its own size,
    stretch that a thousandfold or so; fp32, or one token too many, is off by 1e-6 and more.
    """
    for line, expected in zip(metrics_of(b), metrics_of(a), strict=True):
        assert line == pytest.approx(expected, rel=1e-9, abs=1e-9), f"step {expected['step']}"
    assert weights_of(a).dtype == torch.float64
    torch.testing.assert_close(weights_of(b), weights_of(a), rtol=0, atol=1e-9)


# ---- whole runs ----


def more_padding(monkeypatch):
    """Three more columns in every batch, and not of zeros."""
    sft_batch = dataset.sft_batch

    def padded(*args):
        rows = sft_batch(*args)
        junk = torch.full((len(rows.ids), 3), 11)
        extra = (junk, junk + 1, torch.zeros_like(junk, dtype=torch.bool))
        return Rows(*(torch.cat(both, dim=1) for both in zip(rows, extra, strict=True)))

    monkeypatch.setattr(dataset, "sft_batch", padded)


def other_order_in_the_batch(monkeypatch):
    batches = dataset.batches
    monkeypatch.setattr(dataset, "batches", lambda *args, **knobs: [b[2:] + b[:2] for b in batches(*args, **knobs)])


def online_reference(monkeypatch):
    """A frozen copy of the first policy is asked about every batch; what was computed before training is not used."""
    train_step, frozen = train_dpo.train_step, {}

    def step(policy, optimizer, rows, reference, indices, settings, loss):
        if not frozen:
            frozen["model"], _, _ = checkpoint.load(settings.init)
        with torch.no_grad():
            batch = preference_batch([rows[i] for i in indices])
            online = torch.full_like(reference, torch.nan)
            online[indices] = torch.stack(train_dpo.response_logps(frozen["model"], batch), dim=-1)
        return train_step(policy, optimizer, rows, online, indices, settings, loss)

    monkeypatch.setattr(train_dpo, "train_step", step)


def micro_batches_of_1(monkeypatch):
    return "--micro-batch-size", 1


def micro_batches_of_4(monkeypatch):
    return "--micro-batch-size", 4  # which does not divide the batch of 6


BOTH = (more_padding, other_order_in_the_batch, micro_batches_of_1, micro_batches_of_4)


@pytest.mark.parametrize(
    ("stage", "change"), [*itertools.product((sft, dpo), BOTH), (dpo, online_reference)], ids=lambda f: f.__name__
)
def test_run_is_the_same(home, tmp_path, monkeypatch, stage, change):
    """Each run in a folder of its own, so that the second finds no reference log-probabilities of the first."""
    stage(home, tmp_path / "plain" / "run")
    flags = change(monkeypatch) or ()
    stage(home, tmp_path / "changed" / "run", *flags)
    assert_same_run(tmp_path / "plain" / "run", tmp_path / "changed" / "run")


@STAGES
def test_every_row_once_an_epoch(home, tmp_path, monkeypatch, stage):
    """Three epochs, stopped in the second and resumed."""
    module, n = (train_sft, 25) if stage is sft else (train_dpo, 22)
    train_step, seen = module.train_step, []

    def watch(*args):
        seen.extend(args[3] if stage is sft else args[4])
        return train_step(*args)

    monkeypatch.setattr(module, "train_step", watch)
    stage(home, tmp_path / "run", "--epochs", 3, "--max-steps", 7)
    stage(home, tmp_path / "run", "--epochs", 3, "--max-steps", 0, "--resume")
    epochs = [seen[i : i + n] for i in range(0, len(seen), n)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(n))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


@STAGES
def test_float64_is_saved_loaded_and_resumed_in_bits(home, tmp_path, stage):
    """Nothing on the way through the files rounds to fp32: weights, optimiser state and reference."""

    def tensors_of(folder):
        model, _, state = checkpoint.load(folder)
        moments = [t for entry in state["optimizer"]["state"].values() for name, t in entry.items() if name != "step"]
        return [*model.state_dict().values(), *moments, *([state["reference"]] if stage is dpo else [])]

    stage(home, tmp_path / "whole", "--max-steps", 7)
    stage(home, tmp_path / "parts", "--max-steps", 4)
    stage(home, tmp_path / "parts", "--max-steps", 7, "--resume")
    for whole, parts in zip(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts"), strict=True):
        assert torch.equal(whole, parts) and whole.dtype == parts.dtype == torch.float64
        assert (whole != whole.float()).any()  # more digits than fp32 has


def swapped(home):
    """Writes each file of pairs with chosen and rejected exchanged."""
    for name in ("pairs", "held_out"):
        pairs = dataset.read_jsonl(home / f"{name}.jsonl", dataset.PAIR)
        records = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
        write_jsonl(home / f"{name}_swapped.jsonl", records)


@pytest.mark.parametrize(
    ("flags", "rise"),
    [
        # what a pair of margin m loses more when swapped: log sigmoid(m) - log sigmoid(-m) = m
        (("--beta", 0.3), lambda m: m),
        # of (1 - e) times the one and e times the other
        (("--beta", 0.3, "--label-smoothing", 0.1), lambda m: (1 - 2 * 0.1) * m),
        # (-m / beta - 1 / (2 beta))^2 - (m / beta - 1 / (2 beta))^2
        (("--beta", 0.3, "--loss-type", "ipo"), lambda m: 2 * m / 0.3**2),
        (("--beta", 0.3, "--reference-free"), lambda m: m),
    ],
    ids=["sigmoid", "label smoothing", "ipo", "reference-free"],
)
def test_swapped_pairs_mirror_the_metrics(home, tmp_path, flags, rise):
    """The same run, measured on all pairs and on all pairs swapped.

    The sides change places, margins their sign, accuracy a becomes 1 - a, and the loss rises by what the margin says.
    """
    swapped(home)
    dpo(home, tmp_path / "plain", *flags, held_out="pairs.jsonl")
    dpo(home, tmp_path / "swapped", *flags, held_out="pairs_swapped.jsonl")
    evaluated = 0
    for a, b in zip(metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "swapped"), strict=True):
        if "eval/loss" not in a:
            continue
        expected = {
            "loss": a["eval/loss"] + rise(a["eval/rewards/margins"]),
            "rewards/chosen": a["eval/rewards/rejected"],
            "rewards/rejected": a["eval/rewards/chosen"],
            "rewards/margins": -a["eval/rewards/margins"],
            "rewards/accuracies": 1 - a["eval/rewards/accuracies"],
            "logps/chosen": a["eval/logps/rejected"],
            "logps/rejected": a["eval/logps/chosen"],
        }
        # one forward pass after the same training: only the last digits may differ
        assert {name: b[f"eval/{name}"] for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)
        evaluated += 1
    assert evaluated == 3  # after steps 3, 6 and 8


def test_first_step_on_swapped_pairs_is_the_opposite_step(home, tmp_path):
    """Where policy and reference are one, a pair's gradient is -beta / 2 (grad log pi(y_w) - grad log pi(y_l)).

    Swapping turns its sign round, and with it the step: RMSprop's first is odd in the gradient.
    """
    swapped(home)
    start = weights_of(home / "start")
    dpo(home, tmp_path / "plain", "--max-steps", 1)
    dpo(home, tmp_path / "swapped", "--max-steps", 1, pairs="pairs_swapped.jsonl")
    step, opposite = (weights_of(tmp_path / name) - start for name in ("plain", "swapped"))
    assert step.abs().max() > 1e-3
    # where the gradient is 0 in theory (the keys' biases) and 1e-17 by rounding, RMSprop makes 1e-12 of it at most
    torch.testing.assert_close(opposite, -step, rtol=0, atol=1e-12)


# ---- measuring ----


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("sizes", [dict(batch_size=5), dict(batch_size=64), dict(batch_size=6, micro_batch_size=4)])
def test_measuring_does_not_depend_on_the_batches(home, monkeypatch, sizes, buckets):
    """Held-out metrics of both stages and the reference's log-probabilities, against those of one row at a time.

    The rows in another order, in batches of several sizes, of similar lengths or as they come.
    """
    model, tokenizer, _ = checkpoint.load(home / "start")
    rows = dataset.load_rows(home / "sft.jsonl", dataset.SFT, tokenizer, 40)
    pairs = dataset.load_rows(home / "pairs.jsonl", dataset.PAIR, tokenizer, 40)

    def settings(**knobs):
        return train_dpo.Settings("", "", "", device="cpu", dtype="float32", **knobs)

    one = settings(batch_size=1)
    reference = train_dpo.reference_logps(model, pairs, one)
    moved = reference + 3 * torch.randn(22, 2, generator=torch.Generator().manual_seed(0))  # of a policy gone elsewhere
    metrics = {**train_dpo.evaluate(model, pairs, moved, one), "sft": train_sft.evaluate(model, rows, one)["eval/loss"]}
    assert 0.2 < metrics["eval/rewards/accuracies"] < 0.8

    if not buckets:
        as_they_come = lambda rows, n, **_: [part.tolist() for part in torch.arange(len(rows)).split(n)]  # noqa: E731
        monkeypatch.setattr(dataset, "batches", as_they_come)
    other = settings(**sizes)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))
    pairs, rows = [pairs[i] for i in order], rows[::-1]
    # sums of some hundred terms in another order, in float64
    torch.testing.assert_close(train_dpo.reference_logps(model, pairs, other), reference[order], rtol=1e-12, atol=0)
    again = train_dpo.evaluate(model, pairs, moved[order], other)
    assert {**again, "sft": train_sft.evaluate(model, rows, other)["eval/loss"]} == pytest.approx(metrics, rel=1e-12)
