"""The source of walkthrough.ipynb. After a change here: python -m course.notebook (it runs every cell)."""
# ruff: noqa: E402, B018

# %% [markdown]
# # DPO, from a pair of sentences to a trained policy
#
# Run the cells from top to bottom. It takes less than five minutes on two cores, and nothing is fetched once the
# project is installed. The outputs are there already, so it can also just be read.
#
# The theory stands at the top of `train_dpo.py`; read that first. Every function that does something here is the
# project's own: `??` behind a name, as in `train_dpo.dpo_loss??`, shows its code.

# %% [markdown]
# ## 0. Set up
#
# Where the project is installed, the next cell does nothing. On a hosted notebook it fetches and installs it: put the
# address of the repository in first.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://..."  # only for a hosted notebook: the address that `git clone` takes

root = next((folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "train_dpo.py").exists()), None)
if root is None:
    root = Path.cwd() / "minidpo"
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, root], check=True)
if importlib.util.find_spec("tiktoken") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", f"{root}[plot]"], check=True)
os.chdir(root)
sys.path.insert(0, str(root))

# %%
import matplotlib.pyplot as plt
import torch

import data
import train_dpo
import train_sft
from course import show
from data.toy_sentiment import grammar
from experiments import evaluate, explain
from experiments.frontier import limit
from experiments.frontier import sweep as frontier
from minidpo import checkpoint, dataset
from minidpo.report import samples_table
from minidpo.sampling import complete

# %% [markdown]
# How much of everything. Smaller numbers are faster, and less is learnt.

# %%
SFT_EPOCHS = 1.0
DPO_EPOCHS = 1.0
PROMPTS = 200  # held-out prompts to judge the policy on
RUNS = Path("runs/walkthrough")  # what is trained here goes there

# %% [markdown]
# ## 1. The data
#
# Invented movie reviews. A pair is a prompt $x$, the response $y_w$ that somebody chose and the one, $y_l$, that they
# rejected.

# %%
pairs = dataset.read_jsonl(data.find("toy", "pairs_train"), dataset.PAIR)
for pair in pairs[:3]:
    print("prompt  ", pair["prompt"])
    print("chosen  ", pair["chosen"])
    print("rejected", pair["rejected"], "\n")

# %% [markdown]
# In real data nobody knows what made people choose. Here we do: the reward $r$ of a review is its number of kind words
# minus its number of unkind ones, and the choice is drawn from it by Bradley-Terry,
# $p(y_1 \succ y_2) = \mathrm{sigmoid}(r(y_1) - r(y_2))$. So the better review does not always win.

# %%
differences = [grammar.reward(pair["chosen"]) - grammar.reward(pair["rejected"]) for pair in pairs]
print("rewards differ by   pairs   the better one was chosen   Bradley-Terry says")
for d in (1, 2, 3, 4):
    won, lost = differences.count(d), differences.count(-d)
    print(f"{d:17}{won + lost:8}{won / (won + lost):21.3f}{torch.tensor(float(d)).sigmoid():24.3f}")

# %% [markdown]
# ## 2. A model to start from
#
# DPO moves probability from some responses to others, so the model must be able to write both kinds before. Stage 1
# is ordinary language modelling on reviews of every mood (a minute; if `make demo` left you `runs/toy/sft`, set `SFT`
# to that and skip the training).

# %%
SFT, DPO = RUNS / "sft", RUNS / "dpo"
show.call(train_sft.main, f"--data toy --out {SFT} --epochs {SFT_EPOCHS} --overwrite")

# %%
sft, tokenizer, _ = checkpoint.load(SFT)
prompt = [tokenizer.eot, *tokenizer.encode("I watched this film on Sunday with my dentist")]
for text in complete(sft, tokenizer, [prompt] * 4, max_new_tokens=96, seed=0):
    print("I watched this film on Sunday with my dentist" + text)

# %% [markdown]
# ## 3. Tokens and mask
#
# A row is `∎ prompt response ∎`, where `∎` is the end-of-text token. At each place the model reads the row so far and
# is to predict the next token, the *target*. Only targets in the response count. Below are the targets of two chosen
# responses and then of the two rejected ones; a space is `␣`. Where does the green begin, and why is the last `∎`
# green?

# %%
rows, counts = dataset.encode_pairs(pairs, tokenizer, sft.config.block_size)
batch = dataset.preference_batch(rows[:2])
show.tokens(batch.chosen, tokenizer)

# %%
show.tokens(batch.rejected, tokenizer)

# %% [markdown]
# The same as numbers, one place a line, around the border between prompt and response. The first response token is
# predicted at the last place of the prompt: ids and mask are one apart.

# %%
border = len(rows[0][0])
print(" t   reads  is to predict  counts")
for t in range(border - 3, border + 3):
    i, target, scored = (part[0, t].item() for part in batch.chosen)
    print(f"{t:2}{i:8}{target:15}   {'yes' if scored else 'no'}")

# %% [markdown]
# ## 4. From logits to a log-probability
#
# The model gives a logit for each word of its vocabulary, at each place. Take a vocabulary of 3 and a row of 2 places,
# with odds 1 : 2 : 7 and 6 : 3 : 1, and say that the targets are word 2 and then word 0. A log-softmax over the
# vocabulary makes log-probabilities of the logits, and `gather` picks one from each line of the table:

# %%
logits = torch.tensor([[[1.0, 2.0, 7.0], [6.0, 3.0, 1.0]]]).log()  # (1 row, 2 places, 3 words)
targets = torch.tensor([[2, 0]])
print("the table, as probabilities:\n", logits.log_softmax(dim=-1)[0].exp())
print("of the targets:", train_dpo.token_logps(logits, targets)[0].exp())
print("with 100 added to every logit:", train_dpo.token_logps(logits + 100, targets)[0].exp())

# %% [markdown]
# The log-probability of a whole response is the **sum** over its tokens, by the chain rule:
# $\log \pi(y|x) = \sum_t \log \pi(y_t | x, y_{<t})$. No mean: that would be another quantity.

# %%
with torch.no_grad():
    chosen, rejected = train_dpo.response_logps(sft, batch)
print("log pi(y|x) of the chosen:  ", chosen, "in", batch.chosen.mask.sum(-1).tolist(), "tokens")
print("log pi(y|x) of the rejected:", rejected, "in", batch.rejected.mask.sum(-1).tolist(), "tokens")

# %% [markdown]
# ## 5. Why the loss starts at ln 2, and why it does not stay there
#
# At the start the policy *is* the reference. Both implicit rewards $\beta \log(\pi / \pi_\mathrm{ref})$ are 0, the
# margin is 0, and the loss is $-\log \mathrm{sigmoid}(0) = \ln 2 = 0.6931$, whatever the pair.

# %%
beta = 0.7
policy_logps = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
losses, *_ = train_dpo.dpo_loss(*policy_logps, chosen, rejected, beta)
losses.sum().backward()
print("losses:", losses.detach())
print("slope in log pi of the chosen:  ", policy_logps[0].grad)
print("slope in log pi of the rejected:", policy_logps[1].grad)

# %% [markdown]
# The *value* says nothing, but the *slope* is not zero: it is $-\beta/2$ and $+\beta/2$. A step makes the chosen
# likelier and the rejected less likely. Where the margin is large already, the curve is flat and the pair hardly pulls.

# %%
margins = torch.linspace(-4, 4, 81)
zero = torch.zeros_like(margins)
losses, *_ = train_dpo.dpo_loss(margins, zero, zero, zero, beta=1.0)
plt.figure(figsize=(6, 3.4), layout="constrained")
plt.plot(margins, losses, label="loss = -log sigmoid(margin)")
plt.plot(margins, losses[40] - margins / 2, "--", label="its tangent at the start: slope -1/2")
plt.plot(0, losses[40], "ko", label="every pair at the start: (0, ln 2)")
plt.xlabel("margin = chosen reward - rejected reward")
plt.grid(alpha=0.25)
legend = plt.legend()

# %% [markdown]
# ## 6. One step, every number
#
# One pair and one step of the optimiser, from the SFT model. For each token its log-probability before and after:
# everything in the chosen response is pushed up and everything in the rejected one down, but they share words and
# weights, so not every token obeys. Below it, the loss with the numbers filled in.

# %%
asked = explain.Settings(policy=str(SFT), reference=str(SFT), data="toy", row=29, device="cpu")
train = explain.training_settings(asked)
row, source = explain.read_pair(asked, train, tokenizer, sft.config.block_size)
found = explain.anatomy(sft, sft, row, train)
print("\n".join(explain.terminal(found, asked, train, source, tokenizer, colour=False)))

# %% [markdown]
# ## 7. Train
#
# All pairs, once, 64 in a step. First the reference's log-probabilities of all pairs are computed and kept: after
# that, the reference model itself is no longer needed. Look for the line `before the first update`.

# %%
show.call(train_dpo.main, f"--data toy --init {SFT} --out {DPO} --epochs {DPO_EPOCHS} --overwrite")

# %% [markdown]
# ## 8. The curves
#
# The dots are pairs that were not trained on. Three things to find: where the loss starts; that the *margin* grows
# while the *chosen reward* hardly rises, or falls; that the accuracy stops well below 1. The last is right: a tenth of
# the labels name the worse review, and in more pairs the two are equal.

# %%
show.picture(DPO / "curves.png")

# %% [markdown]
# ## 9. What it writes
#
# Curves on the pairs do not say whether the policy got better. Its samples do: on prompts that no training saw, before
# (reference) and after (policy).

# %%
policy, *_ = checkpoint.load(DPO)
prompts = [record["prompt"] for record in dataset.read_jsonl(data.find("toy", "prompts_test"), ("prompt",))]
judged = evaluate.Settings(str(DPO), str(SFT), "toy", "toy", max_new_tokens=96)


def reward(prompts, texts):
    return [grammar.reward(text) for text in texts]


figures, shown, texts = evaluate.evaluate(policy, sft, tokenizer, prompts[:PROMPTS], reward, judged)
show.markdown(samples_table({"prompt": shown[:6], **{name: texts[name][:6] for name in ("reference", "policy")}}))

# %% [markdown]
# The reward is what we wanted, the KL is what it cost, in nats a response. `grammatical` is the share of samples that
# the grammar of the reviews could have written.

# %%
print(f"{'':14}{'reference':>10}{'policy':>10}")
for name in ("reward_mean", "reward_se", "grammatical", "length_mean"):
    print(f"{name:14}{figures['reference'][name]:10.3f}{figures[name]:10.3f}")
print(f"{'kl_exact':14}{0:10.3f}{figures['kl_exact']:10.3f}")

# %% [markdown]
# ## 10. Reward against KL
#
# One run is one point. Here is the sweep that comes with the project: several methods, several settings each, three
# seeds, all from one SFT model. The black line is the most reward that any policy can have at that KL, worked out from
# Equation 4. Large points are where a training ended, small ones are on the way. Which methods come near the line? What
# does a small beta buy, and what does it cost in grammar?

# %%
points, curve = frontier.read_csv("docs/frontier/toy.csv"), limit.read("docs/frontier/toy_limit.csv")
frontier.draw(points, curve, RUNS / "frontier.png")
show.picture(RUNS / "frontier.png")

# %%
print(frontier.summary(points, curve))

# %% [markdown]
# ## What next
#
# * Change `--beta` in section 7 to 0.1 and run sections 7 to 9 again. Which figure warns you?
# * Fill in the twelve functions: `course/README.md` says how, and the grader tells what a wrong answer looks like.
# * The three open tasks: `course/tasks/README.md`.
