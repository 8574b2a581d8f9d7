"""Best-of-N: sample N responses from the SFT model, keep the one that a reward model likes best. Nothing is trained.

    python -m experiments.frontier.baselines.best_of_n --policy runs/sft --reward-model runs/reward --data toy

How far that is from the SFT model pi is known without its probabilities. Let F(y) be the share of pi's responses to x
whose learned reward is at most that of y. If no two responses tie, y is the best of N with N F(y)^(N-1) times its
probability under pi, and the F of the best is distributed as the largest of N uniform numbers, with E[log F] = -1/N:

    KL(best of N || pi)  =  E[ log N + (N-1) log F ]  =  log N - (N-1)/N

(Stiennon et al. 2020, arXiv 2009.01325, Appendix G.3). Responses are discrete and do tie, at the least with themselves,
and then it is an upper bound (Beirami et al. 2024, arXiv 2401.01879): loose where pi gives single responses much
probability. It grows as log N, hence `kl_bound` everywhere, never `kl`.

One batch of samples serves every smaller N: K samples of a prompt are cut into K / N groups, each with a best.
"""

import dataclasses
import json
import math
from types import SimpleNamespace

import torch

import data
from experiments.evaluate import describe
from experiments.frontier.baselines import reward_model
from experiments.rewards import load_reward
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, pick_device
from minidpo.files import atomic_write
from minidpo.report import samples_table
from minidpo.sampling import generate
from minidpo.settings import knob, parse_settings, run_main


@dataclasses.dataclass
class Settings:
    policy: str = knob(dataclasses.MISSING, "the SFT model to sample from: a run folder, a GPT-2 folder or name")
    reward_model: str = knob(dataclasses.MISSING, "run folder of the reward model that chooses")
    data: str = knob(dataclasses.MISSING, 'a dataset name (its held-out prompts) or a JSONL file with "prompt"')
    reward: str = knob(dataclasses.MISSING, "the true reward, to judge by: toy, or the file of a trained classifier")
    n: int = knob(64, "samples of each prompt; the best of 1, 2, 4, ... up to this many is reported", least=1)
    limit: int = knob(500, "use the first so many prompts; 0: all")
    max_new_tokens: int = knob(64, "longest completion, in tokens", least=1)
    batch_size: int = knob(256, "completions sampled at once", least=1)
    show: int = knob(5, "prompts to print, with one sample and the best of --n")
    seed: int = knob(0, "of the sampling")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    json: str = knob("", "write the figures to this file")
    overwrite: bool = knob(False, "replace --json if it is there")


def kl_bound(n):
    """Upper bound of KL(best of n || the policy sampled from), in nats a response."""
    return math.log(n) - (n - 1) / n


def best_of(scores, n):
    """Where the best of each group of n neighbours stands: scores (P, K) of K samples of P prompts -> (P, K // n).

    Places count within the K of a prompt. Of a tie the first is taken, which is as good as drawing lots. Samples left
    over where n does not divide K are not used.
    """
    P, K = scores.shape
    groups = K // n
    best = scores[:, : groups * n].reshape(P, groups, n).argmax(dim=-1)  # (P, groups): places within the group
    return best + n * torch.arange(groups, device=scores.device)


def sample(policy, model, prompts, k, max_new_tokens, eot, generator, batch_size=256):
    """k responses to each prompt, and what the reward model says of them.

    prompts: P lists of ids with their leading eot -> (samples, scores (P, k) on the CPU): the samples, lists of ids as
    `generate` gives them, P * k in all, those of a prompt next to one another.
    """
    repeated = [prompt for prompt in prompts for _ in range(k)]
    samples = generate(
        policy, repeated, max_new_tokens, eot, generator=generator, batch_size=batch_size, progress="sampling"
    )
    return samples, model.score(repeated, samples, batch_size, progress="scoring").view(-1, k)


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    if settings.json:
        dataset.new_file(settings.json, settings.overwrite)
    device = pick_device(settings.device)
    reward = load_reward(settings.reward)
    policy, tokenizer, _ = checkpoint.load(settings.policy)
    model = reward_model.load_matching(settings.reward_model, tokenizer)
    policy.to(device), model.to(device)
    records = dataset.read_jsonl(data.find(settings.data, "prompts_test"), ("prompt",))
    prompts = [record["prompt"] for record in records][: settings.limit or None]
    ids = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
    sampling = torch.Generator(device).manual_seed(settings.seed)
    samples, scores = sample(
        policy, model, ids, settings.n, settings.max_new_tokens, tokenizer.eot, sampling, settings.batch_size
    )

    texts = [tokenizer.decode(sample) for sample in samples]
    repeated = [prompt for prompt in prompts for _ in range(settings.n)]
    rewards = reward(repeated, texts)
    figures = []
    for n in (2**i for i in range(settings.n.bit_length())):
        places = best_of(scores, n)  # (P, groups)
        chosen = (places + settings.n * torch.arange(len(prompts))[:, None]).flatten().tolist()
        shape = SimpleNamespace(reward=settings.reward, samples_per_prompt=places.shape[1])
        columns = [[column[i] for i in chosen] for column in (repeated, texts, samples, rewards)]
        learned = scores.flatten()[chosen].mean().item()
        own = describe(*columns, shape, tokenizer.eot)
        figures.append({"n": n, "kl_bound": kl_bound(n), "learned_reward_mean": learned, **own})

    if settings.show:
        first = [texts[i * settings.n] for i in range(len(prompts))]
        columns = {
            "prompt": prompts,
            "one sample": first,
            f"best of {n}": [texts[i] for i in chosen[:: places.shape[1]]],
        }
        print("\n" + samples_table({name: column[: settings.show] for name, column in columns.items()}))
    names = [name for name in figures[0] if name not in ("n", "reward_sd")]
    print(f"{'n':20}" + "".join(f"{f['n']:>9}" for f in figures) + f"   {len(prompts)} prompts x {settings.n} samples")
    for name in names:
        print(f"{name:20}" + "".join(f"{f[name]:9.3f}" for f in figures))
    if settings.json:
        atomic_write(settings.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
