"""Preferred-FT: supervised fine-tuning of the SFT model on the chosen responses; the rejected ones are not looked at.

    python -m experiments.frontier.baselines.preferred_ft --data toy --init runs/sft --out runs/preferred_ft

The step is train_sft.py's, on rows (prompt, chosen); one that was chosen in several pairs counts as many times. There
is no knob that trades reward against distance: with enough pairs it ends at the distribution of the chosen.
"""

import dataclasses

import train_sft
from experiments.frontier.baselines import SETS, PairSettings, fit, policy_run
from minidpo.settings import parse_settings, run_main


@dataclasses.dataclass
class Settings(PairSettings):
    pass


def chosen(rows):
    """Rows (prompt_ids, chosen_ids, rejected_ids) -> SFT rows (prompt_ids, chosen_ids)."""
    return [(prompt, response) for prompt, response, _ in rows]


def train(policy, rows, settings, on_step=None, state=None):
    """Trains the policy in place on rows of (prompt_ids, chosen_ids, rejected_ids); on_step and state as in `fit`."""
    policy.set_dropout(0.0)
    fit(policy, chosen(rows), train_sft.train_step, settings, on_step, state)


def evaluate(policy, rows, settings):
    """Mean loss over the tokens of the chosen responses, in nats a token."""
    return train_sft.evaluate(policy, chosen(rows), settings)


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0], sets=SETS)
    policy_run(settings, train, evaluate, "Preferred-FT")


if __name__ == "__main__":
    run_main(main)
