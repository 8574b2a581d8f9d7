"""Sampling completions: batched, with a key/value cache, for prompts of different lengths; and a command to type at.

    python -m minidpo.sampling --run runs/sft --run runs/dpo --prompt "I watched this film"

Rows are padded on the LEFT here (training pads on the right), so that every row's next token lands in the same column.
"""

import argparse
import textwrap

import torch
from tqdm import tqdm

from minidpo import checkpoint
from minidpo.device import pick_device
from minidpo.settings import UserError, run_main


class Cache:
    """Keys and values of the tokens seen so far, for B left-padded rows.

    `pad` (B,) is how many padding columns each row begins with. The model asks `start` for the positions of new
    tokens, and each attention layer asks `extend` for all keys and values, with the mask that hides padding.
    """

    def __init__(self, pad, capacity, block_size):
        self.pad = pad
        self.capacity = capacity  # columns in all: longest prompt + new tokens
        self.block_size = block_size  # positions in all
        self.length = 0  # columns filled
        self.layers = {}  # attention layer -> (keys, values), each (B, H, capacity, C / H)

    def start(self, ids):
        """New ids (B, T) -> their positions (B, T) in their rows, padding not counted."""
        begin, self.length = self.length, self.length + ids.shape[1]
        self.new = slice(begin, self.length)
        query = torch.arange(begin, self.length, device=ids.device)
        key = torch.arange(self.length, device=ids.device)
        real = key >= self.pad[:, None, None]  # (B, 1, length)
        causal = key <= query[:, None]  # (T, length)
        itself = key == query[:, None]  # a padding column sees at least itself: a softmax over nothing would be NaN
        self.mask = ((real & causal) | itself)[:, None]  # (B, 1, T, length), one for all heads
        # padding has no position, nor has a finished row that idles beyond the context: any valid one will do
        return (query - self.pad[:, None]).clamp(0, self.block_size - 1)

    def extend(self, layer, k, v):
        """Appends k, v (B, H, T, C/H); returns all keys, all values (B, H, length, C/H) and the mask."""
        if layer not in self.layers:
            B, H, _, D = k.shape
            self.layers[layer] = k.new_zeros(B, H, self.capacity, D), v.new_zeros(B, H, self.capacity, D)
        keys, values = self.layers[layer]
        keys[:, :, self.new], values[:, :, self.new] = k, v
        return keys[:, :, : self.length], values[:, :, : self.length], self.mask

    def keep(self, rows):
        """Drops every row but `rows` (indices), so that finished rows cost nothing."""
        self.pad = self.pad[rows]
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}


def truncate(logits, top_k=None, top_p=None):
    """logits (B, V) -> the same, with -inf outside the k best and outside the smallest set of probability >= p.

    Holtzman et al. 2020 for top-p. Truncation changes the distribution: never measure a KL on such samples.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # probability of everything better: the best token is always in
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), -torch.inf)
    return logits


@torch.no_grad()
def generate(
    model, prompts, max_new_tokens, eot, temperature=1.0, top_k=None, top_p=None, generator=None,
    batch_size=256, progress=None,
):  # fmt: skip
    """Samples a completion of each prompt.

    prompts: list of lists of ids, each with its leading eot, of any lengths. Returns the new ids of each, ending in
    eot if the response ended; at most max_new_tokens, and no more than the context holds (prompt + new - 1 <=
    block_size, since the last new token is never fed back). temperature 0 is greedy. `generator` lives on the model's
    device; the same seed, prompts and batch_size give the same samples. `progress` is a text for a progress bar.
    Raises UserError for a prompt that is empty or longer than the context, and for a knob out of its range.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature}: must be at least 0 (greedy) and finite.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k}: must be at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: must be above 0 and at most 1.")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= model.config.block_size:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; the model's context holds 1 to {model.config.block_size}. "
                "Shorten it (from the left)."
            )
    was_training = model.training
    model.eval()
    completions = []
    bar = tqdm(total=len(prompts), desc=progress, unit="sample", disable=progress is None)
    for i in range(0, len(prompts), batch_size):
        batch = prompts[i : i + batch_size]
        completions += _generate_batch(model, batch, max_new_tokens, eot, temperature, top_k, top_p, generator)
        bar.update(len(batch))
    bar.close()
    model.train(was_training)
    return completions


def _generate_batch(model, prompts, max_new_tokens, eot, temperature, top_k, top_p, generator):
    device = model.wte.weight.device
    longest = max(len(p) for p in prompts)
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    limits = [min(max_new_tokens, model.config.block_size - len(p) + 1) for p in prompts]
    cache = Cache(pad, longest + max(limits), model.config.block_size)
    completions = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # rows[j]: which prompt the j-th live row continues
    live = [limits[i] > 0 for i in rows]
    while any(live):
        logits = model.logits(model.hidden(ids, cache)[:, -1]).float()  # (live rows, V)
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            p = truncate(logits / temperature, top_k, top_p).softmax(-1)
            new = torch.multinomial(p, 1, generator=generator)[:, 0]
        for j, token in enumerate(new.tolist()):
            if live[j]:
                completions[rows[j]].append(token)
                live[j] = token != eot and len(completions[rows[j]]) < limits[rows[j]]
        if sum(live) <= len(live) // 2:  # copying the cache costs more than a few idle rows
            kept = [j for j, alive in enumerate(live) if alive]
            rows, live = [rows[j] for j in kept], [True] * len(kept)
            index = torch.tensor(kept, dtype=torch.long, device=device)
            cache.keep(index)
            new = new[index]
        ids = new[:, None]
    return completions


def complete(model, tokenizer, prompts, max_new_tokens, seed, **knobs):
    """As `generate`, but returns texts; one that did not end in eot gets " ...".

    The generator is its own: sampling more or less often changes no training.
    """
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    completions = generate(model, prompts, max_new_tokens, tokenizer.eot, generator=generator, **knobs)
    return [tokenizer.decode(ids) + ("" if ids[-1:] == [tokenizer.eot] else " ...") for ids in completions]


def main():
    parser = argparse.ArgumentParser(description="Completions of one run, or of several side by side.")
    parser.add_argument(
        "--run", action="append", required=True, help="run folder or Hugging Face folder; may be repeated"
    )
    parser.add_argument(
        "--prompt", action="append", help="text to complete; may be repeated (default: ask for prompts)"
    )
    parser.add_argument("--samples", type=int, default=1, help="completions per prompt (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest completion, in tokens (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1.0)")
    parser.add_argument("--top-k", type=int, default=None, help="sample from the k best tokens only (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=None, help="sample from the likeliest tokens up to p (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args()
    device = pick_device(args.device)
    runs = []
    for folder in args.run:
        model, tokenizer, _ = checkpoint.load(folder)
        runs.append((folder, model.to(device), tokenizer))

    for prompt in args.prompt or typed_prompts():
        print(f"prompt: {prompt}")
        for folder, model, tokenizer in runs:
            prompts = [[tokenizer.eot, *tokenizer.encode(prompt)]] * args.samples
            knobs = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
            for text in complete(model, tokenizer, prompts, args.max_new_tokens, args.seed, **knobs):
                print(textwrap.fill(f"{folder}: {prompt}{text}", 100, initial_indent="  ", subsequent_indent="      "))


def typed_prompts():
    """Prompts from the keyboard until an empty line or the end of the input."""
    while True:
        try:
            prompt = input("prompt (empty to leave): ")
        except EOFError:
            return
        if not prompt:
            return
        yield prompt


if __name__ == "__main__":
    run_main(main)
