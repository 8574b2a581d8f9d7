"""The exercises, answered by the project's own functions. The grader must give this file full marks.

All answers but `gradient_weight` call the project, so that there is no second implementation. Students should write
the formulas themselves: the grader reports a file that imports these modules.
"""

from types import SimpleNamespace

import torch

import train_dpo
from experiments import evaluate
from minidpo import dataset


def tokenise_pair(tokenizer, prompt, chosen, rejected):
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return dataset.encode([record], dataset.PAIR, tokenizer, max_length=1024)[0][0]


def shift(row):
    rows = dataset.sft_batch([(row[:1].tolist(), row[1:].tolist())])
    return rows.ids[0], rows.targets[0]


def build_batch(prompts, responses):
    return tuple(dataset.sft_batch(list(zip(prompts, responses, strict=True))))


def gather_logps(logits, targets):
    return train_dpo.token_logps(logits, targets)


def sum_logps(logps, mask):
    # a vocabulary of two tokens: token 0 has these log-probabilities, token 1 has the rest
    logits = torch.stack([logps, torch.log1p(-logps.exp())], dim=-1)
    rows = dataset.Rows(ids=None, targets=torch.zeros_like(mask, dtype=torch.long), mask=mask)
    return train_dpo.response_logps(lambda ids: logits, dataset.PreferenceBatch(rows, rows))[0]


def implicit_reward(policy_logps, reference_logps, beta):
    rewards = train_dpo.dpo_loss(policy_logps, policy_logps, reference_logps, reference_logps, beta)[1]
    return rewards + beta * (policy_logps - policy_logps.detach())  # dpo_loss detaches its rewards; this adds 0


def margin_and_loss(chosen_rewards, rejected_rewards):
    losses, chosen, rejected = train_dpo.dpo_loss(chosen_rewards, rejected_rewards, 0.0, 0.0, beta=1.0)
    margins = chosen_rewards - rejected_rewards
    return chosen - rejected + margins - margins.detach(), losses  # dpo_loss detaches its rewards; this adds 0


def gradient_weight(chosen_rewards, rejected_rewards, beta):
    weights = beta * torch.sigmoid(rejected_rewards - chosen_rewards)  # the project leaves this to autograd
    return -weights, weights


def smoothed_loss(margins, label_smoothing):
    return train_dpo.dpo_loss(margins, torch.zeros_like(margins), 0.0, 0.0, 1.0, label_smoothing)[0]


def accuracy(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    logps = policy_chosen, policy_rejected
    losses_and_rewards = train_dpo.dpo_loss(*logps, reference_chosen, reference_rejected, beta=1.0)
    sums = train_dpo.metric_sums(*losses_and_rewards, *logps)
    return train_dpo.means(sums, len(policy_chosen))["rewards/accuracies"]


def kl_estimates(policy_logits, reference_logits, targets, mask):
    estimates = []
    for row, (ids, m) in enumerate(zip(targets, mask, strict=True)):  # one at a time: sequence_kl sorts them
        sample = ids[m].tolist()
        prompt = [0] * (1 + int(m.int().argmax()))
        policy, reference = (
            Fixed(logits[row : row + 1, : len(prompt) + len(sample) - 1])
            for logits in (policy_logits, reference_logits)
        )
        estimates.append(torch.cat(evaluate.sequence_kl(policy, reference, [prompt], [sample])))
    return torch.stack(estimates).to(policy_logits.dtype).unbind(dim=-1)


class Fixed:
    """A model with fixed logits that has the attributes `sequence_kl` uses."""

    def __init__(self, logits):
        self.logits, self.wte = logits, SimpleNamespace(weight=logits)

    def __call__(self, ids):
        return self.logits

    def eval(self):
        pass


def pick_beta(frontier, kl_budget):
    allowed = {}
    for beta in {run["beta"] for run in frontier}:
        runs = [run for run in frontier if run["beta"] == beta]
        kl, reward = (sum(run[key] for run in runs) / len(runs) for key in ("kl", "reward"))
        if kl <= kl_budget:
            allowed[beta] = reward
    return max(allowed, key=allowed.get, default=None)
