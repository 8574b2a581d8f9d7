"""Bad input: one message (what, where, what to do), an exit code that is not 0, and everything as it was before."""

import gzip
import json
import math
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import call, contents, fails, write_data, write_jsonl

import data
import experiments.evaluate
import experiments.make_pairs
import minidpo.sampling
import train_dpo
import train_sft
from minidpo import checkpoint, dataset
from minidpo.files import jsonl
from minidpo.model import GPT, GPTConfig
from minidpo.report import read_metrics
from minidpo.tokenizer import Tokenizer

SHORT = ("--batch-size", 8, "--max-steps", 2, "--samples", 1, "--sample-tokens", 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The data of `write_data`, and a run of each stage, `sft` and `dpo`."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data(Path())
        call(train_sft.main, *sft_flags(Path(), out="sft"))
        call(train_dpo.main, *dpo_flags(Path(), out="dpo"))
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """The current folder, with a copy of `made` that a test may damage."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path()


def sft_flags(home, **changes):
    shape = {} if "init" in changes else {"preset": "toy"}
    flags = {"data": home / "sft.jsonl", "out": home / "new", **shape, **changes}
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)] + [*SHORT]


def dpo_flags(home, **changes):
    flags = {"data": home / "pairs.jsonl", "init": home / "sft", "out": home / "new"} | changes
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)] + [*SHORT]


def refused(capsys, home, main, *argv):
    """The message of a command that fails; nothing below `home` may have changed."""
    before = contents(home)
    message = fails(capsys, main, *argv)
    assert contents(home) == before
    return message


STAGES = pytest.mark.parametrize(
    ("main", "flags_of", "file", "name"),
    [(train_sft.main, sft_flags, "sft.jsonl", "sft"), (train_dpo.main, dpo_flags, "pairs.jsonl", "dpo")],
    ids=["sft", "dpo"],
)


# ---- data ----

GOOD_LINE = '{"prompt": "a", "completion": " b", "chosen": " b", "rejected": " c"}'


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "a", "completion": " b"', "not JSON"),
        ("{'prompt': 'a'}", "not JSON"),
        ("prompt,chosen,rejected", "not JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a", " b", " c"]', "a list. Each line must be an object with prompt"),
        ('"text"', "a str. Each line must be an object with prompt"),
        ('{"completion": " b", "chosen": " b", "rejected": " c"}', "no field 'prompt'"),
        ('{"prompt": "a"}', "no field"),
        (
            '{"prompt": 3, "completion": " b", "chosen": " b", "rejected": " c"}',
            "'prompt' is a int; it must be a string",
        ),
        ('{"prompt": "a", "completion": null, "chosen": null, "rejected": " c"}', "is a NoneType; it must be a string"),
        ('{"prompt": "a", "completion": [" b"], "chosen": " b", "rejected": {}}', "must be a string"),
        ('{"prompt": "\\ud83d", "completion": " b", "chosen": " b", "rejected": " c"}', "half a character"),
        (b'{"prompt": "caf\xe9", "completion": " b"}', "not UTF-8"),
        (
            GOOD_LINE[:-1] + ', "chosen_ended": "false", "completion_ended": "false"}',
            "_ended' is 'false'; it must be true or false",
        ),
    ],
)
@STAGES
def test_line_that_is_no_record_is_named_by_its_number(home, capsys, main, flags_of, file, name, line, what):
    bad = home / "bad.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    bad.write_bytes(b"\n".join([GOOD_LINE.encode(), b"", line, GOOD_LINE.encode()]))
    message = refused(capsys, home, main, *flags_of(home, data=bad))
    assert f"{bad}, line 3: " in message and what in message
    overwriting = refused(capsys, home, main, *flags_of(home, data=bad, out=home / name), "--overwrite")
    assert f"{bad}, line 3: " in overwriting  # and the old run is still there
    assert f"{bad}, line 3: " in refused(capsys, home, main, *flags_of(home, eval_data=bad))


@STAGES
def test_file_with_nothing_usable(home, capsys, main, flags_of, file, name):
    empty = write_jsonl(home / "empty.jsonl", [{"prompt": "a", "completion": "", "chosen": " b", "rejected": ""}] * 3)
    before = contents(home)
    with pytest.raises(SystemExit) as stop:
        call(main, *flags_of(home, data=empty))
    text = capsys.readouterr()
    assert stop.value.code == 2 and f"{empty}: no usable record" in text.err
    assert "0 usable of 3" in text.out and "3 dropped: empty response" in text.out
    assert contents(home) == before
    for content in (b"", b"\n \n"):
        empty.write_bytes(content)
        assert f"{empty} is empty" in refused(capsys, home, main, *flags_of(home, data=empty))
    equal = write_jsonl(empty, [{"prompt": "a", "chosen": " b", "rejected": " b"}])
    assert "no usable record" in refused(capsys, home, train_dpo.main, *dpo_flags(home, data=equal))


def test_single_unusable_pairs_are_dropped_and_counted(home, capsys):
    pairs = [json.loads(line) for line in (home / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs[3]["chosen"] = ""
    pairs[5]["rejected"] = pairs[5]["chosen"]
    pairs[7]["rejected"] = pairs[7]["chosen"]
    pairs[9]["prompt"] = "a long way to go. " * 50  # cut, from the left
    mixed = write_jsonl(home / "mixed.jsonl", pairs)
    call(train_dpo.main, *dpo_flags(home, data=mixed))
    out = capsys.readouterr().out
    assert f"{mixed}: 19 usable of 22 pairs" in out and "1 dropped: empty response" in out
    assert "2 dropped: equal responses" in out and "1 prompt cut" in out


@STAGES
def test_data_that_is_not_there(home, capsys, monkeypatch, main, flags_of, file, name):
    assert f"{home / 'none.jsonl'} not found" in refused(capsys, home, main, *flags_of(home, data=home / "none.jsonl"))
    message = refused(capsys, home, main, *flags_of(home, data="imbd"))
    assert "unknown data 'imbd'. Did you mean 'imdb'" in message and "FILE.jsonl" in message
    monkeypatch.setattr(data, "HERE", home / "data")  # nothing prepared in there
    message = refused(capsys, home, main, *flags_of(home, data="imdb", init=home / "sft"))
    assert "not found. Make it first: " in message
    assert ("data.imdb.prepare" if main is train_sft.main else "experiments.make_pairs") in message


ODD = (
    "Grüße",
    "映画は素晴らしい",
    "فيلم رائع",
    "🎬👩‍🚀🏳️‍🌈",
    "a\x00b\x00",
    "\ufeff",
    "\u2028\u2029\x85\x1c",
    "<|endoftext|>",
    "\r\n\t |",
)


def test_any_text_trains(home, capsys):
    """Every language, emoji, NUL, what only looks like a line's end or eot, and a line of 1 MB."""
    long = "x" * 200_000 + " the film" * 40_000 + " " * 440_000
    texts = ["", *ODD, " ".join(ODD) * 9, long]
    rows = write_jsonl(home / "odd_sft.jsonl", [{"prompt": t, "completion": " " + t} for t in texts])
    pairs = write_jsonl(home / "odd.jsonl", [{"prompt": t, "chosen": " " + t, "rejected": t + "!"} for t in texts])
    call(train_sft.main, *sft_flags(home, data=rows, out=home / "odd sft"), "--samples", 12)
    call(train_dpo.main, *dpo_flags(home, data=pairs, init=home / "odd sft", out=home / "odd dpo"), "--samples", 12)
    out = capsys.readouterr().out
    assert "12 usable of 12 rows" in out and "12 usable of 12 pairs" in out
    for folder in (home / "odd sft", home / "odd dpo"):
        assert all(math.isfinite(m["loss"]) for m in read_metrics(folder))
        table = (folder / "samples.md").read_bytes().decode().splitlines()[4:]
        assert len(table) == 12 and all(line[:2] == "| " and line[-2:] == " |" for line in table)


def test_both_stages_take_rows_in_the_forms_that_people_have(home, capsys):
    """Chats, whole dialogues without a prompt, gzip, a pipe and a file without a suffix: the same weights each time."""
    asked, good, bad = ([{"role": r, "content": t}] for r, t in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
    prompt = "\n\nHuman: a\n\nAssistant:"
    plain = write_jsonl(home / "plain.jsonl", [{"prompt": prompt, "chosen": " b", "rejected": " c"}] * 8)
    chats = write_jsonl(home / "chats", [{"prompt": asked, "chosen": good, "rejected": bad}] * 8)
    whole = write_jsonl(home / "whole.JSONL", [{"chosen": asked + good, "rejected": asked + bad}] * 8)
    texts = write_jsonl(home / "texts.jsonl", [{"chosen": prompt + " b", "rejected": prompt + " c"}] * 8)
    os.mkfifo(home / "pipe")
    for main, flags_of in ((train_sft.main, sft_flags), (train_dpo.main, dpo_flags)):
        weights = set()
        for data_file in (plain, chats, whole, texts, home / "pipe"):
            if data_file.is_fifo():  # SFT from scratch reads it for the tokenizer, and then for the rows
                jsonl.pipe_bytes.cache_clear()
                content = gzip.compress(plain.read_bytes())
                threading.Thread(target=data_file.write_bytes, args=[content], daemon=True).start()
            call(main, *flags_of(home, data=data_file), "--overwrite")
            model, tokenizer, _ = checkpoint.load(home / "new")
            weights.add((checkpoint.fingerprint(model), tokenizer.fingerprint))
            assert f"{data_file}: 8 usable of 8" in capsys.readouterr().out
        assert len(weights) == 1


def test_a_chat_that_needs_a_guess_and_a_json_array(home, capsys):
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    chats = write_jsonl(home / "chats.jsonl", [{"prompt": system, "chosen": answer, "rejected": answer}])
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, data=chats))
    assert f"{chats}, line 1: message 1 must hold the role 'user'" in message and "take it out" in message
    array = home / "array.json"
    array.write_text('[{"prompt": "a", "chosen": " b", "rejected": " c"}]', encoding="utf-8")
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, data=array))
    assert f"{array}, line 1: a list. Each line must be an object with prompt, chosen, rejected." in message
    assert f"python -m data.convert {array}" in message


# ---- runs and checkpoints ----


def test_no_sft_run_yet(home, capsys):
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, init=home / "none"))
    assert f"{home / 'none'} not found" in message and "python train_sft.py --data toy --out runs/toy/sft" in message
    (home / "empty").mkdir()
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, init=home / "empty"))
    assert f"{home / 'empty'} holds neither checkpoint.pt nor config.json" in message and "train_sft.py" in message
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, init="gpt2-smal"))
    assert "gpt2-smal" in message and "gpt2-medium" in message


@STAGES
def test_checkpoint_cut_short(home, capsys, main, flags_of, file, name):
    whole = (home / name / "checkpoint.pt").read_bytes()
    for kept in (0, 1, 2, 3, 4, 10, 30, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 22, len(whole) - 1):
        (home / name / "checkpoint.pt").write_bytes(whole[:kept])
        for flags in (
            dpo_flags(home, init=home / name),
            sft_flags(home, init=home / name),
            [*flags_of(home, out=home / name), "--resume"],
        ):
            command = train_dpo.main if flags[2] == "--init" else train_sft.main
            command = main if "--resume" in flags else command
            message = refused(capsys, home, command, *flags)
            assert f"{home / name / 'checkpoint.pt'} is cut short or damaged" in message and "train again" in message


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_with_flipped_bytes_never_ends_in_a_traceback(home):
    """Loads, or is refused with its name; `load` may raise nothing else."""
    path = home / "sft" / "checkpoint.pt"
    whole = path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for at in torch.randint(3000, (4,), generator=draw):  # where the pickle is
            damaged[at] = torch.randint(256, (), generator=draw)
        path.write_bytes(damaged)
        try:
            checkpoint.load(home / "sft")
        except checkpoint.UserError as error:
            refusals += 1
            assert str(path) in str(error)
    assert refusals > 50


def test_checkpoint_that_executes_something_is_refused(home, capsys):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (home / "executed",))

    torch.save({"config": {}, "model": {}, "state": Attack()}, home / "sft" / "checkpoint.pt")
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home))
    assert "is cut short or damaged" in message and not (home / "executed").exists()


def test_checkpoint_of_something_else(home, capsys):
    path = home / "sft" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    torch.save(saved["model"], path)
    assert f"{path} is not a file of minidpo: it lacks one of config, model, state" in refused(
        capsys, home, train_dpo.main, *dpo_flags(home)
    )
    torch.save({**saved, "config": {**saved["config"], "n_layer": 2}}, path)
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home))
    assert f"{path} does not hold one of our models" in message and "h.1.attn" in message
    torch.save({**saved, "config": {**saved["config"], "n_experts": 2}}, path)
    assert "n_experts" in refused(capsys, home, train_dpo.main, *dpo_flags(home))


def test_resume_from_a_checkpoint_of_another_model(home, capsys):
    """Its weights do not fit the shape beside them, or its training state is another stage's."""
    path = home / "dpo" / "checkpoint.pt"
    saved, wide = torch.load(path, weights_only=True), GPTConfig(300, 40, 1, 2, 64)
    torch.save({**saved, "model": GPT(wide).state_dict()}, path)
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, out=home / "dpo"), "--resume", "--max-steps", 3)
    assert f"{path} does not hold one of our models" in message and "size mismatch" in message
    path.write_bytes((home / "sft" / "checkpoint.pt").read_bytes())
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, out=home / "dpo"), "--resume", "--max-steps", 3)
    assert "was started with other" in message and "start a new run" in message
    torch.save({**saved, "state": {}}, path)
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, out=home / "dpo"), "--resume", "--max-steps", 3)
    assert str(home / "dpo") in message


def test_tokenizer_and_model_that_disagree(home, capsys):
    Tokenizer.train(["the film is dull, the film is fun"], 262).save(home / "sft" / "bpe.json")
    for flags in (dpo_flags(home), dpo_flags(home, out=home / "dpo") + ["--overwrite"]):
        message = refused(capsys, home, train_dpo.main, *flags)
        assert f"{home / 'sft'}: the tokenizer has 262 tokens and the model 300" in message and "bpe.json" in message
    (home / "sft" / "bpe.json").write_text("{", encoding="utf-8")
    assert f"{home / 'sft' / 'bpe.json'} is not a tokenizer" in refused(capsys, home, train_dpo.main, *dpo_flags(home))
    (home / "sft" / "bpe.json").unlink()
    assert str(home / "sft" / "bpe.json") in refused(capsys, home, train_dpo.main, *dpo_flags(home))


@STAGES
def test_folder_that_already_holds_a_run(home, capsys, main, flags_of, file, name):
    message = refused(capsys, home, main, *flags_of(home, out=home / name))
    assert f"{home / name} already holds a run" in message and "--resume" in message and "--overwrite" in message
    message = refused(capsys, home, main, *flags_of(home, out=home / name), "--resume", "--overwrite")
    assert "give one of them" in message
    message = refused(capsys, home, main, *flags_of(home, out=home / file))
    assert f"--out {home / file} is a file" in message


@STAGES
def test_overwrite_replaces_the_run_and_nothing_else(home, main, flags_of, file, name):
    (home / name / "notes.txt").write_text("mine", encoding="utf-8")
    (home / name / "curves.png").write_bytes(b"old")
    before = contents(home / name)
    call(main, *flags_of(home, out=home / name), "--overwrite", "--seed", 4)
    after = contents(home / name)
    assert set(before) - set(after) == {"curves.png"} and after["notes.txt"] == b"mine"
    assert after["checkpoint.pt"] != before["checkpoint.pt"] and len(read_metrics(home / name)) == 2


def test_overwriting_the_model_one_starts_from(home, capsys):
    """--out and --init the same folder: the start would be gone with the first step."""
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, out=home / "sft"), "--overwrite")
    assert "--init" in message and "--out" in message
    message = refused(
        capsys, home, train_sft.main, *sft_flags(home, out=home / "sft", init=home / "sft"), "--overwrite"
    )
    assert "--init" in message and "--out" in message


@STAGES
def test_resume_without_a_run(home, capsys, main, flags_of, file, name):
    message = refused(capsys, home, main, *flags_of(home), "--resume")
    assert f"{home / 'new' / 'settings.json'} not found" in message and "Leave out --resume" in message
    (home / name / "checkpoint.pt").unlink()  # stopped before its first checkpoint
    message = refused(capsys, home, main, *flags_of(home, out=home / name), "--resume")
    assert f"{home / name / 'checkpoint.pt'} not found" in message and "--overwrite" in message
    (home / name / "settings.json").write_text('{"beta": 0.', encoding="utf-8")
    message = refused(capsys, home, main, *flags_of(home, out=home / name), "--resume")
    assert f"{home / name / 'settings.json'} is damaged" in message


@pytest.mark.parametrize(
    ("flag", "value", "was"),
    [("--beta", 0.2, "0.1"), ("--seed", 1, "0"), ("--batch-size", 7, "8"), ("--lr", 1, "1e-06")],
)
def test_resume_with_a_changed_setting(home, capsys, flag, value, was):
    flags = [*dpo_flags(home, out=home / "dpo"), "--resume", "--max-steps", 3, flag, value]
    message = refused(capsys, home, train_dpo.main, *flags)
    assert f"{flag} {value}" in message and was in message and str(home / "dpo" / "settings.json") in message
    assert "another --out" in message


@STAGES
def test_resume_with_changed_data(home, capsys, main, flags_of, file, name):
    lines = (home / file).read_text(encoding="utf-8").splitlines(keepends=True)
    (home / file).write_text("".join(lines[1:]), encoding="utf-8")
    message = refused(capsys, home, main, *flags_of(home, out=home / name), "--resume", "--max-steps", 3)
    assert "was started with other" in message and "Restore it" in message


# ---- settings ----


@pytest.mark.parametrize("beta", ["0", "-1", "nan", "inf", "-0.0"])
def test_beta_that_is_none(home, capsys, beta):
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home), f"--beta={beta}")
    assert "--beta" in message and "must be above 0" in message and "try 0.1" in message


@pytest.mark.parametrize(
    ("flag", "name", "nearest"),
    [
        ("--settings", "papper", "paper"),
        ("--device", "cdua", "cuda"),
        ("--dtype", "bfloat61", "bfloat16"),
        ("--optimizer", "adam", "adamw"),
        ("--loss-type", "sigmod", "sigmoid"),
        ("--preset", "gpt2-mediun", "gpt2-medium"),
    ],
)
def test_unknown_name_comes_with_the_nearest(home, capsys, flag, name, nearest):
    for main, flags in ((train_dpo.main, dpo_flags(home)), (train_sft.main, sft_flags(home))):
        if (flag == "--loss-type" and main is train_sft.main) or (flag == "--preset" and main is train_dpo.main):
            continue
        message = refused(capsys, home, main, *flags, flag, name)
        assert f"{name!r}. Did you mean" in message and repr(nearest) in message and "Valid: " in message


def test_unknown_reward_and_prompts_come_with_the_nearest(home, capsys):
    run = ("--policy", home / "sft", "--reference", home / "sft")
    message = refused(capsys, home, experiments.evaluate.main, *run, "--data", "toy", "--reward", "toyy")
    assert "unknown reward 'toyy'. Did you mean 'toy'" in message
    flags = ("--policy", home / "sft", "--out", home / "new.jsonl")
    message = refused(capsys, home, experiments.make_pairs.main, *flags, "--prompts", "toy", "--reward", "toyy")
    assert "unknown reward 'toyy'. Did you mean 'toy'" in message
    message = refused(capsys, home, experiments.make_pairs.main, *flags, "--prompts", "tooy", "--reward", "toy")
    assert "unknown data 'tooy'. Did you mean 'toy'" in message
    for flag, bad in (("--labels", "hrad"), ("--k", 1), ("--limit", -1), ("--max-new-tokens", 0)):
        argv = (*flags, "--prompts", "toy", "--reward", "toy", flag, bad)
        assert f"{flag} " in refused(capsys, home, experiments.make_pairs.main, *argv)


@pytest.mark.parametrize(
    "flags",
    [("--batch-size", 0), ("--batch-size", -4), ("--save-every", 0), ("--sample-tokens", 0), ("--max-steps", -1),
     ("--micro-batch-size", -1), ("--epochs", "inf"), ("--epochs", "nan"), ("--lr", -1), ("--grad-clip", "nan"),
     ("--eval-every", -1), ("--samples", -1), ("--warmup-steps", -1), ("--max-length", -1)],
    ids=lambda flags: "".join(map(str, flags)),
)  # fmt: skip
@STAGES
def test_numbers_out_of_range(home, capsys, main, flags_of, file, name, flags):
    message = refused(capsys, home, main, *flags_of(home), *flags)
    assert flags[0] in message and "must be a finite number" in message


@pytest.mark.parametrize(
    ("flags", "ignored"),
    [
        (("--init", "sft", "--preset", "toy"), "--preset"),
        (("--init", "sft", "--vocab-size", 300), "--vocab-size"),
        (("--init", "sft", "--tokenizer", "sft/bpe.json"), "--tokenizer"),
        (("--tokenizer", "sft/bpe.json", "--vocab-size", 300), "--vocab-size"),
    ],
)
def test_flags_that_another_flag_makes_useless(home, capsys, flags, ignored):
    message = refused(capsys, home, train_sft.main, "--data", home / "sft.jsonl", "--out", home / "new", *SHORT, *flags)
    assert f"{ignored} has no effect: {flags[0]} {flags[1]} brings its own" in message


@pytest.mark.parametrize("file", ["checkpoint.pt", "bpe.json"])
def test_a_file_in_the_place_of_its_folder(home, capsys, file):
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home, init=home / "sft" / file))
    assert f"{home / 'sft' / file} is a file. Give its folder, {home / 'sft'}" in message


SAMPLING = (minidpo.sampling.main, ("--run", "sft", "--prompt", "a"))
EVALUATE = (experiments.evaluate.main, ("--policy", "sft", "--reference", "sft", "--data", "toy", "--reward", "toy"))


@pytest.mark.parametrize(
    ("command", "flags"),
    [(SAMPLING, ("--samples", -1)), (SAMPLING, ("--max-new-tokens", -1)), (SAMPLING, ("--temperature", -0.1)),
     (SAMPLING, ("--temperature", "nan")), (SAMPLING, ("--top-k", -1)), (SAMPLING, ("--top-p", "inf")),
     (EVALUATE, ("--samples-per-prompt", 0)), (EVALUATE, ("--max-new-tokens", 0)), (EVALUATE, ("--limit", -1))],
)  # fmt: skip
def test_numbers_of_other_commands_out_of_range(home, capsys, command, flags):
    message = refused(capsys, home, command[0], *command[1], *flags)
    assert flags[0] in message and "must be a finite number" in message


@pytest.mark.parametrize("flags", [("--rows", -1), ("--max-length", 1)])
def test_numbers_of_the_look_at_a_file(home, capsys, flags):
    message = refused(capsys, home, dataset.main, home / "pairs.jsonl", *flags)
    assert "--rows must be at least 0 and --max-length at least 2" in message


def test_dropout_and_smoothing_that_dpo_does_not_have(home, capsys):
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home), "--dropout", 0.1)
    assert "--dropout must be 0 here" in message and "differ on the same row" in message
    for value in (0.5, -0.1, "nan"):
        message = refused(capsys, home, train_dpo.main, *dpo_flags(home), f"--label-smoothing={value}")
        assert "--label-smoothing" in message and "below 0.5" in message
    message = refused(capsys, home, train_dpo.main, *dpo_flags(home), "--loss-type", "ipo", "--label-smoothing", 0.1)
    assert "ipo has no label smoothing" in message
    for value in (1, -0.1, "nan"):
        assert "--dropout" in refused(capsys, home, train_sft.main, *sft_flags(home), f"--dropout={value}")


def test_a_device_that_is_not_there(home, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main, flags in ((train_dpo.main, dpo_flags(home)), (train_sft.main, sft_flags(home))):
        message = refused(capsys, home, main, *flags, "--device", "cuda")
        assert "no cuda device on this machine. Add --device auto" in message


# ---- sampling and what stands on it ----


def test_prompt_longer_than_the_context_in_sampling(home, capsys):
    text = "the film is long " * 20
    message = refused(capsys, home, minidpo.sampling.main, "--run", home / "sft", "--prompt", text)
    assert "the model's context holds 1 to 40" in message and "Shorten it" in message


def test_a_full_context_still_gives_one_token(home, capsys):
    model, tokenizer, _ = checkpoint.load(home / "sft")
    (sample,) = minidpo.sampling.generate(model, [[tokenizer.eot] + [65] * 39], 5, tokenizer.eot)
    assert len(sample) == 1


def test_runs_that_cannot_be_compared(home, capsys):
    Tokenizer.train(["the film is dull, the film is fun"], 262).save(home / "small.json")
    call(train_sft.main, *sft_flags(home, out=home / "small", tokenizer=home / "small.json"))
    argv = ("--policy", home / "sft", "--reference", home / "small", "--data", "toy", "--reward", "toy")
    message = refused(capsys, home, experiments.evaluate.main, *argv, "--json", home / "new.json")
    assert "have different tokenizers" in message and str(home / "small") in message


def test_one_prompt_has_no_standard_error(home, capsys):
    prompts = write_jsonl(home / "prompts.jsonl", [{"prompt": "The film"}])
    argv = ("--policy", home / "sft", "--reference", home / "sft", "--data", prompts, "--reward", "toy")
    message = refused(capsys, home, experiments.evaluate.main, *argv, "--json", home / "new.json")
    assert "one prompt has no standard error. Give at least two" in message


def test_make_pairs_refuses_to_overwrite(home, capsys):
    argv = ("--policy", home / "sft", "--prompts", home / "pairs.jsonl", "--reward", "toy", "--out", home / "sft.jsonl")
    message = refused(capsys, home, experiments.make_pairs.main, *argv)
    assert f"{home / 'sft.jsonl'} is there already. Add --overwrite" in message


def test_a_closed_pipe_is_no_error(home, monkeypatch, capsys):
    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("os.dup2", lambda *_: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    with pytest.raises(SystemExit):
        call(closed)
    assert capsys.readouterr().err == ""
