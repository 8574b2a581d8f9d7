"""Batched, cached, ragged sampling against one prompt at a time without a cache, and against exact probabilities."""

import io
import itertools
import sys

import pytest
import torch
from tiny import fails

from minidpo import checkpoint, sampling
from minidpo.model import GPT, GPTConfig
from minidpo.sampling import complete, generate, truncate
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

EOT = 0
NEVER = -1  # an eot that no model can draw


def random_model(seed=0, **shape):
    """A GPT in float64 whose every weight is random and large enough for its predictions to be far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**dict(vocab_size=7, block_size=16, n_layer=2, n_head=2, n_embd=8) | shape)).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5, generator=generator)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PROMPTS = [[0, 3, 4, 5, 6, 1, 2], [0], [0, 2, 2], [0, 6, 5, 4, 3, 2, 1, 1, 2], [0, 1], [0, 5]]


def record_logits(model):
    """Makes `model` keep what it predicted at each step of a generation: a list of (live rows, V)."""
    steps, logits = [], model.logits

    def recorded(hidden):
        steps.append(logits(hidden))
        return steps[-1]

    model.logits = recorded
    return steps


@torch.no_grad()
def one_at_a_time(model, prompt, completion):
    """The logits (n, V) that completion's n tokens were drawn from: alone, without cache, padding or batch."""
    return torch.stack([model(torch.tensor([prompt + completion[:n]]))[0, -1] for n in range(len(completion))])


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("eot", [EOT, NEVER])
def test_ragged_cached_logits_are_those_of_one_at_a_time(temperature, eot):
    model, plain = random_model(), random_model()
    steps = record_logits(model)
    completions = generate(model, PROMPTS, 6, eot, temperature, generator=seeded())
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = one_at_a_time(plain, prompt, completion)
        for n, logits in enumerate(expected):  # some row of the batch, whichever it was, predicted just this
            assert (steps[n] - logits).abs().max(dim=-1).values.min() < 1e-10
        if temperature == 0:
            assert completion == expected.argmax(-1).tolist()
    assert len(steps) == max(map(len, completions))


def test_a_completion_ends_in_its_first_eot_or_at_the_limit():
    model = random_model()
    completions = generate(model, PROMPTS * 20, 5, EOT, generator=seeded())
    for completion in completions:
        assert 1 <= len(completion) <= 5 and EOT not in completion[:-1]
        assert len(completion) == 5 or completion[-1] == EOT
    assert any(completion[-1] == EOT for completion in completions)
    assert any(completion[-1] != EOT for completion in completions)
    assert generate(model, PROMPTS, 0, EOT) == [[]] * len(PROMPTS)
    assert generate(model, [], 5, EOT) == []


def test_finished_rows_are_dropped():
    model = random_model()
    steps = record_logits(model)
    completions = generate(model, PROMPTS * 20, 12, EOT, generator=seeded())
    for n, step in enumerate(steps):
        live = sum(len(completion) > n for completion in completions)
        assert live <= len(step) <= 2 * live
    assert len(steps[0]) == 120 and len(steps[-1]) < 30


@pytest.mark.parametrize("lengths", [[16], [15], [3], [13, 3, 3, 5], [16, 1, 1, 1], [1, 16, 15, 14, 1]])
def test_the_context_is_filled_and_not_passed(lengths):
    """prompt + new - 1 <= 16 positions, since the last new token is never read; each row has its own limit."""
    model, plain = random_model(), random_model()
    prompts = [[0, *range(1, 7), *range(1, 7), 1, 2, 3][:n] for n in lengths]
    completions = generate(model, prompts, 50, NEVER, temperature=0)
    assert [len(completion) for completion in completions] == [17 - n for n in lengths]
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion == one_at_a_time(plain, prompt, completion).argmax(-1).tolist()
    assert [len(c) for c in generate(model, prompts, 2, NEVER, generator=seeded())] == [min(2, 17 - n) for n in lengths]


@pytest.mark.parametrize("prompt, length", [([], 0), ([0] * 17, 17)])
def test_a_prompt_that_is_empty_or_longer_than_the_context_is_named(prompt, length):
    with pytest.raises(UserError, match=f"prompt 1 has {length} tokens; the model's context holds 1 to 16"):
        generate(random_model(), [[0], prompt], 5, EOT)


@pytest.mark.parametrize(
    "knob", [dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1)]
)
def test_knobs_out_of_range_are_named(knob):
    with pytest.raises(UserError, match=next(iter(knob))):
        generate(random_model(), [[0]], 5, EOT, **knob)


def test_same_seed_same_samples():
    model = random_model()
    samples = generate(model, PROMPTS * 3, 8, EOT, generator=seeded(1))
    state = torch.get_rng_state()
    assert generate(model, PROMPTS * 3, 8, EOT, generator=seeded(1)) == samples
    assert torch.equal(torch.get_rng_state(), state)  # trap 17: the global generator, training's, has not moved
    assert generate(model, PROMPTS * 3, 8, EOT, generator=seeded(2)) != samples
    in_pieces = generate(model, PROMPTS * 3, 8, EOT, temperature=0, batch_size=4)
    assert in_pieces == generate(model, PROMPTS * 3, 8, EOT, temperature=0)


def test_samples_do_not_depend_on_how_many_are_drawn_at_once():
    """Rows end at different steps, so finished rows leave their batch at other places."""
    model, prompts = random_model(), PROMPTS * 5
    whole = generate(model, prompts, 8, EOT, generator=seeded())
    assert len(set(map(tuple, whole))) > 20
    for size in (1, 4, 7):
        assert generate(model, prompts, 8, EOT, generator=seeded(), batch_size=size) == whole


@pytest.mark.parametrize("training", [True, False])
def test_no_dropout_while_sampling_and_the_mode_is_as_before(training):
    greedy = generate(random_model().eval(), PROMPTS, 8, NEVER, temperature=0)
    model = random_model(dropout=0.5).train(training)
    assert generate(model, PROMPTS, 8, NEVER, temperature=0) == greedy
    assert model.training == training and model.h[0].attn.training == training
    with pytest.raises(UserError):
        generate(model, [[]], 8, NEVER)
    assert model.training == training


# ---- the distribution ----

P = torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    "knobs, kept",
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(top_k=1), [0]),
        (dict(top_k=3), [0, 2, 4]),
        (dict(top_k=5), [0, 1, 2, 3, 4]),
        (dict(top_k=50), [0, 1, 2, 3, 4]),
        (dict(top_p=0.01), [0]),  # the best token is always in
        (dict(top_p=0.39), [0]),
        (dict(top_p=0.41), [0, 2]),  # the token that passes p is in
        (dict(top_p=0.69), [0, 2]),
        (dict(top_p=0.71), [0, 2, 4]),
        (dict(top_p=1.0), [0, 1, 2, 3, 4]),
        (dict(top_k=2, top_p=0.99), [0, 2]),
        (dict(top_k=3, top_p=0.5), [0, 2]),  # of what top-k left: 4/9 is below a half, 7/9 above
    ],
)
def test_truncate_by_hand(knobs, kept):
    logits = P.log() - 70
    rows = truncate(torch.stack([logits, logits.flip(0)]), **knobs)
    for row, expected in ((rows[0], kept), (rows[1].flip(0), kept)):
        assert row.isfinite().nonzero().flatten().tolist() == expected
        assert torch.equal(row[expected], logits[expected])


def test_top_k_and_top_p_reach_the_samples():
    model = random_model()
    greedy = generate(model, PROMPTS, 6, NEVER, temperature=0)
    assert generate(model, PROMPTS, 6, NEVER, top_k=1, generator=seeded()) == greedy
    assert generate(model, PROMPTS, 6, NEVER, top_p=1e-6, generator=seeded()) == greedy
    for temperature in (1e-3, 1e-6, 1e-40, 5e-324):
        assert generate(model, PROMPTS, 6, NEVER, temperature=temperature, generator=seeded()) == greedy
    assert generate(model, PROMPTS, 6, NEVER, generator=seeded()) != greedy
    for knobs, most in ((dict(top_k=2), 2), (dict(top_p=0.5), None)):
        samples = generate(model, [[0, 3]] * 300, 1, NEVER, generator=seeded(), **knobs)
        p, order = model(torch.tensor([[0, 3]]))[0, -1].softmax(-1).sort(descending=True)
        n = most or 1 + int((p.cumsum(-1) < 0.5).sum())
        assert {sample[0] for sample in samples} == set(order[:n].tolist())


@torch.no_grad()
def exact_probabilities(model, prompt, max_new_tokens, temperature):
    """{completion: probability} of every completion there is, by enumeration: they sum to 1."""
    exact = {}
    for n in range(1, max_new_tokens + 1):
        for ids in itertools.product(range(model.config.vocab_size), repeat=n):
            if EOT not in ids[:-1] and (n == max_new_tokens or ids[-1] == EOT):
                logits = one_at_a_time(model, prompt, list(ids)) / temperature
                exact[ids] = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum().exp().item()
    return exact


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_models_probabilities(temperature):
    """Pearson's chi-square over all 40 completions of at most 3 tokens, prompts of two lengths in one batch."""
    model, prompts, N = random_model(vocab_size=4), ([0, 1, 2, 3, 3], [0, 2]), 4000
    samples = generate(model, [*prompts] * N, 3, EOT, temperature, generator=seeded())
    for i, prompt in enumerate(prompts):
        exact = exact_probabilities(model, prompt, 3, temperature)
        assert len(exact) == 40 and sum(exact.values()) == pytest.approx(1)
        drawn = [tuple(ids) for ids in samples[i::2]]
        rare = {ids for ids, p in exact.items() if N * p < 5}  # counted together: the chi-square needs some of each
        cells = [{ids} for ids in exact if ids not in rare] + ([rare] if rare else [])
        chi2 = 0.0
        for cell in cells:
            expected = N * sum(exact[ids] for ids in cell)
            chi2 += (sum(ids in cell for ids in drawn) - expected) ** 2 / expected
        df = len(cells) - 1
        assert df >= 8 and chi2 < df + 4 * (2 * df) ** 0.5  # mean and 4 standard deviations of chi-square


# ---- texts and the command ----


@pytest.fixture
def run_folder(tmp_path):
    """Two runs, a and b, of a byte-level model of 24 positions."""
    for seed, name in enumerate("ab"):
        model = random_model(seed, vocab_size=257, block_size=24)
        checkpoint.save(tmp_path / name, model, Tokenizer.train([], 257))
    return tmp_path


def test_complete_marks_what_did_not_end(run_folder):
    model, tokenizer, _ = checkpoint.load(run_folder / "a")
    prompts = [[tokenizer.eot, 97 + i % 20] for i in range(300)]
    texts = complete(model, tokenizer, prompts, 3, seed=6)
    samples = generate(model, prompts, 3, tokenizer.eot, generator=seeded(6))
    for text, ids in zip(texts, samples, strict=True):
        assert text == (tokenizer.decode(ids[:-1]) if ids[-1] == 256 else tokenizer.decode(ids) + " ...")
    assert any(text.endswith(" ...") for text in texts) and not all(text.endswith(" ...") for text in texts)


def test_command_completes_side_by_side(run_folder, monkeypatch, capsys):
    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["minidpo.sampling", *argv])
        sampling.main()
        return capsys.readouterr().out

    a, b = str(run_folder / "a"), str(run_folder / "b")
    flags = ("--run", a, "--run", b, "--samples", "2", "--max-new-tokens", "4")
    out = command(*flags, "--prompt", "The film", "--prompt", "\0 映画")
    assert out.count("prompt: ") == 2 and out.count(f"  {a}: The film") == out.count(f"  {b}: The film") == 2
    assert command(*flags, "--prompt", "The film", "--prompt", "\0 映画") == out
    assert command(*flags, "--prompt", "The film", "--seed", "1") not in out
    typed = iter(["The film", "\0 映画", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert command(*flags) == out
    command("--run", a, "--prompt", "x", "--max-new-tokens", "0")  # nothing asked for, nothing broken


def test_command_on_a_prompt_longer_than_the_context(run_folder, capsys):
    message = fails(capsys, sampling.main, "--run", run_folder / "a", "--prompt", "a" * 24)
    assert "prompt 0 has 25 tokens; the model's context holds 1 to 24. Shorten it" in message


def test_command_ends_where_the_input_does(run_folder, monkeypatch, capsys):
    """Ctrl-D, or the end of a file of prompts: `... < prompts.txt`."""
    monkeypatch.setattr(sys, "argv", ["minidpo.sampling", "--run", str(run_folder / "a"), "--max-new-tokens", "2"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("The film\nHer cast\n"))
    sampling.main()
    assert capsys.readouterr().out.count("prompt: ") == 2


def test_an_unknown_device_comes_with_the_valid_ones(run_folder, capsys):
    message = fails(capsys, sampling.main, "--run", run_folder / "a", "--prompt", "a", "--device", "cudaa")
    assert "unknown --device 'cudaa'. Did you mean 'cuda'" in message and "Valid: auto, cpu, cuda, mps" in message
