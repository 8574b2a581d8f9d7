r"""How fast and how lean training is on one device: GPT-2's four sizes with random weights of the right shape.

    python -m experiments.bench.gpu --out gpu.json            # on a GPU: everything, in less than 8 minutes
    python -m experiments.bench.gpu --out cpu.json --presets gpt2-large --shapes full --runs lean-rmsprop \
        --length 64 --batch-size 2 --steps 1            # one run, short rows: on a CPU the memory of one is its own

A run is the training step of train_dpo.py (log-probabilities, loss, backward, clipping, optimiser) on pairs of random
ids in one shape; the reference's log-probabilities are constants, as they are in training. What is measured is written
after each run: a size that does not fit, or time that runs out, is noted in its place and costs nothing before it.

    MFU = (6 x block parameters x tokens + 6 L C x sum of squared lengths + 6 V C x response tokens) / seconds / peak

the matrix products of forward and backward that have to be done, over what the chip could do of them in bf16
(`PEAK_FLOPS`). Attention counts its causal half. Neither recomputation nor padding counts as work, and the prompt of a
pair counts once where it is run through the model once.
"""

import dataclasses
import gc
import json
import random
import re
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import train_dpo
from minidpo.device import DEVICES, DTYPES, pick_device, pick_dtype
from minidpo.files import atomic_write
from minidpo.model import GPT, PRESETS, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.scale import memory
from minidpo.settings import knob, parse_settings, run_main, unknown

GIB = 2**30
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bf16, by a part of the card's name

# prompt and responses, shortest and longest, in tokens, for rows of 512; "full" fills them
SHAPES = {"full": ((256, 256), (256, 256)), "summaries": ((350, 350), (25, 45)), "reviews": ((4, 8), (32, 64))}

# Knobs of train_dpo.py. The lean runs take pairs one by one, and few of them: their memory does not depend on how many.
# The others take as many at once as the plan allows.
RUNS = {
    "fast-compiled": dict(fast=True, compile=True),
    "trl": dict(),
    "fast": dict(fast=True),
    "plain": dict(),
    "lean-rmsprop": dict(fast=True, recompute=True, optimizer="rmsprop", micro_batch_size=1),
    "lean-adamw": dict(fast=True, recompute=True, optimizer="adamw", micro_batch_size=1),
}
LEAN_PAIRS = 8

# what is to be reached with gpt2-large: figure, run (empty: the fastest of ours), shape, at most or at least
TARGETS = [
    ("peak_gib", "lean-rmsprop", "full", "at most", 12),
    ("peak_gib", "lean-adamw", "full", "at most", 15),
    ("mfu", "", "full", "at least", 0.45),
    ("times_trl", "", "summaries", "at least", 2),
    ("times_trl", "", "reviews", "at least", 1.3),
]


@dataclasses.dataclass
class Settings:
    out: str = knob(dataclasses.MISSING, "the JSON file to write; the table goes beside it, as .md")
    presets: str = knob("gpt2-large,gpt2,gpt2-medium,gpt2-xl", "model shapes, the most important first")
    shapes: str = knob(",".join(SHAPES), "shapes of pairs; the lean runs take the first only")
    runs: str = knob(",".join(RUNS), "what to measure, the most important first")
    optimizer: str = knob("rmsprop", "of the runs whose name has none", choices=("rmsprop", "adamw"))
    length: int = knob(512, "longest row, in tokens; shorter ones are in proportion", least=32)
    batch_size: int = knob(64, "pairs per optimiser step", least=1)
    micro_batch_size: int = knob(0, "pairs at once, except in the lean runs; 0: as many as the plan allows")
    steps: int = knob(3, "timed steps of each run, after one that is not", least=1)
    seconds: float = knob(400.0, "no run begins and no step is repeated after so many, shared out among the presets")
    seed: int = knob(0, "of weights and pairs")
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    dtype: str = knob("auto", "precision of the matrix products", choices=DTYPES)


def random_pairs(shape, length, n, vocab_size, seed):
    """n pairs of random ids, as `data.preference_batch` takes them, in a shape of SHAPES scaled to rows of `length`."""
    generator = random.Random(seed)

    def ids(bounds):
        shortest, longest = (max(1, bound * length // 512) for bound in bounds)
        return [generator.randrange(vocab_size) for _ in range(generator.randint(shortest, longest))]

    prompt, response = SHAPES[shape]
    return [(ids(prompt), ids(response) + [0], ids(response) + [0]) for _ in range(n)]  # 0 in the place of the eot


def flops(config, rows, shared):
    """Floating-point operations that one training step on `rows` has to do; `shared`: the prompt is run once."""
    tokens = squares = scored = 0
    for prompt, *responses in rows:
        for response in responses:
            n = len(prompt) + len(response) - 1
            tokens += n
            squares += n * n
            scored += len(response)
        if shared:
            tokens -= len(prompt)
            squares -= len(prompt) ** 2
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    blocks = L * (12 * C * C + 13 * C)  # parameters: 4 C^2 in attention, 8 C^2 in the MLP; biases and LayerNorms
    return 6 * blocks * tokens + 6 * L * C * squares + 6 * V * C * scored


class Peak:
    """`with Peak(device) as peak:` ... `peak.bytes`: the most that was held at once, beyond what was held before.

    On CUDA what PyTorch allocated; on Linux the process's resident memory; elsewhere None.
    """

    def __init__(self, device):
        self.device, self.bytes = device, None

    def __enter__(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
            self.before = _resident("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif hasattr(self, "before"):
            self.bytes = _resident("VmHWM") - self.before


def _resident(name):
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])


def chip(device):
    """The card's name."""
    return torch.cuda.get_device_name() if device == "cuda" else ""


def planned(config, rows, knobs):
    """The memory.Plan of a run, its largest micro-batch made of the longest of the rows."""
    longest = sorted(rows, key=lambda row: sum(map(len, row)))[-(knobs.micro_batch_size or len(rows)) :]
    return memory.plan(config, longest, knobs, accumulate=len(longest) < len(rows))


def pairs_at_once(config, rows, knobs):
    """The largest of n, n / 2, n / 4, ... pairs with which the plan stays below three quarters of what is free."""
    room = memory.available(knobs.device) or 16 * GIB
    n = len(rows)
    while n > 1 and planned(config, rows, dataclasses.replace(knobs, micro_batch_size=n)).peak > 0.75 * room:
        n //= 2
    return n


def ours(config, rows, knobs, steps, until):
    """Seconds of each step of train_dpo.py, the first included: 1 + steps, or, if it is later than `until`, two."""
    torch.compiler.reset()  # it refuses to compile one function for ever more shapes
    torch.manual_seed(knobs.seed)
    with torch.device(knobs.device):
        policy = GPT(config).prepare(knobs.compile, knobs.recompute)
    optimizer = make_optimizer(policy, knobs.optimizer, knobs.lr)
    reference = torch.full((len(rows), 2), -100.0)
    seconds = []
    while len(seconds) < 2 or len(seconds) < 1 + steps and time.perf_counter() < until:
        started = time.perf_counter()
        train_dpo.train_step(policy, optimizer, rows, reference, list(range(len(rows))), knobs)
        if knobs.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def trl(config, rows, knobs, steps, until):
    """The same of TRL's DPOTrainer on the same pairs, its reference log-probabilities computed before."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(knobs.seed)
    shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, n_positions=config.block_size)
    drop = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    with torch.device(knobs.device):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, **shape, **drop))
    words = models.WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="0", pad_token="0")
    dataset = Dataset.from_list([dict(prompt_ids=p, chosen_ids=c, rejected_ids=j) for p, c, j in rows])
    micro = knobs.micro_batch_size
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, per_device_train_batch_size=micro, precompute_ref_log_probs=True,
            precompute_ref_batch_size=micro, gradient_checkpointing=False, beta=0.1, learning_rate=1e-6,
            optim={"rmsprop": "rmsprop", "adamw": "adamw_torch_fused"}[knobs.optimizer], bf16=knobs.dtype == "bfloat16",
            use_cpu=knobs.device == "cpu", report_to=[], disable_dropout=True, max_length=None,
            dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        # the rows are token ids already
        with mock.patch.object(DPOTrainer, "_prepare_dataset", lambda self, dataset, *args, **kwargs: dataset):
            trainer = DPOTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
        trainer.create_optimizer_and_scheduler(100)
        trainer.model.train()
        loader = DataLoader(trainer.train_dataset, batch_size=micro, collate_fn=trainer.data_collator)
        trainer.current_gradient_accumulation_steps = len(loader)
        seconds = []
        while len(seconds) < 2 or len(seconds) < 1 + steps and time.perf_counter() < until:
            started = time.perf_counter()
            for batch in loader:
                trainer.training_step(trainer.model, batch)
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 10.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            if knobs.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return seconds


def measure(preset, shape, name, settings, until):
    """One run -> its figures by name; "error" in place of the figures if it does not fit or a package is missing."""
    gc.collect()
    config = GPTConfig.preset(preset)
    config.block_size = max(config.block_size, settings.length)
    options = dict(optimizer=settings.optimizer, micro_batch_size=settings.micro_batch_size) | RUNS[name]
    pairs = min(settings.batch_size, LEAN_PAIRS) if "lean" in name else settings.batch_size
    rows = random_pairs(shape, settings.length, pairs, config.vocab_size, settings.seed)
    knobs = train_dpo.Settings(
        data="", init="", out="", device=settings.device, dtype=settings.dtype, seed=settings.seed, **options
    )
    knobs.micro_batch_size = knobs.micro_batch_size or pairs_at_once(config, rows, knobs)
    result = dict(preset=preset, shape=shape, run=name, optimizer=knobs.optimizer, dtype=knobs.dtype)
    seconds = None
    while seconds is None:
        result["micro_batch"] = knobs.micro_batch_size
        try:
            with Peak(settings.device) as peak:
                seconds = (trl if name == "trl" else ours)(config, rows, knobs, settings.steps, until)
        except (torch.OutOfMemoryError, ImportError) as error:
            if isinstance(error, ImportError) or knobs.micro_batch_size == 1 or time.perf_counter() > until:
                return {**result, "error": f"{type(error).__name__}: {str(error).partition('.')[0]}"}
            knobs.micro_batch_size //= 2
    median = statistics.median(seconds[1:])
    tokens = sum(2 * len(p) + len(c) + len(r) - 2 for p, c, r in rows)
    result |= dict(seconds=median, first_seconds=seconds[0], pairs_per_second=len(rows) / median)
    result |= dict(tokens_per_second=tokens / median, peak_gib=peak.bytes and peak.bytes / GIB)
    if name != "trl":
        result["plan_gib"] = planned(config, rows, knobs).peak / GIB
    if best := next((peak for card, peak in PEAK_FLOPS.items() if card in chip(settings.device)), None):
        result["mfu"] = flops(config, rows, shared=knobs.fast) / median / best
    return result


def reached(results):
    """Of each target, as a line of text, what came of it."""
    lines = []
    for figure, name, shape, bound, target in TARGETS:
        there = {r["run"]: r for r in results if (r["preset"], r["shape"]) == ("gpt2-large", shape) and "seconds" in r}
        candidates = [r for run, r in there.items() if run != "trl" and "lean" not in run]
        best = there.get(name) if name else max(candidates, key=lambda r: r["pairs_per_second"], default=None)
        value = None
        if figure == "times_trl" and best and "trl" in there:
            value = best["pairs_per_second"] / there["trl"]["pairs_per_second"]
        elif best:
            value = best.get(figure)
        met = value is not None and (value <= target if bound == "at most" else value >= target)
        found = "not measured" if value is None else f"{value:.3g}, {'reached' if met else 'MISSED'}"
        name = best["run"] if best else name or "the fastest"
        lines.append(f"- gpt2-large, {shape}, {name}: {figure} {bound} {target}: {found}")
    return "\n".join(lines) + "\n"


def table(results):
    """The results as Markdown."""
    columns = {
        "preset": "preset", "pairs": "shape", "run": "run", "optimiser": "optimizer", "pairs at once": "micro_batch",
        "s/step": "seconds", "pairs/s": "pairs_per_second", "tokens/s": "tokens_per_second", "MFU": "mfu",
        "peak GiB": "peak_gib", "plan GiB": "plan_gib",
    }  # fmt: skip
    formats = {"seconds": ".3f", "pairs_per_second": ".2f", "tokens_per_second": ",.0f", "mfu": ".1%"}
    formats |= {"peak_gib": ".2f", "plan_gib": ".2f"}
    lines = [f"| {' | '.join(columns)} | |", "|" + " --- |" * (len(columns) + 1)]
    for result in results:
        cells = {key: result.get(key) for key in columns.values()}
        shown = ["" if value is None else format(value, formats.get(key, "")) for key, value in cells.items()]
        lines.append(f"| {' | '.join(shown)} | {result.get('error', '')} |")
    return "\n".join(lines) + "\n"


def main():
    started = time.perf_counter()
    settings = parse_settings(Settings, __doc__.split("\n\n")[0])
    settings.device = pick_device(settings.device)
    chosen = {field: getattr(settings, field).split(",") for field in ("presets", "shapes", "runs")}
    for field, valid in (("presets", PRESETS), ("shapes", SHAPES), ("runs", RUNS)):
        for name in chosen[field]:
            if name not in valid:
                raise unknown("--" + field, name, list(valid))
    settings.dtype = pick_dtype(settings.dtype, settings.device, min(PRESETS[p]["n_embd"] for p in chosen["presets"]))

    results = []
    for i, preset in enumerate(chosen["presets"]):
        left = settings.seconds - (time.perf_counter() - started)
        until = time.perf_counter() + left / (len(chosen["presets"]) - i)  # what one preset leaves goes to the next
        lean = [(name, chosen["shapes"][0]) for name in chosen["runs"] if "lean" in name]
        todo = [(name, shape) for shape in chosen["shapes"] for name in chosen["runs"] if "lean" not in name]
        for name, shape in tqdm(todo[:1] + lean + todo[1:], desc=preset, unit="run"):
            if time.perf_counter() > until:
                results.append(dict(preset=preset, shape=shape, run=name, error="no time left for it"))
            else:
                results.append(measure(preset, shape, name, settings, until))
            machine = f"{chip(settings.device) or settings.device}, PyTorch {torch.__version__}"
            written = dict(settings=vars(settings), machine=machine, results=results)
            atomic_write(settings.out, json.dumps(written, indent=1) + "\n")
            targets = f"{reached(results)}\n" if settings.device == "cuda" and settings.length == 512 else ""
            text = f"{table(results)}\n{targets}{time.perf_counter() - started:.0f} seconds, {machine}\n"
            atomic_write(Path(settings.out).with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    run_main(main)
