"""A judge that asks a chat model, behind an OpenAI-compatible endpoint, which of two responses is better.

The model reads both responses in one message and must choose one, as GPT-4 did in the paper. The questions follow the
paper's idea (appendix D) in words of our own. Chat models tend to favour one of the two places, whatever stands there,
so the caller swaps the responses at random.
"""

import hashlib
import json
import os
import re

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

RETRIES = 6  # by the client, with growing waits between them: about half a minute in total
CHOICE = re.compile(r"\W*(?:better\W+)?([AB])[^\w:]*", re.IGNORECASE)  # "A:" is the heading of a text
ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[^\s@?#]*)?")


def parse(answer):
    """The answer of a chat model -> "a" or "b"; None unless exactly one of them stands alone on a line."""
    found = {match[1].lower() for match in map(CHOICE.fullmatch, answer.splitlines()) if match}
    return found.pop() if len(found) == 1 else None


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
        if not ADDRESS.fullmatch(endpoint):  # it may hold a secret, so it is not printed
            what = "a plain base URL such as https://api.openai.com/v1, without user name, query or fragment"
            raise UserError(f"--endpoint must be {what}.")
        key = os.environ.get(key_env, "").strip()
        if not re.fullmatch("[!-~]+", key):
            what = f"the environment variable {key_env} is empty, or holds a character that no key has."
            how = "Put the endpoint's key there, or name another variable with --key-env."
            raise UserError(f"no key: {what} {how} For a local server without a key, any word will do.")
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError:
            raise UserError('a chat judge needs the package openai: pip install -e ".[judge]"') from None
        self.question, self.model, self.answers = QUESTIONS[question], model, answers
        self.key_env, self.key = key_env, key
        http = DefaultHttpxClient(follow_redirects=False)  # a redirect would send the texts elsewhere
        self.client = OpenAI(base_url=endpoint, api_key=key, timeout=timeout, max_retries=RETRIES, http_client=http)

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
            self.answers.add(key, model=self.model, answer=self.request(messages))
        return self.answers.entries[key]["answer"]

    def request(self, messages):
        """Returns the text of the model's answer. Raises UserError if there is none after all retries."""
        import openai

        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages)
            return self.without_key(reply.choices[0].message.content or "")  # null is an answer, but unreadable
        except openai.OpenAIError as error:
            reason = self.without_key(str(error))[:300]
        except (AttributeError, LookupError, TypeError, ValueError):
            reason = "The answer is not a chat completion."
        how = f"Check --endpoint, --model and the key in {self.key_env}."
        kept = f"The answers so far are in {self.answers.path}: the same command continues from there."
        raise UserError(f"{self.client.base_url}: {reason} {how} {kept}")

    def without_key(self, text):
        """Removes the key from a server's text. A key under 8 characters stays: it is a placeholder."""
        return text if len(self.key) < 8 else text.replace(self.key, "[key]")
