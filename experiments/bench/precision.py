"""How far bf16 moves the log-probabilities of a trained model: minidpo, TRL and transformers on the same weights."""

import dataclasses
import tempfile

import torch
from transformers import AutoModelForCausalLM

import data
import train_dpo
from experiments.bench import worker
from experiments.bench.measure import table
from experiments.bench.shapes import TRIAL
from experiments.common import load_models
from minidpo import dataset
from minidpo.scale import fast
from minidpo.scale.weights import save_pretrained

COLUMNS = {"log-probabilities": "name", "standard deviation": "sd:.4f", "largest": "largest:.4f"}


@torch.no_grad()
def report(run, name, limit=256):
    """Returns the errors against fp32 on the first held-out pairs, in nats per response, as a Markdown table."""
    (model,), tokenizer = load_models(run)
    records = dataset.read_jsonl(data.find(name, "pairs_test"), dataset.PAIR)[:limit]
    pairs, _ = dataset.encode(records, dataset.PAIR, tokenizer, model.config.block_size)
    batch = dataset.preference_batch(pairs)
    exact = torch.cat(train_dpo.response_logps(model, batch))
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        found["minidpo-plain"] = torch.cat(train_dpo.response_logps(model, batch))
        found["minidpo"] = torch.cat(fast.response_logps(model, batch))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        shape = dict(model=dataclasses.asdict(model.config), pairs=len(pairs), folder=folder)
        work = {**TRIAL, **shape, "device": "cpu", "dtype": "bfloat16"}
        scored = worker.trl_trainer(work, pairs, worker.Clock(work), 1, precomputed=True).train_dataset
        found["trl"] = torch.tensor([*scored["ref_chosen_logps"], *scored["ref_rejected_logps"]])
        peer = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=worker.attention(work)).eval()
        found["hf"] = worker.hf_logps(peer, pairs, "cpu", "bfloat16")
    errors = {key: logps - exact for key, logps in found.items()}
    rows = [dict(name=key, sd=error.std().item(), largest=error.abs().max().item()) for key, error in errors.items()]
    return table(rows, COLUMNS)
