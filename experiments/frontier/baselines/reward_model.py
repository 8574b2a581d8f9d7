"""A reward model: a number for each response, learned from preferences. Best-of-N and PPO maximise it.

    python -m experiments.frontier.baselines.reward_model --data toy --init runs/toy/sft --out runs/reward

It is the SFT model with a scalar head in place of the vocabulary. Under Bradley-Terry the chosen response wins with
probability sigmoid( r(x, y_w) - r(x, y_l) ) (Eq. 1 of Rafailov et al. 2023), so the loss is its negative
log-likelihood:

    L(r)  =  -E[ log sigmoid( r(x, y_w) - r(x, y_l) ) ]                                                         (2)

This is DPO's loss (7) with r in place of beta log pi/pi_ref: DPO trains a reward model as well, one that is a policy.

Equation (2) leaves open what depends on the prompt alone. The paper sets the mean of every prompt to 0 (section 3).
That changes neither the best of N responses nor the optimal policy, so here one number is enough: `score` subtracts the
mean over all training responses. A difference of rewards is a log-odds of Bradley-Terry, in nats.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import train_dpo
from experiments.frontier.baselines import fit
from minidpo import checkpoint, dataset
from minidpo.device import autocast
from minidpo.optim import OPTIMIZERS, learning_rate, make_optimizer, set_learning_rate
from minidpo.run import Run, RunSettings, place
from minidpo.sampling import generate
from minidpo.settings import UserError, knob, parse_settings, run_main

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
        rows = list(zip(prompts, responses, strict=True))
        rewards = torch.empty(len(rows), dtype=self.head.weight.dtype)
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))  # similar lengths: little padding
        for i in tqdm(range(0, len(rows), batch_size), desc=progress, unit="batch", disable=progress is None):
            indices = order[i : i + batch_size]
            rewards[indices] = self(dataset.sft_batch([rows[j] for j in indices], self.head.weight.device)).cpu()
        self.train(was_training)
        return rewards - self.mean.cpu()


def head_of(model):
    """What a checkpoint holds of the head: the tensors themselves, which training changes in place."""
    return {"weight": model.head.weight.detach(), "mean": model.mean}


def save(folder, model, tokenizer):
    checkpoint.save(folder, model.gpt, tokenizer, {"reward_head": head_of(model)})


def load(folder, policy_tokenizer=None):
    """Returns (RewardModel, its tokenizer). Raises UserError for another kind of model, or another tokenizer."""
    gpt, tokenizer, state = checkpoint.load(folder)
    model = with_head(gpt, state, folder)
    if policy_tokenizer and policy_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder} has another tokenizer than the policy. Train it from the same SFT model.")
    return model, tokenizer


def with_head(gpt, state, folder):
    if "reward_head" not in state:
        raise UserError(
            f"{folder} holds a language model, not a reward model. Train one: "
            "python -m experiments.frontier.baselines.reward_model --data toy --init runs/toy/sft --out runs/reward"
        )
    model = RewardModel(gpt)
    for name, tensor in head_of(model).items():
        tensor.copy_(state["reward_head"][name])
    return model


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


# ---- 2. Settings ----

SETS = {name: {k: v for k, v in values.items() if k != "beta"} for name, values in train_dpo.SETS.items()}
SETS["toy"] |= {"lr": 2e-3, "batch_size": 32}  # at DPO's rate, a new head learns nothing from a third of the pairs


@dataclasses.dataclass
class Settings(RunSettings):
    data: str = knob(dataclasses.MISSING, "toy, imdb, hh, tldr, or a JSONL file with prompt, chosen, rejected")
    init: str = knob(dataclasses.MISSING, "the SFT model to start from: a run folder, a GPT-2 folder or name")
    out: str = knob(dataclasses.MISSING, "the run folder to write")
    settings: str = knob("", "named set of training settings; empty: the one of --data", choices=("", *SETS))
    optimizer: str = knob("rmsprop", "rmsprop, adamw, or sgd with momentum", choices=OPTIMIZERS)
    lr: float = knob(1e-6, "learning rate after the warm-up")
    warmup_steps: int = knob(150, "optimiser steps over which the learning rate rises")
    decay: bool = knob(False, "let the learning rate fall linearly to 0 after the warm-up")
    grad_clip: float = knob(10.0, "largest L2 norm of the gradient")


# ---- 3. Training. pairs: a list of (prompt_ids, chosen_ids, rejected_ids) ----


def bradley_terry_loss(chosen_rewards, rejected_rewards):
    """Equation (2), pair by pair: (B,), (B,) -> (B,)."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def measure(model, pairs, indices, settings):
    """Returns the metrics of the pairs `indices`, each (B,), by name."""
    batch = dataset.preference_batch([pairs[i] for i in indices], settings.device)
    with autocast(settings.device, settings.dtype):
        chosen, rejected = model(batch.chosen), model(batch.rejected)
    return {
        "loss": bradley_terry_loss(chosen, rejected),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected) + 0.5 * (chosen == rejected),  # a tie is half a win
    }


def means_of(parts):
    """A list of what `measure` returns -> the means over all pairs, by name."""
    return {name: torch.cat([part[name].detach() for part in parts]).mean().item() for name in parts[0]}


def train_step(model, optimizer, pairs, indices, settings):
    """One optimiser step on the pairs `indices`. Returns the metrics from before the update, by name."""
    parts = []
    for micro in settings.cut([indices], pairs):
        parts.append(measure(model, pairs, micro, settings))
        (parts[-1]["loss"].sum() / len(indices)).backward()  # the mean over the pairs of the step
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    metrics = {**means_of(parts), "grad_norm": grad_norm.item()}
    if not all(map(math.isfinite, metrics.values())):
        raise UserError(f"not a finite number in {metrics}\nin the batch of usable pairs {sorted(indices)}, from 0.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


@torch.no_grad()
def evaluate(model, pairs, settings):
    """Returns the metrics on all of `pairs`, by name."""
    model.eval()
    batches = settings.cut(dataset.batches(pairs, settings.batch_size, seed=0, epoch=0), pairs)
    means = means_of([measure(model, pairs, indices, settings) for indices in batches])
    return {"eval/" + name: mean for name, mean in means.items()}


def centre(model, pairs, settings):
    """Sets `mean` so that the scores of all responses in `pairs` have the mean 0."""
    prompts, chosen, rejected = map(list, zip(*pairs, strict=True))
    model.mean.zero_()  # `score` subtracts it
    size = settings.micro_batch_size or settings.batch_size
    model.mean.copy_(model.score(prompts * 2, chosen + rejected, size).mean())


def train(model, pairs, settings, on_step=None):
    fit(model, pairs, train_step, settings, on_step)
    centre(model, pairs, settings)


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0], sets=SETS)
    run = Run(settings, "reward model")
    gpt, tokenizer, saved = run.load()
    place(gpt, settings)
    gpt.prepare(settings.compile, settings.recompute)
    max_length = min(settings.max_length or gpt.config.block_size, gpt.config.block_size)
    split = data.find_split("pairs", settings.data, settings.eval_data)
    pairs, held_out = dataset.load_split(split, dataset.PAIR, tokenizer, max_length)
    run.plan(pairs, saved, pairs, held_out)
    prompts = dataset.first_prompts(held_out or pairs, settings.samples)
    if settings.resume:
        model, before = with_head(gpt, saved, run.path), saved["before"]
    else:
        sampling = torch.Generator(settings.device).manual_seed(settings.seed)
        before = generate(gpt, prompts, settings.sample_tokens, tokenizer.eot, generator=sampling)
        model = RewardModel(gpt)
    optimizer = make_optimizer(model, settings.optimizer, settings.lr)
    if settings.resume:
        optimizer.load_state_dict(saved["optimizer"])

    with run.training(gpt, tokenizer, optimizer, before=before, reward_head=head_of(model)) as steps:
        for step, indices in steps:
            model.train()
            lr = learning_rate(step, run.total_steps, settings.lr, settings.warmup_steps, settings.decay)
            set_learning_rate(optimizer, lr)
            metrics = train_step(model, optimizer, pairs, indices, settings)
            metrics |= {"lr": lr, **run.speed(pairs=len(indices))}
            if held_out and run.evaluates_after(step):
                metrics |= evaluate(model, held_out, settings)
            run.log(step, metrics)
            if step + 1 == run.last_step:
                centre(model, pairs, settings)

    notes = [f"Reward model on {len(pairs):,} pairs of {settings.data} from {settings.init}."]
    if held_out:
        accuracy = evaluate(model, held_out, settings)["eval/rewards/accuracies"]
        notes.append(f"It prefers the chosen in {accuracy:.1%} of {len(held_out):,} held-out pairs.")
        print(notes[-1])
    columns = {
        "prompt": [tokenizer.decode(prompt) for prompt in prompts],
        "response of the model it started from": [tokenizer.decode(response) for response in before],
        "reward": [f"{reward:.2f}" for reward in model.score(prompts, before).tolist()],
    }
    run.finish(columns, notes)


if __name__ == "__main__":
    run_main(main)
