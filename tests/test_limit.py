"""The limit against sums over every response there is, on the language of tests/test_theory.py."""

import copy
import csv
import math

import pytest
import tiny
import torch
from test_theory import EOT, PROMPTS, RESPONSES, X, Y, chain_rule, every_logp, tiny_gpt

import train_sft
from experiments import common
from experiments.frontier import limit
from experiments.rewards import SentimentClassifier
from minidpo.settings import UserError

BETAS = [math.inf, 3.0, 1.0, 0.5, 0.25]
TEMPERATURES = [1.0, 1.5, 1.2]  # of the reference and two proposals


class Symbols:
    """The language's tokenizer: a symbol is a digit."""

    eot = EOT

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(map(str, ids))


def table(seed=0):
    """A reward for every prompt and response, (X, Y), SD 1."""
    return torch.randn(X, Y, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact(model, rewards, beta):
    """pi_beta by enumeration, in plain Python: mean KL and mean reward over the prompts."""
    kls, means = [], []
    for logps, row in zip(every_logp(model).tolist(), rewards.tolist(), strict=True):
        tilted = [math.exp(logp + r / beta) for logp, r in zip(logps, row, strict=True)]
        pi = [w / sum(tilted) for w in tilted]
        means.append(sum(p * r for p, r in zip(pi, row, strict=True)))
        kls.append(sum(p * (math.log(p) - logp) for p, logp in zip(pi, logps, strict=True)))
    return sum(kls) / X, sum(means) / X


@pytest.fixture(scope="module")
def models():
    """A reference, and two other models to propose with."""
    with torch.no_grad():
        return [tiny_gpt(seed) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def every(models):
    """log pi of all responses under each of the models, (K, X, Y)."""
    return torch.stack([every_logp(model).detach() for model in models])


def drawn(models, rewards, counts, seed=0):
    """Draws by `limit.draw`: from the reference and two proposals."""
    sources = list(zip(models, TEMPERATURES, strict=True))
    scores = {
        (x[1], Symbols().decode(y)): rewards[i, j] for i, x in enumerate(PROMPTS) for j, y in enumerate(RESPONSES)
    }
    prompts = [str(x[1]) for x in PROMPTS]
    reward = lambda prompts, texts: [scores[int(x), y].item() for x, y in zip(prompts, texts, strict=True)]  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    return limit.draw(sources, prompts, Symbols(), reward, counts, 4, generator)


def picked(logps, rewards, counts, generator):
    """The same from the enumerated distributions (K, X, Y), without a sampler: much faster."""
    picks = [logps[k].exp().multinomial(n, True, generator=generator) for k, n in enumerate(counts)]
    picks = torch.cat(picks, dim=-1)  # (X, S)
    return rewards.gather(-1, picks), logps.gather(-1, picks.expand(len(logps), -1, -1))


# ---- the draws ----


def test_draws_and_their_log_probabilities_are_of_the_same_temperature(models):
    """Every draw against enumeration; a response's number for a reward says which it is."""
    counts = [2000, 2000, 2000]
    rewards, logps = drawn(models, torch.arange(Y, dtype=torch.float64).expand(X, Y), counts)
    picks = rewards.long()
    for k, (model, temperature) in enumerate(zip(models, TEMPERATURES, strict=True)):
        exact = chain_rule(lambda ids, model=model, t=temperature: model(ids) / t)  # (X, Y)
        assert torch.allclose(logps[k], exact.gather(-1, picks), rtol=0, atol=1e-12)
        own = picks[:, sum(counts[:k]) : sum(counts[: k + 1])]
        drawn_often = torch.stack([row.bincount(minlength=Y) for row in own])
        expected = counts[k] * exact.exp()
        assert ((drawn_often - expected).abs() < 5 * (expected + 1).sqrt()).all()


def test_a_proposal_equal_to_the_reference_has_its_log_probabilities_in_bf16(models):
    """At one temperature, to the last bit: what the weights subtract comes from one path."""
    responses = RESPONSES[:50]
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (
            limit.sequence_logps((model, 1.0), [PROMPTS[0]] * len(responses), responses)
            for model in (models[0].float(), copy.deepcopy(models[0]).float())
        )
    models[0].double()
    assert torch.equal(one, other) and len(one.unique()) > 25


# ---- the estimator ----


def test_curve_agrees_with_enumeration(models):
    rewards = table()
    counts = [2000, 2000, 2000]
    for p in limit.curve(*drawn(models, rewards, counts), counts, BETAS):
        kl, reward = exact(models[0], rewards, p.beta)
        assert abs(p.reward - reward) < 4 * p.reward_se and p.reward_se < 0.1
        assert abs(p.kl - kl) < 4 * p.kl_se + 1e-12 and p.kl_se < 0.2


def test_all_responses_with_their_probabilities_give_the_exact_curve(models):
    """With u = pi_ref and every response drawn once nothing is left to chance: `point` against plain Python."""
    rewards = table()
    for beta in BETAS:
        p = limit.point(rewards, every_logp(models[0]).detach(), beta)
        assert (p.kl, p.reward) == pytest.approx(exact(models[0], rewards, beta), abs=1e-12)


def test_mixture_weights_and_effective_samples_by_hand():
    """Two draws from the reference (1/2 and 1/4 likely), one from a proposal: q = 2/3 pi_ref + 1/3 pi_1."""
    logps = torch.tensor([[[0.5, 0.25, 0.25]], [[0.2, 0.7, 0.1]]], dtype=torch.float64).log()
    log_u = limit.log_ratios(logps, [2, 1])
    q = [2 / 3 * 0.5 + 1 / 3 * 0.2, 2 / 3 * 0.25 + 1 / 3 * 0.7, 2 / 3 * 0.25 + 1 / 3 * 0.1]
    u = [0.5 / q[0], 0.25 / q[1], 0.25 / q[2]]
    assert log_u.exp()[0].tolist() == pytest.approx(u, abs=1e-12)
    rewards, beta = [1.0, -1.0, 2.0], 0.5
    w = [ui * math.exp(r / beta) for ui, r in zip(u, rewards, strict=True)]
    p = limit.point(torch.tensor([rewards], dtype=torch.float64), log_u, beta)
    assert p.ess_min == p.ess_median == pytest.approx(sum(w) ** 2 / sum(x * x for x in w), abs=1e-12)
    assert p.reward == pytest.approx(sum(x * r for x, r in zip(w, rewards, strict=True)) / sum(w), abs=1e-12)
    assert p.kl == pytest.approx(p.reward / beta - math.log(sum(w) / sum(u)), abs=1e-12)


def test_standard_errors_are_the_spread_over_repetitions(every):
    rewards, counts, generator = table(), [200, 200, 200], torch.Generator().manual_seed(0)
    for beta in (1.0, 0.5):
        seen = []
        for _ in range(300):
            reference, p = limit.curve(*picked(every, rewards, counts, generator), counts, [math.inf, beta])
            gain = p.reward - beta * p.kl - reference.reward  # at the true KL up to a constant: the slope is beta
            seen.append([reference.reward, p.reward, p.kl, gain, reference.reward_se, p.reward_se, p.kl_se, p.gain_se])
        seen = torch.tensor(seen, dtype=torch.float64)
        ratio = seen[:, 4:].mean(0) / seen[:, :4].std(0)  # draws come in fixed shares, so it is a bit above 1
        assert (ratio > 0.85).all() and (ratio < 1.3).all()


def test_samples_of_the_reference_alone_put_the_curve_too_low(models, every):
    """The reason for proposals: with as many draws in all, those of a policy near pi_beta take the bias away."""
    rewards, generator, beta = 2 * table(), torch.Generator().manual_seed(0), 0.4
    best = exact(models[0], rewards, beta)[1]
    trained = (every[0] + 0.7 * rewards / beta).log_softmax(-1)
    means = []
    for logps, counts in ((every[:1], [64]), (torch.stack([every[0], trained]), [32, 32])):
        repeated = [limit.curve(*picked(logps, rewards, counts, generator), counts, [beta])[0] for _ in range(50)]
        means.append(sum(p.reward for p in repeated) / 50)
    assert means[0] < 0.97 * best  # biased, not merely noisy
    assert means[1] == pytest.approx(best, rel=0.01)


def test_no_policy_is_above_the_curve(models):
    """At a policy's own KL the limit pays at least its reward, and more unless the policy is a pi_beta."""
    rewards, reference = table(), every_logp(models[0]).detach()
    points = [limit.point(rewards, reference, beta)._replace(ess_min=1e9) for beta in limit.BETAS]
    for seed in range(1, 21):
        noise = torch.randn(X, Y, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        logps = (reference + 0.5 * rewards + 0.3 * noise).log_softmax(-1)
        kl, reward = ((logps.exp() * values).sum(-1).mean().item() for values in (logps - reference, rewards))
        assert 0 < limit.share_of_gain(points, kl, reward) < 1
    one_beta = (reference + rewards / 0.8).log_softmax(-1)
    kl, reward = ((one_beta.exp() * values).sum(-1).mean().item() for values in (one_beta - reference, rewards))
    assert limit.share_of_gain(points, kl, reward) == pytest.approx(1, abs=1e-3)  # linear between the points
    assert limit.at_beta(points, 0.8) == pytest.approx((kl, reward), abs=1e-3)


def test_one_beta_for_all_prompts_beats_one_kl_for_all_prompts(models):
    """The curve spends its nats where they pay: prompts end at different KLs."""
    rewards = table() * torch.tensor([[0.2], [1.0], [3.0]], dtype=torch.float64)
    reference = every_logp(models[0]).detach()
    p = limit.point(rewards, reference, 1.0)
    equal = []
    for x in range(X):
        points = [limit.point(rewards[x : x + 1], reference[x : x + 1], beta) for beta in limit.BETAS]
        equal.append(limit.reward_at(points, p.kl))
    assert p.reward > sum(equal) / X + 0.05


def test_doubling_sees_samples_that_do_not_suffice(every):
    generator = torch.Generator().manual_seed(0)
    few, many = (
        limit.doubling(*picked(every[:2], table(), counts, generator), counts)
        for counts in ([900, 900], [30000, 30000])
    )
    assert 2 * many < few < 0.1
    # every other draw earns 1 or 3, the rest nothing: half of them is another language, and it must say so
    rewards = torch.tensor([[1.0, 0.0, 3.0, 0.0] * 300], dtype=torch.float64)
    assert limit.doubling(rewards, torch.zeros(1, 1, 1200, dtype=torch.float64), [1200]) > 0.2


@pytest.mark.parametrize("samples, models", [(1024, 3), (1024, 1), (10, 4), (512, 5)])
def test_shares(samples, models):
    counts = limit.shares(samples, models)
    assert sum(counts) == samples and len(counts) == models and max(counts) - min(counts) < models


# ---- the file ----


def made_up(n=5, ess=500.0):
    points = [limit.Point(math.inf, 0.0, 0.0, 1.0, 0.01, 0.0, 900.0, 950.0)]
    return points + [limit.Point(1 / k, k, 0.1, 1 + 2 * math.sqrt(k), 0.1, 0.1, ess / k, ess) for k in range(1, n)]


def test_file_gives_back_what_was_written_where_samples_suffice(tmp_path):
    path = tmp_path / "limit.csv"
    common.write_csv(path, made_up(), digits=6)
    with open(path, encoding="utf-8") as file:
        assert next(csv.reader(file))[:7] == "beta,kl,kl_se,reward,reward_se,gain_se,ess_min".split(",")
    assert [p.kl for p in limit.read(path)] == [0, 1, 2]  # 500 / 3 and 500 / 4 effective samples are too few
    assert [p.kl for p in limit.read(path, least_ess=0)] == [0, 1, 2, 3, 4]
    for name in ("kl", "reward", "beta"):
        assert getattr(limit.read(path)[2], name) == pytest.approx(getattr(made_up()[2], name), rel=1e-5)


def test_reading_off_the_curve():
    points = made_up()
    assert limit.reward_at(points, 1.0) == 3.0 and limit.reward_at(points, 0.0) == 1.0
    assert limit.reward_at(points, 1.5) == pytest.approx((3 + 1 + 2 * math.sqrt(2)) / 2)
    assert math.isnan(limit.reward_at(points, -0.1)) and math.isnan(limit.reward_at(points, 4.1))
    assert limit.share_of_gain(points, 1.0, 2.0) == 0.5
    assert limit.at_beta(points, 0.5) == pytest.approx((2.0, 1 + 2 * math.sqrt(2)))
    assert limit.at_beta(points, math.inf) == (0.0, 1.0)
    assert math.isnan(limit.at_beta(points, 0.1)[0])


def test_a_file_that_is_no_limit(tmp_path):
    with pytest.raises(UserError, match="not found"):
        limit.read(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="columns must be beta,kl"):
        limit.read(tmp_path / "other.csv")
    common.write_csv(tmp_path / "few.csv", [made_up()[0]._replace(ess_min=10.0)], digits=6)
    with pytest.raises(UserError, match="no row for the reference"):
        limit.read(tmp_path / "few.csv")


def test_height_error_is_that_of_the_difference_of_the_samples():
    """Against reward - slope * KL sample by sample: with correlated errors far from both independent and the same."""
    generator = torch.Generator().manual_seed(0)
    kls = torch.rand(300, dtype=torch.float64, generator=generator)
    rewards = 2 * kls + 0.1 * torch.rand(300, dtype=torch.float64, generator=generator)
    for per_prompt in (1, 3):
        found = limit.moments(rewards, kls, per_prompt)
        for name, values in (("reward", rewards), ("kl", kls)):
            mean, se = common.prompt_mean_se(values, per_prompt)
            assert (found[name], found[f"{name}_se"]) == pytest.approx((mean, se), rel=1e-12)
        errors = {name: found[name] for name in ("kl_se", "reward_se", "cov")}
        _, expected = common.prompt_mean_se(rewards - 1.9 * kls, per_prompt)
        assert limit.height_se(1.9, **errors) == pytest.approx(expected, rel=1e-9)
        assert expected < 0.1 * math.hypot(found["reward_se"], 1.9 * found["kl_se"])


# ---- the command ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An SFT run on the toy's text, and another to propose with, both hardly trained."""
    folder = tmp_path_factory.mktemp("limit")
    tiny.write_data(folder)
    for name, epochs in (("sft", 1), ("other", 4)):
        argv = ["--data", folder / "sft.jsonl", "--out", folder / name, "--preset", "toy", "--vocab-size", 300]
        argv += ["--epochs", epochs, "--lr", 1e-2, "--warmup-steps", 0, "--samples", 0, "--device", "cpu"]
        tiny.call(train_sft.main, *argv)
    return folder


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    """A reward that models this bad can earn, the toy's being 0 for all they write: how many letters are an e."""
    monkeypatch.setattr(limit, "load_reward", lambda name: lambda prompts, texts: [text.count("e") for text in texts])


def command(run, out, *more):
    argv = ["--reference", run / "sft", "--data", run / "sft_held_out.jsonl", "--reward", "toy", "--out", out]
    return [*argv, "--prompts", 3, "--samples", 400, "--max-new-tokens", 8, "--proposal", run / "other", *more]


def test_command_draws_once_and_goes_on_where_it_was(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "limit.csv"
    monkeypatch.setattr(limit, "ROWS", 200)  # one prompt at a time
    tiny.call(limit.main, *command(run, out))
    assert "doubling the samples changed" in capsys.readouterr().out
    first, draws = out.read_bytes(), tiny.contents(tmp_path / "limit.csv.draws")
    assert len(draws) == 3
    kept = sorted(draws)[:2]
    for name in set(draws) - set(kept):
        (tmp_path / "limit.csv.draws" / name).unlink()
    drawn_now = []
    real = limit.draw
    monkeypatch.setattr(limit, "draw", lambda *args: drawn_now.append(args[1]) or real(*args))
    tiny.call(limit.main, *command(run, out))
    assert len(drawn_now) == 1 and out.read_bytes() == first
    tiny.call(limit.main, *command(run, out, "--seed", 1))  # other draws: nothing of the old ones is used
    assert len(drawn_now) == 4 and out.read_bytes() != first
    tiny.call(limit.main, *command(run, out, "--max-new-tokens", 6, "--seed", 11))
    tiny.call(limit.main, *command(run, out, "--max-new-tokens", 61, "--seed", 1))  # the same digits in a row
    assert len(drawn_now) == 10


def test_command_draws_again_for_another_reward_in_the_same_file(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limit, "load_reward", SentimentClassifier.load)
    path, out = tmp_path / "reward.pt", tmp_path / "limit.csv"
    argv = command(run, out, "--reward", path)
    found = []
    for weight in (1.0, 2.0, 2.0):
        SentimentClassifier({"the": weight, "a": 0.5, "i": weight}, 0.0).save(path)
        tiny.call(limit.main, *argv)
        found.append((out.read_bytes(), "are not used" in capsys.readouterr().out))
    assert found[0][0] != found[1][0] == found[2][0]
    assert [said for _, said in found] == [False, True, True]


def test_command_reward_of_the_reference_is_its_samples_mean(run, tmp_path):
    """Without proposals the weights are all equal: the first row is a plain mean, with as many effective samples."""
    argv = command(run, tmp_path / "limit.csv")
    argv = argv[: argv.index("--proposal")]
    tiny.call(limit.main, *argv)
    reference = limit.read(tmp_path / "limit.csv")[0]
    files = list((tmp_path / "limit.csv.draws").iterdir())
    rewards = torch.cat([torch.load(file, weights_only=True)["rewards"] for file in files])
    assert rewards.shape == (3, 400)
    assert reference.ess_min == 400 and reference.kl == 0
    assert reference.reward == pytest.approx(rewards.mean().item(), abs=1e-6)


def test_command_temperature_is_that_of_the_proposals(run, tmp_path, monkeypatch):
    seen = []
    real = limit.draw
    monkeypatch.setattr(limit, "ROWS", 600)  # all prompts at once
    monkeypatch.setattr(limit, "draw", lambda sources, *args: seen.append(sources) or real(sources, *args))
    tiny.call(limit.main, *command(run, tmp_path / "limit.csv", "--temperature", 1.5))
    tiny.call(limit.main, *command(run, tmp_path / "limit.csv", "--temperature", 2))  # nothing of the other's is used
    assert [[temperature for _, temperature in sources] for sources in seen] == [[1.0, 1.5], [1.0, 2.0]]


def test_command_refuses(run, tmp_path, capsys):
    few = command(run, tmp_path / "a.csv", "--samples", 8, "--proposal", run / "sft")
    assert "at least four each" in tiny.fails(capsys, limit.main, *few)
    assert "not found" in tiny.fails(capsys, limit.main, *command(run, tmp_path / "a.csv", "--proposal", run / "none"))
