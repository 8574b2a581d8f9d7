"""Reward and KL of a policy against its reference, on held-out prompts.

    python -m experiments.evaluate --policy runs/toy/dpo --reference runs/toy/sft --data toy --reward toy

Both models complete the same prompts at temperature 1, without top-k or top-p. KL(policy || reference), in nats per
response, is an expectation over responses of the policy. It is therefore computed on the token ids that the policy
sampled: not on dataset pairs, and not on the text encoded again. There are two estimators, both unbiased:

    kl         mean of  sum_t log pi(y_t|s_t) - log pi_ref(y_t|s_t)     over samples y; s_t is the prompt and y_<t
    kl_exact   mean of  sum_t KL( pi(.|s_t) || pi_ref(.|s_t) )          over the same samples

Which one to trust: report `kl_exact` for a single policy. At each position it sums over the whole vocabulary, where
`kl` takes the one token that was sampled, so its standard error is smaller. Beside a reward of the same samples, as in
docs/frontier.md, use the noisier `kl`. If chance makes the reward of the samples too high, it also makes their `kl` too
high: the point moves along the limit, hardly away from it.
"""

import dataclasses
import json
import random
from collections import Counter

import torch

from data.toy_sentiment.grammar import grammatical
from experiments.common import by_length, load_models, prompt_ids, prompt_mean_se, read_prompts, sample
from experiments.rewards import load_reward
from minidpo.device import DEVICES, pick_device
from minidpo.files.writing import atomic_write, claim
from minidpo.report import samples_table
from minidpo.settings import knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    policy: str = knob(dataclasses.MISSING, "the model to evaluate: a run folder, a GPT-2 folder or name")
    reference: str = knob(dataclasses.MISSING, "the model to compare it with, usually the one it was trained from")
    data: str = knob(dataclasses.MISSING, 'a dataset name (its held-out prompts) or a JSONL file with "prompt"')
    reward: str = knob(dataclasses.MISSING, "toy, or the file of a trained classifier")
    limit: int = knob(500, "use only the first N prompts; 0: all")
    samples_per_prompt: int = knob(1, "completions of each prompt", least=1)
    max_new_tokens: int = knob(64, "longest completion, in tokens", least=1)
    batch_size: int = knob(128, "completions at a time, in sampling and for the KL", least=1)
    show: int = knob(10, "print the completions of the first N prompts, side by side")
    seed: int = knob(0, "seed of the sampling")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    json: str = knob("", "write the numbers to this file")


@torch.no_grad()
def sequence_kl(policy, reference, prompts, samples, batch_size=128, progress=None):
    """Both estimators of the KL for each sample, in nats -> (kl (N,), kl_exact (N,)), float64.

    prompts and samples are N lists of ids, as `generate` takes and returns them.
    """
    policy.eval(), reference.eval()
    plain, exact = torch.empty(2, len(prompts), dtype=torch.float64)
    for indices, batch in by_length(prompts, samples, policy.wte.weight.device, batch_size, progress):
        log_pi = policy(batch.ids).log_softmax(-1)  # (B, T, V)
        log_ratio = log_pi - reference(batch.ids).log_softmax(-1)
        at_sample = log_ratio.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)  # (B, T)
        in_full = (log_pi.exp() * log_ratio).sum(-1)  # (B, T)
        mask = batch.mask.cpu()  # sums are taken on the CPU, because MPS has no float64
        plain[indices] = (at_sample.cpu().double() * mask).sum(-1)
        exact[indices] = (in_full.cpu().double() * mask).sum(-1)
    return plain, exact


def repeated_ngrams(samples, n=4):
    """The share of n-grams of ids that occurred earlier in the same sample, over all samples."""
    total = repeated = 0
    for ids in samples:
        grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
        total += grams.total()
        repeated += grams.total() - len(grams)
    return repeated / max(1, total)


def describe(samples, rewards, per_prompt, toy):
    """Figures of one model's `Samples` by name. On the toy, its grammar says which samples are grammatical."""
    n = len(rewards)
    mean, se = prompt_mean_se(rewards, per_prompt)
    figures = {
        "reward_mean": mean,
        "reward_se": se,
        "reward_sd": torch.tensor(rewards, dtype=torch.float64).std().item(),
        "positive": sum(r > 0 for r in rewards) / n,
        "length_mean": sum(map(len, samples.ids)) / n,
        "ended": sum(samples.ended) / n,
        "repeated_4grams": repeated_ngrams(samples.ids),
    }
    if toy:
        reviews = [prompt + text for prompt, text in zip(samples.prompts, samples.texts, strict=True)]
        figures["grammatical"] = sum(map(grammatical, reviews)) / n
    return figures


def evaluate(policy, reference, tokenizer, prompts, reward, settings):
    """Samples both models and compares them -> (numbers by name, prompts, {"policy": texts, "reference": texts}).

    figures["reference"] holds those of the reference's own samples. Prompts are repeated `samples_per_prompt` times.
    """
    per_prompt = settings.samples_per_prompt
    ids = prompt_ids(tokenizer, prompts, settings.max_new_tokens, policy, reference)
    what, how = (tokenizer, prompts, settings.max_new_tokens), dict(ids=ids, batch_size=settings.batch_size)
    other_seed = random.Random(f"reference {settings.seed}").getrandbits(63)  # so that the samples are independent
    ours = sample(policy, *what, settings.seed, per_prompt, **how, progress="sampling policy")
    theirs = sample(reference, *what, other_seed, per_prompt, **how, progress="sampling reference")
    rewards, reference_rewards = (reward(samples.prompts, samples.texts) for samples in (ours, theirs))
    figures = describe(ours, rewards, per_prompt, settings.reward == "toy")
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(rewards, reference_rewards, strict=True)]
    figures["win_rate"] = sum(wins) / len(wins)
    plain, exact = sequence_kl(policy, reference, ours.prompt_ids, ours.ids, settings.batch_size, progress="KL")
    figures["kl"], figures["kl_se"] = prompt_mean_se(plain, per_prompt)
    figures["kl_exact"], figures["kl_exact_se"] = prompt_mean_se(exact, per_prompt)
    figures["samples"] = len(wins)
    figures["reference"] = describe(theirs, reference_rewards, per_prompt, settings.reward == "toy")
    return figures, ours.prompts, {"policy": ours.texts, "reference": theirs.texts}


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    claim(settings.json)
    device = pick_device(settings.device)
    reward = load_reward(settings.reward)
    (policy, reference), tokenizer = load_models(settings.policy, settings.reference, device=device)
    prompts = read_prompts(settings.data, limit=settings.limit)
    figures, prompts, texts = evaluate(policy, reference, tokenizer, prompts, reward, settings)

    if settings.show:
        n = settings.show * settings.samples_per_prompt
        columns = {"prompt": prompts[:n], "reference": texts["reference"][:n], "policy": texts["policy"][:n]}
        print("\n" + samples_table(columns))
    print(f"{'':16}{'reference':>12}{'policy':>12}   {figures['samples']} samples")
    for name, value in figures.items():
        if isinstance(value, float):
            other = figures["reference"].get(name)
            print(f"{name:16}{'' if other is None else format(other, '.3f'):>12}{value:12.3f}")
    gain, sd = figures["reward_mean"] - figures["reference"]["reward_mean"], figures["reference"]["reward_sd"]
    if sd:
        print(f"the mean reward rose by {gain / sd:.2f} standard deviations of the reference's reward")
    if settings.json:
        atomic_write(settings.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
