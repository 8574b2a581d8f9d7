"""One step explained: every number against a loop in float64, the step against AdamW and RMSprop worked by hand."""

import copy
import dataclasses
import json
import math
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from tiny import SHAPE, call, contents, fails, write_jsonl

import experiments.explain as explain
import train_dpo
from minidpo import checkpoint, dataset
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.tokenizer import Tokenizer

PLAIN = {"prompt": "The film", "chosen": " is warm and lovely.", "rejected": " drags on, and on."}
ODD = {  # wide, combining, right-to-left, unseen, and what HTML and TeX read as their own
    "prompt": "评论:这部电影\n",
    "chosen": " 太好了 🎬👍🏽 $x^2$ $^$ <b>&amp;</b>",
    "rejected": " 很差\t\x1b[31m \u202eहिन्दी العربية e\u0301 \u3000\u200b",
}
UNUSABLE = {"prompt": "The film", "chosen": " same", "rejected": " same"}


def make_run(folder, tokenizer, weights, **settings):
    """A run folder with random weights (by that seed) in float64, far from uniform, and a settings.json."""
    model = GPT(GPTConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size, "block_size": 128})).double()
    generator = torch.Generator().manual_seed(weights)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    checkpoint.save(folder, model, tokenizer)
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """pairs.jsonl (PLAIN, ODD, UNUSABLE), a DPO run `dpo` with settings of its own, and its reference `sft`."""
    folder = tmp_path_factory.mktemp("explain")
    pairs = write_jsonl(folder / "pairs.jsonl", [PLAIN, ODD, UNUSABLE])
    tokenizer = Tokenizer.train([text for pair in (PLAIN, ODD) for text in pair.values()] * 2, 420)
    train = train_dpo.Settings(
        data="train.jsonl", init="sft", out="dpo", eval_data=str(pairs),
        beta=0.4, optimizer="adamw", lr=1e-3, grad_clip=0.5, dtype="bfloat16", micro_batch_size=3,
    )  # fmt: skip
    make_run(folder / "dpo", tokenizer, 1, **dataclasses.asdict(train))
    make_run(folder / "sft", tokenizer, 2, data=str(pairs), eval_data="", lr=9.0, optimizer="rmsprop", grad_clip=9.0)
    return folder


def models(home):
    return [checkpoint.load(home / name)[0] for name in ("dpo", "sft")]


def the_row(home, record=PLAIN):
    tokenizer = Tokenizer.load(home / "dpo" / "bpe.json")
    (row,), _ = dataset.encode([record], dataset.PAIR, tokenizer, 128)
    return row, tokenizer


def train_settings(**knobs):
    values = dict(data="", init="", out="", beta=0.4, optimizer="adamw", lr=1e-3, grad_clip=0.5)
    return train_dpo.Settings(**{**values, "device": "cpu", "dtype": "float32", **knobs})


def loop(model, ids):
    """log pi of ids[1], ids[2], ... one forward pass each, with gradient."""
    return [model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]] for t in range(1, len(ids))]


def sums(model, row):
    prompt, *responses = row
    return [sum(loop(model, prompt + response)[len(prompt) - 1 :]) for response in responses]


def stepped_by_hand(policy, reference, row, train):
    """The policy after one step: Eq. 7 written out, its gradient cut to length, and the optimiser's first step."""
    model = copy.deepcopy(policy)
    (w, l), (ref_w, ref_l) = sums(model, row), sums(reference, row)
    loss = torch.log(1 + torch.exp(-train.beta * ((w - ref_w) - (l - ref_l)).float().double()))
    loss.backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
    with torch.no_grad():
        for p in model.parameters():
            g = p.grad * min(1.0, train.grad_clip / (norm + 1e-6))  # 1e-6: PyTorch's clipping
            if train.optimizer == "adamw":  # bias correction makes of both running means the gradient itself
                p -= train.lr * g / (g.abs() + 1e-8)
            else:  # RMSprop has none: after one step the mean of squares is a hundredth of the square
                p -= train.lr * g / ((0.01 * g**2).sqrt() + 1e-8)
    return model, norm


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("record", [PLAIN, ODD])
def test_every_number_equals_a_loop_in_float64(home, optimizer, record):
    """Tolerance: float64 sums of a hundred terms of size 10. After the step it is wider: where a gradient is rounding

    and nothing else, Adam's g / |g| makes a whole step of it.
    """
    policy, reference = models(home)
    row, _ = the_row(home, record)
    train = train_settings(optimizer=optimizer)
    found = explain.anatomy(policy, reference, row, train)
    after, norm = stepped_by_hand(policy, reference, row, train)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-6) and norm > train.grad_clip
    prompt = row[0]
    for name, model, within in (
        ("log_pi", policy, 1e-10),
        ("log_ref", reference, 1e-10),
        ("log_pi_after", after, 1e-6),
    ):
        for side, response in zip(("chosen", "rejected"), row[1:], strict=True):
            expected = [p.item() for p in loop(model, prompt + response)]
            in_prompt = [t[name] for t in found["tokens"]["prompt"]]
            assert in_prompt[0] is None
            both = in_prompt[1:] + [t[name] for t in found["tokens"][side]]
            assert both == pytest.approx(expected, abs=within), (name, side)
    for part, ids in zip(("prompt", "chosen", "rejected"), row, strict=True):
        assert [t["id"] for t in found["tokens"][part]] == ids
        assert {t["scored"] for t in found["tokens"][part]} == {part != "prompt"}

    (ref_w, ref_l) = (s.item() for s in sums(reference, row))
    for when, model, within in (("before", policy, 1e-9), ("after", after, 1e-5)):
        w, l = (s.item() for s in sums(model, row))
        r_w, r_l = 0.4 * (w - ref_w), 0.4 * (l - ref_l)
        expected = {
            "chosen_logp": w, "rejected_logp": l, "chosen_reference_logp": ref_w, "rejected_reference_logp": ref_l,
            "chosen_reward": r_w, "rejected_reward": r_l, "margin": r_w - r_l,
            "loss": math.log1p(math.exp(r_l - r_w)), "weight": 1 / (1 + math.exp(r_w - r_l)),
        }  # fmt: skip
        assert found[when] == pytest.approx(expected, abs=within)


def test_the_sums_are_those_of_response_logps_and_the_step_that_of_train_step(home):
    """Bit for bit: the same functions on the same batch."""
    policy, reference = models(home)
    row, _ = the_row(home)
    train = train_settings()
    found = explain.anatomy(policy, reference, row, train)
    batch = dataset.preference_batch([row])
    with torch.no_grad():
        expected = [s.item() for s in train_dpo.response_logps(policy, batch)]
        fixed = torch.cat(train_dpo.response_logps(reference, batch))
    assert [found["before"]["chosen_logp"], found["before"]["rejected_logp"]] == expected
    for side, total in zip(("chosen", "rejected"), expected, strict=True):
        assert sum(t["log_pi"] for t in found["tokens"][side]) == pytest.approx(total, abs=1e-12)

    metrics = train_dpo.train_step(policy, make_optimizer(policy, "adamw", train.lr), [row], fixed[None], [0], train)
    names = {"loss": "loss", "rewards/chosen": "chosen_reward", "rewards/rejected": "rejected_reward"}
    names |= {"rewards/margins": "margin", "logps/chosen": "chosen_logp", "logps/rejected": "rejected_logp"}
    assert {ours: metrics[theirs] for theirs, ours in names.items()} == {k: found["before"][k] for k in names.values()}
    assert metrics["grad_norm"] == found["grad_norm"]
    with torch.no_grad():
        after = [s.item() for s in train_dpo.response_logps(policy, batch)]
    assert [found["after"]["chosen_logp"], found["after"]["rejected_logp"]] == after


def test_the_models_in_memory_stay_as_they_were(home):
    policy, reference = models(home)
    before = checkpoint.fingerprint(policy, reference)
    explain.anatomy(policy, reference, the_row(home)[0], train_settings())
    assert checkpoint.fingerprint(policy, reference) == before


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    "knobs, loss, weight",
    [
        ({}, lambda m: -math.log(sigmoid(m)), lambda m: sigmoid(-m)),
        (
            {"label_smoothing": 0.1},
            lambda m: -0.9 * math.log(sigmoid(m)) - 0.1 * math.log(sigmoid(-m)),
            lambda m: sigmoid(-m) - 0.1,
        ),
        ({"loss_type": "ipo"}, lambda m: (m / 0.4 - 1.25) ** 2, lambda m: -2 * (m / 0.4 - 1.25) / 0.4),
        ({"reference_free": True}, lambda m: -math.log(sigmoid(m)), lambda m: sigmoid(-m)),
    ],
)
def test_loss_and_weight_of_every_variant_and_the_formula_beside_them(knobs, loss, weight):
    """The weight is autograd's; here it is the derivative worked by hand. The numbers filled in give the value."""
    train = train_settings(**knobs)
    policy, reference = torch.tensor([-7.0, -9.5]).double(), torch.tensor([-8.0, -9.0]).double()
    found = explain.loss_figures(policy, reference, train.variant)
    m = 0.4 * (2.5 if train.reference_free else 1.5)
    expected = [m, loss(m), weight(m)]
    assert [found[name] for name in ("margin", "loss", "weight")] == pytest.approx(expected, abs=1e-12)

    known = {"log": math.log, "sigmoid": sigmoid}
    for name, _, filled, value in explain.formulas(found, train):
        readable = re.sub(r"log sigmoid\((.*?)\)(?=$| -)", r"* log(sigmoid(\1))", filled)
        readable = re.sub(r"^-\s*\*", "-", readable).replace(" x ", " * ").replace("^", "**")
        got = eval(readable, {"__builtins__": {}}, known)  # our own text, with figures of three decimals
        assert got == pytest.approx(value, abs=0.02), (name, filled)


def shown(home, capsys, *flags):
    """What the command prints."""
    capsys.readouterr()
    call(explain.main, "--policy", home / "dpo", "--reference", home / "sft", "--device", "cpu", *flags)
    return capsys.readouterr().out


def test_the_printed_tables_hold_these_numbers(home, capsys):
    """Without --data: row 0 of the run's own held-out pairs, with the run's beta, optimiser and clipping."""
    out = shown(home, capsys)
    policy, reference = models(home)
    row, tokenizer = the_row(home)
    found = explain.anatomy(policy, reference, row, train_settings())
    printed = [line for line in out.splitlines() if line.count(" | ") == 1 and re.search(r"[\d-] \| ", line)]
    expected = []
    for part in ("prompt", "chosen", "rejected"):
        tokens = [[t["log_pi"], t["log_ref"], t["log_pi_after"]] for t in found["tokens"][part]]
        if part != "prompt":
            tokens.append([sum(column) for column in zip(*tokens, strict=True)])
        expected += tokens
    assert len(printed) == len(expected) == sum(map(len, row)) + 2
    for line, (pi, ref, after) in zip(printed, expected, strict=True):
        cells = line.replace("|", "").split()[-6:]
        if pi is None:
            assert cells == ["-"] * 6
            continue
        numbers = [pi, ref, pi - ref, after, after - ref, after - pi]
        assert [float(c) for c in cells] == pytest.approx(numbers, abs=0.00051)
        assert all(c[0] in "+-" or float(c) == 0 for c in (cells[2], *cells[4:]))
    masks = [line[21] for line in printed]
    assert "".join(masks).replace(" ", "") == "." * len(row[0]) + "x" * (len(row[1]) + len(row[2]))
    assert f"row 0 of 3 in {home / 'pairs.jsonl'}" in re.sub(r"\n {11}", "", out)
    assert "beta 0.4" in out and "adamw, learning rate 0.001" in out and "cut to 0.5" in out
    assert re.search(rf"loss {{13}}L = -log sigmoid\(m\)\n  before .* = +{found['before']['loss']:.3f}\n", out)
    assert re.search(rf"\n  after .* = +{explain.figure(-0.4 * found['after']['weight'])}\n$", out)


def test_flags_override_the_runs_settings(home, capsys):
    out = shown(home, capsys, "--beta", 2, "--lr", 1e-5, "--data", home / "pairs.jsonl", "--row", 1)
    assert "beta 2\n" in out and "learning rate 1e-05;" in out and "row 1 of 3" in out


def test_settings_are_the_runs_own_but_for_precision_and_micro_batches(home):
    asked = explain.Settings(policy=str(home / "dpo"), reference=str(home / "sft"), device="cpu")
    train = explain.training_settings(asked)
    assert (train.beta, train.lr, train.grad_clip, train.optimizer) == (0.4, 1e-3, 0.5, "adamw")
    assert (train.dtype, train.micro_batch_size, train.data) == ("float32", 0, str(home / "pairs.jsonl"))


def test_an_sft_run_as_policy_takes_train_dpos_settings_and_shows_a_first_step(home, capsys):
    capsys.readouterr()
    call(explain.main, "--policy", home / "sft", "--reference", home / "sft", "--device", "cpu")
    out = capsys.readouterr().out
    assert "beta 0.1" in out and "rmsprop, learning rate 1e-06" in out  # the paper's, as train_dpo.py has for a file
    before = out[out.index("L = -log") :].splitlines()[1]
    assert before.endswith("= " + f"{math.log(2):9.3f}")


ESCAPE = re.compile(r"\x1b\[([\d;]*)m")


def test_no_color_and_a_pipe_have_no_escape_codes_and_a_terminal_the_base_colours_alone(home, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    flags = ("--row", 1)  # its text holds an escape character
    plain = shown(home, capsys, *flags)
    assert "\x1b" not in plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured = shown(home, capsys, *flags)
    codes = {code for codes in ESCAPE.findall(coloured) for code in codes.split(";")}
    assert codes == {"0", explain.BOLD, explain.DIM, explain.RED, explain.GREEN}
    assert ESCAPE.sub("", coloured) == plain
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as inner:
            inner.setenv(name, value)
            assert shown(home, capsys, *flags) == plain


@pytest.mark.parametrize("row", [0, 1])
def test_no_line_is_wider_than_80_columns_and_the_bars_stand_in_one(home, capsys, row):
    def columns(line):  # as a terminal counts, written out again
        wide = sum(unicodedata.east_asian_width(c) in ("W", "F") for c in line)
        marks = sum(unicodedata.category(c) in ("Mn", "Me") for c in line)
        return len(line) + wide - marks

    lines = shown(home, capsys, "--row", row).splitlines()
    assert max(map(columns, lines[5:])) <= 80  # above them stand paths
    assert {columns(line[: line.index(" |")]) for line in lines if " |" in line} == {49}
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for line in lines for c in line)


def test_the_longest_formulas_fit_as_well(home):
    """Label smoothing and ipo, at margins of three digits before the point."""
    figures = {k: -234.567 for k in ("chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward", "margin")}
    figures |= {"chosen_reference_logp": -1234.567, "rejected_reference_logp": -1234.567, "loss": 1.0, "weight": 1e-5}
    found = {"tokens": {}, "before": figures, "after": figures, "grad_norm": 1.0}
    for knobs in ({"label_smoothing": 0.25}, {"loss_type": "ipo"}):
        train = train_settings(beta=0.05, **knobs)
        asked = explain.Settings(policy="p" * 100, reference="r")
        lines = explain.terminal(found, asked, train, "source", None, colour=False)
        assert max(map(len, lines[1:])) <= 80 and lines[0] == "policy     " + "p" * 100


@pytest.mark.parametrize(
    "token, text",
    [
        (b" film", "␣film"),
        (b"\n\t", "\\n\\t"),
        (b"\x1b[31m", "\\x1b[31m"),
        ("电影".encode(), "电影"),
        ("电影".encode()[:4], "电\\xe5"),  # the first byte of a character
        ("\u202e\u200b".encode(), "\\u202e\\u200b"),
        ("\u3000\ufe0f".encode(), "\\u3000\\ufe0f"),
        ("\u0301".encode(), "◌\u0301"),
    ],
)
def test_everything_in_a_token_is_visible(token, text):
    assert explain.visible(token) == text


def test_text_is_cut_by_columns():
    assert explain.fit("电影电影", 6) == "电影… "
    assert explain.fit("ab", 4) == "ab  " and explain.fit("abcd", 4) == "abcd"


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0.000"), (-0.0004, "0.000"), (-0.0006, "-0.001"), (1.0, "1.000"), (-1234.567, "-1234.57"), (None, "-")],
)
def test_a_number_is_never_minus_zero_or_wider_than_its_column(value, text):
    assert explain.number(value) == text
    assert explain.number(1.0, signed=True) == "+1.000" and explain.number(-0.0004, signed=True) == "0.000"
    assert [explain.figure(x) for x in (-1.23e-5, 0.0, 0.6)] == ["-1.2e-05", "0.000", "0.600"]


def test_nothing_on_disk_changes(home, capsys):
    before = contents(home)
    shown(home, capsys)
    assert contents(home) == before


def test_the_page_shows_what_the_command_prints():
    """The page's block is a printed sheet: its sums are those of its tokens."""
    page = (Path(__file__).parent.parent / "docs" / "explain.md").read_text(encoding="utf-8")
    for table in page.split("\nCHOSEN y_w")[1].split("\nREJECTED y_l"):
        rows = [
            [float(cell) for cell in line.replace("|", "").split()[-6:]] for line in re.findall(r".* x  .*\|.*", table)
        ]
        total = [float(cell) for cell in re.search(r"sum of \d+ (.*)", table)[1].replace("|", "").split()]
        assert [sum(column) for column in zip(*rows, strict=True)] == pytest.approx(total, abs=0.0006 * len(rows))


def test_a_policy_against_itself_has_no_log_ratio_whatever_it_was_trained_with(home, tmp_path, capsys):
    """Both sides of each difference come from one path in one precision, also for a run of --fast in bf16."""
    tokenizer = Tokenizer.load(home / "dpo" / "bpe.json")
    train = train_settings(data=str(home / "pairs.jsonl"), fast=True, dtype="bfloat16", micro_tokens=1)
    run = make_run(tmp_path / "run", tokenizer, 1, **dataclasses.asdict(train))
    asked = explain.Settings(policy=str(run), reference=str(run), data=str(home / "pairs.jsonl"), device="cpu")
    train = explain.training_settings(asked)
    model, _, _ = checkpoint.load(run)
    found = explain.anatomy(model, model, the_row(home)[0], train)
    for part, tokens in found["tokens"].items():
        assert all(t["log_pi"] == t["log_ref"] for t in tokens)
        if part != "prompt":
            assert found["before"][f"{part}_reward"] == 0
            assert sum(t["log_pi"] for t in tokens) == pytest.approx(found["before"][f"{part}_logp"], abs=1e-12)


@pytest.mark.parametrize("strange", [{"loss_type": "hinge"}, {"alpha": 0.5}])
def test_a_loss_without_formulas_here_is_refused_by_name(home, capsys, tmp_path, strange):
    """Another value of --loss-type, or a knob of another loss's settings class."""
    tokenizer = Tokenizer.load(home / "dpo" / "bpe.json")
    saved = dataclasses.asdict(train_settings(data=str(home / "pairs.jsonl")))
    run = make_run(tmp_path / "other", tokenizer, 1, **{**saved, **strange})
    message = fails(capsys, explain.main, "--policy", run, "--reference", home / "sft")
    ((name, value),) = strange.items()
    assert f"a loss that explain does not know ({name} {value!r})" in message and "sigmoid and ipo" in message


def test_a_new_keyword_of_the_loss_is_refused_by_name(home, capsys, monkeypatch):
    variant = {"beta": 0.4, "label_smoothing": 0.0, "loss_type": "sigmoid", "reference_free": False, "gamma": 1.0}
    monkeypatch.setattr(train_dpo.Settings, "variant", variant)
    assert "does not know (gamma" in fails(
        capsys, explain.main, "--policy", home / "dpo", "--reference", home / "sft", "--device", "cpu"
    )


def test_what_a_person_can_correct(home, capsys, tmp_path):
    both = ("--policy", home / "dpo", "--reference", home / "sft")
    assert "holds 3 pairs, rows 0 to 2" in fails(capsys, explain.main, *both, "--row", 3)
    assert "at least 0" in fails(capsys, explain.main, *both, "--row", -1)
    assert "no usable pair: dropped: equal responses" in fails(capsys, explain.main, *both, "--row", 2)
    assert "not found" in fails(capsys, explain.main, *both, "--data", tmp_path / "none.jsonl")
    other = make_run(tmp_path / "other", Tokenizer.train(["other words"], 262), 3, data="toy")
    assert "different tokenizers" in fails(capsys, explain.main, "--policy", home / "dpo", "--reference", other)
    (other / "settings.json").unlink()
    assert "Give --data" in fails(capsys, explain.main, "--policy", other, "--reference", other)
    (other / "settings.json").write_text("[1", encoding="utf-8")
    assert "is damaged" in fails(capsys, explain.main, "--policy", other, "--reference", other)
