"""From records to batches: texts -> rows of token ids -> input ids, targets and response mask.

Look at a file before training on it:  python -m minidpo.dataset data/toy_sentiment/pairs_train.jsonl

One row is `[eot] prompt response [eot]`, where eot is the end-of-text token. Prompt and response are tokenised
separately and their ids joined, so that no token spans the border. The first eot starts the document and is never
scored. The last one ends the response and is always scored.
"""

import argparse
from collections import Counter
from typing import NamedTuple

import numpy
import torch

from minidpo import checkpoint
from minidpo.files.forms import PAIR, SFT  # field names: prompt, chosen, rejected; prompt, completion
from minidpo.files.jsonl import read_jsonl, texts
from minidpo.files.traps import traps
from minidpo.settings import UserError, run_main
from minidpo.tokenizer import Tokenizer

# ---- 1. Rows of token ids ----


def cut_to_context(prompt, responses, ended, eot, max_length, min_prompt_tokens=8):
    """Cuts one prompt and its responses (lists of ids) to the context, and adds the eot.

    The limit counts input positions: 1 + prompt + response <= max_length, since the final eot is only a target. First
    the left of the prompt is cut, down to min_prompt_tokens. Only then are responses cut. All responses keep the same
    prompt. `ended` has a bool per response. A response gets a final eot if its bool is true and it was not cut.

    Returns:
        ([eot] + prompt, [response + [eot], ...], whether the prompt was cut, how many responses were cut)
    """
    room = max_length - 1 - max(len(r) for r in responses)
    kept = min(len(prompt), max(room, min_prompt_tokens))
    room = max(0, max_length - 1 - kept)
    fitted = [r[:room] if len(r) > room else r + [eot] if e else r for r, e in zip(responses, ended, strict=True)]
    return [eot, *prompt[len(prompt) - kept :]], fitted, kept < len(prompt), sum(len(r) > room for r in responses)


def encode(records, fields, tokenizer, max_length):
    """Records -> (rows, counts). A row is (prompt_ids, *response_ids), with the responses in the order of `fields`.

    A record is dropped if a response is empty, if the context has no room for a response, or if both responses are
    equal after the cut. `counts` has the numbers of dropped records and of cuts. A field such as "chosen_ended": false
    says that a sampler cut this response before its end. Such a response gets no eot.
    """
    is_pair = fields == PAIR
    rows, counts = [], Counter({"pairs" if is_pair else "rows": len(records)})
    for record in records:
        prompt, *responses = (tokenizer.encode(record[field]) for field in fields)
        if not all(responses):
            counts["dropped: empty response"] += 1
            continue
        ended = [record.get(f"{field}_ended", True) for field in fields[1:]]
        prompt, responses, prompt_cut, n_cut = cut_to_context(prompt, responses, ended, tokenizer.eot, max_length)
        if not all(responses):
            counts["dropped: no room for a response"] += 1
        elif is_pair and responses[0] == responses[1]:
            counts["dropped: equal responses"] += 1
        else:
            counts["prompt cut"] += prompt_cut
            counts["response cut"] += n_cut
            rows.append((prompt, *responses))
    return rows, counts


def load_rows(path, fields, tokenizer, max_length):
    """A file -> its rows (see `encode`). Prints what was cut and dropped, and warnings (`traps`).

    Raises UserError if no usable row is left.
    """
    records = read_jsonl(path, fields)
    rows, counts = encode(records, fields, tokenizer, max_length)
    print(f"{path}: {len(rows):,} usable of {', '.join(f'{v:,} {k}' for k, v in counts.items() if v)}")
    for sentence, n in traps(records, fields).items():
        if n:
            print(f"{path}: {n:,} {sentence}.")
    if not rows:
        raise UserError(f"{path}: no usable record; the counts above say why.")
    return rows


def load_split(split, fields, tokenizer, max_length):
    """(training file, held-out file or None) -> (rows, held-out rows). Prints how many held-out prompts are in both."""
    rows, held_out = (load_rows(path, fields, tokenizer, max_length) if path else [] for path in split)
    prompts = {tuple(prompt) for prompt, *_ in rows}
    if shared := sum(tuple(prompt) in prompts for prompt, *_ in held_out):
        print(f"{split[1]}: {shared:,} of {len(held_out):,} held-out rows have a prompt that also occurs in training.")
    return rows, held_out


def first_prompts(rows, n):
    """The first n different prompts of the rows or pairs, as lists of ids."""
    return [list(prompt) for prompt in dict.fromkeys(tuple(prompt) for prompt, *_ in rows)][:n]


def count_tokens(rows, indices):
    """Number of input positions of the rows or pairs `indices`, without padding."""
    return sum(len(rows[i][0]) + len(response) - 1 for i in indices for response in rows[i][1:])


# ---- 2. Batches ----


class Rows(NamedTuple):
    """N rows as tensors (N, T). Position t holds the input ids[t] and predicts targets[t].

    `mask` is true where the target belongs to the response. For prompt_ids [e, 5] and response_ids [7, 8, e]:

        ids      e  5  7  8
        targets  5  7  8  e
        mask     .  x  x  x

    Rows are padded on the right with id 0 and mask false. Under the causal mask no real position sees the padding, so
    no attention mask is needed.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


class PreferenceBatch(NamedTuple):
    """B pairs: `chosen` and `rejected` are Rows of B rows each, in the same order."""

    chosen: Rows
    rejected: Rows


def sft_batch(rows, device="cpu"):
    """list of (prompt_ids, response_ids) -> Rows. Raises ValueError for empty prompt_ids: they start with eot."""
    T = max(len(prompt) + len(response) for prompt, response in rows) - 1
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.zeros(len(rows), T, dtype=torch.long)
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        if not prompt:
            raise ValueError(f"row {i} has no prompt ids. A row starts with eot, which predicts its first token.")
        row = torch.tensor([*prompt, *response])
        n = len(row) - 1
        ids[i, :n] = row[:-1]
        targets[i, :n] = row[1:]
        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token
    return Rows(ids.to(device), targets.to(device), mask.to(device))


def preference_batch(pairs, device="cpu"):
    """list of (prompt_ids, chosen_ids, rejected_ids) -> PreferenceBatch. It adds no token but padding.

    Every eot is already where it belongs. Raises ValueError for empty prompt_ids.
    """
    chosen = sft_batch([(prompt, chosen) for prompt, chosen, _ in pairs], device)
    rejected = sft_batch([(prompt, rejected) for prompt, _, rejected in pairs], device)
    return PreferenceBatch(chosen, rejected)


def batches(rows, batch_size, seed, epoch, pool=32):
    """The indices of `rows` in shuffled batches of one epoch. The rows of a batch have similar lengths.

    The rows are shuffled. Those that do not fill a batch become a short batch. The others are divided into pools of
    `pool` batches. Each pool is sorted by length and cut into batches. Then all batches are shuffled.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
    order = torch.randperm(len(rows), generator=generator).tolist()
    full = len(order) - len(order) % batch_size
    cut = [order[full:]] if order[full:] else []  # set aside before sorting, so they are random rows, not the longest
    for i in range(0, full, pool * batch_size):
        by_length = sorted(order[i : min(i + pool * batch_size, full)], key=lambda r: sum(map(len, rows[r])))
        cut += [by_length[j : j + batch_size] for j in range(0, len(by_length), batch_size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def micro_batches(batches, rows, size, tokens):
    """The batches (lists of indices of `rows`) cut into micro-batches that fit into memory, in the same order.

    A micro-batch has at most `size` rows or pairs and at most `tokens` input positions, padding and both sides of a
    pair counted; 0 means no limit. A row or pair above `tokens` is a micro-batch of its own. A step sums over its rows,
    so the cuts change results only by rounding.
    """
    cut = []
    for batch in batches:
        micro, longest = [], []
        for index in batch:
            prompt, *responses = rows[index]
            lengths = [len(prompt) + len(response) - 1 for response in responses]
            longer = list(map(max, longest or lengths, lengths))
            if micro and (len(micro) == size or tokens and (len(micro) + 1) * sum(longer) > tokens):
                cut.append(micro)
                micro, longer = [], lengths
            micro.append(index)
            longest = longer
        cut += [micro] if micro else []
    return cut


# ---- 3. The command ----


def main():
    parser = argparse.ArgumentParser(description="Look at rows, masks and lengths before training on them.")
    parser.add_argument("file", help="JSONL of preferences (prompt, chosen, rejected) or SFT rows (prompt, completion)")
    parser.add_argument("--run", help="use tokenizer and context of this run folder (default: train a BPE on the file)")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show (default 3)")
    parser.add_argument("--max-length", type=int, default=1024, help="context without --run, in tokens (default 1024)")
    args = parser.parse_args()
    if args.rows < 0 or args.max_length < 2:
        raise UserError("--rows must be at least 0 and --max-length at least 2.")
    fields = PAIR if "chosen" in read_jsonl(args.file, ("prompt",))[0] else SFT
    if args.run:
        model, tokenizer, _ = checkpoint.load(args.run)
        args.max_length = model.config.block_size
    else:
        tokenizer = Tokenizer.train(texts(args.file), 1024)
    rows = load_rows(args.file, fields, tokenizer, args.max_length)
    print("\nScored tokens stand in [brackets], · ends a token that is not scored, ∎ is the end-of-text token.\n")
    for prompt, *responses in rows[: args.rows]:
        for name, response in zip(fields[1:], responses, strict=True):
            batch = sft_batch([(prompt, response)])
            tokens = ["∎" if i == tokenizer.eot else tokenizer.decode([i]) for i in batch.targets[0].tolist()]
            shown = "".join(f"[{t}]" if m else f"{t}·" for t, m in zip(tokens, batch.mask[0].tolist(), strict=True))
            print(f"{name:>10}  ∎·{shown}\n")
    lengths = [len(prompt) + len(response) - 1 for prompt, *responses in rows for response in responses]
    print(f"row length in tokens: mean {numpy.mean(lengths):.1f}, longest {max(lengths)}, of at most {args.max_length}")
    counts, edges = numpy.histogram(lengths, bins=16, range=(0, max(lengths) + 1))
    for count, low in zip(counts, edges[:-1], strict=True):
        print(f"from {low:4.0f} {count:7,d} {'█' * round(50 * count / counts.max())}")


if __name__ == "__main__":
    run_main(main)
