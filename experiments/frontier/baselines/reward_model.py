"""A reward model: a number for each response, learned from preferences. Best-of-N and PPO maximise it.

    python -m experiments.frontier.unit --method reward-model --sft runs/toy/sft --out runs/frontier/toy

It is the SFT model with a scalar head in place of the vocabulary. Under Bradley-Terry the chosen response wins with
probability sigmoid( r(x, y_w) - r(x, y_l) ) (Eq. 1 of Rafailov et al. 2023), so the loss is its negative
log-likelihood:

    L(r)  =  -E[ log sigmoid( r(x, y_w) - r(x, y_l) ) ]                                                         (2)

This is DPO's loss (7) with r in place of beta log pi/pi_ref: DPO trains a reward model as well, one that is a policy.

Equation (2) stays the same if a number that depends only on the prompt is added to r. The paper sets the mean of every
prompt to 0 (section 3). The number changes neither the best of N responses nor the optimal policy. So `score` only
subtracts the mean over all training responses. A difference of rewards is a log-odds of Bradley-Terry, in nats.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from experiments import common
from experiments.frontier.baselines import fit
from minidpo import checkpoint, dataset
from minidpo.device import autocast
from minidpo.settings import UserError

# ---- 1. The model ----


class RewardModel(nn.Module):
    """The body of a GPT and a linear head: dataset.Rows of B rows -> rewards (B,), before `mean` is subtracted.

    The input is `targets`, not `ids`: each row without its leading eot. So the last token of the response is an input
    as well, and the row still fits into the context. The reward is read there, at the last position that `mask` marks.
    """

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.config = gpt, gpt.config
        gpt.set_dropout(0.0)
        self.head = nn.Linear(gpt.config.n_embd, 1, bias=False).to(gpt.wte.weight)  # the loss would not see a bias
        nn.init.zeros_(self.head.weight)
        self.register_buffer("mean", self.head.weight.new_zeros(()))  # over all training responses; see `centre`

    def forward(self, rows):
        hidden = self.gpt.hidden(rows.targets)  # (B, T, C)
        last = rows.mask.shape[1] - 1 - rows.mask.flip(1).int().argmax(dim=1)  # (B,)
        hidden = hidden[torch.arange(len(last), device=last.device), last]  # (B, C)
        with torch.autocast(hidden.device.type, enabled=False):  # the reward in fp32 at least
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def score(self, prompts, responses, batch_size=128, progress=None):
        """Returns rewards (N,) of responses to prompts (lists of ids), with `mean` subtracted, on the CPU."""
        was_training = self.training
        self.eval()
        rewards = torch.empty(len(prompts), dtype=self.head.weight.dtype)
        for indices, batch in common.by_length(prompts, responses, self.head.weight.device, batch_size, progress):
            rewards[indices] = self(batch).cpu()
        self.train(was_training)
        return rewards - self.mean.cpu()


def save(folder, model, tokenizer):
    head = {"weight": model.head.weight.detach(), "mean": model.mean}
    checkpoint.save(folder, model.gpt, tokenizer, {"reward_head": head})


def load(folder, policy_tokenizer=None):
    """Returns (RewardModel, its tokenizer). Raises UserError for another kind of model, or another tokenizer."""
    gpt, tokenizer, state = checkpoint.load(folder)
    if "reward_head" not in state:
        make = "python -m experiments.frontier.unit --method reward-model"
        raise UserError(f"{folder} holds a language model, not a reward model. Train one: {make}")
    if policy_tokenizer and policy_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder} has another tokenizer than the policy. Train it from the same SFT model.")
    model = RewardModel(gpt)
    with torch.no_grad():
        model.head.weight.copy_(state["reward_head"]["weight"])
        model.mean.copy_(state["reward_head"]["mean"])
    return model, tokenizer


def of_texts(model, tokenizer):
    """Returns `reward(prompts, responses) -> list of floats` of texts, each of which counts as ended."""

    def reward(prompts, responses):
        rows = []
        for texts in zip(prompts, responses, strict=True):
            prompt, response = map(tokenizer.encode, texts)
            cut = dataset.cut_to_context(prompt, [response], [True], tokenizer.eot, model.config.block_size)
            rows.append((cut[0], cut[1][0]))
        return model.score(*zip(*rows, strict=True), progress="reward model").tolist() if rows else []

    return reward


# ---- 2. Training. pairs: a list of (prompt_ids, chosen_ids, rejected_ids) ----


def bradley_terry_loss(chosen_rewards, rejected_rewards):
    """Equation (2), pair by pair: (B,), (B,) -> (B,)."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def train_step(model, optimizer, pairs, indices, settings):
    """One optimiser step on the pairs `indices`. Returns the loss before the update and the norm of its gradient."""
    loss = 0.0
    for micro in settings.cut([indices], pairs):
        batch = dataset.preference_batch([pairs[i] for i in micro], settings.device)
        with autocast(settings.device, settings.dtype):
            losses = bradley_terry_loss(model(batch.chosen), model(batch.rejected))
        part = losses.sum() / len(indices)  # the mean over the pairs of the step
        part.backward()
        loss += part.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
    metrics = {"loss": loss.item(), "grad_norm": grad_norm.item()}
    if not all(map(math.isfinite, metrics.values())):
        raise UserError(f"not a finite number in {metrics}. Lower --lr.\nUsable pairs, from 0: {sorted(indices)}.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def centre(model, pairs, settings):
    """Sets `mean` so that the scores of all responses in `pairs` have the mean 0."""
    prompts, chosen, rejected = map(list, zip(*pairs, strict=True))
    model.mean.zero_()  # `score` subtracts it
    size = settings.micro_batch_size or settings.batch_size
    model.mean.copy_(model.score(prompts * 2, chosen + rejected, size).mean())


def train(model, pairs, settings, on_step=None):
    fit(model, pairs, train_step, settings, on_step)
    centre(model, pairs, settings)
