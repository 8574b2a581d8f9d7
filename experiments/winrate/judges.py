"""Judges: which of two responses to a prompt is better. docs/winrate.md lists them.

A judge is a callable, `judge(prompts, a, b) -> verdicts`. It takes three lists of texts and returns "a", "b" or "tie"
for each comparison, or None where an answer of the judge cannot be read.
"""

from pathlib import Path

import train_dpo
from experiments.common import load_models
from experiments.frontier.baselines import reward_model
from experiments.rewards import load_reward
from experiments.winrate.chat import QUESTIONS, ChatJudge
from minidpo import dataset
from minidpo.settings import UserError, unknown


def verdicts(rewards):
    """Pairs of rewards, of response a and of response b -> which is higher; equal rewards are a tie."""
    return ["tie" if a == b else "a" if a > b else "b" for a, b in rewards]


def reward_judge(reward):
    """The judge that compares reward(prompts, responses)."""
    return lambda prompts, a, b: verdicts(zip(reward(prompts, a), reward(prompts, b), strict=True))


def implicit_rewards(policy, reference, tokenizer, prompts, a, b, batch_size=64, progress=None):
    """log pi(y|x) - log pi_ref(y|x) of both responses to each prompt -> (N, 2), in nats.

    This is the reward of Eq. 5 divided by beta and without beta log Z(x), neither of which changes the order of two
    responses to one prompt. The texts are encoded, and each counts as ended, so its final eot is scored.
    """
    max_length = min(policy.config.block_size, reference.config.block_size)
    pairs = []
    for prompt, *responses in zip(prompts, a, b, strict=True):
        ids = [tokenizer.encode(response) for response in responses]
        prompt, ids, *_ = dataset.cut_to_context(tokenizer.encode(prompt), ids, [True, True], tokenizer.eot, max_length)
        pairs.append((prompt, *ids))
    device = str(policy.wte.weight.device)
    settings = train_dpo.Settings(data="", init="", out="", batch_size=batch_size, device=device, dtype="float32")
    log_pi, log_ref = (train_dpo.all_logps(model, pairs, settings, progress) for model in (policy, reference))
    return log_pi - log_ref


def load_judge(name, device="cpu", **chat):
    """Returns the judge of that name. `chat` are the arguments of a ChatJudge.

    Raises UserError if the name is unknown, a run or file is missing, or the endpoint or its key cannot work.
    """
    kind, _, rest = name.partition(":")
    if kind == "chat":
        return ChatJudge(rest, **chat)
    if kind == "implicit":
        run, _, reference = rest.partition(",")
        if not run or not reference:
            raise UserError(f"--judge {name}: write implicit:RUN,REFERENCE, as in implicit:runs/toy/dpo,runs/toy/sft")
        models, tokenizer = load_models(run, reference, device=device)
        bar = f"implicit reward of {run}"
        return lambda *texts: verdicts(implicit_rewards(*models, tokenizer, *texts, progress=bar).tolist())
    if name == "toy" or Path(name).is_file():
        return reward_judge(load_reward(name))
    if Path(name).is_dir():
        model, tokenizer = reward_model.load(name)
        return reward_judge(reward_model.of_texts(model.to(device), tokenizer))
    raise unknown("judge", name, ["toy", "FILE", "FOLDER", "implicit:RUN,REFERENCE", *(f"chat:{q}" for q in QUESTIONS)])
