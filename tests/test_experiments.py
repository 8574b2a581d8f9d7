"""What stands on the two stages: pairs made from a model's samples, and a policy measured against its reference."""

import itertools
import json
import math
import random
from typing import NamedTuple

import pytest
import torch
from tiny import call, contents, fails, write_data, write_jsonl

import experiments.common as common
import experiments.evaluate as evaluate
import experiments.make_pairs as make_pairs
import train_dpo
import train_sft
from experiments.frontier import limit
from minidpo import checkpoint, dataset
from minidpo.model import GPT, GPTConfig
from minidpo.sampling import generate
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

TRAIN = ("--batch-size", 8, "--lr", 5e-3, "--warmup-steps", 2, "--samples", 1, "--sample-tokens", 4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The data of `write_data`, a run of each stage, `sft` and `dpo`, and prompts.jsonl with 5 prompts."""
    folder = tmp_path_factory.mktemp("experiments")
    write_data(folder)
    sft, pairs = folder / "sft.jsonl", folder / "pairs.jsonl"
    call(train_sft.main, "--data", sft, "--out", folder / "sft", "--preset", "toy", "--epochs", 6, *TRAIN)
    call(train_dpo.main, "--data", pairs, "--init", folder / "sft", "--out", folder / "dpo", "--epochs", 4, *TRAIN)
    prompts = ("The film", "This story", "Her cast", "Every scene", "The ending")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    return folder


# ---- common: CSV ----


class Point(NamedTuple):
    name: str
    step: int
    kl: float


def test_csv_there_and_back(tmp_path):
    path = tmp_path / "points.csv"
    common.write_csv(path, [Point("a, b", 3, 1 / 3), Point("", 0, math.inf)])
    assert common.read_csv(path, Point, "make points") == [Point("a, b", 3, 1 / 3), Point("", 0, math.inf)]
    common.write_csv(path, [Point("a", 1, 12345.678), Point("b", 2, math.nan)], digits=5)
    assert path.read_text(encoding="utf-8") == "name,step,kl\na,1,12346\nb,2,\n"
    assert math.isnan(common.read_csv(path, Point, "make points")[1].kl)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: the columns must be name,step,kl"),
        ("name,kl\n", "line 1: the columns must be name,step,kl"),
        ("name,step,kl\na,1,2\nb,one,2\n", "line 3: .*'one'.*make points"),
        ("name,step,kl\na,1\n", "line 2: 2 cells under 3 columns"),
    ],
)
def test_csv_that_is_damaged(tmp_path, text, says):
    (tmp_path / "points.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        common.read_csv(tmp_path / "points.csv", Point, "make points")
    with pytest.raises(UserError, match="missing.csv not found.*make points"):
        common.read_csv(tmp_path / "missing.csv", Point, "make points")


# ---- common: prompts ----


@pytest.fixture
def long_prompts(tmp_path):
    """A file with a prompt that is longer than the context of 40 tokens, and one that is not."""
    texts = ["The film is dull. " * 30 + "Her cast", "It"]
    return write_jsonl(tmp_path / "long.jsonl", [{"prompt": text} for text in texts]), texts


@pytest.mark.parametrize("module", [evaluate, make_pairs, limit])
def test_every_command_cuts_a_long_prompt_on_the_left(module, home, tmp_path, long_prompts, monkeypatch, capsys):
    """The ids are the last ones of the prompt behind an eot, and leave room for the new tokens; one line says so."""
    file, texts = long_prompts
    flags = {
        evaluate: ("--policy", home / "dpo", "--reference", home / "sft", "--data", file),
        make_pairs: ("--policy", home / "sft", "--prompts", file, "--out", tmp_path / "pairs.jsonl"),
        limit: ("--reference", home / "sft", "--data", file, "--samples", 256, "--out", tmp_path / "limit.csv"),
    }[module]
    seen = []
    monkeypatch.setattr(
        common, "generate", lambda model, ids, *a, **k: seen.append(ids) or generate(model, ids, *a, **k)
    )
    monkeypatch.setattr(module, "load_reward", lambda name: vowels)
    call(module.main, *flags, "--reward", "any", "--max-new-tokens", 12, "--device", "cpu")
    _, tokenizer, _ = checkpoint.load(home / "sft")
    long, short = map(tokenizer.encode, texts)
    expected = [tokenizer.eot, *long[-28:]], [tokenizer.eot, *short]  # 28 + 12 = 40
    assert {tuple(ids) for batch in seen for ids in batch} == set(map(tuple, expected))
    assert capsys.readouterr().out.count("1 of 2 prompts cut on the left to 28 tokens") == 1


@pytest.mark.parametrize(("max_new_tokens", "kept"), [(1, 15), (10, 8), (8, 8), (100, 8)])
def test_a_prompt_keeps_8_tokens_whatever_is_to_follow(max_new_tokens, kept):
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    model = GPT(GPTConfig(257, 16, 1, 2, 8))
    ids = common.prompt_ids(tokenizer, ["abc", "x" * 30 + "abcdefghijklmno"], max_new_tokens, model)
    assert ids == [[256, *b"abc"], [256, *b"abcdefghijklmno"[-kept:]]]
    assert all(generate(model, ids, max_new_tokens, 256, generator=torch.Generator().manual_seed(0)))


# ---- make_pairs ----


def vowels(prompts, responses):
    """A reward that an untrained model's samples differ in."""
    return [float(sum(c in "aeiou" for c in response)) for response in responses]


@pytest.fixture
def make(home, monkeypatch):
    """make(out, *flags) -> the records written, with the reward `vowels`."""
    monkeypatch.setattr(make_pairs, "load_reward", lambda name: vowels)

    def make(out, *flags):
        required = ("--policy", home / "sft", "--prompts", home / "prompts.jsonl", "--reward", "any", "--out", out)
        call(make_pairs.main, *required, "--max-new-tokens", 12, *flags)
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    return make


@pytest.mark.parametrize("k", [2, 4, 5])
def test_all_pairs_of_k_completions(make, tmp_path, k, capsys):
    """bt labels have no ties: k (k - 1) / 2 pairs a prompt, of k different texts."""
    pairs = make(tmp_path / "pairs.jsonl", "--k", k, "--labels", "bt", "--max-new-tokens", 20)
    assert len(pairs) == 5 * k * (k - 1) / 2
    for prompt, group in itertools.groupby(pairs, key=lambda pair: pair["prompt"]):
        group = list(group)
        texts = {pair[side] for pair in group for side in ("chosen", "rejected")}
        assert len(texts) == k, prompt
        assert {frozenset((pair["chosen"], pair["rejected"])) for pair in group} == {
            frozenset(two) for two in itertools.combinations(texts, 2)
        }
    assert f"{len(pairs):,} pairs from 5 prompts x {k} completions" in capsys.readouterr().out


def test_hard_labels_choose_the_higher_reward_and_drop_ties(make, tmp_path, capsys):
    pairs = make(tmp_path / "pairs.jsonl", "--k", 6)
    for pair in pairs:
        chosen, rejected = vowels(None, [pair["chosen"], pair["rejected"]])
        assert chosen > rejected
    out = capsys.readouterr().out
    ties = int(out.split("dropped: ties: ")[1].split(",")[0].split()[0])
    assert ties > 0 and len(pairs) + ties == 5 * 15  # equal texts would be counted apart: there are none here
    assert "equal texts" not in out


def test_pairs_are_the_models_samples_at_temperature_1(make, home, tmp_path):
    pairs = make(tmp_path / "pairs.jsonl", "--k", 3, "--labels", "bt", "--seed", 4)
    model, tokenizer, _ = checkpoint.load(home / "sft")
    ids = [
        [tokenizer.eot, *tokenizer.encode(p)] for p in dict.fromkeys(pair["prompt"] for pair in pairs) for _ in range(3)
    ]
    samples = generate(model, ids, 12, tokenizer.eot, generator=torch.Generator().manual_seed(4))
    assert {tokenizer.decode(s) for s in samples} == {pair[side] for pair in pairs for side in ("chosen", "rejected")}
    ended = {tokenizer.decode(sample): sample[-1] == tokenizer.eot for sample in samples}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert pair.get(f"{side}_ended", True) == ended[pair[side]]


def test_a_completion_that_was_cut_gets_no_eot_in_training(make, home, tmp_path):
    pairs = make(tmp_path / "pairs.jsonl", "--k", 4, "--labels", "bt", "--max-new-tokens", 2)
    _, tokenizer, _ = checkpoint.load(home / "sft")
    cut = 0
    for pair in pairs:  # hardly one ends within two tokens
        for _, chosen, rejected in dataset.encode([pair], dataset.PAIR, tokenizer, 40)[0]:
            assert (chosen[-1] == tokenizer.eot) == pair.get("chosen_ended", True)
            assert (rejected[-1] == tokenizer.eot) == pair.get("rejected_ended", True)
            cut += (chosen[-1] != tokenizer.eot) + (rejected[-1] != tokenizer.eot)
    assert cut > len(pairs)


def test_pairs_of_by_hand():
    def record(chosen, rejected, **flags):
        return {"prompt": "p", "chosen": chosen, "rejected": rejected, **flags}

    counts = make_pairs.Counter()
    completions = [("a", True, 1.0), ("b", False, 2.0), ("a", True, 1.0), ("c", True, 2.0)]
    got = list(make_pairs.pairs_of("p", completions, "hard", None, counts))
    cut = dict(chosen_ended=False)
    assert got == [record("b", "a", **cut), record("c", "a"), record("b", "a", **cut), record("c", "a")]
    assert counts == {"dropped: equal texts": 1, "dropped: ties": 1, "the lower reward chosen": 0}
    got = list(make_pairs.pairs_of("p", [("b", False, -900.0), ("c", True, 900.0)], "bt", torch.Generator(), counts))
    assert got == [record("c", "b", rejected_ended=False)]


def test_bt_labels_follow_bradley_terry():
    """Frequencies against sigmoid(r_a - r_b), within 4 standard errors; no overflow however far apart."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    for a, b in ((0.0, 0.0), (1.0, 0.0), (-3.0, -1.0), (2.5, -2.0)):
        p = 1 / (1 + math.exp(b - a))
        wins = sum(make_pairs.label(a, b, "bt", generator) for _ in range(n))
        assert abs(wins / n - p) < 4 * math.sqrt(p * (1 - p) / n), (a, b)
    assert make_pairs.label(1e4, -1e4, "bt", generator) is True
    assert make_pairs.label(-1e4, 1e4, "bt", generator) is False
    assert make_pairs.label(2, 2, "hard", generator) is None
    assert make_pairs.label(3, 2, "hard", generator) is True and make_pairs.label(1, 2, "hard", generator) is False


def test_bt_labels_that_went_against_the_reward_are_counted(make, tmp_path, capsys):
    pairs = make(tmp_path / "pairs.jsonl", "--k", 6, "--labels", "bt")
    rewards = [vowels(None, [pair["chosen"], pair["rejected"]]) for pair in pairs]
    against = sum(chosen < rejected for chosen, rejected in rewards)
    assert against > 0 and f"the lower reward chosen: {against}" in capsys.readouterr().out


def test_pairs_are_the_same_for_the_same_seed(make, tmp_path):
    for labels in ("hard", "bt"):
        a = make(tmp_path / "a.jsonl", "--labels", labels, "--overwrite")
        assert make(tmp_path / "b.jsonl", "--labels", labels, "--overwrite") == a
        assert make(tmp_path / "c.jsonl", "--labels", labels, "--overwrite", "--seed", 1) != a
    few = make(tmp_path / "few.jsonl", "--labels", "bt", "--limit", 2)
    assert {pair["prompt"] for pair in few} == {"The film", "This story"}


def test_pairs_are_not_overwritten_without_being_asked(make, home, tmp_path, capsys):
    make(tmp_path / "pairs.jsonl")
    before = contents(tmp_path)
    required = ("--policy", home / "sft", "--prompts", home / "prompts.jsonl", "--reward", "any")
    message = fails(capsys, make_pairs.main, *required, "--out", tmp_path / "pairs.jsonl")
    assert f"{tmp_path / 'pairs.jsonl'} is there already. Add --overwrite" in message
    assert contents(tmp_path) == before


def test_no_usable_pair_writes_nothing(make, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_pairs, "load_reward", lambda name: lambda prompts, responses: [0.0] * len(responses))
    required = ("--policy", home / "sft", "--prompts", home / "prompts.jsonl", "--reward", "any")
    message = fails(capsys, make_pairs.main, *required, "--out", tmp_path / "pairs.jsonl")
    assert "no usable pair from 5 prompts" in message and "'dropped: ties': 30" in message
    assert not contents(tmp_path)


def test_pairs_train(make, home, tmp_path):
    make(tmp_path / "pairs.jsonl")
    call(train_dpo.main, "--data", tmp_path / "pairs.jsonl", "--init", home / "sft", "--out", tmp_path / "dpo", *TRAIN)
    assert (tmp_path / "dpo" / "report.md").exists()


# ---- trap 15: the KL ----

VOCAB, EOT, PROMPTS, NEW = 4, 3, ([3, 0], [3, 1, 2]), 3


def tiny_gpt(seed, scale=0.6):
    """float64, and far enough from uniform that every estimator has something to get wrong."""
    model = GPT(GPTConfig(VOCAB, 6, 1, 2, 8)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=scale, generator=generator)
    return model


def sequences(new=NEW):
    """Every response: up to `new` tokens, ending in eot or at the limit; the longest first."""
    yield from (list(body) for body in itertools.product(range(VOCAB - 1), repeat=new))
    for n in range(new, 0, -1):
        for body in itertools.product(range(VOCAB - 1), repeat=n - 1):
            yield [*body, EOT]


@torch.no_grad()
def log_p(model, prompt, response):
    """log p(response | prompt), token by token."""
    total = 0.0
    for t, token in enumerate(response):
        logits = model(torch.tensor([[*prompt, *response[:t]]]))[0, -1]
        total += (logits[token] - logits.logsumexp(0)).item()
    return total


@pytest.fixture(scope="module")
def enumerated():
    """(policy, reference, {prompt number: [(response, log pi, log pi_ref), ...] of all responses})."""
    policy, reference = tiny_gpt(0), tiny_gpt(1)
    rows = {
        i: [(y, log_p(policy, prompt, y), log_p(reference, prompt, y)) for y in sequences()]
        for i, prompt in enumerate(PROMPTS)
    }
    for responses in rows.values():
        assert math.fsum(math.exp(a) for _, a, _ in responses) == pytest.approx(1, abs=1e-12)
    return policy, reference, rows


def exact_kl(responses):
    return math.fsum(math.exp(a) * (a - b) for _, a, b in responses)


def test_trap15_both_estimators_have_the_exact_kl_as_their_mean(enumerated):
    """Their expectation under the policy, by enumeration: without bias, to the last digits."""
    policy, reference, rows = enumerated
    for i, prompt in enumerate(PROMPTS):
        samples = [y for y, _, _ in rows[i]]
        plain, exact = evaluate.sequence_kl(policy, reference, [prompt] * len(samples), samples, batch_size=7)
        p = torch.tensor([a for _, a, _ in rows[i]], dtype=torch.float64).exp()
        kl = exact_kl(rows[i])
        assert kl > 0.5
        assert (p * plain).sum().item() == pytest.approx(kl, rel=1e-9)
        assert (p * exact).sum().item() == pytest.approx(kl, rel=1e-9)
        assert plain.tolist() == pytest.approx([a - b for _, a, b in rows[i]], rel=1e-9, abs=1e-12)
        # the second is never negative and scatters less
        assert exact.min() >= 0 and (p * (exact - kl) ** 2).sum() < (p * (plain - kl) ** 2).sum()


def test_trap15_on_samples_within_4_standard_errors(enumerated):
    """Samples of `generate`, prompts of two lengths in one batch: the KL is the mean over the two."""
    policy, reference, rows = enumerated
    n = 3000
    prompts = [list(PROMPTS[i % 2]) for i in range(n)]
    samples = generate(policy, prompts, NEW, EOT, generator=torch.Generator().manual_seed(0))
    kl = (exact_kl(rows[0]) + exact_kl(rows[1])) / 2
    for values in evaluate.sequence_kl(policy, reference, prompts, samples):
        mean, se = common.prompt_mean_se(values, 2)
        assert abs(mean - kl) < 4 * se and se < 0.1 * kl
    # and the samples themselves are the policy's
    for i in range(2):
        drawn = samples[i::2]
        for y, a, _ in rows[i]:
            p = math.exp(a)
            assert abs(drawn.count(y) / len(drawn) - p) < 5 * math.sqrt(p * (1 - p) / len(drawn)) + 1e-9


def test_trap15_policy_equal_to_reference_is_0(enumerated):
    policy, _, rows = enumerated
    samples = [y for y, _, _ in rows[0]]
    for values in evaluate.sequence_kl(policy, tiny_gpt(0), [PROMPTS[0]] * len(samples), samples):
        assert values.abs().max() < 1e-12


def test_trap8_in_bf16_the_policy_equal_to_the_reference_is_at_0(enumerated):
    """Both sides of the difference come from one path and one precision, whatever the precision is."""
    samples = [y for y, _, _ in enumerated[2][0]]
    policy, reference = tiny_gpt(0).float(), tiny_gpt(0).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate.sequence_kl(policy, reference, [PROMPTS[0]] * len(samples), samples, batch_size=7)
    assert all(values.abs().max() == 0 for values in found)


def test_trap15_sum_over_tokens_whatever_the_company(enumerated):
    """A sample's KL is the same alone and in a batch with longer rows, and in train mode as in eval."""
    policy, reference, rows = enumerated
    samples = [y for y, _, _ in rows[1]]
    together = torch.stack(evaluate.sequence_kl(policy, reference, [PROMPTS[1]] * len(samples), samples))
    policy.set_dropout(0.5)
    policy.train(), reference.train()
    alone = torch.cat([torch.stack(evaluate.sequence_kl(policy, reference, [PROMPTS[1]], [y])) for y in samples], 1)
    policy.set_dropout(0.0)
    torch.testing.assert_close(alone, together, rtol=1e-10, atol=1e-12)


def test_trap15_sampled_ids_are_never_encoded_again(monkeypatch):
    """Single letters where the tokenizer would join them: the text says other ids, and other log-probabilities."""
    tokenizer = Tokenizer.train(["the the the the"], 260)
    config = GPTConfig(tokenizer.vocab_size, 16, 1, 2, 8)
    policy, reference = (GPT(config, torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    for model in (policy, reference):
        with torch.no_grad():
            model.wte.weight.mul_(40)
    drawn = [[*b" the", tokenizer.eot], [*b"the the"]]
    assert all(tokenizer.encode(tokenizer.decode(ids)) != [i for i in ids if i != tokenizer.eot] for ids in drawn)
    samples = {policy: drawn, reference: [[tokenizer.eot], [tokenizer.eot]]}
    monkeypatch.setattr(common, "generate", lambda model, *_, **__: samples[model])
    encoded, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    settings = evaluate.Settings("", "", "", "none")
    figures, _, texts = evaluate.evaluate(policy, reference, tokenizer, ["a", "bc"], vowels, settings)
    assert encoded == ["a", "bc"] and texts["policy"] == [" the", "the the"]
    kls = [
        log_p(policy, [tokenizer.eot, *prompt], ids) - log_p(reference, [tokenizer.eot, *prompt], ids)
        for prompt, ids in zip((b"a", b"bc"), drawn, strict=True)
    ]
    assert figures["kl"] == pytest.approx(sum(kls) / 2, rel=1e-9) and abs(figures["kl"]) > 0.1


def test_trap15_sampling_for_the_kl_is_not_truncated(home, monkeypatch):
    """Both commands sample at temperature 1 from the whole distribution."""
    for module, argv in (
        (evaluate, ("--policy", home / "dpo", "--reference", home / "sft", "--data", home / "prompts.jsonl")),
        (
            make_pairs,
            ("--policy", home / "sft", "--prompts", home / "prompts.jsonl", "--out", home / "x", "--overwrite"),
        ),
    ):
        seen = []

        def spy(*args, _seen=seen, **knobs):
            _seen.append((len(args), knobs))
            return generate(*args, **knobs)

        monkeypatch.setattr(common, "generate", spy)
        monkeypatch.setattr(module, "load_reward", lambda name: vowels)
        call(module.main, *argv, "--reward", "any")
        assert seen and all(n == 4 and not {"top_k", "top_p"} & set(knobs) for n, knobs in seen)
        assert all(knobs.get("temperature", 1) == 1 for _, knobs in seen)


# ---- evaluate ----


def test_json_holds_the_contract(home, tmp_path, capsys):
    call(
        evaluate.main, "--policy", home / "dpo", "--reference", home / "sft", "--data", home / "prompts.jsonl",
        "--reward", "toy", "--samples-per-prompt", 3, "--json", tmp_path / "out.json",
    )  # fmt: skip
    figures = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    contract = {
        "reward_mean", "reward_se", "kl", "kl_se", "kl_exact", "kl_exact_se",
        "win_rate", "length_mean", "ended", "grammatical",
    }  # fmt: skip
    assert contract <= set(figures) and figures["samples"] == 15
    assert all(isinstance(figures[name], float) and math.isfinite(figures[name]) for name in contract)
    assert figures["kl_exact"] > 0 and 0 <= figures["ended"] <= 1 and 0 <= figures["grammatical"] <= 1
    assert {"reward_mean", "reward_sd", "length_mean", "ended"} <= set(figures["reference"])
    out = capsys.readouterr().out
    for name in contract:  # the table says the same
        (line,) = (line for line in out.splitlines() if line.startswith(name + " "))
        assert line.split()[-1] == f"{figures[name]:.3f}"
    assert "| The film |" in out

    call(evaluate.main, "--policy", home / "sft", "--reference", home / "sft", "--data", home / "prompts.jsonl",
         "--reward", "toy", "--json", tmp_path / "same.json")  # fmt: skip
    same = json.loads((tmp_path / "same.json").read_text(encoding="utf-8"))
    assert same["kl"] == same["kl_exact"] == 0 and 0 < same["win_rate"] < 1
    seed = random.Random("reference 0").getrandbits(63)  # the reference's figures are those of a policy with its seed
    call(evaluate.main, "--policy", home / "sft", "--reference", home / "sft", "--data", home / "prompts.jsonl",
         "--reward", "toy", "--seed", seed, "--json", tmp_path / "other.json")  # fmt: skip
    other = json.loads((tmp_path / "other.json").read_text(encoding="utf-8"))
    assert {k: other[k] for k in same["reference"]} == same["reference"]


def test_policy_and_reference_are_sampled_independently(home):
    """Equal models draw different samples: with equal ones the win rate would depend on the order of the tokens."""
    model, tokenizer, _ = checkpoint.load(home / "sft")
    settings = evaluate.Settings("", "", "", "none", samples_per_prompt=20, max_new_tokens=20)
    _, _, texts = evaluate.evaluate(model, model, tokenizer, ["The film", "A"], vowels, settings)
    assert sum(a == b for a, b in zip(texts["policy"], texts["reference"], strict=True)) < 10


def test_evaluation_is_the_same_for_the_same_seed(home, tmp_path):
    argv = ("--policy", home / "dpo", "--reference", home / "sft", "--data", home / "prompts.jsonl", "--reward", "toy")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(evaluate.main, *argv, "--seed", seed, "--json", tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def figures_of(monkeypatch, policy_samples, reference_samples, rewards, **changes):
    """`evaluate` on samples and rewards as given: {text: reward}."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    model = GPT(GPTConfig(257, 32, 1, 2, 8), torch.Generator().manual_seed(0))
    given = iter([[[*text.encode()] + [256] * ended for text, ended in s] for s in (policy_samples, reference_samples)])
    monkeypatch.setattr(common, "generate", lambda *_, **__: next(given))
    settings = evaluate.Settings("", "", "", "none", **changes)
    prompts = ["p"] * (len(policy_samples) // settings.samples_per_prompt)
    reward = lambda prompts, texts: [rewards[text] for text in texts]  # noqa: E731
    return evaluate.evaluate(model, model, tokenizer, prompts, reward, settings)[0]


def test_figures_by_hand(monkeypatch):
    """Four prompts: the policy wins, loses, ties and wins; three of its samples end."""
    rewards = {"aa": 2.0, "bbb": -1.0, "c": 0.5, "dd": 3.0, "e": 1.0, "f": 0.0, "g": 0.5, "h": 2.0}
    policy = [("aa", True), ("bbb", True), ("c", True), ("dd", False)]
    reference = [("e", True), ("f", False), ("g", True), ("h", True)]
    got = figures_of(monkeypatch, policy, reference, rewards)
    assert got["win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert got["reward_mean"] == pytest.approx((2 - 1 + 0.5 + 3) / 4)
    assert got["reference"]["reward_mean"] == pytest.approx(3.5 / 4)
    mean = 4.5 / 4
    variance = sum((r - mean) ** 2 for r in (2, -1, 0.5, 3)) / 3
    assert got["reward_sd"] == pytest.approx(math.sqrt(variance))
    assert got["reward_se"] == pytest.approx(math.sqrt(variance / 4))
    assert (got["ended"], got["reference"]["ended"]) == (0.75, 0.75)
    assert got["length_mean"] == (3 + 4 + 2 + 2) / 4  # in tokens, eot included
    assert got["positive"] == 0.75 and got["reference"]["positive"] == 0.75


def test_standard_error_counts_prompts_not_samples(monkeypatch):
    """Samples of one prompt are alike: with two each, the error comes from the spread of the prompts' means."""
    rewards = {"a": 1.0, "b": 2.0, "c": 10.0, "d": 14.0, "e": 0.0}
    policy = [(t, True) for t in "abcd"]
    got = figures_of(monkeypatch, policy, [("e", True)] * 4, rewards, samples_per_prompt=2)
    assert got["reward_mean"] == 6.75
    assert got["reward_se"] == pytest.approx(math.sqrt(((1.5 - 6.75) ** 2 + (12 - 6.75) ** 2) / 1 / 2))
    assert got["win_rate"] == 1


def test_repeated_ngrams_by_hand():
    repeated = evaluate.repeated_ngrams
    assert repeated([[1, 2, 3, 4, 5, 6, 7]]) == 0
    assert repeated([[1, 2, 3, 4, 1, 2, 3, 4]]) == 1 / 5  # 1234 2341 3412 4123 1234
    assert repeated([[1, 1, 1, 1, 1, 1]]) == 2 / 3
    assert repeated([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0  # in two samples is no repetition
    assert repeated([[1, 2, 3], []]) == 0  # too short for a 4-gram
    assert repeated([[1, 2, 1, 2, 1]], n=2) == 1 / 2
    assert repeated([[1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7]]) == 2 / 7  # over all samples, not a mean of shares


def test_rewards_that_are_all_alike_are_no_error(home, monkeypatch, capsys):
    """An untrained model writes no sentiment word at all: nothing to measure the rise in, and no division by 0."""
    monkeypatch.setattr(evaluate, "load_reward", lambda name: lambda prompts, responses: [0.0] * len(responses))
    argv = ("--policy", home / "dpo", "--reference", home / "sft", "--data", home / "prompts.jsonl")
    call(evaluate.main, *argv, "--reward", "any")
    out = capsys.readouterr().out
    assert "reward_mean" in out and "standard deviations" not in out
