"""The benchmark: all implementations make the same losses, figures are worked by hand, nothing measured is lost."""

import importlib.util
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import need
from tiny import call, fails, write_data
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench import __main__ as bench
from experiments.bench import ablation, growth, measure, shapes, worker
from minidpo import checkpoint
from minidpo.dataset import preference_batch, read_jsonl
from minidpo.model import GPT, GPTConfig
from minidpo.scale import fast
from minidpo.scale.weights import save_pretrained
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

TINY = shapes.TRIAL
WORK = {**TINY, "warmup": 0, "steps": 1}
ROOT = Path(__file__).parent.parent
FIELDS = "shape implementation dtype seconds_median seconds_min seconds_max pairs_per_second peak_mb".split()


def there(*packages):
    for package in packages:
        need(importlib.util.find_spec(package), f"{package} is not installed")


def process(seconds, losses=(0.5, 0.4), peak_mb=100.0):
    """What worker.py prints."""
    return {
        "seconds": seconds, "losses": list(losses), "peak_mb": peak_mb, "libraries_mb": 50.0, "state_mb": 10.0,
        "cpu": "a chip", "card": None, "threads": 1, "versions": {"torch": "9.9"},
    }  # fmt: skip


def row(implementation, median, peak_mb, shape="W1", dtype="float32", losses=(0.5, 0.4)):
    return measure.as_row(shape, dtype, implementation, WORK, [process([median], losses, peak_mb)])


# ---- bench ----


HERE_MB = 60.0  # in place of the memory after the imports, since this process has had other tests before


@pytest.fixture
def here(monkeypatch):
    """The works run in this process, which imports each library once; those of `here.apart` have processes as usual."""
    apart, child = [], measure.child

    def run(work):
        if work["implementation"] == "weights":
            return save_pretrained(GPT(GPTConfig(**work["model"]), torch.Generator().manual_seed(0)), work["folder"])
        if (work.get("sft", False), work["implementation"]) in apart:
            return child(work)
        return {**worker.measure(work), "libraries_mb": HERE_MB, **worker.machine(work["device"])}

    monkeypatch.setattr(measure, "child", run)
    monkeypatch.setattr(fast, "keep_freed_memory", lambda: None)  # it would last longer than the test
    return SimpleNamespace(apart=apart)


def test_all_implementations_make_the_same_losses(tmp_path, capsys, here):
    there("safetensors", "transformers", "trl", "matplotlib")
    here.apart += [(False, "minidpo"), (False, "trl-precomputed"), (True, "hf-plain")]  # each runner once
    (tmp_path / "page.md").write_text("# Page\n<!-- bench -->\nold\n<!-- /bench -->\nend\n", encoding="utf-8")
    flags = ["--shapes", "trial,trial-sft", "--rounds", 1, "--dtypes", "float32", "--threads", 1]
    flags += ["--cache", tmp_path / "cache", "--json", tmp_path / "b.json", "--markdown", tmp_path / "page.md"]
    call(bench.main, *flags)
    rows = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    dpo, sft = ([r for r in rows if r["shape"] == shape] for shape in ("trial", "trial-sft"))
    assert [r["implementation"] for r in dpo] == list(shapes.DEFAULTS["cpu"][1])
    assert [r["implementation"] for r in sft] == ["minidpo", "minidpo-plain", "hf-plain"]  # TRL's trainer is for DPO
    assert all(set(FIELDS) <= set(r) for r in rows) and (tmp_path / "b.png").stat().st_size > 5000
    weights = sum(w.numel() for w in GPT(GPTConfig(**TINY["model"])).parameters())
    for r in rows:
        assert len(r["seconds"]) == 3 and 0 < r["seconds_min"] <= r["seconds_median"] <= r["seconds_max"]
        assert 50 < r["libraries_mb"] < r["peak_mb"] and r["threads"] == 1
        assert r["state_mb"] == 16 * weights / 1e6
    assert [r for r in rows if r["libraries_mb"] != HERE_MB] == [dpo[0], dpo[2], sft[2]]  # had processes of their own
    for rows_of_stage, first in ((dpo, math.log(2)), (sft, math.log(90))):
        plain = rows_of_stage[1]["losses"]
        assert len(plain) == 4 and plain[0] == pytest.approx(first, abs=1e-6 if rows_of_stage is dpo else 0.1)
        assert plain[2] < plain[0] - 0.01 and plain[3] < plain[1] - 0.01  # the rows came back: the updates were felt
        for r in rows_of_stage:
            assert torch.tensor(r["losses"]) == pytest.approx(torch.tensor(plain), abs=1e-5), r["implementation"]
    out = capsys.readouterr().out
    assert "The losses agree" in out and "| trial | trl-precomputed |" in out
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# Page\n<!-- bench -->\n") and page.endswith("<!-- /bench -->\nend\n") and "old" not in page
    assert "| trial | hf-plain | float32 |" in page and "| trial-sft | hf-plain | float32 |" in page


def test_the_loss_of_sft_is_per_response_token(tmp_path, here):
    """Against the mean of the log-probabilities of single rows, by the plain model, before the first update."""
    work = {**shapes.SHAPES["trial-sft"], "steps": 1}
    model = GPT(GPTConfig(**work["model"]), torch.Generator().manual_seed(0))
    save_pretrained(model, tmp_path / "weights")
    rows, found = shapes.random_pairs(work)[: work["pairs"]], []
    for prompt, response in rows:
        ids = torch.tensor([prompt + response])
        logps = model(ids).log_softmax(-1)[0, len(prompt) - 1 : -1]
        found += logps.gather(-1, ids[0, len(prompt) :, None]).flatten().tolist()
    for name in ("minidpo", "minidpo-plain", "hf-plain"):
        got = measure.child({**shapes.work_of(work, name, "float32"), "folder": str(tmp_path / "weights")})
        assert got["losses"] == [pytest.approx(-sum(found) / len(found), abs=1e-5)], name


@pytest.mark.parametrize(
    "where, name, told", [(fast, "row_logps", "minidpo-plain"), (worker, "hf_logps", "hf-plain")], ids=["minidpo", "hf"]
)
def test_an_implementation_with_another_loss_is_told(tmp_path, capsys, monkeypatch, here, where, name, told):
    there("safetensors", "transformers")
    right = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args: 1.001 * right(*args))
    flags = ["--shapes", "trial-sft", "--rounds", 1, "--dtypes", "float32", "--cache", tmp_path / "cache"]
    call(bench.main, *flags)
    out = capsys.readouterr().out
    assert f"trial-sft float32: the losses of minidpo and {told} differ" in out and "The losses agree" not in out


def test_bfloat16_is_autocast_over_the_same_weights(tmp_path, capsys, here):
    there("safetensors")
    flags = ["--shapes", "trial", "--rounds", 1, "--dtypes", "float32,bfloat16", "--cache", tmp_path / "cache"]
    call(bench.main, *flags, "--implementations", "minidpo-plain", "--json", tmp_path / "b.json")
    full, half = (r["losses"] for r in json.loads((tmp_path / "b.json").read_text(encoding="utf-8")))
    assert full != half and full == pytest.approx(half, abs=2e-2)
    assert "| trial | minidpo-plain | bfloat16 |" in capsys.readouterr().out


def test_median_least_and_most_are_over_the_timed_steps_of_all_rounds():
    work = {**TINY, "warmup": 1, "pairs": 8}
    got = measure.as_row("W1", "float32", "trl", work, [process([99.0, 1.0, 2.0]), process([99.0, 3.0, 10.0], (), 7e3)])
    assert (got["seconds_median"], got["seconds_min"], got["seconds_max"]) == (2.5, 1.0, 10.0)
    assert (got["pairs_per_second"], got["peak_mb"], got["rounds"], got["losses"]) == (3.2, 7e3, 2, [0.5, 0.4])
    inputs = 0
    for prompt, *responses in shapes.random_pairs(work):
        inputs += sum(len((prompt + response)[:-1]) for response in responses)  # the last token is only a target
    assert got["tokens_per_second"] == inputs / 2 / 2.5  # two batches


def test_names_that_a_shape_does_not_have_are_left_out(tmp_path, capsys, monkeypatch):
    def child(work):
        if work["implementation"] == "weights":
            return Path(work["folder"]).mkdir()
        return process([9.0, 2.0, 2.0, 2.0], (0.5,) * 4)

    monkeypatch.setattr(measure, "child", child)
    flags = ["--rounds", 1, "--dtypes", "float32", "--cache", tmp_path, "--json", tmp_path / "b.json"]
    for names, cells in {
        "": [("trial-sft", name) for name in ("minidpo", "minidpo-plain", "hf-plain")]
        + [("trial", name) for name in shapes.ON_CPU],
        "trl": [("trial", "trl")],
    }.items():
        call(bench.main, *flags, "--shapes", "trial-sft,trial", "--implementations", names)
        rows = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
        assert [(r["shape"], r["implementation"]) for r in rows] == cells
    message = fails(capsys, bench.main, *flags, "--shapes", "S1,trial-sft", "--implementations", "trl,trl-precomputed")
    assert "trl, trl-precomputed" in message and "Add a shape of DPO" in message


def test_the_shapes_of_a_cpu_and_the_rows_of_sft():
    assert list(shapes.DEFAULTS["cpu"][0]) == ["W1", "W2", "W3", "S1", "S2", "S3"]
    for name, (rows, shortest, longest) in {"S1": (32, 20, 50), "S2": (16, 100, 250), "S3": (4, 100, 250)}.items():
        work = shapes.SHAPES[name]
        found, eot = shapes.random_pairs(work), work["model"]["vocab_size"] - 1
        assert work["pairs"] == rows and len(found) == rows * work["batches"]
        assert all(prompt == [eot] and response[-1] == eot for prompt, response in found)
        assert all(shortest <= len(prompt + response) - 1 <= longest for prompt, response in found)
        tokens, _, scored = shapes.count(found, shared=False)
        assert tokens == scored == sum(len(response) for _, response in found)
        GPTConfig(**work["model"])
    assert shapes.SHAPES["S1"]["model"]["vocab_size"] == 1232


def test_by_default_a_ratio_rests_on_nine_timed_steps():
    assert bench.BenchSettings().rounds >= 3
    assert all(shape["steps"] - shape["warmup"] >= 3 for shape in shapes.CPU_SHAPES.values())


def test_ratios_take_the_better_precision_of_each():
    rows = [
        row("minidpo", 2.0, 100), row("minidpo", 1.0, 60, dtype="bfloat16"),
        row("trl", 3.0, 120), row("trl", 4.0, 110, dtype="bfloat16"),
        row("trl", 9.0, 999, shape="W2"),
    ]  # fmt: skip
    (line,) = bench.ratios(rows)
    assert list(line.values()) == ["W1", "trl", "float32", "bfloat16", 3.0, 0.5, 10 / 70]  # 50 MB of each are libraries
    assert "| W1 | trl | float32 | bfloat16 | 3.00 | 0.50 | 0.14 |" in bench.report(rows)


@pytest.mark.parametrize("other, told", [((0.5, 0.400001), False), ((0.5, 0.41), True), ((0.5, math.nan), True)])
def test_losses_that_differ_are_told(other, told):
    rows = [row("minidpo", 1.0, 1), row("hf-plain", 1.0, 1, losses=other), row("trl", 1.0, 1, "W2", losses=(9.0, 9.0))]
    lines = bench.disagreements(rows)
    assert [line[:56] for line in lines] == ["W1 float32: the losses of minidpo and hf-plain differ by"] * told
    assert ("The losses agree" in bench.report(rows)) is not told


def test_an_interrupt_loses_nothing_turns_interleave_and_the_command_goes_on(monkeypatch, tmp_path, capsys):
    asked = []

    def child(work):
        if work["implementation"] == "weights":
            return Path(work["folder"]).mkdir()
        asked.append((work["pairs"], work["dtype"], work["implementation"]))
        if len(asked) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return process([5.0, float(len(asked))])

    sizes = {"W1": {**TINY, "warmup": 1}, "W2": {**TINY, "warmup": 1, "pairs": 2}}
    monkeypatch.setattr(bench, "SHAPES", sizes)
    monkeypatch.setitem(bench.DEFAULTS, "cpu", (sizes, ("minidpo", "hf-plain"), shapes.DTYPES))
    monkeypatch.setattr(measure, "child", child)
    flags = ["--rounds", 3, "--cache", tmp_path / "cache", "--json", tmp_path / "b.json"]
    assert "stopped" in fails(capsys, bench.main, *flags)
    one_round = [(n, d, i) for n in (3, 2) for d in ("float32", "bfloat16") for i in ("minidpo", "hf-plain")]
    assert asked == one_round + one_round[:1]
    rows = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert [r["rounds"] for r in rows] == [2] + [1] * 7

    (tmp_path / "cache" / "W1-float32-hf-plain-0.json").unlink()
    call(bench.main, *flags)
    assert asked[9:] == [one_round[1], *one_round[1:], *one_round]
    assert "8 of 24 processes ran before" in capsys.readouterr().out
    rows = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert [r["rounds"] for r in rows] == [3] * 8 and rows[0]["seconds"] == [1.0, 9.0, 18.0]

    call(bench.main, *flags)  # nothing is left to do
    call(bench.main, *flags, "--rounds", 4, "--no-measure")
    assert len(asked) == 25 and "24 of 32 processes" in capsys.readouterr().out
    monkeypatch.setitem(bench.SHAPES["W2"], "pairs", 5)  # other work: what was measured is not taken for it
    call(bench.main, *flags)
    assert asked[25:] == [(5, dtype, name) for _ in range(3) for n, dtype, name in one_round if n == 2]


def test_bad_names_a_page_without_block_and_a_failing_process(tmp_path, capsys):
    assert "'W2'" in fails(capsys, bench.main, "--shapes", "W1,W4")
    assert "'hf-plain'" in fails(capsys, bench.main, "--implementations", "hf-plane")
    (tmp_path / "page.md").write_text("<!-- bench -->\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no lines"):
        measure.tell(bench.BenchSettings(markdown=tmp_path / "page.md"), "bench", [], "text", None, {})
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "<!-- bench -->\n"
    with pytest.raises(UserError, match="(?s)exit code 1.*KeyError: 'llama'"):
        measure.child({**shapes.work_of(TINY, "trl", "float32"), "implementation": "llama"})


def test_pairs_keep_to_their_bounds():
    rows = shapes.random_pairs(TINY)
    assert len(rows) == 2 * 3 and rows == shapes.random_pairs(TINY)
    for prompt, *responses in rows:
        assert prompt[0] == 89 and 2 <= len(prompt) - 1 <= 9 and 89 not in prompt[1:]
        for response in responses:
            assert response[-1] == 89 and 1 <= len(response) - 1 <= 7 and 89 not in response[:-1]
    assert [shapes.batch_of(step, TINY) for step in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_the_peak_is_that_of_the_timed_steps():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("a peak that can be set back: Linux only")
    clock = worker.Clock({"device": "cpu", "warmup": 1})
    sizes = (400, 1, 100)  # MB: the first step is not timed
    for size in sizes:
        clock.start()
        block = bytearray(size * 10**6)
        block[::4096] = b"x" * len(block[::4096])  # a page is resident once it is written to
        resident = worker.memory_mb("cpu")
        del block
        clock.stop(0.0)
    assert abs(clock.measured["peak_mb"] - resident) < 50


# ---- counting ----


def flops_by_counting(work, rows, attention):
    """Token by token: the products that the shared row of each pair takes."""
    C, V, L = 16, 90, 2
    total = 0
    for prompt, *responses in rows:
        rows_of_pair = [range(1, len(prompt) + 1)]  # how many positions each token sees, itself included
        rows_of_pair += [range(len(prompt) + 1, len(prompt) + len(response)) for response in responses]
        after_attention = 2 * C * C + 2 * C * 4 * C + 2 * 4 * C * C
        for seen in (n for part in rows_of_pair for n in part):
            total += L * 2 * C * 3 * C + (L - 1) * after_attention
            total += attention * L * (2 * seen * C + 2 * seen * C)
        total += sum(2 * C * V + after_attention for response in responses for _ in response)
    return 3 * total


def test_flops_token_by_token():
    work = growth.shape_of(prompt=7, response=4, vocab_size=90, model=(2, 64))
    rows = shapes.random_pairs(work)
    assert {tuple(map(len, pair)) for pair in rows} == {(7, 4, 4)} and work["model"]["n_head"] == 1
    work["model"]["n_embd"] = 16
    assert shapes.fast_flops(work["model"], rows) == flops_by_counting(work, rows, attention=1)


def linear_flops(function):
    """Floating-point operations of the products of two matrices that `function` makes; attention's are batched."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for kind, n in counts.items() if str(kind).removeprefix("aten.") in ("mm", "addmm"))


def test_the_fast_path_makes_exactly_the_products_that_are_counted():
    work = shapes.work_of(TINY, "minidpo", "float32")
    rows = shapes.random_pairs(work)
    model = GPT(GPTConfig(**work["model"]), torch.Generator().manual_seed(0))
    distinct = [(prompt, [1, *chosen], [2, *rejected]) for prompt, chosen, rejected in rows]  # no common first token

    def step(pairs):
        chosen, rejected = fast.response_logps(model, preference_batch(pairs))
        (chosen - rejected).sum().backward()

    got = sum(linear_flops(lambda i=i: step(distinct[3 * i : 3 * i + 3])) for i in range(2))
    assert got == flops_by_counting(work, distinct, attention=0)


# ---- growth ----


def test_growth_end_to_end_and_on_from_where_it_was(monkeypatch, tmp_path, capsys, here):
    there("safetensors", "matplotlib")
    here.apart += [(False, "matmul-rate")]
    monkeypatch.setattr(growth, "VARIED", {"prompt": ((3, 5), "prompt, tokens"), "model": (((1, 64),), "weights")})
    monkeypatch.setattr(growth, "BASE", dict(prompt=4, response=3, vocab_size=50, model=(1, 64)))
    monkeypatch.setattr(growth, "COMPARED", ("minidpo",))
    page = tmp_path / "page.md"
    page.write_text("<!-- growth -->\n<!-- /growth -->\n", encoding="utf-8")
    flags = ["--rounds", 1, "--threads", 1, "--cache", tmp_path / "c", "--json", tmp_path / "g.json"]
    call(growth.main, *flags, "--markdown", page)
    result = json.loads((tmp_path / "g.json").read_text(encoding="utf-8"))
    assert [(p["varied"], p["value"]) for p in result["points"]] == [("prompt", 3), ("prompt", 5), ("model", [1, 64])]
    assert result["flops_per_second"] > 1e8 and result["points"][0]["flops"] < result["points"][1]["flops"]
    assert all(0 < p["libraries_mb"] < p["peak_mb"] and p["seconds_median"] > 0 for p in result["points"])
    assert (tmp_path / "g.png").stat().st_size > 5000
    assert "| model | 1x64 | minidpo |" in capsys.readouterr().out and "| prompt | 5 | minidpo |" in page.read_text(
        encoding="utf-8"
    )
    monkeypatch.setattr(measure, "child", None)  # which a second run has no need of
    call(growth.main, *flags)
    assert json.loads((tmp_path / "g.json").read_text(encoding="utf-8")) == result
    assert "4 of 4 processes ran before" in capsys.readouterr().out


# ---- The ablation ----


def test_the_ablation_has_a_line_per_idea_and_goes_on(tmp_path, capsys, monkeypatch):
    asked = []

    def child(work):
        if work["implementation"] == "weights":
            return Path(work["folder"]).mkdir()
        asked.append(work["without"])
        slower = 1.5 if work["without"] == "shared prompts" else 1.0
        return process([9.0, 2.0 * slower, 2.0 * slower, 2.0 * slower], (0.5,) * 4, peak_mb=100 * slower)

    monkeypatch.setattr(measure, "child", child)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- ablation -->\n<!-- /ablation -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(bench, "SHAPES", {"W1": TINY, "W2": TINY})
    flags = ("--rounds", 1, "--shapes", "W1,W2", "--dtypes", "float32", "--cache", tmp_path, "--markdown", page)
    argv = ("--ablation", *flags)
    call(bench.main, *argv)
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[2] == "| left out (float32) | W1 time | W1 peak | W2 time | W2 peak |"
    assert [line.split(" | ")[0][2:] for line in lines[4:-2]] == ["nothing", *ablation.WITHOUT]
    assert lines[4] == "| nothing | 2 s | 100 MB | 2 s | 100 MB |"
    assert lines[5] == "| shared prompts | 1.50 | 1.50 | 1.50 | 1.50 |"
    assert asked == 2 * ["", *ablation.WITHOUT]
    call(bench.main, *argv)
    assert len(asked) == 2 * (1 + len(ablation.WITHOUT))


def test_the_worker_takes_the_idea_out(tmp_path, monkeypatch):
    taken_out = []
    monkeypatch.setitem(ablation.WITHOUT, "shared prompts", lambda: taken_out.append("shared prompts"))
    monkeypatch.setitem(worker.RUNNERS, "minidpo", lambda *args: None)
    worker.measure(shapes.work_of(TINY, "minidpo", "float32"))
    assert not taken_out
    worker.measure(shapes.work_of(TINY, "minidpo without shared prompts", "float32"))
    assert taken_out == ["shared prompts"]


# ---- Precision ----


def test_errors_of_bf16_on_the_same_weights(tmp_path, capsys):
    """With large logits, which round to steps of 1/16 in bf16, minidpo is ten times nearer to fp32 than its peers."""
    there("safetensors", "transformers", "trl")
    write_data(tmp_path)
    texts = [record["completion"] for record in read_jsonl(tmp_path / "sft.jsonl", ("completion",))]
    tokenizer = Tokenizer.train(texts, 300)
    shape = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=1, n_head=2, n_embd=16)
    model = GPT(shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.wte.weight *= 50
        model.ln_f.weight *= 8
    checkpoint.save(tmp_path / "run", model, tokenizer)
    (tmp_path / "page.md").write_text("<!-- precision -->\n<!-- /precision -->\n", encoding="utf-8")
    files = ("--data", tmp_path / "pairs.jsonl", "--markdown", tmp_path / "page.md")
    call(bench.main, "--precision", tmp_path / "run", *files)
    lines = (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()[3:-1]
    found = {name: float(sd) for _, name, sd, _, _ in (map(str.strip, line.split("|")) for line in lines)}
    assert list(found) == ["minidpo-plain", "minidpo", "trl", "hf"]
    assert max(found["minidpo-plain"], found["minidpo"]) < 0.1 * min(found["trl"], found["hf"])


# ---- The page ----


@pytest.mark.parametrize("mark, report", [("bench", bench.report), ("growth", growth.report)])
def test_the_tables_of_the_page_are_those_of_the_figures_kept(mark, report):
    figures = json.loads((ROOT / f"docs/bench/{mark}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
    assert page.partition(f"<!-- {mark} -->\n")[2].startswith(f"{report(figures)}\n<!-- /{mark} -->")
