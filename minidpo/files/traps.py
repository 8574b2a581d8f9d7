"""What is often a mistake in the data. It is counted, and nothing is dropped for it."""


def traps(records, fields):
    """Records whose `fields` are texts -> {sentence: how many}."""
    rows = {tuple(record[field] for field in fields) for record in records}
    swapped = {(prompt, *two[::-1]) for prompt, *two in rows if len(two) == 2 and two[0] != two[1]}
    sides = [(r["prompt"], r[field]) for r in records for field in fields[1:] if r["prompt"].strip() and r[field]]
    joined = sum(not prompt[-1].isspace() and not response[0].isspace() for prompt, response in sides)
    return {
        "responses run into their prompt, without a blank between them": joined,
        "responses begin with their whole prompt": sum(repeats(*side) for side in sides),
        "pairs have both labels, A over B and B over A": len(rows & swapped) // 2,
    }


def repeats(prompt, response):
    """Whether the response begins with the whole prompt, and not only with a longer word."""
    prompt, response = prompt.strip(), response.lstrip()
    return response.startswith(prompt) and not response[len(prompt) :][:1].isalnum()
