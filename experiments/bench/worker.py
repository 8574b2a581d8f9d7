"""One process of the benchmark: one implementation makes a few training steps of DPO.

    python -m experiments.bench_worker '{"implementation": "minidpo", "folder": ..., ...}'

Nobody types this: `bench.child` does, so that each implementation has a process, and its memory, to itself. The last
line of the output is JSON. Read `RUNNERS` at the end, then the runners. All of them start from the weights in the same
folder, see the same pairs in the same order, and have the same loss, clipping and AdamW (PyTorch's, fused): their
losses must agree.
"""

import importlib.metadata
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from minidpo.model import GPT, GPTConfig
from minidpo.scale.weights import load_pretrained, save_pretrained

BETA, CLIP, BETAS = 0.1, 1.0, (0.9, 0.99)  # the last are AdamW's, those of minidpo.optim


def random_pairs(work):
    """The pairs (prompt_ids, chosen_ids, rejected_ids) of work["batches"] batches, of random ids.

    work: "pairs" in a batch, "prompt" and "response" the least and most ids, "model" the fields of GPTConfig. The last
    id of the vocabulary stands for the end-of-text: it opens each prompt and ends each response, beyond these counts.
    """
    draw, eot = random.Random(0), work["model"]["vocab_size"] - 1

    def ids(bounds):
        return [draw.randrange(eot) for _ in range(draw.randint(*bounds))]

    return [
        ([eot, *ids(work["prompt"])], [*ids(work["response"]), eot], [*ids(work["response"]), eot])
        for _ in range(work["batches"] * work["pairs"])
    ]


def batch_of(step, work):
    """The places in `random_pairs` of the pairs of a step: the batches are visited in turn, so that pairs come back."""
    first = step % work["batches"] * work["pairs"]
    return list(range(first, first + work["pairs"]))


def resident_mb(field):
    """Resident memory of this process in MB (1e6 bytes); field "VmRSS": now, "VmHWM": at its peak.

    ru_maxrss will not do on Linux: it survives exec, so that a small child reports the size of its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024 / 1e6
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: bytes, and the peak is all there is


class Clock:
    """Seconds and loss of each step; memory before the model is there, and its peak over the timed steps."""

    def __init__(self, warmup):
        self.warmup, self.seconds, self.losses = warmup, [], []
        self.libraries_mb = self.state_mb = self.peak_mb = None

    def imported(self):
        """What the libraries take is in memory, the model is not yet."""
        self.libraries_mb = resident_mb("VmRSS")

    def loaded(self, policy):
        """What a step cannot do without: fp32 weights, their gradients, and AdamW's two moments."""
        self.state_mb = 4 * 4 * sum(weight.numel() for weight in policy.parameters()) / 1e6

    def start(self):
        peak = Path("/proc/self/clear_refs")
        if len(self.seconds) == self.warmup and peak.exists():  # elsewhere than on Linux: the peak of the whole process
            peak.write_text("5", encoding="utf-8")  # sets VmHWM to what is resident now
        self.started = time.perf_counter()

    def stop(self, loss):
        self.seconds.append(time.perf_counter() - self.started)
        self.losses.append(loss)
        self.peak_mb = resident_mb("VmHWM")


# ---- the implementations ----


def minidpo(work, rows, clock, fast):
    """`train_dpo.train_step` as the training loop calls it: the batch is made and the metrics are read in the time."""
    import train_dpo
    from minidpo.optim import make_optimizer

    clock.imported()
    policy = load_pretrained(work["folder"])
    policy.set_dropout(0.0)
    policy.train()
    clock.loaded(policy)
    settings = train_dpo.Settings(
        data="", init="", out="", device="cpu", dtype=work["dtype"], batch_size=work["pairs"],
        beta=BETA, grad_clip=CLIP, fast=fast,
    )  # fmt: skip
    reference = train_dpo.reference_logps(policy, rows, settings)
    optimizer = make_optimizer(policy, "adamw", work["lr"])
    for step in range(work["steps"]):
        clock.start()
        metrics = train_dpo.train_step(policy, optimizer, rows, reference, batch_of(step, work), settings)
        clock.stop(metrics["loss"])


def attention(work):
    """The faster of transformers' ways on a CPU: "sdpa", but for short rows in bf16, where its backward is slow."""
    short = work["prompt"][1] + work["response"][1] < 128
    return "eager" if work["dtype"] == "bfloat16" and short else "sdpa"


def trl(work, rows, clock, precomputed):
    """TRL's DPOTrainer in its own training loop, which decides how its model, optimiser and precision are set up.

    A step is timed from the loop's on_step_begin to its on_step_end: making the batch is not counted, and logging,
    saving and gradient checkpointing are off. The rest is TRL's default: its head scores response tokens only, in
    tiles, and keeps no logits.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # ids already

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def training_step(self, *args, **kwargs):
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    class Timer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop(trainer.last_loss.item())

    clock.imported()
    policy = AutoModelForCausalLM.from_pretrained(work["folder"], attn_implementation=attention(work))
    clock.loaded(policy)
    last = work["model"]["vocab_size"] - 1  # the trainer wants a tokenizer, for the id to pad with
    vocabulary = models.WordLevel({str(i): i for i in range(last + 1)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(vocabulary), eos_token=str(last), pad_token=str(last)
    )
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            max_steps=work["steps"],
            per_device_train_batch_size=work["pairs"],
            precompute_ref_log_probs=precomputed,
            precompute_ref_batch_size=work["pairs"],
            beta=BETA,
            optim="adamw_torch_fused",
            learning_rate=work["lr"],
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=CLIP,
            bf16=work["dtype"] == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=False,
            disable_dropout=True,
            max_length=None,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
        )
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        dataset = Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])
        trainer = Timed(model=policy, args=config, train_dataset=dataset, processing_class=tokenizer)
        trainer.add_callback(Timer())
        trainer.train()


def hf_plain(work, rows, clock):
    """What one writes first with transformers: chosen and rejected padded together, one forward of each model."""
    from transformers import AutoModelForCausalLM

    clock.imported()

    def load():
        model = AutoModelForCausalLM.from_pretrained(work["folder"], attn_implementation=attention(work))
        model.config.use_cache = False
        return model.eval()  # no dropout

    policy, reference = load(), load().requires_grad_(False)
    clock.loaded(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=work["lr"], betas=BETAS, weight_decay=0.0, fused=True)

    def logps(model, ids, attention_mask, scored):
        with torch.autocast("cpu", torch.bfloat16, enabled=work["dtype"] == "bfloat16"):
            logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (each * scored[:, 1:]).sum(-1)

    for step in range(work["steps"]):
        clock.start()
        pairs = [rows[i] for i in batch_of(step, work)]
        sides = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]
        length = max(len(prompt) + len(response) for prompt, response in sides)
        ids, attention_mask, scored = torch.zeros(3, len(sides), length, dtype=torch.long)
        for i, (prompt, response) in enumerate(sides):
            n = len(prompt) + len(response)
            ids[i, :n] = torch.tensor(prompt + response)
            attention_mask[i, :n] = 1
            scored[i, len(prompt) : n] = 1
        with torch.no_grad():
            reference_logps = logps(reference, ids, attention_mask, scored)
        ratios = logps(policy, ids, attention_mask, scored) - reference_logps
        chosen, rejected = ratios.chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop(loss.item())


@torch.no_grad()
def matmul_floor(work, rows, clock):
    """The matrix products of a step alone, at the shapes of the fast path.

    The linear layers of the blocks run on each prompt once and on both responses, without padding; after the last
    attention, and in the head, on the scored positions. One product forward, two backward; operands in `dtype` already,
    results into memory that is there. Attention's own products are not counted, nor anything else a step has to do.
    """
    C, V, L = (work["model"][name] for name in ("n_embd", "vocab_size", "n_layer"))
    dtype = getattr(torch, work["dtype"])
    clock.imported()
    after_attention = [(C, C), (C, 4 * C), (4 * C, C)]
    layers = [((C, 3 * C), "tokens"), *((width, "tokens") for width in after_attention)] * (L - 1)
    layers += [((C, 3 * C), "tokens"), *((width, "scored") for width in after_attention), ((C, V), "scored")]
    weights = [torch.randn(n_out, n_in).to(dtype) for (n_in, n_out), _ in layers]
    operands_of = []  # of each batch: x, dy of each kind of layer, and where the products go
    for i in range(work["batches"]):
        pairs = [rows[j] for j in batch_of(i, work)]
        n = {
            "tokens": sum(len(prompt) + len(chosen) + len(rejected) - 2 for prompt, chosen, rejected in pairs),
            "scored": sum(len(chosen) + len(rejected) for _, chosen, rejected in pairs),
        }
        operands_of.append(
            {
                ((n_in, n_out), kind): [torch.randn(n[kind], n_in).to(dtype), torch.randn(n[kind], n_out).to(dtype)]
                + [torch.empty(size, dtype=dtype) for size in ((n[kind], n_out), (n[kind], n_in), (n_out, n_in))]
                for (n_in, n_out), kind in set(layers)
            }
        )
    for step in range(work["steps"]):
        operands = operands_of[step % work["batches"]]
        clock.start()
        for layer, w in zip(layers, weights, strict=True):
            x, _, y, _, _ = operands[layer]
            torch.mm(x, w.T, out=y)
        for layer, w in zip(reversed(layers), reversed(weights), strict=True):
            x, dy, _, dx, dw = operands[layer]
            torch.mm(dy, w, out=dx)
            torch.mm(dy.T, x, out=dw)
        clock.stop(None)


def matmul_rate(work, rows, clock):
    """Square products, for the rate of the machine: one a step, 2 work["size"]^3 floating-point operations each."""
    a, b = torch.randn(2, work["size"], work["size"]).to(getattr(torch, work["dtype"]))
    out = torch.empty_like(a)
    for _ in range(work["steps"]):
        clock.start()
        torch.mm(a, b, out=out)
        clock.stop(None)


RUNNERS = {
    "minidpo": lambda *args: minidpo(*args, fast=True),
    "minidpo-plain": lambda *args: minidpo(*args, fast=False),
    "trl-precomputed": lambda *args: trl(*args, precomputed=True),
    "trl": lambda *args: trl(*args, precomputed=False),
    "hf-plain": hf_plain,
    "matmul-floor": matmul_floor,
    "matmul-rate": matmul_rate,
}


def make_weights(work):
    """Random weights of GPT-2's kind in work["folder"], in Hugging Face's layout."""
    save_pretrained(GPT(GPTConfig(**work["model"]), torch.Generator().manual_seed(0)), work["folder"])


def machine():
    """What the figures depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in ("torch", "transformers", "trl"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"cpu": names[0] if names else platform.machine(), "threads": torch.get_num_threads(), "versions": versions}


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets this process finish
    work = json.loads(sys.argv[1])
    if work["implementation"] == "weights":
        return make_weights(work)
    if work["threads"]:
        torch.set_num_threads(work["threads"])
    torch.manual_seed(0)
    if "without" in work:  # experiments.ablation's
        from experiments.bench.ablation import WITHOUT

        WITHOUT[work["without"]]()
    clock = Clock(work["warmup"])
    RUNNERS[work["implementation"]](work, random_pairs(work) if "pairs" in work else [], clock)
    measured = {name: value for name, value in vars(clock).items() if name not in ("started", "warmup")}
    print(json.dumps({**measured, **machine()}), flush=True)
    os._exit(0)  # what was wanted is out: no time for other people's clean-up


if __name__ == "__main__":
    main()
