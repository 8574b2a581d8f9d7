"""Direct Preference Optimization (DPO), all of it, to be read from top to bottom.

    python train_dpo.py --data toy --init runs/toy/sft --out runs/toy/dpo

DPO (Rafailov et al. 2023, arXiv 2305.18290) trains a language model on preferences: "for prompt x, people chose
response y_w over response y_l". It needs no reward model and no sampling. A number in parentheses, such as (3), is an
equation of the paper; (A.4) is a section of its appendix.

WHAT WE WANT. A policy pi whose responses earn a high reward r(x, y), but which stays near the reference pi_ref, the
model we start from. x comes from the data and y from pi(.|x). KL(pi || pi_ref), the mean of log(pi / pi_ref) over the
responses y, measures how far pi has moved, in nats (natural logarithm). One nat costs beta > 0 units of reward:

    max_pi  E[ r(x, y) ]  -  beta KL( pi(y|x) || pi_ref(y|x) )                                                  (3)

WHAT SOLVES IT. For one prompt, write out the KL and collect everything under one expectation over y ~ pi:

    E[ r - beta log(pi / pi_ref) ]  =  -beta E[ log( pi(y|x) / ( pi_ref(y|x) exp(r(x, y) / beta) ) ) ]

The denominator is positive, but it does not sum to 1 over y. Its sum is Z(x) = sum_y pi_ref(y|x) exp(r(x, y) / beta).
Divided by Z(x), it is a distribution. Call it pi*. With pi* Z(x) as the denominator, the objective is
-beta KL(pi || pi*) + beta log Z(x). Z does not depend on pi. A KL is at least 0, and it is 0 only if the two
distributions are equal. So the optimum is

    pi*(y|x)  =  pi_ref(y|x) exp( r(x, y) / beta ) / Z(x)                                                       (4)

WHY NOT STOP HERE. We do not know the reward r, only which responses people chose. And Z(x) is a sum over every possible
response: pi* can be written down, but not computed.

SOLVE FOR THE REWARD. Take the logarithm of (4):

    r(x, y)  =  beta log( pi*(y|x) / pi_ref(y|x) )  +  beta log Z(x)                                            (5)

WHAT THE LABELS SAY. The Bradley-Terry model assumes that the probability of a choice depends only on the difference of
the rewards, p(y_w over y_l | x) = sigmoid( r(x, y_w) - r(x, y_l) ) (1). Put (5) into it. beta log Z(x) is the same for
both responses to a prompt, so it cancels, and the reward is gone. Only the optimum and the reference are left:

    p(y_w over y_l | x)  =  sigmoid( beta log pi*(y_w|x)/pi_ref(y_w|x) - beta log pi*(y_l|x)/pi_ref(y_l|x) )   (6)

THE LOSS. We do not know pi*, so we put the policy pi that we train in its place and fit it by maximum likelihood. The
loss is the negative log-likelihood of the labels, as for any classifier. The expectation is over the labelled pairs:

    L(pi)  =  -E[ log sigmoid( beta log pi(y_w|x)/pi_ref(y_w|x)  -  beta log pi(y_l|x)/pi_ref(y_l|x) ) ]        (7)

If the labels follow (1) and the pairs cover all responses, the likelihood is largest when pi gives the same
probabilities as pi* in (6). Then log pi and log pi* differ by a constant per prompt. Both pi and pi* sum to 1, so the
constant is 0 and pi = pi*, the optimum of (3): the loss solves the problem above.

THE IMPLICIT REWARD is the term that occurs twice in (7), beta log pi(y|x)/pi_ref(y|x). It has the form of (5), with pi
in place of pi* and without the part that depends on x alone. With it the loss is short:

    chosen_reward = beta (log pi - log pi_ref)(y_w|x),  rejected_reward the same for y_l,
    margin = chosen_reward - rejected_reward,           loss = -log sigmoid(margin).

ITS GRADIENT (A.4) shows what a step does. The derivative of -log sigmoid(m) is -sigmoid(-m), and pi_ref is constant, so

    grad L  =  -beta E[ sigmoid(rejected_reward - chosen_reward) ( grad log pi(y_w|x) - grad log pi(y_l|x) ) ]

The first term pushes log pi of the chosen response up, the second pushes log pi of the rejected one down. A pair has a
large weight if its rejected response has the higher implicit reward. At the start pi = pi_ref, so both rewards are 0,
every loss is ln 2 = 0.693 and every weight is 1/2. A loss of ln 2 does not mean that the gradient is 0.

WHERE DID THE KL TERM GO? The objective (3) has a KL term, the loss (7) has none. It became the reference inside the
logarithms, because the optimum (4) of the KL objective contains pi_ref. beta sets the scale of the margin: to move the
margin by 1, the difference of the log-ratios log(pi / pi_ref) must move by 1/beta nats. Suppose that a pair is labelled
many times and one response wins 70 % of the labels. The gradients of these labels cancel when sigmoid(margin) is 0.7,
which is the margin 0.85. The log-ratios then differ by 0.85/beta nats, so a larger beta keeps pi closer to the
reference. This has two limits. First, the loss sees only the responses in the pairs. Nothing is sampled, so nothing
keeps pi near the reference on other responses. Second, if nothing in the data contradicts a label, a larger margin
always lowers the loss. Then the number of epochs and the learning rate also decide how far pi moves.

WHY DOES THE CHOSEN REWARD FALL? (7) depends on the margin alone. The margin also grows when both log-probabilities fall
and the rejected one falls faster. Chosen and rejected responses share words, so pushing one down pulls the other down,
and their probability goes to other responses. So a falling rewards/chosen is not a bug while rewards/margins grows. If
beta is small, it is below 0 even at the optimum (4), for responses drawn from the reference (docs/displacement.md).
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from minidpo import checkpoint, dataset
from minidpo.device import autocast
from minidpo.optim import OPTIMIZERS, learning_rate, make_optimizer, set_learning_rate
from minidpo.run import Run, RunSettings, place
from minidpo.scale import fast, memory, parallel
from minidpo.settings import UserError, knob, parse_settings, run_main

# ---- 1. The mathematics. B pairs, T tokens, V vocabulary. Log-probabilities (logps) are in nats ----


def token_logps(logits, targets):
    """log pi(target_t | all tokens before it) at every position.

    logits (B, T, V), targets (B, T), valid ids everywhere -> (B, T). Logits of a model in half precision are raised
    to fp32, because bf16 would round a sum near -300 to a multiple of 2 nats. (Our GPT gives fp32.)
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    logps = F.log_softmax(logits, dim=-1)  # (B, T, V): of every token that could come next
    return logps.gather(dim=-1, index=targets.unsqueeze(-1)).squeeze(-1)  # (B, T): of the token that does come next


def response_logps(model, batch):
    """log pi(y|x) of both responses of each pair: a PreferenceBatch -> (chosen (B,), rejected (B,)).

    It is the SUM over the response tokens, by the chain rule log pi(y|x) = sum_t log pi(y_t | x, y_<t). A mean would
    divide beta by the length of each response. A batch holds ids, targets and mask (B, T) of each side. For prompt
    [e 5 6] and response [7 8 e], where e is the end-of-text token (eot), and one position of padding:

        position    0   1   2   3   4   5
        ids         e   5   6   7   8   0      the text e 5 6 7 8 e without its last token
        targets     5   6   7   8   e   0      the same text without its first token: the shift by one
        mask        .   .   x   x   x   .      scored: 7, 8 and the final e, each at the position that predicts it

    Padding on the right is harmless: under the causal mask a position sees only itself and earlier positions, so no
    real token sees padding, and the mask keeps padding out of the sum.
    """
    sums = []
    for side in (batch.chosen, batch.rejected):
        logps = token_logps(model(side.ids), side.targets)  # (B, T)
        sums.append(logps.masked_fill(~side.mask, 0.0).sum(dim=-1))  # (B,): prompt and padding are not scored
    return sums[0], sums[1]


def dpo_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    beta, label_smoothing=0.0, loss_type="sigmoid", reference_free=False,
):  # fmt: skip
    """Equation (7) for each pair, and three variants.

    Args:
        four logps: (B,) each, in nats, summed over the response.
        beta: weight of the KL in (3). A larger beta keeps the policy closer to the reference.
        label_smoothing: s, the assumed probability that a label is flipped (conservative DPO, Mitchell 2023). The loss
            is then smallest at the margin ln((1 - s) / s).
        loss_type: "sigmoid" is DPO; "ipo" is Azar et al. 2023, Eq. 17, on the same sums.
        reference_free: count the reference's logps as 0.

    Returns (losses, chosen_rewards, rejected_rewards), (B,) each. A reward is beta (log pi - log pi_ref), detached.
    Raises ValueError for another loss_type, and for "ipo" with label_smoothing.
    """
    if reference_free:
        reference_chosen_logps = reference_rejected_logps = 0.0
    chosen_log_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps - reference_rejected_logps
    h = chosen_log_ratios - rejected_log_ratios  # Z(x) of (5) has cancelled in this difference
    margins = beta * h
    if loss_type == "sigmoid":
        losses = -F.logsigmoid(margins)  # (7)
        if label_smoothing:
            losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    elif loss_type == "ipo" and not label_smoothing:
        losses = (h - 1 / (2 * beta)) ** 2  # a finite target for h, even if the labels are never wrong
    else:
        raise ValueError(f"no loss {loss_type!r} with label_smoothing {label_smoothing}: take sigmoid, or ipo with 0")
    return losses, (beta * chosen_log_ratios).detach(), (beta * rejected_log_ratios).detach()


# For another pairwise loss, write a function with the arguments and results of dpo_loss, subclass Settings, and call
# main(YourSettings, your_loss). experiments/frontier/baselines/unlikelihood.py is an example.

# ---- 2. Settings. The defaults are the paper's (section B). A set fits a model and a dataset; flags override it ----

SETS = {
    # "Unless noted otherwise, we use a beta = 0.1, batch size of 64 and the RMSprop optimizer with a learning rate of
    # 1e-6 by default. We linearly warmup the learning rate from 0 to 1e-6 over 150 steps." (section B)
    "paper": {},
    # "For TL;DR summarization, we use beta = 0.5, while rest of the parameters remain the same." (section B)
    "paper-tldr": dict(beta=0.5),
    # The toy's rewards differ by several units. At beta 0.1, exp(r / beta) outweighs pi_ref: ungrammatical text wins.
    "toy": dict(beta=0.7, optimizer="adamw", lr=7e-4, warmup_steps=20, decay=True),
    "imdb-small": dict(beta=0.1, optimizer="adamw", lr=3e-5, warmup_steps=20, decay=True, sample_tokens=64),
}


@dataclasses.dataclass
class Settings(RunSettings):
    """What DPO adds to `RunSettings`, which holds batch size, seed, device, checkpoints and the like."""

    data: str = knob(dataclasses.MISSING, "toy, imdb, hh, tldr, or a JSONL file with prompt, chosen, rejected")
    init: str = knob(dataclasses.MISSING, "starting model and reference: a run or GPT-2 folder, or a name such as gpt2")
    out: str = knob(dataclasses.MISSING, "the run folder to write")
    settings: str = knob("", "named set of training settings; empty: the one that fits", choices=("", *SETS))
    beta: float = knob(0.1, "weight of the KL: a larger beta keeps the policy closer to the reference")
    loss_type: str = knob("sigmoid", "sigmoid (DPO) or ipo", choices=("sigmoid", "ipo"))
    label_smoothing: float = knob(0.0, "assumed probability that a label is flipped (conservative DPO)", below=0.5)
    reference_free: bool = knob(False, "count the reference's log-probabilities as 0")
    optimizer: str = knob("rmsprop", "rmsprop (the paper's), adamw, or sgd with momentum", choices=OPTIMIZERS)
    lr: float = knob(1e-6, "learning rate after the warm-up")
    warmup_steps: int = knob(150, "optimiser steps over which the learning rate rises")
    decay: bool = knob(False, "let the learning rate fall linearly to 0 after the warm-up")
    grad_clip: float = knob(10.0, "largest L2 norm of the gradient, as in the authors' code; 0: no limit")
    dropout: float = knob(0.0, "must stay 0: policy and reference must agree on the same row")

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise UserError(f"--beta {self.beta}: must be above 0 and finite; try 0.1. Larger means less KL.")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise UserError("--loss-type ipo has no label smoothing: leave --label-smoothing out.")
        if self.dropout > 0:
            raise UserError("--dropout must be 0 here: with dropout, policy and reference differ on the same row.")

    @property
    def variant(self):
        """The keywords of the loss."""
        return {name: getattr(self, name) for name in ("beta", "label_smoothing", "loss_type", "reference_free")}


# ---- 3. The pieces of the loop. pairs: N of (prompt_ids, chosen_ids, rejected_ids); reference: their logps (N, 2) ----


def logps_of(model, pairs, indices, settings):
    """log pi of the pairs `indices` -> (chosen (B,), rejected (B,)), on the device and in the precision asked for."""
    batch = dataset.preference_batch([pairs[i] for i in indices], settings.device)
    with autocast(settings.device, settings.dtype):
        return (fast.response_logps if settings.fast else response_logps)(model, batch)


@torch.no_grad()
def all_logps(model, pairs, settings, progress=None):
    """log pi of all pairs -> (N, 2), chosen and rejected, on the CPU. `progress` is the text of a progress bar."""
    logps = torch.zeros(len(pairs), 2, dtype=model.wte.weight.dtype)
    batches = settings.cut(dataset.batches(pairs, settings.batch_size, seed=0, epoch=0), pairs)
    for indices in tqdm(parallel.share(batches), desc=progress, unit="batch", disable=progress is None):
        logps[indices] = torch.stack(logps_of(model, pairs, indices, settings), dim=-1).cpu()
    return parallel.all_sum(logps)  # rows that other processes computed are 0 here


def reference_logps(model, pairs, settings):
    """log pi_ref of all pairs -> (N, 2). The reference never changes, so this is computed once, before training."""
    if settings.reference_free:
        return torch.zeros(len(pairs), 2)
    return all_logps(model, pairs, settings, progress="reference")


def cached_reference(policy, parts, settings, run):
    """`reference_logps` of all `parts`, kept in a file for runs with the same policy, pairs and settings."""
    sizes = (settings.batch_size, settings.micro_batch_size, settings.micro_tokens)
    computed_by = (settings.device, settings.dtype, settings.fast, settings.compile, *sizes, settings.reference_free)
    name = checkpoint.fingerprint(policy, run.data, computed_by)
    path = run.path.parent / "reference_logps" / f"{name}.pt"
    with memory.advise(policy, sum(parts, []), settings):  # if memory runs out, the error names the flags that help
        return checkpoint.cached(path, lambda: torch.cat([reference_logps(policy, part, settings) for part in parts]))


METRICS = "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected".split()


def metric_sums(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """Five tensors (B,), one value per pair -> the sums of the METRICS over the pairs (7,), on the same device."""
    wins = (chosen_rewards > rejected_rewards) + 0.5 * (chosen_rewards == rejected_rewards)  # a tie is half a win
    margins = chosen_rewards - rejected_rewards
    metrics = (losses, chosen_rewards, rejected_rewards, margins, wins, chosen_logps, rejected_logps)
    return torch.stack([m.detach().sum() for m in metrics])


def means(sums, n):
    """The sums over n pairs -> their means, by name."""
    return dict(zip(METRICS, (sums / n).tolist(), strict=True))


def train_step(policy, optimizer, pairs, reference, indices, settings, loss=dpo_loss):
    """One optimiser step on the pairs `indices`. Returns the metrics from before the update, by name."""
    sums = torch.zeros(len(METRICS), device=settings.device)
    for micro in settings.cut([parallel.share(indices)], pairs):
        logps = logps_of(policy, pairs, micro, settings)
        reference_chosen, reference_rejected = reference[micro].to(settings.device).T
        losses, *rewards = loss(*logps, reference_chosen, reference_rejected, **settings.variant)
        (losses.sum() / len(indices)).backward()  # the mean over the pairs of the step, however they are cut
        sums = sums + metric_sums(losses, *rewards, *logps)
    parallel.sum_gradients(policy)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.grad_clip or math.inf)
    metrics = {**means(parallel.all_sum(sums), len(indices)), "grad_norm": grad_norm.item()}
    if not all(math.isfinite(m) for m in metrics.values()):
        raise UserError(f"not a finite number in {metrics}. Lower --lr.\nUsable pairs, from 0: {sorted(indices)}.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def evaluate(policy, pairs, reference, settings, loss=dpo_loss):
    """The metrics on all of `pairs`, by name."""
    logps = all_logps(policy, pairs, settings).T
    sums = metric_sums(*loss(*logps, *reference.T, **settings.variant), *logps)
    return {"eval/" + name: value for name, value in means(sums, len(pairs)).items()}


def check_start(policy, pairs, reference, indices, settings, loss=dpo_loss):
    """Raises UserError unless the policy equals the reference on the pairs `indices`, as it must before any update."""
    logps = all_logps(policy, [pairs[i] for i in indices], settings)
    gap = (logps - reference[indices]).abs()  # nats per response; more than rounding is an error
    allowed = 1e-3 * logps.abs() if settings.dtype == "bfloat16" else 1e-4 + 1e-6 * logps.abs()
    if (gap > allowed).any():
        raise UserError(
            f"before the first update the policy is {gap.max():.3g} nats from the reference; it must be 0. Likely "
            "causes: dropout is on, the reference comes from other weights or data, or tokens see padding."
        )
    losses, *_ = loss(*logps.T, *reference[indices].T, **settings.variant)
    name, value = ("1 / (2 beta)^2", 0.25 / settings.beta**2) if settings.loss_type == "ipo" else ("ln 2", math.log(2))
    expected = f" ({name} = {value:.6f})" if loss is dpo_loss else ""
    print(f"before the first update: log-ratios within {gap.max():.1g} nats, loss {losses.mean():.6f}{expected}")


# ---- 4. The run ----


@parallel.joined()
def main(settings_class=Settings, loss=dpo_loss):
    # -- settings, policy, pairs
    settings = parse_settings(settings_class, "Stage 2: trains a policy on preferences, by DPO.", sets=SETS)
    run = Run(settings, "dpo")
    policy, tokenizer, saved = run.load()  # the SFT model of --init, or with --resume the policy of this run
    place(policy, settings)
    policy.set_dropout(0.0)
    policy.prepare(settings.compile, settings.recompute)
    max_length = min(settings.max_length or policy.config.block_size, policy.config.block_size)
    split = data.find_split("pairs", settings.data, settings.eval_data)
    pairs, held_out = dataset.load_split(split, dataset.PAIR, tokenizer, max_length)
    run.plan(pairs, saved, pairs, held_out)  # a resumed run must find the same pairs and held-out pairs
    memory.check(policy, pairs + held_out, settings)
    if settings.fast:
        fast.keep_freed_memory()

    # -- the reference is the policy before its first update. We keep only its log-probabilities, not a second model
    prompts = dataset.first_prompts(held_out or pairs, settings.samples)  # completed before and after
    if settings.resume:
        reference, before = saved["reference"], saved["before"]
    else:
        reference = cached_reference(policy, (pairs, held_out), settings, run)
        before = run.complete(policy, tokenizer, prompts)
    if run.first_step or settings.reference_free:
        print("no check that policy and reference agree: " + ("a resumed run" if run.first_step else "no reference"))
    else:
        first_batch = dataset.batches(pairs, settings.batch_size, settings.seed, epoch=0)[0]
        check_start(policy, pairs, reference, first_batch, settings, loss)

    optimizer = make_optimizer(policy, settings.optimizer, settings.lr)
    if settings.resume:
        optimizer.load_state_dict(saved["optimizer"])
    del saved  # free the loaded checkpoint: with AdamW it is as large as two models

    # -- the loop
    policy.train()
    training = run.training(policy, tokenizer, optimizer, before=before, reference=reference)
    with memory.advise(policy, pairs + held_out, settings), training as steps:
        for step, indices in steps:
            lr = learning_rate(step, run.total_steps, settings.lr, settings.warmup_steps, settings.decay)
            set_learning_rate(optimizer, lr)
            metrics = train_step(policy, optimizer, pairs, reference, indices, settings, loss)
            metrics |= {"lr": lr, **run.speed(pairs=len(indices), tokens=dataset.count_tokens(pairs, indices))}
            if held_out and run.evaluates_after(step):  # the held-out pairs come last in `reference`
                metrics |= evaluate(policy, held_out, reference[len(pairs) :], settings, loss)
            run.log(step, metrics)
            if step + 1 == 2 * settings.warmup_steps + 50 and abs(metrics["rewards/margins"]) < 1e-2 * settings.beta:
                tqdm.write(f"warning: after {step + 1} steps the margin is still near 0. Is --lr too small?")

    # -- the report
    after = run.complete(policy, tokenizer, prompts)
    note = f"{loss.__name__} {settings.variant}: {run.last_step} steps on {len(pairs):,} pairs of {settings.data}."
    run.finish({"prompt": [tokenizer.decode(p) for p in prompts], "before": before, "after": after}, note)


if __name__ == "__main__":
    run_main(main)
