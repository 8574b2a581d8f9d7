"""GPT-2's vocabulary in and out, in Hugging Face's files: tokenizer.json, or vocab.json with merges.txt."""

import json
from itertools import pairwise

from minidpo.files.writing import atomic_write
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

EOT = "<|endoftext|>"
# The files write each byte as a visible character: itself if printable, else one from U+0100 on (the space is Ġ).
_unseen = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
BYTE_TO_CHAR = {b: chr(256 + _unseen.index(b)) if b in _unseen else chr(b) for b in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def load_vocabulary(folder, vocab_size):
    """The tokenizer of a Hugging Face folder with a model of `vocab_size` tokens -> a Tokenizer with the same ids.

    Reads bpe.json, which is ours, or tokenizer.json, or vocab.json with merges.txt. A folder without any tokenizer has
    GPT-2's own, if the size says so: 50,257, or up to 50,304, the next multiple of 64. Added tokens such as [PAD] are
    not used. Raises UserError with the name of the file if it is damaged, or no byte-level BPE with GPT-2's pattern.
    """
    path = next((p for name in ("bpe", "tokenizer", "vocab") if (p := folder / f"{name}.json").exists()), None)
    if path is None:
        other = [file.name for end in ("*token*", "*vocab*", "*merges*", "*.model") for file in folder.glob(end)]
        if 50257 <= vocab_size <= 50304 and not other:
            return Tokenizer.gpt2()
        too = f" beside {other[0]}" if other else ""
        raise UserError(f"{folder}: no tokenizer.json and no vocab.json, and {vocab_size} tokens are not GPT-2's{too}.")
    if path.name == "bpe.json":
        return Tokenizer.load(path)
    try:
        vocab, added = json.loads(path.read_text(encoding="utf-8", errors="replace")), {}
        if path.name == "tokenizer.json":
            vocab, merges, added = _byte_level(vocab, path)
        else:
            merges = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            merges = [line for line in merges if not line.startswith("#version")]
            if (file := folder / "added_tokens.json").exists():
                added = json.loads(file.read_text(encoding="utf-8"))
        unused = sorted(added.keys() - {EOT})
        vocab = {token: i for token, i in {**vocab, **added}.items() if token not in unused}
        written = sorted(vocab.keys() - {EOT}, key=vocab.get)
        tokens = [bytes(CHAR_TO_BYTE[c] for c in token) for token in written]
        written.insert(vocab[EOT], EOT)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not GPT-2's kind of vocabulary, or is damaged: {error!r}") from error
    if vocab != {token: i for i, token in enumerate(written)}:
        raise UserError(f"{path}: the ids must be 0, 1, 2, ... without a gap, and added tokens {unused} come last.")
    if merges != merges_of(tokens, path):
        raise UserError(f"{path}: its merges are not, in this order, those that make the tokens.")
    if unused:
        print(f"{path}: the added tokens {', '.join(unused)} are never used.")
    return Tokenizer(tokens, vocab[EOT])


def _byte_level(saved, path):
    """What tokenizer.json holds -> (vocab, merges, added tokens), as vocab.json and its companions hold them."""
    words = saved["pre_tokenizer"] or {}
    kind = saved["model"]["type"], saved["normalizer"], words.get("type"), words.get("add_prefix_space")
    if kind != ("BPE", None, "ByteLevel", False) or not words.get("use_regex", True):
        raise UserError(f"{path} is not a byte-level BPE with GPT-2's pattern: model, normalizer, words are {kind}.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    return saved["model"]["vocab"], merges, {token["content"]: token["id"] for token in saved["added_tokens"]}


def save_vocabulary(tokenizer, folder):
    """Writes vocab.json and merges.txt, from which transformers' GPT2Tokenizer gives the same ids."""
    written = ["".join(BYTE_TO_CHAR[b] for b in token) for token in tokenizer.tokens]
    written.insert(tokenizer.eot, EOT)
    merges = ["#version: 0.2", *merges_of(tokenizer.tokens, folder)]
    atomic_write(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(written)}, ensure_ascii=False))
    atomic_write(folder / "merges.txt", "\n".join(merges) + "\n")


def merges_of(tokens, file):
    """The lines of merges.txt: per token, the two parts left after all earlier merges. Raises UserError with `file`."""
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
