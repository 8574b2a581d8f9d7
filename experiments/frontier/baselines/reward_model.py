"""A reward model: a number for each response, learned from preferences. What Best-of-N and PPO go by.

    python -m experiments.frontier.baselines.reward_model --data toy --init runs/sft --out runs/reward

The SFT model with a scalar head in place of the words. Under Bradley-Terry the chosen wins with probability
sigmoid( r(x, y_w) - r(x, y_l) ) (Eq. 1 of Rafailov et al. 2023), so the loss is its negative log-likelihood:

    L(r)  =  -E[ log sigmoid( r(x, y_w) - r(x, y_l) ) ]                                                         (2)

It is DPO's loss (7) with r where DPO has beta log pi/pi_ref: DPO trains a reward model as well, one that is a policy.

Equation (2) sees only differences between responses to one prompt, so what depends on the prompt alone is left open.
The paper normalises it away (section 3: mean 0 for every prompt). That changes neither which of N responses is best nor
which policy is optimal, so here one number does: `score` subtracts the mean over all training responses. The scale is
not touched: a difference of rewards is a log-odds of Bradley-Terry, in nats.
"""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from experiments.frontier import baselines
from experiments.frontier.baselines import PairSettings, fit, pair_means, pair_step, prompts_of, record, start
from minidpo import checkpoint, dataset
from minidpo.device import autocast
from minidpo.sampling import generate
from minidpo.settings import UserError, parse_settings, run_main

# a new head takes larger steps, and more of them: at DPO's own rate it learns nothing for a third of the toy's pairs
SETS = {**baselines.SETS, "toy": {**baselines.SETS["toy"], "lr": 2e-3, "batch_size": 32}}


class RewardModel(nn.Module):
    """A GPT's body and a linear head: dataset.Rows of B rows -> rewards (B,), `mean` not yet subtracted; 0 at first.

    The body reads each row without its leading eot, which says nothing: that is `targets`, not `ids`, so the response's
    last token (its eot, if it ended) is an input as well and still fits into the context. The reward is read where that
    token stands, the last position that `mask` marks; what comes behind it is padding, and unseen.
    """

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.config = gpt, gpt.config
        gpt.set_dropout(0.0)
        self.head = nn.Linear(gpt.config.n_embd, 1, bias=False).to(gpt.wte.weight)  # the loss would not see a bias
        nn.init.zeros_(self.head.weight)
        self.register_buffer("mean", self.head.weight.new_zeros(()))  # over the training responses; see `train`

    def forward(self, rows):
        hidden = self.gpt.hidden(rows.targets)  # (B, T, C)
        positions = torch.arange(rows.mask.shape[1], device=rows.mask.device)
        last = (rows.mask * positions).argmax(dim=1)  # (B,)
        hidden = hidden[torch.arange(len(last), device=last.device), last]  # (B, C)
        with torch.autocast(hidden.device.type, enabled=False):  # the reward in fp32 at least
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def score(self, prompts, responses, batch_size=128, progress=None):
        """Rewards (N,) of responses to prompts, less `mean`, on the CPU; lists of ids as `generate` takes and gives.

        `progress` is a text for a progress bar. Raises UserError for a row longer than the context.
        """
        was_training = self.training
        self.eval()
        rows = list(zip(prompts, responses, strict=True))
        rewards = torch.empty(len(rows), dtype=self.head.weight.dtype)
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))  # similar lengths: little padding
        for i in tqdm(range(0, len(rows), batch_size), desc=progress, unit="batch", disable=progress is None):
            indices = order[i : i + batch_size]
            rewards[indices] = self(dataset.sft_batch([rows[j] for j in indices], self.head.weight.device)).cpu()
        self.train(was_training)
        return rewards - self.mean.cpu()


def save(folder, model, tokenizer, state=None):
    """The body as any model's checkpoint, the head in its state."""
    head = {"weight": model.head.weight.detach().cpu(), "mean": model.mean.cpu()}
    checkpoint.save(folder, model.gpt, tokenizer, {**(state or {}), "reward_head": head})


def load(folder):
    """The run folder of a reward model -> (RewardModel, tokenizer). UserError if it holds something else."""
    gpt, tokenizer, state = checkpoint.load(folder)
    return with_head(gpt, state, folder), tokenizer


def load_matching(folder, tokenizer):
    """As `load`, for use on another model's ids: the RewardModel alone. UserError if its tokenizer is another."""
    model, its_tokenizer = load(folder)
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder} has another tokenizer than the policy. Train it from the same SFT model.")
    return model


def with_head(gpt, state, folder):
    """A body and the head that `save` put into its state -> RewardModel. UserError if there is none."""
    if "reward_head" not in state:
        raise UserError(
            f"{folder} holds a language model, not a reward model. Train one: "
            "python -m experiments.frontier.baselines.reward_model --data toy --init runs/sft --out runs/reward"
        )
    model = RewardModel(gpt)
    with torch.no_grad():
        model.head.weight.copy_(state["reward_head"]["weight"])
        model.mean.copy_(state["reward_head"]["mean"])
    return model


def of_texts(model, tokenizer):
    """The reward model as a callable on texts, `reward(prompts, responses) -> list of floats`.

    Texts are encoded again, each counts as ended, and one that is too long loses its prompt's left, as in training.
    """

    def reward(prompts, responses):
        rows = []
        for texts in zip(prompts, responses, strict=True):
            prompt, response = map(tokenizer.encode, texts)
            prompt, (response,), *_ = dataset.fit(prompt, [response], [True], tokenizer.eot, model.config.block_size)
            rows.append((prompt, response))
        return model.score(*zip(*rows, strict=True), progress="reward model").tolist() if rows else []

    return reward


@dataclasses.dataclass
class Settings(PairSettings):
    pass


def bradley_terry_loss(chosen_rewards, rejected_rewards):
    """Equation (2), pair by pair: (B,), (B,) -> (B,)."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def measure(model, rows, indices, settings):
    """The metrics of the pairs `indices`, each (B,), by name; "loss" with its gradient."""
    batch = dataset.preference_batch([rows[i] for i in indices], settings.device)
    with autocast(settings.device, settings.dtype):
        chosen, rejected = model(batch.chosen), model(batch.rejected)
    return {
        "loss": bradley_terry_loss(chosen, rejected),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected) + 0.5 * (chosen == rejected),  # a tie is half a win
    }


def train(model, rows, settings, on_step=None, state=None):
    """Trains a RewardModel in place on rows of (prompt_ids, chosen_ids, rejected_ids); on_step and state as in `fit`.

    Then sets `mean`, so that the scores of all responses in `rows` have the mean 0.
    """
    fit(model, rows, partial(pair_step, measure), settings, on_step, state)
    means = pair_means(measure, model, rows, settings)
    model.mean.fill_((means["eval/rewards/chosen"] + means["eval/rewards/rejected"]) / 2)


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0], sets=SETS)
    begun = start(settings)
    folder, gpt, tokenizer, state, rows, held_out = begun
    prompts = prompts_of(held_out or rows, settings.samples)
    if "before" not in state:
        sampling = torch.Generator(settings.device).manual_seed(settings.seed)
        state["before"] = generate(gpt, prompts, settings.sample_tokens, tokenizer.eot, generator=sampling)

    model = with_head(gpt, state, settings.out) if settings.resume else RewardModel(gpt)
    record(begun, model, train, partial(pair_means, measure), save, settings)
    save(settings.out, model, tokenizer, state)

    notes = [f"Reward model on {len(rows):,} pairs of {settings.data} from {settings.init}."]
    if held_out:
        accuracy = pair_means(measure, model, held_out, settings)["eval/rewards/accuracies"]
        notes.append(f"It prefers the chosen in {accuracy:.1%} of {len(held_out):,} held-out pairs.")
        print(notes[-1])
    columns = {
        "prompt": [tokenizer.decode(prompt) for prompt in prompts],
        "response of the model it started from": [tokenizer.decode(response) for response in state["before"]],
        "reward": [f"{reward:.2f}" for reward in model.score(prompts, state["before"]).tolist()],
    }
    folder.finish(columns, notes)


if __name__ == "__main__":
    run_main(main)
