"""The baselines: losses against float64 loops, the reward model on a reward that is known, Best-of-N by enumeration.

The language that can be enumerated is that of tests/test_theory.py: 3 prompts, 121 responses of up to 4 tokens.
"""

import math
from functools import partial

import pytest
import torch
from test_theory import EOT, PROMPTS, RESPONSES, SYMBOLS, X, Y, every_logp
from tiny import call, contents, fails, write_data

import train_dpo
import train_sft
from experiments import common
from experiments.frontier.baselines import best_of_n, fit, reward_model, unlikelihood
from experiments.frontier.baselines.reward_model import RewardModel
from experiments.frontier.baselines.unlikelihood import unlikelihood_loss
from experiments.winrate.judges import load_judge
from minidpo import checkpoint, dataset
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.report import read_metrics
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

# five pairs of the language: responses of 1 to 4 tokens, with and without an end
ROWS = [
    ([EOT, 0], [0, 1, EOT], [2, EOT]),
    ([EOT, 1], [1, 1, 2, 0], [0, 2, 1, EOT]),
    ([EOT, 2], [EOT], [2, 2, 2, EOT]),
    ([EOT, 1], [2, EOT], [EOT]),
    ([EOT, 0], [0, 0, 1, 1], [1, EOT]),
]


class Symbols:
    """The language's tokenizer: a symbol is a digit."""

    eot = EOT

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(map(str, ids))


def gpt(seed=0, dtype=torch.float64, block_size=6, n_embd=16):
    """A GPT over the language's symbols, far from uniform."""
    model = GPT(GPTConfig(vocab_size=SYMBOLS, block_size=block_size, n_layer=1, n_head=2, n_embd=n_embd)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model


def rewarder(seed=0, **shape):
    """A RewardModel whose head is not at 0."""
    model = RewardModel(gpt(seed, **shape))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    model.mean.fill_(0.7)
    return model


def log_p(model, prompt, response):
    """log pi(y|x) by the chain rule, one token at a time."""
    ids, total = list(prompt), 0.0
    for token in response:
        total += model(torch.tensor([ids]))[0, -1].softmax(-1)[token].log().item()
        ids.append(token)
    return total


def reward_of(model, prompt, response):
    """The head on the stream at the last token, of a row that is alone, without its leading eot."""
    hidden = model.gpt.hidden(torch.tensor([[*prompt, *response][1:]]))
    return (hidden[0, -1] * model.head.weight[0]).sum().item()


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def settings(cls, **knobs):
    return cls(data="", init="", out="", **{"device": "cpu", "dtype": "float32", "optimizer": "adamw", **knobs})


CHOSEN = [(prompt, chosen) for prompt, chosen, _ in ROWS]


def train(method, model, knobs, on_step=None):
    """Trains as the sweep does: on ROWS, or for Preferred-FT on their chosen responses."""
    if method == "reward-model":
        reward_model.train(model, ROWS, knobs, on_step)
    elif method == "preferred-ft":
        fit(model, CHOSEN, train_sft.train_step, knobs, on_step)
    else:
        reference = train_dpo.reference_logps(gpt(), ROWS, knobs)
        step = partial(train_dpo.train_step, reference=reference, loss=unlikelihood_loss)
        fit(model, ROWS, step, knobs, on_step)


def knobs_of(method, **knobs):
    return settings(unlikelihood.Settings if method == "unlikelihood" else train_dpo.Settings, **knobs)


METHODS = ("preferred-ft", "unlikelihood", "reward-model")


def weights_of(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


# ---- the losses, by loops ----


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_unlikelihood_against_a_loop_over_tokens(alpha):
    policy, indices = gpt(), [3, 0, 1, 4, 2]
    logps = train_dpo.logps_of(policy, ROWS, indices, settings(unlikelihood.Settings))
    reference = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses, *rewards = unlikelihood_loss(*logps, *reference, **settings(unlikelihood.Settings, alpha=alpha).variant)
    for i, loss in zip(indices, losses.tolist(), strict=True):
        prompt, chosen, rejected = ROWS[i]
        expected = -log_p(policy, prompt, chosen) + alpha * log_p(policy, prompt, rejected)
        assert loss == pytest.approx(expected, abs=1e-10)
    assert logps[1][0].item() == pytest.approx(log_p(policy, *ROWS[3][::2]), abs=1e-10)
    for reward, own, other in zip(rewards, logps, reference, strict=True):  # the log-ratios, detached
        assert torch.equal(reward, own - other) and not reward.requires_grad


def test_preferred_ft_is_the_mean_over_the_tokens_of_the_chosen():
    policy = gpt()
    total = sum(log_p(policy, prompt, chosen) for prompt, chosen, _ in ROWS)
    expected = -total / sum(len(chosen) for _, chosen, _ in ROWS)
    knobs = knobs_of("preferred-ft", batch_size=5, lr=0.0)
    assert train_sft.evaluate(policy, CHOSEN, knobs)["eval/loss"] == pytest.approx(expected, abs=1e-10)
    seen = []
    train("preferred-ft", policy, knobs, lambda step, metrics: seen.append(metrics["loss"]))
    assert seen == [pytest.approx(expected, abs=1e-10)]


def test_bradley_terry_against_a_loop():
    model, indices = rewarder(), [4, 2, 0, 1, 3]
    batch = dataset.preference_batch([ROWS[i] for i in indices])
    losses = []
    for i, *got in zip(indices, model(batch.chosen).tolist(), model(batch.rejected).tolist(), strict=True):
        prompt, chosen, rejected = ROWS[i]
        a, b = reward_of(model, prompt, chosen), reward_of(model, prompt, rejected)
        assert got == pytest.approx([a, b], abs=1e-10)
        losses.append(softplus(b - a))
    assert step_of(model, indices)["loss"] == pytest.approx(sum(losses) / 5, abs=1e-10)
    assert step_of(model, [2])["loss"] == pytest.approx(losses[1], abs=1e-10)
    untrained = step_of(RewardModel(gpt()), [0, 1])  # it begins at 0 for every response
    assert untrained["loss"] == pytest.approx(math.log(2), abs=1e-12)


def step_of(model, indices, **knobs):
    """The metrics of the reward model's step on ROWS, without a change of its weights."""
    knobs = knobs_of("reward-model", **knobs)
    return reward_model.train_step(model, make_optimizer(model, "sgd", 0.0), ROWS, indices, knobs)


def test_bradley_terry_by_hand():
    losses = reward_model.bradley_terry_loss(torch.tensor([2.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert losses.tolist() == pytest.approx([0.313262, 2.126928, 0.693147], abs=1e-6)


# ---- which way they push ----


def directions(loss_of):
    """d loss / d chosen and d loss / d rejected at a pair of numbers."""
    pair = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-3.0, -2.5)]
    return [gradient.item() for gradient in torch.autograd.grad(loss_of(*pair).sum(), pair)]


def test_gradients_by_hand():
    unlikelihood_of = lambda *logps: unlikelihood_loss(*logps, 0.0, 0.0, alpha=0.3)[0]  # noqa: E731
    assert directions(unlikelihood_of) == [-1.0, pytest.approx(0.3)]
    weight = 1 / (1 + math.exp(-0.5))  # sigmoid(rejected - chosen)
    assert directions(reward_model.bradley_terry_loss) == pytest.approx([-weight, weight])


@pytest.mark.parametrize("method", METHODS)
def test_a_small_step_goes_the_right_way(method):
    more = {"alpha": 1.0} if method == "unlikelihood" else {}
    knobs = knobs_of(method, batch_size=5, lr=1e-4, warmup_steps=0, **more)
    model = rewarder() if method == "reward-model" else gpt()
    before, after = [], []
    for found in (before, after):
        for prompt, chosen, rejected in ROWS:
            of = reward_of if method == "reward-model" else log_p
            found.append([of(model, prompt, chosen), of(model, prompt, rejected)])
        if found is before:
            train(method, model, knobs)
    (chosen, rejected), (new_chosen, new_rejected) = (torch.tensor(found).T for found in (before, after))
    if method == "preferred-ft":
        assert new_chosen.mean() > chosen.mean()
    else:
        assert (new_chosen - new_rejected).mean() > (chosen - rejected).mean()


# ---- the loop ----


@pytest.mark.parametrize("method", METHODS)
def test_trap10_a_step_is_the_same_however_it_is_cut(method):
    whole, *cut = [], [], []
    for found, size in zip((whole, *cut), (0, 1, 2), strict=True):
        model = rewarder() if method == "reward-model" else gpt()
        knobs = knobs_of(method, batch_size=5, micro_batch_size=size, lr=1e-2, warmup_steps=0, epochs=2)
        metrics = []
        train(method, model, knobs, lambda step, m, metrics=metrics: metrics.append(m))
        found += [weights_of(model), *({k: v for k, v in m.items() if "second" not in k} for m in metrics)]
    for found in cut:
        torch.testing.assert_close(found[0], whole[0], rtol=0, atol=1e-8)
        for a, b in zip(found[1:], whole[1:], strict=True):
            assert a == pytest.approx(b, abs=1e-8)


def test_the_reward_model_cuts_its_forward_passes_as_micro_tokens_says(monkeypatch):
    sizes, batch = [], dataset.preference_batch
    monkeypatch.setattr(
        dataset, "preference_batch", lambda pairs, device: sizes.append(len(pairs)) or batch(pairs, device)
    )
    step_of(rewarder(), [3, 0, 1, 4, 2], micro_tokens=16)
    assert sum(sizes) == 5 and max(sizes) == 2  # rows of at most 4 tokens, two for each pair


def test_grad_clip_0_is_no_limit_for_the_reward_model():
    model = rewarder()
    before = weights_of(model)
    reward_model.train_step(
        model, make_optimizer(model, "sgd", 0.1), ROWS, [2, 0], knobs_of("reward-model", grad_clip=0.0)
    )
    assert not torch.equal(weights_of(model), before)


def test_a_loss_that_is_not_finite_stops_before_the_step(monkeypatch):
    model = rewarder()
    monkeypatch.setattr(reward_model, "bradley_terry_loss", lambda chosen, rejected: math.nan * chosen)
    before = weights_of(model)
    with pytest.raises(UserError, match=r"not a finite number.*Lower --lr\.\n.*pairs, from 0: \[0, 2\]"):
        reward_model.train_step(model, make_optimizer(model, "adamw", 0.1), ROWS, [2, 0], knobs_of("reward-model"))
    assert torch.equal(weights_of(model), before)


TRAIN = ("--batch-size", 8, "--lr", 5e-3, "--warmup-steps", 2, "--samples", 2, "--sample-tokens", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The data of `write_data`, an SFT run `sft`, and a reward model `reward`."""
    folder = tmp_path_factory.mktemp("baselines")
    write_data(folder)
    call(train_sft.main, "--data", folder / "sft.jsonl", "--out", folder / "sft", "--preset", "toy", *TRAIN)
    train_reward_model(folder)
    return folder


def train_reward_model(folder):
    """Trains a reward model on pairs.jsonl, from the model in `sft`, and saves it in `reward`."""
    policy, tokenizer, _ = checkpoint.load(folder / "sft")
    rows = dataset.load_rows(folder / "pairs.jsonl", dataset.PAIR, tokenizer, policy.config.block_size)
    model = RewardModel(policy)
    knobs = knobs_of("reward-model", batch_size=8, lr=5e-3, warmup_steps=2, epochs=4, optimizer="rmsprop")
    reward_model.train(model, rows, knobs)
    reward_model.save(folder / "reward", model, tokenizer)


def command(method, home, out, *argv):
    files = ("--data", home / "pairs.jsonl", "--eval-data", home / "held_out.jsonl", "--init", home / "sft")
    call(method.main, *files, "--out", out, *TRAIN, *argv)


def test_fit_with_dpos_step_is_train_dpo(home, tmp_path):
    """Bit for bit: what differs between the methods is the loss, and nothing else."""
    command(train_dpo, home, tmp_path / "dpo", "--beta", 0.3, "--epochs", 1.5)
    policy, tokenizer, _ = checkpoint.load(home / "sft")
    rows = dataset.load_rows(home / "pairs.jsonl", dataset.PAIR, tokenizer, policy.config.block_size)
    knobs = settings(train_dpo.Settings, beta=0.3, epochs=1.5, batch_size=8, lr=5e-3, warmup_steps=2)
    knobs.optimizer = "rmsprop"
    reference = train_dpo.reference_logps(policy, rows, knobs)
    seen = []
    step = partial(train_dpo.train_step, reference=reference)
    fit(policy, rows, step, knobs, lambda step, metrics: seen.append((step, metrics["loss"])))
    assert torch.equal(weights_of(policy), weights_of(checkpoint.load(tmp_path / "dpo")[0]))
    assert seen == [(m["step"], m["loss"]) for m in read_metrics(tmp_path / "dpo")] and len(seen) == 5


# ---- the reward model ----


def test_scores_against_a_loop_in_any_batches():
    model = rewarder()
    prompts, responses = [list(x) for x in PROMPTS for _ in RESPONSES], RESPONSES * X
    expected = [reward_of(model, *both) - 0.7 for both in zip(prompts, responses, strict=True)]
    for batch_size in (1, 7, 1000):
        scores = model.train().score(prompts, responses, batch_size)
        assert scores.shape == (X * Y,) and scores.dtype == torch.float64 and model.training
        assert scores.tolist() == pytest.approx(expected, abs=1e-10)
    ended, cut = model.score([[EOT, 0]] * 2, [[1, 2, EOT], [1, 2]]).tolist()
    assert abs(ended - cut) > 1e-3  # the eot is read like any other token
    assert len(model.score([], [])) == 0


def test_the_longest_row_that_training_keeps_fits():
    model = rewarder(block_size=6)
    assert torch.isfinite(model.score([[EOT, 0, 1]], [[0, 1, 2, EOT]])).all()  # 1 + 2 + 3 = 6 positions and its eot
    with pytest.raises(UserError, match="longer than the model's context"):
        model.score([[EOT, 0, 1]], [[0, 1, 2, 0, EOT]])


def test_scores_have_the_mean_0_whatever_the_precision_of_the_training():
    """`mean` and the rewards that it is subtracted from come from one precision."""
    model = rewarder(dtype=torch.float32, n_embd=64)
    reward_model.centre(model, ROWS, settings(train_dpo.Settings, dtype="bfloat16", batch_size=2))
    prompts, chosen, rejected = map(list, zip(*ROWS, strict=True))
    assert abs(model.score(prompts * 2, chosen + rejected).mean()) < 1e-6


@pytest.mark.parametrize("fast", [False, True])
def test_trap8_in_bf16_the_policy_starts_at_the_reference(fast):
    """Unlikelihood's rewards, which are differences of log-probs, in other batches than the reference's."""
    knobs = knobs_of("unlikelihood", dtype="bfloat16", fast=fast, batch_size=5, micro_batch_size=2)
    policy = gpt(dtype=torch.float32, n_embd=64)
    reference = train_dpo.reference_logps(policy, ROWS, knobs)
    indices = [3, 0, 1, 4, 2]
    train_dpo.check_start(policy, ROWS, reference, indices, knobs, unlikelihood_loss)
    optimizer = make_optimizer(policy, "sgd", 0.0)
    metrics = train_dpo.train_step(policy, optimizer, ROWS, reference, indices, knobs, unlikelihood_loss)
    for side in ("chosen", "rejected"):
        assert abs(metrics[f"rewards/{side}"]) <= 1e-3 * abs(metrics[f"logps/{side}"])


def test_it_recovers_a_linear_reward_from_noisy_choices():
    """r(y) = 1.5 (0s) - 1 (1s) + 0.5 if it ended; 6,000 pairs labelled by Bradley-Terry."""
    count = torch.tensor([[y.count(0), y.count(1), y.count(2), y[-1] == EOT] for y in RESPONSES], dtype=torch.float64)
    weights = torch.tensor([1.5, -1.0, 0.0, 0.5], dtype=torch.float64)
    truth = count @ weights
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(Y, (2, 6000), generator=generator)
    first_wins = torch.rand(6000, generator=generator) < torch.sigmoid(truth[a] - truth[b])
    rows = [
        (PROMPTS[i % X], *(RESPONSES[j] for j in ((p, q) if wins else (q, p))))
        for i, (p, q, wins) in enumerate(zip(a.tolist(), b.tolist(), first_wins.tolist(), strict=True))
        if p != q
    ]
    model = RewardModel(gpt(dtype=torch.float32))
    knobs = settings(train_dpo.Settings, lr=1e-2, warmup_steps=10, decay=True, batch_size=64, epochs=3)
    reward_model.train(model, rows, knobs)
    for prompt in PROMPTS:
        scores = model.score([prompt] * Y, RESPONSES).double()
        features = torch.cat([count, torch.ones(Y, 1, dtype=torch.float64)], dim=1)
        found = torch.linalg.lstsq(features, scores[:, None]).solution[:4, 0]
        torch.testing.assert_close(found, weights, rtol=0, atol=0.35)
        assert torch.corrcoef(torch.stack([scores, truth]))[0, 1] > 0.98
    sides = [model.score([p for p, *_ in rows], [row[i] for row in rows]).mean().item() for i in (1, 2)]
    assert sum(sides) / 2 == pytest.approx(0, abs=1e-4)  # the mean over all training responses


def test_a_reward_model_comes_back_from_its_folder(home, tmp_path):
    model, tokenizer = reward_model.load(home / "reward")
    reward_model.save(tmp_path / "again", model, tokenizer)
    again, _ = reward_model.load(tmp_path / "again")
    prompts = [[tokenizer.eot, *tokenizer.encode(text)] for text in ("The film", "Her cast")]
    responses = [[*tokenizer.encode(text), tokenizer.eot] for text in (" sings.", " drags on and on.")]
    scores = model.score(prompts, responses)
    assert torch.equal(scores, again.score(prompts, responses)) and scores[0] != scores[1] and (scores != 0).all()
    texts = reward_model.of_texts(model, tokenizer)
    assert texts(["The film", "Her cast"], [" sings.", " drags on and on."]) == scores.tolist()
    assert texts([], []) == []
    assert math.isfinite(texts(["The film " * 100], [" sings."])[0])
    with pytest.raises(UserError, match="language model, not a reward model"):
        reward_model.load(home / "sft")
    with pytest.raises(UserError, match="another tokenizer"):
        reward_model.load(home / "reward", Tokenizer.train(["abc abc abc"], 260))


def test_a_reward_model_is_a_judge(home):
    model, tokenizer = reward_model.load(home / "reward")
    prompts, a, b = ["The film"] * 3, [" sings.", " drags on.", " is fun."], [" is dull.", " drags on.", " was a joy!"]
    first, second = (reward_model.of_texts(model, tokenizer)(prompts, side) for side in (a, b))
    verdicts = load_judge(str(home / "reward"))(prompts, a, b)
    assert verdicts == ["a" if x > y else "b" if x < y else "tie" for x, y in zip(first, second, strict=True)]
    assert verdicts[1] == "tie" and verdicts[0] != "tie"
    with pytest.raises(UserError, match="not a reward model"):
        load_judge(str(home / "sft"))


# ---- the command ----


def test_the_command_writes_a_whole_run_and_leaves_the_start_alone(home, tmp_path):
    before = contents(home / "sft")
    command(unlikelihood, home, tmp_path / "run", "--epochs", 4, "--eval-every", 4)
    assert contents(home / "sft") == before
    metrics = read_metrics(tmp_path / "run")
    assert [m["step"] for m in metrics] == list(range(1, 13))  # 22 pairs in batches of 8, four times
    assert [m["step"] for m in metrics if "eval/loss" in m] == [4, 8, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(math.isfinite(value) for m in metrics for value in m.values())
    names = {"settings.json", "bpe.json", "checkpoint.pt", "metrics.jsonl", "samples.md", "report.md"}
    assert names <= contents(tmp_path / "run").keys()
    assert "before" in (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        command(unlikelihood, home, tmp_path / "run")  # it holds a run


def test_trap17_trap18_evaluating_or_stopping_changes_no_bit(home, tmp_path):
    command(unlikelihood, home, tmp_path / "whole", "--epochs", 2, "--eval-every", 1)
    command(unlikelihood, home, tmp_path / "parts", "--epochs", 2, "--max-steps", 4)
    command(unlikelihood, home, tmp_path / "parts", "--epochs", 2, "--max-steps", 6, "--resume")
    (whole, _, a), (parts, _, b) = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    assert torch.equal(weights_of(whole), weights_of(parts)) and a["step"] == b["step"] == 6
    assert [m["step"] for m in read_metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def test_bad_input(home, tmp_path, capsys):
    files = ("--data", home / "pairs.jsonl", "--out", tmp_path / "run", *TRAIN)
    needed = (*files, "--init", home / "sft")
    assert "--alpha 1.5: must be from 0 to 1" in fails(capsys, unlikelihood.main, *needed, "--alpha", 1.5)
    assert "/nowhere not found" in fails(capsys, unlikelihood.main, *files, "--init", "/nowhere")
    assert not (tmp_path / "run").exists()


# ---- Best-of-N ----


def law_of_best(p, scores, n):
    """The distribution of the best of n draws from p (Y,), ties broken by lot: exactly, level by level of the score."""
    best = torch.zeros_like(p)
    for level in scores.unique():
        here = scores == level
        up_to = p[scores <= level].sum()
        below = p[scores < level].sum()
        best[here] = (up_to**n - below**n) * p[here] / p[here].sum()
    return best


def languages():
    """(probabilities (Y,), scores (Y,)): rewards without a tie, with many, and one response that is nearly certain."""
    p = every_logp(gpt(block_size=5))[0].detach().exp()
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(Y, dtype=torch.float64, generator=generator)
    peaked = torch.full((Y,), 0.02 / (Y - 1), dtype=torch.float64)
    peaked[7] = 0.98
    return [(p, fine), (p, (3 * fine).round()), (peaked, fine)]


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_bound_holds_for_the_exact_kl_and_is_near_where_no_response_is_likely(n):
    for p, scores in languages():
        best = law_of_best(p, scores, n)
        assert best.sum().item() == pytest.approx(1, abs=1e-12)
        kl = (best * (best / p).log()).nan_to_num().sum().item()
        assert -1e-12 <= kl <= best_of_n.kl_bound(n) + 1e-12
        if n > 1:
            assert (best * scores).sum() > (p * scores).sum()
    many = torch.full((100_000,), 1e-5, dtype=torch.float64)  # F^n - (F - p)^n without a loop: scores are places
    up_to = torch.arange(1, 100_001, dtype=torch.float64) / 100_000
    best = up_to**n - (up_to - 1e-5) ** n
    kl = (best * (best / many).log()).nan_to_num().sum().item()
    assert kl == pytest.approx(best_of_n.kl_bound(n), abs=2e-3) and kl <= best_of_n.kl_bound(n) + 1e-9


def test_bound_by_hand():
    assert [best_of_n.kl_bound(n) for n in (1, 2, 4)] == pytest.approx([0, 0.193147, 0.636294], abs=1e-6)


@pytest.mark.parametrize("n", [2, 4])
def test_selection_follows_the_exact_law(n):
    """Frequencies of 60,000 draws, as 4,000 prompts of 15 samples, which 2 and 4 do not divide."""
    for p, scores in languages()[:2]:
        drawn = torch.multinomial(p, 60_000, replacement=True, generator=torch.Generator().manual_seed(n)).view(-1, 15)
        places = best_of_n.best_of(scores[drawn], n)
        assert places.shape == (4000, 15 // n)
        found = drawn.gather(1, places).flatten()
        law = law_of_best(p, scores, n)
        frequencies = torch.bincount(found, minlength=Y) / len(found)
        # standard deviations of a binomial; 5 of them, for 121 responses
        assert ((frequencies - law).abs() <= 5 * (law * (1 - law) / len(found)).sqrt() + 1e-9).all()


def test_selection_by_hand():
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 9.0], [5.0, 5.0, 0.0, -1.0, 0.0]])
    assert best_of_n.best_of(scores, 1).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert best_of_n.best_of(scores, 2).tolist() == [[1, 2], [0, 2]]  # of a tie the first; the fifth is left over
    assert best_of_n.best_of(scores, 4).tolist() == [[1], [0]]
    assert best_of_n.best_of(scores, 5).tolist() == [[4], [0]]


def test_samples_of_a_prompt_stand_together_with_their_own_scores():
    policy, model = gpt(dtype=torch.float32), rewarder(dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    drawn = common.sample(policy, Symbols(), ["0", "1", "2"], 4, generator, per_prompt=5, batch_size=4)
    assert drawn.prompt_ids[::5] == PROMPTS
    samples, scores = drawn.ids, model.score(drawn.prompt_ids, drawn.ids, 4).view(-1, 5)
    assert len(samples) == 15 and scores.shape == (3, 5) and len(set(map(tuple, samples))) > 5
    for i, sample in enumerate(samples):
        assert scores[i // 5, i % 5].item() == pytest.approx(reward_of(model, PROMPTS[i // 5], sample) - 0.7, abs=1e-4)


def test_the_best_of_each_group_by_a_loop(home):
    policy, tokenizer, _ = checkpoint.load(home / "sft")
    model, _ = reward_model.load(home / "reward")
    samples = common.sample(policy, tokenizer, ["The film", "This story", "Her cast"], 8, seed=0, per_prompt=6)
    scores, learned = model.score(samples.prompt_ids, samples.ids), []
    for n in (1, 2, 4):
        winners = []
        for p in range(3):
            for group in range(6 // n):
                members = range(6 * p + group * n, 6 * p + (group + 1) * n)
                winners.append(max(members, key=lambda i: scores[i].item()))
        best = best_of_n.best_samples(samples, scores.view(3, 6), n)
        assert best.texts == [samples.texts[i] for i in winners] and best.ids == [samples.ids[i] for i in winners]
        assert best.prompts == [prompt for prompt in samples.prompts[::6] for _ in range(6 // n)]
        learned.append(scores[winners].mean().item())
    assert learned[0] < learned[1] < learned[2]
