"""Preference pairs from a model's own samples, as in the paper's sentiment experiment (section 6).

    python -m experiments.make_pairs --policy runs/sft --prompts toy --reward toy --out runs/pairs.jsonl

For each prompt K completions are sampled at temperature 1 from the whole distribution, scored by a reward, and all
K (K - 1) / 2 pairs are written. Labels: "hard", the higher reward is chosen (the paper's IMDb set-up; such labels are
never wrong, so the DPO loss has no finite minimum), or "bt", drawn from Bradley-Terry with the reward (Eq. 1: only for
these does the theory's optimum, Eq. 4, hold). A tie under hard labels, or two equal texts, is dropped and counted.
"""

import dataclasses
import itertools
import json
import math
from collections import Counter

import torch

import data
from experiments.rewards import load_reward
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, pick_device
from minidpo.files import atomic_write
from minidpo.sampling import generate
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    policy: str = knob(dataclasses.MISSING, "the model to sample from: a run folder, a GPT-2 folder or name")
    prompts: str = knob(dataclasses.MISSING, 'a dataset name (its training prompts) or a JSONL file with "prompt"')
    reward: str = knob(dataclasses.MISSING, "toy, or the file of a trained classifier")
    out: str = knob(dataclasses.MISSING, "the JSONL file to write: prompt, chosen, rejected")
    k: int = knob(4, "completions per prompt; all pairs of them are made", least=2)
    labels: str = knob("hard", "hard (the higher reward wins) or bt (drawn from Bradley-Terry)", choices=("hard", "bt"))
    limit: int = knob(0, "use the first so many prompts; 0: all")
    max_new_tokens: int = knob(64, "longest completion, in tokens", least=1)
    batch_size: int = knob(256, "completions sampled at once", least=1)
    seed: int = knob(0, "of the sampling and of the drawn labels")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    overwrite: bool = knob(False, "replace --out if it is there")


def label(reward_a, reward_b, labels, generator):
    """True if a is chosen, False if b, None for a tie under hard labels."""
    if labels == "hard":
        return None if reward_a == reward_b else reward_a > reward_b
    p = 1 / (1 + math.exp(min(700.0, reward_b - reward_a)))  # Eq. 1; exp overflows beyond 709
    return torch.rand((), generator=generator, dtype=torch.float64).item() < p


def pairs_of(prompt, completions, labels, generator, counts):
    """All pairs among one prompt's completions (text, ended, reward), labelled; what is dropped goes to `counts`."""
    for (a, a_ended, reward_a), (b, b_ended, reward_b) in itertools.combinations(completions, 2):
        if a == b:
            counts["dropped: equal texts"] += 1
            continue
        a_wins = label(reward_a, reward_b, labels, generator)
        if a_wins is None:
            counts["dropped: ties"] += 1
            continue
        counts["the lower reward chosen"] += (reward_a > reward_b) != a_wins and reward_a != reward_b
        (chosen, chosen_ended), (rejected, rejected_ended) = ((a, a_ended), (b, b_ended))[:: 1 if a_wins else -1]
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        # a completion that was cut at max_new_tokens did not end: training must not put an eot there
        if not chosen_ended:
            pair["chosen_ended"] = False
        if not rejected_ended:
            pair["rejected_ended"] = False
        yield pair


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    out = dataset.new_file(settings.out, settings.overwrite)
    device = pick_device(settings.device)
    reward = load_reward(settings.reward)
    model, tokenizer, _ = checkpoint.load(settings.policy)
    model.to(device)
    records = dataset.read_jsonl(data.find(settings.prompts, "prompts_train"), ("prompt",))
    prompts = [record["prompt"] for record in records][: settings.limit or None]

    repeated = [prompt for prompt in prompts for _ in range(settings.k)]
    ids = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in repeated]
    sampling = torch.Generator(device).manual_seed(settings.seed)
    samples = generate(
        model, ids, settings.max_new_tokens, tokenizer.eot,
        generator=sampling, batch_size=settings.batch_size, progress="sampling",
    )  # fmt: skip
    texts = [tokenizer.decode(sample) for sample in samples]
    ended = [sample[-1] == tokenizer.eot for sample in samples]
    rewards = reward(repeated, texts)

    counts, lines = Counter(), []
    labelling = torch.Generator().manual_seed(settings.seed)
    completions = list(zip(texts, ended, rewards, strict=True))
    for i, prompt in enumerate(prompts):
        group = completions[i * settings.k : (i + 1) * settings.k]
        for pair in pairs_of(prompt, group, settings.labels, labelling, counts):
            lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"no usable pair from {len(prompts)} prompts: {dict(counts)}. Nothing was written.")
    atomic_write(out, "".join(lines))
    mean = sum(rewards) / len(rewards)
    sd = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    print(f"{out}: {len(lines):,} pairs from {len(prompts):,} prompts x {settings.k} completions")
    print(", ".join([f"{sum(ended) / len(ended):.1%} ended", f"reward {mean:.2f}, SD {sd:.2f}"]))
    print(", ".join(f"{name}: {n:,}" for name, n in counts.items()))


if __name__ == "__main__":
    run_main(main)
