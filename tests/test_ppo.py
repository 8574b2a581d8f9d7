"""PPO: each formula against loops and values by hand, and the whole of it on two problems whose optimum is known.

The two are a bandit (responses of one token) and the language of tests/test_theory.py, where every response can be
enumerated: there PPO must reach pi_ref exp(r / beta) / Z (Eq. 4 of the DPO paper), the optimum of the objective that it
shares with DPO.
"""

import copy
import math

import pytest
import torch
from test_theory import EOT, PROMPTS, RESPONSES, SYMBOLS, every_logp, objective, optimum

from experiments.frontier.baselines import ppo
from minidpo.device import autocast
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.settings import UserError
from train_dpo import token_logps

SINGLE = [(y,) for y in range(SYMBOLS)]  # the bandit's responses


class Symbols:
    """The language's tokenizer: a symbol is a digit."""

    eot = EOT

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(map(str, ids))


def gpt(seed=0, n_embd=16, std=0.3, dtype=torch.float32):
    """A GPT over the language's symbols, far from uniform."""
    model = GPT(GPTConfig(vocab_size=SYMBOLS, block_size=5, n_layer=1, n_head=2, n_embd=n_embd)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return model


def settings(**knobs):
    return ppo.Settings(**{**dict(max_new_tokens=4, warmup_steps=0, lr=3e-3, value_lr=1e-2), **knobs})


def train_on(rewards, responses, reference, **knobs):
    """PPO from `reference` on a table of rewards (3 prompts, len(responses)) -> the policy and each step's metrics."""
    table = {(x, tuple(y)): rewards[x][j].item() for x in range(3) for j, y in enumerate(responses)}

    def reward(samples):
        return [table[x[1], tuple(y)] for x, y in zip(samples.prompt_ids, samples.ids, strict=True)]

    policy, seen = copy.deepcopy(reference), []
    on_step = lambda step, metrics: seen.append(metrics)  # noqa: E731
    ppo.train(policy, reference, reward, ["0", "1", "2"], Symbols(), settings(**knobs), on_step)
    return policy, seen


def sampled(policy, reference=None, reward=None, n=64, **knobs):
    """A rollout of n responses, and the value model that took part, whose head is not 0 here."""
    value = ppo.ValueModel(copy.deepcopy(policy))
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(5))
    ids = [PROMPTS[i % 3] for i in range(n)]
    rollout = ppo.roll_out(
        policy, value, reference or policy, reward or (lambda samples: [float(i) for i in range(n)]),
        [str(x[1]) for x in ids], Symbols(), settings(**knobs), torch.Generator().manual_seed(1),
    )  # fmt: skip
    return rollout, value


def ragged(seed=0, rows=6, columns=9):
    """A mask as sft_batch makes them: in each row one stretch, of length 1 at least; and four tensors of its shape."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        start = int(torch.randint(3, (), generator=generator))
        end = (
            columns
            if i == 0
            else start + 1
            if i == 1
            else int(torch.randint(start + 1, columns, (), generator=generator))
        )
        mask[i, start:end] = True
    return mask, *torch.randn(4, rows, columns, generator=generator, dtype=torch.float64)


# ---- the formulas ----


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_the_double_sum_over_what_follows(lam):
    """Schulman et al. 2016, Eq. 16 with gamma 1: A_t = sum over l of lam^l delta_(t + l), written out."""
    mask, rewards, values, *_ = ragged()
    got = ppo.gae(rewards * mask, values, mask, lam)
    expected = torch.zeros_like(values)
    for n in range(len(mask)):
        places = mask[n].nonzero().flatten().tolist()
        for t in places:
            for later in [place for place in places if place >= t]:
                after = values[n, later + 1] if later + 1 in places else 0.0
                expected[n, t] += lam ** (later - t) * (rewards[n, later] + after - values[n, later])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gae_with_lambda_1_is_the_return_minus_the_value():
    mask, rewards, values, *_ = ragged(1)
    got = ppo.gae(rewards * mask, values, mask, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(got, (to_come - values) * mask, rtol=0, atol=1e-12)


def test_each_token_pays_for_its_distance_and_the_last_one_earns_the_reward():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    logps = torch.tensor([[-9.0, -1.0, -2.0, -9.0], [-9.0, -9.0, -1.0, -3.0], [-1.0, -9.0, -9.0, -9.0]])
    reference = torch.tensor([[-7.0, -1.5, -1.0, -7.0], [-7.0, -7.0, -1.0, -4.0], [-4.0, -7.0, -7.0, -7.0]])
    got = ppo.penalised_rewards(torch.tensor([10.0, 20.0, 30.0]), logps, reference, mask, kl_coef=0.1)
    expected = torch.tensor([[0.0, -0.05, 10.1, 0.0], [0.0, 0.0, 0.0, 19.9], [29.7, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(got, expected)


def test_penalised_rewards_sum_to_the_reward_minus_the_price_of_the_distance():
    mask, logps, reference, *_ = ragged(2)
    scores = torch.arange(len(mask), dtype=torch.float64)
    got = ppo.penalised_rewards(scores, logps, reference, mask, kl_coef=0.3).sum(1)
    expected = [
        scores[n] - 0.3 * sum(logps[n, t] - reference[n, t] for t in range(mask.shape[1]) if mask[n, t])
        for n in range(len(mask))
    ]
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-12)


def test_whitening_takes_mean_and_variance_over_response_tokens_alone():
    mask, values, *_ = ragged(3)
    got = ppo.whiten(5 + 3 * values, mask)
    inside = (5 + 3 * values)[mask]
    torch.testing.assert_close(got[mask], (inside - inside.mean()) / inside.std(correction=0), rtol=0, atol=1e-7)
    assert (got[~mask] == 0).all()


def test_clipped_ratio_by_hand():
    """Schulman et al. 2017, Figure 1: with a positive advantage the ratio counts up to 1 + clip, with a negative one

    down to 1 - clip; the other way round nothing is clipped. The last column is no response token.
    """
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 7.0]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0, 1.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    old = torch.full_like(ratio, -3.0)
    logps = (old + ratio.log()).requires_grad_()
    loss, clip_fraction = ppo.policy_loss(logps, old, advantages, mask, clip=0.2)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.6 + 1.1) / 5)
    assert clip_fraction.item() == pytest.approx(2 / 5)
    loss.backward()  # d ratio / d logp = ratio, where it is not clipped
    torch.testing.assert_close(logps.grad[0], -torch.tensor([0, 1.0, -3.0, 0, 1.1, 0]).double() / 5)


def test_clipped_value_loss_by_hand():
    old = torch.zeros(1, 5, dtype=torch.float64)
    values = torch.tensor([[0.1, 0.9, 0.9, -0.9, 5.0]], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    loss = ppo.value_loss(values, old, returns, mask, clip=0.2)
    # 0.9 and -0.9 moved towards the return by more than 0.2: they count as 0.2 and -0.2, and have no gradient
    assert loss.item() == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 1.9**2 + 0.8**2) / 4)
    loss.backward()
    torch.testing.assert_close(values.grad[0], torch.tensor([-0.9, 0.0, 1.9, 0.0, 0.0]).double() / 4)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(2.0, 0.5), (2.2, 0.5 * 1.01), (1.9, 0.5 * 0.995), (50.0, 0.5 * 1.02), (0.0, 0.5 * 0.98), (-1.0, 0.5 * 0.98)],
)
def test_controller_by_hand(kl, expected):
    """kl_coef 0.5, target 2, gain 0.1: 10 % too far makes it 1 % dearer; the error counts up to 20 %."""
    assert ppo.next_kl_coef(0.5, kl, target=2.0, gain=0.1) == pytest.approx(expected)


def test_without_a_target_the_coefficient_stays():
    assert ppo.next_kl_coef(0.5, 9.0, target=0.0, gain=0.1) == 0.5


# ---- the rollouts ----


def test_rollout_logps_are_those_of_the_sampled_ids_one_response_at_a_time():
    """Against one unpadded forward pass a response: the final eot is scored, and a response that was cut has none."""
    policy, reference = gpt(0, dtype=torch.float64), gpt(1, dtype=torch.float64)
    drawn = {}

    def reward(samples):
        drawn.update(samples._asdict())
        return [float(len(ids)) for ids in samples.ids]

    rollout, value = sampled(policy, reference, reward, max_new_tokens=3)
    cut = [ids for ids in drawn["ids"] if EOT not in ids]
    assert cut and len(cut) < len(drawn["ids"]) and {len(ids) for ids in cut} == {3}
    assert drawn["texts"] == [Symbols().decode(ids) for ids in drawn["ids"]]
    assert rollout.scores.tolist() == [len(ids) for ids in drawn["ids"]]
    for n, (x, y) in enumerate(zip(drawn["prompt_ids"], drawn["ids"], strict=True)):
        here = slice(len(x) - 1, len(x) + len(y) - 1)
        assert rollout.rows.mask[n].nonzero().flatten().tolist() == list(range(here.start, here.stop))
        assert rollout.rows.targets[n, here].tolist() == y
        row = torch.tensor([x + y[:-1]])
        for model, got in ((policy, rollout.logps), (reference, rollout.reference_logps)):
            expected = token_logps(model(row)[:, len(x) - 1 :], torch.tensor([y]))[0]
            torch.testing.assert_close(got[n, here], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(rollout.values[n, here], value(row)[0, here], rtol=0, atol=1e-12)


def test_trap8_in_bf16_the_policy_starts_at_the_reference():
    """One path and one precision for both sides of each difference: exactly 0 against the reference."""
    policy = gpt(n_embd=64)
    rollout, _ = sampled(policy, gpt(n_embd=64), dtype="bfloat16")
    with autocast("cpu", "bfloat16"):
        again = token_logps(policy(rollout.rows.ids), rollout.rows.targets)
    mask = rollout.rows.mask
    assert rollout.logps.dtype == torch.float32 and torch.equal(rollout.logps[mask], rollout.reference_logps[mask])
    assert ((again - rollout.logps)[mask].abs() <= 1e-3 * again[mask].abs()).all()


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_before_the_first_update_every_ratio_is_1_and_nothing_is_clipped(dtype, within):
    policy = gpt()
    rollout, value = sampled(policy, dtype=dtype)
    assert (rollout.logps == rollout.reference_logps).all() and rollout.values.dtype == torch.float32
    i = torch.arange(10, 30)  # a minibatch: other rows beside each row than in the rollout
    with autocast("cpu", dtype):
        logps = token_logps(policy(rollout.rows.ids[i]), rollout.rows.targets[i])
    mask, advantages = rollout.rows.mask[i], torch.randn(20, rollout.rows.mask.shape[1])
    assert ((logps - rollout.logps[i])[mask].abs() < within).all()
    loss, clip_fraction = ppo.policy_loss(logps, rollout.logps[i], advantages, mask, clip=10 * within)
    assert clip_fraction == 0 and loss.item() == pytest.approx(-advantages[mask].mean().item(), abs=within)
    once = settings(epochs=1, minibatch_size=64, lr=1e-3, dtype=dtype)
    optimizers = [make_optimizer(model, "adamw", 1e-3) for model in (policy, value)]
    metrics = ppo.update(policy, value, optimizers, rollout, 0.1, once, torch.Generator().manual_seed(0))
    assert metrics["clip_fraction"] == 0 and abs(metrics["loss/policy"]) < within  # whitened advantages: mean 0


def test_the_value_model_shares_nothing_with_the_policy_and_learns_the_unwhitened_returns():
    policy = gpt()
    rollout, value = sampled(policy)
    before = [p.clone() for p in policy.parameters()]
    optimizers = [make_optimizer(policy, "adamw", 0.0), make_optimizer(value, "adamw", 1e-2)]
    many = settings(epochs=150, minibatch_size=64, value_clip=1e9, lam=1.0, grad_clip=1e9)
    ppo.update(policy, value, optimizers, rollout, 0.0, many, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    # with lambda 1 and no KL term the return is the score, at each token: values must have its mean, 31.5
    assert value(rollout.rows.ids)[rollout.rows.mask].mean().item() == pytest.approx(
        (rollout.scores[:, None] * rollout.rows.mask).sum().item() / rollout.rows.mask.sum().item(), rel=0.05
    )


@pytest.mark.parametrize("still", ["lr", "value_lr"])
def test_each_network_has_its_own_learning_rate(still):
    policy = gpt()
    reward = lambda samples: [float(len(ids)) for ids in samples.ids]  # noqa: E731
    knobs = settings(steps=1, rollouts=8, **{still: 0.0})
    value = ppo.train(policy, gpt(), reward, ["0"], Symbols(), knobs)
    moved = {
        "lr": any((a != b).any() for a, b in zip(policy.parameters(), gpt().parameters(), strict=True)),
        "value_lr": bool((value.head.weight != 0).any()),  # where it begins
    }
    assert moved == {"lr": still != "lr", "value_lr": still != "value_lr"}


def test_epochs_and_grad_clip_bound_what_a_step_changes():
    rollout, value = sampled(gpt())
    lengths = []
    for epochs, grad_clip in ((1, 1e9), (3, 1e9), (1, 1e-3)):
        policy, v = gpt(), copy.deepcopy(value)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (policy, v)]
        knobs = settings(epochs=epochs, grad_clip=grad_clip)  # one minibatch: n epochs are n updates
        ppo.update(policy, v, optimizers, rollout, 0.1, knobs, torch.Generator().manual_seed(0))
        moved = [(a - b).square().sum() for a, b in zip(policy.parameters(), gpt().parameters(), strict=True)]
        lengths.append(torch.stack(moved).sum().sqrt().item())
    assert 2 * lengths[0] < lengths[1] < 3.1 * lengths[0]
    assert lengths[2] == pytest.approx(0.01 * 1e-3, rel=1e-2) and lengths[2] < 0.1 * lengths[0]


# ---- the whole, where the optimum is known ----


def test_on_a_bandit_ppo_finds_the_kl_regularised_optimum():
    """Responses of one token: the best policy is a table, pi_ref exp(r / beta) / Z for each of the three prompts."""
    beta, reference = 0.5, gpt()
    reward = torch.tensor([[0.0, 1.0, 0.2, 0.5], [1.0, 0.0, 0.0, 0.3], [-0.5, 0.4, 1.0, 0.0]])
    policy, _ = train_on(reward, SINGLE, reference, kl_target=0.0, kl_coef=beta, steps=80, max_new_tokens=1)
    with torch.no_grad():
        p_ref, p = (model(torch.tensor(PROMPTS))[:, -1].softmax(-1) for model in (reference, policy))
    best = p_ref * (reward / beta).exp()
    best /= best.sum(-1, keepdim=True)
    assert ((best - p_ref).abs().amax(-1) > 0.1).all()  # there was something to learn, for each prompt
    torch.testing.assert_close(p, best, rtol=0, atol=0.02)


def test_on_an_enumerable_language_ppo_comes_near_the_optimum_of_its_objective():
    """E[r] - beta KL, summed over all 121 responses to each prompt: 98 % of the gain that Eq. 4 allows, at least."""
    beta, reference = 0.3, gpt()
    reward = torch.tensor([[y.count(x) - 0.5 * y.count((x + 1) % 3) for y in RESPONSES] for x in range(3)])
    policy, seen = train_on(reward, RESPONSES, reference, kl_target=0.0, kl_coef=beta, steps=100)
    with torch.no_grad():
        log_ref, log_pi = every_logp(reference), every_logp(policy)
    best = optimum(log_ref, reward, beta)[0]
    start, end, top = (objective(logps, log_ref, reward, beta).mean().item() for logps in (log_ref, log_pi, best))
    assert top - start > 0.5
    assert end <= top + 1e-5 and (end - start) / (top - start) > 0.98
    # the metrics are those of the samples: their last tenth agrees with the sums over all responses
    kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1).mean().item()
    mean_reward = (log_pi.exp() * reward).sum(-1).mean().item()
    assert sum(m["kl"] for m in seen[-10:]) / 10 == pytest.approx(kl, abs=0.1)
    assert sum(m["reward"] for m in seen[-10:]) / 10 == pytest.approx(mean_reward, abs=0.1)
    assert {m["kl_coef"] for m in seen} == {beta}


def test_the_controller_leads_the_kl_to_its_target():
    knobs = dict(kl_target=0.3, kl_coef=2.0, kl_gain=0.5, steps=90, max_new_tokens=1, epochs=1)
    _, seen = train_on(torch.eye(3, SYMBOLS), SINGLE, gpt(), **knobs)
    assert sum(m["kl"] for m in seen[-66:]) / 66 == pytest.approx(0.3, abs=0.06)  # it swings around the target
    for m, following in zip(seen, seen[1:], strict=False):  # each step's KL moves the next step's coefficient
        assert following["kl_coef"] == ppo.next_kl_coef(m["kl_coef"], m["kl"], 0.3, 0.5)


def test_a_long_prompt_is_cut_on_the_left(capsys):
    """The ids are the last ones of the prompt behind an eot; one line says so."""
    seen = []

    def reward(samples):
        seen.extend(map(tuple, samples.prompt_ids))
        return [float(len(ids)) for ids in samples.ids]

    ppo.train(gpt(), gpt(), reward, ["0121012", "2"], Symbols(), settings(steps=2, rollouts=8))
    assert set(seen) == {(EOT, 1, 0, 1, 2), (EOT, 2)}  # the context holds 5
    assert capsys.readouterr().out.count("1 of 2 prompts cut on the left to 4 tokens") == 1


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="not a finite number"):
        nan = lambda samples: [math.nan] * len(samples.ids)  # noqa: E731
        ppo.train(gpt(), gpt(), nan, ["0"], Symbols(), settings(steps=1))
