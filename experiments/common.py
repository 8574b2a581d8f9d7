"""What several experiments do: load models, read prompts, sample, average, and write tables and pictures."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
from minidpo import checkpoint, dataset
from minidpo.files.writing import atomic, atomic_write
from minidpo.sampling import generate
from minidpo.settings import UserError, unknown

# ---- 1. Flags, models, prompts, samples ----


def names_in(flag, text, valid, default):
    """Returns the names in "a,b", or `default` for "". Raises UserError for a name that is not one of `valid`."""
    names = [name.strip() for name in text.split(",")] if text else list(default)
    for name in names:
        if name not in valid:
            raise unknown(flag, name, list(valid))
    return names


def load_models(*names, device="cpu"):
    """Loads models (run folders, GPT-2 folders or names) in evaluation mode -> (list of models, their tokenizer).

    Raises UserError if a model is missing, or if two tokenizers differ.
    """
    models, tokenizers = zip(*(checkpoint.load(name)[:2] for name in names), strict=True)
    for name, tokenizer in zip(names, tokenizers, strict=True):
        if tokenizer.fingerprint != tokenizers[0].fingerprint:
            how = "Give models that were trained from the same start."
            raise UserError(f"{names[0]} and {name} have different tokenizers. {how}")
    return [model.to(device).eval() for model in models], tokenizers[0]


def read_prompts(name, file="prompts_test", limit=0):
    """Returns the first `limit` prompts (0: all) of a dataset's file, or of the JSONL file `name`, as texts."""
    return [record["prompt"] for record in dataset.read_jsonl(data.find(name, file), ("prompt",))][: limit or None]


def prompt_ids(tokenizer, prompts, max_new_tokens, *models):
    """Returns the ids of each prompt text behind a leading eot, as `generate` takes them.

    A prompt is cut on its left, down to 8 tokens, where it and max_new_tokens do not fit the context of all `models`.
    Prints how many were cut.
    """
    context = min(model.config.block_size for model in models)
    room = min(max(context - max_new_tokens, 8), context - 1)  # 8 as in dataset.cut_to_context
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    if n_cut := sum(len(ids) > room for ids in encoded):
        print(f"{n_cut:,} of {len(prompts):,} prompts cut on the left to {room} tokens")
    return [[tokenizer.eot, *ids[-room:]] for ids in encoded]


class Samples(NamedTuple):
    """N sampled responses, one entry per response in each list. The samples of one prompt are neighbours."""

    prompts: list  # texts
    prompt_ids: list  # lists of ids, each with its leading eot
    ids: list  # of the responses, as they were drawn
    texts: list  # of the responses
    ended: list  # whether the response ended in eot, and was not cut at the longest length


def sample(
    model, tokenizer, prompts, max_new_tokens, seed, per_prompt=1, ids=None, temperature=1.0,
    batch_size=256, progress=None,
):  # fmt: skip
    """Samples `per_prompt` responses to each of `prompts` (texts) -> Samples.

    The same seed and prompts give the same responses. `seed` is a number, or a torch.Generator on the model's device to
    continue from. `ids` is what `prompt_ids` made of the prompts; None: it is called here. The other arguments are
    those of `generate`.
    """
    encoded = prompt_ids(tokenizer, prompts, max_new_tokens, model) if ids is None else ids
    prompts, encoded = ([x for x in xs for _ in range(per_prompt)] for xs in (prompts, encoded))
    if not isinstance(seed, torch.Generator):
        seed = torch.Generator(model.wte.weight.device).manual_seed(seed)
    knobs = dict(temperature=temperature, generator=seed, batch_size=batch_size, progress=progress)
    ids = generate(model, encoded, max_new_tokens, tokenizer.eot, **knobs)
    ended = [response[-1:] == [tokenizer.eot] for response in ids]
    return Samples(prompts, encoded, ids, [tokenizer.decode(response) for response in ids], ended)


def by_length(prompts, responses, device, batch_size=128, progress=None):
    """Yields the N rows (lists of ids) in batches of similar lengths, which need little padding -> (indices, Rows)."""
    rows = list(zip(prompts, responses, strict=True))
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    for i in tqdm(range(0, len(rows), batch_size), desc=progress, unit="batch", disable=progress is None):
        indices = order[i : i + batch_size]
        yield indices, dataset.sft_batch([rows[j] for j in indices], device)


# ---- 2. Means, tables, pictures ----


def prompt_mean_se(values, per_prompt):
    """Returns the mean of values (N,) and its standard error. Raises UserError for fewer than two prompts.

    The first `per_prompt` values belong to one prompt, the next ones to the next prompt, and so on. Only the
    means of different prompts are independent.
    """
    means = torch.as_tensor(values, dtype=torch.float64).view(-1, per_prompt).mean(-1)
    if len(means) < 2:
        raise UserError("one prompt has no standard error. Give at least two.")
    return means.mean().item(), (means.std() / len(means) ** 0.5).item()


def write_csv(path, rows, digits=None):
    """Writes one or more NamedTuples of one class as a CSV file, with the fields' names as header.

    Floats get `digits` significant digits; with None, as many as it takes to read the same number back. NaN is empty.
    """

    def cell(value):
        if not isinstance(value, float):
            return value
        return "" if value != value else f"{value:.{digits}g}" if digits else str(value)

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0]._fields)
    writer.writerows(map(cell, row) for row in rows)
    atomic_write(path, text.getvalue())


def read_csv(path, row_class, make):
    """Reads a file of `write_csv` -> list of row_class, a NamedTuple whose fields are str, int or float.

    Raises UserError if the file is missing or damaged, with the command `make` that makes it again.
    """
    if not Path(path).exists():
        raise UserError(f"{path} not found. Make it first: {make}")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    if tuple(header) != row_class._fields:
        raise UserError(f"{path}, line 1: the columns must be {','.join(row_class._fields)}. Make it again: {make}")
    kinds, rows = row_class.__annotations__.values(), []
    for number, cells in enumerate(lines, 2):
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells under {len(header)} columns")
            pairs = zip(kinds, cells, strict=True)
            rows.append(row_class(*(float(cell or "nan") if kind is float else kind(cell) for kind, cell in pairs)))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}. Make it again: {make}") from error
    return rows


def figure(path, figsize):
    """Returns a matplotlib Figure for the picture `path`, or None, with a printed line, if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f'no {path}: matplotlib is not installed (pip install "minidpo[plot]")')
        return None
    return Figure(figsize=figsize, layout="constrained")


def save_figure(path, figure, dpi=110):
    """Writes a Figure as a PNG file."""
    with atomic(path) as file:
        figure.savefig(file, dpi=dpi, format="png")
