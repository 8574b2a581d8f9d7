"""Random cases, an oracle and the known mistakes for each exercise.

Everything here is a plain loop over Python floats (float64), on purpose. There are no tensors, no broadcasting and no
calls of the project's own functions, so that an oracle does not share a mistake with the answer that it judges. Only
the tokenizer is the project's. A list stands for a tensor of one dimension, nested lists for one of several.

For each exercise, `NAME_case` draws the arguments and the function NAME is the oracle, which returns the right answer.
Its MISTAKES are variants of the oracle with one thing wrong, each with the message that the student will read. The
grader compares an answer with the oracle, and if they differ, with each mistake.
"""

import dataclasses
import math
import random
import struct
from collections.abc import Callable
from typing import NamedTuple

from minidpo.tokenizer import Tokenizer

CASES = 10  # per exercise, one point each


class Tensor(NamedTuple):
    """An argument that the student's function receives as a torch.Tensor."""

    dtype: str  # float32, float64, int64 or bool
    values: list


@dataclasses.dataclass(frozen=True)
class Exercise:
    name: str
    case: Callable  # (random.Random, number of the case) -> list of arguments
    oracle: Callable  # the arguments, with lists for Tensors -> a tuple of the values to return
    returns: dict  # {name of a returned value: its kind}, in order; the kinds are
    # "ids" (a list of int), "int64", "bool" or "float" (a tensor), "number" and "number or None"
    mistakes: list  # of (message, function with the oracle's signature)
    # {name of a returned value that must have a gradient: function of the arguments -> the gradient of its sum, a list
    # with one item for each of the first `inputs` arguments}
    gradient: dict = dataclasses.field(default_factory=dict)
    inputs: int = 1
    by_hand: bool = False  # whether autograd is forbidden
    hints: dict = dataclasses.field(default_factory=dict)  # {part of an error's message: what to do about it}


def floats(values, number):
    """A float Tensor: float64 in even cases, float32 with rounded values in odd cases."""
    if number % 2 == 0:
        return Tensor("float64", values)
    return Tensor("float32", nested(lambda x: struct.unpack("f", struct.pack("f", x))[0], values))


def nested(function, values):
    """Applies `function` to every number in nested lists."""
    return [nested(function, v) for v in values] if isinstance(values, list) else function(values)


def normal(draw, shape, scale=1.0, mean=0.0):
    """Nested lists of the given shape, drawn from a normal distribution."""
    if not shape:
        return draw.gauss(mean, scale)
    return [normal(draw, shape[1:], scale, mean) for _ in range(shape[0])]


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigmoid(x):
    """log(1 + e^-x), finite for every x."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


CUTS = (10.0, 20.0, 30.0, 50.0, 80.0, 88.0, 100.0, 500.0)  # where answers cut off a margin, or a loss
# log(p + eps) and log(max(p, eps)), as they are written against log(0)
CUT_LOGS = [lambda p, e=e: math.log(p + e) for e in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12, 1e-20)]
CUT_LOGS += [lambda p, e=e: math.log(max(p, e)) for e in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12, 1e-20)]


def log_softmax(logits):
    """(V,) -> (V,)"""
    largest = max(logits)
    total = largest + math.log(sum(math.exp(x - largest) for x in logits))
    return [x - total for x in logits]


# ---- tokenise_pair ----


def tokenise_pair_case(draw, number):
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"ba", b"aba", b"bab", b" a", b" b"]

    def text(first, least):
        return first + "".join(draw.choice("aab b") for _ in range(draw.randint(least, 6)))

    # In odd cases the text is "...a" + "b...", so that the token "ab" could cross the boundary. Case 0 has no prompt.
    prompt = "" if number == 0 else "A" + text("", 1).strip() + "a"
    chosen = text("b" if number % 2 else " ", 4) + "Y"
    rejected = text("b" if number % 2 else " ", 4) + "aX"
    return [Tokenizer(tokens), prompt, chosen, rejected]


def tokenise_pair(tokenizer, prompt, chosen, rejected):
    eot, encode = tokenizer.eot, tokenizer.encode
    return [eot, *encode(prompt)], [*encode(chosen), eot], [*encode(rejected), eot]


EOT_TEXT = "<|endoftext|>"


def _merged(tokenizer, prompt, chosen, rejected):
    start, eot = tokenizer.encode(prompt), tokenizer.eot
    cut = ([*tokenizer.encode(prompt + response)[len(start) :], eot] for response in (chosen, rejected))
    return ([eot, *start], *cut)


TOKENISE_MISTAKES = [
    ("prompt and response are encoded as one text, so that a token crosses the boundary", _merged),
    ("no eot before the prompt", lambda t, p, w, l: (t.encode(p), *tokenise_pair(t, p, w, l)[1:])),
    (
        "no eot after the response, so the model never learns to stop",
        lambda t, p, w, l: ([t.eot, *t.encode(p)], t.encode(w), t.encode(l)),
    ),
    ("no eot after the response, so the model never learns to stop", lambda t, *texts: [t.encode(x) for x in texts]),
    ("an extra eot before the response", lambda t, *texts: [[t.eot, *t.encode(x), *[t.eot][i:]]
        for i, x in zip((1, 0, 0), texts, strict=True)]),
    ("an extra eot after the prompt",
        lambda t, p, w, l: ([t.eot, *t.encode(p), t.eot], *tokenise_pair(t, p, w, l)[1:])),
    ("the eot stands behind the prompt instead of before it",
        lambda t, p, w, l: ([*t.encode(p), t.eot], *tokenise_pair(t, p, w, l)[1:])),
    ("the response contains the prompt's ids too", lambda t, p, w, l: _with_prompt(t, p, w, l, False, False)),
    ("the response contains the prompt's ids too", lambda t, p, w, l: _with_prompt(t, p, w, l, True, False)),
    ("the response contains the prompt's ids too", lambda t, p, w, l: _with_prompt(t, p, w, l, False, True)),
    ("chosen and rejected are swapped", lambda t, p, w, l: tokenise_pair(t, p, l, w)),
    ("an eot before each response instead of after it", lambda t, p, *both: ([t.eot, *t.encode(p)],
        *([t.eot, *t.encode(x)] for x in both))),
    ("blanks at the ends of a text are removed; they belong to it", lambda t, *x: _changed(t, x, str.strip)),
    ("blanks at the ends of a text are removed; they belong to it",
        lambda t, p, *x: (tokenise_pair(t, p, "", "")[0], *_changed(t, (p, *x), str.lstrip)[1:])),
    ("a blank is added to the text", lambda t, p, *x: (tokenise_pair(t, p, "", "")[0],
        *_changed(t, (p, *x), lambda y: " " + y)[1:])),
    ("a blank is added to the text", lambda t, p, *x: (tokenise_pair(t, p + " ", "", "")[0],
        *tokenise_pair(t, p, *x)[1:])),
    ("the end-of-text token is tokenizer.eot, not 0", lambda t, *x: [[0 if i == t.eot else i for i in ids]
        for ids in tokenise_pair(t, *x)]),
    ("upper case is lost", lambda t, *x: _changed(t, x, str.lower)),
    ("the end-of-text token is tokenizer.eot, not 257", lambda t, *x: [[257 if i == t.eot else i for i in ids]
        for ids in tokenise_pair(t, *x)]),
    ("the text <|endoftext|> is not the token: use tokenizer.eot", lambda t, p, w, l: [
        t.encode(x) for x in (EOT_TEXT + p, w + EOT_TEXT, l + EOT_TEXT)]),
    ("the longer response is cut to the length of the shorter one", lambda t, p, *both: (tokenise_pair(t, p, "", "")[0],
        *([*t.encode(x)[: min(len(t.encode(y)) for y in both)], t.eot] for x in both))),
    ("an empty prompt needs its eot too", lambda t, p, *x: (tokenise_pair(t, p, *x)[0] if p else [],
        *tokenise_pair(t, p, *x)[1:])),
    ("these are the bytes of the text: use tokenizer.encode", lambda t, *x: [[t.eot, *x[0].encode()],
        *([*y.encode(), t.eot] for y in x[1:])]),
]  # fmt: skip


def _changed(t, texts, change):
    """tokenise_pair of the changed texts."""
    return tokenise_pair(t, *map(change, texts))


def _with_prompt(t, prompt, chosen, rejected, eot, merged):
    start = [t.eot] * eot
    ids = ([*t.encode(prompt + x)] if merged else [*t.encode(prompt), *t.encode(x)] for x in (chosen, rejected))
    return [t.eot, *t.encode(prompt)], *([*start, *row, t.eot] for row in ids)


# ---- shift ----


def shift_case(draw, number):
    return [Tensor("int64", [draw.randrange(100) for _ in range(draw.randint(3, 9))])]


def shift(row):
    return row[:-1], row[1:]


SHIFT_MISTAKES = [
    ("not shifted: each position predicts its own token", lambda row: (row[:-1], row[:-1])),
    ("shifted the wrong way: each position predicts the token before it", lambda row: (row[1:], row[:-1])),
    ("shifted the wrong way: each position predicts the token before it",
        lambda row: (row[:-1], row[-1:] + row[:-2])),
    ("the row is reversed", lambda row: (row[:-1][::-1], row[1:][::-1])),
    ("ids and targets are the same", lambda row: (row[1:], row[1:])),
]  # fmt: skip


# ---- build_batch ----

EOT = 9  # in the cases below


def build_batch_case(draw, number):
    def ids(least):  # eot and 0 may occur
        return [draw.randrange(EOT + 1) for _ in range(draw.randint(least, 5))]

    B = draw.randint(2, 4) if number else 1
    return [[[EOT, *ids(0)] for _ in range(B)], [[*ids(0), EOT] for _ in range(B - 1)] + [[*ids(1), EOT, 0, EOT]]]


def build_batch(prompts, responses, scored=None, target=1, left=False):
    """The oracle; the other arguments make the mistakes.

    Args:
        scored: (prompt length, row length - 1, T, targets) -> the positions where the mask is True.
        target: 1 shifts the targets, 0 does not.
        left: pads on the left.
    """
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    T = max(len(row) for row in rows) - 1
    all_ids, all_targets, all_masks = [], [], []
    for prompt, row in zip(prompts, rows, strict=True):
        n = len(row) - 1
        ids, targets = row[:n], row[target : n + target]
        positions = scored(len(prompt), n, T, row[1:]) if scored else range(len(prompt) - 1, n)
        mask = [t in positions for t in range(T)]
        fill = [0] * (T - n)
        if left:
            mask = [False] * (T - n) + mask[:n]
        all_ids.append(fill + ids if left else ids + fill)
        all_targets.append(fill + targets if left else targets + fill)
        all_masks.append(mask)
    return all_ids, all_targets, all_masks


def _scored(positions):
    return lambda prompts, responses: build_batch(prompts, responses, scored=positions)


def _other(ids=None, targets=None):
    """build_batch with other ids or targets: functions of (prompt, response, T) -> a row of T numbers."""

    def made(prompts, responses):
        rows, right = list(zip(prompts, responses, strict=True)), build_batch(prompts, responses)
        T = len(right[0][0])
        made_ids, made_targets = ([f(*row, T) for row in rows] if f else None for f in (ids, targets))
        return made_ids or right[0], made_targets or right[1], right[2]

    return made


def padded(row, T, fill=0):
    return (row + [fill] * T)[:T]


BUILD_MISTAKES = [
    (
        "the targets are shifted but the mask is not: the first response token is never scored",
        _scored(lambda p, n, T, targets: range(p, n)),
    ),
    ("the mask is not shifted: it ends one position after the row", _scored(lambda p, n, T, targets: range(p, n + 1))),
    ("the final token of the response is left out", _scored(lambda p, n, T, targets: range(p - 1, n - 1))),
    ("the prompt is scored", _scored(lambda p, n, T, targets: range(n))),
    (
        "the mask starts one position too early, at the prompt's last token",
        _scored(lambda p, n, T, targets: range(p - 2, n)),
    ),
    ("the padding is scored", _scored(lambda p, n, T, targets: range(p - 1, T))),
    ("prompt and padding are scored", _scored(lambda p, n, T, targets: range(T))),
    ("the mask is on the prompt instead of the response", _scored(lambda p, n, T, targets: range(p - 1))),
    (
        "the mask is made from the ids: every eot is treated as padding",
        _scored(lambda p, n, T, targets: [t for t in range(p - 1, n) if targets[t] != EOT]),
    ),
    (
        "the mask is made from the ids: every 0 is treated as padding",
        _scored(lambda p, n, T, targets: [t for t in range(p - 1, n) if targets[t] != 0]),
    ),
    (
        "the mask is made from the ids: every 0 is treated as padding",
        _scored(lambda p, n, T, targets: [t for t in range(p - 1, n) if t == 0 or targets[t - 1] != 0]),
    ),
    (
        "the mask ends at the first eot: eot may occur inside a response",
        _scored(lambda p, n, T, targets: range(p - 1, p + targets[p - 1 :].index(EOT))),
    ),
    (
        "every row gets the prompt's length of the first row",
        lambda prompts, responses: build_batch(
            prompts, responses, scored=lambda p, n, T, targets: range(len(prompts[0]) - 1, n)
        ),
    ),
    (
        "the targets are not shifted: each position predicts its own token",
        lambda prompts, responses: build_batch(prompts, responses, target=0),
    ),
    ("padded on the left", lambda prompts, responses: build_batch(prompts, responses, left=True)),
    ("the mask ends one position after the row", _scored(lambda p, n, T, targets: range(p - 1, n + 1))),
    ("the mask starts two positions too late", _scored(lambda p, n, T, targets: range(p + 1, n))),
    ("the mask starts at the response's length instead of the prompt's", _scored(lambda p, n, T, t: range(n - p, n))),
    (
        "the mask is inverted",
        _scored(lambda p, n, T, targets: [t for t in range(T) if t < p - 1 or t >= n]),
    ),
    (
        "the targets of the prompt are hidden: targets are the shifted row, and the mask says what counts",
        _other(targets=lambda p, r, T: padded([-100] * (len(p) - 1) + r, T)),
    ),
    (
        "the targets of the prompt are hidden: targets are the shifted row, and the mask says what counts",
        _other(targets=lambda p, r, T: padded([0] * (len(p) - 1) + r, T)),
    ),
    ("the padding is -100 instead of 0", _other(targets=lambda p, r, T: padded((p + r)[1:], T, -100))),
    ("the padding is eot instead of 0", _other(ids=lambda p, r, T: padded((p + r)[:-1], T, EOT))),
    (
        "the padding is eot instead of 0",
        _other(lambda p, r, T: padded((p + r)[:-1], T, EOT), lambda p, r, T: padded((p + r)[1:], T, EOT)),
    ),
    ("the ids are shifted too: they start at the first token", _other(ids=lambda p, r, T: padded((p + r)[1:], T))),
    (
        "shift before padding: the last token of a shorter row is not an input",
        _other(ids=lambda p, r, T: padded(p + r, T)),
    ),
    (
        "the response stands before the prompt",
        _other(lambda p, r, T: padded((r + p)[:-1], T), lambda p, r, T: padded((r + p)[1:], T)),
    ),
]


# ---- gather_logps ----


def gather_logps_case(draw, number):
    """The first cases have one row, one token, or both.

    Cases 4 and 5 have a target whose logit is 1000 lower. In cases 6 to 9 all logits are far from 0, and in cases 6 and
    7 those of one position are 1600 lower than the others.
    """
    B, T = ((1, 3), (1, 1), (3, 1))[number] if number < 3 else (draw.randint(2, 3), draw.randint(2, 4))
    V = draw.randint(3, 6)
    mean = draw.choice((0.0, 0.0 if number % 2 else -100.0)) if number < 6 else (-800.0, 800.0)[number // 2 % 2]
    logits = normal(draw, (B, T, V), scale=3.0, mean=mean)
    targets = [[draw.randrange(V) for _ in range(T)] for _ in range(B)]
    if number in (4, 5):
        logits[0][1][targets[0][1]] -= 1000.0
    if number in (6, 7):
        logits[0][0] = [x - 1600.0 for x in logits[0][0]]
    return [floats(logits, number), Tensor("int64", targets)]


def gather_logps(logits, targets):
    return ([[log_softmax(x)[i] for x, i in zip(*row, strict=True)] for row in zip(logits, targets, strict=True)],)


def _over_positions(logits, targets):
    columns = [[log_softmax(column) for column in zip(*row, strict=True)] for row in logits]  # (B, V, T)
    return ([[log[i][t] for t, i in enumerate(row)] for log, row in zip(columns, targets, strict=True)],)


def exp(x):
    """e^x as PyTorch computes it: infinite, not an error, where it is too large."""
    return math.exp(x) if x < 709 else math.inf


def log(x):
    return math.log(x) if x > 0 else -math.inf


def _rows_with_largest(logits, targets):
    """Subtracts the largest logit of all positions before exp."""
    largest = max(x for row in logits for position in row for x in position)
    return _by_hand([[[x - largest for x in position] for position in row] for row in logits], targets)


def _by_hand(logits, targets):
    return (
        [
            [x[i] - log(sum(map(exp, x))) for x, i in zip(*row, strict=True)]
            for row in zip(logits, targets, strict=True)
        ],
    )


def _reshaped(logits, targets):
    """Reads the numbers of each (T, V) as (V, T)."""
    T = len(targets[0])
    rows = [[x for position in row for x in position] for row in logits]
    return gather_logps([[row[t::T] for t in range(T)] for row in rows], targets)


GATHER_MISTAKES = [
    (
        "the log-softmax is missing: these are raw logits",
        lambda logits, targets: ([[x[i] for x, i in zip(*r, strict=True)] for r in zip(logits, targets, strict=True)],),
    ),
    ("normalised over the positions (dim 1) instead of the vocabulary (dim -1)", _over_positions),
    (
        "probabilities: the logarithm is missing",
        lambda logits, targets: (nested(math.exp, gather_logps(logits, targets)[0]),),
    ),
    (
        "log(softmax(x)) in two steps is -inf where the probability is tiny; F.log_softmax is not",
        lambda logits, targets: (nested(lambda x: x if x > -700 else -math.inf, gather_logps(logits, targets)[0]),),
    ),
    *[
        (
            "log(softmax(x) + eps) is wrong where the probability is tiny; F.log_softmax is right there",
            lambda logits, targets, cut=cut: (nested(lambda x: cut(math.exp(x)), gather_logps(logits, targets)[0]),),
        )
        for cut in CUT_LOGS
    ],
    (
        "the sign is wrong: this is the cross-entropy, -log p",
        lambda logits, targets: (nested(lambda x: -x, gather_logps(logits, targets)[0]),),
    ),
    *[
        (words, lambda logits, targets, f=f: ([[f(log_softmax(x), i) for x, i in zip(*r, strict=True)]
            for r in zip(logits, targets, strict=True)],))
        for words, f in (
            ("this is the likeliest token, not the target", lambda log, i: max(log)),
            ("this is always token 0, not the target", lambda log, i: log[0]),
            ("this is the mean over the vocabulary, not the target", lambda log, i: sum(log) / len(log)),
            ("the logarithm has base 2; nats have base e", lambda log, i: log[i] / math.log(2)),
            ("small log-probabilities are cut off", lambda log, i: max(log[i], -100.0)),
            ("small log-probabilities are cut off", lambda log, i: max(log[i], -50.0)),
        )
    ],
    (
        "sigmoid instead of softmax: the tokens of a vocabulary exclude each other",
        lambda logits, targets: ([[-minus_log_sigmoid(x[i]) for x, i in zip(*r, strict=True)]
            for r in zip(logits, targets, strict=True)],),
    ),
    (
        "normalised over the rows of the batch (dim 0) instead of the vocabulary (dim -1)",
        lambda logits, targets: ([[log_softmax([row[t][i] for row in logits])[b] for t, i in enumerate(ids)]
            for b, ids in enumerate(targets)],),
    ),
    ("exp, sum and log by hand overflow or underflow; F.log_softmax does not", _by_hand),
    ("the largest logit of the whole batch is subtracted, so other rows underflow; F.log_softmax takes each row's own",
        _rows_with_largest),
    ("softmax is applied twice", lambda logits, targets: gather_logps(
        [[list(map(math.exp, log_softmax(position))) for position in row] for row in logits], targets)),
    ("reshape and view do not swap dimensions: use transpose", _reshaped),
    ("target 0 is a token like any other", lambda logits, targets: (
        [[x * (i > 0) for x, i in zip(*row, strict=True)]
        for row in zip(gather_logps(logits, targets)[0], targets, strict=True)],)),
    ("every row gets the targets of the first row", lambda logits, targets: gather_logps(
        logits, [targets[0]] * len(targets))),
    (
        "the targets are shifted a second time",
        lambda logits, targets: gather_logps(logits, [row[1:] + row[:1] for row in targets]),
    ),
]  # fmt: skip


# ---- sum_logps ----


def random_mask(draw, B, T):
    """(B, T): in each row, response positions between prompt and padding.

    The first row has at least two response positions and one of each other kind, or two if T is 6 or more. The second
    row begins with the response, the third ends with it.
    """
    mask, edge = [], 2 if T >= 6 else 1
    for b in range(B):
        start = draw.randint(edge, T - edge - 2) if b == 0 else draw.randrange(T - 1)
        end = draw.randint(start + 2, T - edge) if b == 0 else draw.randint(start + 1, T)
        start, end = 0 if b == 1 else start, T if b == 2 else end
        mask.append([start <= t < end for t in range(T)])
    return Tensor("bool", mask)


def moved(mask, start, end):
    """The mask (B, T) whose responses begin `start` and end `end` positions later, cut at the ends of the row."""
    rows = []
    for row in mask:
        scored = [t for t, m in enumerate(row) if m]
        rows.append([scored[0] + start <= t <= scored[-1] + end for t in range(len(row))])
    return rows


def rolled(mask, by):
    """The mask as torch.roll moves it: what leaves at one end comes in at the other."""
    return [row[-by:] + row[:-by] for row in mask]


MOVED_MASKS = [  # (message, function of a mask)
    ("the response's first token is left out", lambda mask: moved(mask, 1, 0)),
    ("the response's last token is left out", lambda mask: moved(mask, 0, -1)),
    ("the mask is one position too early", lambda mask: moved(mask, -1, -1)),
    ("the mask is one position too early", lambda mask: rolled(mask, -1)),
    ("the mask is one position too late", lambda mask: moved(mask, 1, 1)),
    ("the mask is one position too late", lambda mask: rolled(mask, 1)),
    ("the position before the response counts too", lambda mask: moved(mask, -1, 0)),
    ("the position after the response counts too", lambda mask: moved(mask, 0, 1)),
    ("the mask ends too late: the padding counts too", lambda mask: moved(mask, 0, 99)),
    ("the mask begins too early: the prompt counts too", lambda mask: moved(mask, -99, 0)),
    (
        "the mask is inverted: prompt and padding count, the response does not",
        lambda mask: nested(lambda m: not m, mask),
    ),
]


def sum_logps_case(draw, number):
    B, T = (1, 3)[number] if number < 2 else draw.randint(1, 4), draw.randint(4 if number else 6, 8)
    # in case 8 the probability of the response is too small for float64
    logps = nested(lambda x: (-400.0 if number == 8 else -0.1) - abs(x), normal(draw, (B, T), scale=3.0))
    return [floats(logps, number), random_mask(draw, B, T)]


def _of_rows(function):
    """Applies function(logps of the response, of the whole row, of the rest) to each row."""

    def summed(logps, mask):
        rows = [(logp, m) for logp, m in zip(logps, mask, strict=True)]
        split = lambda logp, m, want: [x for x, scored in zip(logp, m, strict=True) if scored == want]  # noqa: E731
        return ([function(split(logp, m, True), logp, split(logp, m, False)) for logp, m in rows],)

    return summed


sum_logps = _of_rows(lambda response, row, rest: sum(response))

SUM_MISTAKES = [
    (
        "the mean over the response's tokens instead of the sum: this divides beta by the length",
        _of_rows(lambda response, row, rest: sum(response) / len(response)),
    ),
    ("the sum is divided by the length of the row", _of_rows(lambda response, row, rest: sum(response) / len(row))),
    ("the mask is not used: prompt and padding are summed too", _of_rows(lambda response, row, rest: sum(row))),
    ("the sign is wrong", _of_rows(lambda response, row, rest: -sum(response))),
    (
        "this is the probability of the response: log pi is the sum, without exp",
        _of_rows(lambda response, row, rest: math.exp(sum(response))),
    ),
    (
        "the probabilities of the tokens are summed; their logarithms must be",
        _of_rows(lambda response, row, rest: sum(map(math.exp, response))),
    ),
    (
        "the log-probabilities are multiplied instead of added",
        _of_rows(lambda response, row, rest: math.prod(response)),
    ),
    *[(words, lambda logps, mask, move=move: sum_logps(logps, move(mask))) for words, move in MOVED_MASKS],
    (
        "the probabilities of the tokens are summed; their logarithms must be",
        _of_rows(lambda response, row, rest: math.log(sum(map(math.exp, response)))),
    ),
    (
        "logsumexp adds probabilities; log-probabilities are added with sum",
        _of_rows(lambda response, row, rest: math.log(sum(map(math.exp, response)) + len(rest))),
    ),
    (
        "the product of the probabilities is 0 for a long response: add the log-probabilities",
        _of_rows(lambda response, row, rest: log(math.prod(map(math.exp, response)))),
    ),
    (
        "the sum is divided by the root of the length",
        _of_rows(lambda response, row, rest: sum(response) / len(response) ** 0.5),
    ),
    ("this is the largest one, not the sum", _of_rows(lambda response, row, rest: max(response))),
    *[
        (
            "positions outside the response must count 0",
            _of_rows(lambda response, row, rest, fill=fill: sum(response) + sum(fill for _ in rest)),
        )
        for fill in (-1e9, -1e4, -100.0, -math.inf, 1.0)
    ],
]


# ---- implicit_reward, margin_and_loss, gradient_weight ----


def pairwise(function):
    """Turns a function of two numbers into a function of two lists (B,). Further arguments are passed on."""
    return lambda left, right, *more: [function(a, b, *more) for a, b in zip(left, right, strict=True)]


def one(function):
    """Like `pairwise`, for an exercise that returns one tensor."""
    return lambda *arguments: (pairwise(function)(*arguments),)


def two(first, second):
    """Like `pairwise`, for an exercise that returns two tensors."""
    return lambda *arguments: (pairwise(first)(*arguments), pairwise(second)(*arguments))


BETAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.5, 2.0)


def implicit_reward_case(draw, number):
    B = draw.randint(1, 5)
    mean = -800.0 if number == 8 else -40.0
    policy, reference = normal(draw, (B,), 3.0, mean), normal(draw, (B,), 3.0, mean)
    return [floats(policy, number), floats(reference, number), draw.choice(BETAS)]


implicit_reward = one(lambda policy, reference, beta: beta * (policy - reference))

REWARD_MISTAKES = [
    ("beta is missing", one(lambda policy, reference, beta: policy - reference)),
    ("divided by beta instead of multiplied", one(lambda policy, reference, beta: (policy - reference) / beta)),
    ("beta is used twice", one(lambda policy, reference, beta: beta * beta * (policy - reference))),
    ("beta is halved", one(lambda policy, reference, beta: beta / 2 * (policy - reference))),
    ("beta is added instead of multiplied", one(lambda policy, reference, beta: policy - reference + beta)),
    ("the absolute value: the sign is lost", one(lambda policy, reference, beta: beta * abs(policy - reference))),
    ("the reference is missing", one(lambda policy, reference, beta: beta * policy)),
    ("the reference is added instead of subtracted", one(lambda policy, reference, beta: beta * (policy + reference))),
    ("the sign is wrong: reference minus policy", one(lambda policy, reference, beta: beta * (reference - policy))),
    ("beta multiplies only the policy", one(lambda policy, reference, beta: beta * policy - reference)),
    ("beta multiplies only the reference", one(lambda policy, reference, beta: policy - beta * reference)),
    (
        "the ratio of the log-probabilities instead of the log of the ratio",
        one(lambda policy, reference, beta: beta * policy / reference),
    ),
    (
        "the ratio of the probabilities: the logarithm is missing",
        one(lambda policy, reference, beta: beta * math.exp(policy - reference)),
    ),
    (
        "the ratio of the probabilities: the logarithm is missing",
        one(lambda policy, reference, beta: math.exp(beta * (policy - reference))),
    ),
    (
        "the difference of the probabilities: the log-probabilities need no exp",
        one(lambda policy, reference, beta: beta * (math.exp(policy) - math.exp(reference))),
    ),
    (
        "sigmoid belongs to the loss; the reward has none",
        one(lambda policy, reference, beta: sigmoid(beta * (policy - reference))),
    ),
    (
        "the log of the ratio of the log-probabilities: they are logarithms already",
        one(lambda policy, reference, beta: beta * math.log(max(policy / reference, 1e-300))),
    ),
    (
        "log sigmoid belongs to the loss; the reward has none",
        one(lambda policy, reference, beta: -minus_log_sigmoid(beta * (policy - reference))),
    ),
    ("the difference is squared", one(lambda policy, reference, beta: beta * (policy - reference) ** 2)),
    *[
        (
            f"beta is an argument; this always uses {always}",
            one(lambda policy, reference, beta, always=always: always * (policy - reference)),
        )
        for always in (0.1, 0.5)
    ],
    ("negative rewards are cut off", one(lambda policy, reference, beta: max(0.0, beta * (policy - reference)))),
    ("log beta is added: beta multiplies", one(lambda policy, reference, beta: math.log(beta) + policy - reference)),
    (
        "the mean of the batch is subtracted",
        lambda p, r, beta: ([beta * (a - b - (sum(p) - sum(r)) / len(p)) for a, b in zip(p, r, strict=True)],),
    ),
    ("the policy is missing", one(lambda policy, reference, beta: beta * reference)),
]


def rewards_case(draw, number):
    """(chosen, rejected); cases 0 and 1 contain margins of -1000 and 1000."""
    chosen, rejected = normal(draw, (3,), 2.0), normal(draw, (3,), 2.0)
    if number < 2:
        chosen, rejected = chosen + [-600.0, 400.0], rejected + [400.0, -600.0]
    return [floats(chosen, number), floats(rejected, number)]


def _log_of_sigmoid(chosen, rejected):
    margin = chosen - rejected
    return math.inf if margin < -700 else minus_log_sigmoid(margin)


minus = lambda chosen, rejected: chosen - rejected  # noqa: E731
margin_and_loss = two(minus, lambda chosen, rejected: minus_log_sigmoid(chosen - rejected))

LOSS_MISTAKES = [
    (
        "the two rewards are added instead of subtracted",
        two(lambda c, r: c + r, lambda c, r: minus_log_sigmoid(c + r)),
    ),
    (
        "chosen and rejected are swapped: rejected minus chosen",
        two(lambda c, r: r - c, lambda c, r: minus_log_sigmoid(r - c)),
    ),
    ("the log-sigmoid is missing: this is minus the margin", two(minus, lambda c, r: r - c)),
    ("the log-sigmoid is missing: this is the margin", two(minus, minus)),
    (
        "log(sigmoid(x)) or log(1 + exp(x)) in two steps is infinite at large margins; F.logsigmoid is not",
        two(minus, _log_of_sigmoid),
    ),
    ("the minus sign before log sigmoid is missing", two(minus, lambda c, r: -minus_log_sigmoid(c - r))),
    ("the logarithm is missing: this is minus the sigmoid", two(minus, lambda c, r: -sigmoid(c - r))),
    ("the logarithm is missing: this is the sigmoid", two(minus, lambda c, r: sigmoid(c - r))),
    ("the rejected reward is missing", two(lambda c, r: c, lambda c, r: minus_log_sigmoid(c))),
    *[
        (
            "log(sigmoid(x) + eps) stops growing at large margins; F.logsigmoid does not",
            two(minus, lambda c, r, cut=cut: -cut(sigmoid(c - r))),
        )
        for cut in CUT_LOGS
    ],
    (
        "this is 1 - sigmoid(margin), the gradient's weight: the loss is -log sigmoid(margin)",
        two(minus, lambda c, r: sigmoid(r - c)),
    ),
    (
        "this is 1 + log sigmoid or 1 - log sigmoid: nothing is added",
        two(minus, lambda c, r: 1 + minus_log_sigmoid(c - r)),
    ),
    ("this is the hinge loss, max(0, 1 - margin)", two(minus, lambda c, r: max(0.0, 1 - c + r))),
    ("this is the hinge loss, max(0, -margin)", two(minus, lambda c, r: max(0.0, r - c))),
    ("this is the squared hinge loss", two(minus, lambda c, r: max(0.0, 1 - c + r) ** 2)),
    ("this is a squared loss, as in IPO", two(minus, lambda c, r: (c - r - 1) ** 2)),
    (
        "this is the exponential loss, exp(-margin)",
        two(minus, lambda c, r: math.exp(min(r - c, 700.0)) if r - c < 700 else math.inf),
    ),
    ("the logarithm has base 2; nats have base e", two(minus, lambda c, r: minus_log_sigmoid(c - r) / math.log(2))),
    ("the loss is halved", two(minus, lambda c, r: minus_log_sigmoid(c - r) / 2)),
    (
        "the log-sigmoid of each reward: it belongs to their difference",
        two(minus, lambda c, r: minus_log_sigmoid(c) - minus_log_sigmoid(r)),
    ),
    (
        "the log-sigmoid of each reward: it belongs to their difference",
        two(minus, lambda c, r: minus_log_sigmoid(c) + minus_log_sigmoid(-r)),
    ),
    *[
        (
            "the margin or the loss is cut off, as F.binary_cross_entropy does at 100: it must grow with any margin",
            two(minus, lambda c, r, cut=cut: minus_log_sigmoid(max(-cut, min(cut, c - r)))),
        )
        for cut in CUTS
    ],
    (
        "the margin or the loss is cut off, as F.binary_cross_entropy does at 100: it must grow with any margin",
        two(minus, lambda c, r: min(100.0, minus_log_sigmoid(c - r))),
    ),
    ("the log-sigmoid is missing: this is the absolute margin", two(minus, lambda c, r: abs(c - r))),
    ("the margin is the difference of the rewards, not their ratio", two(minus, lambda c, r: minus_log_sigmoid(c / r))),
    ("beta is used again: the rewards contain it", two(minus, lambda c, r: minus_log_sigmoid(0.1 * (c - r)))),
    (
        "margins and losses are swapped: return (margins, losses)",
        lambda c, r: margin_and_loss(c, r)[::-1],
    ),
    (
        "log_softmax over the pairs of the batch (dim 0): it belongs over the two rewards of a pair",
        lambda c, r: (pairwise(minus)(c, r), [-x for x in log_softmax(c)]),
    ),
    (
        "the margin is the difference itself, without sigmoid",
        two(lambda c, r: sigmoid(c - r), lambda c, r: minus_log_sigmoid(c - r)),
    ),
]


def gradient_weight_case(draw, number):
    return [*rewards_case(draw, number), draw.choice(BETAS)]


def opposite(weight):
    """The derivatives with respect to log pi(chosen) and log pi(rejected); the second is minus the first."""
    return two(weight, lambda *arguments: -weight(*arguments))


gradient_weight = opposite(lambda c, r, beta: -beta * sigmoid(r - c))

GRADIENT_MISTAKES = [
    ("beta is missing", opposite(lambda c, r, beta: -sigmoid(r - c))),
    ("divided by beta instead of multiplied", opposite(lambda c, r, beta: -sigmoid(r - c) / beta)),
    ("beta is used twice", opposite(lambda c, r, beta: -beta * beta * sigmoid(r - c))),
    (
        "the margin is divided by beta: the rewards contain it, and so does the margin in the loss",
        opposite(lambda c, r, beta: -beta * sigmoid((r - c) / beta)),
    ),
    ("this is the weight times the margin", opposite(lambda c, r, beta: -beta * sigmoid(r - c) * (c - r))),
    ("this is the loss, not its derivative", opposite(lambda c, r, beta: minus_log_sigmoid(c - r))),
    ("this is the loss, not its derivative", opposite(lambda c, r, beta: -beta * minus_log_sigmoid(c - r))),
    (
        "the derivative by log pi(rejected) must be minus that by log pi(chosen), not 0",
        two(lambda c, r, beta: -beta * sigmoid(r - c), lambda c, r, beta: 0.0),
    ),
    (
        "each derivative has its own reward in the sigmoid: both have the margin",
        two(lambda c, r, beta: -beta * sigmoid(-c), lambda c, r, beta: beta * sigmoid(r)),
    ),
    ("the signs are wrong: this is the gradient of minus the loss", opposite(lambda c, r, beta: beta * sigmoid(r - c))),
    (
        "sigmoid(margin) instead of sigmoid(-margin): pairs that are already right get the largest weight",
        opposite(lambda c, r, beta: -beta * sigmoid(c - r)),
    ),
    (
        "sigmoid(margin) instead of sigmoid(-margin), and the signs are wrong",
        opposite(lambda c, r, beta: beta * sigmoid(c - r)),
    ),
    (
        "this is the derivative of the sigmoid; the loss is its logarithm",
        opposite(lambda c, r, beta: -beta * sigmoid(c - r) * sigmoid(r - c)),
    ),
    ("every pair has the same weight: the sigmoid is missing", opposite(lambda c, r, beta: -beta)),
    (
        "beta multiplies the margin a second time: the rewards already contain it",
        opposite(lambda c, r, beta: -beta * sigmoid(beta * (r - c))),
    ),
    (
        "both derivatives have the same sign",
        two(lambda c, r, beta: -beta * sigmoid(r - c), lambda c, r, beta: -beta * sigmoid(r - c)),
    ),
    (
        "both derivatives have the same sign",
        two(lambda c, r, beta: beta * sigmoid(r - c), lambda c, r, beta: beta * sigmoid(r - c)),
    ),
    (
        "the two rewards are added instead of subtracted",
        two(lambda c, r, beta: -beta * sigmoid(-c - r), lambda c, r, beta: -beta * sigmoid(-c - r)),
    ),
    ("every pair has the same weight: the sigmoid is missing", opposite(lambda c, r, beta: -beta / 2)),
    ("this is the log-sigmoid, not its derivative", opposite(lambda c, r, beta: -minus_log_sigmoid(c - r))),
    (
        "divided by the number of pairs: each pair has its own derivative",
        lambda c, r, beta: [[x / len(c) for x in side] for side in gradient_weight(c, r, beta)],
    ),
    ("the sigmoid is missing: this is the margin", opposite(lambda c, r, beta: -beta * (c - r))),
    ("the two rewards are added instead of subtracted", opposite(lambda c, r, beta: -beta * sigmoid(c + r))),
    ("the two rewards are added instead of subtracted", opposite(lambda c, r, beta: -beta * sigmoid(-c - r))),
]


# ---- smoothed_loss ----


def smoothed_loss_case(draw, number):
    """Cases 0 and 1 contain margins of -1000 and 1000; in the last case e is 0."""
    e = 0.0 if number == CASES - 1 else draw.choice((0.05, 0.1, 0.2, 0.3, 0.4))
    margins = normal(draw, (draw.randint(1, 5),), 3.0) + [-1000.0, 1000.0] * (number < 2)
    return [floats(margins, number), e]


def each(function):
    """Turns a function of one number into a function of a list (B,). Further arguments are passed on."""
    return lambda values, *more: ([function(x, *more) for x in values],)


def _weighted(m, right, flipped):
    return right * minus_log_sigmoid(m) + flipped * minus_log_sigmoid(-m)


smoothed_loss = each(lambda m, e: _weighted(m, 1 - e, e))

SMOOTHING_MISTAKES = [
    (
        "this is robust DPO, which subtracts the flipped label's loss and divides by 1 - 2e; conservative DPO adds it",
        each(lambda m, e: _weighted(m, 1 - e, -e) / (1 - 2 * e)),
    ),
    ("the flipped label's loss is subtracted instead of added", each(lambda m, e: _weighted(m, 1 - e, -e))),
    ("divided by 1 - 2e, as in robust DPO", each(lambda m, e: _weighted(m, 1 - e, e) / (1 - 2 * e))),
    ("the weights are swapped: e belongs to the flipped label", each(lambda m, e: _weighted(m, e, 1 - e))),
    ("the label smoothing is not used", each(lambda m, e: _weighted(m, 1, 0))),
    ("the flipped label's loss is missing", each(lambda m, e: _weighted(m, 1 - e, 0))),
    ("1 - e is missing before the loss of the label as given", each(lambda m, e: _weighted(m, 1, e))),
    (
        "e is halved, as if it were spread over two classes",
        each(lambda m, e: _weighted(m, 1 - e / 2, e / 2)),
    ),
    ("the margin is smoothed instead of the loss", each(lambda m, e: minus_log_sigmoid((1 - 2 * e) * m))),
    ("the minus sign before log sigmoid is missing", each(lambda m, e: -_weighted(m, 1 - e, e))),
    ("the log-sigmoid is missing", each(lambda m, e: (1 - 2 * e) * -m)),
    (
        "log(sigmoid(x)) or log(1 + exp(x)) in two steps is infinite at large margins; F.logsigmoid is not",
        each(lambda m, e: math.inf if abs(m) > 700 and e else math.inf if m < -700 else _weighted(m, 1 - e, e)),
    ),
    *[
        (
            "log(sigmoid(x) + eps) stops growing at large margins; F.logsigmoid does not",
            each(lambda m, e, cut=cut: -(1 - e) * cut(sigmoid(m)) - e * cut(sigmoid(-m))),
        )
        for cut in CUT_LOGS
    ],
    ("the logarithm is missing", each(lambda m, e: -(1 - e) * sigmoid(m) - e * sigmoid(-m))),
    ("the two losses are not weighted", each(lambda m, e: _weighted(m, 1, 1))),
    ("e is subtracted from the margin", each(lambda m, e: minus_log_sigmoid(m - e))),
    (
        "e times the margin is missing a sign: the flipped label adds e times the margin",
        each(lambda m, e: minus_log_sigmoid(m) - e * m),
    ),
    (
        "a constant instead of the flipped label's loss",
        each(lambda m, e: (1 - e) * minus_log_sigmoid(m) + e * math.log(2)),
    ),
    *[
        (
            "the margin or the loss is cut off, as F.binary_cross_entropy does at 100: it must grow with any margin",
            each(lambda m, e, cut=cut: _weighted(max(-cut, min(cut, m)), 1 - e, e)),
        )
        for cut in CUTS
    ],
    (
        "the margin or the loss is cut off, as F.binary_cross_entropy does at 100: it must grow with any margin",
        each(lambda m, e: (1 - e) * min(100.0, minus_log_sigmoid(m)) + e * min(100.0, minus_log_sigmoid(-m))),
    ),
    ("the margin is smoothed instead of the loss", each(lambda m, e: minus_log_sigmoid((1 - e) * m))),
    ("e is added to the margin", each(lambda m, e: minus_log_sigmoid(m + e))),
    (
        "the probability is smoothed instead of the loss: the logarithm of a sum is not the sum of logarithms",
        each(lambda m, e: -math.log((1 - e) * sigmoid(m) + e * sigmoid(-m) or 1e-300)),
    ),
    ("the flipped label's loss is e times -log sigmoid(-m), not e times m", each(
        lambda m, e: (1 - e) * minus_log_sigmoid(m) + e * m)),
    ("the flipped label's loss is e times -log sigmoid(-m), not e times that of the label as given", each(
        lambda m, e: (1 + e) * minus_log_sigmoid(m))),
    ("a constant instead of the flipped label's loss", each(lambda m, e: (1 - e) * minus_log_sigmoid(m) - e)),
    *[
        ("log(sigmoid(x) + eps) stops growing at large margins; F.logsigmoid does not",
            each(lambda m, e, cut=cut: -(1 - e) * math.log(min(max(sigmoid(m), cut), 1 - cut))
                - e * math.log(1 - min(max(sigmoid(m), cut), 1 - cut))))
        for cut in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)
    ],
    ("the flipped label's loss is -log sigmoid(-m), not 1 - log sigmoid(m)", each(
        lambda m, e: (1 - e) * minus_log_sigmoid(m) - e * (1 + minus_log_sigmoid(m)))),
    ("the margin of the flipped label is -m, not 1 - m", each(
        lambda m, e: (1 - e) * minus_log_sigmoid(m) + e * minus_log_sigmoid(1 - m))),
]  # fmt: skip


# ---- accuracy ----


TELLING = 17  # a seed with which 60 pairs give another share for every known mistake; found by search


def accuracy_case(draw, number):
    """Multiples of 1/2, so that every difference is exact. A third of the pairs are ties, in case 0 all of them.

    Case 1 has the same pairs each time, moved by one number: every known mistake gives another share. In cases 2 and 3
    the log-ratios are so large that exp is infinite, and in case 2 one pair is nearly a tie.
    """
    shift = draw.randint(-20, 20) / 2
    B, draw = (60, random.Random(TELLING)) if number == 1 else (draw.randint(4, 8), draw)
    policy_chosen, policy_rejected, reference_chosen = ([draw.randint(-80, -40) / 2 for _ in range(B)] for _ in "abc")
    gaps = [draw.choice((0.0, draw.randint(1, 60) / 2, draw.randint(-60, -1) / 2)) * (number > 0) for _ in range(B)]
    gaps[0] = 2.0**-13 if number == 2 else gaps[0]  # about 1e-4, and exact in float32
    reference_chosen = [x - 800.0 * (number in (2, 3)) for x in reference_chosen]
    # choose the last one so that the chosen log-ratio minus the rejected log-ratio is the gap
    reference_rejected = [
        gap - (pc - rc) + pr
        for gap, pc, pr, rc in zip(gaps, policy_chosen, policy_rejected, reference_chosen, strict=True)
    ]
    columns = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    return [floats([x + shift for x in column], number) for column in columns]


def share(wins):
    """The mean of wins(policy chosen, policy rejected, reference chosen, reference rejected) over the pairs."""
    return lambda *columns: (sum(wins(*pair) for pair in zip(*columns, strict=True)) / len(columns[0]),)


def _win(margin, tie=0.5):
    return tie if margin == 0 else float(margin > 0)


accuracy = share(lambda pc, pr, rc, rr: _win((pc - rc) - (pr - rr)))


def _without_ties(pc, pr, rc, rr):
    gaps = [(a - c) - (b - d) for a, b, c, d in zip(pc, pr, rc, rr, strict=True)]
    wins, ties = sum(gap > 0 for gap in gaps), gaps.count(0)
    return (wins / (len(gaps) - ties) if ties < len(gaps) else 0.5,)


ACCURACY_MISTAKES = [
    ("ties count as losses", share(lambda pc, pr, rc, rr: _win((pc - rc) - (pr - rr), 0.0))),
    ("ties count as wins", share(lambda pc, pr, rc, rr: _win((pc - rc) - (pr - rr), 1.0))),
    *[
        ("the reference is missing: the likelier response need not have the higher reward", share(wins))
        for wins in (
            lambda pc, pr, rc, rr: _win(pc - pr),
            lambda pc, pr, rc, rr: _win(pc - pr, 0.0),
            lambda pc, pr, rc, rr: _win(pc - pr, 1.0),
        )
    ],
    *[
        ("the policy is missing: this is the reference's own preference", share(wins))
        for wins in (lambda pc, pr, rc, rr: _win(rc - rr), lambda pc, pr, rc, rr: _win(rc - rr, 0.0))
    ],
    *[
        ("the chosen response is compared with its reference; compare the two rewards of the pair", share(wins))
        for wins in (lambda pc, pr, rc, rr: _win(pc - rc), lambda pc, pr, rc, rr: _win(pc - rc, 0.0))
    ],
    (
        "the sides are swapped: this is the share of losses",
        share(lambda pc, pr, rc, rr: _win((pr - rr) - (pc - rc))),
    ),
    (
        "the sides are swapped, and ties count as losses",
        share(lambda pc, pr, rc, rr: _win((pr - rr) - (pc - rc), 0.0)),
    ),
    *[
        ("the reference is added instead of subtracted, or the two references are swapped", share(wins))
        for wins in (
            lambda pc, pr, rc, rr: _win((pc + rc) - (pr + rr)),
            lambda pc, pr, rc, rr: _win((pc + rc) - (pr + rr), 0.0),
        )
    ],
    (
        "this is the number of wins: divide it by the number of pairs",
        lambda *columns: (accuracy(*columns)[0] * len(columns[0]),),
    ),
    ("this is in per cent; a share from 0 to 1 is expected", lambda *columns: (accuracy(*columns)[0] * 100,)),
    (
        "this is the number of wins: divide it by the number of pairs",
        lambda *columns: (sum(_win((pc - rc) - (pr - rr), 0.0) for pc, pr, rc, rr in zip(*columns, strict=True)),),
    ),
    ("this is in per cent; a share from 0 to 1 is expected", share(
        lambda pc, pr, rc, rr: 100 * _win((pc - rc) - (pr - rr), 0.0))),
    ("this is the mean of sigmoid(margin); count the wins", share(
        lambda pc, pr, rc, rr: sigmoid((pc - rc) - (pr - rr)))),
    ("this is the mean margin; count the wins", share(lambda pc, pr, rc, rr: (pc - rc) - (pr - rr))),
    ("losses count as -1: they count 0", share(lambda pc, pr, rc, rr: 2 * _win((pc - rc) - (pr - rr)) - 1)),
    ("the rewards are differences of log-probabilities, not ratios", share(
        lambda pc, pr, rc, rr: _win(pc / (rc or 1e-300) - pr / (rr or 1e-300)))),
    ("the rewards are differences of log-probabilities, not ratios", share(
        lambda pc, pr, rc, rr: _win(pc / (rc or 1e-300) - pr / (rr or 1e-300), 0.0))),
    ("a tie counts one half, not one and a half", share(lambda pc, pr, rc, rr: _win((pc - rc) - (pr - rr), 1.5))),
    ("ties are left out: each counts one half", _without_ties),
    ("ties count as losses, unless all pairs are ties", lambda *columns: (
        share(lambda pc, pr, rc, rr: _win((pc - rc) - (pr - rr), 0.0))(*columns)[0] or accuracy(*columns)[0],)),
    ("a tie is where the rewards are equal (==), not nearly equal", share(
        lambda pc, pr, rc, rr: 0.5 if abs((pc - rc) - (pr - rr)) < 1e-3 else _win((pc - rc) - (pr - rr)))),
    ("rounded down: divide with /, not //", lambda *columns: (
        float(int(share(lambda pc, pr, rc, rr: _win((pc - rc) - (pr - rr), 0.0))(*columns)[0])),)),
    ("the share is rounded", lambda *columns: (round(accuracy(*columns)[0], 1),)),
    ("the share is rounded", lambda *columns: (round(accuracy(*columns)[0], 2),)),
    ("the mean rewards are compared; compare the rewards of each pair", lambda pc, pr, rc, rr: (
        float(sum(pc) - sum(rc) > sum(pr) - sum(rr)),)),
    ("the rewards are differences of log-probabilities, not ratios", share(
        lambda pc, pr, rc, rr: _win(pr / (rr or 1e-300) - pc / (rc or 1e-300)))),
    ("a tie is where the rewards are equal, not the policy's log-probabilities", share(
        lambda pc, pr, rc, rr: float((pc - rc) > (pr - rr)) + 0.5 * (pc == pr))),
]  # fmt: skip


# ---- kl_estimates ----


def kl_estimates_case(draw, number):
    N, T, V = (
        (1, 3)[number] if number < 2 else draw.randint(1, 3),
        draw.randint(4, 6) if number else 6,
        draw.randint(3, 5),
    )
    policy = normal(draw, (N, T, V), 1.5, draw.choice((0.0, -50.0)))
    reference = normal(draw, (N, T, V), 1.5, draw.choice((0.0, 5.0)))
    targets = [[draw.randrange(V) for _ in range(T)] for _ in range(N)]
    mask = random_mask(draw, N, T)
    if number == 4:  # a token that the policy never draws
        t = mask.values[0].index(True)
        policy[0][t][targets[0][t] - 1] -= 1000.0
    return [floats(policy, number), floats(reference, number), Tensor("int64", targets), mask]


def estimates(plain, exact, masked=True, mean=False, normalised=True):
    """Makes the oracle, or a mistake, from the terms that are summed over the positions.

    Args:
        plain: function of log pi and log pi_ref of the token that was drawn.
        exact: function of log pi and log pi_ref of the whole vocabulary, two lists.
        masked: whether only response positions count.
        mean: whether to divide by the number of positions.
        normalised: whether to apply log_softmax to the logits first.
    """

    def of_samples(policy, reference, targets, mask):
        columns = [], []
        for sample in zip(policy, reference, targets, mask, strict=True):
            sums, n = [0.0, 0.0], 0
            for p, q, i, scored in zip(*sample, strict=True):
                if scored or not masked:
                    log_p, log_q = (log_softmax(p), log_softmax(q)) if normalised else (p, q)
                    sums[0] += plain(log_p[i], log_q[i])
                    sums[1] += exact(log_p, log_q)
                    n += 1
            for column, total in zip(columns, sums, strict=True):
                column.append(total / n if mean else total)
        return columns

    return of_samples


def _drawn(log_p, log_q):
    return log_p - log_q


def _full(log_p, log_q):
    return sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


def _over(function):
    """Sums function(log pi, log pi_ref) over the vocabulary."""
    return lambda log_p, log_q: sum(function(p, q) for p, q in zip(log_p, log_q, strict=True))


kl_estimates = estimates(_drawn, _full)


def _raw_terms(policy, reference, targets, mask):
    """The terms are differences of logits; the weights are right."""
    columns = [], []
    for sample in zip(policy, reference, targets, mask, strict=True):
        sums = [0.0, 0.0]
        for p, q, i, scored in zip(*sample, strict=True):
            sums[0] += (p[i] - q[i]) * scored
            sums[1] += sum(math.exp(w) * (a - b) for w, a, b in zip(log_softmax(p), p, q, strict=True)) * scored
        for column, total in zip(columns, sums, strict=True):
            column.append(total)
    return columns


def _over_rows(logits):
    return [list(zip(*map(log_softmax, zip(*row, strict=True)), strict=True)) for row in logits]


KL_MISTAKES = [
    ("averaged over the tokens: the KL of the whole response is a sum", estimates(_drawn, _full, mean=True)),
    ("the mask is not used: prompt and padding count too", estimates(_drawn, _full, masked=False)),
    (
        "the two models are swapped: this is KL(reference || policy)",
        estimates(lambda p, q: q - p, _over(lambda p, q: math.exp(q) * (q - p))),
    ),
    (
        "the log-softmax is missing: these are raw logits",
        estimates(_drawn, _over(lambda p, q: math.exp(p) * (p - q)), normalised=False),
    ),
    (
        "weighted by the reference's probabilities instead of the policy's",
        estimates(_drawn, _over(lambda p, q: math.exp(q) * (p - q))),
    ),
    ("the sign is wrong", estimates(lambda p, q: q - p, lambda p, q: -_full(p, q))),
    ("the terms are not weighted by the policy's probabilities", estimates(_drawn, _over(lambda p, q: p - q))),
    ("the mean over the vocabulary instead of the sum", estimates(_drawn, lambda p, q: _full(p, q) / len(p))),
    (
        "this is the cross-entropy: the policy's own log-probability is missing",
        estimates(_drawn, _over(lambda p, q: -math.exp(p) * q)),
    ),
    (
        "this is another estimator, (r - 1) - log r with r = pi_ref / pi, not the plain one",
        estimates(lambda p, q: math.expm1(q - p) - (q - p), _full),
    ),
    (
        "plain and exact are swapped",
        lambda *arguments: kl_estimates(*arguments)[::-1],
    ),
    *[(words, lambda p, q, t, mask, move=move: kl_estimates(p, q, t, move(mask))) for words, move in MOVED_MASKS],
    ("the absolute value: plain can be negative", estimates(lambda p, q: abs(p - q), _full)),
    ("this is another estimator, (log r)^2 / 2, not the plain one", estimates(lambda p, q: (p - q) ** 2 / 2, _full)),
    (
        "this is another estimator, (r - 1) - log r with r = pi / pi_ref, not the plain one",
        estimates(lambda p, q: math.expm1(p - q) - (p - q), _full),
    ),
    ("the logarithm has base 2; nats have base e", estimates(
        lambda p, q: (p - q) / math.log(2), lambda p, q: _full(p, q) / math.log(2))),
    ("the absolute value: terms of the sum may be negative", estimates(
        _drawn, _over(lambda p, q: math.exp(p) * abs(p - q)))),
    ("plain is not weighted: the sample was drawn with pi already", estimates(
        lambda p, q: math.exp(p) * (p - q), _full)),
    ("the reference is missing", estimates(lambda p, q: p, _over(lambda p, q: math.exp(p) * p))),
    ("this is the entropy: the reference is missing", estimates(_drawn, _over(lambda p, q: -math.exp(p) * p))),
    ("the logarithm is missing", estimates(lambda p, q: math.exp(p) - math.exp(q),
        _over(lambda p, q: math.exp(p) * (math.exp(p) - math.exp(q))))),
    ("the logarithm is missing", estimates(_drawn, _over(lambda p, q: math.exp(p) * math.exp(p - q)))),
    ("plain is cut off at 0: it can be negative", lambda *case: [
        [max(0.0, x) for x in kl_estimates(*case)[0]], kl_estimates(*case)[1]]),
    ("the log-softmax is missing: these are raw logits", _raw_terms),
    ("plain takes the token that was drawn, not the likeliest one", lambda p, q, t, mask: kl_estimates(
        p, q, [[position.index(max(position)) for position in row] for row in p], mask)),
    ("normalised over the positions (dim 1) instead of the vocabulary (dim -1)", lambda p, q, t, mask: estimates(
        _drawn, _full, normalised=False)(_over_rows(p), _over_rows(q), t, mask)),
    ("divided by the length of the row: the KL of the response is a sum", lambda p, q, t, mask: [
        [x / len(mask[0]) for x in column] for column in kl_estimates(p, q, t, mask)]),
]  # fmt: skip


# ---- pick_beta ----


def pick_beta_case(draw, number):
    """Runs of four betas, the first with the highest mean KL, and a budget.

    The first beta has the highest mean reward. Its mean KL is over the budget; if it has two runs, one of them is
    within. The best beta within the budget is the second in even cases, with one run over the budget, and the third in
    odd cases. The beta after the best has a lower mean reward, but the best single run of all. In cases 2 and 3 the
    best beta has the best and the worst run instead, and the worst comes first. In cases 4 and 5 the mean KL of the
    best beta is exactly the budget. In cases 6 and 7 KL does not fall with beta. In case 8 all rewards are negative. In
    the last case no beta is within the budget.
    """
    budget = draw.randint(8, 32) / 8 if number != 2 else 4.0  # multiples of 1/8, and 1/4 times that, have exact means
    best = 1 + number % 2
    rewards = [draw.uniform(0.0, 0.3) - rank for rank in (-2, *((0, 1, 2) if best == 1 else (2, 0, 1)))]
    betas = sorted(draw.sample((0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0), 4))
    if number in (6, 7):
        betas = [betas[i] for i in ((1, 2, 3, 0) if number == 6 else (1, 3, 2, 0))]
    frontier = []
    for i, beta in enumerate(betas):
        kl, kl_spread = ((1.5, 0.75), (0.875, 0.25), (0.625, 0.125), (0.25, 0.125))[i]
        kl = 1.0 if number in (4, 5) and i == best else kl
        wide = best if number in (2, 3) else best + 1
        reward_spread = draw.uniform(5.0, 6.0) if i == wide else draw.uniform(0.1, 0.3)
        around = draw.choice(((1, -1), (1, -0.5, -0.5)) if number > 1 else ((1, -1),))  # of the seeds, with mean 0
        around = (1, -0.5, -0.5) if number == 3 and i == best else around  # its median is not its mean
        if number == 4:  # a sum over the seeds prefers the others
            around = (1, -1) if i == best else (1, -0.5, -0.5)
        for seed, (x, y) in enumerate(zip(around, reversed(around), strict=True)):
            reward = round(3 - 20 * (number == 8) + rewards[i] + reward_spread * y, 3)
            frontier.append(dict(beta=beta, seed=seed, kl=budget * (kl + kl_spread * x), reward=reward))
    draw.shuffle(frontier)
    return [frontier, budget / 16 if number == CASES - 1 else budget]


def _means(frontier, keep=lambda run: True):
    """Returns {beta: (mean KL, mean reward)} over the runs for which `keep` is true."""
    means = {}
    for beta in sorted({run["beta"] for run in frontier if keep(run)}):
        runs = [run for run in frontier if run["beta"] == beta and keep(run)]
        means[beta] = tuple(sum(run[key] for run in runs) / len(runs) for key in ("kl", "reward"))
    return means


def _best(scores):
    return (max(scores, key=scores.get, default=None),)


def pick_beta(frontier, kl_budget):
    return _best({beta: reward for beta, (kl, reward) in _means(frontier).items() if kl <= kl_budget})


def _single_run(frontier, kl_budget):
    runs = [run for run in frontier if run["kl"] <= kl_budget]
    return (max(runs, key=lambda run: run["reward"])["beta"] if runs else None,)


def _single_reward(frontier, kl_budget):
    allowed = [beta for beta, (kl, _) in _means(frontier).items() if kl <= kl_budget]
    return _best({b: max(run["reward"] for run in frontier if run["beta"] == b) for b in allowed})


PICK_MISTAKES = [
    ("chosen by the best single run, which may be luck: average over the seeds first", _single_run),
    ("chosen by the best single run, which may be luck: average over the seeds first", _single_reward),
    ("the budget is not used", lambda f, budget: _best({b: reward for b, (_, reward) in _means(f).items()})),
    (
        "runs over the budget are removed before averaging",
        lambda f, budget: _best({b: reward for b, (_, reward) in _means(f, lambda run: run["kl"] <= budget).items()}),
    ),
    (
        "this is the smallest beta within the budget, not the one with the highest mean reward",
        lambda f, budget: _best({b: -b for b, (kl, _) in _means(f).items() if kl <= budget}),
    ),
    (
        "this is the largest beta within the budget, not the one with the highest mean reward",
        lambda f, budget: _best({b: b for b, (kl, _) in _means(f).items() if kl <= budget}),
    ),
    (
        "this is the beta with the largest KL within the budget, not the one with the highest mean reward",
        lambda f, budget: _best({b: kl for b, (kl, _) in _means(f).items() if kl <= budget}),
    ),
    (
        "a mean KL that equals the budget is within it: <= instead of <",
        lambda f, budget: _best({b: reward for b, (kl, reward) in _means(f).items() if kl < budget}),
    ),
    (
        "this is the beta with the smallest KL, not the one with the highest mean reward",
        lambda f, budget: _best({b: -kl for b, (kl, _) in _means(f).items() if kl <= budget}),
    ),
    (
        "this is the beta with the lowest reward: the comparison is reversed",
        lambda f, budget: _best({b: -reward for b, (kl, reward) in _means(f).items() if kl <= budget}),
    ),
    (
        "a beta is left out if one of its runs is over the budget: its mean KL decides",
        lambda f, budget: _best(
            {
                b: reward
                for b, (_, reward) in _means(f).items()
                if all(run["kl"] <= budget for run in f if run["beta"] == b)
            }
        ),
    ),
    *[
        (
            "a single run of each beta counts here, the first or the worst: average over the seeds first",
            lambda f, budget, kl=kl: _best(
                {
                    b: next(run["reward"] for run in f if run["beta"] == b and run["seed"] == 0)
                    for b in _means(f)
                    if kl(b, f) <= budget
                }
            ),
        )
        for kl in (
            lambda b, f: _means(f)[b][0],
            lambda b, f: next(run["kl"] for run in f if run["beta"] == b and run["seed"] == 0),
        )
    ],
    (
        "a single run of each beta counts here, the first or the worst: average over the seeds first",
        lambda f, budget: _best(
            {
                b: min(run["reward"] for run in f if run["beta"] == b)
                for b, (kl, _) in _means(f).items()
                if kl <= budget
            }
        ),
    ),
    (
        "the KL is subtracted from the reward: within the budget only the reward counts",
        lambda f, budget: _best({b: reward - kl for b, (kl, reward) in _means(f).items() if kl <= budget}),
    ),
    ("None is expected if no beta is within the budget", lambda f, b: (pick_beta(f, b)[0] or min(_means(f)),)),
    ("None is expected if no beta is within the budget", lambda f, b: (pick_beta(f, b)[0] or max(_means(f)),)),
    ("None is expected if no beta is within the budget", lambda f, b: (pick_beta(f, b)[0] or 0.0,)),
    (
        "this is the best mean reward: return its beta",
        lambda f, b: (max((r for kl, r in _means(f).values() if kl <= b), default=None),),
    ),
    ("the best reward starts at 0, so negative rewards are never chosen: start without one", lambda f, budget: _best(
        {b: reward for b, (kl, reward) in _means(f).items() if kl <= budget and reward > 0})),
    ("a single run of each beta counts here, the last: average over the seeds first", lambda f, budget: pick_beta(
        list({run["beta"]: run for run in f}.values()), budget)),
    ("this is the highest reward per KL; within the budget only the reward counts", lambda f, budget: _best(
        {b: reward / kl for b, (kl, reward) in _means(f).items() if kl <= budget})),
    ("this is the beta whose KL is nearest to the budget", lambda f, budget: _best(
        {b: -abs(kl - budget) for b, (kl, _) in _means(f).items()})),
]  # fmt: skip


EXERCISES = [
    Exercise(
        "tokenise_pair", tokenise_pair_case, tokenise_pair,
        {"prompt_ids": "ids", "chosen_ids": "ids", "rejected_ids": "ids"}, TOKENISE_MISTAKES,
    ),
    Exercise("shift", shift_case, shift, {"ids": "int64", "targets": "int64"}, SHIFT_MISTAKES),
    Exercise(
        "build_batch", build_batch_case, build_batch,
        {"ids": "int64", "targets": "int64", "mask": "bool"}, BUILD_MISTAKES,
    ),
    Exercise(
        "gather_logps", gather_logps_case, gather_logps, {"logps": "float"}, GATHER_MISTAKES,
        {"logps": lambda logits, targets: [[[[(v == i) - math.exp(log) for v, log in enumerate(log_softmax(x))]
            for x, i in zip(*row, strict=True)] for row in zip(logits, targets, strict=True)]]},
    ),
    Exercise(
        "sum_logps", sum_logps_case, sum_logps, {"logps": "float"}, SUM_MISTAKES,
        {"logps": lambda logps, mask: [nested(float, mask)]},
    ),
    Exercise(
        "implicit_reward", implicit_reward_case, implicit_reward, {"rewards": "float"}, REWARD_MISTAKES,
        {"rewards": lambda policy, reference, beta: [[beta] * len(policy)]},
    ),
    Exercise(
        "margin_and_loss", rewards_case, margin_and_loss,
        {"margins": "float", "losses": "float"}, LOSS_MISTAKES,
        {"margins": two(lambda c, r: 1.0, lambda c, r: -1.0), "losses": lambda c, r: gradient_weight(c, r, 1.0)},
        inputs=2,
    ),
    Exercise(
        "gradient_weight", gradient_weight_case, gradient_weight,
        {"by chosen": "float", "by rejected": "float"}, GRADIENT_MISTAKES, by_hand=True,
    ),
    Exercise(
        "smoothed_loss", smoothed_loss_case, smoothed_loss, {"losses": "float"}, SMOOTHING_MISTAKES,
        {"losses": each(lambda m, e: e * sigmoid(m) - (1 - e) * sigmoid(-m))},
    ),
    Exercise("accuracy", accuracy_case, accuracy, {"accuracy": "number"}, ACCURACY_MISTAKES),
    Exercise("kl_estimates", kl_estimates_case, kl_estimates, {"plain": "float", "exact": "float"}, KL_MISTAKES),
    Exercise(
        "pick_beta", pick_beta_case, pick_beta, {"beta": "number or None"}, PICK_MISTAKES,
        hints={"empty": "nothing is within the budget: return None"},
    ),
]  # fmt: skip
