"""Judges: which of two responses to a prompt is the better one. What `experiments.winrate` counts wins with.

A judge is a callable, `judge(prompts, a, b) -> verdicts`: lists of texts of one length in, and for each comparison "a",
"b" or "tie" out, or None where the judge gave an answer that cannot be read. `load_judge` makes one from its name:

    toy                    the toy's ground truth
    FILE                   a trained reward: a file that `experiments.rewards` loads
    FOLDER                 a reward model: a run folder of `experiments.baselines.reward_model`
    implicit:RUN,REFERENCE the implicit reward of a run, log pi(y|x) - log pi_ref(y|x)
    chat:QUESTION          a chat model behind an OpenAI-compatible endpoint, asked one of QUESTIONS

All but the last compare two numbers; equal ones are a tie. The chat model reads both responses in one message and
must choose one, as the paper's GPT-4 did. Such judges favour a place in the message: the caller swaps sides at random.
"""

import datetime
import email.utils
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.frontier.baselines import reward_model
from experiments.rewards import load_reward
from minidpo import checkpoint, dataset
from minidpo.files import atomic_write
from minidpo.settings import UserError, unknown
from train_dpo import response_logps

# ---- 1. Judges that compare two numbers ----


def verdict(a, b):
    """Two rewards -> the better side."""
    return "tie" if a == b else "a" if a > b else "b"


def reward_judge(reward):
    """reward(prompts, responses) -> list of floats becomes a judge."""

    def judge(prompts, a, b):
        return [verdict(*both) for both in zip(reward(prompts, a), reward(prompts, b), strict=True)]

    return judge


@torch.no_grad()
def implicit_rewards(policy, reference, tokenizer, prompts, a, b, batch_size=64, progress=None):
    """log pi(y|x) - log pi_ref(y|x) of both responses to each prompt -> (N, 2), in nats.

    This is the reward of Eq. 5 divided by beta and without log Z(x), and neither changes which of two responses to one
    prompt has more. A judge is given texts, so they are encoded again, and each counts as ended: its eot is scored.
    """
    max_length = min(policy.config.block_size, reference.config.block_size)
    rows = []
    for prompt, *responses in zip(prompts, a, b, strict=True):
        ids = [tokenizer.encode(response) for response in responses]
        prompt, ids, *_ = dataset.fit(tokenizer.encode(prompt), ids, [True, True], tokenizer.eot, max_length)
        rows.append((prompt, *ids))
    rewards = []
    for i in tqdm(range(0, len(rows), batch_size), desc=progress, unit="batch", disable=progress is None):
        batch = dataset.preference_batch(rows[i : i + batch_size], policy.wte.weight.device)
        ratios = [p - r for p, r in zip(response_logps(policy, batch), response_logps(reference, batch), strict=True)]
        rewards.append(torch.stack(ratios, dim=-1).cpu())
    return torch.cat(rewards)


def implicit_judge(run, reference, device="cpu"):
    """The implicit reward of `run` against `reference`, folders or names, as a judge."""
    policy, tokenizer, _ = checkpoint.load(run)
    other, other_tokenizer, _ = checkpoint.load(reference)
    if tokenizer.fingerprint != other_tokenizer.fingerprint:
        raise UserError(
            f"{run} and {reference} have different tokenizers: give the reference the run was trained from."
        )
    models = [model.to(device).eval() for model in (policy, other)]

    def judge(prompts, a, b):
        rewards = implicit_rewards(*models, tokenizer, prompts, a, b, progress=f"implicit reward of {run}")
        return [verdict(*both) for both in rewards.tolist()]

    return judge


# ---- 2. A chat model. The questions follow the paper's idea (section D), in words of our own ----

_FORM = """

{{prompt}}

{name} A:
{{a}}

{name} B:
{{b}}

Answer in two lines and nothing else. Line 1: one sentence that compares the two and gives your reason. \
Line 2: "Better: A" or "Better: B"."""

QUESTIONS = {
    "simple": "Here are a post from a forum and two summaries of it. Which summary covers the points that matter most "
    "in the post better?" + _FORM.format(name="Summary"),
    "concise": "Here are a post from a forum and two summaries of it. Which summary covers the points that matter most "
    "in the post better, and leaves out what is beside the point? A good summary is exact and wastes no words."
    + _FORM.format(name="Summary"),
    "helpful": "Here are the beginning of a dialogue and two responses with which it could go on. Which response helps "
    "the person who asked more?" + _FORM.format(name="Response"),
}

ATTEMPTS = 7  # with waits of 1, 2, 4, ... seconds between them: about a minute in all
LONGEST_WAIT = 300  # seconds; a server that asks for more is better left alone until later
_CHOICE = re.compile(r"\W*(?:better\W+)?([AB])\W*", re.IGNORECASE)


def parse(answer):
    """A chat model's answer -> "a", "b", or None unless exactly one of them stands alone in a line, as was asked."""
    found = {match[1].lower() for match in map(_CHOICE.fullmatch, answer.splitlines()) if match}
    return found.pop() if len(found) == 1 else None


class Journal:
    """JSONL that only grows, for results that took time or money: `entries` {key: entry}, `add` writes one at once.

    A kill costs the line being written at most: a last line without its end is dropped when the file is opened.
    """

    def __init__(self, path):
        self.path, self.entries = Path(path), {}
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            atomic_write(self.path, whole)
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{path}, line {number}: damaged ({error}). Delete this line to go on.") from error

    def add(self, key, **fields):
        self.entries[key] = {"key": key, **fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write((json.dumps(self.entries[key]) + "\n").encode())


class TryAgain(Exception):
    """A request failed in a way that may pass. `wait`: the seconds that the server asked for, None if it did not."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key along to another address: it is an error instead."""

    def redirect_request(self, *_):
        return None


def retry_after(value):
    """Seconds from now that a Retry-After header names, as a number or a date (RFC 9110); None if it is neither."""
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
        return max(0.0, (when - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    except (ValueError, TypeError):  # no date; a date without a zone
        return None


class ChatJudge:
    """A judge that sends each comparison to a chat model, one request after the other, and keeps every answer.

    question: a key of QUESTIONS. endpoint: base URL, such as https://api.openai.com/v1. key_env: the environment
    variable that holds the key, which goes into the request's header and nowhere else. answers: a Journal; the same
    message to a model of the same name is never sent twice. timeout: in seconds. Equal responses are a tie, unasked.
    """

    def __init__(self, question, endpoint, model, key_env, answers, timeout=60.0):
        if question not in QUESTIONS:
            raise unknown("question", question, list(QUESTIONS))
        if not endpoint or not model:
            raise UserError("a chat judge needs --endpoint URL and --model NAME.")
        self.question, self.model, self.answers, self.timeout = QUESTIONS[question], model, answers, timeout
        self.url = _checked(endpoint).rstrip("/") + "/chat/completions"
        self.key_env, self._key = key_env, os.environ.get(key_env, "").strip()
        if not self._key:
            raise UserError(
                f"no key: the environment variable {key_env} is empty. Put the endpoint's key there, or name another "
                "variable with --key-env. For a local server that wants no key, any word will do."
            )
        if re.search(r"[^!-~]", self._key):
            raise UserError(f"the key in {key_env} holds a space, a line end or another character no key has.")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._reached = False  # whether this address has ever answered

    def __call__(self, prompts, a, b):
        verdicts = []
        for prompt, *responses in zip(tqdm(prompts, desc=self.model, unit="comparison"), a, b, strict=True):
            texts = [response.strip() for response in responses]
            if texts[0] == texts[1]:
                verdicts.append("tie")
            else:
                verdicts.append(parse(self.ask(self.question.format(prompt=prompt, a=texts[0], b=texts[1]))))
        return verdicts

    def ask(self, text):
        """The model's answer to one message, from the journal if it is there."""
        messages = [{"role": "user", "content": text}]
        key = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
        if key not in self.answers.entries:
            body = json.dumps({"model": self.model, "messages": messages, "temperature": 0})
            self.answers.add(key, model=self.model, answer=self._request(body.encode()))
        return self.answers.entries[key]["answer"]

    def _request(self, body):
        """Posts until there is an answer. Raises UserError for what waiting cannot mend, or has not mended."""
        for attempt in range(ATTEMPTS):
            try:
                return self._post(body)
            except TryAgain as error:
                reason, wait = str(error), 2.0**attempt if error.wait is None else error.wait
            if attempt + 1 == ATTEMPTS or wait > LONGEST_WAIT:
                break
            tqdm.write(f"{reason}; again in {wait:.0f} s")
            time.sleep(wait)
        asked = f", and it asks for a wait of {wait:.0f} s" if wait > LONGEST_WAIT else ""
        raise UserError(
            f"{self.url}: {reason}, at attempt {attempt + 1}{asked}. The answers so far are in "
            f"{self.answers.path}: the same command goes on from there."
        )

    def _post(self, body):
        """One request -> the text of the answer. Raises TryAgain or UserError."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            with self._opener.open(urllib.request.Request(self.url, body, headers), timeout=self.timeout) as reply:
                text = reply.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                self._raise_for_status(error)
        except urllib.error.URLError as error:  # no connection: most likely a wrong address, if it never worked
            if not self._reached and not isinstance(error.reason, TimeoutError):
                raise UserError(f"{self.url} cannot be reached ({error.reason}). Check --endpoint.") from None
            raise TryAgain(f"no connection ({error.reason})") from None
        except TimeoutError:
            raise TryAgain(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise TryAgain(f"the connection broke ({type(error).__name__})") from None
        self._reached = True
        try:
            answer = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise TryAgain(f"the answer is no chat completion: {self._shown(text)}") from None
        if answer is not None and not isinstance(answer, str):
            raise TryAgain(f"the answer's content is no text: {self._shown(text)}")
        return self._without_key(answer or "")  # null is how a refusal looks: an answer, if one that cannot be read

    def _raise_for_status(self, error):
        """An HTTP status that is not success -> TryAgain if it may pass, UserError if not."""
        self._reached = True
        if error.code in (401, 403):
            raise UserError(f"{self.url} refuses the key in {self.key_env} (status {error.code}).") from None
        if error.code in (408, 429) or error.code >= 500:
            raise TryAgain(f"status {error.code}", retry_after(error.headers.get("Retry-After"))) from None
        try:
            detail = self._shown(error.read(10_000).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            detail = "and no more of the answer"
        hint = "a redirect, which is not followed: give the final address" if error.code < 400 else detail
        raise UserError(f"{self.url}: status {error.code}, {hint}. Check --endpoint and --model.") from None

    def _without_key(self, text):
        # a server may send the key back; one this short is a placeholder, and may well be a part of common words
        return text if len(self._key) < 8 else text.replace(self._key, "[key]")

    def _shown(self, text):
        return repr(self._without_key(text)[:200])


def _checked(endpoint):
    """The endpoint, or UserError if no request could be sent there, or if it holds what should not be shown."""
    if re.search("[@?#]", endpoint):
        raise UserError("--endpoint must be a plain base URL, without user name, query or fragment.")
    try:
        parts = urllib.parse.urlsplit(endpoint)
        _ = parts.port  # raises ValueError if it is no number
        good = parts.scheme in ("http", "https") and parts.hostname and not re.search(r"[^!-~]", endpoint)
    except ValueError:
        good = False
    if not good:
        raise UserError(f"--endpoint {endpoint!r} is no address. One looks like https://api.openai.com/v1")
    return endpoint


# ---- 3. A judge by its name ----


def load_judge(name, answers=None, endpoint="", model="", key_env="OPENAI_API_KEY", timeout=60.0, device="cpu"):
    """The judge of that name, as the module's docstring lists them. Only a chat judge needs what follows `name`.

    Raises UserError for a name that is none, a run or file that is missing, and an endpoint or key that cannot work.
    """
    kind, _, rest = name.partition(":")
    if kind == "chat":
        return ChatJudge(rest, endpoint, model, key_env, answers, timeout)
    if kind == "implicit":
        run, comma, reference = rest.partition(",")
        if not comma or not run or not reference:
            raise UserError(f"--judge {name}: write implicit:RUN,REFERENCE, for example implicit:runs/dpo,runs/sft")
        return implicit_judge(run, reference, device)
    if name != "toy" and Path(name).is_dir():
        model, tokenizer = reward_model.load(name)
        return reward_judge(reward_model.of_texts(model.to(device), tokenizer))
    if name == "toy" or Path(name).exists():
        return reward_judge(load_reward(name))
    raise unknown("judge", name, ["toy", "FILE", "FOLDER", "implicit:RUN,REFERENCE", *(f"chat:{q}" for q in QUESTIONS)])
