"""Twelve small functions that make up DPO, in the order in which you need them.

Write them and have them graded, from the root of the repository:

    cp course/exercises.py my_dpo.py
    python -m doctest my_dpo.py            # runs the example of each function; prints nothing if all are right
    python -m course.grade my_dpo.py       # ten random cases for each function, one point per case

The words (Rafailov et al. 2023, arXiv 2305.18290, Equations 5 and 7): pi is the policy and pi_ref the reference. The
implicit reward of a response y to a prompt x is beta log(pi(y|x) / pi_ref(y|x)). The margin of a pair is the implicit
reward of the chosen response minus that of the rejected one. DPO's loss for a pair is -log sigmoid(margin). eot is the
end-of-text token.

The shapes: B pairs, N samples, T tokens, a vocabulary of V tokens. (B,) means a torch.Tensor of that shape. Ids are
int64, masks are bool, and all numbers are finite. Log-probabilities and KL are in nats (natural logarithms).

The rules:
* A float tensor that you return has the dtype of the ones you were given (float32 or float64).
* Training needs the gradients through gather_logps, sum_logps, implicit_reward, margin_and_loss and smoothed_loss: do
  not use .item() or .detach() there.
* Do not change the arguments.
* Each function is graded alone and needs none of the others. You may call your own `shift` in `build_batch`, but then a
  mistake in `shift` costs points in both.
* Do not import the project's own functions. They are the answers, and the grader reports it.

With PyTorch most of the functions take one to three lines. Loops are fine too.
"""

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401


def tokenise_pair(tokenizer, prompt, chosen, rejected):
    """Three texts -> (prompt_ids, chosen_ids, rejected_ids), lists of ids that DPO can score.

    Encode each text by itself: no token may contain both the end of the prompt and the start of the response.
    `tokenizer.eot` starts the prompt and ends each response, so that the model learns where a text begins and when to
    stop.

    In this example "ab" is one token (256), and eot is 257. If "a" + "b" were encoded as one text, that token would
    take the whole response:

    >>> from minidpo.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer([bytes([i]) for i in range(256)] + [b"ab"])
    >>> tokenizer.encode("a"), tokenizer.encode("b"), tokenizer.encode("ab"), tokenizer.eot
    ([97], [98], [256], 257)
    >>> tokenise_pair(tokenizer, "a", "b", "ba")
    ([257, 97], [98, 257], [98, 97, 257])
    """
    raise NotImplementedError


def shift(row):
    """One row of ids (T + 1,) -> (ids (T,), targets (T,)): from ids[: t + 1] the model predicts targets[t].

    >>> shift(torch.tensor([9, 5, 7, 8, 9]))
    (tensor([9, 5, 7, 8]), tensor([5, 7, 8, 9]))
    """
    raise NotImplementedError


def build_batch(prompts, responses):
    """Two lists of B lists of ids -> (ids (B, T), targets (B, T), mask (B, T)), ids and targets int64, mask bool.

    Row i is prompts[i] + responses[i], shifted as in `shift`. T is the length of the longest such row minus 1. The mask
    is True where the TARGET is a token of the response, including the last one. Pad shorter rows on the right, with 0
    in ids and targets and False in the mask. Do not make the mask from the ids: eot (9 here) may occur inside a
    response, and 0 may be an ordinary token. No prompt and no response is empty.

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

    At each position, logits are log-probabilities plus a constant. In the example, position 0 has odds 1 : 3 and
    position 1 has odds 4 : 1, so the targets have probabilities 3/4 and 4/5:

    >>> logits = torch.tensor([[[1.0, 3.0], [4.0, 1.0]]]).log() + 2
    >>> gather_logps(logits, torch.tensor([[1, 0]])).exp()
    tensor([[0.7500, 0.8000]])
    """
    raise NotImplementedError


def sum_logps(logps, mask):
    """logps (B, T), mask (B, T) -> (B,): log pi(y|x), by the chain rule over the tokens of each response.

    >>> sum_logps(torch.tensor([[-9.0, -1.0, -2.0, -3.0]]), torch.tensor([[False, True, True, False]]))
    tensor([-3.])
    """
    raise NotImplementedError


def implicit_reward(policy_logps, reference_logps, beta):
    """log pi(y|x) (B,), log pi_ref(y|x) (B,), beta > 0 -> (B,): beta log(pi / pi_ref).

    The log-probability of the response is 2 nats higher under the policy than under the reference, and beta is 0.5:

    >>> implicit_reward(torch.tensor([-10.0]), torch.tensor([-12.0]), 0.5)
    tensor([1.])
    """
    raise NotImplementedError


def margin_and_loss(chosen_rewards, rejected_rewards):
    """Implicit rewards (B,), (B,) -> (margins (B,), losses (B,)), one value per pair, not averaged.

    In the first pair the margin is 0, so the loss is -log sigmoid(0) = ln 2. In the second pair the margin is -1000.
    There the loss must be 1000, not infinite.

    >>> margin_and_loss(torch.tensor([1.0, -600.0]), torch.tensor([1.0, 400.0]))
    (tensor([    0., -1000.]), tensor([6.9315e-01, 1.0000e+03]))
    """
    raise NotImplementedError


def gradient_weight(chosen_rewards, rejected_rewards, beta):
    """Implicit rewards (B,), (B,), beta -> (d loss / d log pi(chosen) (B,), d loss / d log pi(rejected) (B,)).

    Differentiate the loss of `margin_and_loss` by hand and write the formula. Autograd is not allowed here. The rewards
    already contain beta. (Other pages call w = sigmoid(-margin) the gradient weight. Here it is multiplied by -beta and
    by beta.) The loss falls when the chosen response becomes likelier, so the first derivative is negative. The margins
    here are 0 and ln 3, and beta is 0.5:

    >>> gradient_weight(torch.tensor([3.0, 3.0]).log(), torch.tensor([3.0, 1.0]).log(), 0.5)
    (tensor([-0.2500, -0.1250]), tensor([0.2500, 0.1250]))
    """
    raise NotImplementedError


def smoothed_loss(margins, label_smoothing):
    """margins (B,), label_smoothing e -> (B,): the loss if each label is wrong with probability e.

    This is conservative DPO: the loss of the label as given, times 1 - e, plus the loss of the flipped label, times e.
    The margin of the flipped label is minus the margin. Both losses are finite even at margins of -1000 and 1000. At a
    margin of 2 the two losses are 0.1269 and 2.1269, so the result is 0.9 * 0.1269 + 0.1 * 2.1269 = 0.3269:

    >>> smoothed_loss(torch.tensor([2.0]), 0.1)
    tensor([0.3269])
    """
    raise NotImplementedError


def accuracy(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """Four tensors of log-probabilities (B,) -> a number from 0 to 1 (a float, or a tensor of shape ()).

    This is the share of pairs whose chosen response has the higher implicit reward. A pair with equal rewards (==)
    counts one half: before the first step all rewards are equal, and a policy that has learnt nothing should score 1/2.
    Beta is not an argument, because it does not change which reward is higher.

    In the example, log(pi / pi_ref) of the chosen responses is 1, 0, 0 and that of the rejected ones is 0, 0, 2: a win,
    a tie, a loss.

    >>> chosen, rejected = torch.tensor([-10.0, -7.0, -8.0]), torch.tensor([-4.0, -7.0, -3.0])
    >>> float(accuracy(chosen, rejected, torch.tensor([-11.0, -7.0, -8.0]), torch.tensor([-4.0, -7.0, -5.0])))
    0.5
    """
    raise NotImplementedError


def kl_estimates(policy_logits, reference_logits, targets, mask):
    """Two estimates of KL(policy || reference) for each of N samples -> (plain (N,), exact (N,)), nats per response.

    The samples were drawn from the policy. The logits are (N, T, V), targets and mask are (N, T). Each estimate is a
    sum over the response positions, and at each position
    * plain takes log pi - log pi_ref of the token that was drawn;
    * exact takes the KL over the whole vocabulary, sum over v of pi(v) (log pi(v) - log pi_ref(v)). It is an
      estimate as well, because the earlier tokens were sampled.

    The example has one position, policy (3/4, 1/4), reference (1/2, 1/2), and token 0 was drawn. Plain is
    ln 1.5 = 0.4055, and exact is 3/4 ln 1.5 + 1/4 ln 0.5 = 0.1308.

    >>> policy, reference = torch.tensor([[[3.0, 1.0]]]).log(), torch.tensor([[[5.0, 5.0]]]).log()
    >>> kl_estimates(policy, reference, torch.tensor([[0]]), torch.tensor([[True]]))
    (tensor([0.4055]), tensor([0.1308]))
    """
    raise NotImplementedError


def pick_beta(frontier, kl_budget):
    """Runs, a list of dicts with "beta", "seed", "kl" and "reward" -> the best beta (float) within the budget, or None.

    Each beta may have several runs. Average their KL and their reward first, because a single good run may be luck.
    Among the betas whose mean KL is at most kl_budget, return the one with the highest mean reward (there are no ties).
    Return None if there is no such beta.

    Below, beta 1 has mean KL 2 and mean reward 5, beta 2 has 1 and 4, beta 4 has 0.5 and 3:

    >>> runs = [(1.0, 0, 1.0, 9.0), (1.0, 1, 3.0, 1.0), (2.0, 0, 1.0, 4.5), (2.0, 1, 1.0, 3.5), (4.0, 0, 0.5, 3.0)]
    >>> frontier = [dict(beta=beta, seed=seed, kl=kl, reward=reward) for beta, seed, kl, reward in runs]
    >>> pick_beta(frontier, 1.5)
    2.0
    """
    raise NotImplementedError
