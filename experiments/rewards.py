"""Rewards: what `experiments.make_pairs` labels with and `experiments.evaluate` reports.

A reward is a callable, `reward(prompts: list[str], responses: list[str]) -> list[float]`; `load_reward` gives one:

    "toy"    the toy's ground truth, positive minus negative sentiment words in the response
    a file   a sentiment classifier trained here: the log-odds that prompt + response comes from a positive review,
             log p(positive) / p(negative), in nats. (The probability itself saturates at 1, and makes ties.)

    python -m experiments.rewards --train data/imdb/reviews_train.jsonl --test data/imdb/reviews_heldout.jsonl

trains two classifiers on halves of the reviews that share none: `labelling.pt` is for choosing the preferred response,
`reporting.pt` for judging the result. A policy that only learned the first one's quirks gains little from the second.

The classifier is logistic regression on the words and word pairs that a text holds, with the naive Bayes scaling of
Wang & Manning (ACL 2012). It learns from whole reviews and from random excerpts: trained on whole reviews alone it is
right less often on the few dozen words of a completion, and calls six in ten of them positive.
"""

import dataclasses
import math
import pickle
import random
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minidpo.dataset import read_jsonl
from minidpo.files import atomic
from minidpo.settings import UserError, knob, parse_settings, run_main, unknown

NAMES = ("labelling", "reporting")  # trained on rows 0, 2, 4, ... and on rows 1, 3, 5, ...
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[!?]")
MIN_REVIEWS = 5  # an n-gram in fewer reviews than this is left out
L2 = 5.0  # chosen on reviews_heldout.jsonl, as were the n-grams and the excerpts
EXCERPTS = 4  # per review, beside the review itself
EXCERPT_WORDS = (10, 60)  # shortest and longest in training
TEST_WORDS = 40  # tested on the first 40 words, about as long as a prompt and its completion


@dataclasses.dataclass
class Settings:
    train: str = knob("", "labelled reviews (JSONL with text and label) to train both classifiers on")
    test: str = knob("", "labelled reviews to measure both classifiers on")
    out: str = knob("data/imdb", "folder of labelling.pt and reporting.pt: written by --train, read by --test alone")


def load_reward(name):
    """'toy' or the file of a classifier -> reward(prompts, responses) -> list[float]. UserError for anything else."""
    if name == "toy":
        from data.toy_sentiment.grammar import reward

        return lambda prompts, responses: [float(reward(response)) for response in responses]
    if not Path(name).is_file():
        raise unknown("reward", name, ["toy", *sorted(str(path) for path in Path(name).parent.glob("*.pt"))])
    return SentimentClassifier.load(name)


def ngrams(text):
    """'Not good, not good!' -> ['not', 'good', '!', 'not good', 'good not', 'good !']: each word and pair once."""
    words = WORD.findall(text.lower())
    return list(dict.fromkeys(words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]))


class SentimentClassifier:
    """One weight in nats per n-gram, and a bias; an n-gram it does not know counts nothing."""

    def __init__(self, weights, bias):
        self.weights, self.bias = weights, bias  # dict[str, float], float

    def log_odds(self, text):
        """log p(positive) / p(negative) in nats; the probability is its sigmoid."""
        return self.bias + math.fsum(self.weights.get(ngram, 0.0) for ngram in ngrams(text))

    def __call__(self, prompts, responses):
        return [self.log_odds(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]

    def save(self, path):
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        with atomic(path) as file:
            torch.save({"ngrams": "\n".join(self.weights), "weights": weights, "bias": self.bias}, file)

    @classmethod
    def load(cls, path):
        try:
            saved = torch.load(path, weights_only=True)
            names, weights = saved["ngrams"].split("\n"), saved["weights"].tolist()
            return cls(dict(zip(names, weights, strict=True)), saved["bias"])
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is no sentiment classifier, or is damaged. Make it: python -m experiments.rewards --train FILE"
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Training


def log_count_ratios(documents, labels, size):
    """Wang & Manning's r: log (p / |p|) / (q / |q|), where p and q are 1 + the number of positive and of negative

    documents that hold the n-gram. documents: lists of n-gram ids below `size`; labels: 1 or 0 -> (size,) float64
    """
    counts = torch.ones(2, size, dtype=torch.float64)
    for ids, label in zip(documents, labels, strict=True):
        counts[label, ids] += 1  # ids are different within a document
    negative, positive = counts / counts.sum(dim=1, keepdim=True)
    return (positive / negative).log()


def fit_logistic(documents, labels, scale, l2):
    """Logistic regression with feature scale[i] where n-gram i is present, 0 elsewhere -> weights (size,), bias ().

    Minimises sum of -log p(label) + l2 * |weights|^2, convex, in float64. `scale` steers what the penalty prefers:
    an n-gram with a large naive Bayes ratio needs only a small weight.
    """
    # one entry for each n-gram seen: the document it is in and its id
    row = torch.tensor([d for d, document in enumerate(documents) for _ in document], dtype=torch.long)
    ids = torch.tensor([i for document in documents for i in document], dtype=torch.long)
    targets = torch.tensor(labels, dtype=torch.float64)
    weights = torch.zeros(len(scale), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    tolerance = 1e-6 * len(documents)  # on the largest entry of the gradient, which is a sum over documents
    optimiser = torch.optim.LBFGS(
        [weights, bias], max_iter=60, tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    bar = tqdm(desc="fitting", unit=" evaluations")

    def closure():
        optimiser.zero_grad()
        # index_select, not [ids]: its gradient adds in a fixed order, so that every run ends in the same weights
        log_odds = bias.expand(len(documents)).index_add(0, row, (weights * scale).index_select(0, ids))
        loss = F.binary_cross_entropy_with_logits(log_odds, targets, reduction="sum") + l2 * weights.square().sum()
        loss.backward()
        bar.update()
        return loss

    with bar:
        optimiser.step(closure)
    return weights.detach(), bias.detach()


def excerpt(text, generator):
    """A random stretch of 10 to 60 words, the whole text if it is shorter."""
    words = text.split(" ")
    length = generator.randint(*EXCERPT_WORDS)
    start = generator.randint(0, max(0, len(words) - length))
    return " ".join(words[start : start + length])


def train_classifier(texts, labels):
    """Whole reviews and their labels (1 positive, 0 negative) -> SentimentClassifier. The same every time."""
    generator = random.Random(0)
    whole = [ngrams(text) for text in tqdm(texts, desc="n-grams", unit=" reviews")]
    counts = Counter(ngram for document in whole for ngram in document)
    ids = {ngram: i for i, ngram in enumerate(n for n, count in counts.items() if count >= MIN_REVIEWS)}
    short = [ngrams(excerpt(text, generator)) for _ in range(EXCERPTS) for text in texts]
    documents = [[ids[ngram] for ngram in document if ngram in ids] for document in whole + short]
    scale = log_count_ratios(documents[: len(whole)], labels, len(ids))
    weights, bias = fit_logistic(documents, labels * (1 + EXCERPTS), scale, L2)
    return SentimentClassifier(dict(zip(ids, (weights * scale).tolist(), strict=True)), bias.item())


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_reviews(path):
    """JSONL of {"text", "label"} -> texts, labels (1 positive, 0 negative). UserError with the line of a bad row."""
    rows = read_jsonl(path, ("text",))
    for number, row in enumerate(rows, start=1):
        if row.get("label") not in (0, 1):
            raise UserError(f'{path}, row {number}: "label" must be 0 or 1, not {row.get("label")!r}.')
    labels = [row["label"] for row in rows]
    if len(set(labels)) < 2:
        raise UserError(f"{path}: all labels are {labels[0]}; reviews of both labels are needed.")
    return [row["text"] for row in rows], labels


def wilson(hits, n, z=1.96):
    """95% interval of a proportion (Wilson 1927) -> (low, high), inside [0, 1]."""
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def report(classifiers, texts, labels):
    """Prints each classifier's accuracy and how often the two agree, on whole texts and on their first 40 words."""
    for kind, shown in (
        ("whole reviews", texts),
        (f"first {TEST_WORDS} words", [" ".join(text.split()[:TEST_WORDS]) for text in texts]),
    ):
        signs = [[classifier.log_odds(text) > 0 for text in shown] for classifier in classifiers]
        for name, sign in zip(NAMES, signs, strict=True):
            hits = sum(s == bool(label) for s, label in zip(sign, labels, strict=True))
            low, high = wilson(hits, len(labels))
            print(
                f"{kind:14}  {name}: accuracy {hits / len(labels):.1%}, 95% interval {low:.1%} to {high:.1%}, "
                f"calls {sum(sign) / len(sign):.1%} positive (n = {len(labels)})"
            )
        agree = sum(a == b for a, b in zip(*signs, strict=True))
        print(f"{kind:14}  the two agree on {agree / len(labels):.1%}")


def main(argv=None):
    settings = parse_settings(Settings, __doc__, argv)
    if not settings.train and not settings.test:
        raise UserError("nothing to do: pass --train FILE, --test FILE, or both. Try --help.")
    paths = [Path(settings.out) / f"{name}.pt" for name in NAMES]
    test = read_reviews(settings.test) if settings.test else None  # a bad file is found before the work, not after it
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
