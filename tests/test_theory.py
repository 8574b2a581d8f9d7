"""The mathematics of the DPO paper, statement by statement, on a language small enough to enumerate.

Read it beside Rafailov et al. 2023 (arXiv 2305.18290). Each test opens with the statement it checks, in the paper's
numbering, and checks it by summing over every response there is, in float64. What train_dpo.py and
experiments/evaluate.py compute is taken from them (`every_logp`, `every_kl`, `implicit_reward` and `population_loss`
below only call them); what the paper says of it is written out here a second time, from the paper.

The language: symbols 0, 1, 2 and the end-of-text 3; X = 3 prompts; responses of up to 4 tokens, which end in 3 or at
the limit, Y = 121 in all. A distribution over them is a tensor of log-probabilities (X, Y), a reward a tensor (X, Y).
`Table` is a language model that can be any of these distributions.

Unless a test says otherwise its tolerance is 1e-12: float64 rounds by 1e-16, the numbers are of size 10 and sums of
hundreds of them, which leaves a factor of ten or more; a wrong sign, factor or term is off by far more than that.
"""

import itertools
import math

import pytest
import tiny  # noqa: F401, one torch thread
import torch
from torch import nn

from experiments.evaluate import sequence_kl
from minidpo.dataset import preference_batch
from minidpo.model import GPT, GPTConfig
from train_dpo import dpo_loss, response_logps

EOT, SYMBOLS, LONGEST = 3, 4, 4
PROMPTS = [[EOT, x] for x in range(3)]
ENDED = [[*y, EOT] for n in range(LONGEST) for y in itertools.product(range(EOT), repeat=n)]
RESPONSES = ENDED + [list(y) for y in itertools.product(range(EOT), repeat=LONGEST)]
X, Y = len(PROMPTS), len(RESPONSES)
EVERY = preference_batch([(x, y, y) for x in PROMPTS for y in RESPONSES])
PAIRS = list(itertools.permutations(range(Y), 2))  # every two responses, both ways round
FIRST, SECOND = torch.tensor(PAIRS).T


class Table(nn.Module):
    """A language model with a row of logits of its own for every history: it can be any distribution there is.

    A history is read as a number to the base 4 (its first digit, eot, is not 0); `wte` holds that number's row.
    """

    def __init__(self, rows):
        super().__init__()
        self.wte = nn.Embedding.from_pretrained(rows.clone(), freeze=False)

    def forward(self, ids):  # (B, T) -> (B, T, SYMBOLS)
        histories = [ids[:, 0]]
        for t in range(1, ids.shape[1]):
            histories.append(SYMBOLS * histories[-1] + ids[:, t])
        return self.wte(torch.stack(histories, dim=1))

    @classmethod
    def random(cls, seed):
        return cls(normal(SYMBOLS ** (1 + LONGEST), SYMBOLS, seed=seed))

    @classmethod
    def of(cls, logps):
        """The model of the given log-probabilities (X, Y): after each history, how much probability goes on with s."""
        mass = torch.zeros(SYMBOLS ** (1 + LONGEST), SYMBOLS, dtype=torch.float64)
        for (x, y), p in zip(itertools.product(PROMPTS, RESPONSES), logps.exp().flatten(), strict=True):
            history = SYMBOLS * x[0] + x[1]
            for token in y:
                mass[history, token] += p
                history = SYMBOLS * history + token
        return cls(torch.where(mass > 0, mass, 1.0).log())  # histories that never come: any row will do


def tiny_gpt(seed):
    """A GPT, far from uniform."""
    model = GPT(GPTConfig(vocab_size=SYMBOLS, block_size=1 + LONGEST, n_layer=1, n_head=2, n_embd=8)).double()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5, generator=generator)
    return model


def every_logp(model):
    """log pi(y|x) of every response -> (X, Y), by our `response_logps`, with gradient."""
    return response_logps(model, EVERY)[0].view(X, Y)


@torch.no_grad()
def chain_rule(model):
    """What `every_logp` must be, one response at a time: the sum over its tokens of log pi(y_t | x, y_<t)."""
    logps = []
    for x, y in itertools.product(PROMPTS, RESPONSES):
        rows = model(torch.tensor([x + y[:-1]]))[0, len(x) - 1 :].log_softmax(-1)
        logps.append(rows[range(len(y)), y].sum())
    return torch.stack(logps).view(X, Y)


@torch.no_grad()
def every_kl(policy, reference):
    """Both estimators of our `sequence_kl` on every response -> plain (X, Y), exact (X, Y)."""
    prompts, samples = zip(*itertools.product(PROMPTS, RESPONSES), strict=True)
    return [values.view(X, Y) for values in sequence_kl(policy, reference, prompts, samples)]


def implicit_reward(logps, reference, beta):
    """beta log pi/pi_ref of all of (..., Y), as our `dpo_loss` reports it."""
    return dpo_loss(logps, logps, reference, reference, beta)[1]


def population_loss(logps, reference, preferred, beta, pairs=(FIRST, SECOND), **knobs):
    """Our `dpo_loss` of each of `pairs`, weighted by the probability `preferred` (X, Y, Y) of that choice -> (...,).

    The mean over prompts and pairs; `pairs` holds each pair in both orders, which explains the factor 2.
    """
    w, l = pairs
    losses, *_ = dpo_loss(logps[..., w], logps[..., l], reference[..., w], reference[..., l], beta, **knobs)
    return 2 * (preferred[:, w, l] * losses).mean(dim=(-2, -1))


def bradley_terry(reward):
    """Eq. 1: how likely it is that the first is preferred to the second; (..., Y) -> (..., Y, Y)."""
    e = reward.exp()
    return e[..., :, None] / (e[..., :, None] + e[..., None, :])


def plackett_luce(rewards):
    """A.3: log-probability of a ranking, given the rewards (..., K) in its order, the best first -> (...).

    The k-th is chosen among those that are left, k and after.
    """
    return sum(rewards[..., k] - rewards[..., k:].logsumexp(-1) for k in range(rewards.shape[-1]))


def optimum(reference, reward, beta):
    """Eq. 4: log pi* (..., Y) and log Z (..., 1)."""
    unnormalised = reference + reward / beta
    log_Z = unnormalised.logsumexp(-1, keepdim=True)
    return unnormalised - log_Z, log_Z


def objective(logps, reference, reward, beta):
    """Eq. 3, prompt by prompt: E[r] - beta KL(pi || pi_ref); (..., Y) -> (...)."""
    p = logps.exp()
    return (p * reward).sum(-1) - beta * (p * (logps - reference)).sum(-1)


def kl(a, b):
    """KL(a || b) of log-probabilities (..., Y) -> (...)."""
    return (a.exp() * (a - b)).sum(-1)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def others(logps, n=4000, seed=9):
    """n distributions (n, X, Y) around `logps`, each a random direction away, by 0.001 to 3 nats a response."""
    size = torch.logspace(-3, math.log10(3), n, dtype=torch.float64)[:, None, None]
    return (logps + size * normal(n, X, Y, seed=seed)).log_softmax(-1)


def trained(reference, preferred, beta, pairs=(FIRST, SECOND), **knobs):
    """log pi (X, Y) of a model that starts as REFERENCE and is trained to the end on `population_loss`.

    The end is where float64 sees the loss L fall no more, in its 16th digit: that fixes a log-ratio whose second
    derivative in L is c to sqrt(1e-16 L / c) nats, the reason of the tolerances below.
    """
    model = Table.of(REFERENCE)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-11, tolerance_change=0,
    )  # fmt: skip

    def loss():
        optimizer.zero_grad()
        value = population_loss(every_logp(model), reference, preferred, beta, pairs, **knobs)
        value.backward()
        return value

    optimizer.step(loss)
    return chain_rule(model)  # what it is, whatever the loss took it for


def close(a, b, tolerance=1e-12):
    b = torch.as_tensor(b, dtype=torch.float64).expand_as(a)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


REFERENCE = chain_rule(Table.random(seed=0))  # (X, Y)
REWARD = normal(X, Y, seed=1)
BETAS = pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])


# ---- Section 3: what a language model is, and what people's choices say ----


@torch.no_grad()
@pytest.mark.parametrize("model", [Table.random(seed=3), tiny_gpt(seed=3)], ids=["table", "gpt"])
def test_chain_rule(model):
    """pi(y|x) = prod_t pi(y_t | x, y_<t) is a distribution over responses: it sums to 1 for every prompt.

    So log pi(y|x) is the SUM over the tokens, the final end-of-text among them: `response_logps` against a loop, for
    every response. Averages over the tokens are no log-probabilities: they sum to more than 2. And every distribution
    over responses is a language model's (`Table.of`).
    """
    logps = every_logp(model)
    close(logps, chain_rule(model))
    close(logps.exp().sum(-1), 1.0)
    close(every_logp(Table.of(logps)), logps)
    lengths = torch.tensor([len(y) for y in RESPONSES])
    assert ((logps / lengths).exp().sum(-1) > 2).all()


def test_eq1_eq2_reward_loss_is_the_likelihood_of_bradley_terry():
    """Eq. 1: p(y_w over y_l | x) = exp r(x, y_w) / (exp r(x, y_w) + exp r(x, y_l)).
    Eq. 2: a reward is fitted by -E[log sigmoid(r(x, y_w) - r(x, y_l))], the negative log-likelihood of the choices.

    With beta 1 and a reference of 0 our loss is Eq. 2 of the numbers it is given. The likelihood is a product of
    probabilities, each as Eq. 1 writes it, over 200 choices drawn from them.
    """
    draw = torch.Generator().manual_seed(0)
    x, a, b = (torch.randint(n, (200,), generator=draw) for n in (X, Y, Y))
    p = bradley_terry(REWARD)[x, a, b]
    a_wins = torch.rand(200, generator=draw, dtype=torch.float64) < p
    w, l = torch.where(a_wins, a, b), torch.where(a_wins, b, a)
    losses, *_ = dpo_loss(REWARD[x, w], REWARD[x, l], torch.zeros(200), torch.zeros(200), beta=1.0)
    close(-losses.sum(), torch.where(a_wins, p, 1 - p).prod().log())


@BETAS
def test_eq3_eq4_optimum_of_the_kl_regularised_objective(beta):
    """Eq. 3: max_pi E[r(x, y)] - beta KL(pi(y|x) || pi_ref(y|x)).
    Eq. 4: it is reached by pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x), and nowhere else.

    4,000 other policies all do worse, by exactly beta KL(pi || pi*) (A.1); at pi* the gradient is 0. The value reached
    is beta log Z(x): here the KL is the one that our `sequence_kl` measures.
    """
    best, log_Z = optimum(REFERENCE, REWARD, beta)
    value = objective(best, REFERENCE, REWARD, beta)
    for estimate in every_kl(Table.of(best), Table.of(REFERENCE)):
        close((best.exp() * (REWARD - beta * estimate)).sum(-1), beta * log_Z[:, 0])

    policies = others(best)
    shortfall = value - objective(policies, REFERENCE, REWARD, beta)
    assert (shortfall > 0).all()
    close(shortfall, beta * kl(policies, best))

    def gradient(logps):
        logits = logps.clone().requires_grad_()
        total = objective(logits.log_softmax(-1), REFERENCE, REWARD, beta).sum()
        return torch.autograd.grad(total, logits)[0].abs().max().item()

    assert gradient(best) < 1e-14  # rounding of terms of size 1 times probabilities of size 0.01
    assert gradient(REFERENCE) > 1e-3


# ---- Section 4: from the reward to the policy ----


@BETAS
def test_eq5_reward_in_terms_of_its_optimal_policy(beta):
    """Eq. 5: r(x, y) = beta log(pi*(y|x) / pi_ref(y|x)) + beta log Z(x).

    The first term is the implicit reward that our loss reports.
    """
    best, log_Z = optimum(REFERENCE, REWARD, beta)
    close(implicit_reward(best, REFERENCE, beta) + beta * log_Z, REWARD)
    assert (beta * log_Z.abs() > 0.01).all()  # without the second term it is another number


@BETAS
def test_eq6_partition_function_cancels(beta):
    """Eq. 6: p*(y_1 over y_2 | x) = sigmoid of the difference of beta log pi*/pi_ref: Z(x) is not in it.

    Of every pair of responses, against Eq. 1 on the true rewards. exp(-loss) is the probability our loss gives to a
    choice; Z(x) differs from prompt to prompt.
    """
    best, log_Z = optimum(REFERENCE, REWARD, beta)
    losses, *_ = dpo_loss(best[:, FIRST], best[:, SECOND], REFERENCE[:, FIRST], REFERENCE[:, SECOND], beta)
    close((-losses).exp(), bradley_terry(REWARD)[:, FIRST, SECOND])
    assert (log_Z.diff(dim=0).abs() > 1e-3).all()


@BETAS
def test_eq7_dpo_loss_is_the_likelihood_of_the_choices(beta):
    """Eq. 7: L(pi) = -E[log sigmoid(beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x))]: Eq. 2 with the reward of
    Eq. 5 in it, so that maximum likelihood finds the policy that is optimal for the true reward.

    If choices follow Bradley-Terry, 4,000 policies around pi* all have a higher loss than pi*, by exactly the mean KL
    between the true probability of each choice and the policy's.
    """
    best, _ = optimum(REFERENCE, REWARD, beta)
    preferred = bradley_terry(REWARD)
    pairs = torch.randperm(Y, generator=torch.Generator().manual_seed(0))[:60].view(2, 30)
    pairs = torch.cat((pairs, pairs.flip(0)), dim=1)  # 30 pairs, both ways round
    lowest = population_loss(best, REFERENCE, preferred, beta, pairs)
    policies = others(best)
    excess = population_loss(policies, REFERENCE, preferred, beta, pairs) - lowest
    assert (excess > 0).all()

    w, l = pairs
    p = preferred[:, w, l]
    r = implicit_reward(policies, REFERENCE, beta)
    q = r[..., w].exp() / (r[..., w].exp() + r[..., l].exp())  # Eq. 1, with the policy's own reward
    close(excess, 2 * (p * (p / q).log()).mean(dim=(-2, -1)))
    # Eq. 2 of the true reward is the same number: whether a policy or a reward is inside makes no difference
    close(lowest, population_loss(REWARD, 0 * REWARD, preferred, 1.0, pairs))


@pytest.mark.parametrize("model", [Table.random(seed=4), tiny_gpt(seed=4)], ids=["table", "gpt"])
def test_a4_gradient_is_weighted_by_how_wrong_the_implicit_reward_is(model):
    """The gradient after Eq. 7, derived in A.4, with r(x, y) = beta log pi(y|x)/pi_ref(y|x):

        grad L = -beta E[ sigmoid(r(x, y_l) - r(x, y_w)) ( grad log pi(y_w|x) - grad log pi(y_l|x) ) ]

    Over all the weights of the model and 12 pairs: autograd through the loss, against the gradients of the log-
    probabilities alone, each response by itself, put together by hand. At the start, pi = pi_ref, every weight is 1/2.
    """
    beta, draw = 0.5, torch.Generator().manual_seed(0)
    x, w, l = (torch.randint(n, (12,), generator=draw).tolist() for n in (X, Y, Y))
    rows = [(PROMPTS[i], RESPONSES[j], RESPONSES[k]) for i, j, k in zip(x, w, l, strict=True)]
    weights = list(model.parameters())
    with torch.no_grad():
        start = every_logp(model)
    for reference in (REFERENCE, start):
        losses, *_ = dpo_loss(*response_logps(model, preference_batch(rows)), reference[x, w], reference[x, l], beta)
        gradients = torch.autograd.grad(losses.mean(), weights)

        expected, errors = [torch.zeros_like(weight) for weight in weights], []
        for i, row in enumerate(rows):
            chosen, rejected = response_logps(model, preference_batch([row]))
            r_w = beta * (chosen.item() - reference[x[i], w[i]].item())
            r_l = beta * (rejected.item() - reference[x[i], l[i]].item())
            errors.append(1 / (1 + math.exp(r_w - r_l)))  # sigmoid(r_l - r_w)
            up = torch.autograd.grad(chosen.sum(), weights)
            down = torch.autograd.grad(rejected.sum(), weights)
            for total, a, b in zip(expected, up, down, strict=True):
                total -= beta * errors[-1] * (a - b) / len(rows)
        for gradient, total in zip(gradients, expected, strict=True):
            close(gradient, total)
        assert max(g.abs().max() for g in gradients) > 1e-3
    assert errors == pytest.approx([0.5] * 12, abs=1e-12)  # of the second reference, the start


# ---- Section 5: which rewards a policy can stand for ----


def test_lemma1_rewards_that_differ_by_f_of_x_give_the_same_preferences():
    """Lemma 1: r(x, y) and r(x, y) + f(x) give the same Plackett-Luce, and so Bradley-Terry, preferences (proof: A.5).

    4,000 random f, between rankings of 5 responses and between pairs under our loss. Conversely 4,000 random changes
    that do depend on y: each of them changes some preference.
    """
    ranking = torch.randperm(Y, generator=torch.Generator().manual_seed(0))[:5]
    w, l = FIRST[::100], SECOND[::100]

    def preferences(reward):
        pairs, *_ = dpo_loss(reward[..., w], reward[..., l], torch.zeros(len(w)), torch.zeros(len(l)), beta=1.0)
        return torch.cat((-pairs, plackett_luce(reward[..., ranking])[..., None]), dim=-1)  # log-probabilities

    of_x, of_y = 10 * normal(4000, X, 1, seed=2), normal(4000, X, Y, seed=3)
    close(preferences(REWARD + of_x), preferences(REWARD))
    changes = (preferences(REWARD + of_y) - preferences(REWARD)).abs()
    assert (changes.amax(dim=-1) > 0.1).all()
    assert (changes[..., -1] > 0).all()  # every ranking's probability as well


@BETAS
def test_lemma2_rewards_that_differ_by_f_of_x_have_the_same_optimal_policy(beta):
    """Lemma 2: r(x, y) and r(x, y) + f(x) have the same optimal policy under Eq. 3 (proof: A.5).

    4,000 random f, none of them small. Conversely 4,000 random changes that do depend on y: another policy each.
    """
    best, log_Z = optimum(REFERENCE, REWARD, beta)
    f = 10 * normal(4000, X, 1, seed=2)
    same, its_log_Z = optimum(REFERENCE, REWARD + f, beta)
    # log pi* is the difference of numbers of size f / beta, here up to 40 / beta = 400: rounding 1e-13 each
    close(same, best, 1e-12 if beta > 0.1 else 1e-11)
    close(beta * its_log_Z, beta * log_Z + f)  # f has gone into Z
    different, _ = optimum(REFERENCE, REWARD + normal(4000, X, Y, seed=3), beta)
    assert ((different - best).abs().amax(dim=-1) > 0.1).all()


@BETAS
def test_theorem1_each_class_holds_exactly_one_reward_of_our_form(beta):
    """Theorem 1: every class of rewards that differ by f(x) holds exactly one of the form
    r(x, y) = beta log pi(y|x)/pi_ref(y|x), for one pi (proof and uniqueness: A.6).

    Eq. 8 finds it: f(r)(x, y) = r(x, y) - beta log sum_y pi_ref(y|x) exp(r(x, y) / beta). Of 4,000 random rewards it is
    the implicit reward of their optimal policy, as our loss reports it. Eq. 9 is how to tell it: sum_y pi_ref(y|x)
    exp(r(x, y) / beta) = 1. Every policy's implicit reward passes, and no other member of its class.
    """

    def eq_9(reward):
        return (REFERENCE.exp() * (reward / beta).exp()).sum(-1, keepdim=True)

    rewards = normal(4000, X, Y, seed=4)
    projected = rewards - beta * eq_9(rewards).log()  # Eq. 8
    policies, _ = optimum(REFERENCE, rewards, beta)
    close(implicit_reward(policies, REFERENCE, beta), projected)
    close(projected - rewards, (projected - rewards)[..., :1])  # a function of x alone: the same class

    # only one: of anybody's implicit reward the sum of Eq. 9 is 1, moved by f(x) it is exp(f(x) / beta)
    anybody = implicit_reward(others(REFERENCE), REFERENCE, beta)
    close(eq_9(anybody), 1.0)
    f = normal(4000, X, 1, seed=5)
    close(eq_9(anybody + f) / (f / beta).exp(), 1.0)
    close(anybody + f - beta * eq_9(anybody + f).log(), anybody)  # Eq. 8 brings every member back to the same one
    assert ((eq_9(anybody + f) - 1).abs() > 1e-6).all()


# ---- A.3: rankings ----


@BETAS
def test_a3_plackett_luce_reduces_to_eq7_for_two_responses(beta):
    """A.3: the DPO loss of a ranking is -log prod_k exp r_k / sum_{j >= k} exp r_j (Eq. 18), with r_k the implicit
    reward of the k-th best response; for two responses it is Eq. 7.

    Two responses: against our loss, for every pair. Four: the 24 rankings have probabilities that sum to 1, Z(x)
    cancels, and whatever else is ranked, the share with y_1 before y_2 is the probability our loss gives to that pair.
    """
    policy, _ = optimum(REFERENCE, REWARD, beta)
    r = implicit_reward(policy, REFERENCE, beta)
    losses, *_ = dpo_loss(policy[:, FIRST], policy[:, SECOND], REFERENCE[:, FIRST], REFERENCE[:, SECOND], beta)
    close(-plackett_luce(torch.stack((r[:, FIRST], r[:, SECOND]), dim=-1)), losses)

    four = [3, 0, 77, 120]
    rankings = list(itertools.permutations(four))
    p = torch.stack([plackett_luce(r[:, ranking]) for ranking in rankings], dim=-1).exp()  # (X, 24)
    close(p.sum(-1), 1.0)
    close(p, torch.stack([plackett_luce(REWARD[:, ranking]) for ranking in rankings], dim=-1).exp())
    for w, l in itertools.permutations(four, 2):
        before = torch.tensor([ranking.index(w) < ranking.index(l) for ranking in rankings])
        (loss,) = losses[:, (FIRST == w) & (SECOND == l)].T
        close((p * before).sum(-1), (-loss).exp())


# ---- What the loss is minimised by ----


@BETAS
def test_eq7_trained_to_the_end_is_eq4(beta):
    """Sections 4 and 5: with enough data and a model that can be anything, minimising Eq. 7 gives pi* of Eq. 4.

    A model is trained, from the reference on, on every pair of responses, weighted as Bradley-Terry chooses. No reward
    is shown to it and nothing is sampled; pi* comes out, KL below 1e-6 either way round.
    """
    best, _ = optimum(REFERENCE, REWARD, beta)
    assert kl(best, REFERENCE).min() > 0.05  # there is some way to go
    policy = trained(REFERENCE, bradley_terry(REWARD), beta)
    # a response has a small part in a mean over 43,560 choices, so c is small: log pi comes out right to 3e-5 nats
    # (measured, at beta 0.1), and the KL, of the order of its square, to 1e-9
    assert kl(policy, best).max() < 1e-8 and kl(best, policy).max() < 1e-8


def test_policy_minus_reference_is_the_sign_that_matters():
    """Eq. 7 holds the policy's log-ratio MINUS the reference's; retellings of it have a plus there, or no reference.

    All three losses train as smoothly. Only the minus ends in the best trade of reward against distance, Eq. 4. With a
    plus the model is pushed to what the reference finds unlikely, pi ~ exp(r / beta) / pi_ref, and ends worse than if
    it had stayed where it was; without a reference in exp(r / beta), whatever the language.
    """
    beta, preferred = 1.0, bradley_terry(REWARD)
    minus = trained(REFERENCE, preferred, beta)
    plus = trained(-REFERENCE, preferred, beta)
    none = trained(REFERENCE, preferred, beta, reference_free=True)
    for policy, where in ((minus, REFERENCE), (plus, -REFERENCE), (none, 0 * REFERENCE)):
        assert kl(policy, optimum(where, REWARD, beta)[0]).max() < 1e-8  # as in the test above
    minus, plus, none, stay = (objective(policy, REFERENCE, REWARD, beta) for policy in (minus, plus, none, REFERENCE))
    assert (minus > stay + 0.1).all() and (minus > none + 0.1).all() and (stay > plus + 0.1).all()


SHORT, LONG = RESPONSES.index([EOT]), RESPONSES.index([2, 0, 1, 0])  # responses of 1 and of 4 tokens


def trained_log_ratio(p, beta, **knobs):
    """log pi/pi_ref of SHORT minus that of LONG, (X,), after training on them, SHORT preferred with probability p."""
    preferred = torch.zeros(X, Y, Y, dtype=torch.float64)
    preferred[:, SHORT, LONG], preferred[:, LONG, SHORT] = p, 1 - p
    pair = torch.tensor([SHORT, LONG]), torch.tensor([LONG, SHORT])
    ratio = trained(REFERENCE, preferred, beta, pair, **knobs) - REFERENCE
    return ratio[:, SHORT] - ratio[:, LONG]


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
def test_two_responses_dpo_stops_at_the_log_odds(p):
    """Eq. 6 for two responses: the minimiser of Eq. 7 has sigmoid(beta h) = p, that is h = log(p / (1 - p)) / beta."""
    for beta in (0.1, 1.0):
        h = trained_log_ratio(p, beta)
        close(h, math.log(p / (1 - p)) / beta, 1e-6)  # c = beta^2 p (1 - p) / X > 5e-4: right to 4e-7


@pytest.mark.parametrize("e", [0.01, 0.1, 0.3])
def test_conservative_dpo_has_a_finite_optimum(e):
    """Conservative DPO (Mitchell 2023): where labels are flipped with probability e, -(1 - e) log sigmoid(m) -
    e log sigmoid(-m) is least at the margin m = log((1 - e) / e), even if every label is the same way round.

    It is the loss of Eq. 7 on labels that really are flipped so often. Eq. 7 on labels never flipped has no optimum:
    the loss falls as long as the margin grows.
    """
    for beta in (0.1, 1.0):
        margin = beta * trained_log_ratio(1.0, beta, label_smoothing=e)
        close(margin, math.log((1 - e) / e), 1e-6)  # c = e (1 - e) / X > 0.003 in the margin: right to 1e-7

    preferred = bradley_terry(REWARD)
    flipped = (1 - e) * preferred + e * preferred.transpose(1, 2)
    policies = others(REFERENCE, n=20)
    smoothed = population_loss(policies, REFERENCE, preferred, 0.5, label_smoothing=e)
    close(smoothed, population_loss(policies, REFERENCE, flipped, 0.5))

    margins = torch.linspace(0, 700, 701, dtype=torch.float64)  # beyond it, float64 has no smaller number than the loss
    zero = torch.zeros_like(margins)
    certain, *_ = dpo_loss(margins, zero, zero, zero, beta=1.0)
    assert (certain.diff() < 0).all() and certain[-1] > 0
    believed, *_ = dpo_loss(margins, zero, zero, zero, beta=1.0, label_smoothing=e)
    assert believed.argmin() == round(math.log((1 - e) / e))


@pytest.mark.parametrize("p", [0.3, 0.8, 1.0])
def test_ipo_stops_at_a_log_ratio_in_proportion_to_the_preference(p):
    """IPO (Azar et al. 2023, Eq. 17): E[(h - 1 / (2 beta))^2], h the log-ratio of chosen against rejected, is least at
    h = (2p - 1) / (2 beta) for two responses of which one is preferred with probability p.

    Finite even for p = 1, where DPO's is not. h is of the probabilities of whole responses, so log-probabilities are
    summed over the tokens, as in the paper; TRL divides each by its number of tokens instead. Here one response has 1
    token and the other 4, so that a loss on averages ends elsewhere.
    """
    for beta in (0.1, 1.0):
        h = trained_log_ratio(p, beta, loss_type="ipo")
        close(h, (2 * p - 1) / (2 * beta), 1e-7)  # a parabola, c = 2 / X, on top of a loss of 20: right to 6e-8


# ---- How far the policy went: the two estimators of the KL in experiments/evaluate.py ----


def mean_and_variance(values, logps):
    """Under the policy `logps`, by enumeration; (X, Y) -> (X,), (X,)."""
    p = logps.exp()
    mean = (p * values).sum(-1)
    return mean, (p * (values - mean[:, None]) ** 2).sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("policy", [Table.random(seed=5), tiny_gpt(seed=5)], ids=["table", "gpt"])
@pytest.mark.parametrize("reference", [Table.random(seed=6), tiny_gpt(seed=6)], ids=["table", "gpt"])
def test_both_kl_estimators_are_unbiased(policy, reference):
    """KL(pi || pi_ref) is the mean over y ~ pi of log pi/pi_ref(y|x), and also, by the chain rule of the KL, of
    sum_t KL(pi(.|x, y_<t) || pi_ref(.|x, y_<t)): a sample of either is right on average.

    The first is log pi/pi_ref of the sample itself, and may be negative; the second never is.
    """
    logps, reference_logps = every_logp(policy), every_logp(reference)
    plain, exact = every_kl(policy, reference)
    true = kl(logps, reference_logps)
    assert (true > 0.1).all()
    close(mean_and_variance(plain, logps)[0], true)
    close(mean_and_variance(exact, logps)[0], true)
    close(plain, logps - reference_logps)
    assert (exact >= 0).all() and (plain < 0).any()


@torch.no_grad()
def test_near_the_reference_the_exact_sum_has_the_smaller_variance():
    """Where pi is eps from pi_ref, the KL is of order eps^2. The variance of log pi/pi_ref is of order eps^2 too, twice
    the KL: one sample's error is larger than what is measured. That of the sum of exact KLs is of order eps^4.
    """
    reference, direction = Table.random(seed=0), normal(SYMBOLS ** (1 + LONGEST), SYMBOLS, seed=7)
    variances = []
    for eps in (0.02, 0.01):
        policy = Table(reference.wte.weight + eps * direction)
        logps = every_logp(policy)
        (mean, plain), (_, exact) = (mean_and_variance(values, logps) for values in every_kl(policy, reference))
        assert (exact < eps**2 * plain).all()
        close(plain / mean, 2.0, eps)  # up to the next order
        variances.append((plain, exact))
    (plain, exact), (plain_of_half, exact_of_half) = variances
    close(plain / plain_of_half, 4.0, 0.02)  # eps^2: of half the distance, a quarter; up to the next order, eps
    close(exact / exact_of_half, 16.0, 0.02)  # eps^4


@torch.no_grad()
def test_under_a_saturated_reward_the_plain_estimator_can_have_the_smaller_variance():
    """At the optimum (Eq. 4) log pi*/pi_ref = r / beta - log Z: where the reward has only two values and the policy
    nearly always earns the higher one, log pi/pi_ref is nearly the same number for every sample. The sum of exact KLs
    is not: it depends on where in the response the reward was decided.

    The reward: 1 for a response with a 2 in it, else 0.
    """
    beta = 0.05
    reward = torch.tensor([float(2 in y) for y in RESPONSES], dtype=torch.float64).expand(X, Y)
    best, log_Z = optimum(REFERENCE, reward, beta)
    assert ((best.exp() * reward).sum(-1) > 1 - 1e-6).all() and (kl(best, REFERENCE) > 0.2).all()
    plain, exact = every_kl(Table.of(best), Table.of(REFERENCE))
    close(plain, reward / beta - log_Z)
    (_, plain_variance), (_, exact_variance) = (mean_and_variance(values, best) for values in (plain, exact))
    # p (1 - p) / beta^2, with p = 1 - 1e-9 the share of the higher reward, against the scatter of where it was decided
    assert (exact_variance > 1e4 * plain_variance).all() and (exact_variance > 0.01).all()
