"""Text to token ids and back: GPT-2's byte-level BPE, or one trained here on the corpus at hand.

A vocabulary is a list of byte strings: the 256 single bytes, then one token per merge in the order the merges were
learned, then eot as the last id. The list says everything: to encode, cut the text into words with `PATTERN` and, in
each word, keep joining the two neighbours whose join comes earliest in the list. tiktoken does that fast; `train_bpe`
below makes the list. As a command it trains on a file: python -m minidpo.tokenizer --text FILE --vocab-size N
"""

import argparse
import hashlib
import heapq
import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

from minidpo.files import atomic_write
from minidpo.settings import UserError, run_main

# GPT-2's words, which no merge crosses: contractions; letters, digits or other signs with the space before them; blanks
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
WORDS = regex.compile(PATTERN)
# A thousand blanks with more behind them. Cutting there changes GPT-2's ids only if a token of blanks spans the cut.
LONG_BLANK = regex.compile(r"(\s{1000})(?=\s)")
LONGEST = 1000  # bytes: training cuts longer words (a line of base64), which would be walked through at every merge
EOT = "<|endoftext|>"


class Tokenizer:
    """`vocab_size` counts 256 bytes + merges + eot; `eot`, the last id, starts and ends documents."""

    def __init__(self, tokens):
        """tokens: list of bytes in the order of their ids, without eot."""
        self.tokens = tokens
        self.eot = len(tokens)
        self.vocab_size = len(tokens) + 1
        # tiktoken never hears of eot, so nothing that a text contains can become it
        ranks = {token: i for i, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding("minidpo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        """str -> list of ids. All of it is text: "<|endoftext|>" becomes several ordinary tokens, never eot.

        UserError for half of a surrogate pair (JSON's "\\ud83d" can hold one): that is no character in any encoding.
        """
        _utf8(text)  # tiktoken would put U+FFFD in its place without a word
        # A million blanks in a row overflow the stack of tiktoken's regex engine, hence the cuts.
        return [i for piece in LONG_BLANK.split(text) for i in self._encoding.encode_ordinary(piece)]

    def decode(self, ids):
        """ids -> str, without eot. Bytes that are not UTF-8 (a sampled half character) come out as U+FFFD."""
        return self._encoding.decode([i for i in ids if i != self.eot], errors="replace")

    @property
    def fingerprint(self):
        """16 hex digits that differ for tokenizers that differ: for caches."""
        return hashlib.sha256(self._json().encode()).hexdigest()[:16]

    @classmethod
    def gpt2(cls):
        """GPT-2's own 50,257 tokens; tiktoken downloads two files (1.5 MB) once and keeps them."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors); a download cut short
            raise UserError(
                "GPT-2's vocabulary is not on this machine and could not be downloaded. Connect once, or set "
                f"TIKTOKEN_CACHE_DIR to a folder with tiktoken's files from a machine where this worked. ({error})"
            ) from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])

    @classmethod
    def train(cls, texts, vocab_size):
        """A BPE learned from `texts`, any iterable of str; smaller than `vocab_size` if nothing is left to merge."""
        return cls(train_bpe(texts, vocab_size))

    def save(self, file):
        """One JSON file with a token per line, its bytes as latin-1 characters, so that " the" stays readable."""
        atomic_write(file, self._json())

    def _json(self):
        tokens = [token.decode("latin-1") for token in self.tokens]
        return json.dumps({"pattern": PATTERN, "eot": self.eot, "tokens": tokens}, indent=1) + "\n"

    @classmethod
    def load(cls, file):
        """Reads what `save` wrote. UserError if the file holds anything else."""
        try:
            saved = json.loads(Path(file).read_text(encoding="utf-8"))
            pattern, eot = saved["pattern"], saved["eot"]
            tokens = [token.encode("latin-1") for token in saved["tokens"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not a tokenizer saved by minidpo, or is damaged: {_why(error)}") from error
        if pattern != PATTERN:
            raise UserError(f"{file}: its pattern is not GPT-2's, the only one known here: {PATTERN}")
        if eot != len(tokens):
            raise UserError(f"{file}: eot is {eot!r}, but {len(tokens)} tokens come before it")
        _merges(tokens, file)
        return cls(tokens)

    @classmethod
    def from_vocab_and_merges(cls, vocab_json, merges_txt):
        """From Hugging Face's two files for GPT-2, to the same ids.

        UserError unless they are arranged as GPT-2's are: bytes, merges in their order, <|endoftext|>.
        """
        try:
            vocab = json.loads(Path(vocab_json).read_text(encoding="utf-8"))
            *written, last = sorted(vocab, key=lambda token: vocab[token])
            tokens = [bytes(CHAR_TO_BYTE[c] for c in token) for token in written]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{vocab_json} is not GPT-2's kind of vocabulary, or is damaged: {_why(error)}") from error
        if last != EOT or any(vocab[token] != i for i, token in enumerate(written)) or vocab[EOT] != len(tokens):
            raise UserError(f"{vocab_json}: the ids must be 0, 1, 2, ... and {EOT} the last; the last is {last!r}")
        lines = Path(merges_txt).read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
        if lines[0].startswith("#version"):
            del lines[0]
        if lines != _merges_txt(_merges(tokens, vocab_json)):
            raise UserError(f"{merges_txt} does not hold, in order, the merges that make the tokens of {vocab_json}")
        return cls(tokens)

    def save_hf(self, folder):
        """Writes vocab.json and merges.txt; transformers' GPT2Tokenizer of that folder gives the ids `encode` gives."""
        vocab = {_written(token): i for i, token in enumerate(self.tokens)} | {EOT: self.eot}
        merges = ["#version: 0.2", *_merges_txt(_merges(self.tokens, folder))]
        atomic_write(Path(folder) / "vocab.json", json.dumps(vocab, ensure_ascii=False))
        atomic_write(Path(folder) / "merges.txt", "\n".join(merges) + "\n")


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2) -> tokens, a list of bytes, without eot.

    Again and again, the commonest pair of neighbouring tokens becomes a token; of equally common pairs, the one with
    the smaller ids. Counting all pairs anew for each merge would do, in minutes where this takes seconds: a merge
    changes only the words that hold its pair, so `where` finds these and the counts are corrected by their changes.
    """
    if vocab_size < 257:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 single bytes and eot make 257")
    occurrences = Counter()
    for text in tqdm(texts, desc="counting words", unit=" texts", disable=None):
        occurrences.update(WORDS.findall(text))
    words, times = [], []  # each different word as a list of ids, and how often it occurs
    for word, count in occurrences.items():
        data = _utf8(word)
        for start in range(0, len(data), LONGEST):
            words.append(list(data[start : start + LONGEST]))
            times.append(count)

    pair_counts, where = Counter(), defaultdict(set)  # where: pair -> numbers of the words that hold it, or once did
    for number, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += times[number]
            where[pair].add(number)

    tokens = [bytes([b]) for b in range(256)]
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # the smallest comes out: the commonest pair
    heapq.heapify(heap)
    with tqdm(total=vocab_size - 257, desc="learning merges", unit=" merges", disable=None) as progress:
        while heap and len(tokens) < vocab_size - 1:
            count, best = heapq.heappop(heap)
            if -count != pair_counts[best]:
                continue  # the count has changed since, and was pushed anew when it did
            changes = Counter()
            for number in where.pop(best):
                old = words[number]
                new = words[number] = _merge(old, best, len(tokens))
                for pair in pairwise(old):
                    changes[pair] -= times[number]
                for pair in pairwise(new):
                    changes[pair] += times[number]
                    where[pair].add(number)
            for pair, change in changes.items():
                if change:
                    pair_counts[pair] += change
                    if pair_counts[pair]:
                        heapq.heappush(heap, (-pair_counts[pair], pair))
            tokens.append(tokens[best[0]] + tokens[best[1]])
            progress.update()
    return tokens


def _merge(word, pair, new):
    """`word`, a list of ids, with `new` in place of every `pair`, from left to right: aaa -> (aa)a."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def _merges(tokens, file):
    """The merges that made `tokens`, pairs of bytes: what is left of each token when all earlier merges are applied.

    UserError, naming the file they came from, if BPE cannot have made them.
    """
    ranks = {token: i for i, token in enumerate(tokens)}
    if len(ranks) < len(tokens):
        raise UserError(f"{file}: the token {Counter(tokens).most_common(1)[0][0]} is there twice")
    if {bytes([b]) for b in range(256)} != set(tokens[:256]):
        raise UserError(f"{file}: the first 256 tokens must be the single bytes")
    merges = []
    for i, token in enumerate(tokens[256:], start=256):
        parts = [token[k : k + 1] for k in range(len(token))]
        while len(parts) > 2:
            joins = [a + b for a, b in pairwise(parts)]  # one that is no token ranks last, and is refused below
            k = min(range(len(joins)), key=lambda k: ranks.get(joins[k], len(tokens)))
            parts[k : k + 2] = [joins[k]]
        if len(parts) < 2 or any(ranks.get(part, i) >= i for part in parts):
            raise UserError(f"{file}: token {i}, {token}, is not a join of two tokens that come before it")
        merges.append(tuple(parts))
    return merges


# GPT-2's files write a byte as a character one can see: itself if printable, else one from U+0100 on (the space is Ġ).
_unseen = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
BYTE_TO_CHAR = {b: chr(256 + _unseen.index(b)) if b in _unseen else chr(b) for b in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def _written(token):
    return "".join(BYTE_TO_CHAR[b] for b in token)


def _merges_txt(merges):
    return [f"{_written(left)} {_written(right)}" for left, right in merges]


def _why(error):
    return f"{type(error).__name__}: {error}"  # a KeyError's own words are no more than the key


def _utf8(text):
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start + 20]
        raise UserError(
            f"half of a surrogate pair, {text[error.start]!a}, at character {error.start} of a text, in {near!a}: "
            "put the whole character there or take the half out"
        ) from error


def _texts(file):
    """A text file's lines, or the prompts and responses of a .jsonl file."""
    with open(file, "rb") as lines:  # bytes, so that a line that is not UTF-8 is known by its number
        for number, line in enumerate(lines, start=1):
            try:
                if file.endswith(".jsonl"):
                    row = json.loads(line)
                    fields = [row.get(name) for name in ("prompt", "completion", "chosen", "rejected")]
                    texts = [text for text in fields if isinstance(text, str)]
                else:
                    texts = [line.decode("utf-8")]
            except (ValueError, AttributeError) as error:
                raise UserError(f"{file}:{number}: {error}") from error
            yield from texts


def main():
    parser = argparse.ArgumentParser(description="Learns a byte-level BPE from a text or .jsonl file and saves it.")
    parser.add_argument("--text", required=True, help="UTF-8 text, or .jsonl with prompt, completion, chosen, rejected")
    parser.add_argument("--vocab-size", type=int, default=4096, help="256 bytes + merges + eot (default 4096)")
    parser.add_argument("--out", default="bpe.json", help="where to save it (default bpe.json)")
    args = parser.parse_args()
    tokenizer = Tokenizer.train(_texts(args.text), args.vocab_size)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size} tokens, the last one learned is {tokenizer.tokens[-1]}")


if __name__ == "__main__":
    run_main(main)
