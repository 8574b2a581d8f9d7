"""Best-of-N: sample N responses from the SFT model, keep the one that a reward model likes best. Nothing is trained.

    python -m experiments.frontier --methods best-of-n --data toy --sft runs/toy/sft --out runs/best_of_n

Its distance from the SFT model pi is known without its probabilities. Let F(y) be the share of pi's responses to x
whose learned reward is at most that of y. If no two responses tie, the probability that y is the best of N is
N F(y)^(N-1) times its probability under pi, and the F of the best is distributed as the largest of N uniform numbers,
with E[log F] = -1/N:

    KL(best of N || pi)  =  E[ log N + (N-1) log F ]  =  log N - (N-1)/N

(Stiennon et al. 2020, arXiv 2009.01325, Appendix G.3). Two samples can be the same response, so ties occur. With ties
this is an upper bound (Beirami et al. 2024, arXiv 2401.01879).

One batch of samples serves every smaller N: K samples of a prompt are cut into K / N groups, each with a best.
"""

import math

import torch

from experiments import common


def kl_bound(n):
    """Returns the upper bound of KL(best of n || the policy sampled from), in nats per response."""
    return math.log(n) - (n - 1) / n


def best_of(scores, n):
    """The place, among the K samples of a prompt, of the best of each n neighbours: scores (P, K) -> (P, K // n).

    Of a tie the first is taken. Where n does not divide K, the samples that are left over are not used.
    """
    best = scores.unfold(1, n, n).argmax(dim=-1)  # (P, K // n): places within each group of n
    return best + n * torch.arange(best.shape[1])


def best_samples(samples, scores, n):
    """Returns the Samples that `best_of` finds, prompt by prompt; scores (P, K) are those of all P * K `samples`."""
    P, K = scores.shape
    indices = (best_of(scores, n) + K * torch.arange(P)[:, None]).flatten().tolist()
    return common.Samples(*([column[i] for i in indices] for column in samples))
