"""What loading a checkpoint costs and what a fingerprint sees. Saving, resuming, damage: test_runs.py, test_kill.py."""

import json
import resource
import sys

import torch
from children import start

from minidpo import checkpoint
from minidpo.model import GPT, GPTConfig
from minidpo.tokenizer import Tokenizer


def peak():
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load_and_measure(folder):
    checkpoint.load(f"{folder}/small")  # so that the libraries have loaded what they need
    before = peak()
    model, _, state = checkpoint.load(f"{folder}/large")
    print(json.dumps([peak() - before, len(state["optimizer"])]))


def test_loading_holds_the_file_once(tmp_path):
    """Peak at most 1.2 times the model beside the optimiser state: no second copy, no first weights made on the way."""
    model = GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=4, n_head=4, n_embd=640))
    size = 4 * sum(weight.numel() for weight in model.parameters())
    state = {"optimizer": [torch.zeros_like(p) for p in model.parameters()]}
    checkpoint.save(tmp_path / "large", model, Tokenizer.train([], 257), state)
    checkpoint.save(tmp_path / "small", GPT(GPTConfig(257, 8, 1, 2, 4)), Tokenizer.train([], 257))
    assert start(load_and_measure, tmp_path, log=tmp_path / "log").join() == 0
    rise, _ = json.loads((tmp_path / "log").read_text(encoding="utf-8"))
    assert size > 75e6 and 1.8 * size < rise < 2.2 * size


def test_what_is_loaded_is_what_was_saved_and_trains(tmp_path):
    model = GPT(GPTConfig(257, 8, 1, 2, 4), torch.Generator().manual_seed(0))
    for i, saved in enumerate((model, model.double(), model.bfloat16())):
        checkpoint.save(tmp_path / str(i), saved, Tokenizer.train([], 257))
        loaded, *_ = checkpoint.load(tmp_path / str(i))
        assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(saved) and loaded.config == saved.config
        assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in loaded.parameters())


def test_a_checkpoint_that_is_replaced_has_its_own_tokenizer(tmp_path):
    for texts in ([], ["so so so so good"] * 9):
        tokenizer = Tokenizer.train(texts, 260)
        checkpoint.save(tmp_path, GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 2, 4)), tokenizer)
        assert checkpoint.load(tmp_path)[1].fingerprint == tokenizer.fingerprint


def test_trap09_fingerprint_sees_the_shape_that_no_weight_shows():
    def of(**shape):
        shape = dict(vocab_size=7, block_size=5, n_layer=1, n_head=2, n_embd=8) | shape
        return checkpoint.fingerprint(GPT(GPTConfig(**shape), torch.Generator().manual_seed(0)))

    assert of() == of(dropout=0.1)  # not in force when numbers are kept
    assert of(n_head=4) != of() != of(n_head=1)
