"""Preference pairs from a model's own samples, as in the paper's sentiment experiment (section 6).

    python -m experiments.make_pairs --policy runs/toy/sft --prompts toy --reward toy --out runs/pairs.jsonl

For each prompt, K completions are sampled at temperature 1, without top-k or top-p, and scored by a reward. All
K (K - 1) / 2 pairs are written, except pairs of equal texts and ties under hard labels. There are two kinds of labels:

    hard   The completion with the higher reward is chosen, as in the paper's IMDb experiment. Such labels are never
           wrong, so a larger margin always lowers the DPO loss.
    bt     The label is drawn from the Bradley-Terry model with the reward (Eq. 1). With hard labels DPO does not
           converge to the optimum of Eq. 4; with these it does.
"""

import dataclasses
import itertools
import json
import math
import random
import statistics
from collections import Counter

import torch

from experiments.common import load_models, read_prompts, sample
from experiments.rewards import load_reward
from minidpo.device import DEVICES, pick_device
from minidpo.files.writing import atomic_write, new_file
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    policy: str = knob(dataclasses.MISSING, "the model to sample from: a run folder, a GPT-2 folder or name")
    prompts: str = knob(dataclasses.MISSING, 'a dataset name (its training prompts) or a JSONL file with "prompt"')
    reward: str = knob(dataclasses.MISSING, "toy, or the file of a trained classifier")
    out: str = knob(dataclasses.MISSING, "the JSONL file to write: prompt, chosen, rejected")
    k: int = knob(4, "completions per prompt; all pairs of them are written", least=2)
    labels: str = knob("hard", "hard (the higher reward wins) or bt (drawn from Bradley-Terry)", choices=("hard", "bt"))
    limit: int = knob(0, "use only the first N prompts; 0: all")
    max_new_tokens: int = knob(64, "longest completion, in tokens", least=1)
    batch_size: int = knob(256, "completions sampled at once", least=1)
    seed: int = knob(0, "seed of the sampling and of the drawn labels")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    overwrite: bool = knob(False, "replace --out if it exists")


def label(reward_a, reward_b, labels, generator):
    """True if a is chosen, False if b, None for a tie under hard labels."""
    if labels == "hard":
        return None if reward_a == reward_b else reward_a > reward_b
    p = 1 / (1 + math.exp(min(700.0, reward_b - reward_a)))  # Eq. 1; exp overflows beyond 709
    return torch.rand((), generator=generator, dtype=torch.float64).item() < p


def pairs_of(prompt, completions, labels, generator, counts):
    """Yields the labelled pairs among one prompt's completions (text, ended, reward), and counts what it drops."""
    for both in itertools.combinations(completions, 2):
        (a, _, reward_a), (b, _, reward_b) = both
        if a == b:
            counts["dropped: equal texts"] += 1
            continue
        a_wins = label(reward_a, reward_b, labels, generator)
        if a_wins is None:
            counts["dropped: ties"] += 1
            continue
        counts["the lower reward chosen"] += (reward_a > reward_b) != a_wins and reward_a != reward_b
        (chosen, chosen_ended, _), (rejected, rejected_ended, _) = both if a_wins else both[::-1]
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for name, ended in (("chosen_ended", chosen_ended), ("rejected_ended", rejected_ended)):
            if not ended:  # cut at max_new_tokens: training must not add an eot
                pair[name] = False
        yield pair


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    out = new_file(settings.out, settings.overwrite)
    device = pick_device(settings.device)
    reward = load_reward(settings.reward)
    (model,), tokenizer = load_models(settings.policy, device=device)
    prompts = read_prompts(settings.prompts, "prompts_train", settings.limit)
    how = settings.max_new_tokens, settings.seed, settings.k
    samples = sample(model, tokenizer, prompts, *how, batch_size=settings.batch_size, progress="sampling")
    rewards = reward(samples.prompts, samples.texts)

    counts, lines = Counter(), []
    labelling = torch.Generator().manual_seed(random.Random(f"labels {settings.seed}").getrandbits(63))
    completions = list(zip(samples.texts, samples.ended, rewards, strict=True))
    for i, prompt in enumerate(prompts):
        group = completions[i * settings.k : (i + 1) * settings.k]
        for pair in pairs_of(prompt, group, settings.labels, labelling, counts):
            lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"no usable pair from {len(prompts)} prompts: {dict(counts)}. Nothing was written.")
    atomic_write(out, "".join(lines))
    print(f"{out}: {len(lines):,} pairs from {len(prompts):,} prompts x {settings.k} completions")
    ended = sum(samples.ended) / len(samples.ended)
    print(f"{ended:.1%} ended, reward {statistics.mean(rewards):.2f}, SD {statistics.pstdev(rewards):.2f}")
    print(", ".join(f"{name}: {n:,}" for name, n in counts.items()))


if __name__ == "__main__":
    run_main(main)
