"""The methods that DPO is compared with (Rafailov et al. 2023, section 6).

Preferred-FT    SFT on the chosen responses: train_sft.train_step
unlikelihood    raises the chosen, lowers the rejected, without DPO's weights: a loss for train_dpo.py
reward_model    Bradley-Terry on a scalar head: the reward that best_of_n and ppo use
best_of_n       samples N responses, keeps the one that the reward model likes best
ppo             reinforcement learning on a reward, learned or true
"""

from tqdm import tqdm

from minidpo.optim import learning_rate, make_optimizer, set_learning_rate
from minidpo.run import count_steps, steps


def fit(model, rows, train_step, settings, on_step=None):
    """Trains `model` in place on `rows`: the loop of train_sft.py and train_dpo.py without a run folder.

    `train_step(model, optimizer, rows, indices=..., settings=...)` makes one step and returns its metrics: that of
    train_sft, for example, or that of train_dpo with its `reference` given. Device and dtype in `settings` must not be
    "auto". Calls on_step(step, metrics) after each step, counted from 1. A terminal shows a progress bar.
    """
    optimizer = make_optimizer(model, settings.optimizer, settings.lr)
    total, last = count_steps(rows, settings)
    for step, indices in tqdm(steps(rows, settings), "training", last, leave=False, unit="step", disable=None):
        model.train()  # on_step may have left it in evaluation mode
        set_learning_rate(optimizer, learning_rate(step, total, settings.lr, settings.warmup_steps, settings.decay))
        metrics = train_step(model, optimizer, rows, indices=indices, settings=settings)
        if on_step:
            on_step(step + 1, metrics)
