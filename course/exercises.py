"""Twelve small functions that make up DPO, in the order one needs them. To be filled in and graded:

    cp course/exercises.py my_dpo.py
    python -m doctest my_dpo.py            # tries the example of each function; silence means that all agree
    python -m course.grade my_dpo.py       # ten random cases a function, ten points

All from the root of the repository. DPO's loss for a pair is -log sigmoid(margin); the margin is the implicit reward of
the chosen response minus that of the rejected one; the implicit reward of a response y to a prompt x is
beta log(pi(y|x) / pi_ref(y|x)), pi the policy, pi_ref the reference (Rafailov et al. 2023, arXiv 2305.18290, Eq. 5, 7).
eot is the end-of-text token.

B pairs, N samples, T tokens, V vocabulary; log-probabilities and KL in nats (natural logarithms). (B,) is a
torch.Tensor of that shape; ids are int64, masks bool, all numbers finite. A float tensor that is returned has the dtype
of those given (float32 or float64). Training needs the gradients through gather_logps, sum_logps, margin_and_loss and
smoothed_loss: no .item() or .detach() there. Leave the arguments as they are. Each function is graded alone and needs
none of the others. PyTorch does most of them in one to three lines; loops are fine too. To import the project's own
functions in an answer would give it away, and is reported.
"""

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401


def tokenise_pair(tokenizer, prompt, chosen, rejected):
    """Three texts -> (prompt_ids, chosen_ids, rejected_ids), lists of ids that DPO can score.

    Each text is encoded by itself: a token must not reach from the prompt into the response. `tokenizer.eot` starts the
    prompt and ends each response, so that the model learns where to begin and when to stop.

    Here "ab" is a token of its own (256), and eot is 257. In "a" + "b" as one text it would swallow the response:

    >>> from minidpo.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer([bytes([i]) for i in range(256)] + [b"ab"])
    >>> tokenizer.encode("a"), tokenizer.encode("b"), tokenizer.encode("ab"), tokenizer.eot
    ([97], [98], [256], 257)
    >>> tokenise_pair(tokenizer, "a", "b", "ba")
    ([257, 97], [98, 257], [98, 97, 257])
    """
    raise NotImplementedError


def shift(row):
    """One row of ids (T + 1,) -> (ids (T,), targets (T,)): reading ids[: t + 1], the model is to predict targets[t].

    >>> shift(torch.tensor([9, 5, 7, 8, 9]))
    (tensor([9, 5, 7, 8]), tensor([5, 7, 8, 9]))
    """
    raise NotImplementedError


def build_batch(prompts, responses):
    """Two lists of B lists of ids -> (ids (B, T), targets (B, T), mask (B, T)), ids and targets int64, mask bool.

    Row i is prompts[i] + responses[i], shifted as above, so T is the longest of these less 1. The mask is true where
    the TARGET is a token of the response, its last one included. Shorter rows are filled on the right with 0 in ids and
    targets and False in the mask. An id says nothing about its place: eot (9 here) may occur inside a response, and 0
    may be an ordinary token. No prompt and no response is empty.

    >>> ids, targets, mask = build_batch([[9, 5], [9]], [[7, 8, 9], [6, 9]])
    >>> ids
    tensor([[9, 5, 7, 8],
            [9, 6, 0, 0]])
    >>> targets
    tensor([[5, 7, 8, 9],
            [6, 9, 0, 0]])
    >>> mask
    tensor([[False,  True,  True,  True],
            [ True,  True, False, False]])
    """
    raise NotImplementedError


def gather_logps(logits, targets):
    """logits (B, T, V), targets (B, T) -> (B, T): the log-probability of each target.

    Logits are log-probabilities up to a constant in each position. Below, position 0 gives odds 1 : 3 and position 1
    gives 4 : 1, so the targets have probabilities 3/4 and 4/5:

    >>> logits = torch.tensor([[[1.0, 3.0], [4.0, 1.0]]]).log() + 2
    >>> gather_logps(logits, torch.tensor([[1, 0]])).exp()
    tensor([[0.7500, 0.8000]])
    """
    raise NotImplementedError


def sum_logps(logps, mask):
    """logps (B, T), mask (B, T) -> (B,): log pi(y|x), the chain rule over the tokens of each response.

    >>> sum_logps(torch.tensor([[-9.0, -1.0, -2.0, -3.0]]), torch.tensor([[False, True, True, False]]))
    tensor([-3.])
    """
    raise NotImplementedError


def implicit_reward(policy_logps, reference_logps, beta):
    """log pi(y|x) (B,), log pi_ref(y|x) (B,), beta > 0 -> (B,): the paper's beta log(pi / pi_ref).

    A response that the policy makes 2 nats likelier than the reference does, at beta 0.5:

    >>> implicit_reward(torch.tensor([-10.0]), torch.tensor([-12.0]), 0.5)
    tensor([1.])
    """
    raise NotImplementedError


def margin_and_loss(chosen_rewards, rejected_rewards):
    """Implicit rewards (B,), (B,) -> (margins (B,), losses (B,)), pair by pair, not averaged.

    In the first pair the margin is 0 and the loss -log sigmoid(0) = ln 2. Margins of -1000 happen, as in the second,
    and the loss is 1000 there, not infinite.

    >>> margin_and_loss(torch.tensor([1.0, -600.0]), torch.tensor([1.0, 400.0]))
    (tensor([    0., -1000.]), tensor([6.9315e-01, 1.0000e+03]))
    """
    raise NotImplementedError


def gradient_weight(chosen_rewards, rejected_rewards, beta):
    """Implicit rewards (B,), (B,), beta -> (d loss / d log pi(chosen) (B,), d loss / d log pi(rejected) (B,)).

    Differentiate the loss above by hand, no autograd; the rewards have beta in them already. The loss falls when the
    chosen response becomes likelier, so the first is negative. Margins of 0 and ln 3, beta 0.5:

    >>> gradient_weight(torch.tensor([3.0, 3.0]).log(), torch.tensor([3.0, 1.0]).log(), 0.5)
    (tensor([-0.2500, -0.1250]), tensor([0.2500, 0.1250]))
    """
    raise NotImplementedError


def smoothed_loss(margins, label_smoothing):
    """margins (B,), label_smoothing e -> (B,): the loss if each label is believed to be flipped with probability e.

    Conservative DPO: the loss of the label as given and that of the flipped label, weighted by 1 - e and e. The flipped
    label's margin is the negative. Both are finite at margins of -1000 and 1000, too. For a margin of 2 they are 0.1269
    and 2.1269; 0.9 and 0.1 of them:

    >>> smoothed_loss(torch.tensor([2.0]), 0.1)
    tensor([0.3269])
    """
    raise NotImplementedError


def accuracy(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """Four times log-probabilities (B,) -> a number from 0 to 1 (a float, or a tensor of shape ()).

    The share of pairs whose chosen response has the higher implicit reward. Equal rewards (==) count one half: before
    the first step all are equal, and a policy that knows nothing should score 1/2. (No beta: it does not matter here.)

    Below, the log-ratios of the chosen are 1, 0, 0, those of the rejected 0, 0, 2: a win, a tie, a loss.

    >>> chosen, rejected = torch.tensor([-10.0, -7.0, -8.0]), torch.tensor([-4.0, -7.0, -3.0])
    >>> float(accuracy(chosen, rejected, torch.tensor([-11.0, -7.0, -8.0]), torch.tensor([-4.0, -7.0, -5.0])))
    0.5
    """
    raise NotImplementedError


def kl_estimates(policy_logits, reference_logits, targets, mask):
    """Both estimates of KL(policy || reference) from each of N samples -> (plain (N,), exact (N,)), nats per response.

    The samples were drawn from the policy; logits (N, T, V), targets (N, T), mask (N, T). At each response position:
    plain takes log pi - log pi_ref of the token that was drawn, exact takes the whole KL over the vocabulary,
    sum over v of pi(v) (log pi(v) - log pi_ref(v)). Both sum over the response.

    One position, policy 3/4 : 1/4, reference 1/2 : 1/2, token 0 drawn: plain is ln 1.5 = 0.4055, exact is
    3/4 ln 1.5 + 1/4 ln 0.5 = 0.1308.

    >>> policy, reference = torch.tensor([[[3.0, 1.0]]]).log(), torch.tensor([[[5.0, 5.0]]]).log()
    >>> kl_estimates(policy, reference, torch.tensor([[0]]), torch.tensor([[True]]))
    (tensor([0.4055]), tensor([0.1308]))
    """
    raise NotImplementedError


def pick_beta(frontier, kl_budget):
    """Runs, a list of dicts with "beta", "seed", "kl" and "reward" -> the best beta (float) within the budget, or None.

    A beta has several runs. Average their KL and reward first: a single good run is luck. Of the betas whose mean KL is
    at most kl_budget, the one with the highest mean reward (there are no ties); None if there is no such beta.

    Beta 1 has mean KL 2 and mean reward 5, beta 2 has 1 and 4, beta 4 has 0.5 and 3:

    >>> runs = [(1.0, 0, 1.0, 9.0), (1.0, 1, 3.0, 1.0), (2.0, 0, 1.0, 4.5), (2.0, 1, 1.0, 3.5), (4.0, 0, 0.5, 3.0)]
    >>> frontier = [dict(beta=beta, seed=seed, kl=kl, reward=reward) for beta, seed, kl, reward in runs]
    >>> pick_beta(frontier, 1.5)
    2.0
    """
    raise NotImplementedError
