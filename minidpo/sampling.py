"""Samples completions in batches, with a key/value cache, from prompts of different lengths.

Two models, one prompt:  python -m minidpo.sampling --run runs/toy/sft --run runs/toy/dpo --prompt "This film"

Rows are padded on the left, so that their next tokens share a column. (Training pads on the right.)
"""

import contextlib
import dataclasses
import textwrap

import torch
from tqdm import tqdm

from minidpo import checkpoint
from minidpo.device import DEVICES, pick_device
from minidpo.settings import UserError, knob, parse_settings, run_main


class Cache:
    """Keys and values of all tokens so far, for B left-padded rows.

    The model asks `start` for the positions of new tokens. Then each attention layer asks `extend` for all keys and
    values, with the mask that hides padding.
    """

    def __init__(self, pad, capacity, block_size):
        self.pad = pad  # (B,): columns of padding at the start of each row
        self.capacity = capacity  # number of columns: longest prompt + new tokens
        self.block_size = block_size  # number of positions that the model has
        self.length = 0  # columns filled so far
        self.layers = {}  # attention layer -> (keys, values), each (B, H, capacity, C / H)

    def start(self, ids):
        """New ids (B, T) -> their positions (B, T). Padding does not count."""
        begin, self.length = self.length, self.length + ids.shape[1]
        self.new = slice(begin, self.length)
        query = torch.arange(begin, self.length, device=ids.device)
        key = torch.arange(self.length, device=ids.device)
        real = key >= self.pad[:, None, None]  # (B, 1, length)
        causal = key <= query[:, None]  # (T, length)
        itself = key == query[:, None]  # padding sees itself: a softmax over nothing would be NaN
        self.mask = ((real & causal) | itself)[:, None]  # (B, 1, T, length), one for all heads
        # padding and finished rows beyond the context have no position: any valid one will do
        return (query - self.pad[:, None]).clamp(0, self.block_size - 1)

    def extend(self, layer, k, v):
        """Appends k, v (B, H, T, C/H). Returns all keys, all values (B, H, length, C/H) and the mask."""
        if layer not in self.layers:
            B, H, _, D = k.shape
            self.layers[layer] = k.new_zeros(B, H, self.capacity, D), v.new_zeros(B, H, self.capacity, D)
        keys, values = self.layers[layer]
        keys[:, :, self.new], values[:, :, self.new] = k, v
        return keys[:, :, : self.length], values[:, :, : self.length], self.mask

    def keep(self, rows):
        """Keeps only `rows` (indices), so that finished rows cost nothing."""
        self.pad = self.pad[rows]
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}


def truncate(logits, top_k=None, top_p=None):
    """Sets logits (B, V) to -inf outside the k best, and outside the fewest tokens whose probabilities sum to >= p.

    Top-p is from Holtzman et al. 2020. Truncation changes the distribution: never measure a KL on such samples.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # probability of all better tokens; the best token always stays
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), -torch.inf)
    return logits


@torch.no_grad()
def generate(
    model, prompts, max_new_tokens, eot, temperature=1.0, top_k=None, top_p=None, generator=None,
    batch_size=256, progress=None,
):  # fmt: skip
    """Samples one completion of each prompt.

    prompts: list of lists of ids, of any lengths, each with its leading eot. Returns the new ids of each; the last one
    is eot if the response ended. A completion has at most max_new_tokens, and stops where the context is full: prompt +
    new - 1 <= block_size, since the last new token is never fed back. Temperature 0 is greedy. `generator` must be on
    the model's device. `batch_size` (rows at a time) changes samples by rounding only. `progress` names a progress
    bar. Raises UserError for a prompt that is empty or too long, and for a knob out of its range.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature}: must be at least 0 (greedy) and finite.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k}: must be at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: must be above 0 and at most 1.")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= model.config.block_size:
            how = "Shorten it (from the left)." if prompt else "It needs at least the eot."
            context = f"the model's context holds 1 to {model.config.block_size}"
            raise UserError(f"prompt {i} has {len(prompt)} tokens; {context}. {how}")
    was_training = model.training
    model.eval()
    completions = []
    wide = torch.float32 if model.wte.weight.is_mps else torch.float64  # more exact sums of p; MPS has no float64
    # each completion has random numbers of its own, so that it does not depend on the others of its batch
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator, device=model.wte.weight.device, dtype=wide)
    for i in tqdm(range(0, len(prompts), batch_size), desc=progress, unit="batch", disable=progress is None):
        batch = slice(i, i + batch_size)
        completions += _generate_batch(model, prompts[batch], uniform[batch], eot, temperature, top_k, top_p)
    model.train(was_training)
    return completions


def _generate_batch(model, prompts, uniform, eot, temperature, top_k, top_p):
    device, max_new_tokens = uniform.device, uniform.shape[1]
    longest = max(len(p) for p in prompts)
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    limits = [min(max_new_tokens, model.config.block_size - len(p) + 1) for p in prompts]
    cache = Cache(pad, longest + max(limits), model.config.block_size)
    completions = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # rows[j]: which prompt row j continues
    live = [max_new_tokens > 0 for _ in rows]
    while any(live):
        logits = model.logits(model.hidden(ids, cache)[:, -1]).float()  # (rows, V)
        if temperature < 1e-6:  # logits / temperature would overflow
            new = logits.argmax(-1)
        else:
            p = truncate(logits / temperature, top_k, top_p).softmax(-1)
            sums = p.cumsum(-1, dtype=uniform.dtype)
            number = uniform[rows, cache.length - longest, None] * sums[:, -1:]  # column: tokens made so far
            new = (sums[:, :-1] <= number).sum(-1)  # the first token whose sum is larger than the number
        for j, token in enumerate(new.tolist()):
            if live[j]:
                completions[rows[j]].append(token)
                live[j] = token != eot and len(completions[rows[j]]) < limits[rows[j]]
        if sum(live) <= len(live) // 2:  # copying the cache costs more than a few idle rows
            kept = [j for j, alive in enumerate(live) if alive]
            rows, live = [rows[j] for j in kept], [True] * len(kept)
            cache.keep(kept)
            new = new[kept]
        ids = new[:, None]
    return completions


def complete(model, tokenizer, prompts, max_new_tokens, seed, **knobs):
    """As `generate`, but returns texts. A text that did not end in eot gets " ...".

    It has a generator of its own, so sampling does not change the training.
    """
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    completions = generate(model, prompts, max_new_tokens, tokenizer.eot, generator=generator, **knobs)
    return [tokenizer.decode(ids) + ("" if ids[-1:] == [tokenizer.eot] else " ...") for ids in completions]


@dataclasses.dataclass
class Settings:
    run: list = knob(dataclasses.MISSING, "a run folder, a GPT-2 folder or name; may be repeated")
    prompt: list = knob(None, "text to complete; may be repeated; without it, prompts are read from the keyboard")
    samples: int = knob(1, "completions per prompt", least=1)
    max_new_tokens: int = knob(64, "longest completion, in tokens")
    temperature: float = knob(1.0, "0 is greedy")
    top_k: int = knob(0, "sample from the k most probable tokens only; 0: all")
    top_p: float = knob(1.0, "sample from the most probable tokens up to a total probability of p; 1: all")
    seed: int = knob(0, "seed of the sampling")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)


def main():
    settings = parse_settings(Settings, "Completions by one model, or by several side by side.")
    device = pick_device(settings.device)
    runs = [(folder, *checkpoint.load(folder)[:2]) for folder in settings.run]
    knobs = dict(temperature=settings.temperature, top_k=settings.top_k or None, top_p=settings.top_p)
    for prompt in settings.prompt or typed_prompts():
        print(f"prompt: {prompt}")
        for folder, model, tokenizer in runs:
            prompts = [[tokenizer.eot, *tokenizer.encode(prompt)]] * settings.samples
            for text in complete(model.to(device), tokenizer, prompts, settings.max_new_tokens, settings.seed, **knobs):
                print(textwrap.fill(f"{folder}: {prompt}{text}", 100, initial_indent="  ", subsequent_indent="      "))


def typed_prompts():
    """Yields prompts from the keyboard until an empty line or the end of the input."""
    with contextlib.suppress(EOFError):
        while prompt := input("prompt (empty to leave): "):
            yield prompt


if __name__ == "__main__":
    run_main(main)
