"""The forms in which people keep prompts and responses (docs/data.md), and how each becomes texts.

A dialogue becomes a text as in HH (Bai et al. 2022):  "\\n\\nHuman: Hi\\n\\nAssistant: Hello!"
"""

from minidpo.settings import UserError

PAIR = ("prompt", "chosen", "rejected")
SFT = ("prompt", "completion")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def cut_prompt(dialogues):
    """Texts of dialogues with a common prompt -> (prompt, responses). Each is cut after its own last "Assistant:".

    Raises UserError if the prompts differ. To cut both at the same character would make a wrong pair of such a row.
    """
    starts, _, responses = zip(*(text.rpartition(ASSISTANT) for text in dialogues), strict=True)
    if not all(start.startswith(HUMAN) for start in starts):
        raise UserError("no dialogue")
    if any(HUMAN in response for response in responses):
        raise UserError("the human has the last word")
    if len(set(starts)) > 1:
        raise UserError("two different prompts")
    return starts[0] + ASSISTANT, responses


def chat_text(messages):
    """A list of {"role", "content"}, user and assistant in turn -> the dialogue as a text. UserError for others."""
    text = ""
    for i, message in enumerate(messages):
        role, mark = (("user", HUMAN), ("assistant", ASSISTANT))[i % 2]
        filled = {key for key, value in message.items() if value} if isinstance(message, dict) else set()
        if filled - {"content"} != {"role"} or message["role"] != role or not isinstance(message.get("content"), str):
            raise UserError(f"message {i + 1} must hold the role {role!r} and a text, no more: {str(message)[:80]}")
        if HUMAN in message["content"] or ASSISTANT in message["content"]:
            raise UserError(f"message {i + 1} holds the mark of another turn, '\\n\\nHuman:' or '\\n\\nAssistant:'")
        text += mark + (message["content"] and " " + message["content"])
    return text


def plain(record, fields):
    """A record -> the same record with texts as prompt and responses. Raises UserError where it would have to guess.

    The prompt of messages, or of two dialogues, is all that comes before the last response (see `cut_prompt`). With the
    fields of SFT, the chosen response of a pair is the completion (Preferred-FT).
    """
    if "messages" in record and not record.keys() & {"chosen", "completion"}:
        record = {**record, "completion": record["messages"]}
    names = [name for name in ("chosen", "rejected", "completion") if name in record]
    prompt, values = record.get("prompt"), [record[name] for name in names]
    dialogues = []
    if any(isinstance(v, list) and v and isinstance(v[0], dict) for v in (prompt, *values)):
        values = values or [[{"role": "assistant", "content": ""}]]  # a row with a prompt alone
        if record.get("tools") or not all(isinstance(v, list) for v in values):
            raise UserError("a row with messages must have no tools, and each response must be a list of messages")
        if isinstance(prompt, str) and any(v[:1] != [{"role": "user", "content": prompt}] for v in values):
            raise UserError("'prompt' is a text, but not the first message")
        begin = prompt if isinstance(prompt, list) else []
        dialogues = [chat_text([*begin, *v]) for v in values]
    elif "prompt" not in record and len(names) > 1 and all(isinstance(v, str) and v.startswith(HUMAN) for v in values):
        dialogues = values
    if dialogues:
        prompt, responses = cut_prompt(dialogues)
        record = {**record, "prompt": prompt, **dict(zip(names, responses, strict=False))}
    if fields == SFT and "completion" not in record and "chosen" in record:
        record = {**record, "completion": record["chosen"], "completion_ended": record.get("chosen_ended", True)}
    return record
