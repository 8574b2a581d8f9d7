"""Unlikelihood: raise log pi of the chosen response, lower alpha times that of the rejected one, and nothing else.

    python -m experiments.frontier.baselines.unlikelihood --data toy --init runs/sft --out runs/unlikelihood --alpha 0.1

"Unlikelihood" names two losses. Welleck et al. 2020 (arXiv 1908.04319) add -alpha log(1 - p) for each unwanted token,
which is at least 0. The one here is of whole responses, as the DPO paper describes its baseline (section 6:
maximise the probability of y_w, minimise that of y_l, with a coefficient alpha in [0, 1] on the second):

    L(pi)  =  E[ -log pi(y_w|x)  +  alpha log pi(y_l|x) ]

For alpha = 1 its gradient is DPO's (A.4) without the weight beta sigmoid(rejected_reward - chosen_reward), so that it
shows what that weight is good for. And a token of a rejected response is not unwanted by itself: most of them, such
as "The film", are in chosen ones as well.

The loss has no lower bound: log pi(y_l|x) can fall for ever, and the more it has fallen, the more there is to gain
by training on. No reference holds the policy back. So what comes out depends on learning rate and number of steps as
much as on alpha. alpha = 0 is maximum likelihood of the chosen (preferred_ft.py, but per response, not per token).
"""

import dataclasses
from functools import partial

from experiments.frontier.baselines import SETS, PairSettings, fit, pair_means, pair_step, policy_run
from minidpo.settings import UserError, knob, parse_settings, run_main
from train_dpo import logps_of


@dataclasses.dataclass
class Settings(PairSettings):
    alpha: float = knob(0.1, "weight of the rejected response, at most 1; 0: maximum likelihood of the chosen")

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha}: must be from 0 to 1; try 0.1.")


def unlikelihood_loss(chosen_logps, rejected_logps, alpha):
    """The loss above, pair by pair: (B,), (B,), summed over the response, in nats -> (B,)."""
    return -chosen_logps + alpha * rejected_logps


def measure(policy, rows, indices, settings):
    """The metrics of the pairs `indices`, each (B,), by name; "loss" with its gradient."""
    chosen, rejected = logps_of(policy, rows, indices, settings)
    loss = unlikelihood_loss(chosen, rejected, settings.alpha)
    return {"loss": loss, "logps/chosen": chosen, "logps/rejected": rejected}


def train(policy, rows, settings, on_step=None, state=None):
    """Trains the policy in place on rows of (prompt_ids, chosen_ids, rejected_ids); on_step and state as in `fit`."""
    policy.set_dropout(0.0)
    fit(policy, rows, partial(pair_step, measure), settings, on_step, state)


def main():
    settings = parse_settings(Settings, __doc__.split("\n\n")[0], sets=SETS)
    policy_run(settings, train, partial(pair_means, measure), "Unlikelihood")


if __name__ == "__main__":
    run_main(main)
