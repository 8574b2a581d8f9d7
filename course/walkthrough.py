"""The source of walkthrough.ipynb. After a change, run `python -m course.notebook`, which runs every cell."""
# ruff: noqa: E402, B018

# %% [markdown]
# # DPO, from a pair of sentences to a trained policy
#
# Run the cells from top to bottom. This takes less than five minutes on two cores. Nothing is downloaded once the
# project is installed. The outputs are stored in the notebook, so you can also read it without running it.
# `course/README.md` says how to open it.
#
# The theory is at the top of `train_dpo.py`; read that first. The functions in this notebook are the project's own.
# Add `??` to a name to see its code, for example `train_dpo.dpo_loss??`.

# %% [markdown]
# ## 0. Set up
#
# The next cell goes to the root of the repository. In a hosted notebook it first downloads and installs the project.
# For that, set `REPOSITORY` to the address of the repository.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://..."  # only for a hosted notebook: the address for `git clone`

places = [Path.cwd() / "minidpo", Path.cwd(), *Path.cwd().parents]  # the first: downloaded before the kernel restarted
root = next((folder for folder in places if (folder / "train_dpo.py").exists()), None)
if root is None:
    root = Path.cwd() / "minidpo"
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, root], check=True)
if importlib.util.find_spec("tiktoken") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", f"{root}[plot]"], check=True)
os.chdir(root)
sys.path.insert(0, str(root))
os.environ["TQDM_DISABLE"] = "1"  # no progress bars: an exported notebook would keep every state of them

# %%
import shutil

import matplotlib.pyplot as plt
import torch

import data
import train_dpo
import train_sft
from course import show
from data.toy_sentiment import grammar
from experiments import common, evaluate, explain
from experiments.frontier import figure, limit
from minidpo import checkpoint, dataset
from minidpo.report import samples_table
from minidpo.sampling import complete

# %% [markdown]
# The size of the runs. With smaller numbers the notebook is faster, but the models learn less. The SFT model of
# `make demo` trains for two epochs, so the results of the demo differ from those below.

# %%
SFT_EPOCHS = 1.0
DPO_EPOCHS = 1.0
PROMPTS = 200  # held-out prompts on which the policy is judged
RUNS = Path("runs/walkthrough")  # folder for the runs of this notebook

# %% [markdown]
# ## 1. The data
#
# The data are invented movie reviews. A pair consists of a prompt `x`, the response `y_w` that somebody chose, and the
# response `y_l` that they rejected.

# %%
records = dataset.read_jsonl(data.find("toy", "pairs_train"), dataset.PAIR)
for record in records[:3]:
    print("prompt  ", record["prompt"])
    print("chosen  ", record["chosen"])
    print("rejected", record["rejected"], "\n")

# %% [markdown]
# In real data nobody knows why people chose as they did. Here we know. The reward `r` of a review is its number of
# kind words minus its number of unkind words. The choice is drawn from the Bradley-Terry model,
# `p(y_1 over y_2) = sigmoid(r(y_1) - r(y_2))`. So the better review does not always win.

# %%
differences = [grammar.reward(record["chosen"]) - grammar.reward(record["rejected"]) for record in records]
print("rewards differ by   pairs   the better one was chosen   Bradley-Terry says")
for d in (1, 2, 3, 4):
    won, lost = differences.count(d), differences.count(-d)
    print(f"{d:17}{won + lost:8}{won / (won + lost):21.3f}{torch.tensor(float(d)).sigmoid():24.3f}")

# %% [markdown]
# ## 2. A model to start from
#
# DPO moves probability from some responses to others, so the model must already be able to write both kinds. Stage 1,
# supervised fine-tuning (SFT), is ordinary language modelling on reviews of every mood. It takes a minute. If you have
# run `make demo`, you can write `SFT = Path("runs/toy/sft")` in the next cell. Then it trains nothing.

# %%
SFT, DPO = RUNS / "sft", RUNS / "dpo"
if SFT == RUNS / "sft":
    show.call(train_sft.main, f"--data toy --out {SFT} --epochs {SFT_EPOCHS} --overwrite")

# %%
sft, tokenizer, _ = checkpoint.load(SFT)
prompt = [tokenizer.eot, *tokenizer.encode("I watched this film on Sunday with my dentist")]
for text in complete(sft, tokenizer, [prompt] * 4, max_new_tokens=96, seed=0):
    print("I watched this film on Sunday with my dentist" + text)

# %% [markdown]
# ## 3. Tokens and mask
#
# A row is `∎ prompt response ∎`, where `∎` is the end-of-text token. At each position the model reads the row so far
# and predicts the next token, the *target*. Only targets in the response are scored: their log-probabilities are added.
# Below you see the targets of two chosen responses, then those of the two rejected ones; a space is shown as `␣`. The
# first `∎` is read and never predicted, so it is not shown. The last `∎` is scored: the policy also learns where a
# response ends. Where does the green begin?

# %%
pairs, counts = dataset.encode(records, dataset.PAIR, tokenizer, sft.config.block_size)
batch = dataset.preference_batch(pairs[:2])
show.tokens(batch.chosen, tokenizer)

# %%
show.tokens(batch.rejected, tokenizer)

# %% [markdown]
# The next cell shows the same as numbers, one position per line, around the boundary between prompt and response. The
# target at position t is the token at position t + 1. So the first scored position is the last position of the prompt.

# %%
boundary = len(pairs[0][0])
print(" t   reads  predicts  counts")
for t in range(boundary - 3, boundary + 3):
    i, target, scored = (part[0, t].item() for part in batch.chosen)
    print(f"{t:2}{i:8}{target:10}  {'yes' if scored else 'no'}")

# %% [markdown]
# ## 4. From logits to a log-probability
#
# At each position, the model outputs one logit for each token of its vocabulary. Take a vocabulary of 3 tokens and a
# row of 2 positions with odds 1 : 2 : 7 and 6 : 3 : 1. The targets are token 2 and then token 0. A log-softmax over the
# vocabulary turns logits into log-probabilities. `token_logps` then takes the one of the target at each position:

# %%
logits = torch.tensor([[[1.0, 2.0, 7.0], [6.0, 3.0, 1.0]]]).log()  # (1 row, 2 positions, 3 tokens)
targets = torch.tensor([[2, 0]])
print("all probabilities, one position per line:\n", logits.log_softmax(dim=-1)[0].exp())
print("probabilities of the targets:", train_dpo.token_logps(logits, targets)[0].exp())
print("the same, with 100 added to every logit:", train_dpo.token_logps(logits + 100, targets)[0].exp())

# %% [markdown]
# The log-probability of a whole response is the **sum** over its tokens, by the chain rule:
# `log pi(y|x) = sum_t log pi(y_t | x, y_<t)`. Do not take the mean: it divides beta by the length of the
# response.

# %%
with torch.no_grad():
    chosen, rejected = train_dpo.response_logps(sft, batch)
print("log pi(y|x) of the chosen:  ", chosen, "in", batch.chosen.mask.sum(-1).tolist(), "tokens")
print("log pi(y|x) of the rejected:", rejected, "in", batch.rejected.mask.sum(-1).tolist(), "tokens")

# %% [markdown]
# ## 5. Why the loss starts at ln 2, and why it does not stay there
#
# At the start the policy *is* the reference. Both implicit rewards `beta log(pi / pi_ref)` are 0, so the
# margin is 0. The loss is `-log sigmoid(0) = ln 2 = 0.6931` for every pair.

# %%
beta = 0.7
policy_logps = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
losses, *_ = train_dpo.dpo_loss(*policy_logps, chosen, rejected, beta)
losses.sum().backward()
print("losses:", losses.detach())
print("d loss / d log pi of the chosen:  ", policy_logps[0].grad)
print("d loss / d log pi of the rejected:", policy_logps[1].grad)

# %% [markdown]
# The *value* is the same for any model, but the *derivative* is not zero: it is `-beta/2` for the chosen response and
# `+beta/2` for the rejected one. The gradient pushes log pi of the chosen response up and log pi of the rejected one
# down. The two share weights, so the chosen one may still fall (section 8). Where the margin is already large, the
# curve below is flat, and the pair has almost no effect.

# %%
margins = torch.linspace(-4, 4, 81)
zero = torch.zeros_like(margins)
losses, *_ = train_dpo.dpo_loss(margins, zero, zero, zero, beta=1.0)
plt.figure(figsize=(6, 3.4), layout="constrained")
plt.plot(margins, losses, label="loss = -log sigmoid(margin)")
plt.plot(margins, losses[40] - margins / 2, "--", label="its tangent at the start: slope -1/2")
plt.plot(0, losses[40], "ko", label="every pair at the start: (0, ln 2)")
plt.xlabel("margin = chosen reward - rejected reward")
plt.ylabel("loss of the pair, nats")
plt.grid(alpha=0.25)
legend = plt.legend()

# %% [markdown]
# ## 6. One step, every number
#
# This is one step of the optimiser on one pair, from the SFT model. The table shows the log-probability of each token
# before and after the step. The loss pushes every token of the chosen response up and every token of the rejected one
# down. But the responses share words and weights, so a token can move the other way. The loss with its numbers comes
# after the table.

# %%
asked = explain.Settings(policy=str(SFT), reference=str(SFT), data="toy", row=29, device="cpu")
train = explain.training_settings(asked)
pair, source = explain.read_pair(asked, train, tokenizer, sft.config.block_size)
found = explain.anatomy(sft, sft, pair, train)
print("\n".join(explain.terminal(found, asked, train, source, tokenizer, colour=False)))

# %% [markdown]
# ## 7. Train
#
# DPO trains on every pair once, 64 pairs per step. Before training, it computes the reference's log-probabilities of
# all pairs and stores them. After that, the reference model is no longer needed. Look for the line
# `before the first update`.
#
# `BETA` is the price of one nat of KL: a larger beta keeps the policy closer to the reference. 0.7 is the toy's own.

# %%
BETA = 0.7
shutil.rmtree(RUNS / "reference_logps", ignore_errors=True)  # so that you see them computed, also the second time
show.call(train_dpo.main, f"--data toy --init {SFT} --out {DPO} --beta {BETA} --epochs {DPO_EPOCHS} --overwrite")

# %% [markdown]
# ## 8. The curves
#
# The dots are measured on pairs that are not in the training data. Find three things:
#
# * where the loss starts;
# * that the *margin* grows while the *chosen reward* hardly rises, or falls;
# * that the accuracy stays well below 1. This is correct: in a tenth of the pairs the chosen review is the worse one,
#   and in another 13 % the two reviews are equally good.

# %%
show.picture(DPO / "curves.png")

# %% [markdown]
# ## 9. What it writes
#
# The curves on the pairs do not show whether the policy improved. Its samples do. Here are samples for prompts that are
# not in the training data, before DPO (reference) and after it (policy), with the reward of each.

# %%
policy, *_ = checkpoint.load(DPO)
prompts = common.read_prompts("toy", limit=PROMPTS)
judged = evaluate.Settings(str(DPO), str(SFT), "toy", "toy", max_new_tokens=96)


def reward(prompts, texts):
    return [grammar.reward(text) for text in texts]


figures, shown, texts = evaluate.evaluate(policy, sft, tokenizer, prompts, reward, judged)
columns = {"prompt": shown[:8]}
for name in ("reference", "policy"):
    columns[name] = [f"**{grammar.reward(text):+d}** {text}" for text in texts[name][:8]]
show.markdown(samples_table(columns))

# %% [markdown]
# The reward is what we want, and the KL is what it costs, in nats per response. `kl_exact` estimates it from the
# samples, with the probabilities of the whole vocabulary at each position. `reward_se` is the standard error of the
# mean reward, `length_mean` is in tokens, and `grammatical` is the share of samples that follow the grammar of the
# reviews.

# %%
print(f"{'':14}{'reference':>10}{'policy':>10}")
for name in ("reward_mean", "reward_se", "grammatical", "length_mean"):
    print(f"{name:14}{figures['reference'][name]:10.3f}{figures[name]:10.3f}")
print(f"{'kl_exact':14}{0:10.3f}{figures['kl_exact']:10.3f}")

# %% [markdown]
# ## 10. Reward against KL
#
# One run gives one point. The figure shows the sweep that comes with the project: several methods with several settings
# and three seeds each, all from one SFT model. The black line is the highest reward that any policy can have at that
# KL, computed from Equation 4. Large points show the end of a run, small points show earlier steps. Which methods come
# near the line? How much reward does a small beta gain, and how much grammar does it cost? `docs/frontier.md` explains
# the methods and the columns of the table.

# %%
points, curve = figure.read_csv("docs/frontier/toy.csv"), limit.read("docs/frontier/toy_limit.csv")
figure.draw(points, curve, RUNS / "frontier.png")
show.picture(RUNS / "frontier.png")

# %%
print(figure.summary(points, curve, figure.read_covariances("docs/frontier/toy.csv")))

# %% [markdown]
# ## What next
#
# * Set `BETA = 0.1` in section 7 and run sections 7 to 9 again. Compare `kl_exact` and `grammatical` with those above.
# * Write the twelve functions: `course/README.md` explains how. The grader names the mistake in a wrong answer.
# * Do the three open tasks: `course/tasks/README.md`.
