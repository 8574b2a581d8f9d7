"""One process of the benchmark: one implementation makes a few training steps of DPO or SFT.

`measure.child` starts it, so that each implementation has a process, and its memory, to itself. The last line of the
output is JSON. Read `RUNNERS`, then the runners. All of them load the same weights, see the same pairs (SFT: rows) in
the same order, and have the same loss, gradient clipping and optimizer (PyTorch's): their losses must agree.
"""

import gc
import importlib.metadata
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import train_dpo
import train_sft
from experiments.bench.ablation import WITHOUT
from experiments.bench.shapes import IMPLEMENTATIONS, batch_of, random_pairs
from minidpo.device import autocast, pick_dtype
from minidpo.model import GPT, GPTConfig
from minidpo.optim import make_optimizer
from minidpo.scale import fast, memory
from minidpo.scale.weights import load_pretrained, save_pretrained
from minidpo.settings import UserError

BETA, CLIP, BETAS = train_dpo.Settings.beta, 1.0, (0.9, 0.99)  # BETAS are AdamW's, those of minidpo.optim

# ---- Time and memory ----


def memory_mb(device, peak=False):
    """Returns the memory in use, or its peak since `forget_peak`, in MB: PyTorch's on CUDA, all resident on a CPU."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e6
    # not ru_maxrss on Linux: it survives exec, so that a small child reports the size of its parent
    status, field = Path("/proc/self/status"), "VmHWM" if peak else "VmRSS"
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024 / 1e6
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: bytes, and always the peak


def forget_peak(device):
    """Sets the peak of memory to what is in use now. Does nothing on a CPU without Linux."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5", encoding="utf-8")


class Clock:
    """Seconds and loss of each step, and memory: before the model is loaded, and its peak over the timed steps."""

    def __init__(self, work):
        self.work, self.device = work, work["device"]
        self.measured = {"seconds": [], "losses": []}

    def imported(self):  # and no model is loaded yet
        self.measured["libraries_mb"] = memory_mb(self.device)

    def loaded(self, policy):
        copies = {"adamw": 4, "rmsprop": 3}[self.work["optimizer"]]  # weights, gradients and optimizer state, in fp32
        self.measured["state_mb"] = 4 * copies * sum(weight.numel() for weight in policy.parameters()) / 1e6

    def start(self):
        if len(self.measured["seconds"]) == self.work["warmup"]:
            forget_peak(self.device)
        self.started = self.now()

    def stop(self, loss):
        self.measured["seconds"].append(self.now() - self.started)
        self.measured["losses"].append(loss)
        self.measured["peak_mb"] = memory_mb(self.device, peak=True)

    def now(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


# ---- The implementations ----


def train_settings(work, micro_batch):
    """Returns the settings of the script for this work."""
    return (train_sft if work.get("sft") else train_dpo).Settings(
        data="", init="", out="", device=work["device"], dtype=work["dtype"], optimizer=work["optimizer"],
        batch_size=work["pairs"], micro_batch_size=micro_batch, grad_clip=CLIP, **work.get("flags", {}),
    )  # fmt: skip


def minidpo(work, pairs, clock, micro_batch):
    """The script's `train_step` as its loop calls it: making the batch and reading the metrics are timed too."""
    clock.imported()
    settings = train_settings(work, micro_batch)
    if settings.fast:
        fast.keep_freed_memory()
    policy = load_pretrained(work["folder"]).to(work["device"])
    policy.prepare(settings.compile, settings.recompute).train()
    clock.loaded(policy)
    clock.measured["plan_mb"] = memory.plan(policy.config, pairs, settings).peak / 1e6
    script, inputs = train_sft, [pairs]
    if not work.get("sft"):
        script, inputs = train_dpo, [pairs, train_dpo.reference_logps(policy, pairs, settings)]
    optimizer = make_optimizer(policy, settings.optimizer, work["lr"])
    for step in range(work["steps"]):
        clock.start()
        metrics = script.train_step(policy, optimizer, *inputs, batch_of(step, work), settings)
        clock.stop(metrics["loss"])


def attention(work):
    """Returns the faster attention of transformers. The backward of sdpa is slow for short rows in bf16 on a CPU."""
    short = work["prompt"][1] + work["response"][1] < 256
    return "eager" if work["device"] == "cpu" and work["dtype"] == "bfloat16" and short else "sdpa"


def trl_trainer(work, pairs, clock, micro_batch, precomputed):
    """TRL's DPOTrainer with its own training loop, without logging, saving and gradient checkpointing."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # ids already

        def _get_train_sampler(self, *_):
            return None  # the pairs in their order

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)  # of one micro-batch, divided by their number
            self.step_loss += loss
            return loss

    class Timer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            trainer.step_loss = 0.0
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop(trainer.step_loss.item())

    clock.imported()
    policy = AutoModelForCausalLM.from_pretrained(work["folder"], attn_implementation=attention(work))
    clock.loaded(policy)
    last = work["model"]["vocab_size"] - 1  # the trainer takes the id of padding from a tokenizer
    words = Tokenizer(models.WordLevel({str(i): i for i in range(last + 1)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(last), pad_token=str(last))
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_list([dict(zip(columns, pair, strict=True)) for pair in pairs])
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, report_to=[], logging_strategy="no", save_strategy="no", max_steps=work["steps"],
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=work["pairs"] // micro_batch,
            precompute_ref_log_probs=precomputed, precompute_ref_batch_size=micro_batch, max_length=None,
            beta=BETA, disable_dropout=True, gradient_checkpointing=False, max_grad_norm=CLIP, weight_decay=0.0,
            optim={"adamw": "adamw_torch_fused", "rmsprop": "rmsprop"}[work["optimizer"]], adam_beta1=BETAS[0],
            adam_beta2=BETAS[1], learning_rate=work["lr"], lr_scheduler_type="constant",
            bf16=work["dtype"] == "bfloat16", use_cpu=work["device"] == "cpu", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Timed(model=policy, args=config, train_dataset=dataset, processing_class=tokenizer)
        trainer.add_callback(Timer())
        return trainer


def hf_logps(model, pairs, device, dtype):
    """Log-probabilities (R,) of a transformers model: of the chosen, then the rejected responses, or of SFT's rows."""

    def padded(rows):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)

    rows = [(pair[0], pair[side]) for side in range(1, len(pairs[0])) for pair in pairs]
    ids = padded([prompt + response for prompt, response in rows])
    real = padded([[1] * len(prompt + response) for prompt, response in rows])
    scored = padded([[0] * len(prompt) + [1] * len(response) for prompt, response in rows])
    with autocast(device, dtype):
        logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (each * scored[:, 1:]).sum(-1)


def hf_plain(work, pairs, clock, _):
    """A first version with transformers: all rows of a step padded together, one forward pass of each model."""
    from transformers import AutoModelForCausalLM

    clock.imported()
    device, kernel = work["device"], attention(work)
    policy, *reference = (
        AutoModelForCausalLM.from_pretrained(work["folder"], attn_implementation=kernel).to(device).eval()  # no dropout
        for _ in range(1 if work.get("sft") else 2)
    )
    clock.loaded(policy)
    optimizer = make_optimizer(policy, work["optimizer"], work["lr"])
    for step in range(work["steps"]):
        clock.start()
        batch = [pairs[i] for i in batch_of(step, work)], device, work["dtype"]
        if work.get("sft"):
            loss = -hf_logps(policy, *batch).sum() / sum(len(response) for _, response in batch[0])
        else:
            with torch.no_grad():
                reference_logps = hf_logps(*reference, *batch)
            chosen, rejected = (hf_logps(policy, *batch) - reference_logps).chunk(2)
            loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop(loss.item())


def matmul_rate(work, _, clock, __):
    """Square products, for the rate of the machine: one per step, 2 work["size"]^3 floating-point operations each."""
    a, b = torch.randn(2, work["size"], work["size"], dtype=getattr(torch, work["dtype"]))
    out = torch.empty_like(a)
    for _ in range(work["steps"]):
        clock.start()
        torch.mm(a, b, out=out)
        clock.stop(None)


RUNNERS = {
    **{name: minidpo for name in IMPLEMENTATIONS if name.startswith("minidpo")},
    "trl-precomputed": lambda *args: trl_trainer(*args, precomputed=True).train(),
    "trl": lambda *args: trl_trainer(*args, precomputed=False).train(),
    "hf-plain": hf_plain,
    "matmul-rate": matmul_rate,
}

# ---- The process ----


def pairs_at_once(work, room):
    """Returns the numbers of pairs per forward pass that are worth a try, largest first; they divide a step's pairs.

    room: free memory in bytes, or None. By the memory plan, each of them stays below three quarters of it.
    """
    if "micro_batch" in work:
        return [work["micro_batch"]]
    divisors = [n for n in range(work["pairs"], 0, -1) if work["pairs"] % n == 0]
    if room is None:
        return divisors
    config, pairs = GPTConfig(**work["model"]), random_pairs(work)
    peaks = {n: memory.plan(config, pairs, train_settings(work, n)).peak for n in divisors}
    return [n for n in divisors if peaks[n] <= 0.75 * room] or [1]


def measure(work):
    """Runs one implementation -> what it measured, by name; an "error" in its place if it does not fit."""
    if work["without"]:
        WITHOUT[work["without"]]()
    pairs = random_pairs(work) if "pairs" in work else []
    room = torch.cuda.mem_get_info()[0] if work["device"] == "cuda" else None
    for micro_batch in pairs_at_once(work, room) if pairs else [0]:
        clock = Clock(work)
        try:
            RUNNERS[work["implementation"]](work, pairs, clock, micro_batch)
            return {**clock.measured, "micro_batch": micro_batch}
        except torch.OutOfMemoryError as error:
            failed = {"error": f"OutOfMemoryError: {str(error).partition('.')[0]}", "micro_batch": micro_batch}
        gc.collect()  # then try fewer pairs at once
        torch.cuda.empty_cache()
    return failed


def machine(device):
    """Returns what the numbers depend on besides the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    card = torch.cuda.get_device_name() if device == "cuda" else None
    packages = [p for p in importlib.metadata.distributions() if p.name in ("torch", "transformers", "trl")]
    versions = dict(sorted((package.name, package.version) for package in packages))
    return dict(cpu=cpu, card=card, threads=torch.get_num_threads(), versions=versions)


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets this process finish
    work = json.loads(sys.argv[1])
    if work["implementation"] == "weights":  # random weights of GPT-2's kind, in Hugging Face's layout
        model = GPT(GPTConfig(**work["model"]), torch.Generator().manual_seed(0))
        return save_pretrained(model, work["folder"])
    if work["threads"]:
        torch.set_num_threads(work["threads"])
    torch.manual_seed(0)
    if pick_dtype(work["dtype"], work["device"], n_embd=0) != work["dtype"]:
        raise UserError("this card has no bfloat16. Take --dtypes float32.")
    print(json.dumps({**measure(work), **machine(work["device"])}), flush=True)
    os._exit(0)  # without the clean-up of the libraries, which takes seconds


if __name__ == "__main__":
    main()
