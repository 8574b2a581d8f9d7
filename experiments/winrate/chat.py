"""A judge that asks a chat model, behind an OpenAI-compatible endpoint, which of two responses is better.

The model reads both responses in one message and must choose one, as GPT-4 did in the paper. The questions follow the
paper's idea (appendix D) in words of our own. Chat models prefer one place, so the caller swaps the two at random.
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
import urllib.request

from tqdm import tqdm

from minidpo.settings import UserError, unknown

FORM = """

{{prompt}}

{name} A:
{{a}}

{name} B:
{{b}}

Answer in two lines and nothing else. Line 1: one sentence that compares the two and gives your reason. \
Line 2: "Better: A" or "Better: B"."""

QUESTIONS = {
    "simple": "Here are a post from a forum and two summaries of it. Which summary covers the points that matter most "
    "in the post better?" + FORM.format(name="Summary"),
    "concise": "Here are a post from a forum and two summaries of it. Which summary covers the points that matter most "
    "in the post better, and leaves out what is beside the point? A good summary is exact and wastes no words."
    + FORM.format(name="Summary"),
    "helpful": "Here are the beginning of a dialogue and two responses with which it could go on. Which response helps "
    "the person who asked more?" + FORM.format(name="Response"),
}

ATTEMPTS = 7  # with waits of 1, 2, 4, ... seconds between them: about a minute in total
LONGEST_WAIT = 300  # seconds; if the server asks for a longer wait, the command stops
CHOICE = re.compile(r"\W*(?:better\W+)?([AB])\W*", re.IGNORECASE)
ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[!-~]*)?")


def parse(answer):
    """The answer of a chat model -> "a" or "b"; None unless exactly one of them stands alone on a line."""
    found = {match[1].lower() for match in map(CHOICE.fullmatch, answer.splitlines()) if match}
    return found.pop() if len(found) == 1 else None


def retry_after(value):
    """Seconds to wait according to a Retry-After header, a number or a date (RFC 9110); None if it is neither."""
    value = (value or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
        return max(0.0, (when - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    except (ValueError, TypeError):  # not a date, or a date without a time zone
        return None


class TryAgain(Exception):
    """A request failed for a reason that may pass. Arguments: the reason, and the seconds to wait or None."""


class EveryStatus(urllib.request.HTTPErrorProcessor):
    """Returns a response of any status. It follows no redirect, which would send the key to another address."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class ChatJudge:
    """A judge that sends one request per comparison to a chat model, and keeps every answer.

    Equal responses are a tie and are not sent. The same message is never sent twice to a model of the same name.

    `question` is a key of QUESTIONS, `endpoint` a base URL such as https://api.openai.com/v1, `answers` a Journal, and
    `timeout` the seconds to wait for one answer. The key in the environment variable `key_env` is sent in the request's
    header and stored nowhere.
    """

    def __init__(self, question, endpoint="", model="", key_env="OPENAI_API_KEY", answers=None, timeout=60.0):
        if question not in QUESTIONS:
            raise unknown("question", question, list(QUESTIONS))
        if not endpoint or not model:
            raise UserError("a chat judge needs --endpoint URL and --model NAME.")
        if re.search("[@?#]", endpoint):  # such an address may hold a secret, so it is not printed
            raise UserError("--endpoint must be a plain base URL, without user name, query or fragment.")
        if not ADDRESS.fullmatch(endpoint):
            raise UserError(f"--endpoint {endpoint!r} is no address. One looks like https://api.openai.com/v1")
        self.question, self.model, self.answers, self.timeout = QUESTIONS[question], model, answers, timeout
        self.url = endpoint.rstrip("/") + "/chat/completions"
        self.key_env, self.key = key_env, os.environ.get(key_env, "").strip()
        if not self.key:
            raise UserError(
                f"no key: the environment variable {key_env} is empty. Put the endpoint's key there, or name another "
                "variable with --key-env. For a local server without a key, any word will do."
            )
        if re.search(r"[^!-~]", self.key):
            raise UserError(f"the key in {key_env} holds a space, a line end or another character that no key has.")
        self.opener = urllib.request.build_opener(EveryStatus)
        self.reached = False  # whether this address has answered before

    def __call__(self, prompts, a, b):
        verdicts = []
        for prompt, *responses in zip(tqdm(prompts, desc=self.model, unit="comparison"), a, b, strict=True):
            a_text, b_text = (response.strip() for response in responses)
            message = self.question.format(prompt=prompt, a=a_text, b=b_text)
            verdicts.append("tie" if a_text == b_text else parse(self.ask(message)))
        return verdicts

    def ask(self, text):
        """Returns the model's answer to one message, from the journal if it is there."""
        messages = [{"role": "user", "content": text}]
        key = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
        if key not in self.answers.entries:
            body = json.dumps({"model": self.model, "messages": messages, "temperature": 0})
            self.answers.add(key, model=self.model, answer=self.request(body.encode()))
        return self.answers.entries[key]["answer"]

    def request(self, body):
        """Sends a request until it is answered. Raises UserError if waiting cannot help, or has not helped."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.post(body)
            except TryAgain as error:
                reason, wait = error.args
            wait = 2.0 ** (attempt - 1) if wait is None else wait
            if attempt == ATTEMPTS or wait > LONGEST_WAIT:
                break
            tqdm.write(f"{reason}; trying again in {wait:.0f} s")
            time.sleep(wait)
        asked = f", and the server asks for a wait of {wait:.0f} s" if wait > LONGEST_WAIT else ""
        raise UserError(
            f"{self.url}: {reason}, at attempt {attempt}{asked}. The answers so far are in {self.answers.path}: "
            "the same command continues from there."
        )

    def post(self, body):
        """Sends one request -> the text of the answer. Raises TryAgain or UserError."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        try:
            with self.opener.open(urllib.request.Request(self.url, body, headers), timeout=self.timeout) as reply:
                text = reply.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            no_connection = isinstance(error, urllib.error.URLError)  # it wraps its cause
            cause = error.reason if no_connection else error
            if no_connection and not self.reached and not isinstance(cause, TimeoutError):
                raise UserError(f"{self.url} cannot be reached ({cause}). Check --endpoint.") from None
            raise TryAgain(f"no answer ({type(cause).__name__})", None) from None
        self.reached = True
        if reply.status in (401, 403):
            raise UserError(f"{self.url} refuses the key in {self.key_env} (status {reply.status}).")
        if reply.status in (408, 429) or reply.status >= 500:
            raise TryAgain(f"status {reply.status}", retry_after(reply.headers.get("Retry-After")))
        if reply.status >= 300:
            redirect = "a redirect, which is not followed: give the final address"
            detail = redirect if reply.status < 400 else self.shown(text)
            raise UserError(f"{self.url}: status {reply.status}, {detail}. Check --endpoint and --model.")
        try:
            answer = json.loads(text)["choices"][0]["message"]["content"]
            if not isinstance(answer, str | None):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise TryAgain(f"the answer is not a chat completion: {self.shown(text)}", None) from None
        return self.without_key(answer or "")  # a refusal is null: an answer, but one that cannot be read

    def without_key(self, text):
        """A text from the server without the key. A key under 8 characters is a placeholder, perhaps a common word."""
        return text if len(self.key) < 8 else text.replace(self.key, "[key]")

    def shown(self, text):
        return repr(self.without_key(text)[:200])
