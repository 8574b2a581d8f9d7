"""Held-out preference accuracy: by hand, its error against resampling, each reward against its own definition."""

import json

import pytest
import torch
from test_baselines import train_reward_model
from tiny import call, fails, write_data, write_jsonl

import train_dpo
import train_sft
from experiments.frontier import accuracy
from experiments.frontier.baselines import reward_model
from experiments.rewards import SentimentClassifier
from minidpo import checkpoint, dataset
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

TRAIN = ("--batch-size", 8, "--lr", 5e-3, "--warmup-steps", 2, "--samples", 1, "--sample-tokens", 4, "--device", "cpu")


def test_by_hand_with_a_tie_and_a_prompt_that_comes_twice():
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 3.0], [1.0, -1.0]])
    found = accuracy.accuracy(scores, ["a", "b", "c", "a"])
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4) and found["ties"] == 0.25
    # off by prompt: a 2 * 0.375, b -0.625, c -0.125
    squares = 0.75**2 + 0.625**2 + 0.125**2
    assert found["se"] == pytest.approx((squares * 3 / 2) ** 0.5 / 4)
    # of pairs that share no prompt it is the usual error of a mean
    alone = accuracy.accuracy(scores, "abcd")
    right = torch.tensor([1, 0, 0.5, 1], dtype=torch.float64)
    assert alone["se"] == pytest.approx((right.std() / 2).item())
    with pytest.raises(UserError, match="one prompt"):
        accuracy.accuracy(scores, "aaaa")


def test_error_against_resampled_prompts():
    """300 prompts of 1 to 6 pairs that all agree within a prompt: bootstrap over prompts, 2,000 times."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 7, (300,), generator=generator)
    side = torch.rand(300, generator=generator) < 0.7
    which = torch.arange(300).repeat_interleave(sizes)
    scores = torch.stack([side[which].double(), 0.5 * torch.ones(len(which), dtype=torch.float64)], dim=-1)
    found = accuracy.accuracy(scores, which.tolist())
    drawn = torch.randint(300, (2000, 300), generator=generator)
    means = (sizes * side)[drawn].sum(-1) / sizes[drawn].sum(-1)
    assert found["se"] == pytest.approx(means.std().item(), rel=0.06)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An SFT run, a DPO run and a reward model of it, and the file of a true reward."""
    folder = tmp_path_factory.mktemp("accuracy")
    write_data(folder)
    call(train_sft.main, "--data", folder / "sft.jsonl", "--out", folder / "sft", "--preset", "toy", *TRAIN)
    files = ("--data", folder / "pairs.jsonl", "--init", folder / "sft", "--epochs", 4)
    call(train_dpo.main, *files, "--out", folder / "dpo", *TRAIN)
    train_reward_model(folder)
    SentimentClassifier({"dull": -1.0, "lovely": 2.0, "joy": 1.0, "fun": 1.0}, 0.0).save(folder / "true.pt")
    return folder


def files_of(home, **changes):
    named = dict(policy=home / "dpo", reference=home / "sft", reward_model=home / "reward", data=home / "pairs.jsonl")
    flags = ((f"--{name.replace('_', '-')}", value) for name, value in {**named, **changes}.items())
    return (*(word for flag in flags for word in flag), "--device", "cpu")


def log_p(model, prompt, response):
    """log pi(y|x) by the chain rule, one token at a time."""
    ids, total = list(prompt), 0.0
    for token in response:
        total += model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item()
        ids.append(token)
    return total


def test_the_command_against_loops(home, tmp_path, capsys):
    """Each of the five rewards recomputed pair by pair, one row at a time."""
    flags = ("--reward", home / "true.pt", "--batch-size", 4, "--json", tmp_path / "accuracy.json")
    call(accuracy.main, *files_of(home), *flags)
    figures = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    names = ["pairs", "implicit reward", "reward model", "true reward", "reference log-prob", "longer wins"]
    assert list(figures) == names and figures["pairs"] == 22
    printed = capsys.readouterr().out
    assert all(name in printed for name in names[1:]) and "22 pairs of 5 prompts" in printed

    policy, tokenizer, _ = checkpoint.load(home / "dpo")
    reference, _, _ = checkpoint.load(home / "sft")
    model, _ = reward_model.load(home / "reward")
    true = SentimentClassifier.load(home / "true.pt")
    policy.double(), reference.double(), model.double()
    right = {name: 0.0 for name in names[1:]}
    for record in dataset.read_jsonl(home / "pairs.jsonl", dataset.PAIR):
        prompt = [tokenizer.eot, *tokenizer.encode(record["prompt"])]
        both = []
        for side in ("chosen", "rejected"):
            ids = [*tokenizer.encode(record[side]), tokenizer.eot]
            log_ref = log_p(reference, prompt, ids)
            rewards = [log_p(policy, prompt, ids) - log_ref, model.score([prompt], [ids]).item()]
            both.append([*rewards, true.log_odds(record["prompt"] + record[side]), log_ref, len(ids)])
        for name, a, b in zip(right, *both, strict=True):
            right[name] += 0.5 if a == b else float(a > b)
    for name, count in right.items():
        assert figures[name]["accuracy"] == pytest.approx(count / 22), name
    assert figures["implicit reward"]["accuracy"] > 0.8  # trained on these very pairs: better than the plain rewards
    assert figures["true reward"]["ties"] > 0 and len({figures[name]["accuracy"] for name in right}) >= 4


def test_implicit_reward_of_the_reference_itself_is_0_in_bf16(home, monkeypatch):
    model, tokenizer, _ = checkpoint.load(home / "sft")
    learned, _ = reward_model.load(home / "reward")
    pairs = dataset.load_rows(home / "pairs.jsonl", dataset.PAIR, tokenizer, model.config.block_size)
    settings = train_dpo.Settings
    monkeypatch.setattr(train_dpo, "Settings", lambda **k: settings(**{**k, "dtype": "bfloat16"}))
    scores = accuracy.scores_of(pairs, model, model, learned, tokenizer, None, 4)
    assert (scores["implicit reward"] == 0).all() and (scores["reference log-prob"] < 0).all()


def test_the_true_reward_may_be_unknown(home, tmp_path):
    call(accuracy.main, *files_of(home), "--json", tmp_path / "accuracy.json")
    figures = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    assert "true reward" not in figures and "reward model" in figures


def test_bad_input(home, tmp_path, capsys):
    def says(**changes):
        return fails(capsys, accuracy.main, *files_of(home, **changes))

    assert "not a reward model" in says(reward_model=home / "sft")
    assert "/nowhere not found" in says(policy="/nowhere")
    assert "unknown reward 'toi'" in says(reward="toi")
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "It", "chosen": " sings.", "rejected": " drags."}])
    assert "one prompt have no standard error" in says(data=one)
    model, _, _ = checkpoint.load(home / "sft")
    tokenizer = Tokenizer.train(["another corpus, and other words in it " * 9], model.config.vocab_size)
    model.config.vocab_size = tokenizer.vocab_size
    model.wte.weight.data = model.wte.weight.data[: tokenizer.vocab_size]
    checkpoint.save(tmp_path / "other", model, tokenizer)
    assert "different tokenizers" in says(policy=tmp_path / "other")
    assert "another tokenizer than the policy" in says(policy=tmp_path / "other", reference=tmp_path / "other")
