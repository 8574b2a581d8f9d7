"""Best-of-N: sample N responses from the SFT model, keep the one that a reward model likes best. Nothing is trained.

    python -m experiments.frontier.baselines.best_of_n --policy runs/sft --reward-model runs/reward --data toy

Its distance from the SFT model pi is known without its probabilities. Let F(y) be the share of pi's responses to x
whose learned reward is at most that of y. If no two responses tie, the probability that y is the best of N is
N F(y)^(N-1) times its probability under pi, and the F of the best is distributed as the largest of N uniform numbers,
with E[log F] = -1/N:

    KL(best of N || pi)  =  E[ log N + (N-1) log F ]  =  log N - (N-1)/N

(Stiennon et al. 2020, arXiv 2009.01325, Appendix G.3). Responses are discrete and do tie, at least with themselves, and
then it is an upper bound (Beirami et al. 2024, arXiv 2401.01879). It is far from the truth where pi gives single
responses a high probability. It grows as log N. This bound is called `kl_bound` everywhere, never `kl`.

One batch of samples serves every smaller N: K samples of a prompt are cut into K / N groups, each with a best.
"""

import dataclasses
import json
import math

import torch

from experiments import common
from experiments.evaluate import describe
from experiments.frontier.baselines import reward_model
from experiments.rewards import load_reward
from minidpo import dataset
from minidpo.device import DEVICES, pick_device
from minidpo.files import atomic_write
from minidpo.report import samples_table
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
    """Returns the upper bound of KL(best of n || the policy sampled from), in nats per response."""
    return math.log(n) - (n - 1) / n


def best_of(scores, n):
    """Returns the place of the best of each group of n neighbours: scores (P, K) of K samples of P prompts -> (P, K // n).

    Places count within the K of a prompt. Of a tie the first is taken, which is as good as drawing at random. Where n
    does not divide K, the samples that are left over are not used.
    """
    P, K = scores.shape
    groups = K // n
    best = scores[:, : groups * n].reshape(P, groups, n).argmax(dim=-1)  # (P, groups): places within the group
    return best + n * torch.arange(groups, device=scores.device)


def best_indices(scores, n):
    """Returns the places that `best_of` finds among all P * K samples, prompt by prompt, as a list."""
    P, K = scores.shape
    return (best_of(scores, n) + K * torch.arange(P)[:, None]).flatten().tolist()


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    if settings.json:
        dataset.new_file(settings.json, settings.overwrite)
    device, N = pick_device(settings.device), settings.n
    reward = load_reward(settings.reward)
    (policy,), tokenizer = common.load_models(settings.policy, device=device)
    model = reward_model.load_matching(settings.reward_model, tokenizer).to(device)
    prompts = common.read_prompts(settings.data, limit=settings.limit)
    samples = common.sample(
        policy, tokenizer, prompts, settings.max_new_tokens, settings.seed, N,
        batch_size=settings.batch_size, progress="sampling",
    )  # fmt: skip
    scores = model.score(samples.prompt_ids, samples.ids, settings.batch_size, progress="scoring").view(-1, N)
    rewards = reward(samples.prompts, samples.texts)

    figures = []
    for n in (2**i for i in range(N.bit_length())):
        best = best_indices(scores, n)
        chosen = common.Samples(*([column[i] for i in best] for column in samples))
        learned = scores.flatten()[best].mean().item()
        own = describe(chosen, [rewards[i] for i in best], N // n, settings.reward == "toy")
        figures.append({"n": n, "kl_bound": kl_bound(n), "learned_reward_mean": learned, **own})

    if settings.show:
        columns = {"prompt": prompts, "one sample": samples.texts[::N], f"best of {n}": chosen.texts[:: N // n]}
        print("\n" + samples_table({name: column[: settings.show] for name, column in columns.items()}))
    names = [name for name in figures[0] if name not in ("n", "reward_sd")]
    print(f"{'n':20}" + "".join(f"{f['n']:>9}" for f in figures) + f"   {len(prompts)} prompts x {N} samples")
    for name in names:
        print(f"{name:20}" + "".join(f"{f[name]:9.3f}" for f in figures))
    if settings.json:
        atomic_write(settings.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
