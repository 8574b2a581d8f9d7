"""Rewards: what `experiments.make_pairs` labels pairs with, and what `experiments.evaluate` reports.

A reward is a callable, `reward(prompts: list[str], responses: list[str]) -> list[float]`. It is either the toy's true
reward, or a sentiment classifier trained here: log p(positive) / p(negative) of prompt + response, in nats. (The
probability itself rounds to 1, which makes ties.)

    python -m experiments.rewards --train data/imdb/reviews_train.jsonl --test data/imdb/reviews_heldout.jsonl

trains two classifiers on two halves of the reviews. `labelling.pt` chooses the preferred response, and `reporting.pt`
judges the result. A policy that has only learned the errors of the first classifier gains little from the second.

A classifier is logistic regression on words and word pairs, with the naive Bayes scaling of Wang & Manning (ACL 2012).
It learns from whole reviews and from random excerpts: with whole reviews alone, it is less accurate on short
completions, and calls six in ten of them positive.
"""

import dataclasses
import math
import random
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.toy_sentiment import grammar
from minidpo import checkpoint
from minidpo.dataset import read_jsonl
from minidpo.files.writing import atomic, claim
from minidpo.settings import UserError, knob, parse_settings, run_main, unknown

NAMES = ("labelling", "reporting")  # trained on rows 0, 2, 4, ... and on rows 1, 3, 5, ...
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[!?]")
MIN_REVIEWS = 5  # an n-gram in fewer reviews is left out
L2 = 5.0  # chosen on reviews_heldout.jsonl, as were the n-grams and the excerpts
EXCERPTS = 4  # per review, in addition to the review itself
EXCERPT_WORDS = (10, 60)  # shortest and longest excerpt
TEST_WORDS = 40  # the test also uses the first 40 words: about as long as a prompt and its completion


@dataclasses.dataclass
class Settings:
    train: str = knob("", "train both classifiers on these labelled reviews: JSONL with text and label")
    test: str = knob("", "test both classifiers on these labelled reviews")
    out: str = knob("data/imdb", "folder of labelling.pt and reporting.pt, which --train writes and --test reads")


def load_reward(name):
    """Returns the reward of that name, "toy" or a classifier's file. Raises UserError for anything else."""
    if name == "toy":
        return lambda prompts, responses: [float(grammar.reward(response)) for response in responses]
    if not Path(name).is_file():
        raise unknown("reward", name, ["toy", *sorted(str(path) for path in Path(name).parent.glob("*.pt"))])
    return SentimentClassifier.load(name)


def ngrams(text):
    """Each word and word pair once: 'Not good, not good!' -> ['not', 'good', '!', 'not good', 'good not', 'good !']."""
    words = WORD.findall(text.lower())
    return list(dict.fromkeys(words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]))


class SentimentClassifier:
    """One weight per n-gram and a bias, in nats. An unknown n-gram adds nothing."""

    def __init__(self, weights, bias):
        self.weights, self.bias = weights, bias  # dict[str, float], float

    def log_odds(self, text):
        """log p(positive) / p(negative) of a text, in nats. The probability is its sigmoid."""
        return self.bias + math.fsum(self.weights.get(ngram, 0.0) for ngram in ngrams(text))

    def __call__(self, prompts, responses):
        return [self.log_odds(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]

    def save(self, path):
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        with atomic(path) as file:
            torch.save({"ngrams": "\n".join(self.weights), "weights": weights, "bias": self.bias}, file)

    @classmethod
    def load(cls, path):
        """Raises UserError if the file is missing, damaged or not a classifier."""
        saved = checkpoint.read(path, keys=("ngrams", "weights", "bias"))
        names, weights = saved["ngrams"].split("\n"), saved["weights"].tolist()
        if len(names) != len(weights):
            raise UserError(f"{path} is damaged. Make it again: python -m experiments.rewards --train FILE")
        return cls(dict(zip(names, weights, strict=True)), saved["bias"])


# ---- training ----


def log_count_ratios(documents, labels, size):
    """Wang & Manning's r of each n-gram: log (p / |p|) / (q / |q|) -> (size,) float64.

    p is 1 + the number of positive documents (lists of different n-gram ids) with the n-gram, q that of negative ones.
    """
    counts = torch.ones(2, size, dtype=torch.float64)
    for ids, label in zip(documents, labels, strict=True):
        counts[label, ids] += 1
    negative, positive = counts / counts.sum(dim=1, keepdim=True)
    return (positive / negative).log()


def fit_logistic(documents, labels, scale, l2):
    """Logistic regression: n-gram i has the feature scale[i] where it occurs -> weights (size,), bias (), float64.

    Minimises the sum of -log p(label) plus l2 * |weights|^2, which is convex. An n-gram with a large `scale` needs only
    a small weight, so the penalty spares it.
    """
    # one entry per occurrence: the document and the n-gram's id
    row = torch.tensor([d for d, document in enumerate(documents) for _ in document], dtype=torch.long)
    ids = torch.tensor([i for document in documents for i in document], dtype=torch.long)
    targets = torch.tensor(labels, dtype=torch.float64)
    weights = torch.zeros(len(scale), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    tolerance = 1e-6 * len(documents)  # of the gradient's largest entry, which is a sum over documents
    stop = dict(max_iter=60, tolerance_grad=tolerance, tolerance_change=0)
    optimiser = torch.optim.LBFGS([weights, bias], line_search_fn="strong_wolfe", **stop)

    def closure():
        optimiser.zero_grad()
        # the gradient of index_select adds in a fixed order, unlike that of [ids]: every run ends in the same weights
        log_odds = bias.expand(len(documents)).index_add(0, row, (weights * scale).index_select(0, ids))
        loss = F.binary_cross_entropy_with_logits(log_odds, targets, reduction="sum") + l2 * weights.square().sum()
        loss.backward()
        bar.update()
        return loss

    with tqdm(desc="fitting", unit=" evaluations") as bar:
        optimiser.step(closure)
    return weights.detach(), bias.detach()


def excerpt(text, generator):
    """10 to 60 consecutive words of a text, at a random place; the whole text if it is shorter."""
    words = text.split(" ")
    length = generator.randint(*EXCERPT_WORDS)
    start = generator.randint(0, max(0, len(words) - length))
    return " ".join(words[start : start + length])


def train_classifier(texts, labels):
    """Whole reviews and their labels (1 positive, 0 negative) -> SentimentClassifier. Every call gives the same."""
    if len(set(labels)) < 2:
        raise UserError("all reviews of one classifier have the same label. Shuffle the file: each takes every second.")
    generator = random.Random(0)
    whole = [ngrams(text) for text in tqdm(texts, desc="n-grams", unit=" reviews")]
    counts = Counter(ngram for document in whole for ngram in document)
    ids = {ngram: i for i, ngram in enumerate(n for n, count in counts.items() if count >= MIN_REVIEWS)}
    short = [ngrams(excerpt(text, generator)) for _ in range(EXCERPTS) for text in texts]
    documents = [[ids[ngram] for ngram in document if ngram in ids] for document in whole + short]
    scale = log_count_ratios(documents[: len(whole)], labels, len(ids))
    weights, bias = fit_logistic(documents, labels * (1 + EXCERPTS), scale, L2)
    return SentimentClassifier(dict(zip(ids, (weights * scale).tolist(), strict=True)), bias.item())


# ---- the command ----


def read_reviews(path):
    """JSONL of {"text", "label"} -> texts, labels (1 positive, 0 negative). Raises UserError for a bad label."""
    rows = read_jsonl(path, ("text",))
    for number, row in enumerate(rows, start=1):
        if type(row.get("label")) is not int or row["label"] not in (0, 1):
            raise UserError(f'{path}, row {number}: "label" must be 0 or 1, not {row.get("label")!r}.')
    labels = [row["label"] for row in rows]
    if len(set(labels)) < 2:
        raise UserError(f"{path}: all labels are {labels[0]}; reviews of both labels are needed.")
    return [row["text"] for row in rows], labels


def wilson(hits, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927) -> (low, high), inside [0, 1]."""
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def report(classifiers, texts, labels):
    """Prints each classifier's accuracy and how often the two agree, on whole texts and on their first 40 words."""
    beginnings = [" ".join(text.split()[:TEST_WORDS]) for text in texts]
    for kind, shown in (("whole reviews", texts), (f"first {TEST_WORDS} words", beginnings)):
        signs = [[classifier.log_odds(text) > 0 for text in shown] for classifier in classifiers]
        for name, sign in zip(NAMES, signs, strict=True):
            hits = sum(s == bool(label) for s, label in zip(sign, labels, strict=True))
            low, high = wilson(hits, len(labels))
            accuracy = f"accuracy {hits / len(labels):.1%}, 95% interval {low:.1%} to {high:.1%}"
            print(f"{kind:14}  {name}: {accuracy}, calls {sum(sign) / len(sign):.1%} positive (n = {len(labels)})")
        agree = sum(a == b for a, b in zip(*signs, strict=True))
        print(f"{kind:14}  the two agree on {agree / len(labels):.1%}")


def main(argv=None):
    settings = parse_settings(Settings, __doc__, argv)
    claim(settings.out)
    if not settings.train and not settings.test:
        raise UserError("nothing to do: give --train FILE, --test FILE, or both.")
    paths = [Path(settings.out) / f"{name}.pt" for name in NAMES]
    test = read_reviews(settings.test) if settings.test else None  # first, so that a bad file stops us early
    if settings.train:
        texts, labels = read_reviews(settings.train)
        for half, path in enumerate(paths):
            classifier = train_classifier(texts[half::2], labels[half::2])
            classifier.save(path)
            print(f"{path}: trained on {len(texts[half::2]):,} reviews, {len(classifier.weights):,} n-grams")
    if test:
        report([load_reward(str(path)) for path in paths], *test)


if __name__ == "__main__":
    run_main(main)
