"""GPT-2 exactly: against the architecture written out in plain matrix products, and against Hugging Face's."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import need
from tiny import call, contents, fails

from minidpo import checkpoint
from minidpo.dataset import preference_batch
from minidpo.model import GPT, GPTConfig
from minidpo.sampling import generate
from minidpo.scale import fast, weights
from minidpo.scale.weights import load_pretrained, save_pretrained
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer
from train_dpo import response_logps

try:
    import safetensors.torch
    import transformers
except ImportError:
    transformers = None

SHAPE = dict(vocab_size=211, block_size=24, n_layer=3, n_head=4, n_embd=32)


def random_model(seed=0, **shape):
    """A GPT whose every weight is random, biases and LayerNorms too, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE | shape))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("ln_" in name), std=0.2, generator=generator)
    return model


def random_ids(*shape, seed=0, vocab_size=SHAPE["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- the architecture ----


def forward_by_hand(model, ids):
    """The logits of one row, from GPT-2's formulas: (T,) -> (T, V)."""
    w = {name: weight.detach() for name, weight in model.named_parameters()}
    n_head = model.config.n_head

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / (variance + 1e-5) ** 0.5 * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = torch.stack([w["wte.weight"][i] + w["wpe.weight"][t] for t, i in enumerate(ids.tolist())])
    T, C = x.shape
    D = C // n_head
    for layer in range(model.config.n_layer):
        h = f"h.{layer}."
        qkv = linear(layer_norm(x, h + "ln_1"), h + "attn.c_attn")
        y = torch.zeros_like(x)
        for head in range(n_head):
            q, k, v = (qkv[:, part * C + head * D : part * C + (head + 1) * D] for part in range(3))
            for t in range(T):
                weights = torch.stack([(q[t] @ k[s] / math.sqrt(D)).exp() for s in range(t + 1)])
                y[t, head * D : (head + 1) * D] = (weights / weights.sum()) @ v[: t + 1]
        x = x + linear(y, h + "attn.c_proj")
        x = x + linear(gelu(linear(layer_norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    return layer_norm(x, "ln_f") @ w["wte.weight"].T


@torch.no_grad()
def test_forward_by_hand():
    model = random_model().double()
    ids = random_ids(2, 7)
    expected = torch.stack([forward_by_hand(model, row) for row in ids])
    torch.testing.assert_close(model(ids), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.hidden(ids) @ model.wte.weight.T, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name, n_parameters",
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_trap14_presets_have_gpt2s_number_of_weights(name, n_parameters):
    with torch.device("meta"):  # shapes without memory
        model = GPT(GPTConfig.preset(name))
    assert sum(weight.numel() for weight in model.parameters()) == n_parameters
    assert sum(weight.numel() for weight in model.state_dict().values()) == n_parameters  # nothing saved twice


def test_trap14_the_head_is_the_embedding():
    model = random_model()
    names = [name for name, _ in model.named_parameters()]
    assert names.count("wte.weight") == 1 and not any("head" in name for name in names)
    hidden = model.hidden(random_ids(1, 4)).detach()
    with torch.no_grad():
        model.wte.weight.mul_(2)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.wte.weight.T)
    # both uses reach the one gradient: of a token that is only predicted, and of one that is only read
    gradient = torch.autograd.grad(model(torch.tensor([[5]]))[0, 0, 7], model.wte.weight)[0]
    assert gradient[5].any() and gradient[7].any() and not gradient[6].any()


def test_presets_take_overrides_and_unknown_names_are_refused():
    assert GPTConfig.preset("gpt2", vocab_size=600, dropout=0.1) == GPTConfig(600, 1024, 12, 12, 768, 0.1)
    with pytest.raises(UserError, match="unknown preset 'gpt2-medum'. Did you mean 'gpt2-medium'"):
        GPTConfig.preset("gpt2-medum")
    with pytest.raises(UserError, match="n_embd 10 does not divide into 3 heads"):
        GPTConfig(10, 10, 1, 3, 10)


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(2000, 500, n_layer=8, n_head=4, n_embd=128), torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8 layers) = 4
            assert weight.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5, name
    same = GPT(model.config, torch.Generator().manual_seed(0))
    other = GPT(model.config, torch.Generator().manual_seed(1))
    assert checkpoint.fingerprint(model) == checkpoint.fingerprint(same) != checkpoint.fingerprint(other)


@torch.no_grad()
def test_trap12_what_comes_later_and_who_is_beside_changes_nothing():
    model = random_model().double()
    ids = random_ids(3, 10)
    changed = ids.clone()
    changed[:, 6:] = random_ids(3, 4, seed=1)
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(a[:, 6:], b[:, 6:]).all(-1).any()
    torch.testing.assert_close(model(ids[1:2, :6]), a[1:2, :6], rtol=1e-12, atol=1e-12)


def test_a_row_longer_than_the_context_is_refused():
    model = random_model()
    assert model(random_ids(1, 24)).shape == (1, 24, 211)
    with pytest.raises(UserError, match="a row of 25 tokens is longer than the model's context of 24"):
        model(random_ids(1, 25))


# ---- dropout and precision ----

# GPT-2 drops in four places; each alone must be found by set_dropout
PLACES = {
    "embedding": lambda model: setattr(model.drop, "p", 0.5),
    "attention weights": lambda model: setattr(model.h[1].attn, "dropout", 0.5),
    "attention output": lambda model: setattr(model.h[1].attn.resid_dropout, "p", 0.5),
    "mlp output": lambda model: setattr(model.h[1].mlp.dropout, "p", 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_trap07_set_dropout_finds_every_dropout(place):
    model, ids = random_model(), random_ids(2, 8)
    plain = model.train()(ids)
    PLACES[place](model)
    assert not torch.equal(model(ids), model(ids)), "the dropout set here did nothing"
    assert torch.equal(model.eval()(ids), plain)
    model.train().set_dropout(0.0)
    assert torch.equal(model(ids), model(ids)) and torch.equal(model(ids), plain)
    assert model.config.dropout == 0.0


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_trap07_the_configs_dropout_reaches_every_place(place):
    model = random_model(dropout=0.5)
    where = {"embedding": model.drop, "mlp output": model.h[1].mlp.dropout}
    where["attention output"] = model.h[1].attn.resid_dropout
    p = model.h[1].attn.dropout if place == "attention weights" else where[place].p
    assert p == 0.5
    model.set_dropout(0.0)
    PLACES[place](model)
    ids = random_ids(2, 8)
    assert not torch.equal(model(ids), model(ids))


def test_trap07_two_forwards_in_train_mode_agree_whatever_the_checkpoint_says(tmp_path):
    checkpoint.save(tmp_path, random_model(vocab_size=257, dropout=0.3), Tokenizer.train([], 257))
    model, *_ = checkpoint.load(tmp_path)
    ids = random_ids(2, 8)
    assert model.training and model.config.dropout == 0.3 and not torch.equal(model(ids), model(ids))
    model.set_dropout(0.0)
    assert torch.equal(model(ids), model(ids))


@torch.no_grad()
def test_trap06_logits_are_fp32_even_under_autocast():
    """Shifted by -100, as GPT-2's are: in bf16 they could only step by 0.5."""
    model, ids = random_model(), random_ids(2, 8)
    model.ln_f.bias.copy_(-100 * model.wte.weight.mean(0) / model.wte.weight.mean(0).norm() ** 2)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(ids)
        logits = model(ids)
    assert logits.dtype == torch.float32 and logits.mean() < -50
    torch.testing.assert_close(logits.double(), hidden.double() @ model.wte.weight.double().T, rtol=1e-5, atol=1e-4)
    assert model.double()(ids).dtype == torch.float64


# ---- how the blocks run: recompute, compile ----


def gradients(model, ids):
    model.zero_grad()
    model(ids).log_softmax(-1)[..., 3].sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recompute_changes_no_number_and_runs_each_block_twice(dropout):
    model, ids = random_model(dropout=dropout).double(), random_ids(2, 9)
    torch.manual_seed(0)
    expected = gradients(model, ids)
    calls = []
    model.h[1].attn.register_forward_hook(lambda *args: calls.append(1))
    model.prepare(recompute=True)
    torch.manual_seed(0)  # the second run of a block must drop what the first dropped
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)
    assert len(calls) == 2
    with torch.no_grad():
        model(ids)
    assert len(calls) == 3  # nothing is run twice where there is no backward pass
    model.prepare(recompute=False)
    gradients(model, ids)
    assert len(calls) == 4


@pytest.mark.parametrize("recompute", [False, True])
def test_trap19_compiled_blocks_change_no_number_and_no_name(recompute, monkeypatch, tmp_path):
    compiled = []

    def backend(graph, inputs):  # in the place of the compiler, which takes a minute: runs what it was given
        compiled.append(graph)
        return graph.forward

    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend=backend))
    plain, model, tokenizer = random_model(vocab_size=257), random_model(vocab_size=257), Tokenizer.train([], 257)
    torch._dynamo.reset()
    model.prepare(compile=True, recompute=recompute)
    for T in (5, 9, 13):
        ids = random_ids(2, T)
        expected, got = gradients(plain, ids), gradients(model, ids)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    assert 0 < len(compiled) <= 2  # one for all three layers, and one more for any length
    before = len(compiled)
    samples = [generate(m, [[1, 2, 3]], 4, eot=0, temperature=0) for m in (model, plain)]
    assert samples[0] == samples[1]
    assert len(compiled) == before  # sampling does not use the compiled blocks
    assert list(model.state_dict()) == list(plain.state_dict())
    checkpoint.save(tmp_path, model, tokenizer)
    loaded, *_ = checkpoint.load(tmp_path)
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(plain)


# ---- Hugging Face's layout ----


def write_folder(folder, tensors, **values):
    """A GPT-2 folder of `tensors`; `values` are put into its config.json."""
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    shape = dict(vocab_size=211, n_positions=24, n_layer=3, n_head=4, n_embd=32)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape, **values}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hugging(tmp_path_factory):
    """A random GPT-2 of transformers and the folder it was saved to; every weight random."""
    need(transformers, "needs transformers and safetensors: pip install minidpo[hf,bench]")
    generator = torch.Generator().manual_seed(0)
    shape = dict(vocab_size=211, n_positions=24, n_layer=3, n_head=4, n_embd=32)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **shape)).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("ln_" in name), std=0.2, generator=generator)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def tensors(hugging):
    """The weights of that folder, by name."""
    return safetensors.torch.load_file(hugging[1] / "model.safetensors")


@torch.no_grad()
def same_logits(ours, theirs, vocab_size=211):
    ids = random_ids(3, 24, vocab_size=vocab_size)
    logits = theirs(ids).logits
    torch.testing.assert_close(ours.eval()(ids), logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.5  # far from uniform: 1e-5 says something


def test_trap13_logits_are_hugging_faces(hugging):
    model, folder = hugging
    ours = load_pretrained(folder)
    same_logits(ours, model)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters())
    assert torch.equal(ours.wte.weight, model.transformer.wte.weight)
    assert ours.config == GPTConfig(**SHAPE) and ours.config.dropout == 0  # where config.json says 0.1


def test_trap13_the_hubs_style_of_file(hugging, tensors, tmp_path):
    """Keys without `transformer.`, the causal mask as a buffer of each layer, the head beside its tied twin."""
    model, folder = hugging
    hub = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(3):
        hub[f"h.{layer}.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
        hub[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    hub["lm_head.weight"] = hub["wte.weight"].clone()
    write_folder(tmp_path, hub, **json.loads((folder / "config.json").read_text(encoding="utf-8")))
    same_logits(load_pretrained(tmp_path), model)
    half = {name: tensor.half() for name, tensor in hub.items()}  # a file in half precision is read into fp32
    loaded = load_pretrained(write_folder(tmp_path, half))
    assert torch.equal(loaded.wpe.weight, hub["wpe.weight"].half().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_head_stored_alone_is_the_embedding(hugging, tensors, tmp_path, dtype):
    alone = {name.replace("transformer.wte", "lm_head"): tensor.to(dtype) for name, tensor in tensors.items()}
    assert "lm_head.weight" in alone and len(alone) == len(tensors)
    model = load_pretrained(write_folder(tmp_path, alone))
    assert torch.equal(model.wte.weight, tensors["transformer.wte.weight"].to(dtype).float())
    if dtype == torch.float32:
        same_logits(model, hugging[0])
    twice = load_pretrained(write_folder(tmp_path, alone | {"transformer.wte.weight": alone["lm_head.weight"].clone()}))
    assert checkpoint.fingerprint(twice) == checkpoint.fingerprint(model)


@pytest.mark.parametrize(
    "name, values",
    [
        ("lm_head.weight", lambda t: t["transformer.wte.weight"] + 1e-3 * torch.eye(211, 32)),  # untied in training
        ("lm_head.weight", lambda t: t["transformer.wte.weight"][:210].clone()),
        ("lm_head.bias", lambda t: torch.zeros(211)),
        ("h.1.attn.bias", lambda t: torch.ones(1, 1, 24, 24).tril() + torch.eye(24, 24).roll(1, 1)),  # sees the next
        ("h.1.attn.bias", lambda t: torch.ones(24)),
        ("transformer.h.1.attn.masked_bias", lambda t: torch.tensor(0.0)),
        ("wte.weight", lambda t: t["transformer.wte.weight"].clone()),  # there twice
    ],
)
def test_a_tensor_that_the_model_would_not_use_is_refused_by_name(tensors, tmp_path, name, values):
    with pytest.raises(UserError, match=f"model.safetensors: holds '{name}', which GPT-2 does not have"):
        load_pretrained(write_folder(tmp_path, tensors | {name: values(tensors)}))


def test_several_files_of_weights(hugging, tensors, tmp_path):
    """As transformers writes a large model. The first file also has an old mask of a later layer, and the head."""
    model, _ = hugging
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    paths = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(paths) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    same_logits(load_pretrained(tmp_path), model)
    first = safetensors.torch.load_file(paths[0])
    head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    safetensors.torch.save_file(first | head | {"h.2.attn.bias": torch.ones(1, 1, 24, 24).tril()}, paths[0])
    same_logits(load_pretrained(tmp_path), model)
    safetensors.torch.save_file(first | {"lm_head.weight": -head["lm_head.weight"]}, paths[0])
    with pytest.raises(UserError, match=f"{paths[0].name}: holds 'lm_head.weight'"):
        load_pretrained(tmp_path)
    safetensors.torch.save_file(first, paths[0])
    paths[1].rename(tmp_path / "away")
    with pytest.raises(UserError, match="safetensors: lacks .* tensors in all"):
        load_pretrained(tmp_path)
    (tmp_path / "away").rename(paths[1])
    paths[-1].write_bytes(paths[-1].read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{paths[-1].name} is damaged or not a safetensors file"):
        load_pretrained(tmp_path)


def test_pytorch_model_bin_comes_with_the_line_that_converts_it(hugging, tmp_path):
    model, folder = hugging
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="model.safetensors not found.*pytorch_model.bin: python -c") as stop:
        load_pretrained(tmp_path)
    exec(str(stop.value).rpartition('python -c "')[2].rstrip('"'), {})
    same_logits(load_pretrained(tmp_path), model)


# ---- more rows than tokens ----


@pytest.fixture
def padded(tmp_path):
    """(transformers' model, tokenizer, folder): the rows after the tokens would win every softmax over all rows."""
    need(transformers, "needs transformers and safetensors: pip install minidpo[hf,bench]")
    tokenizer = Tokenizer.train(["a film as fine as this film"] * 3, 268)
    ours = random_model(vocab_size=320)
    with torch.no_grad():
        ours.wte.weight[:268] *= 0.5
        ours.wte.weight[268:] *= 20  # large, of either sign: the best of 52 is above all others
    save_pretrained(ours, tmp_path / "made", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    theirs.save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "hf")
    return theirs, tokenizer, tmp_path / "hf"


@torch.no_grad()
def test_rows_without_a_token_have_no_logits_and_are_never_sampled(padded, tmp_path, capsys):
    theirs, tokenizer, folder = padded
    assert not (folder / "bpe.json").exists() and (folder / "tokenizer.json").exists()
    checkpoint.save(tmp_path / "run", *checkpoint.load(folder)[:2])
    assert "the tokenizer has 268 tokens, the model 320. Those from id 268 on are never used" in capsys.readouterr().out
    ids = random_ids(3, 24, vocab_size=268)
    wanted = theirs(ids).logits
    assert (wanted.argmax(-1) >= 268).float().mean() > 0.9
    for where in (folder, tmp_path / "run"):
        model, loaded, _ = checkpoint.load(where)
        assert loaded.fingerprint == tokenizer.fingerprint
        torch.testing.assert_close(model.eval()(ids), wanted[..., :268], rtol=0, atol=1e-4)
        for temperature in (0, 1.0, 5.0):
            prompts = [[tokenizer.eot]] * 20
            samples = generate(
                model, prompts, 20, tokenizer.eot, temperature, generator=torch.Generator().manual_seed(0)
            )
            assert max(map(max, samples)) < 268


def test_what_is_scored_is_what_can_be_sampled(padded):
    """The log-probabilities of all tokens sum to 1, plain and --fast; the other rows get no gradient."""
    model, tokenizer, _ = checkpoint.load(padded[2])
    model = model.double()
    total = 0
    for first in range(0, 268, 67):
        pairs = [([tokenizer.eot, 5, 9], [i], [i, 3]) for i in range(first, first + 67)]
        batch = preference_batch(pairs)
        plain, quick = response_logps(model, batch), fast.response_logps(model, batch)
        torch.testing.assert_close(quick, plain, rtol=1e-9, atol=1e-9)
        total += plain[0].exp().sum().item()
    assert total == pytest.approx(1, abs=1e-9)
    for logps in (plain, quick):
        gradient = torch.autograd.grad(sum(logps).sum(), model.wte.weight, retain_graph=True)[0]
        assert gradient.shape == (320, 32) and gradient[:268].any() and not gradient[268:].any()


def test_rows_without_a_token_are_kept_bit_for_bit(padded, tmp_path, capsys):
    _, tokenizer, folder = padded
    model, *_ = checkpoint.load(folder)
    checkpoint.save(tmp_path / "run", model, tokenizer)
    call(weights.main, "--run", tmp_path / "run", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 320
    again, its_tokenizer, _ = checkpoint.load(tmp_path / "out")
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(model) and again.config == model.config
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    Tokenizer(tokenizer.tokens[:-1]).save(tmp_path / "run" / "bpe.json")  # a run says how many tokens it has
    with pytest.raises(UserError, match="the tokenizer has 267 tokens and the model 268"):
        checkpoint.load(tmp_path / "run")


@pytest.mark.parametrize("end, fine", [(267, True), (None, True), (50256, True), (0, False), (319, False)])
def test_an_end_of_text_that_the_tokenizer_does_not_have_is_refused(padded, end, fine):
    folder = padded[2]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": end}), encoding="utf-8")
    if fine:  # 50256 is what transformers writes if nobody says anything, and here no token
        assert checkpoint.load(folder)[1].eot == 267
    else:
        with pytest.raises(UserError, match=f"config.json: eos_token_id is {end}, but <.endoftext.> has id 267"):
            checkpoint.load(folder)


@pytest.mark.parametrize(
    "field, value, fine",
    [
        ("activation_function", "gelu", "gelu_new"),
        ("activation_function", "relu", "gelu_pytorch_tanh"),
        ("n_inner", 100, 128),
        ("n_inner", 0, None),
        ("layer_norm_epsilon", 1e-6, 1e-5),
        ("scale_attn_weights", False, True),
        ("scale_attn_by_inverse_layer_idx", True, False),
        ("add_cross_attention", True, False),
        ("tie_word_embeddings", False, True),
    ],
)
def test_trap13_config_values_that_change_the_forward_pass_are_refused(tensors, tmp_path, field, value, fine):
    with pytest.raises(UserError, match=rf"config.json: {field} is {value!r}, which this model does not have"):
        load_pretrained(write_folder(tmp_path, tensors, **{field: value}))
    load_pretrained(write_folder(tmp_path, tensors, **{field: fine}))


def test_trap13_other_config_values_are_ignored_and_dropout_loads_as_0(tensors, tmp_path):
    others = dict(
        attn_pdrop=0.1, embd_pdrop=0.2, resid_pdrop=0.3, n_ctx=1024, initializer_range=9.0, summary_type="cls_index",
        reorder_and_upcast_attn=True, use_cache=False, torch_dtype="float16", task_specific_params={"a": 1}, new="x",
    )  # fmt: skip
    model = load_pretrained(write_folder(tmp_path, tensors, **others))
    assert model.config == GPTConfig(**SHAPE)
    ids = random_ids(2, 8)
    assert torch.equal(model.train()(ids), model(ids))


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: without(t, "transformer.h.1.mlp.c_fc.bias"), r"lacks h.1.mlp.c_fc.bias \(1 tensors"),
        (lambda t: without(t, "transformer.wte.weight"), "lacks wte.weight"),
        (lambda t: t | {"transformer.h.3.ln_1.bias": torch.ones(32)}, "holds 'transformer.h.3.ln_1.bias', which"),
        (lambda t: t | {"score.weight": torch.ones(2, 32)}, "holds 'score.weight', which GPT-2 does not have"),
        (
            lambda t: t | {"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)},
            r"h.0.attn.c_attn.weight is \(96, 32\), config.json asks for \(32, 96\)",  # as the file has it,
        ),
        (lambda t: t | {"transformer.wte.weight": torch.ones(212, 32)}, r"wte.weight is \(212, 32\)"),
        (lambda t: t | {"transformer.ln_f.weight": torch.ones(1, 32)}, r"ln_f.weight is \(1, 32\)"),
    ],
)
def test_tensors_missing_left_over_or_misshaped_are_named(tensors, tmp_path, change, message):
    with pytest.raises(UserError, match="model.safetensors: .*" + message):
        load_pretrained(write_folder(tmp_path, change(tensors)))


def test_damaged_folders_are_named(tensors, tmp_path):
    path = write_folder(tmp_path, tensors) / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-100], content[:100], b"", b"no safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="model.safetensors is damaged or not a safetensors file"):
            load_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="model.safetensors not found"):
        load_pretrained(tmp_path)
    no_heads = b'{"vocab_size": 9, "n_positions": 9, "n_layer": 1, "n_head": 0, "n_embd": 8}'
    for damaged in (b"{", b"[]", b"{}", b'{"vocab_size": "many"}', b"\xff\xfe", no_heads):
        (tmp_path / "config.json").write_bytes(damaged)
        with pytest.raises(UserError, match="config.json: not a GPT-2 config"):
            load_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json not found"):
        load_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt3 is neither a folder nor one of gpt2, gpt2-medium"):
        load_pretrained("gpt3")


def test_saved_folders_open_in_transformers_and_here(tmp_path):
    need(transformers, "needs transformers and safetensors: pip install minidpo[hf,bench]")
    tokenizer = Tokenizer.train(["a film as fine as this film", "Größe 映画 😀"] * 3, 280)
    model = random_model(vocab_size=tokenizer.vocab_size)
    save_pretrained(model, tmp_path / "saved", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    same_logits(model, theirs, vocab_size=tokenizer.vocab_size)
    assert theirs.config.attn_pdrop == theirs.config.embd_pdrop == theirs.config.resid_pdrop == 0
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.eot
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("a film as fine", " as this\n\n  film 12 Größe", "映画 😀 never seen"):
        assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    assert their_tokenizer.eos_token_id == tokenizer.eot

    again, its_tokenizer, state = checkpoint.load(tmp_path / "saved")
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(model)
    assert its_tokenizer.fingerprint == tokenizer.fingerprint and state == {}


def test_trap19_a_compiled_or_wrapped_model_is_saved_under_plain_names(tmp_path):
    plain, tokenizer = random_model(vocab_size=257), Tokenizer.train([], 257)

    class Wrapped(torch.nn.Module):  # as DistributedDataParallel wraps, without its processes
        def __init__(self, module):
            super().__init__()
            self.module = module

    compiled = torch.compile(plain, backend="eager")
    for i, model in enumerate((plain, compiled, Wrapped(plain), Wrapped(compiled), torch.compile(Wrapped(plain)))):
        checkpoint.save(tmp_path / str(i), model, tokenizer)
        saved = torch.load(tmp_path / str(i) / "checkpoint.pt", weights_only=True)
        assert list(saved["model"]) == [name for name, _ in plain.named_parameters()]
        loaded, *_ = checkpoint.load(tmp_path / str(i))
        assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(plain)


def test_trap19_a_wrappers_name_is_not_saved(tmp_path):
    """As torch.compile and DistributedDataParallel name what they wrap; the real ones take seconds to import."""

    class Wrapped(torch.nn.Module):
        def __init__(self, name, inner):
            super().__init__()
            self.add_module(name, inner)
            self.config = inner.config

    plain, tokenizer = random_model(vocab_size=257), Tokenizer.train([], 257)
    checkpoint.save(tmp_path, Wrapped("_orig_mod", Wrapped("module", plain)), tokenizer)
    loaded, *_ = checkpoint.load(tmp_path)
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(plain)


def test_where_the_tokenizer_of_a_gpt2_folder_comes_from(tmp_path, monkeypatch):
    """Its bpe.json if it has one, else vocab.json and merges.txt, else GPT-2's if the vocabulary is as large."""
    need(transformers, "needs safetensors: pip install minidpo[hf]")
    tokenizer = Tokenizer.train(["a film as fine as this film"] * 3, 265)
    save_pretrained(random_model(vocab_size=265), tmp_path / "own", tokenizer)
    (tmp_path / "own" / "bpe.json").unlink()
    _, loaded, _ = checkpoint.load(tmp_path / "own")
    assert loaded.fingerprint == tokenizer.fingerprint
    (tmp_path / "own" / "vocab.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.json and no vocab.json, and 265 tokens are not GPT-2"):
        checkpoint.load(tmp_path / "own")

    monkeypatch.setattr(Tokenizer, "gpt2", lambda: Tokenizer([bytes([i % 256]) * (1 + i // 256) for i in range(50256)]))
    save_pretrained(random_model(vocab_size=50257, n_layer=1, n_embd=8), tmp_path / "gpt2s")
    _, loaded, _ = checkpoint.load(tmp_path / "gpt2s")
    assert loaded.vocab_size == 50257
    save_pretrained(random_model(vocab_size=50304, n_layer=1, n_embd=8), tmp_path / "gpt2s")  # a multiple of 64
    model, loaded, _ = checkpoint.load(tmp_path / "gpt2s")
    assert (loaded.vocab_size, model.config.vocab_size, model.config.extra_rows) == (50257, 50257, 47)
    for name in ("tokenizer_config.json", "added_tokens.json", "spiece.model", "vocab.txt", "merges.txt"):
        (tmp_path / "gpt2s" / name).touch()
        with pytest.raises(UserError, match=f"no vocab.json, and 50304 tokens are not GPT-2's beside {name}"):
            checkpoint.load(tmp_path / "gpt2s")
        (tmp_path / "gpt2s" / name).unlink()
    save_pretrained(random_model(vocab_size=50305, n_layer=1, n_embd=8), tmp_path / "gpt2s")
    with pytest.raises(UserError, match="50305 tokens are not GPT-2"):
        checkpoint.load(tmp_path / "gpt2s")


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "openai-community/gpt2-medium", "distilbert/distilgpt2"])
def test_the_names_of_gpt2_on_the_hub(tmp_path, monkeypatch, name):
    """The tokenizer is the one of the folder that was downloaded."""
    need(transformers, "needs huggingface_hub: pip install minidpo[hf]")
    import huggingface_hub

    tokenizer = Tokenizer.train(["a film as fine as this film"] * 3, 265)
    save_pretrained(random_model(vocab_size=265), tmp_path / "hub", tokenizer)
    (tmp_path / "hub" / "bpe.json").unlink()
    download = {name: str(tmp_path / "hub")}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: download[name])
    monkeypatch.chdir(tmp_path)
    assert checkpoint.load(name)[1].fingerprint == tokenizer.fingerprint


def test_a_hub_name_is_downloaded_without_the_files_we_do_not_read(tmp_path, monkeypatch):
    """The hub's folder also holds the weights for two other frameworks, 500 MB each."""
    need(transformers, "needs huggingface_hub: pip install minidpo[hf]")
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, set(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = random_model()
    save_pretrained(model, tmp_path)
    assert checkpoint.fingerprint(load_pretrained("gpt2-medium")) == checkpoint.fingerprint(model)
    assert asked == [("gpt2-medium", {"config.json", "model.safetensors", "vocab.json", "merges.txt"})]


# ---- fetching, and memory on the way ----


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    need(transformers, "needs huggingface_hub: pip install minidpo[hf]")
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    for error in (LocalEntryNotFoundError("Name or service not known"), HTTPError("500 Server Error")):

        def download(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(UserError) as stop:
            load_pretrained("gpt2-xl")
        message = str(stop.value)
        assert "gpt2-xl could not be downloaded" in message and str(error) in message
        assert "hf download gpt2-xl config.json model.safetensors vocab.json merges.txt --local-dir FOLDER" in message


def test_without_the_extra_the_message_names_it(monkeypatch, tmp_path):
    write = lambda folder: save_pretrained(random_model(), folder)  # noqa: E731
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"n_positions": 9, "vocab_size": 9, "n_layer": 1, "n_head": 1, "n_embd": 8}')
    cases = (("huggingface_hub", load_pretrained, "gpt2"), ("safetensors", load_pretrained, tmp_path))
    for package, function, name in (*cases, ("safetensors", write, tmp_path / "new")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=rf'{name}.* needs the extra hf: pip install -e "\.\[hf\]"'):
                function(name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_any_precision_is_written_as_it_is(dtype, tmp_path):
    need(transformers, "needs safetensors: pip install minidpo[hf]")
    model = random_model().to(dtype)
    before = checkpoint.fingerprint(model)
    save_pretrained(model, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == dtype for tensor in stored.values())
    assert torch.equal(stored["transformer.h.1.mlp.c_fc.weight"], model.h[1].mlp.c_fc.weight.T)
    assert torch.equal(stored["transformer.wte.weight"], model.wte.weight)
    assert checkpoint.fingerprint(model) == before and all(w.is_contiguous() for w in model.parameters())


def test_a_disk_that_is_full_leaves_the_earlier_export_as_it_was(tmp_path):
    need(transformers, "needs safetensors: pip install minidpo[hf]")
    resource = pytest.importorskip("resource")
    save_pretrained(random_model(), tmp_path)
    before, model = contents(tmp_path), random_model(seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the largest file that may be written, in bytes
    try:
        with pytest.raises(OSError, match="model.safetensors: .*File too large"):
            save_pretrained(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before and all(w.is_contiguous() for w in model.parameters())


MEMORY = """
import sys, torch
from tests.peak import Peak
from minidpo.model import GPT, GPTConfig
from minidpo.scale.weights import load_pretrained, save_pretrained

folder = sys.argv[1]
shape = dict(vocab_size=8000, block_size=64, n_layer=14, n_head=8, n_embd=512)
save_pretrained(GPT(GPTConfig(**{**shape, "vocab_size": 300})), folder)
load_pretrained(folder)  # libraries load what they need
model = GPT(GPTConfig(**shape))
with Peak("cpu") as peak:
    save_pretrained(model, folder)
print(4 * sum(weight.numel() for weight in model.parameters()))
print(4 * max(weight.numel() for weight in model.parameters()))
print(peak.bytes)
del model
with Peak("cpu") as peak:
    load_pretrained(folder)
print(peak.bytes)
"""


def test_loading_and_saving_hold_at_most_two_tensors_beside_the_model(tmp_path):
    """Peaks of resident memory, in a process of their own: at most 1.2 times the model, and 0.2 times beside it."""
    need(transformers, "needs safetensors: pip install minidpo[hf]")
    need(Path("/proc/self/clear_refs").exists(), "needs Linux, whose /proc tells a process's peak")
    root = Path(__file__).parent.parent
    # malloc gives back what is freed, so that what is counted is what is held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root)}
    child = [sys.executable, "-c", MEMORY, str(tmp_path)]
    output = subprocess.run(child, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
    size, largest, saving, loading = map(int, output.split())
    assert size > 150e6 and 2 * largest < 0.2 * size
    assert 0.95 * size < loading < 1.2 * size
    assert saving < 0.2 * size


# ---- the command ----


@torch.no_grad()
def test_the_export_of_a_run_gives_the_same_logits_and_ids_in_transformers(tmp_path, capsys):
    need(transformers, "needs transformers and safetensors: pip install minidpo[hf,bench]")
    run, out = tmp_path / "run", tmp_path / "out"
    tokenizer = Tokenizer.train(["a film as fine as this film"] * 3, 270)
    model = random_model(vocab_size=tokenizer.vocab_size)
    checkpoint.save(run, model, tokenizer)
    call(weights.main, "--run", run, "--out", out)
    assert f"from_pretrained('{out}')" in capsys.readouterr().out
    same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(out).eval(), tokenizer.vocab_size)
    text = "a film as fine as ours"
    assert transformers.AutoTokenizer.from_pretrained(out)(text)["input_ids"] == tokenizer.encode(text)

    before = contents(tmp_path)
    assert "is there already. Add --overwrite" in fails(capsys, weights.main, "--run", run, "--out", out)
    for flags in ((), ("--overwrite",)):  # an export beside a checkpoint would replace its bpe.json
        assert f"--out {run} is a run" in fails(capsys, weights.main, "--run", run, "--out", run, *flags)
    assert "there is no run there yet" in fails(capsys, weights.main, "--run", tmp_path / "no", "--out", tmp_path / "n")
    assert contents(tmp_path) == before
    checkpoint.save(run, random_model(seed=1, vocab_size=tokenizer.vocab_size), tokenizer)
    call(weights.main, "--run", run, "--out", out, "--overwrite")
    assert checkpoint.fingerprint(load_pretrained(out)) == checkpoint.fingerprint(checkpoint.load(run)[0])
