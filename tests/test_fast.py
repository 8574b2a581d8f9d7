"""The fast path against the plain one, on random models and pairs: log-probabilities, gradients, whole trainings.

The plain path is held to loops and values by hand in test_loss.py.
"""

import itertools
import random

import pytest
import torch
from tiny import call, fails, write_data

import train_dpo
import train_sft
from experiments.bench import ablation
from minidpo import dataset
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.report import read_metrics
from minidpo.scale import fast

EOT = 96
BETA = 0.5
ODD = {  # rows as dataset.encode makes them: prompt with the eot before it, responses with the eot behind
    "empty prompt": ([EOT], [3, 1, EOT], [4, EOT]),
    "one-token responses": ([EOT, 5, 6], [3], [4]),
    "equal lengths": ([EOT, 5], [3, 1, EOT], [4, 2, EOT]),
    "at the context limit": ([EOT, *range(30)], [7] * 18, [8] * 14),
    "responses that share a prefix": ([EOT, 1], [5, 6, 7, EOT], [5, 6, 8, 9, EOT]),
    "one response the beginning of the other": ([EOT, 1], [5, 6, 7], [5, 6]),
    "the same in padding's id": ([0, 0], [0, 0, 0], [0, 0]),
    "a prompt and nothing like it": ([EOT, *range(20)], [EOT], [9, EOT]),
}


def model_of(dtype, seed=0):
    """A model no weight of which is at a special value."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=97, block_size=48, n_layer=3, n_head=4, n_embd=32), generator).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def random_pairs(n, seed=0):
    draw = random.Random(seed)

    def ids(least, most):
        return [draw.randrange(97) for _ in range(draw.randint(least, most))]

    return [([EOT, *ids(0, 12)], [*ids(0, 20), EOT], [*ids(0, 20), EOT]) for _ in range(n)]


def loss_of(logps):
    """DPO's loss against a reference that differs from pair to pair."""
    reference = -(torch.arange(1, 1 + len(logps[0])).to(logps[0]) ** 0.5)
    return train_dpo.dpo_loss(*logps, reference, 1.1 * reference, beta=BETA)[0].mean()


def gradients(model, function, batch):
    model.zero_grad()
    logps = function(model, batch)
    loss = loss_of(logps)
    loss.backward()
    return torch.cat(logps).detach(), loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_equal_paths(model, rows):
    """The bounds for fp32, and 1e-11 for float64: on each log-probability, the loss and each gradient tensor."""
    batch = dataset.preference_batch(rows)
    plain_logps, plain_loss, plain = gradients(model, train_dpo.response_logps, batch)
    fast_logps, fast_loss, found = gradients(model, fast.response_logps, batch)
    exact = plain_logps.dtype == torch.float64
    allowed = torch.tensor(1e-11) if exact else 1e-5 + 1e-6 * plain_logps.abs()
    assert fast_logps.dtype == plain_logps.dtype
    assert ((fast_logps - plain_logps).abs() <= allowed).all()
    assert abs(fast_loss - plain_loss) <= BETA * allowed.max()
    whole = sum(grad.norm() ** 2 for grad in plain.values()) ** 0.5
    for name, grad in plain.items():
        error = (found[name] - grad).norm()
        # keys' biases have no gradient but rounding: softmax ignores what is added to all scores
        assert error <= (1e-11 if exact else 1e-4) * max(grad.norm(), 1e-6 * whole), name
        if grad.norm() < 1e-6 * whole:
            assert error <= (1e-11 if exact else 1e-4) * whole, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_models_and_pairs(dtype, recompute, seed):
    model = model_of(dtype, seed).prepare(recompute=recompute)
    assert_equal_paths(model, random_pairs(9, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_an_odd_pair_alone_and_in_company(dtype, name):
    model = model_of(dtype)
    assert_equal_paths(model, [ODD[name]])
    assert_equal_paths(model, [*random_pairs(2), ODD[name], *random_pairs(2, seed=1)])


def test_all_odd_pairs_in_one_batch():
    assert_equal_paths(model_of(torch.float64), list(ODD.values()))


@pytest.mark.parametrize("mistake", range(4))
def test_the_comparison_goes_red_for_a_small_mistake(mistake, monkeypatch):
    """Each is a mistake that could be made in fast.py."""
    pack, attention = fast.pack, fast.causal_attention
    mistakes = [
        ("pack", lambda *sides: (p := pack(*sides))._replace(positions=torch.arange(len(p.ids)) % 48)),
        ("pack", lambda *sides: (p := pack(*sides))._replace(targets=p.targets.roll(1))),
        ("pack", lambda *sides: (p := pack(*sides))._replace(home=p.home.roll(1))),
        ("causal_attention", lambda q, k, v: attention(q, k, v.flip(0))),
    ]
    monkeypatch.setattr(fast, *mistakes[mistake])
    with pytest.raises(AssertionError):
        assert_equal_paths(model_of(torch.float32), random_pairs(9))


def fifty_steps(function, loss=loss_of):
    """The weights after 50 steps of AdamW at 1e-3 in float64."""
    model, pairs = model_of(torch.float64), random_pairs(40)
    optimizer = make_optimizer(model, "adamw", 1e-3)
    for step in range(50):
        batch = dataset.preference_batch([pairs[(8 * step + i) % 40] for i in range(8)])
        loss(function(model, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_fifty_steps_of_adamw_give_the_same_weights():
    plain = fifty_steps(train_dpo.response_logps)
    assert (fifty_steps(fast.response_logps) - plain).abs().max() <= 1e-9
    flipped = fifty_steps(fast.response_logps, lambda logps: loss_of(logps[::-1]))
    assert (flipped - plain).abs().max() > 1e-3


def test_gradients_add_up_over_micro_batches():
    """Of the embedding too, which has a gradient as a lookup and one as the head."""
    model, rows = model_of(torch.float64), random_pairs(6)
    expected = gradients(model, train_dpo.response_logps, dataset.preference_batch(rows))[2]["wte.weight"].clone()
    model.zero_grad()
    for part, first in ((rows[:2], 1), (rows[2:], 3)):
        logps = fast.response_logps(model, dataset.preference_batch(part))
        reference = -(torch.arange(first, first + len(part)).double() ** 0.5)
        (train_dpo.dpo_loss(*logps, reference, 1.1 * reference, beta=BETA)[0].sum() / 6).backward()
    assert (model.wte.weight.grad - expected).abs().max() < 1e-12


def test_trap06_bf16_logits_far_from_zero_on_a_long_response():
    """As GPT-2's, all logits share an offset of about -100; the sums must be as good as those of an fp32 head."""
    generator = torch.Generator().manual_seed(0)
    n, C, V = 300, 32, 1000
    hidden = torch.randn(n, C, generator=generator)
    hidden[:, 0] = 10
    embedding = 0.3 * torch.randn(V, C, generator=generator)
    embedding[:, 0] = -10
    targets = torch.randint(V, (n,), generator=generator)
    exact = torch.log_softmax(hidden.double() @ embedding.double().T, -1).gather(-1, targets[:, None]).sum()
    logps = fast.ScoredLogps.apply(hidden, embedding, targets, torch.bfloat16)
    assert logps.dtype == torch.float32
    head_fp32 = torch.log_softmax((hidden.bfloat16().float() @ embedding.T), -1).gather(-1, targets[:, None]).sum()
    assert abs(logps.sum() - exact) < 3 * abs(head_fp32 - exact) + 0.1  # nats, of some 2,500
    careless = (hidden.bfloat16() @ embedding.bfloat16().T).float().log_softmax(-1).gather(-1, targets[:, None]).sum()
    assert abs(careless - exact) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_and_chunks_of_the_head(dtype, monkeypatch):
    """Chunks of every size, one token included, change nothing; bf16 is as near as the plain path in bf16."""
    monkeypatch.setattr(fast, "CHUNK", 97 * 3)
    if dtype == torch.float32:
        assert_equal_paths(model_of(dtype), random_pairs(5))
        return
    batch, model = dataset.preference_batch(random_pairs(5)), model_of(torch.float32)
    exact = torch.cat(train_dpo.response_logps(model.double(), batch))
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = (torch.cat(f(model, batch)) for f in (train_dpo.response_logps, fast.response_logps))
    assert (found - exact).abs().max() < 2 * (plain - exact).abs().max() + 0.05
    assert ((found - plain).abs() <= 1e-3 * plain.abs() + 0.05).all()


@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_as_near_as_the_plain_path_if_the_logits_are_large(seed):
    """As in a trained model: logits far apart, and blocks that add little, so that the head decides the error."""
    model, batch = model_of(torch.float32, seed), dataset.preference_batch(random_pairs(64, seed))
    with torch.no_grad():
        model.ln_f.weight *= 8
        for block in model.h:
            block.attn.c_proj.weight *= 0.05
            block.mlp.c_proj.weight *= 0.05
        exact = torch.cat(train_dpo.response_logps(model.double(), batch))
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            plain, found = (torch.cat(f(model, batch)) for f in (train_dpo.response_logps, fast.response_logps))
    assert (found - exact).std() <= 1.3 * (plain - exact).std() + 1e-4


def test_a_call_leaves_the_allocator_of_the_process_alone(monkeypatch):
    """Only a program may change it."""
    monkeypatch.setattr(fast, "keep_freed_memory", None)
    fast.response_logps(model_of(torch.float32), dataset.preference_batch(random_pairs(2)))


def test_logits_are_held_once_and_for_scored_tokens_only():
    """What autograd keeps: one tensor of (scored tokens, V), no other with V columns but the embedding."""
    model, batch = model_of(torch.float32), dataset.preference_batch(random_pairs(7))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        fast.response_logps(model, batch)
    scored = int(sum(rows.mask.sum() for rows in batch))
    wide = [tuple(t.shape) for t in kept.values() if t.dim() > 1 and t.shape[-1] == 97]
    assert wide == [(scored, 97)]


def test_the_shared_prompt_is_computed_once(monkeypatch):
    """By the number of rows that the first linear layer sees."""
    model, rows = model_of(torch.float32), random_pairs(7)
    seen = []
    model.h[0].attn.c_attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    fast.response_logps(model, dataset.preference_batch(rows))
    expected = 0
    for prompt, chosen, rejected in rows:
        chosen, rejected = prompt + chosen[:-1], prompt + rejected[:-1]  # the last id is only a target
        both = sum(1 for _ in itertools.takewhile(lambda ids: ids[0] == ids[1], zip(chosen, rejected, strict=False)))
        expected += len(chosen) + len(rejected) - both
    assert seen == [(expected, 32)]


def test_a_run_with_fast_equals_one_without(tmp_path):
    """The command, reference included; and it says so in its settings."""
    write_data(tmp_path)
    knobs = ("--epochs", 1, "--lr", 1e-3, "--warmup-steps", 2, "--samples", 1, "--sample-tokens", 4, "--batch-size", 6)
    call(train_sft.main, "--data", tmp_path / "sft.jsonl", "--out", tmp_path / "sft", "--preset", "toy", *knobs)
    for flags in ((), ("--fast",)):
        files = ("--data", tmp_path / "pairs.jsonl", "--eval-data", tmp_path / "held_out.jsonl")
        out = tmp_path / "_".join(("dpo", *flags))
        call(train_dpo.main, *files, "--init", tmp_path / "sft", "--out", out, "--dtype", "float32", *knobs, *flags)
    plain, found = (read_metrics(tmp_path / name) for name in ("dpo", "dpo_--fast"))
    for before, after in zip(plain, found, strict=True):
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-4), (before["step"], name)


# ---- SFT ----


def sft_settings(dtype="float32", **how):
    return train_sft.Settings(data="", out="", device="cpu", dtype=dtype, **how)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
def test_sft_loss_and_gradients(dtype, rtol, recompute):
    rows = [row[:2] for row in [*random_pairs(9), *ODD.values()]]
    found = {}
    for fast_path in (False, True):
        model = model_of(dtype).prepare(recompute=recompute)
        loss = train_sft.response_loss(model, rows, range(len(rows)), sft_settings(fast=fast_path))
        loss.backward()
        assert loss.dtype == dtype
        found[fast_path] = [loss.detach(), *(weight.grad for weight in model.parameters())]
    whole = max(grad.norm() for grad in found[False][1:])
    for plain, ours in zip(found[False], found[True], strict=True):
        assert (ours - plain).norm() <= rtol * max(plain.norm(), 1e-3 * whole)


def test_sft_computes_no_padding_and_logits_at_response_tokens_only():
    model, rows = model_of(torch.float32), [row[:2] for row in random_pairs(7)]
    seen, kept = [], {}
    model.h[0].attn.c_attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        train_sft.response_loss(model, rows, range(7), sft_settings(fast=True))
    assert seen == [(sum(len(prompt) + len(response) - 1 for prompt, response in rows), 32)]
    wide = [tuple(t.shape) for t in kept.values() if t.dim() > 1 and t.shape[-1] == 97]
    assert wide == [(sum(len(response) for _, response in rows), 97)]


def test_an_sft_run_with_fast_equals_one_without(tmp_path):
    write_data(tmp_path)
    knobs = ("--epochs", 2, "--lr", 1e-3, "--warmup-steps", 2, "--samples", 1, "--sample-tokens", 4, "--batch-size", 6)
    found = []
    for flags in ((), ("--fast",), ("--fast", "--micro-batch-size", 2)):
        files = ("--data", tmp_path / "sft.jsonl", "--eval-data", tmp_path / "sft_held_out.jsonl")
        out = tmp_path / "_".join(map(str, ("sft", *flags)))
        call(train_sft.main, *files, "--preset", "toy", "--out", out, "--dtype", "float32", *knobs, *flags)
        found.append(read_metrics(out))
    for before, *others in zip(*found, strict=True):
        for after in others:
            for name in {"loss", "grad_norm", "eval/loss"} & before.keys():
                assert after[name] == pytest.approx(before[name], rel=1e-4), (before["step"], name)


def test_sft_with_dropout_has_no_fast_path(tmp_path, capsys):
    write_data(tmp_path)
    flags = ("--preset", "toy", "--dropout", 0.1, "--fast")
    message = fails(capsys, train_sft.main, "--data", tmp_path / "sft.jsonl", "--out", tmp_path / "sft", *flags)
    assert "--fast has no dropout. Leave out --fast, or --dropout 0.1." in message


def test_compiled_blocks_change_no_number(monkeypatch):
    """Traced as for torch.compile, then run as traced: a compiler would take a minute."""
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    traced = torch.compile(fast.through, backend=backend, dynamic=True, fullgraph=True)
    monkeypatch.setattr(fast, "compiled_through", lambda: traced)
    for recompute in (False, True):
        plain, model = model_of(torch.float64), model_of(torch.float64)
        for block in model.h:
            block.compiled, block.recompute = True, recompute
        for seed in range(3):
            batch = dataset.preference_batch(random_pairs(5 + seed, seed))
            expected = gradients(plain, fast.response_logps, batch)
            torch.testing.assert_close(gradients(model, fast.response_logps, batch), expected, rtol=1e-9, atol=1e-10)
    assert len(graphs) == 2  # all blocks and sizes; the last block


@pytest.mark.parametrize("idea", ablation.WITHOUT)
def test_without_any_one_idea_the_numbers_are_the_same(idea, monkeypatch):
    """So that the ablation measures what an idea costs or saves, and nothing else."""
    names = ("shared_prefix", "real_positions", "hidden_states", "ScoredLogps", "causal_attention", "keep_freed_memory")
    for name in names:
        monkeypatch.setattr(fast, name, getattr(fast, name))  # to be put back
    before = dict(vars(fast))
    ablation.WITHOUT[idea]()
    assert vars(fast) != before
    assert_equal_paths(model_of(torch.float64), [*random_pairs(5), *ODD.values()])
