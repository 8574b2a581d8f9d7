"""Direct Preference Optimization, the whole of it, to be read from top to bottom.

    python train_dpo.py --data toy --init runs/sft --out runs/dpo

DPO (Rafailov et al. 2023, arXiv 2305.18290; numbers in brackets are the paper's equations) fits a language model to
preferences "for prompt x, people chose y_w over y_l" without a reward model and without sampling. Step by step:

WHAT WE WANT. A policy pi whose responses earn a high reward r(x, y), but that stays near the reference pi_ref, the
model we start from; beta > 0 is the price of one nat of distance, x comes from the data, y from pi(.|x):

    max_pi  E[ r(x, y) ]  -  beta KL( pi(y|x) || pi_ref(y|x) )                                                  (3)

WHAT SOLVES IT. For one prompt, write the KL out and collect everything under one expectation over y ~ pi:

    E[ r - beta log(pi / pi_ref) ]  =  -beta E[ log( pi(y|x) / ( pi_ref(y|x) exp(r(x, y) / beta) ) ) ]

The denominator is positive, but over all y it sums to Z(x) = sum_y pi_ref(y|x) exp(r(x, y) / beta), not to 1. Divide
it by Z(x) and it is a distribution; call that pi*. The objective is now -beta KL(pi || pi*) + beta log Z(x). Z does not
depend on pi, and a KL is smallest, 0, where its two sides are equal. So

    pi*(y|x)  =  pi_ref(y|x) exp( r(x, y) / beta ) / Z(x)                                                       (4)

WHY NOT STOP HERE. Z(x) is a sum over every possible response: pi* can be written down, but not computed.

TURN IT AROUND. Take the logarithm of (4) and solve for the reward. Read backwards, it says of any pi for which reward
it is the optimum:

    r(x, y)  =  beta log( pi(y|x) / pi_ref(y|x) )  +  beta log Z(x)                                             (5)

WHAT PEOPLE'S CHOICES SAY. Bradley-Terry: the better response wins with a probability that depends on the rewards only
by their difference, p(y_w over y_l | x) = sigmoid( r(x, y_w) - r(x, y_l) ) (1). Put (5) in: beta log Z(x) is the same
for both responses to a prompt, and cancels. What is left is made of the policy itself:

    p(y_w over y_l | x)  =  sigmoid( beta log pi(y_w|x)/pi_ref(y_w|x)  -  beta log pi(y_l|x)/pi_ref(y_l|x) )    (6)

THE LOSS is the negative log-likelihood of the choices, as for any classifier:

    L(pi)  =  -E[ log sigmoid( beta log pi(y_w|x)/pi_ref(y_w|x)  -  beta log pi(y_l|x)/pi_ref(y_l|x) ) ]        (7)

THE IMPLICIT REWARD is what stands there twice: beta log pi(y|x)/pi_ref(y|x), the reward (5) up to a term of x alone. So

    chosen_reward = beta (log pi - log pi_ref)(y_w|x),  rejected_reward the same for y_l,
    margin = chosen_reward - rejected_reward,           loss = -log sigmoid(margin).

ITS GRADIENT (A.4) shows what a step does. The derivative of -log sigmoid(m) is -sigmoid(-m), hence

    grad L  =  -beta E[ sigmoid(rejected_reward - chosen_reward) ( grad log pi(y_w|x) - grad log pi(y_l|x) ) ]

Up with the chosen, down with the rejected, each pair weighted by how wrong the implicit reward still is about it. At
the start pi = pi_ref: both rewards are 0, every loss is ln 2 = 0.693, every weight is 1/2. So ln 2 is no flat spot.

WHERE DID THE KL TERM GO? (3) pays beta for every nat of distance, and (7) has no such term. It became the reference
inside the logarithms: (4) already took the best trade of reward against distance, and (5) reads off the reward for
which pi *is* that trade. The leash is the scale of the margin: to move it by 1, the log-ratios must move by 1/beta
nats, and once the margin is as large as the choices warrant, the pull ends. Larger beta = stays closer to the
reference. Two things the leash does not do. It holds on the pairs in the data: nothing is sampled, so away from them
nothing keeps pi near the reference. And if the labels are never wrong, no margin is ever large enough: then epochs and
learning rate hold the leash, not beta.

WHY DOES THE CHOSEN REWARD FALL? (7) sees the margin alone, which also grows when both log-probabilities fall, the
rejected one faster. Chosen and rejected share words, so pushing one down drags the other along, and what both lose goes
to responses that are in no pair. A falling rewards/chosen with growing rewards/margins is the loss at work, not a bug:
for a small beta the mean rewards/chosen of the optimum (4) itself is below 0 (counted in docs/displacement.md).
"""

import dataclasses
import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from minidpo import checkpoint, dataset
from minidpo.device import DEVICES, DTYPES, autocast, pick_device, pick_dtype
from minidpo.optim import OPTIMIZERS, learning_rate, make_optimizer
from minidpo.run import Run
from minidpo.sampling import complete
from minidpo.scale import fast, memory, parallel
from minidpo.settings import CatchInterrupt, UserError, knob, parse_settings, run_main

# ---- 1. The mathematics. B pairs, T tokens, V vocabulary; log-probabilities (logps) in nats ----


def token_logps(logits, targets):
    """log pi(target_t | everything before it), at every position.

    logits (B, T, V), targets (B, T), valid ids everywhere -> (B, T). In fp32 at least: where a log-probability is
    -300, bf16 has steps of 2 nats.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    logps = F.log_softmax(logits, dim=-1)  # (B, T, V): of every token that could stand there
    return logps.gather(dim=-1, index=targets.unsqueeze(-1)).squeeze(-1)  # (B, T): of the one that does


def response_logps(model, batch):
    """log pi(y|x) of both responses of each pair.

    batch: a PreferenceBatch -> (chosen (B,), rejected (B,)). The SUM over response tokens, the final eot included: by
    the chain rule log pi(y|x) = sum_t log pi(y_t | x, y_<t). A mean would divide beta by the length, pair by pair.
    """
    sums = []
    for rows in (batch.chosen, batch.rejected):
        logps = token_logps(model(rows.ids), rows.targets)  # (B, T)
        sums.append(logps.masked_fill(~rows.mask, 0.0).sum(dim=-1))  # prompt and padding do not count
    return sums[0], sums[1]


def dpo_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    beta, label_smoothing=0.0, loss_type="sigmoid", reference_free=False,
):  # fmt: skip
    """Equation (7), pair by pair, and three relatives. All logps (B,), summed over the response, in nats.

    Returns (losses (B,), chosen_rewards (B,), rejected_rewards (B,)); the rewards are beta (log pi - log pi_ref),
    detached. label_smoothing e: the label is believed to be flipped with probability e (conservative DPO, Mitchell
    2023; not the "robust" one, which divides by 1 - 2e). loss_type "ipo": Azar et al. 2023, Eq. 17, on the same sums.
    reference_free counts the reference as 0. Raises ValueError for a loss_type that is neither, and ipo with smoothing.
    """
    if reference_free:
        reference_chosen_logps = reference_rejected_logps = 0.0
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)  # (5) without its beta log Z(x) ...
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards  # ... which cancels here
    if loss_type == "sigmoid":
        losses = -F.logsigmoid(margins)  # (7)
        if label_smoothing:
            losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    elif loss_type == "ipo" and not label_smoothing:
        losses = (margins / beta - 1 / (2 * beta)) ** 2  # a finite target for the log-ratios, whatever the labels
    else:
        raise ValueError(
            f"no loss {loss_type!r} with label_smoothing {label_smoothing}: sigmoid, or ipo without smoothing"
        )
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# ---- 2. Settings. The defaults are the paper's (section B); each dataset has a set of its own, flags override ----

SETS = {
    # "Unless noted otherwise, we use a beta = 0.1, batch size of 64 and the RMSprop optimizer with a learning rate of
    # 1e-6 by default. We linearly warmup the learning rate from 0 to 1e-6 over 150 steps." (section B)
    "paper": {},
    # "For TL;DR summarization, we use beta = 0.5, while rest of the parameters remain the same." (section B)
    "paper-tldr": dict(beta=0.5),
    # the toy's rewards differ by several units, and exp(r / beta) goes with them: at 0.1 the toy leaves its language
    "toy": dict(beta=0.7, optimizer="adamw", lr=7e-4, warmup_steps=20, decay=True),
    "imdb": dict(beta=0.3, optimizer="adamw", lr=1e-4, warmup_steps=20, decay=True, sample_tokens=64),
}


@dataclasses.dataclass
class Settings:
    data: str = knob(dataclasses.MISSING, "toy, imdb, hh, tldr, or a JSONL file with prompt, chosen, rejected")
    init: str = knob(
        dataclasses.MISSING, "the model to start from, and the reference: a run folder, a GPT-2 folder or name"
    )
    out: str = knob(dataclasses.MISSING, "the run folder to write")
    settings: str = knob("", "named set of training settings; empty: the one of --data", choices=("", *SETS))
    beta: float = knob(0.1, "price of a nat of distance from the reference: larger stays closer")
    loss_type: str = knob("sigmoid", "sigmoid (DPO) or ipo", choices=("sigmoid", "ipo"))
    label_smoothing: float = knob(0.0, "probability that a label is flipped (conservative DPO)")
    reference_free: bool = knob(False, "count the reference's log-probabilities as 0")
    optimizer: str = knob("rmsprop", "rmsprop (the paper's), adamw, or sgd with momentum", choices=OPTIMIZERS)
    lr: float = knob(1e-6, "learning rate after the warm-up")
    warmup_steps: int = knob(150, "optimiser steps over which the learning rate rises")
    decay: bool = knob(False, "let the learning rate fall linearly to 0 after the warm-up")
    grad_clip: float = knob(10.0, "longest gradient, in L2 norm (as in the authors' code; the paper names none)")
    epochs: float = knob(1.0, "passes over the pairs; 0.5 is half a pass")
    batch_size: int = knob(64, "pairs per optimiser step", least=1)
    micro_batch_size: int = knob(0, "pairs per forward pass, to save memory; 0: all of the step")
    micro_tokens: int = knob(0, "input tokens per forward pass, padding counted, to save memory; 0: no limit")
    recompute: bool = knob(False, "save memory: compute each block again in the backward pass (a third more work)")
    compile: bool = knob(False, "torch.compile the blocks: faster on a GPU, after a minute of compiling")
    max_length: int = knob(0, "longest row in tokens; 0: the model's context")
    dropout: float = knob(0.0, "stays 0: policy and reference must agree on the same row")
    max_steps: int = knob(0, "stop after this many optimiser steps, on the way of --epochs; 0: go all the way")
    eval_data: str = knob("", "held-out pairs for the curves; empty: the dataset's own, none for a file")
    eval_every: int = knob(50, "optimiser steps between evaluations on the held-out pairs; 0: at the end only")
    save_every: int = knob(100, "optimiser steps between checkpoints", least=1)
    samples: int = knob(8, "held-out prompts completed before and after, for the report")
    sample_tokens: int = knob(128, "longest of these completions, in tokens", least=1)
    seed: int = knob(0, "of the order of the pairs and of the sampling")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    dtype: str = knob("auto", "precision of the matrix products", choices=DTYPES)
    fast: bool = knob(
        False, "the same numbers in less time and memory: minidpo/scale/fast.py in place of response_logps"
    )
    resume: bool = knob(False, "go on with the run in --out, with its settings")
    overwrite: bool = knob(False, "replace the run in --out")

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise UserError(f"--beta {self.beta}: must be above 0. Larger stays closer to the reference; try 0.1.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label-smoothing {self.label_smoothing}: must be at least 0 and below 0.5.")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise UserError("--loss-type ipo has no label smoothing: leave --label-smoothing out.")
        if self.dropout > 0:
            raise UserError("--dropout must be 0 here: with it, policy and reference differ on the same row by chance.")

    @property
    def variant(self):
        """The keywords of `dpo_loss`."""
        return {name: getattr(self, name) for name in ("beta", "label_smoothing", "loss_type", "reference_free")}

    def cut(self, batches, rows):
        """The batches in micro-batches."""
        return dataset.micro_batches(batches, rows, self.micro_batch_size, self.micro_tokens)


# ---- 3. The pieces of the loop ----


def logps_of(model, rows, indices, settings):
    """`response_logps` of the pairs `indices` of `rows`, on the device and in the precision that were asked for."""
    batch = dataset.preference_batch([rows[i] for i in indices], settings.device)
    function = fast.response_logps if settings.fast else response_logps
    with autocast(settings.device, settings.dtype):
        return parallel.call(function, model, batch)


@torch.no_grad()
def reference_logps(model, rows, settings):
    """log pi_ref of all pairs -> (N, 2), chosen and rejected, on the CPU. Once: the reference never changes."""
    logps = torch.zeros(len(rows), 2, dtype=model.wte.weight.dtype)
    order = dataset.batches(rows, settings.batch_size, seed=0, epoch=0)
    for indices in tqdm(parallel.mine(settings.cut(order, rows)), desc="reference", unit="batch"):
        logps[indices] = torch.stack(logps_of(model, rows, indices, settings), dim=-1).cpu()
    return parallel.total(logps)


def train_step(policy, optimizer, rows, reference, indices, settings):
    """One optimiser step on the pairs `indices`; returns the metrics before it, by name. reference: (N, 2)."""
    mine = parallel.mine(indices)  # all of them, unless several processes share the step
    sums = torch.zeros(6, device=settings.device)
    for micro in parallel.exchange_once(policy, settings.cut([mine], rows)):
        logps = logps_of(policy, rows, micro, settings)
        losses, *rewards = dpo_loss(*logps, *reference[micro].to(settings.device).T, **settings.variant)
        (losses.sum() / len(indices)).backward()  # the mean over the step's pairs, however they are cut
        sums = sums + summed(losses, *rewards, *logps)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.grad_clip)
    metrics = {**means(sums, len(indices)), "grad_norm": grad_norm.item()}
    if not all(math.isfinite(m) for m in metrics.values()):
        raise UserError(f"not a finite number in {metrics}\nin the batch of usable pairs {sorted(indices)}, from 0.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


@torch.no_grad()
def evaluate(policy, rows, reference, settings):
    """The metrics on all of `rows`, by name."""
    sums = torch.zeros(6, device=settings.device)
    order = dataset.batches(rows, settings.batch_size, seed=0, epoch=0)
    for indices in parallel.mine(settings.cut(order, rows)):
        logps = logps_of(policy, rows, indices, settings)
        sums = sums + summed(*dpo_loss(*logps, *reference[indices].to(settings.device).T, **settings.variant), *logps)
    return {"eval/" + name: value for name, value in means(sums, len(rows)).items()}


def summed(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """Six metrics (B,) -> their sums (6,), still on the device."""
    wins = (chosen_rewards > rejected_rewards) + 0.5 * (chosen_rewards == rejected_rewards)  # a tie is half a win
    metrics = (losses, chosen_rewards, rejected_rewards, wins, chosen_logps, rejected_logps)
    return torch.stack([m.detach().sum() for m in metrics])


def means(sums, n):
    """The sums (6,) over n pairs, shared out over the processes if there are several -> means, by name."""
    loss, chosen_reward, rejected_reward, wins, chosen, rejected = (parallel.total(sums) / n).tolist()
    return {
        "loss": loss,
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": wins,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


@torch.no_grad()
def check_start(policy, rows, reference, indices, settings):
    """Before the first update policy and reference are the same model: every log-ratio must be 0 up to rounding."""
    logps = torch.stack(logps_of(policy, rows, indices, settings), dim=-1).cpu()
    ratio = (logps - reference[indices]).abs()
    allowed = 1e-3 * logps.abs() if settings.dtype == "bfloat16" else 1e-4 + 1e-6 * logps.abs()
    if (ratio > allowed).any():
        raise UserError(
            f"before the first update the policy is {ratio.max():.3g} nats from the reference; it must be 0. Likely "
            "causes: dropout is on, the reference comes from other weights or data, or padding is seen."
        )
    losses, *_ = dpo_loss(*logps.T, *reference[indices].T, **settings.variant)
    ipo = settings.loss_type == "ipo"
    expected = f"1 / (2 beta)^2 = {1 / (2 * settings.beta) ** 2:.6f}" if ipo else f"ln 2 = {math.log(2):.6f}"
    print(f"before the first update: log-ratios within {ratio.max():.1g} nats, loss {losses.mean():.6f} ({expected})")


@parallel.joined()
def main():
    # -- what was asked for
    settings = parse_settings(Settings, "Stage 2: trains a policy on preferences, by DPO.", sets=SETS)
    folder = Run(settings)
    settings.device = pick_device(settings.device)

    # -- the policy starts as the SFT model
    policy, tokenizer, state = checkpoint.load(settings.out if settings.resume else settings.init)
    policy.to(settings.device).set_dropout(0.0)
    policy.prepare(settings.compile, settings.recompute)
    settings.dtype = pick_dtype(settings.dtype, settings.device, policy.config.n_embd)
    max_length = min(settings.max_length or policy.config.block_size, policy.config.block_size)
    rows, held_out = dataset.load_pairs(
        data.find_split("pairs", settings.data, settings.eval_data), tokenizer, max_length
    )
    data_fingerprint = checkpoint.fingerprint(rows, held_out)
    memory.check(policy, rows, settings)

    # -- the reference is the same model: of it only numbers are kept, and a sample of its completions
    if settings.resume:
        if state.get("data") != data_fingerprint:
            raise UserError(f"{settings.out} was started with other pairs. Restore them, or start a new run.")
        first_step, reference, before = state["step"], state["reference"], state["before"]
    else:
        sizes = (settings.batch_size, settings.micro_batch_size, settings.micro_tokens)
        rounding = (settings.device, settings.dtype, settings.fast, settings.compile, *sizes)
        name = checkpoint.fingerprint(policy, data_fingerprint, rounding)
        cache = folder.path.parent / "reference_logps" / f"{name}.pt"  # shared by the runs side by side there
        reference = checkpoint.cached(
            cache, lambda: torch.cat([reference_logps(policy, part, settings) for part in (rows, held_out)])
        )
        first_step = 0
    reference, held_out_reference = reference.split((len(rows), len(held_out)))
    prompts = [list(p) for p in dict.fromkeys(tuple(prompt) for prompt, *_ in held_out or rows)][: settings.samples]
    optimizer = make_optimizer(policy, settings.optimizer, settings.lr)
    if settings.resume:
        optimizer.load_state_dict(state["optimizer"])
    else:
        before = complete(policy, tokenizer, prompts, settings.sample_tokens, settings.seed)
    del state  # the size of two models if it holds AdamW's; what is needed of it, others hold

    # -- the loop: the order of the pairs follows from seed and epoch, so a resumed run finds its place by counting
    steps_per_epoch = math.ceil(len(rows) / settings.batch_size)
    total = math.ceil(settings.epochs * steps_per_epoch)
    last_step = min(total, settings.max_steps or total)
    if total <= settings.warmup_steps:
        print(f"warning: all {total} steps are warm-up. Lower --warmup-steps {settings.warmup_steps}, or --batch-size.")
    if first_step >= last_step and (folder.path / "report.md").exists():
        raise UserError(f"{settings.out} has made {first_step} of {last_step} steps. Raise --epochs or --max-steps.")
    order = dataset.batches(rows, settings.batch_size, settings.seed, first_step // steps_per_epoch)
    if first_step == 0 and not settings.reference_free:
        check_start(policy, rows, reference, order[0], settings)
    else:
        print("no check that policy and reference agree: " + ("a resumed run" if first_step else "no reference"))
    folder.begin(first_step, tokenizer)

    def save(step):
        both = torch.cat((reference, held_out_reference))
        state = dict(step=step, optimizer=optimizer.state_dict(), data=data_fingerprint, before=before, reference=both)
        folder.save(policy, tokenizer, state)

    policy.train()
    trained = parallel.wrap(policy)
    with CatchInterrupt() as interrupt, tqdm(total=last_step, initial=first_step, desc="dpo", unit="step") as bar:
        for step in range(first_step, last_step):
            started = time.perf_counter()
            if step % steps_per_epoch == 0:
                order = dataset.batches(rows, settings.batch_size, settings.seed, step // steps_per_epoch)
            indices = order[step % steps_per_epoch]
            lr = learning_rate(step, total, settings.lr, settings.warmup_steps, settings.decay)
            for group in optimizer.param_groups:
                group["lr"] = lr
            metrics = train_step(trained, optimizer, rows, reference, indices, settings)

            seconds = time.perf_counter() - started
            tokens = sum(2 * len(p) + len(w) + len(l) - 2 for p, w, l in (rows[i] for i in indices))
            metrics |= {"lr": lr, "pairs_per_second": len(indices) / seconds, "tokens_per_second": tokens / seconds}
            done = step + 1
            if held_out and (done == last_step or settings.eval_every and done % settings.eval_every == 0):
                metrics |= evaluate(policy, held_out, held_out_reference, settings)
            folder.log(done, metrics)
            bar.update()
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}, accuracy {metrics['rewards/accuracies']:.2f}")
            if done == 2 * settings.warmup_steps + 50 and abs(metrics["rewards/margins"]) < 1e-3:
                tqdm.write(f"warning: after {done} steps the margin is still at 0. Is the learning rate too small?")
            stop = parallel.anywhere(interrupt.requested)
            if done == last_step or done % settings.save_every == 0 or stop:
                save(done)
            if stop and done < last_step:
                raise UserError(f"stopped after step {done} and saved. Go on with the same command and --resume.")

    # -- what came of it
    after = complete(policy, tokenizer, prompts, settings.sample_tokens, settings.seed)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    notes = (
        f"DPO on {len(rows):,} pairs of {settings.data} from {settings.init}: {last_step} steps, beta {settings.beta}."
    )
    folder.finish({"prompt": texts, "before": before, "after": after}, [notes])


if __name__ == "__main__":
    run_main(main)
