"""Devices and precisions, without the devices: what is picked and said; and the GPU measurement, at small size."""

import dataclasses
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import need
from tiny import call, fails

import train_dpo
from experiments.bench import gpu
from minidpo import device
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.scale import memory
from minidpo.settings import UserError

# ---- which device ----


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=True, ...) makes PyTorch say that it has these."""

    def has(cuda=False, mps=False, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4" if not bf16 else "NVIDIA H200")
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda level: setattr(has, "precision", level))

    return has


def test_the_best_device_there_is_picked(machine, monkeypatch):
    monkeypatch.setattr(device, "difference_from_cpu", lambda name: 1e-6)
    for there, picked in ((dict(), "cpu"), (dict(mps=True), "mps"), (dict(cuda=True, mps=True), "cuda")):
        machine(**there)
        assert device.pick_device() == picked
        assert device.pick_device("cpu") == "cpu"
    machine()
    with pytest.raises(UserError, match="no cuda device on this machine"):
        device.pick_device("cuda")
    with pytest.raises(UserError, match="Did you mean 'cuda'"):
        device.pick_device("cudo")


def test_an_mps_that_calculates_wrongly_is_not_used(machine, monkeypatch, capsys):
    machine(mps=True)
    monkeypatch.setattr(device, "difference_from_cpu", lambda name: 0.3)
    assert device.pick_device() == "cpu"
    assert "this machine's MPS calculates wrongly (relative error 0.3" in capsys.readouterr().out
    with pytest.raises(UserError, match="calculates wrongly .* take --device cpu"):
        device.pick_device("mps")


def wrong_columns(x, w, right=F.linear):
    """A wide output whose later columns are wrong, forward and backward."""
    out = right(x, w)
    return torch.cat((out[..., :32768], out[..., :-32768]), -1) if out.shape[-1] > 40000 else out


class WrongBackward(torch.autograd.Function):
    """A linear layer whose backward product is wrong where it sums over much."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x @ w.T

    @staticmethod
    def backward(ctx, gradient):
        (w,) = ctx.saved_tensors
        return gradient @ w * (1.1 if len(w) > 32768 else 1.0), None


def nan_attention(q, k, v, is_causal):
    return v * float("nan")


@pytest.mark.parametrize(
    "name, broken", [("linear", wrong_columns), ("scaled_dot_product_attention", nan_attention), ("linear", "backward")]
)
def test_the_check_against_the_cpu_finds_what_is_wrong(monkeypatch, name, broken):
    """The CPU is right by itself; then its second turn, the device's, is broken as MPS has been."""
    if broken == "backward":
        right = F.linear

        def broken(x, w):
            return WrongBackward.apply(x, w) if len(w) > 32768 else right(x, w)

    assert device.difference_from_cpu("cpu") < 1e-5
    full = torch.full  # called between the two turns

    def then_broken(*args, **kwargs):
        monkeypatch.setattr(F, name, broken)
        return full(*args, **kwargs)

    monkeypatch.setattr(torch, "full", then_broken)
    assert device.difference_from_cpu("cpu") > 1e-2


# ---- which precision ----


def test_a_card_without_bf16_gets_float32_with_a_word(machine, capsys):
    machine(cuda=True, bf16=False)
    for asked in ("auto", "bfloat16"):
        assert device.pick_dtype(asked, "cuda", 768) == "float32"
        said = capsys.readouterr().out
        assert said == "on cuda (Tesla T4), matrix products in float32: this card has no bfloat16\n"
    assert machine.precision == "highest"


def test_device_and_precision_are_stated(machine, capsys):
    machine(cuda=True)
    assert device.pick_dtype("auto", "cuda", 64) == "bfloat16" and machine.precision == "high"
    assert capsys.readouterr().out == "on cuda (NVIDIA H200), matrix products in bfloat16\n"
    assert device.pick_dtype("float32", "cuda", 64) == "float32" and machine.precision == "highest"
    assert device.pick_dtype("auto", "mps", 768) == "float32"
    assert "on mps (Apple's GPU), matrix products in float32" in capsys.readouterr().out
    assert device.pick_dtype("auto", "cpu", 64) == "float32"
    assert f"on cpu ({torch.get_num_threads()} threads), matrix products in float32" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown dtype 'half'"):
        device.pick_dtype("half", "cpu", 64)


def as_tf32(x):
    """fp32 rounded to TF32's 10 explicit bits, to even."""
    bits = x.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@torch.no_grad()
def test_tf32_in_the_head_costs_less_than_bf16_in_the_blocks():
    """Why TF32 is on beside bf16: in nats of a token's log-probability, rms, at GPT-2's depth."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(vocab_size=2000, block_size=64, n_layer=12, n_head=4, n_embd=128), generator)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.mul_(5)  # matrices and logits as large as a trained model's
    ids = torch.randint(2000, (4, 64), generator=generator)
    targets = torch.randint(2000, (4, 64, 1), generator=generator)

    def logps(logits):
        return logits.double().log_softmax(-1).gather(-1, targets)

    def rms(a, b):
        return (a - b).pow(2).mean().sqrt().item()

    hidden, head = model.hidden(ids), model.wte.weight
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.hidden(ids).float()
    exact = logps(hidden.double() @ head.double().T)
    fp32 = rms(logps(hidden @ head.T), exact)
    tf32 = rms(logps(as_tf32(hidden) @ as_tf32(head).T), exact)
    blocks = rms(logps(rounded @ head.T), exact)
    print(f"\nrms error of a token's log-probability: fp32 {fp32:.2g}, TF32 head {tf32:.2g}, bf16 blocks {blocks:.2g}")
    assert fp32 < tf32 / 50 and tf32 < blocks / 5


def test_rmsprop_makes_no_copy_of_its_state():
    optimizer = make_optimizer(GPT(GPTConfig(50, 8, 1, 2, 8)), "rmsprop", 1e-3)
    assert optimizer.defaults["foreach"] is False


# ---- the measurement ----


def test_flops_by_hand():
    """One pair, prompt of 3, responses of 2 and 4: rows of 4 and 6 positions; one layer of 2 channels, 5 tokens."""
    config = GPTConfig(vocab_size=5, block_size=8, n_layer=1, n_head=1, n_embd=2)
    rows = [([1, 2, 3], [4, 0], [1, 2, 3, 0])]
    with torch.device("meta"):
        blocks = sum(p.numel() for p in GPT(config).h.parameters())
    head = 6 * 5 * 2 * 6
    assert gpu.flops(config, rows, shared=False) == 6 * blocks * 10 + 6 * 2 * (16 + 36) + head
    assert gpu.flops(config, rows, shared=True) == 6 * blocks * 7 + 6 * 2 * (16 + 36 - 9) + head


def test_pairs_have_their_shape():
    for shape, (shortest, longest) in {"full": (512, 512), "summaries": (375, 395), "reviews": (36, 72)}.items():
        rows = gpu.random_pairs(shape, 512, 40, 1000, seed=0)
        assert rows == gpu.random_pairs(shape, 512, 40, 1000, seed=0) != gpu.random_pairs(shape, 512, 40, 1000, seed=1)
        lengths = {len(prompt) + len(response) - 1 for prompt, *responses in rows for response in responses}
        assert shortest <= min(lengths) <= max(lengths) <= longest
        assert len(lengths) > 10 or shape == "full"


def measured(tmp_path, *argv):
    call(gpu.main, "--out", tmp_path / "gpu.json", "--device", "cpu", "--batch-size", 4, "--length", 32, *argv)
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["results"]
    assert len((tmp_path / "gpu.md").read_text(encoding="utf-8").split("\n\n")[0].splitlines()) == len(results) + 2
    return results


def test_every_shape_at_small_size(tmp_path):
    results = measured(tmp_path, "--presets", "toy", "--runs", "plain", "--steps", 2)
    assert [(r["shape"], r["run"]) for r in results] == [(shape, "plain") for shape in gpu.SHAPES]
    for result in results:
        assert result["seconds"] > 0 and result["micro_batch"] == 4 and "error" not in result
        assert result["pairs_per_second"] == pytest.approx(4 / result["seconds"])
    full = results[0]
    assert full["tokens_per_second"] == pytest.approx(2 * 4 * 32 / full["seconds"])
    assert full["plan_gib"] > 0 and "mfu" not in full  # of a CPU no peak is known


def test_the_fast_path_and_the_lean_runs(tmp_path, monkeypatch):
    knobs, train_step = [], train_dpo.train_step

    def watched(policy, optimizer, rows, reference, indices, settings):
        knobs.append((settings.fast, policy.h[0].recompute, type(optimizer).__name__, settings.micro_batch_size))
        return train_step(policy, optimizer, rows, reference, indices, settings)

    monkeypatch.setattr(train_dpo, "train_step", watched)
    flags = ("--runs", "fast,lean-rmsprop,lean-adamw", "--shapes", "reviews", "--steps", 1, "--optimizer", "adamw")
    results = measured(tmp_path, "--presets", "toy", *flags)
    assert [(r["run"], r["micro_batch"]) for r in results] == [("fast", 4), ("lean-rmsprop", 1), ("lean-adamw", 1)]
    assert all(r["seconds"] > 0 for r in results)
    assert [r["optimizer"] for r in results] == ["adamw", "rmsprop", "adamw"]
    assert knobs[::2] == [(True, False, "AdamW", 4), (True, True, "RMSprop", 1), (True, True, "AdamW", 1)]


def test_the_compiled_run_compiles(tmp_path, monkeypatch):
    prepared, prepare = [], GPT.prepare
    monkeypatch.setattr(GPT, "prepare", lambda self, *how: prepared.append(how) or prepare(self))
    measured(tmp_path, "--presets", "toy", "--runs", "fast-compiled,fast", "--shapes", "reviews", "--steps", 1)
    assert prepared == [(True, False), (False, False)]


def test_what_does_not_fit_is_tried_smaller_then_noted_and_the_rest_is_measured(tmp_path, monkeypatch):
    ours = gpu.ours

    def too_large(config, rows, knobs, *args):
        if config.n_embd * knobs.micro_batch_size > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return ours(config, rows, knobs, *args)

    monkeypatch.setattr(gpu, "ours", too_large)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    results = measured(tmp_path, "--presets", "imdb,toy", "--runs", "plain", "--shapes", "reviews", "--steps", 1)
    assert results[0]["error"] == "OutOfMemoryError: CUDA out of memory" and "seconds" not in results[0]
    assert results[0]["micro_batch"] == 1
    assert (results[1]["preset"], results[1]["micro_batch"]) == ("toy", 2) and results[1]["seconds"] > 0


def test_when_time_runs_out_it_ends_and_has_written(tmp_path, monkeypatch):
    """The clock jumps by a quarter of the time at each step: two runs are begun, the second is cut to two steps."""
    late = measured(tmp_path, "--presets", "toy", "--runs", "plain", "--shapes", "full", "--seconds", 0)
    assert late == [dict(preset="toy", shape="full", run="plain", error="no time left for it")]

    now, steps, train_step = [0.0], [], train_dpo.train_step

    def slow(*args):
        now[0] += 25
        steps.append(1)
        return train_step(*args)

    monkeypatch.setattr(train_dpo, "train_step", slow)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    results = measured(tmp_path, "--presets", "toy", "--runs", "plain,fast", "--steps", 2, "--seconds", 100)
    assert len(steps) == 3 + 2
    assert [r.get("error") for r in results] == [None, None, *4 * ["no time left for it"]]
    assert results[0]["seconds"] == results[1]["seconds"] == 25


def test_the_largest_number_of_pairs_that_the_plan_allows(monkeypatch):
    config, rows = GPTConfig.preset("gpt2"), gpu.random_pairs("summaries", 512, 64, 50257, seed=0)
    for fast in (False, True):
        knobs = train_dpo.Settings(data="", init="", out="", device="cuda", dtype="bfloat16", fast=fast)
        peaks = {n: gpu.planned(config, rows, dataclasses.replace(knobs, micro_batch_size=n)).peak for n in (8, 16)}
        for room, n in ((peaks[16] * 1.34, 16), (peaks[16] * 1.32, 8), (peaks[8] * 1.34, 8), (2**50, 64), (1, 1)):
            monkeypatch.setattr(memory, "available", lambda device, room=room: room)
            assert gpu.pairs_at_once(config, rows, knobs) == n


def test_mfu_is_the_formula_over_the_cards_peak(monkeypatch):
    settings = gpu.Settings(out="", device="cpu", dtype="float32", length=32, batch_size=2, micro_batch_size=2)
    monkeypatch.setattr(gpu, "ours", lambda *args: [9.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(gpu, "chip", lambda device: "NVIDIA H200 NVL")
    rows = gpu.random_pairs("full", 32, 2, 50257, seed=0)
    for name in ("plain", "fast"):
        result = gpu.measure("gpt2", "full", name, settings, until=0)
        assert result["seconds"] == 2.0  # the median of all but the first
        operations = gpu.flops(GPTConfig.preset("gpt2"), rows, shared=name == "fast")
        assert result["mfu"] == pytest.approx(operations / 2.0 / 989e12)


def test_what_came_of_the_targets():
    def result(run, shape, speed, **figures):
        return dict(preset="gpt2-large", shape=shape, run=run, seconds=1, pairs_per_second=speed, **figures)

    results = [
        result("fast", "full", 9, mfu=0.4, peak_gib=90),
        result("fast-compiled", "full", 10, mfu=0.46, peak_gib=90),
        result("lean-rmsprop", "full", 99, mfu=0.1, peak_gib=12.3),
        result("fast", "summaries", 21),
        result("trl", "summaries", 10),
        result("trl", "reviews", 10),
        dict(preset="gpt2-large", shape="reviews", run="fast", error="no time left for it"),
        dict(result("fast", "reviews", 100), preset="gpt2"),
    ]
    assert gpu.reached(results).splitlines() == [
        "- gpt2-large, full, lean-rmsprop: peak_gib at most 12: 12.3, MISSED",
        "- gpt2-large, full, lean-adamw: peak_gib at most 15: not measured",
        "- gpt2-large, full, fast-compiled: mfu at least 0.45: 0.46, reached",
        "- gpt2-large, summaries, fast: times_trl at least 2: 2.1, reached",
        "- gpt2-large, reviews, the fastest: times_trl at least 1.3: not measured",
    ]


def test_unknown_names_are_refused(tmp_path, capsys):
    for flag, value in (("--presets", "gpt2-huge"), ("--runs", "plane"), ("--shapes", "fool")):
        assert "Valid: " in fails(capsys, gpu.main, "--out", tmp_path / "x.json", "--device", "cpu", flag, value)


def test_trl_is_measured_on_the_same_pairs(tmp_path):
    try:
        import trl  # noqa: F401
    except ImportError:
        need(False, "needs trl: pip install minidpo[bench]")
    (result,) = measured(tmp_path, "--presets", "toy", "--runs", "trl", "--shapes", "reviews", "--steps", 1)
    assert "error" not in result and result["seconds"] > 0


def test_without_trl_the_rest_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    results = measured(tmp_path, "--presets", "toy", "--runs", "trl,fast", "--shapes", "reviews", "--steps", 1)
    assert "ModuleNotFoundError" in results[0]["error"] and results[1]["seconds"] > 0
