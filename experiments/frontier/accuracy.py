r"""How often is the implicit reward right? Accuracy on held-out pairs, next to rewards learned, true and naive.

    python -m experiments.frontier.accuracy --policy runs/toy/dpo --reference runs/toy/sft \
        --reward-model runs/frontier/toy/reward_model_0 --data toy --reward toy

Each reward prefers one response of each held-out pair, and is right if that one was chosen. A tie is half right.

    implicit reward     log pi(y|x) - log pi_ref(y|x), of --policy (Eq. 5 of Rafailov et al. 2023, without beta and Z)
    reward model        learned from pairs by Bradley-Terry (experiments.frontier.baselines.reward_model)
    true reward         the labels were drawn by it. With noisy labels no reward can be expected to be right more often
    reference log-prob  log pi_ref(y|x): the likelier response, before anything was learned from preferences
    longer wins         the response with more tokens
"""

import dataclasses
import json

import torch

import data
import train_dpo
from experiments import common
from experiments.frontier.baselines import reward_model
from experiments.rewards import load_reward
from minidpo import dataset
from minidpo.device import DEVICES, pick_device
from minidpo.files.writing import atomic_write, claim
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    policy: str = knob(dataclasses.MISSING, "the DPO run whose implicit reward is judged: a run folder")
    reference: str = knob(dataclasses.MISSING, "the model that it was trained from: a run or GPT-2 folder, or a name")
    reward_model: str = knob(dataclasses.MISSING, "run folder of a reward model")
    data: str = knob(dataclasses.MISSING, "a dataset name (its held-out pairs), or a JSONL file of pairs")
    reward: str = knob("", "the true reward: toy, or the file of a trained classifier; empty: none is known")
    batch_size: int = knob(128, "pairs in a forward pass", least=1)
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    json: str = knob("", "write the numbers to this file")


def accuracy(scores, prompts):
    """How often the chosen response scores higher, ties one half -> {"accuracy", "se", "ties"}, shares of the pairs.

    scores (N, 2): of the chosen and the rejected response. Pairs that share one of the N `prompts` are not independent,
    so the error of the mean is the cluster-robust one, over prompts.
    """
    chosen, rejected = scores.unbind(-1)
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    if len(number) < 2:
        raise UserError("pairs of one prompt have no standard error. Give pairs of at least two.")
    mean = right.mean()
    which = torch.tensor([number[prompt] for prompt in prompts])
    off = torch.zeros(len(number), dtype=torch.float64).index_add(0, which, right - mean)  # of each prompt, summed
    se = (off.square().sum() * len(number) / (len(number) - 1)).sqrt() / len(right)
    return {"accuracy": mean.item(), "se": se.item(), "ties": (chosen == rejected).double().mean().item()}


def scores_of(pairs, policy, reference, reward, tokenizer, true_reward, batch_size):
    """Returns what each reward says of `pairs`, token rows: {name: (N, 2), of the chosen and the rejected response}.

    true_reward(prompts, responses) gets the same tokens as text. It may be None.
    """
    prompts, *sides = zip(*pairs, strict=True)
    device = str(policy.wte.weight.device)
    settings = train_dpo.Settings(data="", init="", out="", batch_size=batch_size, device=device, dtype="float32")
    log_ref = train_dpo.all_logps(reference, pairs, settings, "reference")
    log_pi = train_dpo.all_logps(policy, pairs, settings, "policy")
    learned = [reward.score(prompts, side, batch_size, "reward model") for side in sides]
    scores = {"implicit reward": log_pi - log_ref, "reward model": torch.stack(learned, dim=-1)}
    if true_reward:
        texts = [tokenizer.decode(prompt[1:]) for prompt in prompts]
        both = [true_reward(texts, [tokenizer.decode(ids) for ids in side]) for side in sides]
        scores["true reward"] = torch.tensor(both, dtype=torch.float64).T
    lengths = [[len(chosen), len(rejected)] for _, chosen, rejected in pairs]
    return {**scores, "reference log-prob": log_ref, "longer wins": torch.tensor(lengths)}


def main():
    settings = parse_settings(Settings, __doc__)
    claim(settings.json)
    device = pick_device(settings.device)
    true_reward = load_reward(settings.reward) if settings.reward else None
    (policy, reference), tokenizer = common.load_models(settings.policy, settings.reference, device=device)
    reward = reward_model.load(settings.reward_model, tokenizer)[0].to(device)
    max_length = min(model.config.block_size for model in (policy, reference, reward))
    pairs = dataset.load_rows(data.find(settings.data, "pairs_test"), dataset.PAIR, tokenizer, max_length)

    scores = scores_of(pairs, policy, reference, reward, tokenizer, true_reward, settings.batch_size)
    prompts = [tuple(prompt) for prompt, *_ in pairs]
    figures = {name: accuracy(both, prompts) for name, both in scores.items()}
    print(f"{'':20}{'accuracy':>10}{'error':>8}{'ties':>8}   {len(pairs):,} pairs of {len(set(prompts)):,} prompts")
    for name, f in figures.items():
        print(f"{name:20}{f['accuracy']:10.1%}{f['se']:8.1%}{f['ties']:8.1%}")
    if settings.json:
        atomic_write(settings.json, json.dumps({"pairs": len(pairs), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
