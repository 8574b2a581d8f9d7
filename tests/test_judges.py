"""Judges: rewards compared, implicit rewards against a loop, and a chat model behind a real HTTP server."""

import copy
import importlib.util
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import need
from tiny import SHAPE

from experiments.winrate.chat import QUESTIONS, ChatJudge, parse
from experiments.winrate.journal import Journal
from experiments.winrate.judges import implicit_rewards, load_judge
from minidpo.model import GPT, GPTConfig
from minidpo.settings import UserError
from minidpo.tokenizer import Tokenizer

KEY = "sk-test-0123456789abcdef"

# ---- rewards ----


def test_toy_judge_by_hand():
    judge = load_judge("toy")
    good, better, bad, plain = " is great.", " is great, warm and witty.", " is dull.", " is long."
    assert judge(["p"] * 5, [good, bad, good, plain, bad], [better, plain, good, bad, better]) == [
        "b", "b", "tie", "a", "b",
    ]  # fmt: skip


@pytest.fixture
def models():
    """Two models with different weights, in float64, and a tokenizer."""
    tokenizer = Tokenizer.train(["The film is warm. The film is dull. It sings and it drags on."], 300)
    made = []
    for seed in (0, 1):
        config = GPTConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size})
        model = GPT(config, generator=torch.Generator().manual_seed(seed)).double().eval()
        with torch.no_grad():
            model.wte.weight.mul_(10)  # so that its probabilities are far from uniform
        made.append(model)
    return *made, tokenizer


PROMPTS, A, B = (
    ["The film", "It", "The film"],
    [" is warm.", " sings and it drags on.", ""],
    [" is", " drags", " is dull."],
)


def log_ratio(policy, reference, tokenizer, prompt, response):
    """log pi / pi_ref of a response and its eot, token by token."""
    context, total = [tokenizer.eot, *tokenizer.encode(prompt)], 0.0
    for token in [*tokenizer.encode(response), tokenizer.eot]:
        ids = torch.tensor([context])
        for model, sign in ((policy, 1), (reference, -1)):
            p = torch.softmax(model(ids)[0, -1], dim=-1)
            total += sign * p[token].log().item()
        context.append(token)
    return total


def test_implicit_rewards_against_a_loop_over_tokens(models):
    rewards = implicit_rewards(*models, PROMPTS, A, B, batch_size=2)
    assert rewards.dtype == torch.float64 and rewards.shape == (3, 2)
    for prompt, a, b, row in zip(PROMPTS, A, B, rewards, strict=True):
        expected = [log_ratio(*models, prompt, response) for response in (a, b)]
        assert row.tolist() == pytest.approx(expected, abs=1e-9)
    assert rewards.abs().min() > 0.01
    swapped = implicit_rewards(*models, PROMPTS, B, A)
    assert torch.allclose(swapped.flip(-1), rewards)
    same = implicit_rewards(models[0], models[0], models[2], PROMPTS, A, B)
    assert same.abs().max() == 0  # a model against itself prefers nothing


def test_implicit_rewards_of_a_copy_are_0_in_bf16_too(models):
    """Policy and reference take one path in one precision: only then does the rounding of bf16 cancel."""
    policy, _, tokenizer = models
    with torch.autocast("cpu", torch.bfloat16):
        rewards = implicit_rewards(policy.float(), copy.deepcopy(policy), tokenizer, PROMPTS, A, B)
    assert rewards.abs().max() == 0


def test_implicit_rewards_keep_to_the_context(models):
    """A prompt that is too long loses its left, as in training."""
    prompt = "The film is dull. " * 40
    kept = models[2].encode(prompt)[-(SHAPE["block_size"] - 1 - len(models[2].encode(A[0]))) :]
    cut = implicit_rewards(*models, [prompt], [A[0]], [" is"])
    assert cut[0, 0].item() == pytest.approx(log_ratio(*models, models[2].decode(kept), A[0]), abs=1e-9)


# ---- names ----


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tyo", "Did you mean 'toy'"),
        ("implicit:runs/dpo", "write implicit:RUN,REFERENCE"),
        ("implicit:,", "write implicit:RUN,REFERENCE"),
        ("implicit:/nowhere/dpo,/nowhere/sft", "/nowhere/dpo not found"),
        ("chat:simpel", "Did you mean 'simple'"),
        ("chat:simple", "--endpoint"),
    ],
)
def test_names_that_are_no_judge(name, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        load_judge(name)


# ---- a chat model: what is asked and how the answer is read ----


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A is more complete.\nBetter: A", "a"),
        ("B names the point, A does not.\nBetter: B", "b"),
        ("Both name it.\n\n**Better:** b.\n", "b"),
        ('One sentence.\n"Better: A"', "a"),
        ("A", "a"),
        ("(B)", "b"),
        ("Better: A\nBetter: A", "a"),
        ("Better: A\nBetter: B", None),
        ("Better: A or B", None),
        ("Better: neither", None),
        ("Better:", None),
        ("I would choose A.", None),
        ("Betray: B", None),
        ("A:\n\nA:\n\nA:", None),  # the headings of the question, repeated
        ("Response B:\nB:\nIt is longer.", None),
        ("", None),
    ],
)
def test_answers_are_read_or_not_never_guessed(answer, verdict):
    assert parse(answer) == verdict


def test_questions_show_all_three_texts_in_their_places():
    for question in QUESTIONS.values():
        text = question.format(prompt="{PROMPT}", a="{ONE}", b="{TWO}")
        assert (
            text.index("{PROMPT}") < text.index(" A:") < text.index("{ONE}") < text.index(" B:") < text.index("{TWO}")
        )
        assert text.endswith('Line 2: "Better: A" or "Better: B".')


# ---- a chat model: a server that speaks the protocol, well or badly ----


def good(text):
    """The body of a chat completion."""
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


class Server:
    """A chat endpoint on this machine. `script` holds a (status, headers, body) for each request to come, the last for

    all that follow; the body "silence" never answers, "hang up" closes the connection, "half" sends less than it says.
    """

    def __init__(self):
        self.script, self.requests, self.over = [(200, {}, good("Better: A"))], [], threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append((self.path, self.headers, body))
                status, headers, text = server.script[0] if len(server.script) == 1 else server.script.pop(0)
                if text == "silence":
                    server.over.wait(30)
                    return
                if text == "hang up":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                data = text.encode()
                self.send_header("Content-Length", str(len(data) + 50 * (text == "half")))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                server.requests.append((self.path, self.headers, b""))
                self.send_error(405)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that a judge would have slept, one after the other; and a key in the environment, and no proxy."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    return waits


@pytest.fixture
def chat(server, tmp_path):
    """chat(**changes) -> a judge that asks the server, with its journal read again from the disk."""
    need(importlib.util.find_spec("openai"), "needs openai: pip install minidpo[judge]")

    def chat(question="simple", endpoint=server.url + "/v1", model="tiny", key_env="OPENAI_API_KEY", timeout=5.0):
        return ChatJudge(question, endpoint, model, key_env, Journal(tmp_path / "answers.jsonl"), timeout)

    return chat


def test_what_goes_over_the_wire(server, chat):
    server.script = [(200, {}, good("Shorter.\nBetter: B"))]
    assert chat("concise")(["POST: a café\n\nTL;DR:"], [" one {x} "], [" two"]) == ["b"]
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    sent = json.loads(body)
    assert set(sent) == {"model", "messages"} and sent["model"] == "tiny"  # newer models refuse a temperature
    assert sent["messages"] == [
        {"role": "user", "content": QUESTIONS["concise"].format(prompt="POST: a café\n\nTL;DR:", a="one {x}", b="two")}
    ]


def test_answers_are_kept_and_never_asked_for_again(server, chat):
    texts = ["p", "q", "r", "s"], ["a", "b", "c", "same "], ["d", "e", "f", " same"]
    server.script = [(200, {}, good(t)) for t in ("Better: A", "Better: B", "well, it depends")]
    assert chat()(*texts) == ["a", "b", None, "tie"]
    assert len(server.requests) == 3  # equal texts are a tie without a question
    server.script = [(500, {}, "must not be asked")]
    assert chat()(*texts) == ["a", "b", None, "tie"]
    assert len(server.requests) == 3
    server.script = [(200, {}, good("Better: A"))]
    assert chat("concise")(*texts) == chat(model="other")(*texts) == ["a", "a", "a", "tie"]  # other questions
    assert len(server.requests) == 9
    assert chat()(["p"], ["d"], ["a"]) == ["a"] and len(server.requests) == 10  # the other order is another question


def test_a_stopped_judge_continues_where_it_stopped(server, chat, tmp_path):
    texts = list("pqrst"), list("abcde"), list("fghij")
    server.script = [(200, {}, good("Better: A"))] * 3 + [(401, {}, "")]
    with pytest.raises(UserError, match="Error code: 401.*the key in OPENAI_API_KEY"):
        chat()(*texts)
    assert len(server.requests) == 4
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    assert whole.count(b"\n") == 3
    path.write_bytes(whole[:-20])  # as a kill in the middle of the write leaves it
    server.script = [(200, {}, good("Better: B"))]
    assert chat()(*texts) == ["a", "a", "b", "b", "b"] and len(server.requests) == 7
    assert path.read_bytes().count(b"\n") == 5 and all(map(json.loads, path.read_bytes().splitlines()))


def test_what_may_pass_is_tried_again(server, chat, waits):
    server.script = [
        (500, {}, "oh"), (503, {}, ""), (429, {}, ""), (200, {}, "hang up"), (200, {}, "half"), (408, {}, ""),
        (200, {}, good("Better: B")),
    ]  # fmt: skip
    assert chat()(["p"], ["a"], ["b"]) == ["b"]
    assert len(waits) == 6 and len(server.requests) == 7


@pytest.mark.parametrize(
    "body",
    ["<html>busy</html>", "{}", '{"choices": []}', "[1]", '{"choices": [{"message": {"content": 7}}]}'],
)
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_an_answer_that_is_no_chat_completion_is_not_kept(server, chat, kind, body):
    server.script = [(200, {"Content-Type": kind}, body), (200, {}, good("Better: A"))]
    with pytest.raises(UserError, match="not a chat completion"):
        chat()(["p"], ["a"], ["b"])
    assert chat()(["p"], ["a"], ["b"]) == ["a"]


def test_a_refusal_without_text_is_an_answer(server, chat):
    server.script = [(200, {}, good(None))]
    assert chat()(["p"], ["a"], ["b"]) == [None] and len(server.requests) == 1


def test_a_slow_server_is_tried_again(server, chat, waits):
    server.script = [(200, {}, "silence"), (200, {}, good("Better: B"))]
    assert chat(timeout=0.3)(["p"], ["a"], ["b"]) == ["b"] and len(waits) == 1


def test_retry_after_is_kept_to(server, chat, waits):
    server.script = [(429, {"Retry-After": "17"}, ""), (503, {"Retry-After": "0"}, ""), (200, {}, good("Better: A"))]
    assert chat()(["p"], ["a"], ["b"]) == ["a"] and waits[0] == 17 and len(waits) == 2
    server.script = [(429, {"Retry-After": "3600"}, "")]
    with pytest.raises(UserError, match="Error code: 429.*continues from there"):
        chat()(["q"], ["a"], ["b"])
    assert len(waits) == 2


def test_a_server_that_stays_broken_ends_the_command(server, chat, waits):
    server.script = [(502, {}, "bad gateway")]
    with pytest.raises(UserError, match=r"Error code: 502.*answers\.jsonl.*continues from there"):
        chat()(["p"], ["a"], ["b"])
    assert len(server.requests) == 7 and len(waits) == 6


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "Error code: 400 - no such thing"),
        (401, "Error code: 401.*the key in OPENAI_API_KEY"),
        (403, "Error code: 403.*the key in OPENAI_API_KEY"),
        (404, "Error code: 404.*Check --endpoint, --model"),
    ],
)
def test_what_waiting_cannot_fix_stops_at_once(server, chat, waits, status, says):
    server.script = [(status, {}, json.dumps({"error": {"message": "no such thing"}}))]
    with pytest.raises(UserError, match=says):
        chat()(["p", "q"], ["a", "a"], ["b", "b"])
    assert len(server.requests) == 1 and waits == []


def test_an_address_where_nobody_answers(chat, waits):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match="Connection error.*Check --endpoint"):
            chat(endpoint=nobody)(["p"], ["a"], ["b"])
    assert len(waits) == 6


def test_a_redirect_does_not_carry_the_key_away(server, chat):
    elsewhere = Server()
    try:
        server.script = [(302, {"Location": elsewhere.url + "/steal"}, "")]
        with pytest.raises(UserError, match="Error code: 302"):
            chat()(["p"], ["a"], ["b"])
        assert elsewhere.requests == []
    finally:
        elsewhere.close()


@pytest.mark.parametrize(
    "endpoint",
    ["api.openai.com/v1", "ftp://h/v1", "http://", "http://h:port/v1", "http://h h/v1", "http://h/\n", "http://[::1/"],
)
def test_addresses_that_are_none(chat, endpoint):
    with pytest.raises(UserError, match="plain base URL"):
        chat(endpoint=endpoint)


def test_an_address_holds_no_secret(chat):
    for endpoint in ("https://me:secret@host/v1", "https://host/v1?key=secret", "http://me:secret@ho st/"):
        with pytest.raises(UserError, match="plain base URL") as stop:
            chat(endpoint=endpoint)
        assert "secret" not in str(stop.value)


def test_no_key_or_one_that_cannot_be_sent(chat, monkeypatch):
    monkeypatch.setenv("OTHER", "sk-secret\nX-Header: 1")
    with pytest.raises(UserError, match="the environment variable OTHER") as stop:
        chat(key_env="OTHER")
    assert "secret" not in str(stop.value)
    for empty in ("", "  "):
        monkeypatch.setenv("OTHER", empty)
        with pytest.raises(UserError, match="the environment variable OTHER is empty"):
            chat(key_env="OTHER")
    monkeypatch.setenv("OTHER", KEY + "\n")  # as `$(cat file)` does not, but an env file may leave it
    assert chat(key_env="OTHER")(["p"], ["a"], ["b"]) == ["a"]


def test_the_key_is_written_nowhere(server, chat, tmp_path, capsys):
    """Even if the server sends it back, in an answer or in an error."""
    messages = []
    error = json.dumps({"error": {"message": f"bad {KEY}"}})
    answers = [(200, good(f"{KEY}\nBetter: A")), (400, error), (200, f"x{KEY}"), (401, error), (404, KEY)]
    for prompt, (status, body) in zip("pqrst", answers, strict=True):
        server.script = [(status, {}, body)]
        try:
            assert chat()([prompt], ["a"], ["b"]) == ["a"]
        except UserError as error:
            messages.append(str(error))
    assert len(messages) == 4 and "bad [key]" in messages[0]
    written = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file())
    assert "Better: A" in written
    shown = capsys.readouterr()
    assert KEY not in "".join([*messages, written, shown.out, shown.err])


def test_without_the_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r'pip install -e ".\[judge\]"'):
        ChatJudge("simple", "http://localhost", "tiny")


def test_a_placeholder_for_a_key_changes_no_answer(server, chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "A")
    assert chat()(["p"], ["a"], ["b"]) == ["a"]


# ---- the journal ----


def test_journal(tmp_path):
    path = tmp_path / "new" / "j.jsonl"
    journal = Journal(path)
    assert journal.entries == {}
    journal.add("k", text="zwei\nZeilen \ud800")  # half a character, as a server may send
    journal.add("l", text="")
    assert Journal(path).entries == journal.entries == {
        "k": {"key": "k", "text": "zwei\nZeilen \ud800"}, "l": {"key": "l", "text": ""},
    }  # fmt: skip
    whole = path.read_bytes()
    for n in range(1, len(whole)):
        path.write_bytes(whole[:n])
        assert len(Journal(path).entries) == whole[:n].count(b"\n")
        assert path.read_bytes() == whole[: whole[:n].rfind(b"\n") + 1]
    for bad in (b"x\n", b"[1]\n", b'{"no": 1}\n', b"\xff\n", b"\n"):
        path.write_bytes(whole + bad)
        with pytest.raises(UserError, match="line 3: damaged"):
            Journal(path)
        assert path.read_bytes() == whole + bad
