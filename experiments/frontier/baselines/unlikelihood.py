"""Unlikelihood: raise log pi of the chosen response, lower alpha times that of the rejected one, and nothing else.

    python -m experiments.frontier.baselines.unlikelihood --data toy --init runs/toy/sft --out runs/unlikelihood

"Unlikelihood" names two losses. Welleck et al. 2020 (arXiv 1908.04319) add -alpha log(1 - p) for each unwanted token,
which is at least 0. The one here is about whole responses, as the DPO paper describes its baseline (section 6: maximise
the probability of y_w, minimise that of y_l, with a coefficient alpha in [0, 1] on the second):

    L(pi)  =  E[ -log pi(y_w|x)  +  alpha log pi(y_l|x) ]

For alpha = 1 its gradient is DPO's (A.4) without the weight beta sigmoid(rejected_reward - chosen_reward), so it shows
what that weight does. The loss has no lower bound: log pi(y_l|x) can fall without end, and nothing makes the next step
smaller. So the result depends on learning rate and number of steps as much as on alpha. alpha = 0 is maximum likelihood
of the chosen: Preferred-FT, but averaged per response, not per token.
"""

import dataclasses

import train_dpo
from minidpo.settings import UserError, knob, run_main


@dataclasses.dataclass(kw_only=True)
class Settings(train_dpo.Settings):
    alpha: float = knob(0.1, "weight of the rejected response, at most 1; 0: maximum likelihood of the chosen")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha}: must be from 0 to 1; try 0.1.")

    @property
    def variant(self):
        """The keywords of `unlikelihood_loss`."""
        return {"alpha": self.alpha}


def unlikelihood_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, alpha
):
    """The loss above, pair by pair; takes and returns what train_dpo.dpo_loss does.

    The reference plays no part in the losses. The rewards are the log-ratios to it, log pi - log pi_ref, detached.
    """
    losses = -policy_chosen_logps + alpha * policy_rejected_logps
    chosen_rewards = policy_chosen_logps - reference_chosen_logps
    rejected_rewards = policy_rejected_logps - reference_rejected_logps
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def main():
    train_dpo.main(Settings, loss=unlikelihood_loss)


if __name__ == "__main__":
    run_main(main)
