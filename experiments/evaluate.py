"""How much reward, at what distance: a policy against its reference, on held-out prompts.

    python -m experiments.evaluate --policy runs/dpo --reference runs/sft --data toy --reward toy --json eval.json

Both models complete the same prompts at temperature 1, from the whole distribution. KL(policy || reference), in nats a
response, is an expectation under the policy, so it is taken on the policy's samples, on the very ids that were drawn
(text encoded again may give others), never on dataset pairs. Two estimators, both without bias:

    kl         mean of  sum_t log pi(y_t|s_t) - log pi_ref(y_t|s_t)         over samples y
    kl_exact   mean of  sum_t KL( pi(.|s_t) || pi_ref(.|s_t) )              over samples y, s_t the prompt and y_<t

The second sums the KL over the vocabulary at each place exactly, and leaves to chance only which places are visited.
"""

import dataclasses
import json
from collections import Counter

import torch
from tqdm import tqdm

import data
from experiments.rewards import load_reward
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, pick_device
from minidpo.files import atomic_write
from minidpo.report import samples_table
from minidpo.sampling import generate
from minidpo.settings import UserError, knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    policy: str = knob(dataclasses.MISSING, "the model to judge: a run folder, a GPT-2 folder or name")
    reference: str = knob(dataclasses.MISSING, "the model to compare it with, as a rule the one it was trained from")
    data: str = knob(dataclasses.MISSING, 'a dataset name (its held-out prompts) or a JSONL file with "prompt"')
    reward: str = knob(dataclasses.MISSING, "toy, or the file of a trained classifier")
    limit: int = knob(500, "use the first so many prompts; 0: all")
    samples_per_prompt: int = knob(1, "completions of each prompt", least=1)
    max_new_tokens: int = knob(64, "longest completion, in tokens", least=1)
    batch_size: int = knob(128, "completions scored at once", least=1)
    show: int = knob(10, "completions to print, the first ones, side by side")
    seed: int = knob(0, "of the sampling")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    json: str = knob("", "write the figures to this file")


@torch.no_grad()
def sequence_kl(policy, reference, prompts, samples, batch_size=128, progress=None):
    """Both estimators for each sample: lists of ids -> (plain (N,), exact (N,)), in nats, float64.

    prompts and samples as `generate` takes and gives them. Both models are evaluated without dropout, in the precision
    of their weights.
    """
    policy.eval(), reference.eval()
    rows = list(zip(prompts, samples, strict=True))
    plain, exact = torch.empty(2, len(rows), dtype=torch.float64)
    device = policy.wte.weight.device
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]) + len(samples[i]))  # similar lengths: little padding
    for i in tqdm(range(0, len(rows), batch_size), desc=progress, unit="batch", disable=progress is None):
        indices = order[i : i + batch_size]
        batch = dataset.sft_batch([rows[j] for j in indices], device)
        log_pi = policy(batch.ids).log_softmax(-1)  # (B, T, V)
        log_ratio = log_pi - reference(batch.ids).log_softmax(-1)
        at_sample = log_ratio.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)  # (B, T)
        in_full = (log_pi.exp() * log_ratio).sum(-1)  # (B, T)
        mask = batch.mask.cpu()  # where there is float64, unlike on MPS
        plain[indices] = (at_sample.cpu().double() * mask).sum(-1)
        exact[indices] = (in_full.cpu().double() * mask).sum(-1)
    return plain, exact


def mean_se(values):
    """Mean of independent values (N,) and its standard error. UserError for a single value: it has no spread."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 2:
        raise UserError("one prompt has no standard error. Give at least two.")
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def prompt_mean_se(values, per_prompt):
    """As `mean_se` where each `per_prompt` neighbours share a prompt, so that only prompts are independent."""
    return mean_se(torch.as_tensor(values, dtype=torch.float64).view(-1, per_prompt).mean(-1))


def repeated_ngrams(samples, n=4):
    """Share of a sample's n-grams of ids that occurred before in the same sample, over all samples."""
    total = repeated = 0
    for ids in samples:
        grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
        total += grams.total()
        repeated += grams.total() - len(grams)
    return repeated / max(1, total)


def describe(prompts, texts, samples, rewards, settings, eot):
    """What can be said of one model's samples by themselves."""
    mean, se = prompt_mean_se(rewards, settings.samples_per_prompt)
    figures = {
        "reward_mean": mean,
        "reward_se": se,
        "reward_sd": torch.tensor(rewards, dtype=torch.float64).std().item(),
        "positive": sum(r > 0 for r in rewards) / len(rewards),
        "length_mean": sum(len(ids) for ids in samples) / len(samples),
        "ended": sum(ids[-1] == eot for ids in samples) / len(samples),
        "repeated_4grams": repeated_ngrams(samples),
    }
    if settings.reward == "toy":
        from data.toy_sentiment.grammar import grammatical

        figures["grammatical"] = sum(grammatical(p + t) for p, t in zip(prompts, texts, strict=True)) / len(texts)
    return figures


def evaluate(policy, reference, tokenizer, prompts, reward, settings):
    """All figures as a dict, those of the reference's own samples under "reference", and both lists of texts."""
    device = policy.wte.weight.device
    prompts = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
    ids = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
    samples, texts, rewards = {}, {}, {}
    for name, model in (("policy", policy), ("reference", reference)):
        generator = torch.Generator(device).manual_seed(settings.seed)
        samples[name] = generate(
            model, ids, settings.max_new_tokens, tokenizer.eot, generator=generator, progress=f"sampling {name}"
        )
        texts[name] = [tokenizer.decode(sample) for sample in samples[name]]
        rewards[name] = reward(prompts, texts[name])
    own, other = (
        describe(prompts, texts[name], samples[name], rewards[name], settings, tokenizer.eot)
        for name in ("policy", "reference")
    )
    plain, exact = sequence_kl(policy, reference, ids, samples["policy"], settings.batch_size, progress="KL")
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(rewards["policy"], rewards["reference"], strict=True)]
    figures = {**own, "win_rate": sum(wins) / len(wins)}
    figures["kl"], figures["kl_se"] = prompt_mean_se(plain, settings.samples_per_prompt)
    figures["kl_exact"], figures["kl_exact_se"] = prompt_mean_se(exact, settings.samples_per_prompt)
    return {**figures, "samples": len(prompts), "reference": other}, prompts, texts


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    device = pick_device(settings.device)
    reward = load_reward(settings.reward)
    policy, tokenizer, _ = checkpoint.load(settings.policy)
    reference, reference_tokenizer, _ = checkpoint.load(settings.reference)
    if tokenizer.fingerprint != reference_tokenizer.fingerprint:
        raise UserError(f"{settings.policy} and {settings.reference} have different tokenizers: no KL between them.")
    records = dataset.read_jsonl(data.find(settings.data, "prompts_test"), ("prompt",))
    prompts = [record["prompt"] for record in records][: settings.limit or None]
    figures, prompts, texts = evaluate(policy.to(device), reference.to(device), tokenizer, prompts, reward, settings)

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
