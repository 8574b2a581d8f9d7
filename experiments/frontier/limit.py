r"""The limit: the highest mean reward that any policy can have at a given KL from the reference.

    python -m experiments.frontier.limit --reference runs/toy/sft --proposal runs/dpo_0.4 --proposal runs/dpo_1 \
        --data toy --reward toy --prompts 50 --samples 1024 --out limit.csv

Among all policies with the same mean KL over a set of prompts, the highest mean reward is that of

    pi_beta(y|x)  =  pi_ref(y|x) exp( r(x, y) / beta ) / Z(x)               (Eq. 4 of the DPO paper)

with one beta for all prompts, because pi_beta maximises E[r] - beta KL. The curve over beta is the limit. It is
estimated from samples of the reference and of trained policies, the proposals: docs/frontier.md says why. A response
drawn by any of the K models counts as drawn from their mixture q = sum_k s_k pi_k, where s_k is the share of model k
(the balance heuristic of Veach & Guibas 1995), and weighs

    u(y)  =  pi_ref(y|x) / q(y|x)   for the reference,   w(y) = u(y) exp( r(x, y) / beta )   for pi_beta

with weights divided by their sum, prompt by prompt. A response with a small q gets a large weight, and a few large
weights spoil the mean. So proposals sample at a temperature above 1, which raises q for rare responses. `read` gives a
point only where each prompt has LEAST_ESS effective samples, (sum w)^2 / sum w^2; `doubling` says how far the curve
moves when the samples are doubled.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from experiments import common
from experiments.rewards import load_reward
from minidpo import checkpoint
from minidpo.device import DEVICES, pick_device
from minidpo.files.writing import atomic, claim
from minidpo.settings import UserError, knob, parse_settings, run_main
from train_dpo import token_logps

LEAST_ESS = 200  # effective samples per prompt: with fewer no point is drawn
BETAS = [math.inf, *(50 * 0.95**i for i in range(118))]  # from the reference itself down to 0.12
ROWS = 512  # samples in one batch


@dataclasses.dataclass
class Settings:
    reference: str = knob(dataclasses.MISSING, "the model that KL is measured from: a run or GPT-2 folder, or a name")
    data: str = knob(dataclasses.MISSING, 'a dataset name (its held-out prompts) or a JSONL file with "prompt"')
    reward: str = knob(dataclasses.MISSING, "toy, or the file of a trained classifier")
    out: str = knob(dataclasses.MISSING, "the CSV file to write; the draws are kept beside it, in OUT.draws")
    proposal: list = knob(None, "a policy trained from the reference, to sample from as well; may be repeated")
    temperature: float = knob(1.2, "of the proposals' samples; the reference's is 1", least=0.1)
    prompts: int = knob(50, "use the first so many prompts; 0: all")
    samples: int = knob(1024, "draws for each prompt, from all models together; at least four from each", least=8)
    max_new_tokens: int = knob(96, "longest response, in tokens; use the same for the policies to compare", least=1)
    seed: int = knob(0, "seed of the sampling")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)


# ---- 1. The mathematics. P prompts, S draws for each, K models of which the first is the reference; logs in nats ----


def log_ratios(logps, counts):
    """log u above: logps (K, P, S) of every draw under every model, counts (K,) draws per prompt of each -> (P, S)."""
    shares = torch.tensor(counts, dtype=logps.dtype) / sum(counts)
    return logps[0] - (logps + shares.log()[:, None, None]).logsumexp(0)


class Point(NamedTuple):
    """pi_beta, averaged over the prompts; a row of the CSV. Standard errors are those of the sampling."""

    beta: float
    kl: float  # nats per response
    kl_se: float
    reward: float
    reward_se: float
    gain_se: float  # of the limit's gain over the reference at a given KL
    ess_min: float  # effective samples of the worst prompt
    ess_median: float


def point(rewards, log_u, beta):
    """Estimates pi_beta from rewards and log_u, both (P, S) float64 -> Point. beta inf is the reference itself.

    With Z(x) = sum w / sum u the KL is 0 at beta = inf and positive elsewhere, whatever the draws are.
    """
    u, v = log_u.softmax(-1), (log_u + rewards / beta).softmax(-1)  # weights that sum to 1: reference, pi_beta
    log_z = (log_u + rewards / beta).logsumexp(-1) - log_u.logsumexp(-1)  # (P,)
    reference_reward, reward = (u * rewards).sum(-1), (v * rewards).sum(-1)
    kl = reward / beta - log_z if beta < math.inf else torch.zeros_like(reward)

    # how far each draw moves the estimates (P, S), to first order: the delta method
    d_reference, d_reward = u * (rewards - reference_reward[:, None]), v * (rewards - reward[:, None])
    d_log_z = v - u
    d_kl = d_reward / beta - d_log_z
    # along the curve the reward grows by beta per nat, so its height moves by d_reward - beta d_kl = beta d_log_z
    d_gain = (beta * d_log_z if beta < math.inf else d_reference) - d_reference

    def se(moves):
        return (moves.square().sum().sqrt() / len(moves)).item()

    ess = 1 / v.square().sum(-1)
    means = kl.mean().item(), se(d_kl), reward.mean().item(), se(d_reward), se(d_gain)
    return Point(beta, *means, ess.min().item(), ess.median().item())


def curve(rewards, logps, counts, betas=BETAS):
    """The limit: rewards (P, S) of the draws, logps and counts as in `log_ratios` -> Points, one per beta. float64."""
    log_u = log_ratios(logps, counts)
    return [point(rewards, log_u, beta) for beta in betas]


def doubling(rewards, logps, counts):
    """The largest relative change of the gain, at equal KL above 0.1 nats, from half of the draws to all of them."""
    # every other draw of each model; they lie in blocks, one model after the other
    kept = torch.cat([torch.arange(n - n % 2)[::2] + sum(counts[:k]) for k, n in enumerate(counts)])
    half = curve(rewards[:, kept], logps[:, :, kept], [n // 2 for n in counts])
    whole = [p for p in curve(rewards, logps, counts) if p.ess_min >= LEAST_ESS]
    compared = [p for p in whole if 0.1 < p.kl < half[-1].kl]
    move = half[0].reward - whole[0].reward
    return max((abs(share_of_gain(half, p.kl, p.reward + move) - 1) for p in compared), default=math.nan)


# ---- 2. The draws. A source is a model to sample from and the temperature that divides its logits ----


@torch.no_grad()
def sequence_logps(source, prompt_ids, response_ids):
    """Returns the log-probability with which `source` draws each response: (N,) float64, on the CPU."""
    model, temperature = source
    logps = torch.empty(len(prompt_ids), dtype=torch.float64)
    for indices, batch in common.by_length(prompt_ids, response_ids, model.wte.weight.device, batch_size=32):
        values = token_logps(model(batch.ids).div_(temperature), batch.targets).masked_fill(~batch.mask, 0.0)
        logps[indices] = values.cpu().double().sum(-1)
    return logps


def shares(samples, models):
    """Returns how many of `samples` each model draws: equally many, and the reference (first) those left over."""
    return [samples - (models - 1) * (samples // models)] + [samples // models] * (models - 1)


def draw(sources, prompts, tokenizer, reward, counts, max_new_tokens, generator, ids=None):
    """Draws counts[k] responses of sources[k] to each prompt (a text) -> rewards (P, S), logps (K, P, S).

    The draws of one source stand together.
    """
    rewards, logps = [], []
    for (model, temperature), count in zip(sources, counts, strict=True):
        drawn = common.sample(model, tokenizer, prompts, max_new_tokens, generator, count, ids, temperature, ROWS)
        rewards.append(torch.tensor(reward(drawn.prompts, drawn.texts), dtype=torch.float64).view(-1, count))
        logps.append(torch.stack([sequence_logps(s, drawn.prompt_ids, drawn.ids).view(-1, count) for s in sources]))
    return torch.cat(rewards, dim=-1), torch.cat(logps, dim=-1)


def content(reward):
    """Fingerprint of the reward that a --reward names: of its file's bytes, or of the name "toy"."""
    return checkpoint.fingerprint(Path(reward).read_bytes() if Path(reward).is_file() else reward)


def all_draws(sources, prompts, tokenizer, reward, settings):
    """`draw` for all prompts, a few at a time. Each part is kept in OUT.draws, so that a stopped run continues.

    The name of a part is a fingerprint of what it was made from. Parts of other names are not used.
    """
    counts, folder = shares(settings.samples, len(sources)), Path(f"{settings.out}.draws")
    knobs = content(settings.reward), settings.samples, settings.max_new_tokens, settings.seed
    made_of = checkpoint.fingerprint(*itertools.chain(*sources), (tokenizer.fingerprint, *knobs))
    at_once = max(1, ROWS // counts[-1])
    name = lambda first: checkpoint.fingerprint(made_of, first, prompts[first : first + at_once])  # noqa: E731
    paths = {first: folder / f"{name(first)}.pt" for first in range(0, len(prompts), at_once)}
    if others := set(folder.glob("*.pt")) - set(paths.values()):
        print(f"{folder}: {len(others)} files were drawn from other models, rewards or settings, and are not used")
    ids = common.prompt_ids(tokenizer, prompts, settings.max_new_tokens, *(model for model, _ in sources))
    parts = []
    for first, path in tqdm(paths.items(), desc="draws", unit=f"x {at_once} prompts"):
        if not path.exists():
            seed = settings.seed * 1_000_003 + first  # one per part, so that a continued run draws the same
            generator = torch.Generator(sources[0][0].wte.weight.device).manual_seed(seed)
            some, some_ids = (x[first : first + at_once] for x in (prompts, ids))
            how = counts, settings.max_new_tokens, generator
            rewards, logps = draw(sources, some, tokenizer, reward, *how, some_ids)
            with atomic(path) as file:
                torch.save({"rewards": rewards, "logps": logps}, file)
        parts.append(checkpoint.read(path, keys=("rewards", "logps")))
    return torch.cat([part["rewards"] for part in parts]), torch.cat([part["logps"] for part in parts], dim=1)


# ---- 3. The file, and what can be read off it ----


def read(path, least_ess=LEAST_ESS):
    """Reads the Points that have `least_ess` effective samples for every prompt, the reference first, the KL rising."""
    points = common.read_csv(path, Point, "python -m experiments.frontier.limit --help")
    points = sorted((p for p in points if p.ess_min >= least_ess), key=lambda p: -p.beta)
    if not points or points[0].beta < math.inf:
        raise UserError(f"{path}: no row for the reference (beta inf) with {least_ess} effective samples.")
    return points


def reward_at(points, kl):
    """Returns the limit's mean reward at `kl` nats, linear between the points; NaN where the curve is not drawn."""
    return float(np.interp(kl, [p.kl for p in points], [p.reward for p in points], left=math.nan, right=math.nan))


def slope_at(points, kl):
    """Returns the growth of the limit's mean reward per nat, which is the beta of that place; NaN outside the curve."""
    for before, after in itertools.pairwise(points):
        if before.kl <= kl <= after.kl:
            return (after.reward - before.reward) / (after.kl - before.kl)
    return math.nan


def moments(rewards, kls, per_prompt):
    """Means of the rewards and KLs (N,) of the same samples, with standard errors and their covariance -> by name.

    The samples of one prompt are neighbours, as in `common.prompt_mean_se`.
    """
    pair = torch.stack([torch.as_tensor(values, dtype=torch.float64) for values in (rewards, kls)])
    pair = pair.view(2, -1, per_prompt).mean(-1)
    cov = pair.cov() / pair.shape[1]
    (reward, kl), (reward_se, kl_se) = pair.mean(-1).tolist(), cov.diagonal().sqrt().tolist()
    return {"kl": kl, "kl_se": kl_se, "reward": reward, "reward_se": reward_se, "cov": cov[0, 1].item()}


def height_se(slope, kl_se, reward_se, cov):
    """Standard error of reward - slope * KL, from those of both means and their covariance.

    This is the error of a policy's distance to the limit. The errors of reward and KL nearly cancel in it.
    """
    return math.sqrt(max(0.0, reward_se**2 + (slope * kl_se) ** 2 - 2 * slope * cov))


def at_beta(points, beta):
    """Returns (kl, reward) of pi_beta, the optimum of DPO on Bradley-Terry labels; NaNs outside the curve."""
    xs, columns = [1 / p.beta for p in points], ([p.kl for p in points], [p.reward for p in points])
    return tuple(float(np.interp(1 / beta, xs, ys, left=math.nan, right=math.nan)) for ys in columns)


def share_of_gain(points, kl, reward):
    """Returns a policy's gain in reward over the reference, as a share of the limit's gain at the same KL.

    NaN where the curve is not drawn, and at 0 nats. Take reward and kl as means over the same samples, the KL by its
    plain estimator: experiments/evaluate.py says why.
    """
    gain = reward_at(points, kl) - points[0].reward
    return (reward - points[0].reward) / gain if gain else math.nan


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    claim(settings.out)
    reward = load_reward(settings.reward)
    names = [settings.reference, *(settings.proposal or [])]
    if settings.samples < 4 * len(names):
        raise UserError(f"--samples {settings.samples}: {len(names)} models draw at least four each.")
    models, tokenizer = common.load_models(*names, device=pick_device(settings.device))
    sources = [(model, settings.temperature if i else 1.0) for i, model in enumerate(models)]
    prompts = common.read_prompts(settings.data, limit=settings.prompts)

    rewards, logps = all_draws(sources, prompts, tokenizer, reward, settings)
    counts = shares(settings.samples, len(sources))
    common.write_csv(settings.out, curve(rewards, logps, counts), digits=6)
    drawn = read(settings.out)
    print(f"{settings.out}: {len(prompts)} prompts x {settings.samples} draws from {', '.join(names)}")
    print(f"the reference's mean reward is {drawn[0].reward:.3f} +- {drawn[0].reward_se:.3f}")
    end, changed = drawn[-1], doubling(rewards, logps, counts)
    print(f"drawn up to {end.kl:.2f} nats (beta {end.beta:.3f}): each prompt has {LEAST_ESS} effective samples or more")
    print(f"doubling the samples changed the gain at equal KL by {changed:.2%} at most")


if __name__ == "__main__":
    run_main(main)
