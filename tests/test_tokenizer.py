"""The tokenizer against tiktoken, against Hugging Face's, and its trainer against one that counts everything again."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from conftest import need

from minidpo.files.vocabulary import EOT, load_vocabulary, merges_of, save_vocabulary
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer, train_bpe

# GPT-2's pattern as its authors wrote it
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

CORPUS = [
    "The film was good, and the cast was good too. I'd see it again!",
    "A bad film: the plot's thin, the jokes are thin, and it's 120 minutes long.\n\n  Avoid.",
    "Ein schöner Film, größer als die Summe seiner Teile. 映画はとても良かったです。 映画館で見た。",
    "aaaa aaaaaaa baaaab abababab ... ---- !!!! 1999 1998 😀😀 😀",
]
TEXTS = [
    "",
    " ",
    "Hello world",
    "the film, the films; the filmmaker's films' plots\tand\r\nmore\n\n\n  indented   text  ",
    "naïve café — “quotes” … ½ ² Ⅷ",
    "한국어 العربية עברית ไทย हिन्दी 日本語 русский",
    "👍🏽 👩‍👩‍👧 🇩🇪 e\u0301 \U0010ffff \ufffe",
    "\x00 NUL \x00\x00 \x1c\x1d \x7f \x85 \xa0 \u2028 \u200b \ufeff",
    f"{EOT} <|endoftext|><|endoftext|> <|im_start|>",
    "I'LL we'll they'd' 'tis 1234567 3.14 x=y**2;",
]


def random_texts(seed, alphabet, count=30, length=40):
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randrange(length))) for _ in range(count)]


FUZZ = random_texts(0, "abc 12 '\n\t.!é\u0301映😀\x00\x85\xa0\u3000", count=300)


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CORPUS, 400)


@pytest.fixture(scope="module")
def gpt2():
    need("TIKTOKEN_CACHE_DIR" in os.environ, "set TIKTOKEN_CACHE_DIR to a folder with GPT-2's vocabulary")
    return Tokenizer.gpt2()


# --- training


def naive_bpe(texts, vocab_size):
    """Every pair of every word of the corpus is counted again for every merge."""
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in regex.findall(GPT2_PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        counts = Counter((tokens.index(a), tokens.index(b)) for word in words for a, b in pairwise(word))
        if not counts:
            break
        most = max(counts.values())
        left, right = (tokens[i] for i in min(pair for pair in counts if counts[pair] == most))
        tokens.append(left + right)
        for word in words:
            for i in range(len(word)):  # joins shorten the word: past its end, nothing equals the pair
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    return tokens


def test_train_by_hand():
    # aa 4 times (twice in each aaa); then ab and (aa)a twice each, of which ab has the smaller ids; then (aa)(ab)
    assert train_bpe(["aaabdaaabac"], 260)[256:] == [b"aa", b"ab", b"aaab"]


RANDOM_CORPORA = [random_texts(seed, alphabet) for seed in range(8) for alphabet in ("ab", "abc  ")]  # full of ties


@pytest.mark.parametrize("texts", [CORPUS, *RANDOM_CORPORA])
def test_train_equals_recounting(texts):
    assert train_bpe(texts, 340) == naive_bpe(texts, 340)


def test_train_takes_any_iterable_and_stops_when_nothing_is_left_to_merge():
    tokenizer = Tokenizer.train((text for text in ["abc abc", " abc"]), 10_000)
    assert tokenizer.tokens[256:] == [b"ab", b"abc", b" abc"]
    assert (tokenizer.vocab_size, tokenizer.eot) == (260, 259)
    assert Tokenizer.train(CORPUS, 300).vocab_size == 300
    assert Tokenizer.train([], 300).vocab_size == Tokenizer.train(CORPUS, 257).vocab_size == 257
    with pytest.raises(UserError, match="too small"):
        Tokenizer.train(CORPUS, 256)


def test_train_cuts_endless_words():
    tokens = train_bpe(["ab" * 1500 + "xy"], 10_000)
    assert max(map(len, tokens)) == 1000
    assert tokens[-1] == b"xy"


def test_encode_equals_merges_replayed_in_order(trained):
    for text in CORPUS + TEXTS + FUZZ:
        expected = []
        for word in regex.findall(GPT2_PATTERN, text):
            parts = [bytes([b]) for b in word.encode()]
            for token in trained.tokens[256:]:
                for i in range(len(parts)):
                    if b"".join(parts[i : i + 2]) == token and len(parts[i : i + 2]) == 2:
                        parts[i : i + 2] = [token]
            expected += [trained.tokens.index(part) for part in parts]
        assert trained.encode(text) == expected, text


# --- encoding and decoding


def test_gpt2_known_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.decode([464, 3290, 50256]) == "The dog"


def test_gpt2_equals_tiktoken(gpt2):
    reference = tiktoken.get_encoding("gpt2")
    blanks = [blank * n + "a" for n in (999, 1000, 1001, 2000, 2001) for blank in (" ", "\n")]
    for text in CORPUS + TEXTS + FUZZ + blanks:
        assert gpt2.encode(text) == reference.encode_ordinary(text), text


def test_round_trip(trained, gpt2):
    for tokenizer in (trained, gpt2):
        for text in TEXTS + FUZZ:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("blank_or_letter", ["a", " ", "\n", "\t ", "😀", "日", "1", "!", "a b", "'"])
def test_a_million_of_the_same(trained, blank_or_letter):
    text = blank_or_letter * (1_000_000 // len(blank_or_letter)) + "a"  # tiktoken alone panics on the blanks
    assert trained.decode(trained.encode(text)) == text


def test_special_tokens_in_text_are_text(trained, gpt2):
    assert gpt2.encode(EOT) == [27, 91, 437, 1659, 5239, 91, 29]
    trained_on_it = Tokenizer.train([EOT] * 9, 400)
    for tokenizer in (trained, gpt2, trained_on_it):
        assert tokenizer.eot not in tokenizer.encode(f"a{EOT}b {EOT}")


def test_decode_leaves_eot_out_and_replaces_half_characters(trained):
    assert trained.decode([trained.eot, *trained.encode("a film"), trained.eot]) == "a film"
    assert trained.decode([*b"a\xf0\x9f"]) == "a\ufffd"
    assert trained.decode([]) == ""


def test_half_a_surrogate_pair_is_refused(trained):
    text = json.loads('"good \\ud83d film"')
    with pytest.raises(UserError, match=r"ud83d.*position 5"):
        trained.encode(text)
    with pytest.raises(UserError, match="ud83d"):
        Tokenizer.train([text], 300)


# --- files


def test_save_and_load(trained, gpt2, tmp_path):
    for tokenizer in (trained, gpt2):
        tokenizer.save(tmp_path / "bpe.json")
        loaded = Tokenizer.load(tmp_path / "bpe.json")
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.tokens, loaded.eot) == (tokenizer.tokens, tokenizer.eot)
        assert all(loaded.encode(text) == tokenizer.encode(text) for text in TEXTS)
    assert '" the"' in (tmp_path / "bpe.json").read_text(encoding="utf-8")


def test_fingerprint_tells_tokenizers_apart(trained, gpt2):
    swapped = Tokenizer([*trained.tokens[:256], *reversed(trained.tokens[256:])])
    shorter = Tokenizer(trained.tokens[:-1])
    assert len({t.fingerprint for t in (trained, gpt2, swapped, shorter)}) == 4
    assert Tokenizer.train(CORPUS, 400).fingerprint == trained.fingerprint


def damage(key, value):
    return lambda saved: {**saved, key: value(saved[key])}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda saved: [], "not a tokenizer"),
        (lambda saved: {"tokens": saved["tokens"]}, "pattern"),
        (damage("pattern", lambda pattern: r"\w+"), "pattern"),
        (damage("eot", lambda eot: -1), "eot is -1"),
        (damage("eot", lambda eot: 400), "eot is 400"),
        (damage("eot", lambda eot: None), "eot is None"),
        (damage("tokens", lambda tokens: 3), "not a tokenizer"),
        (damage("tokens", lambda tokens: [*tokens[:-1], 7]), "not a tokenizer"),
        (damage("tokens", lambda tokens: [*tokens[:-1], "映"]), "not a tokenizer"),
        (damage("tokens", lambda tokens: [*tokens[:-1], tokens[300]]), "twice"),
        (damage("tokens", lambda tokens: [*tokens[1:], "zzz"]), "single bytes"),
        (damage("tokens", lambda tokens: [*tokens[:-1], ""]), "empty"),
    ],
)
def test_load_refuses_what_is_no_tokenizer(trained, tmp_path, change, message):
    file = tmp_path / "bpe.json"
    trained.save(file)
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"pattern": "', b"\xff\xfe\x00", b"\xff" * 100_000])
def test_load_refuses_what_is_no_json(tmp_path, content):
    file = tmp_path / "bpe.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="bpe.json") as error:
        Tokenizer.load(file)
    assert len(str(error.value)) < 1000


def test_hugging_face_files_of_gpt2(gpt2, tmp_path):
    save_vocabulary(gpt2, tmp_path)
    merges = [line.split(" ") for line in (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]]
    assert (len(merges), merges[:3], merges[-1]) == (50_000, [["Ġ", "t"], ["Ġ", "a"], ["h", "e"]], ["Ġg", "azed"])
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert (vocab["!"], vocab["Ġthe"], vocab[EOT]) == (0, 262, 50256)
    again = load_vocabulary(tmp_path, 50257)
    assert again.fingerprint == gpt2.fingerprint


def test_transformers_gives_the_same_ids(trained, gpt2, tmp_path):
    try:
        from transformers import AutoTokenizer, GPT2Tokenizer
    except ImportError:
        need(False, "transformers is not installed")
    for tokenizer in (trained, gpt2):
        save_vocabulary(tokenizer, tmp_path)
        theirs = GPT2Tokenizer.from_pretrained(tmp_path)
        assert len(theirs) == tokenizer.vocab_size
        assert theirs.eos_token_id == tokenizer.eot
        for text in CORPUS + FUZZ + [text for text in TEXTS if EOT not in text]:  # theirs makes eot of it
            assert theirs.encode(text) == tokenizer.encode(text), text
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path).encode(CORPUS[0]) == gpt2.encode(CORPUS[0])


def test_hugging_face_files_that_do_not_fit(trained, tmp_path):
    vocab_json, merges_txt = tmp_path / "vocab.json", tmp_path / "merges.txt"
    save_vocabulary(trained, tmp_path)
    vocab = json.loads(vocab_json.read_text(encoding="utf-8"))
    merges = merges_txt.read_text(encoding="utf-8")

    def refused(name, vocab=vocab, merges=merges):
        vocab_json.write_text(json.dumps(vocab), encoding="utf-8")
        merges_txt.write_text(merges, encoding="utf-8")
        with pytest.raises(UserError, match=name):
            load_vocabulary(tmp_path, len(vocab))

    refused("vocab.json", vocab=[])
    refused("vocab.json", vocab={})
    refused("vocab.json", vocab={token: str(i) for token, i in vocab.items()})
    refused("vocab.json", vocab={token: i + 1 for token, i in vocab.items()})
    refused("vocab.json", vocab={**vocab, "<|pad|>": len(vocab)})
    refused("its merges", merges=merges.rsplit("\n", 2)[0] + "\n")
    refused("its merges", merges=merges.replace("h e\n", "he\n"))
    refused("its merges", merges="")
    (tmp_path / "added_tokens.json").write_text('{"<|pad|>": 5}', encoding="utf-8")
    refused("its merges", merges="")
    refused("vocab.json", vocab={token: i + (i > 4) for token, i in vocab.items()})  # a token between the others
    (tmp_path / "added_tokens.json").unlink()
    vocab_json.write_text(json.dumps(vocab), encoding="utf-8")
    merges_txt.write_text(merges.split("\n", 1)[1], encoding="utf-8")  # without the version line it is still good
    assert load_vocabulary(tmp_path, len(vocab)).fingerprint == trained.fingerprint


def test_tokens_that_are_no_result_of_merges(trained):
    tokens = trained.tokens
    for damaged, message in (
        ([*tokens[:-1], b"zqx"], "file: token 398, b'zqx', is not a join"),
        ([*tokens[:-1], b""], "file: token 398"),
        ([*tokens[:256], *reversed(tokens[256:])], "not a join"),
        ([*tokens[:-1], tokens[300]], "twice"),
        ([*tokens[1:], b"zzz"], "single bytes"),
    ):
        with pytest.raises(UserError, match=message):
            merges_of(damaged, "file")


def test_tokenizer_json_as_hugging_face_writes_it(tmp_path):
    """A BPE that Hugging Face's own trainer made: its eot is the first id, and it saves tokenizer.json alone."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=380, special_tokens=[EOT], initial_alphabet=alphabet)
    theirs.train_from_iterator(CORPUS * 3, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))

    def load():
        return load_vocabulary(tmp_path, theirs.get_vocab_size())

    ours = load()
    assert (ours.eot, ours.vocab_size) == (0, theirs.get_vocab_size()) and ours.vocab_size > 300
    ours.save(tmp_path / "again.json")
    for tokenizer in (ours, Tokenizer.load(tmp_path / "again.json")):
        for text in CORPUS + FUZZ:
            assert tokenizer.encode(text) == theirs.encode(text).ids and 0 not in tokenizer.encode(text), text
            assert tokenizer.decode([*tokenizer.encode(text), 0]) == text

    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    pad = {**saved["added_tokens"][0], "content": "<pad>", "id": 9}
    between = {token: i + (i >= 9) for token, i in saved["model"]["vocab"].items()}
    for change, message in (
        (dict(normalizer={"type": "Lowercase"}), "Lowercase"),
        (dict(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (dict(pre_tokenizer={**saved["pre_tokenizer"], "add_prefix_space": True}), "True"),
        (dict(model={**saved["model"], "type": "WordPiece"}), "WordPiece"),
        (
            dict(model={**saved["model"], "vocab": between}, added_tokens=[*saved["added_tokens"], pad]),
            r"without a gap, and added tokens \['<pad>'\] come last",
        ),
        (dict(model={**saved["model"], "merges": saved["model"]["merges"][::-1]}), "its merges"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved | change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load()


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_tokens_added_after_the_others_are_never_used(trained, tmp_path, capsys, form):
    """As `add_special_tokens({"pad_token": "[PAD]"})` leaves them: in tokenizer.json, before in added_tokens.json."""
    try:
        from transformers import GPT2Tokenizer
    except ImportError:
        need(False, "transformers is not installed")
    save_vocabulary(trained, tmp_path)
    added = {"[PAD]": 400, "<|im_end|>": 401}
    if form == "tokenizer.json":
        theirs = GPT2Tokenizer.from_pretrained(tmp_path)
        theirs.add_special_tokens({"pad_token": "[PAD]"})
        theirs.add_tokens(["<|im_end|>"])
        assert theirs.convert_tokens_to_ids(list(added)) == [400, 401]
        theirs.save_pretrained(tmp_path)
        assert "[PAD]" in (tmp_path / form).read_text(encoding="utf-8")
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    loaded = load_vocabulary(tmp_path, 402)
    assert loaded.fingerprint == trained.fingerprint and loaded.vocab_size == 400
    assert max(loaded.encode("a [PAD] film<|im_end|>")) < 399  # ordinary text
    assert f"{tmp_path / form}: the added tokens <|im_end|>, [PAD] are never used." in capsys.readouterr().out


# --- commands


def run_python(*args, **environment):
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *args], cwd=root, env={**os.environ, **environment}, capture_output=True, encoding="utf-8"
    )


def test_gpt2_without_network_says_what_to_do(tmp_path):
    nobody = "http://127.0.0.1:9"  # a proxy that is not there: no network, wherever the test runs
    result = run_python(
        "-c",
        "from minidpo.settings import run_main; from minidpo.tokenizer import Tokenizer; run_main(Tokenizer.gpt2)",
        TIKTOKEN_CACHE_DIR=str(tmp_path),
        HTTPS_PROXY=nobody,
        https_proxy=nobody,
        NO_PROXY="",
        no_proxy="",
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: GPT-2's vocabulary is not on this machine")
    assert "TIKTOKEN_CACHE_DIR" in result.stderr and "Traceback" not in result.stderr


def test_command_trains_on_text_and_jsonl(tmp_path):
    text, rows, out = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "bpe.json"
    text.write_text("good film\ngood plot\n", encoding="utf-8")
    row = {"prompt": "good", "completion": " film", "id": "xyz"}
    rows.write_text(json.dumps(row) + '\n{"prompt": "a", "chosen": "bc"}\n', encoding="utf-8")
    for file, texts in ((text, ["good film\n", "good plot\n"]), (rows, ["good", " film", "a", "bc"])):
        command = ("-m", "minidpo.tokenizer", "--text", str(file), "--vocab-size", "262", "--out", str(out))
        if out.exists():  # of the first text
            before = out.read_bytes()
            assert "Add --overwrite" in run_python(*command).stderr and out.read_bytes() == before
            command += ("--overwrite",)
        result = run_python(*command)
        assert result.returncode == 0, result.stderr
        assert Tokenizer.load(out).tokens == train_bpe(texts, 262)


@pytest.mark.parametrize("name, line", [("a.jsonl", b'{"prompt": \n'), ("a.jsonl", b"[1]\n"), ("a.txt", b"\xff\n")])
def test_command_names_the_line_it_cannot_read(tmp_path, name, line):
    (tmp_path / name).write_bytes(b'{"prompt": "a"}\n' + line)
    out = tmp_path / "bpe.json"
    result = run_python("-m", "minidpo.tokenizer", "--text", str(tmp_path / name), "--out", str(out))
    assert (result.returncode, out.exists()) == (2, False)
    assert f"{name}, line 2: " in result.stderr and "Traceback" not in result.stderr
