"""Text to token ids and back: GPT-2's byte-level BPE, or a BPE trained on your own texts.

A vocabulary is a list of byte strings: the 256 single bytes, then one token per merge, in the order of learning. One
more id, usually the last, is the end-of-text token, eot. To encode a text, cut it into words with `PATTERN`. In each
word, join the two neighbours whose bytes together come first in the list, as long as any do. tiktoken does this fast.

Train on a file:  python -m minidpo.tokenizer --text FILE --vocab-size N
"""

import dataclasses
import hashlib
import heapq
import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken
from tqdm import tqdm

from minidpo.files.jsonl import texts
from minidpo.files.writing import atomic_write, new_file
from minidpo.settings import UserError, knob, parse_settings, run_main

# GPT-2's words: contractions; letters, digits or other signs after a space or none; whitespace. No merge crosses them.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# A million blanks in a row overflow the stack of tiktoken's regex engine, so `encode` cuts after every thousand.
LONG_BLANK = regex.compile(r"(\s{1000})(?=\s)")
LONGEST = 1000  # bytes; training cuts longer words, because each merge walks through a whole word


class Tokenizer:
    """`vocab_size` counts 256 bytes + merges + eot. The id `eot` starts a document and ends a response."""

    def __init__(self, tokens, eot=None):
        """tokens: list of bytes in the order of their ids, without eot. eot: its id; None: the last one."""
        self.tokens = tokens
        self.eot = len(tokens) if eot is None else eot
        self.vocab_size = len(tokens) + 1
        ranks = {token: i + (i >= self.eot) for i, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding("minidpo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        """str -> list of ids, never eot: "<|endoftext|>" in a text becomes several ordinary tokens.

        Raises UserError for half a character (a lone surrogate, such as JSON's "\\ud83d").
        """
        _utf8(text)  # tiktoken would replace it by U+FFFD
        return [i for piece in LONG_BLANK.split(text) for i in self._encoding.encode_ordinary(piece)]

    def decode(self, ids):
        """ids -> str, without eot. Bytes that are not UTF-8 (half a character was sampled) become U+FFFD."""
        return self._encoding.decode([i for i in ids if i != self.eot], errors="replace")

    @property
    def fingerprint(self):
        """16 hex digits. Different tokenizers have different fingerprints."""
        return hashlib.sha256(self._json().encode()).hexdigest()[:16]

    @classmethod
    def gpt2(cls):
        """GPT-2's own 50,257 tokens. tiktoken downloads two files (1.5 MB) once and keeps them."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network; a download that was cut short
            raise UserError(
                "GPT-2's vocabulary is not on this machine and could not be downloaded. Connect once, or set "
                f"TIKTOKEN_CACHE_DIR to a folder with tiktoken's files from a machine where this worked. ({error})"
            ) from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns a BPE from an iterable of str. It is smaller than `vocab_size` if nothing is left to merge."""
        return cls(train_bpe(texts, vocab_size))

    def save(self, file):
        """Writes a JSON file, one token per line. Each byte is a latin-1 character, so " the" stays readable."""
        atomic_write(file, self._json())

    def _json(self):
        tokens = [token.decode("latin-1") for token in self.tokens]
        return json.dumps({"pattern": PATTERN, "eot": self.eot, "tokens": tokens}, indent=1) + "\n"

    @classmethod
    def load(cls, file):
        """Reads what `save` wrote. Raises UserError if the file holds anything else."""
        try:
            saved = json.loads(Path(file).read_text(encoding="utf-8", errors="replace"))
            pattern, eot = saved["pattern"], saved["eot"]
            tokens = [token.encode("latin-1") for token in saved["tokens"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not a tokenizer saved by minidpo, or is damaged: {error!r}") from error
        if pattern != PATTERN:
            raise UserError(f"{file}: the pattern is not GPT-2's: {PATTERN}. No other is supported.")
        if eot not in range(len(tokens) + 1):
            raise UserError(f"{file}: eot is {eot!r}, which must be a number from 0 to {len(tokens)}.")
        if len({b"", *tokens}) <= len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
            raise UserError(f"{file}: a token is empty or there twice, or one of the 256 single bytes is missing.")
        return cls(tokens, eot)


def train_bpe(texts, vocab_size):
    """Learns a byte-pair encoding (Sennrich et al. 2016; on bytes, as GPT-2's). Returns a list of bytes without eot.

    Each merge makes one token of the most frequent pair of neighbouring tokens. Among equals, the smaller ids win. A
    merge changes only the words that contain its pair. `where` finds them, and only their counts are corrected. This
    takes seconds. Counting all pairs again for each merge would take minutes.
    """
    if vocab_size < 257:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 single bytes and eot make 257.")
    occurrences = Counter()
    for text in tqdm(texts, desc="counting words", unit=" texts", disable=None):
        occurrences.update(regex.findall(PATTERN, text))
    words, times = [], []  # each different word as a list of ids, and how often it occurs in the texts
    pair_counts, where = Counter(), defaultdict(set)  # where: pair -> numbers of the words that contain it, or did
    for text, count in occurrences.items():
        data = _utf8(text)
        for start in range(0, len(data), LONGEST):
            word = list(data[start : start + LONGEST])
            for pair in pairwise(word):
                pair_counts[pair] += count
                where[pair].add(len(words))
            words.append(word)
            times.append(count)

    tokens = [bytes([b]) for b in range(256)]
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # the smallest is the most frequent
    heapq.heapify(heap)
    with tqdm(total=vocab_size - 257, desc="learning merges", unit=" merges", disable=None) as progress:
        while heap and len(tokens) < vocab_size - 1:
            count, best = heapq.heappop(heap)
            if -count != pair_counts[best]:
                continue  # an old count: when it changed, the new one was pushed
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
    """Replaces every `pair` in `word`, a list of ids, by the id `new`, from left to right: aaa -> (aa)a."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def _utf8(text):
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"a text holds half a character (a lone surrogate): {error}. Take it out.") from error


@dataclasses.dataclass
class Settings:
    text: str = knob(dataclasses.MISSING, "UTF-8 text, or JSONL of rows as for training")
    vocab_size: int = knob(4096, "256 bytes + merges + eot", least=257)
    out: str = knob("bpe.json", "where to save it")
    overwrite: bool = knob(False, "replace the file --out")


def main():
    settings = parse_settings(Settings, "Learns a byte-level BPE from a file of text or of rows.")
    out = new_file(settings.out, settings.overwrite)
    tokenizer = Tokenizer.train(texts(settings.text), settings.vocab_size)
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size} tokens, the last one learned is {tokenizer.tokens[-1]}")


if __name__ == "__main__":
    run_main(main)
