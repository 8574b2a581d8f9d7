"""PPO for language models: reinforcement learning on a reward, held near the reference by a KL penalty.

    python -m experiments.frontier.unit --method ppo-gt --setting 2.0 --sft runs/toy/sft --out runs/frontier/toy

With a learned reward this is the usual RLHF; with the true reward it is the DPO paper's PPO-GT. Both maximise the
objective that DPO solves in closed form (Eq. 3 of Rafailov et al. 2023), but by trial: sample responses, score them,
make those that did better than expected more likely, and repeat. Each step of the loop does four things:

ROLL OUT. The policy completes a batch of prompts at temperature 1, from the whole distribution: PPO corrects for the
change of the policy since the sampling, and for nothing else.

REWARD. Each token is an action, and the text before it the state. The reward r of the finished response arrives with
its last token. Every token pays for its distance from the reference (Ziegler et al. 2019, arXiv 1909.08593, Eq. 2):

    R_t  =  -kl_coef (log pi(y_t|s_t) - log pi_ref(y_t|s_t))  +  r if y_t is the last

The sum over t has the mean E[r] - kl_coef KL(pi || pi_ref). kl_coef is DPO's beta. A controller moves it so that the
KL, in nats per response, reaches kl_target (the DPO paper's "target KL in {3, 6, 9, 12}").

ADVANTAGE. How much better was token t than expected? A value model V(s_t) estimates the sum of rewards to come.
Generalised advantage estimation (GAE; Schulman et al. 2016, arXiv 1506.02438, Eq. 16) weighs the noise of what followed
against the errors of V. There is no discount: a response is short.

UPDATE. Several epochs of small steps over the same rollouts. The ratio pi / pi_old at each token is clipped, so that no
step gains from moving further than that (Schulman et al. 2017, arXiv 1707.06347, Eq. 7).

The value model is a second network, as in Stiennon et al. 2020 (arXiv 2009.01325, section 3.4). It starts with the
weights of the SFT model. In a shared body, the value loss, which starts large, would damage the policy's language.
"""

import copy
import dataclasses
import math
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from experiments import common
from minidpo import dataset
from minidpo.device import autocast
from minidpo.optim import learning_rate, make_optimizer, set_learning_rate
from minidpo.settings import UserError
from train_dpo import token_logps

# ---- 1. The mathematics. N responses, T positions; `mask` (N, T) is true where a response token is predicted ----


def penalised_rewards(scores, logps, reference_logps, mask, kl_coef):
    """Returns R_t above: scores (N,), one per response; logps (N, T), in nats -> (N, T), 0 outside the responses."""
    rewards = -kl_coef * (logps - reference_logps) * mask
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)  # where the response's last token is predicted
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def gae(rewards, values, mask, lam):
    """GAE(lambda) without discount: A_t = delta_t + lam A_t+1, delta_t = R_t + V_t+1 - V_t, all 0 after the last token.

    Arguments and result are (N, T). With lam 1 it is the sum of the rewards that followed, minus V; with lam 0 it
    trusts V one token ahead.
    """
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        advantage = (delta + lam * advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = advantage
    return advantages


def mean(values, mask):
    return (values * mask).sum() / mask.sum()


def whiten(values, mask):
    """Brings values (N, T) to mean 0 and variance 1, so that one learning rate fits rewards of any scale."""
    centred = (values - mean(values, mask)) * mask
    return centred / (mean(centred.square(), mask).sqrt() + 1e-8)


def policy_loss(logps, old_logps, advantages, mask, clip):
    """Schulman et al. 2017, Eq. 7 -> (loss (), share of tokens whose ratio is clipped ())."""
    ratio = (logps - old_logps).exp()
    losses, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return mean(torch.maximum(losses, clipped), mask), mean((clipped > losses).float(), mask)


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error -> (). A value gains nothing by moving further than `clip` from its value at the rollout.

    The clip is not in the paper, but in its authors' code and in most code since.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * mean(torch.maximum((values - returns).square(), (near - returns).square()), mask)


def next_kl_coef(kl_coef, kl, target, gain):
    """The controller of Ziegler et al. 2019, section 2.2: kl_coef rises while the KL is above its target.

    With a target of 0, kl_coef stays fixed. The relative error counts up to 20 %, so one step changes kl_coef by
    at most a share of 0.2 * gain.
    """
    if target == 0:
        return kl_coef
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + gain * error)


# ---- 2. Settings. The defaults fit the toy; the sweep sets max_new_tokens ----


@dataclasses.dataclass
class Settings:
    kl_target: float = 2.0  # where the controller keeps the KL, in nats per response; 0: kl_coef is fixed
    kl_coef: float = 1.0  # price of a nat of distance from the reference, at the start
    kl_gain: float = 0.1  # gain of the controller
    steps: int = 70  # batches of responses in the whole run, each followed by its epochs of updates
    rollouts: int = 256  # responses in one batch
    epochs: int = 2  # passes over each step's rollouts
    minibatch_size: int = 128  # responses per update, and per forward pass
    lr: float = 1e-3  # learning rate of the policy after the warm-up; it falls linearly to 0
    value_lr: float = 2e-3  # the same of the value model
    warmup_steps: int = 5  # steps over which the learning rates rise
    lam: float = 0.95  # lambda of GAE, from 0 to 1: lower trusts the value model more
    clip: float = 0.2  # the ratio of new to old probability counts from 1 - clip to 1 + clip
    value_clip: float = 1.0  # how far a value may move in a step, in units of the reward
    grad_clip: float = 1.0  # longest gradient, in L2 norm, of either network
    max_new_tokens: int = 64  # longest response, in tokens; a longer one is cut, and scored as it stands
    seed: int = 0  # of the choice of the prompts and of the sampling
    dtype: str = "float32"  # of the matrix products, or bfloat16; the sampling has the precision of the weights


# ---- 3. The pieces of the loop ----


class ValueModel(nn.Module):
    """ids (N, T) -> (N, T): at position t, the rewards to come after ids[:, : t + 1], summed. It starts at 0."""

    def __init__(self, body):
        super().__init__()
        self.body = body  # a GPT
        self.head = nn.Linear(body.config.n_embd, 1).to(body.wte.weight)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids):
        hidden = self.body.hidden(ids)
        with torch.autocast(ids.device.type, enabled=False):  # the value in fp32 at least
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)


class Rollout(NamedTuple):
    """N responses and what belongs to them when they are sampled. Tensors are (N, T) as in dataset.Rows."""

    rows: dataset.Rows
    logps: torch.Tensor  # of the policy that sampled, in nats
    reference_logps: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor  # (N,), the reward of each response


@torch.no_grad()
def roll_out(policy, value, reference, reward, prompts, tokenizer, settings, generator, prompt_ids=None):
    """Samples one response to each of `prompts` (texts) and scores it -> Rollout. Arguments as in common.sample."""
    samples = common.sample(policy, tokenizer, prompts, settings.max_new_tokens, generator, ids=prompt_ids)
    rows = dataset.sft_batch(list(zip(samples.prompt_ids, samples.ids, strict=True)), policy.wte.weight.device)
    parts = []
    for ids, targets in zip(*(t.split(settings.minibatch_size) for t in (rows.ids, rows.targets)), strict=True):
        with autocast(ids.device.type, settings.dtype):
            parts.append((token_logps(policy(ids), targets), token_logps(reference(ids), targets), value(ids)))
    logps, reference_logps, values = (torch.cat(part) for part in zip(*parts, strict=True))
    scores = torch.tensor(reward(samples)).to(logps)
    return Rollout(rows, logps, reference_logps, values, scores)


def update(policy, value, optimizers, rollout, kl_coef, settings, generator):
    """Makes the epochs of updates on one rollout. Returns the means of losses, clip fraction and gradient norms."""
    ids, targets, mask = rollout.rows
    rewards = penalised_rewards(rollout.scores, rollout.logps, rollout.reference_logps, mask, kl_coef)
    advantages = gae(rewards, rollout.values, mask, settings.lam)
    returns = advantages + rollout.values  # before whitening: the value model learns the rewards at their own scale
    advantages = whiten(advantages, mask)
    sums, n = 0.0, 0
    for _ in range(settings.epochs):
        for i in torch.randperm(len(ids), generator=generator).to(ids.device).split(settings.minibatch_size):
            with autocast(ids.device.type, settings.dtype):
                logps, values = token_logps(policy(ids[i]), targets[i]), value(ids[i])
            loss, clip_fraction = policy_loss(logps, rollout.logps[i], advantages[i], mask[i], settings.clip)
            error = value_loss(values, rollout.values[i], returns[i], mask[i], settings.value_clip)
            norms = []
            for model, optimizer, objective in zip((policy, value), optimizers, (loss, error), strict=True):
                objective.backward()
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            sums, n = sums + torch.stack([loss.detach(), error.detach(), clip_fraction, *norms]), n + 1
    names = ("loss/policy", "loss/value", "clip_fraction", "grad_norm", "grad_norm/value")
    metrics = dict(zip(names, (sums / n).tolist(), strict=True))
    if not all(math.isfinite(m) for m in metrics.values()):
        raise UserError(f"not a finite number in {metrics}. Is the learning rate too high?")
    return metrics


def train(policy, reference, reward, prompts, tokenizer, settings, on_step=None):
    """Trains `policy` in place. Returns the value model. A terminal shows a progress bar.

    Args:
        reward: reward(samples) -> list of floats, for common.Samples.
        prompts: texts.
        on_step: on_step(step, metrics) after each step, counted from 1.
    """
    policy.set_dropout(0.0)  # the ratio of new to old probabilities must be 1 before the first update
    policy.train(), reference.eval()
    device = policy.wte.weight.device
    value = ValueModel(copy.deepcopy(reference)).train()
    value.body.set_dropout(0.0)
    optimizers = [make_optimizer(model, "adamw", settings.lr) for model in (policy, value)]
    kl_coef = settings.kl_coef
    ids = common.prompt_ids(tokenizer, prompts, settings.max_new_tokens, policy)

    for step in tqdm(range(settings.steps), "PPO", leave=False, unit="step", disable=None):
        # one seed per step, so that the sampling of a step does not depend on how many numbers the last one drew
        seed = settings.seed * 1_000_003 + step
        generator, sampling = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
        drawn = torch.randint(len(prompts), (settings.rollouts,), generator=generator).tolist()
        some, some_ids = ([x[i] for i in drawn] for x in (prompts, ids))
        rollout = roll_out(policy, value, reference, reward, some, tokenizer, settings, sampling, some_ids)
        for optimizer, peak in zip(optimizers, (settings.lr, settings.value_lr), strict=True):
            set_learning_rate(optimizer, learning_rate(step, settings.steps, peak, settings.warmup_steps, decay=True))
        losses = update(policy, value, optimizers, rollout, kl_coef, settings, generator)

        kl = ((rollout.logps - rollout.reference_logps) * rollout.rows.mask).sum(dim=1).mean().item()
        metrics = {"reward": rollout.scores.mean().item(), "kl": kl, "kl_coef": kl_coef, **losses}
        kl_coef = next_kl_coef(kl_coef, kl, settings.kl_target, settings.kl_gain)
        if on_step:
            on_step(step + 1, metrics)
    return value
