"""Devices and precisions, without the devices: what is picked and said; and the benchmark for a GPU, at small size."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import need
from tiny import call, fails

import train_dpo
from experiments.bench import __main__ as bench
from experiments.bench import measure, shapes, worker
from minidpo import device
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.scale import memory
from minidpo.scale.weights import save_pretrained
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


def test_the_best_device_there_is_picked(machine):
    for there, picked in ((dict(), "cpu"), (dict(mps=True), "cpu"), (dict(cuda=True, mps=True), "cuda")):
        machine(**there)
        assert device.pick_device() == picked
        assert device.pick_device("cpu") == "cpu"
    assert device.pick_device("mps") == "mps"
    machine()
    with pytest.raises(UserError, match="no cuda device on this machine"):
        device.pick_device("cuda")
    with pytest.raises(UserError, match="Did you mean 'cuda'"):
        device.pick_device("cudo")


def difference_from_cpu(device):
    """Largest relative error of a small layer and of a head of GPT-2's size against the CPU, forward and backward."""

    def compute(device):
        generator = torch.Generator().manual_seed(0)
        shapes = (4, 32, 32), (96, 32), (1040, 64), (50257, 64)
        tensors = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
        x, w, wide_x, wide_w = (tensor.to(device).requires_grad_() for tensor in tensors)
        q, k, v = F.linear(x, w).view(4, 32, 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(4 * q, k, v, is_causal=True).transpose(1, 2).reshape(4, 32, 32)
        logps = F.gelu(y + x, approximate="tanh").log_softmax(-1)
        logits = F.linear(wide_x, wide_w)
        gradients = torch.autograd.grad((logps[..., 5].sum(), logits), (x, w, wide_x), grad_outputs=(None, logits))
        return [tensor.detach().cpu() for tensor in (logps, logits[[0, 1, 1023, 1039]], *gradients)]

    expected = compute("cpu")
    torch.full((2**26,), 1e9, device=device)  # one bug reads past the end of a factor: into these large numbers
    errors = [(a - b).abs().max() / a.abs().max() for a, b in zip(expected, compute(device), strict=True)]
    return torch.stack(errors).nan_to_num(nan=float("inf")).max().item()


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU: MPS is not compared with the CPU")
def test_mps_computes_what_the_cpu_computes():
    assert difference_from_cpu("mps") < 1e-3


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


@pytest.fixture(scope="module")
def healthy_difference():
    return difference_from_cpu("cpu")


@pytest.mark.parametrize(
    "name, broken", [("linear", wrong_columns), ("scaled_dot_product_attention", nan_attention), ("linear", "backward")]
)
def test_the_check_against_the_cpu_finds_what_is_wrong(healthy_difference, monkeypatch, name, broken):
    """The CPU is right by itself; then its second turn, the device's, is broken as MPS has been."""
    if broken == "backward":
        right = F.linear

        def broken(x, w):
            return WrongBackward.apply(x, w) if len(w) > 32768 else right(x, w)

    assert healthy_difference < 1e-5
    full = torch.full  # called between the two turns

    def then_broken(*args, **kwargs):
        monkeypatch.setattr(F, name, broken)
        return full(*args, **kwargs)

    monkeypatch.setattr(torch, "full", then_broken)
    assert difference_from_cpu("cpu") > 1e-2


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


# ---- The benchmark with --device cuda ----

SMALL = shapes.TRIAL  # a model of 7,000 weights


def test_flops_by_hand():
    """One pair, prompt of 3, responses of 2 and 4: rows of 4 and 6 positions; one layer of 2 channels, 5 tokens."""
    model = dict(vocab_size=5, block_size=8, n_layer=1, n_head=1, n_embd=2)
    pairs = [([1, 2, 3], [4, 0], [1, 2, 3, 0])]
    with torch.device("meta"):
        blocks = sum(p.numel() for p in GPT(GPTConfig(**model)).h.parameters())
    head = 6 * 5 * 2 * 6
    assert shapes.mfu_flops(model, pairs, shared=False) == 6 * blocks * 10 + 6 * 2 * (16 + 36) + head
    assert shapes.mfu_flops(model, pairs, shared=True) == 6 * blocks * 7 + 6 * 2 * (16 + 36 - 9) + head


def test_the_four_sizes_with_pairs_of_their_lengths():
    assert {name.rpartition("-")[0] for name in shapes.GPU_SHAPES} == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
    for name, (shortest, longest) in {"full": (512, 512), "summaries": (375, 395), "reviews": (36, 72)}.items():
        pairs = shapes.random_pairs(shapes.SHAPES[f"gpt2-large-{name}"])
        assert len(pairs) == 64 and pairs == shapes.random_pairs(shapes.SHAPES[f"gpt2-large-{name}"])
        lengths = {len(prompt) + len(response) - 1 for prompt, *responses in pairs for response in responses}
        assert shortest <= min(lengths) <= max(lengths) <= longest
        assert len(lengths) > 10 or name == "full"


@pytest.fixture
def folder(tmp_path):
    """Random weights of the small model, in Hugging Face's layout."""
    save_pretrained(GPT(GPTConfig(**SMALL["model"]), torch.Generator().manual_seed(0)), tmp_path / "weights")
    return str(tmp_path / "weights")


def measured(folder, implementation, **changes):
    """What a process measures at the small shape with RMSprop, on the CPU, in this process."""
    work = shapes.work_of({**SMALL, "optimizer": "rmsprop", "lr": 1e-3, "steps": 3}, implementation, "float32")
    return worker.measure({**work, "folder": folder, **changes})


def test_the_command_on_a_card_measures_the_four_sizes_beside_trl(tmp_path, monkeypatch, capsys):
    """With a card that only the parent sees, and a process that measures nothing."""
    asked = []

    def child(work):
        asked.append(work)
        if work["implementation"] == "weights":
            return Path(work["folder"]).mkdir()
        figures = dict(seconds=[9.0, 3.0, 1.0, 2.0], losses=[0.5] * 4, peak_mb=5e3, libraries_mb=0.0, micro_batch=16)
        if work["implementation"] == "minidpo-plain":
            figures = dict(error="OutOfMemoryError: CUDA out of memory", micro_batch=1)
        return figures | dict(cpu="a chip", card="NVIDIA H100 80GB HBM3", threads=1, versions={"torch": "9.9"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "child", child)
    flags = ["--device", "cuda", "--rounds", 1, "--cache", tmp_path / "cache", "--json", tmp_path / "gpu.json"]
    call(bench.main, *flags)
    works = [work for work in asked if work["implementation"] != "weights"]
    assert len(works) == 12 * 6 and {(work["device"], work["dtype"]) for work in works} == {("cuda", "bfloat16")}
    assert {work["optimizer"] for work in works if work["implementation"] != "minidpo-lean-adamw"} == {"rmsprop"}
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [row["implementation"] for row in rows[:6]] == list(shapes.DEFAULTS["cuda"][1])
    for row in rows:
        if row["implementation"] == "minidpo-plain":
            assert row["error"] == "OutOfMemoryError: CUDA out of memory" and "seconds" not in row
            continue
        shape = shapes.SHAPES[row["shape"]]
        shared = row["implementation"] != "trl-precomputed"
        operations = shapes.mfu_flops(shape["model"], shapes.random_pairs(shape), shared)
        assert row["seconds_median"] == 2.0  # the median of all but the first
        assert row["mfu"] == pytest.approx(operations / 2.0 / 989e12)
    assert rows[0]["tokens_per_second"] == 2 * 64 * 512 / 2.0
    out = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3" in out and "| gpt2-large-full | minidpo-compiled | bfloat16 | 2 | 1 | 3 |" in out
    assert "OutOfMemoryError: CUDA out of memory" in out


def test_a_card_is_asked_for_and_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no cuda device" in fails(capsys, bench.main, "--device", "cuda", "--cache", tmp_path)


def test_the_runs_of_minidpo_have_their_flags(folder, monkeypatch):
    runs, train_step = [], train_dpo.train_step

    def watched(policy, optimizer, pairs, reference, indices, settings):
        knobs = settings.fast, policy.h[0].recompute, type(optimizer).__name__, settings.micro_batch_size
        runs.append((*knobs, prepared[-1][0]))
        return train_step(policy, optimizer, pairs, reference, indices, settings)

    monkeypatch.setattr(train_dpo, "train_step", watched)
    prepared, prepare = [], GPT.prepare  # a compiler would take a minute
    monkeypatch.setattr(
        GPT, "prepare", lambda self, *how: prepared.append(how) or prepare(self, compile=False, recompute=how[1])
    )
    figures = {name: measured(folder, name) for name in shapes.IMPLEMENTATIONS if name.startswith("minidpo")}
    assert runs[::3] == [
        (True, False, "RMSprop", 3, False),
        (False, False, "RMSprop", 3, False),
        (False, False, "AdamW", 3, False),
        (True, False, "RMSprop", 3, True),
        (True, True, "RMSprop", 1, False),
        (True, True, "AdamW", 1, False),
    ]
    assert [f["micro_batch"] for f in figures.values()] == [3, 3, 3, 3, 1, 1]
    assert all(f["plan_mb"] > 0 and len(f["seconds"]) == 3 for f in figures.values())
    weights = sum(p.numel() for p in GPT(GPTConfig(**SMALL["model"])).parameters())
    assert figures["minidpo-lean"]["state_mb"] == 12 * weights / 1e6
    assert figures["minidpo-lean-adamw"]["state_mb"] == 16 * weights / 1e6


def test_trl_cuts_its_step_into_as_many_pairs_at_once(folder):
    need(importlib.util.find_spec("trl"), "needs trl: pip install minidpo[bench]")
    ours = measured(folder, "minidpo-plain")["losses"]
    for micro_batch in (3, 1):
        assert measured(folder, "trl-precomputed", micro_batch=micro_batch)["losses"] == pytest.approx(ours, abs=1e-5)
    assert measured(folder, "hf-plain")["losses"] == pytest.approx(ours, abs=1e-5)
    assert ours[2] < ours[0] - 1e-3


def test_what_does_not_fit_is_tried_smaller_then_noted(monkeypatch):
    tried = []

    def too_large(work, pairs, clock, micro_batch):
        tried.append(micro_batch)
        if work["model"]["n_embd"] * micro_batch > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        clock.measured["seconds"].append(1.0)

    monkeypatch.setitem(worker.RUNNERS, "minidpo", too_large)
    figures = measured("", "minidpo", pairs=12)
    assert tried == [12, 6, 4] and figures["micro_batch"] == 4 and figures["seconds"] == [1.0]
    wide = measured("", "minidpo", model={**SMALL["model"], "n_embd": 128})
    assert wide == {"error": "OutOfMemoryError: CUDA out of memory", "micro_batch": 1}


def test_the_largest_number_of_pairs_that_the_plan_allows():
    for name in ("minidpo", "minidpo-plain"):
        work = shapes.work_of(shapes.SHAPES["gpt2-summaries"], name, "bfloat16")
        config, pairs = GPTConfig.preset("gpt2"), shapes.random_pairs(work)
        peaks = {n: memory.plan(config, pairs, worker.train_settings(work, n)).peak for n in (8, 16)}
        for room, n in ((peaks[16] * 1.34, 16), (peaks[16] * 1.32, 8), (peaks[8] * 1.34, 8), (2**50, 64), (1, 1)):
            assert worker.pairs_at_once(work, room)[0] == n
    assert worker.pairs_at_once(shapes.work_of(SMALL, "minidpo-lean", "float32"), 1) == [1]


def test_unknown_names_are_refused(tmp_path, capsys):
    for flag, value in (("--implementations", "plane"), ("--shapes", "gpt2-huge-full"), ("--dtypes", "half")):
        assert "Valid: " in fails(capsys, bench.main, "--cache", tmp_path, flag, value)
