"""The mathematics of train_dpo.py against plain loops over Python floats, and the step built on it."""

import math
import random

import pytest
import torch

import train_dpo
from minidpo.dataset import PreferenceBatch, Rows, cut_to_context, preference_batch
from minidpo.model import GPT, GPTConfig
from minidpo.settings import UserError
from train_dpo import dpo_loss, response_logps, token_logps

LN2 = math.log(2)


def random_model(seed=0, dtype=torch.float64, **shape):
    """A GPT whose every weight is random and large enough for the predictions to be far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shape = dict(vocab_size=13, block_size=24, n_layer=2, n_head=2, n_embd=8) | shape
    model = GPT(GPTConfig(**shape)).to(dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4, generator=generator)
    return model


def random_rows(n, seed=0):
    """n pairs of many lengths, over ids 0 to 12: 0 is eot here and, as everywhere, the padding."""
    draw = random.Random(seed)

    def ids(least):
        return [draw.randrange(13) for _ in range(draw.randint(least, 8))]

    return [([0, *ids(0)], [*ids(1), 0], [*ids(1), 0]) for _ in range(n)]


def loop_logp(model, prompt, response):
    """log pi(response | prompt), one token after the other, each predicted from nothing but what precedes it."""
    total = 0.0
    for t in range(len(response)):
        logits = model(torch.tensor([[*prompt, *response[:t]]]))[0, -1].tolist()
        total += logits[response[t]] - math.log(sum(math.exp(x) for x in logits))
    return total


def loop_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, smoothing=0.0):
    """Eq. 7 and conservative DPO for one pair of floats."""
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    p, q = 1 / (1 + math.exp(-beta * h)), 1 / (1 + math.exp(beta * h))  # Eq. 6, either way round
    return -(1 - smoothing) * math.log(p) - smoothing * math.log(q)


def random_logps(n, seed=0):
    """Four (n,) of float64: policy chosen and rejected, reference chosen and rejected, all between -60 and -20."""
    return (-20 - 40 * torch.rand(4, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).unbind()


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


# ---- token_logps and response_logps ----


def test_token_logps_by_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 4
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = [
        [logits[b, t, targets[b, t]] - math.log(sum(math.exp(x) for x in logits[b, t])) for t in range(3)]
        for b in range(2)
    ]
    close(token_logps(logits, targets), expected)


@torch.no_grad()
def test_trap01_response_logps_are_sums_over_the_response():
    model, rows = random_model(), random_rows(9)
    chosen, rejected = response_logps(model, preference_batch(rows))
    close(chosen, [loop_logp(model, prompt, w) for prompt, w, _ in rows])
    close(rejected, [loop_logp(model, prompt, l) for prompt, _, l in rows])


@torch.no_grad()
def test_trap03_the_final_eot_counts():
    """A response that ended gets its eot (id 0) on the way from ids to a row, and response_logps scores it."""
    model = random_model()
    prompt, responses, *_ = cut_to_context([3, 4], ([5, 6], [7]), [True, True], eot=0, max_length=24)
    ended, cut = (prompt, *responses), ([0, 3, 4], [5, 6], [7])
    with_eot, without = (torch.cat(response_logps(model, preference_batch([pair]))) for pair in (ended, cut))
    eot = [loop_logp(model, [0, 3, 4, 5, 6], [0]), loop_logp(model, [0, 3, 4, 7], [0])]
    close(with_eot - without, eot)


@torch.no_grad()
def test_trap04_eot_and_padding_of_the_same_id():
    """An eot (id 0, as the padding) inside the response, at its end, and as the whole of it."""
    model = random_model()
    rows = [([0, 3], [0, 5, 0, 0], [0]), ([0], [6, 0], [0, 0]), ([0, 0, 0], [1, 2, 3, 4, 5, 0], [9])]
    chosen, rejected = response_logps(model, preference_batch(rows))
    close(chosen, [loop_logp(model, prompt, w) for prompt, w, _ in rows])
    close(rejected, [loop_logp(model, prompt, l) for prompt, _, l in rows])


def test_trap05_one_token_response_by_hand():
    # a bigram model over four tokens: row i of the table holds the probabilities after token i
    table = [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.125, 0.125, 0.5], [0.05, 0.15, 0.2, 0.6]]
    logits = torch.tensor(table, dtype=torch.float64).log() + 5  # a constant over the vocabulary changes nothing
    chosen, rejected = response_logps(lambda ids: logits[ids], preference_batch([([0, 2], [3], [1])]))
    close(chosen, [math.log(0.5)])  # 3 after 2
    close(rejected, [math.log(0.125)])  # 1 after 2
    # with an eot behind it: 3 after 2, then 0 after 3; 1 after 2, then 0 after 1
    chosen, rejected = response_logps(lambda ids: logits[ids], preference_batch([([0, 2], [3, 0], [1, 0])]))
    close(chosen, [math.log(0.5 * 0.05)])
    close(rejected, [math.log(0.125 * 0.7)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_trap06_long_responses_of_shifted_logits(dtype):
    """Logits around -100, 600 tokens: log-softmax and sum must run in fp32 at least, and stay float64 in float64."""
    generator = torch.Generator().manual_seed(0)
    T, V = 600, 50
    logits = (3 * torch.randn(1, T, V, generator=generator, dtype=torch.float64) - 100).to(dtype)
    ids, other = torch.randint(V, (2, T), generator=generator).tolist()
    batch = preference_batch([([0], ids, other)])
    expected = [
        sum(row[i] - math.log(sum(math.exp(x) for x in row)) for row, i in zip(logits[0].tolist(), side, strict=True))
        for side in (ids, other)
    ]
    logps = torch.cat(response_logps(lambda ids: logits[:, : ids.shape[1]], batch))
    wide = dtype == torch.float64
    assert logps.dtype == token_logps(logits, batch.chosen.targets).dtype == (torch.float64 if wide else torch.float32)
    close(logps.double(), expected, 1e-12 if wide else 2e-6)  # 2e-6 of -4,000: 0.008 nats; in bf16 it is some nats


@torch.no_grad()
def test_trap12_padding_and_company_change_nothing():
    model, rows = random_model(), random_rows(7)
    together = torch.stack(response_logps(model, preference_batch(rows)))
    alone = [torch.stack(response_logps(model, preference_batch([row]))) for row in rows]
    close(together, torch.cat(alone, dim=1))
    order = [3, 0, 6, 2, 5, 1, 4]
    close(torch.stack(response_logps(model, preference_batch([rows[i] for i in order]))), together[:, order])

    def pad(side):  # three more columns of anything at all
        junk = torch.full((len(rows), 3), 11)
        mask = torch.zeros(len(rows), 3, dtype=torch.bool)
        return Rows(*(torch.cat(both, dim=1) for both in zip(side, (junk, junk, mask), strict=True)))

    batch = preference_batch(rows)
    close(torch.stack(response_logps(model, PreferenceBatch(pad(batch.chosen), pad(batch.rejected)))), together)


def test_padding_gets_no_gradient_and_spreads_no_nan():
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[0, 0, 1] = logits[0, 2, 0] = -math.inf  # of a prompt token and of padding, the probability is 0
    logits.requires_grad_()
    rows = Rows(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 2, 0]]), torch.tensor([[False, True, False]]))
    logps, _ = response_logps(lambda ids: logits, PreferenceBatch(rows, rows))
    close(logps.detach(), [-math.log(4)])
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    close(gradient[0, 1], [-0.25, -0.25, 0.75, -0.25])
    assert (gradient[0, [0, 2]] == 0).all()


def test_both_sides_get_their_gradient():
    """Against finite differences along a random direction of all weights; training changes both log-probabilities."""
    model, batch, step = random_model(), preference_batch(random_rows(5)), 1e-6
    weights = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    gradients = [torch.autograd.grad(side.sum(), weights) for side in response_logps(model, batch)]
    along = [sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)) for gradient in gradients]

    def moved(size):
        with torch.no_grad():
            for weight, d in zip(weights, direction, strict=True):
                weight += size * d
            sums = [side.sum() for side in response_logps(model, batch)]
            for weight, d in zip(weights, direction, strict=True):
                weight -= size * d
        return sums

    for slope, up, down in zip(along, moved(step), moved(-step), strict=True):
        close(slope, (up - down) / (2 * step), 1e-5)


# ---- dpo_loss ----


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_sigmoid_loss_by_loop(beta, smoothing):
    logps = random_logps(20)
    losses, *_ = dpo_loss(*logps, beta, smoothing)
    each = zip(*(x.tolist() for x in logps), strict=True)
    close(losses, [loop_loss(*pair, beta, smoothing) for pair in each], 1e-9)


def test_loss_starts_at_ln_2():
    """pi = pi_ref: every reward is 0 and every loss ln 2, whatever beta and the labels' noise."""
    chosen, rejected, *_ = random_logps(5)
    for beta, smoothing in [(0.1, 0.0), (2.0, 0.0), (0.1, 0.3)]:
        losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, beta, smoothing)
        close(losses, [LN2] * 5)
        assert all((r == 0).all() for r in rewards)


def test_policy_minus_reference_not_the_reverse():
    """By hand: the policy has moved 2 nats towards the chosen and 4 away from the rejected response."""
    one = torch.ones(1, dtype=torch.float64)
    losses, chosen_rewards, rejected_rewards = dpo_loss(-10 * one, -24 * one, -12 * one, -20 * one, beta=0.5)
    close(chosen_rewards, [1.0])
    close(rejected_rewards, [-2.0])
    close(losses, [math.log1p(math.exp(-3.0))])  # 0.0486; the reverse would be 3.0486


def test_gradient_is_minus_beta_times_the_weight_of_the_error():
    logps, beta, step = random_logps(8), 0.3, 1e-5
    chosen, rejected = (x.clone().requires_grad_() for x in logps[:2])
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *logps[2:], beta)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    weight = [1 / (1 + math.exp(m)) for m in (chosen_rewards - rejected_rewards).tolist()]  # sigmoid(-margin)
    close(gradients[0], [-beta * w for w in weight])
    close(gradients[1], [+beta * w for w in weight])
    for side in (0, 1):
        up, down = list(logps), list(logps)
        up[side], down[side] = logps[side] + step, logps[side] - step
        finite = (dpo_loss(*up, beta)[0] - dpo_loss(*down, beta)[0]) / (2 * step)
        close(gradients[side], finite, 1e-8)


def test_margins_of_a_thousand_stay_finite():
    margins = torch.tensor([1000.0, -1000.0], requires_grad=True)
    losses, *_ = dpo_loss(margins, *torch.zeros(3, 2), beta=1.0)
    close(losses.detach(), [0.0, 1000.0])
    close(torch.autograd.grad(losses.sum(), margins)[0], [0.0, -1.0])


def test_trap16_rewards_carry_beta_and_the_reference():
    # the policy finds the rejected response likelier, but less so than the reference did: a win
    chosen, rejected, chosen_reference, rejected_reference = torch.tensor([[-9.0], [-5.0], [-10.0], [-3.0]])
    chosen.requires_grad_()
    losses, *rewards = dpo_loss(chosen, rejected, chosen_reference, rejected_reference, beta=0.25)
    close(rewards[0], [0.25])
    close(rewards[1], [-0.5])
    assert losses.requires_grad and not rewards[0].requires_grad and not rewards[1].requires_grad


def test_trap20_label_smoothing_is_conservative_dpo_by_hand():
    # margin 0.1 * ((-10 + 12) - (-20 + 18)) = 0.4
    # conservative: 0.9 log(1 + e^-0.4) + 0.1 log(1 + e^0.4) = 0.9 * 0.513015 + 0.1 * 0.913015
    # robust:      (0.9 log(1 + e^-0.4) - 0.1 log(1 + e^0.4)) / (1 - 0.2) = 0.463015
    logps = torch.tensor([[-10.0], [-20.0], [-12.0], [-18.0]], dtype=torch.float64)
    losses, *rewards = dpo_loss(*logps, beta=0.1, label_smoothing=0.1)
    close(losses, [0.553015], 1e-6)
    close(torch.cat(rewards), [0.2, -0.2])  # the rewards do not know of it
    # its minimum is finite, where the model believes the labels as much as they deserve: sigmoid(margin) = 0.9
    margin = torch.tensor([math.log(9)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    losses, *_ = dpo_loss(margin, zero, zero, zero, beta=1.0, label_smoothing=0.1)
    close(torch.autograd.grad(losses.sum(), margin)[0], [0.0])


def test_ipo_by_hand():
    # h = (-10 + 12) - (-20 + 18) = 4: (4 - 1 / 0.2)^2 = 1 at beta 0.1, (4 - 1 / 4)^2 at beta 2
    logps = torch.tensor([[-10.0], [-20.0], [-12.0], [-18.0]], dtype=torch.float64)
    losses, *rewards = dpo_loss(*logps, beta=0.1, loss_type="ipo")
    close(losses, [1.0])
    close(torch.cat(rewards), [0.2, -0.2])
    close(dpo_loss(*logps, beta=2.0, loss_type="ipo")[0], [14.0625])


def test_ipo_by_loop():
    logps, beta = random_logps(10), 0.2
    losses, *_ = dpo_loss(*logps, beta, loss_type="ipo")
    expected = [
        ((chosen - chosen_reference) - (rejected - rejected_reference) - 1 / (2 * beta)) ** 2
        for chosen, rejected, chosen_reference, rejected_reference in zip(*(x.tolist() for x in logps), strict=True)
    ]
    close(losses, expected)


@pytest.mark.parametrize("loss_type, smoothing", [("ipo", 0.1), ("hinge", 0.0), ("", 0.0)])
def test_losses_that_do_not_exist_are_refused(loss_type, smoothing):
    with pytest.raises(ValueError, match=f"no loss {loss_type!r}"):
        dpo_loss(*random_logps(2), 0.1, smoothing, loss_type)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_reference_free_counts_the_reference_as_0_in_the_rewards_too(loss_type):
    chosen, rejected, *reference = random_logps(5)
    free = dpo_loss(chosen, rejected, *reference, 0.1, 0.0, loss_type, reference_free=True)
    zero = torch.zeros(5, dtype=torch.float64)
    for a, b in zip(free, dpo_loss(chosen, rejected, zero, zero, 0.1, 0.0, loss_type), strict=True):
        close(a, b)
    close(free[1], 0.1 * chosen)
    close(free[2], 0.1 * rejected)


# ---- the step ----


def settings_for(**knobs):
    knobs = dict(device="cpu", dtype="float32", beta=0.5, grad_clip=1e9) | knobs
    return train_dpo.Settings(data="", init="", out="", **knobs)


def logps_of(model, rows):
    """(N, 2), pair by pair, alone."""
    with torch.no_grad():
        return torch.cat([torch.stack(response_logps(model, preference_batch([row])), dim=-1) for row in rows])


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2, 3, 100])
def test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs(micro_batch_size):
    """However seven pairs are cut: 1 x 7, 7 x 1, 2 + 2 + 2 + 1, 3 + 3 + 1, against the mean written as a loop."""
    rows = random_rows(12)
    reference = logps_of(random_model(seed=1), rows)
    policy, indices, lr = random_model(), [7, 2, 0, 11, 5, 9, 4], 0.01
    before = [p.detach().clone() for p in policy.parameters()]
    total = 0.0
    for i in indices:
        chosen, rejected = response_logps(policy, preference_batch([rows[i]]))
        losses, *_ = dpo_loss(chosen, rejected, *reference[[i]].unbind(-1), beta=0.5)
        total = total + losses[0] / 7
    gradients = torch.autograd.grad(total, list(policy.parameters()))

    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    settings = settings_for(micro_batch_size=micro_batch_size)
    metrics = train_dpo.train_step(policy, optimizer, rows, reference, indices, settings)
    for weight, old, gradient in zip(policy.parameters(), before, gradients, strict=True):
        close(weight.detach(), old - lr * gradient, 1e-10)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-12)
    assert metrics["grad_norm"] == pytest.approx(sum(g.pow(2).sum() for g in gradients).sqrt().item(), rel=1e-9)
    assert all(p.grad is None for p in policy.parameters())  # nothing is left over for the next step


def test_grad_clip_is_of_the_whole_step():
    rows = random_rows(6)
    reference = logps_of(random_model(seed=1), rows)
    steps = []
    for micro_batch_size in (0, 1):
        policy = random_model()
        before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
        settings = settings_for(micro_batch_size=micro_batch_size, grad_clip=0.01)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        train_dpo.train_step(policy, optimizer, rows, reference, list(range(6)), settings)
        steps.append(torch.nn.utils.parameters_to_vector(policy.parameters()).detach() - before)
        assert steps[-1].norm().item() == pytest.approx(0.01, rel=1e-3)
    close(steps[0], steps[1], 1e-9)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 64])
def test_trap11_metrics_are_means_over_pairs(batch_size):
    """Nine pairs in batches of 4 end in a batch of one, which must not count as much as the others."""
    rows = random_rows(9)
    policy, reference = random_model(), logps_of(random_model(seed=1), rows)
    metrics = train_dpo.evaluate(policy, rows, reference, settings_for(batch_size=batch_size))
    logps = torch.cat((logps_of(policy, rows), reference), dim=1).tolist()
    chosen_rewards = [0.5 * (c - rc) for c, _, rc, _ in logps]
    rejected_rewards = [0.5 * (r - rr) for _, r, _, rr in logps]
    expected = {
        "loss": [loop_loss(*pair, beta=0.5) for pair in logps],
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": [c - r for c, r in zip(chosen_rewards, rejected_rewards, strict=True)],
        "rewards/accuracies": [float(c > r) for c, r in zip(chosen_rewards, rejected_rewards, strict=True)],
        "logps/chosen": [pair[0] for pair in logps],
        "logps/rejected": [pair[1] for pair in logps],
    }
    assert metrics == {f"eval/{name}": pytest.approx(sum(x) / 9, rel=1e-9) for name, x in expected.items()}
    assert 0 < metrics["eval/rewards/accuracies"] < 1


def test_trap11_ties_are_one_half():
    """Where policy and reference agree on a pair, both rewards are 0: half a win. Two such pairs, one won, one lost."""
    rows = [([0, i], [i, 0], [i + 1, i + 2, 0]) for i in (1, 2, 3, 4)]
    policy = random_model()
    with torch.no_grad():
        reference = torch.stack(response_logps(policy, preference_batch(rows)), dim=-1)
    assert train_dpo.evaluate(policy, rows, reference, settings_for())["eval/rewards/accuracies"] == 0.5
    reference[0, 1] += 1.0  # the policy finds this rejected response less likely than the reference: won
    assert train_dpo.evaluate(policy, rows, reference, settings_for())["eval/rewards/accuracies"] == 0.625
    reference[1, 0] += 1.0  # and this chosen one: lost
    assert train_dpo.evaluate(policy, rows, reference, settings_for())["eval/rewards/accuracies"] == 0.5


def test_policy_equal_to_the_reference_starts_at_ln_2(capsys):
    rows, policy = random_rows(6), random_model()
    reference = train_dpo.reference_logps(policy, rows, settings_for(batch_size=4))
    close(reference, logps_of(policy, rows))  # in the order of the rows, whatever order they were computed in
    train_dpo.check_start(policy, rows, reference, [4, 1, 2], settings_for())
    assert "loss 0.693147 (ln 2 = 0.693147)" in capsys.readouterr().out
    train_dpo.check_start(policy, rows, reference, [4, 1, 2], settings_for(loss_type="ipo", beta=0.25))
    assert "loss 4.000000" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, fixed, relative", [("float32", 1e-4, 1e-6), ("bfloat16", 0.0, 1e-3)])
@pytest.mark.parametrize("side", [0, 1])
def test_trap08_start_is_refused_just_above_the_bound_and_passes_just_below(dtype, fixed, relative, side):
    """The bound is fixed + relative |logp|, per response. The model is float64: nothing is rounded."""
    rows, policy = random_rows(6), random_model()
    logps = logps_of(policy, rows)
    for sign in (1, -1):
        reference = logps.clone()
        allowed = fixed + relative * logps[1, side].abs()
        reference[1, side] = logps[1, side] + sign * 0.9 * allowed
        train_dpo.check_start(policy, rows, reference, [4, 1, 2], settings_for(dtype=dtype))
        reference[1, side] = logps[1, side] + sign * 1.1 * allowed
        with pytest.raises(UserError, match="it must be 0"):
            train_dpo.check_start(policy, rows, reference, [4, 1, 2], settings_for(dtype=dtype))
        train_dpo.check_start(policy, rows, reference, [4, 2], settings_for(dtype=dtype))  # the pair is not asked for
