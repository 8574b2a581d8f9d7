"""GPT-2's vocabulary in and out, in Hugging Face's files: tokenizer.json, or vocab.json with merges.txt."""

import json
from itertools import pairwise

from minidpo.files import atomic_write
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

EOT = "<|endoftext|>"
# The files write each byte as a visible character: itself if printable, else one from U+0100 on (the space is Ġ).
_unseen = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
BYTE_TO_CHAR = {b: chr(256 + _unseen.index(b)) if b in _unseen else chr(b) for b in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def load_vocabulary(folder, vocab_size):
    """The tokenizer of a Hugging Face folder with a model of `vocab_size` tokens -> a Tokenizer with the same ids.

    Reads bpe.json, which is ours, or tokenizer.json, or vocab.json with merges.txt. A folder with none of them has
    GPT-2's own vocabulary, if the size says so.

    Raises:
        UserError: with the name of the file. It is damaged, or no byte-level BPE with GPT-2's pattern.
    """
    files = (folder / name for name in ("bpe.json", "tokenizer.json", "vocab.json"))
    path = next((path for path in files if path.exists()), None)
    if path is None and vocab_size == 50257:
        return Tokenizer.gpt2()
    if path is None:
        raise UserError(f"{folder} has no tokenizer.json and no vocab.json, and {vocab_size} tokens are not GPT-2's.")
    if path.name == "bpe.json":
        return Tokenizer.load(path)
    try:
        vocab = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        if path.name == "tokenizer.json":
            vocab, merges = _byte_level(vocab, path)
        else:
            merges = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            merges = [line for line in merges if not line.startswith("#version")]
        eot = vocab[EOT]
        written = sorted(vocab.keys() - {EOT}, key=vocab.get)
        tokens = [bytes(CHAR_TO_BYTE[c] for c in token) for token in written]
        written.insert(eot, EOT)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not GPT-2's kind of vocabulary, or is damaged: {error!r}") from error
    if vocab != {token: i for i, token in enumerate(written)}:
        raise UserError(f"{path}: the ids must be 0, 1, 2, ... without a gap.")
    if merges != merges_of(tokens, path):
        raise UserError(f"{path}: its merges are not, in this order, those that make the tokens.")
    return Tokenizer(tokens, eot)


def _byte_level(saved, path):
    """What tokenizer.json holds -> (vocab, merges), as vocab.json and merges.txt hold them."""
    words = saved["pre_tokenizer"] or {}
    kind = saved["model"]["type"], saved["normalizer"], words.get("type"), words.get("add_prefix_space")
    if kind != ("BPE", None, "ByteLevel", False) or not words.get("use_regex", True):
        raise UserError(f"{path} is not a byte-level BPE with GPT-2's pattern: model, normalizer, words are {kind}.")
    added = {token["content"]: token["id"] for token in saved["added_tokens"]}
    if added.keys() - {EOT}:
        raise UserError(f"{path} adds the tokens {sorted(added.keys() - {EOT})}. Only {EOT} is supported.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    return {**saved["model"]["vocab"], **added}, merges


def save_vocabulary(tokenizer, folder):
    """Writes vocab.json and merges.txt, from which transformers' GPT2Tokenizer gives the same ids."""
    written = ["".join(BYTE_TO_CHAR[b] for b in token) for token in tokenizer.tokens]
    written.insert(tokenizer.eot, EOT)
    merges = ["#version: 0.2", *merges_of(tokenizer.tokens, folder)]
    atomic_write(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(written)}, ensure_ascii=False))
    atomic_write(folder / "merges.txt", "\n".join(merges) + "\n")


def merges_of(tokens, file):
    """The lines of merges.txt: for each token, the two parts that are left when all earlier merges are made.

    Raises UserError, with the name of the file, if `tokens` are not the result of merges.
    """
    ranks = {token: i for i, token in enumerate(tokens)}
    if len(ranks) < len(tokens) or {bytes([b]) for b in range(256)} != set(tokens[:256]):
        raise UserError(f"{file}: the first 256 tokens must be the single bytes, and no token can be there twice.")
    lines = []
    for i, token in enumerate(tokens[256:], start=256):
        parts = [token[k : k + 1] for k in range(len(token))]
        while len(parts) > 2:
            joins = [a + b for a, b in pairwise(parts)]
            k = min(range(len(joins)), key=lambda k: ranks.get(joins[k], len(tokens)))
            parts[k : k + 2] = [joins[k]]
        if len(parts) < 2 or any(ranks.get(part, i) >= i for part in parts):
            raise UserError(f"{file}: token {i}, {token}, is not a join of two tokens that come before it.")
        lines.append(" ".join("".join(BYTE_TO_CHAR[b] for b in part) for part in parts))
    return lines
