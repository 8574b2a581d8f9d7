"""The sweep end to end with a tiny model: its points against samples drawn and judged otherwise, and what stops it."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import children
import pytest
import torch
from conftest import need
from tiny import SHAPE, call, fails

import minidpo.run
import train_dpo
from data.toy_sentiment import generate as toy
from experiments import common
from experiments.frontier import __main__ as frontier
from experiments.frontier import figure, limit, sweeps, unit
from experiments.frontier.baselines import reward_model
from experiments.frontier.baselines.unlikelihood import unlikelihood_loss
from experiments.rewards import SentimentClassifier
from minidpo import checkpoint
from minidpo.model import GPT, GPTConfig
from minidpo.sampling import generate
from minidpo.settings import UserError, parse_settings
from minidpo.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
HEADER = "method,setting,seed,step,kl,kl_se,reward,reward_se,grammatical,second_reward,seconds"
LONGEST = 10  # tokens of a response
PROMPTS = 40
# one setting of each method, with steps large enough to get somewhere within 8 of them
SMALL = dataclasses.replace(
    sweeps.SWEEPS["toy"],
    settings={
        "preferred-ft": [""],
        "unlikelihood": [1.0],
        "best-of-n": [2, 4],
        "ppo": [0.5],
        "ppo-gt": [0.5],
        "dpo": [0.1, 2.0, "2.0-adamw"],
    },
    training={
        "dpo": lambda beta: dict(optimizer="adamw", lr=0.01, warmup_steps=1),
        "unlikelihood": lambda alpha: dict(optimizer="adamw", lr=0.003, warmup_steps=1),
        "ppo": lambda target: dict(rollouts=16),
        "ppo-gt": lambda target: dict(rollouts=16),
    },
    pairs=256,
    max_new_tokens=LONGEST,
)


class InProcess:
    """Stands in for subprocess.Popen: runs a unit's command here, where `SMALL` is known."""

    def __init__(self, command, **streams):
        assert command[:3] == [sys.executable, "-m", "experiments.frontier.unit"]
        call(unit.main, *command[3:])
        self.returncode = 0

    def poll(self):
        return self.returncode


class Forked:
    """The same in a process of its own that need not import PyTorch."""

    def __init__(self, command, stdout, stderr):
        self.child = children.start(run_unit, *command[3:], log=stdout.name)

    def poll(self):
        self.returncode = self.child.join()
        return self.returncode


def run_unit(*words):
    call(unit.main, *words)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(sweeps.SWEEPS, "toy", SMALL)
    monkeypatch.setattr(frontier.subprocess, "Popen", InProcess)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an untrained model as SFT model, and a reward that such a model gets some of."""
    folder = tmp_path_factory.mktemp("frontier")
    texts = [row["prompt"] + row["completion"] for row in toy.rows("sft_train", 300)]
    tokenizer = Tokenizer.train(texts, SHAPE["vocab_size"])
    config = GPTConfig(**{**SHAPE, "block_size": 96, "vocab_size": tokenizer.vocab_size})
    checkpoint.save(folder / "sft", GPT(config, torch.Generator().manual_seed(0)), tokenizer)
    # single letters are what it mostly writes
    SentimentClassifier({"a": 1.0, "i": 0.7, "s": -1.0, "t": -0.6, "e": 0.4}, 0.1).save(folder / "reward.pt")
    return folder


def flags(folder, out, *more):
    words = ["--data", "toy", "--sft", folder / "sft", "--reward", folder / "reward.pt", "--out", out]
    words += ["--seeds", 1, "--prompts", PROMPTS, "--samples", 4, "--points", 2, "--ppo-steps", 2, "--device", "cpu"]
    return [*map(str, words), "--max-new-tokens", str(LONGEST), *map(str, more)]


@pytest.fixture(scope="module")
def swept(made):
    """--out of a whole sweep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweeps.SWEEPS, "toy", SMALL)
        patch.setattr(frontier.subprocess, "Popen", InProcess)
        call(frontier.main, *flags(made, made / "out"))
    return made / "out"


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def but_seconds(path):
    return [{**row, "seconds": None} for row in rows_of(path)]


# ---- the points ----


def test_every_method_setting_and_step_has_its_row(swept):
    path = swept / "frontier.csv"
    assert path.read_text(encoding="utf-8").splitlines()[0] == HEADER
    rows = rows_of(path)
    steps = {}
    for row in rows:
        steps.setdefault((row["method"], row["setting"], row["seed"]), []).append(int(row["step"]))
    assert steps == {
        ("sft", "", "0"): [0],
        ("preferred-ft", "", "0"): [2, 4],  # 256 pairs in batches of 64
        ("unlikelihood", "1", "0"): [2, 4],
        ("best-of-n", "2", "0"): [0],
        ("best-of-n", "4", "0"): [0],
        ("ppo", "0.5", "0"): [1, 2],
        ("ppo-gt", "0.5", "0"): [1, 2],
        ("dpo", "0.1", "0"): [2, 4],
        ("dpo", "2", "0"): [2, 4],
        ("dpo", "2.0-adamw", "0"): [2, 4],
    }
    assert all(0 <= float(row["grammatical"]) <= 1 for row in rows)
    for one, other in zip(rows, rows[1:], strict=False):
        if int(other["step"]) > int(one["step"]) > 0:
            assert 0 < float(one["seconds"]) < float(other["seconds"])


@torch.no_grad()
def walk(policy, reference, prompt, n, generator):
    """n responses drawn token by token without a cache -> their ids, and log pi - log pi_ref of each (n,)."""
    rows, ratios = torch.tensor([prompt] * n), torch.zeros(n, dtype=torch.float64)
    live = torch.ones(n, dtype=torch.bool)
    eot = prompt[0]
    for _ in range(LONGEST):
        p, q = (model(rows)[:, -1].double().softmax(-1) for model in (policy, reference))
        new = torch.multinomial(p, 1, generator=generator)
        ratios += ((p / q).log().gather(1, new)[:, 0]) * live
        live &= new[:, 0] != eot
        rows = torch.cat([rows, new], dim=1)
    responses = []
    for ids in rows[:, len(prompt) :].tolist():
        responses.append(ids[: ids.index(eot) + 1] if eot in ids else ids)
    return responses, ratios


def own_samples(policy, made, n, seed):
    """Prompts, responses (ids), log-ratios and true rewards: n of each prompt that the sweep judges on."""
    reference, tokenizer, _ = checkpoint.load(made / "sft")
    reward = SentimentClassifier.load(made / "reward.pt")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in toy.rows("prompts_test", PROMPTS):
        prompt = [tokenizer.eot, *tokenizer.encode(row["prompt"])]
        responses, ratios = walk(policy, reference, prompt, n, generator)
        for ids, ratio in zip(responses, ratios.tolist(), strict=True):
            found.append((prompt, ids, ratio, reward.log_odds(row["prompt"] + tokenizer.decode(ids))))
    return found


def mean_and_error(values, n):
    means = [statistics.mean(values[i : i + n]) for i in range(0, len(values), n)]
    return statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5


@pytest.mark.parametrize(("method", "setting"), [("dpo", "0.1"), ("unlikelihood", "1")])
def test_kl_and_reward_agree_with_samples_drawn_otherwise(made, swept, method, setting):
    (row,) = [
        r for r in rows_of(swept / "frontier.csv") if (r["method"], r["setting"], r["step"]) == (method, setting, "4")
    ]
    policy, *_ = checkpoint.load(swept / "policies" / f"{method}_{float(setting)}_0")
    found = own_samples(policy, made, 32, seed=77)
    for column, values in (("kl", [f[2] for f in found]), ("reward", [f[3] for f in found])):
        mean, error = mean_and_error(values, 32)
        assert abs(float(row[column]) - mean) < 3.5 * math.hypot(error, float(row[f"{column}_se"])), column
    if method == "dpo":
        assert float(row["kl"]) > 3 * float(row["kl_se"])  # so that the agreement says something


def test_best_of_n_has_its_bound_and_the_reward_of_the_best(made, swept):
    rows = {int(r["setting"]): r for r in rows_of(swept / "frontier.csv") if r["method"] == "best-of-n"}
    sft, *_ = checkpoint.load(made / "sft")
    model, _ = reward_model.load(swept / "reward_model_0")
    found = own_samples(sft, made, 32, seed=78)
    scores = model.score([f[0] for f in found], [f[1] for f in found]).tolist()
    for n, row in rows.items():
        assert float(row["kl"]) == pytest.approx(math.log(n) - (n - 1) / n, rel=1e-4) and float(row["kl_se"]) == 0
        best = []
        for i in range(0, len(found), n):
            group = range(i, i + n)
            best.append(found[max(group, key=lambda j: scores[j])][3])
        mean, error = mean_and_error(best, 32 // n)
        assert abs(float(row["reward"]) - mean) < 3.5 * math.hypot(error, float(row["reward_se"]))


def test_sft_and_first_prices_of_ppo(swept):
    rows = rows_of(swept / "frontier.csv")
    assert rows[0]["method"] == "sft" and float(rows[0]["kl"]) == float(rows[0]["kl_se"]) == 0
    settings = frontier.Settings()
    prices = [sweeps.training(sweeps.Unit("ppo-gt", t, 0), settings).kl_coef for t in (0.5, 1.0, 2.0, 4.0)]
    assert prices == pytest.approx([1.5, 1.0607, 0.75, 0.5303], rel=1e-3)


def test_the_toy_sweep_is_the_papers_and_more():
    sweep = sweeps.SWEEPS["toy"].settings
    assert {0.05, 0.1, 1.0, 5.0} <= set(sweep["dpo"]) and sweep["unlikelihood"] == [0.05, 0.1, 0.5, 1.0]
    assert sweep["ppo"] == sweep["ppo-gt"] == [0.5, 1.0, 2.0, 4.0] and sweep["best-of-n"] == [2, 4, 16, 64]
    assert sweeps.SWEEPS["imdb"].settings["ppo"] == [1.0, 3.0, 6.0, 9.0, 12.0]
    units = frontier.units(frontier.Settings())
    for one in units:
        assert one.needs is None or units.index(one.needs) < units.index(one)
    assert len(units) == len(set(units)) == 1 + 3 * (1 + 1 + 1 + 1 + 4 + 4 + 4 + 13)


@pytest.mark.parametrize("method", ["ppo", "ppo-gt"])
def test_ppo_maximises_the_learned_reward_of_the_drawn_ids_or_the_true_one_of_the_texts(swept, method, monkeypatch):
    made = swept.parent
    settings = frontier.Settings(
        sft=str(made / "sft"), reward=str(made / "reward.pt"), out=str(swept), max_new_tokens=LONGEST, device="cpu"
    )
    setup, found = unit.Setup(settings), []
    monkeypatch.setattr(unit.ppo, "train", lambda policy, reference, reward, *_: found.append(reward))
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    unit.by_ppo(setup, sweeps.Unit(method, 0.5, 0))
    eot, encode = setup.tokenizer.eot, setup.tokenizer.encode
    ids = [[eot, *encode("The film")]] * 2, [encode(" is fun."), [*encode(" is fun."), eot]]  # one is cut, one ended
    scores = found[0](common.Samples(["The film"] * 2, *ids, [" is fun."] * 2, [False, True]))
    if method == "ppo":
        assert scores == reward_model.load(swept / "reward_model_0")[0].score(*ids).tolist() and scores[0] != scores[1]
    else:
        assert scores == [SentimentClassifier.load(made / "reward.pt").log_odds("The film is fun.")] * 2


def test_the_policies_are_kept(swept):
    names = ["dpo_0.1_0", "dpo_2.0-adamw_0", "dpo_2.0_0", "ppo-gt_0.5_0", "ppo_0.5_0", "preferred-ft_0"]
    assert sorted(path.name for path in (swept / "policies").iterdir()) == [*names, "unlikelihood_1.0_0"]
    for name in names:
        model, *_ = checkpoint.load(swept / "policies" / name)
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), sft(swept).parameters(), strict=True))


def sft(swept):
    return checkpoint.load(swept.parent / "sft")[0]


def test_a_learned_reward_is_brought_to_scale(made, tmp_path):
    """A reward a hundred times too small comes out with SD 1.5, on other samples than it was fitted to."""
    settings = frontier.Settings(sft=str(made / "sft"), out=str(tmp_path), max_new_tokens=LONGEST, device="cpu")
    setup = unit.Setup(settings)
    letters = SentimentClassifier.load(made / "reward.pt")
    small = lambda samples: [score / 100 for score in letters(samples.prompts, samples.texts)]  # noqa: E731
    scaled = unit.to_scale(setup, small, seed=0)
    prompts = [row["prompt"] for row in toy.rows("prompts_train", 2000)][-1000:]
    ids = [[setup.tokenizer.eot, *setup.tokenizer.encode(prompt)] for prompt in prompts]
    samples = generate(setup.sft, ids, LONGEST, setup.tokenizer.eot, generator=torch.Generator().manual_seed(7))
    batch = common.Samples(prompts, ids, samples, [setup.tokenizer.decode(sample) for sample in samples], None)
    before, after = small(batch), scaled(batch)
    assert statistics.stdev(before) < 0.05 and statistics.stdev(after) == pytest.approx(1.5, rel=0.15)
    assert [y / x for x, y in zip(before, after, strict=True)] == pytest.approx([after[0] / before[0]] * len(before))


def test_dpo_stands_beside_the_baselines_with_their_optimiser():
    """At four of its betas the toy has DPO by AdamW as well, with the settings of the baselines."""
    dpo = [setting for setting in sweeps.SWEEPS["toy"].settings["dpo"] if "adamw" in str(setting)]
    made = sweeps.Unit("dpo", dpo[0], 1)
    assert dpo == ["0.5-adamw", "0.75-adamw", "1.0-adamw", "1.4-adamw"] and made.name == "dpo_0.5-adamw_1"
    of = lambda method, setting: sweeps.training(sweeps.Unit(method, setting, 1), frontier.Settings())  # noqa: E731
    ours, theirs, sgd = of("dpo", "0.5-adamw"), of("unlikelihood", 0.5), of("dpo", 0.5)
    assert ours.beta == sgd.beta == 0.5 and sgd.optimizer == "sgd" and ours.optimizer == "adamw"
    for name in ("optimizer", "lr", "warmup_steps", "decay", "batch_size", "epochs", "fast"):
        assert getattr(ours, name) == getattr(theirs, name)
    point = figure.Point("dpo", "0.5-adamw", 0, 1, 1.0, 0.0, 1.0, 0.0, 1.0, math.nan, 1.0)
    assert figure.kind(point) == "dpo-adamw" and figure.kind(point._replace(setting="0.5")) == "dpo"


@pytest.mark.parametrize("data", ["toy", "imdb"])
def test_flags_go_before_the_sweeps_own_settings(data):
    settings = frontier.Settings(data=data, reward="a classifier", ppo_steps=7, ppo_lr=0.5, max_new_tokens=33)
    for method in ("ppo", "ppo-gt"):
        training = sweeps.training(sweeps.Unit(method, 6.0, seed=2), settings)
        assert (training.steps, training.max_new_tokens, training.kl_target, training.seed) == (7, 33, 6.0, 2)
        assert (training.lr, training.value_lr) == (0.5, 1.0)


# ---- stopped and resumed ----


def test_a_sweep_is_not_made_twice(made, swept, small, monkeypatch):
    monkeypatch.setattr(frontier, "start", lambda *_: pytest.fail("made a unit that was there"))
    before = (swept / "frontier.csv").read_bytes()
    call(frontier.main, *flags(made, swept))
    assert (swept / "frontier.csv").read_bytes() == before


def test_one_unit_deleted_is_made_again_the_same(made, swept, small, monkeypatch, tmp_path):
    out = shutil.copytree(swept, tmp_path / "out")
    (out / "units" / "dpo_2.0_0.json").unlink()
    ran = []
    start = frontier.start
    monkeypatch.setattr(frontier, "start", lambda settings, unit: ran.append(unit) or start(settings, unit))
    call(frontier.main, *flags(made, out))
    assert ran == [("dpo", 2.0, 0)]
    assert but_seconds(out / "frontier.csv") == but_seconds(swept / "frontier.csv")


def test_ctrl_c_in_the_middle_keeps_what_is_done(made, swept, small, monkeypatch, tmp_path):
    methods = ("--methods", "sft,unlikelihood,preferred-ft")
    start = frontier.start

    def interrupted(settings, unit):
        if unit.method == "preferred-ft":
            raise KeyboardInterrupt
        return start(settings, unit)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(frontier, "start", interrupted)
        call(frontier.main, *flags(made, tmp_path, *methods))
    assert stop.value.code == 130
    assert {row["method"] for row in rows_of(tmp_path / "frontier.csv")} == {"sft", "unlikelihood"}
    call(frontier.main, *flags(made, tmp_path, *methods))
    expected = [
        r for r in but_seconds(swept / "frontier.csv") if r["method"] in ("sft", "unlikelihood", "preferred-ft")
    ]
    assert but_seconds(tmp_path / "frontier.csv") == expected


def command_of(folder, out):
    flags_of_this = flags(folder, out, "--methods", "sft,preferred-ft", "--seeds", 2, "--pairs", 256)
    return [sys.executable, "-m", "experiments.frontier", *flags_of_this, "--jobs", "2"]


def test_killed_and_resumed_in_processes_gives_the_same_csv(made, tmp_path):
    """All processes are killed at once, as by a power cut."""
    need(hasattr(signal, "SIGKILL"), "no SIGKILL on this system")
    command = command_of(made, tmp_path / "a")
    sweep = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    units = tmp_path / "a" / "units"
    until(lambda: sweep.poll() is not None or list(units.glob("*.json")))
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert 1 <= len(list(units.glob("*.json"))) < 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier, "subprocess", mock.Mock(Popen=Forked))  # there only: children use the module, too
        call(frontier.main, *command[3:])
        patch.setattr(frontier, "subprocess", mock.Mock(Popen=InProcess))
        call(frontier.main, *command_of(made, tmp_path / "b")[3:])
    assert but_seconds(tmp_path / "a" / "frontier.csv") == but_seconds(tmp_path / "b" / "frontier.csv")


def test_a_unit_waits_for_what_it_needs_and_jobs_bounds_how_many_run(made, tmp_path, monkeypatch):
    done, most = set(), []

    class Slow:
        """Ends when it is asked for the third time."""

        returncode, asked = 0, 0

        def __init__(self, unit):
            self.unit = unit

        def poll(self):
            self.asked += 1
            if self.asked < 3:
                return None
            done.add(self.unit)
            running.remove(self)
            return 0

    def start(settings, unit):
        assert unit.needs is None or unit.needs in done
        running.append(Slow(unit))
        most.append(len(running))
        return running[-1]

    running = []
    monkeypatch.setattr(frontier, "start", start)
    monkeypatch.setattr(frontier.time, "sleep", lambda seconds: None)
    settings = frontier.Settings(sft=str(made / "sft"), out=str(tmp_path), seeds=2, jobs=3, device="cpu")
    frontier.sweep(settings)
    assert done == set(frontier.units(settings)) and max(most) == 3


def test_a_unit_that_fails_ends_the_sweep_and_the_units_beside_it(made, tmp_path, capsys, monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(settings, unit):
        with open(unit_log(tmp_path, unit), "w", encoding="utf-8") as log:
            code = "print('no such tensor'); raise SystemExit(3)" if unit.seed else "import time; time.sleep(600)"
            started.append(popen([sys.executable, "-c", code], stdout=log))
        return started[-1]

    monkeypatch.setattr(frontier, "start", start)
    message = fails(capsys, frontier.main, *flags(made, tmp_path, "--methods", "sft", "--seeds", 2, "--jobs", 2))
    assert "sft_1 failed" in message and "no such tensor" in message and "sft_1.log" in message
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def unit_log(out, one):
    return unit.unit_path(out, one, "log")


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- bad input ----


def test_points_made_otherwise_are_not_mixed_in(made, swept, small, monkeypatch, capsys):
    message = fails(capsys, frontier.main, *flags(made, swept, "--samples", 3))
    assert "--samples 4 in place of 3" in message and "Delete it" in message
    monkeypatch.setitem(SMALL.training, "dpo", lambda beta: dict(optimizer="adamw", lr=0.02, warmup_steps=1))
    message = fails(capsys, frontier.main, *flags(made, swept))
    assert "dpo_0.1_0.json was made with lr 0.01 in place of 0.02" in message


def test_a_retrained_reward_or_other_pairs_under_the_same_name_are_not_mixed_in(made, swept, tmp_path, small, capsys):
    folder = shutil.copytree(made, tmp_path / "made", ignore=shutil.ignore_patterns("out"))
    argv = flags(folder, tmp_path / "out", "--methods", "sft")
    call(frontier.main, *argv)
    SentimentClassifier({"a": 2.0}, 0.1).save(folder / "reward.pt")
    message = fails(capsys, frontier.main, *argv)
    assert "content of --reward" in message and "Delete it" in message
    shutil.copy(made / "reward.pt", folder / "reward.pt")
    call(frontier.main, *argv)
    turned = lambda n: [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in toy.rows("pairs_train", n)]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweeps.SWEEPS, "toy", dataclasses.replace(SMALL, records=turned))
        assert "content of the pairs" in fails(capsys, frontier.main, *argv)


def test_pairs_come_from_the_file_that_is_named(made, swept, tmp_path, small, capsys):
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in toy.rows("pairs_train", 300)]
    file = tmp_path / "turned.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in turned), encoding="utf-8")
    argv = flags(made, tmp_path / "out", "--methods", "sft", "--pairs-file", file)
    setup = unit.Setup(parse_settings(frontier.Settings, "", argv))
    assert setup.records == turned[: SMALL.pairs]
    call(frontier.main, *argv)
    file.write_text(json.dumps(turned[0]) + "\n", encoding="utf-8")
    assert "content of the pairs" in fails(capsys, frontier.main, *argv)


def test_a_unit_that_does_not_say_what_it_was_made_from_is_refused(made, swept, tmp_path, small, capsys):
    path = tmp_path / "units" / "sft_0.json"
    path.parent.mkdir()
    found = json.loads((swept / "units" / "sft_0.json").read_text(encoding="utf-8"))
    old = {name: value for name, value in found["made_of"].items() if not name.startswith("content")}
    path.write_text(json.dumps({"made_of": old, "points": []}), encoding="utf-8")
    assert "content of the pairs None in place" in fails(
        capsys, frontier.main, *flags(made, tmp_path, "--methods", "sft")
    )


def test_another_reward_model_or_another_n_is_not_mixed_in(made, swept, small, monkeypatch, capsys):
    one = unit.Setup(frontier.Settings(sft=str(made / "sft"), reward=str(made / "reward.pt"), device="cpu"))
    asked = [sweeps.Unit("ppo", 1.0, 0), sweeps.Unit("best-of-n", "", 0)]
    before = [unit.made_of(one, each) for each in asked]
    with monkeypatch.context() as patch:
        patch.setitem(SMALL.training, "reward-model", lambda _: {"batch_size": 31})
        for each, old in zip(asked, before, strict=True):
            now = unit.made_of(one, each)
            assert {name for name in now if now[name] != old[name]} == {"reward model: batch_size"}
    monkeypatch.setitem(SMALL.settings, "best-of-n", [2, 8])
    message = fails(capsys, frontier.main, *flags(made, swept, "--methods", "best-of-n"))
    assert f"N {before[1]['N']} in place of [2, 8]" in message


def test_points_of_another_sft_model_stay_out_of_the_csv(made, swept, tmp_path, small):
    folder, out = shutil.copytree(made, tmp_path / "made", ignore=shutil.ignore_patterns("out")), tmp_path / "out"
    call(frontier.main, *flags(folder, out, "--methods", "sft"))
    model, tokenizer, _ = checkpoint.load(folder / "sft")
    checkpoint.save(folder / "sft", GPT(model.config, torch.Generator().manual_seed(1)), tokenizer)
    call(frontier.main, *flags(folder, out, "--methods", "preferred-ft"))
    assert {row["method"] for row in rows_of(out / "frontier.csv")} == {"preferred-ft"}


@pytest.mark.parametrize(
    ("method", "setting"),
    [("unlikelihood", ""), ("dpo", ""), ("ppo", "abc"), ("sft", "1.0")]
    + [("ppo", "2-adamw"), ("unlikelihood", "0.5-adamw"), ("dpo", "0"), ("ppo-gt", "0.0")],
)
def test_a_unit_has_the_setting_that_its_method_takes(made, tmp_path, small, capsys, method, setting):
    argv = ["--sft", made / "sft", "--out", tmp_path, "--method", method, "--setting", setting]
    assert f"--setting {setting!r}: {method} takes" in fails(capsys, unit.main, *argv)
    assert not (tmp_path / "units").exists()


@pytest.mark.parametrize(
    ("method", "setting", "needed"), [("dpo", "0.5", "reference-logps"), ("best-of-n", "", "reward-model")]
)
def test_a_unit_says_what_must_be_run_before_it(made, tmp_path, small, capsys, method, setting, needed):
    argv = ["--sft", made / "sft", "--out", tmp_path, "--method", method, "--setting", setting]
    assert f"run --method {needed} first" in fails(capsys, unit.main, *argv)


def test_the_second_reward_is_reported_and_trains_nothing(made, swept, tmp_path, small, capsys):
    SentimentClassifier({"a": -1.0, "e": 3.0}, 0.5).save(tmp_path / "second.pt")
    argv = flags(made, tmp_path / "out", "--methods", "sft,preferred-ft", "--second-reward", tmp_path / "second.pt")
    call(frontier.main, *argv)
    assert "second reward" in capsys.readouterr().out
    both = rows_of(tmp_path / "out" / "frontier.csv")
    alone = [row for row in rows_of(swept / "frontier.csv") if row["method"] in ("sft", "preferred-ft")]
    assert all(row["second_reward"] == "" for row in alone) and len(both) == len(alone) > 1
    for row, other in zip(both, alone, strict=True):
        assert {**row, "seconds": 0, "second_reward": 0} == {**other, "seconds": 0, "second_reward": 0}
    setup = unit.Setup(parse_settings(frontier.Settings, "", argv))
    samples = setup.sample(setup.sft, setup.prompts, 0, 4)
    by_hand = [
        0.5 - ("a" in words) + 3 * ("e" in words)
        for words in (
            re.findall(r"[^\W_]+(?:'[^\W_]+)*", (p + t).lower())
            for p, t in zip(samples.prompts, samples.texts, strict=True)
        )
    ]
    assert float(both[0]["second_reward"]) == pytest.approx(statistics.mean(by_hand), rel=1e-4)
    SentimentClassifier({"a": 1.0}, 0.5).save(tmp_path / "second.pt")
    assert "content of --second-reward" in fails(capsys, frontier.main, *argv)


def test_ppo_targets_and_where_theory_puts_dpo_are_asked_for():
    asked = frontier.Settings(data="imdb", methods="ppo,ppo-gt", ppo_targets="3,6", seeds=1)
    assert [u.setting for u in frontier.units(asked) if u.method == "ppo-gt"] == [3.0, 6.0]
    with pytest.raises(UserError, match="--ppo-targets"):
        frontier.units(frontier.Settings(data="imdb", ppo_targets="4"))
    points = [figure.Point("dpo", "1.0", 0, 5, 0.5, 0.1, 1.0, 0.1, math.nan, 2.0, 1.0)]
    curve = [limit.Point(beta, 1 / beta, 0, 2 / beta, 0, 0, 900, 900) for beta in (math.inf, 2.0, 0.5)]
    assert figure.theory(points, curve) == {}
    assert figure.theory(points, curve, bradley_terry=True) == {1.0: pytest.approx((1.0, 2.0))}


def test_a_figure_of_points_that_are_all_beyond_its_end(swept, tmp_path):
    need_matplotlib()
    shutil.copy(swept / "frontier.csv", tmp_path / "frontier.csv")
    points = [point for point in figure.read_csv(tmp_path / "frontier.csv") if point.kl > 0]
    figure.draw(points, None, tmp_path / "x.png", kl_end=min(point.kl for point in points) / 2)
    assert (tmp_path / "x.png").exists()


# ---- what is subtracted comes from one path and one precision ----


@pytest.mark.parametrize("method", ["dpo", "unlikelihood"])
@pytest.mark.parametrize("data", ["toy", "imdb"])
def test_policy_and_reference_are_equal_in_bf16_before_training(made, tmp_path, monkeypatch, data, method):
    monkeypatch.setattr(minidpo.run, "pick_dtype", lambda *_: "bfloat16")
    monkeypatch.setitem(sweeps.SWEEPS, "toy", dataclasses.replace(SMALL, training=sweeps.SWEEPS[data].training))
    settings = frontier.Settings(sft=str(made / "sft"), out=str(tmp_path), device="cpu")
    setup = unit.Setup(settings)
    unit.reference_logps(setup, sweeps.Unit("reference-logps", "", 0))
    reference = checkpoint.read(tmp_path / "reference_logps.pt", keys=("logps",))["logps"]
    knobs = sweeps.training(sweeps.Unit(method, 0.5, 0), settings)
    minidpo.run.place(setup.sft, knobs)
    assert knobs.dtype == "bfloat16" and len(reference) == len(setup.pairs) > 200
    assert torch.equal(train_dpo.all_logps(setup.sft, setup.pairs, knobs), reference)
    loss = unlikelihood_loss if method == "unlikelihood" else train_dpo.dpo_loss
    train_dpo.check_start(setup.sft, setup.pairs, reference, list(range(64)), knobs, loss)


def test_kl_of_a_model_from_itself_is_0_in_bf16(made, tmp_path):
    setup = unit.Setup(frontier.Settings(sft=str(made / "sft"), out=str(tmp_path), prompts=20, device="cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        found = setup.evaluate(setup.sft, 2, seed=0)
    assert found["kl"] == found["kl_se"] == found["cov"] == 0


def test_unknown_method(made, tmp_path, capsys):
    message = fails(capsys, frontier.main, *flags(made, tmp_path, "--methods", "dpo,pppo"))
    assert "'pppo'" in message and "ppo-gt" in message
    assert not list(tmp_path.iterdir())


def test_reward_is_missing(made, tmp_path, capsys):
    message = fails(capsys, frontier.main, "--data", "imdb", "--sft", made / "sft", "--out", tmp_path)
    assert "--reward" in message
    message = fails(capsys, frontier.main, *flags(made, tmp_path, "--reward", tmp_path / "none.pt"))
    assert "none.pt" in message


def test_no_sft_model(made, tmp_path, capsys):
    assert "train_sft.py" in fails(capsys, frontier.main, *flags(made, tmp_path, "--sft", tmp_path / "none"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method,setting,seed\n", "line 1"),
        (HEADER + "\n", "no points"),
        (HEADER + "\ndpo,0.1,0,4,1.0\n", "line 2"),
        (HEADER + "\ndpo,0.1,0,4,1.0,x,1,0.1,,,3\n", "line 2"),
        (HEADER + "\ndop,0.1,0,4,1.0,0.1,1,0.1,,,3\n", "line 2: unknown method 'dop'"),
        (None, "not found"),
    ],
)
def test_bad_csv(tmp_path, capsys, text, expected):
    path = tmp_path / "points.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert expected in fails(capsys, frontier.main, "--plot-only", "--csv", path)
    assert not path.with_suffix(".png").exists()


# ---- figure and summary ----


def write_limit(path):
    """A limit of reward sqrt(2 KL), drawn up to 3 nats."""
    points = [limit.Point(math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 1000.0, 1000.0)]
    for i in range(1, 31):
        kl = i / 10
        points.append(limit.Point(1 / math.sqrt(2 * kl), kl, 0.0, math.sqrt(2 * kl), 0.0, 0.0, 1000.0, 1000.0))
    common.write_csv(path, points, digits=6)


def test_figure_is_redrawn_from_the_csv_alone(swept, tmp_path, capsys):
    need_matplotlib()
    path = tmp_path / "toy.csv"
    path.write_bytes((swept / "frontier.csv").read_bytes())
    call(frontier.main, "--plot-only", "--csv", path)
    assert "no limit is drawn" in capsys.readouterr().out
    picture = (tmp_path / "toy.png").read_bytes()
    assert picture == (swept / "frontier.png").read_bytes() and 10_000 < len(picture) < 200_000
    write_limit(tmp_path / "toy_limit.csv")
    call(frontier.main, "--plot-only", "--csv", path)
    assert "no limit is drawn" not in capsys.readouterr().out
    assert (tmp_path / "toy.png").read_bytes() != picture


def need_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        need(False, "matplotlib is not installed")


def test_summary_against_values_by_hand(tmp_path, capsys):
    path = tmp_path / "toy.csv"
    lines = [
        "dpo,0.7,0,10,1.0,0.01,0.7,0.01,0.9,,5",  # on the way: not in the means
        "dpo,0.7,0,20,2.0,0.01,1.9,0.01,0.9,,11",  # 95 % of sqrt(4)
        "dpo,0.7,1,20,2.0,0.01,1.8,0.01,0.8,,13",  # 90 %
        "best-of-n,4,0,0,4.0,0,1.0,0.01,1,,3",  # beyond the limit as it is drawn
    ]
    path.write_text("\n".join([HEADER, *lines, ""]), encoding="utf-8")
    write_limit(tmp_path / "toy_limit.csv")
    call(frontier.main, "--plot-only", "--csv", path)
    out = capsys.readouterr().out
    (dpo,) = [line.split() for line in out.splitlines() if line.startswith("dpo")]
    assert dpo == ["dpo", "0.7", "2", "2", "1.85", "92.5%", "+-", "2.5%", "85.0%", "11"]
    (best,) = [line.split() for line in out.splitlines() if line.startswith("best-of-n")]
    assert best == ["best-of-n", "4", "1", "4", "1.00", "100.0%", "3"]
    assert "no point is above the limit" in out
    assert "beta 0.7 is at a KL of 1.0" in out  # the limit of `write_limit` has beta = 1 / sqrt(2 KL)

    # 2.1 is 0.1 above the limit, whose slope there is 1/2: 0.1 / hypot(0.03, 0.5 * 0.02) = 3.2 if independent
    lines += ["ppo,2,0,5,2.0,0.02,2.1,0.03,1,,3", "ppo,4,0,5,2.0,0.02,2.1,0.06,1,,3"]  # the second one 1.6
    path.write_text("\n".join([HEADER, *lines, ""]), encoding="utf-8")
    write_covariances(tmp_path, 0.0, 0.0)
    above = printed_above(path, capsys)
    assert len(above) == 1 and above[0].startswith("3.2 standard errors") and "setting='2'" in above[0]


def write_covariances(folder, *values):
    """toy_cov.csv with the covariances of ppo 2 and ppo 4."""
    lines = [f"ppo,{setting},0,5,{value}" for setting, value in zip((2, 4), values, strict=True)]
    (folder / "toy_cov.csv").write_text("\n".join(["method,setting,seed,step,cov", *lines, ""]), encoding="utf-8")


def printed_above(path, capsys):
    capsys.readouterr()
    call(frontier.main, "--plot-only", "--csv", path)
    return [line for line in capsys.readouterr().out.splitlines() if "standard errors above the limit" in line]


def test_alarm_takes_the_joint_error_of_reward_and_kl(tmp_path, capsys):
    """0.05 above the limit of slope 1/2. Independent errors: 0.05 / hypot(0.03, 0.5 * 0.06) = 1.2, no alarm."""
    path = tmp_path / "toy.csv"
    lines = ["ppo,2,0,5,2.0,0.06,2.05,0.03,1,,3", "ppo,4,0,5,2.0,0.06,2.05,0.03,1,,3"]
    path.write_text("\n".join([HEADER, *lines, ""]), encoding="utf-8")
    write_limit(tmp_path / "toy_limit.csv")
    write_covariances(tmp_path, 0.0016, 0.0)  # 0.05 / sqrt(0.0009 + 0.0009 - 0.0016) = 3.5
    above = printed_above(path, capsys)
    assert len(above) == 1 and above[0].startswith("3.5 standard errors") and "setting='2'" in above[0]
    (tmp_path / "toy_cov.csv").unlink()  # unknown: the smallest error that is possible
    lines = ["ppo,2,0,5,2.0,0.02,2.05,0.03,1,,3", "ppo,4,0,5,2.0,0.02,2.05,0.04,1,,3"]  # 0.05 / 0.02 and 0.05 / 0.03
    path.write_text("\n".join([HEADER, *lines, ""]), encoding="utf-8")
    above = printed_above(path, capsys)
    assert len(above) == 1 and above[0].startswith("2.5 standard errors")


def test_the_sweep_writes_the_covariance_of_each_point(swept):
    """It makes the error of a point across the limit smaller, and bounds it from both sides."""
    points, found = figure.read_csv(swept / "frontier.csv"), figure.read_covariances(swept / "frontier.csv")
    assert set(found) == {p[:4] for p in points}
    for p in points:
        assert abs(found[p[:4]]) <= p.kl_se * p.reward_se * (1 + 1e-4)
    assert any(found[p[:4]] for p in points)


def test_a_sweep_without_a_grammar_has_one_panel(tmp_path, capsys):
    need_matplotlib()
    path = tmp_path / "imdb.csv"
    path.write_text(HEADER + "\nsft,,0,0,0,0,1.0,0.1,,,0\ndpo,1,0,9,3.0,0.1,1.5,0.1,,,8\n", encoding="utf-8")
    call(frontier.main, "--plot-only", "--csv", path)
    assert "nan" not in capsys.readouterr().out
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("page", "name", "bradley_terry"), [("frontier", "toy", False), ("frontier_imdb", "imdb", True)]
)
def test_the_page_in_docs_holds_the_summary_of_its_csv(page, name, bradley_terry):
    """Made by: python -m experiments.frontier --plot-only --csv docs/frontier/NAME.csv [--bradley-terry]"""
    path, limits = ROOT / f"docs/frontier/{name}.csv", ROOT / f"docs/frontier/{name}_limit.csv"
    points, curve = figure.read_csv(path), limit.read(limits) if limits.exists() else None
    summary = figure.summary(points, curve, figure.read_covariances(path), bradley_terry)
    assert summary in (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")


def test_the_limits_in_docs_are_one_where_both_are_drawn():
    """With responses of up to 56 and of up to 96 tokens: within 0.8 % and three standard errors of both."""
    short, long = (limit.read(ROOT / f"docs/frontier/{name}.csv") for name in ("toy_limit", "toy_limit_96"))
    compared = [p for p in short if 0 < p.kl < long[-1].kl]
    assert len(compared) > 50 and long[-1].kl > 1.8
    for p in compared:
        gain = limit.reward_at(long, p.kl) - long[0].reward
        assert p.reward - short[0].reward == pytest.approx(gain, rel=8e-3)
        (other,) = [q for q in long if q.beta == p.beta]
        assert abs(p.reward - short[0].reward - gain) < 3 * math.hypot(p.gain_se, other.gain_se)
