"""How far bf16 moves the log-probabilities of a trained model, by minidpo, TRL and transformers on the same weights."""

import dataclasses
import tempfile

import torch

import data
import train_dpo
from experiments.bench import worker
from experiments.bench.measure import table
from experiments.common import load_models
from minidpo import dataset
from minidpo.scale import fast
from minidpo.scale.weights import save_pretrained

COLUMNS = {"log-probabilities": "name", "standard deviation": "sd:.4f", "largest": "largest:.4f"}


def logps_in_bf16(run, name, limit=256):
    """Sums per response on the first pairs of a dataset's held-out file -> {implementation: (2N,)}, one entry in fp32.

    `trl` is what DPOTrainer computes for its reference, `hf` is worker.hf_logps.
    """
    from transformers import AutoModelForCausalLM

    (model,), tokenizer = load_models(run)
    records = dataset.read_jsonl(data.find(name, "pairs_test"), dataset.PAIR)[:limit]
    pairs, _ = dataset.encode(records, dataset.PAIR, tokenizer, model.config.block_size)
    longest = max(len(prompt) + len(response) for prompt, *both in pairs for response in both)
    work = dict(
        model=dataclasses.asdict(model.config), device="cpu", dtype="bfloat16", prompt=(0, longest), response=(0, 0),
        pairs=len(pairs), steps=1, warmup=0, lr=0.0, optimizer="adamw",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_pretrained(model, folder)
        work["folder"] = folder
        scored = worker.trl_trainer(work, pairs, worker.Clock(work), 1, precomputed=True).train_dataset
        peer = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=worker.attention(work)).eval()
        found = {
            "trl": torch.tensor([*scored["ref_chosen_logps"], *scored["ref_rejected_logps"]]),
            "hf": worker.hf_logps(peer, pairs, "cpu", "bfloat16"),
        }
        batch = dataset.preference_batch(pairs)
        found["fp32"] = torch.cat(train_dpo.response_logps(model, batch))
        with torch.autocast("cpu", torch.bfloat16):
            found["minidpo"] = torch.cat(fast.response_logps(model, batch))
            found["minidpo-plain"] = torch.cat(train_dpo.response_logps(model, batch))
    return found


def report(run, name):
    """Returns the errors against fp32, in nats per response, as a Markdown table."""
    found = logps_in_bf16(run, name)
    errors = {key: (found[key] - found["fp32"]).double() for key in ("minidpo-plain", "minidpo", "trl", "hf")}
    rows = [dict(name=key, sd=error.std().item(), largest=error.abs().max().item()) for key, error in errors.items()]
    return table(rows, COLUMNS)
