"""What each idea of minidpo/scale/fast.py is worth: a training step of DPO with all of them against a step without one.

    python -m experiments.bench.ablation --markdown docs/fast.md

Each measurement is a process of `experiments.bench`, on its shapes, alone; the variants take turns for several rounds,
and what a process measured is kept in --cache. `WITHOUT` has the ideas: for each, what to put in its place.
"""

import dataclasses
import itertools
import statistics
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments.bench import bench
from minidpo.scale import fast
from minidpo.settings import knob, parse_settings, run_main

ALL = "nothing"  # is left out


# ---- 1. The ideas, each with what stands in its place when it is taken out ----


class ByIndex:
    """In the place of ToRows and FromRows: PyTorch's own indexing, and its backward."""

    def __init__(self, index):
        self.apply = index


class PlainHead:
    """In the place of ScoredLogps: the logits, log-softmax and gather of train_dpo.py, each with its own memory."""

    @staticmethod
    def apply(hidden, embedding, targets, dtype):
        logits = F.linear(hidden.to(dtype), embedding.to(dtype)).to(torch.promote_types(dtype, torch.float32))
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


class HeadOfAll:
    """In the place of ScoredLogps: logits at all N tokens, of which the scored ones are used."""

    def __init__(self, head):
        self.head = head

    def apply(self, hidden, embedding, targets, dtype):
        scored = torch.zeros(len(hidden), dtype=torch.bool).index_fill(0, self.scored, True)
        order = torch.cat([self.scored, (~scored).nonzero().squeeze(-1)])
        targets_of_all = F.pad(targets, (0, len(order) - len(targets)))
        return self.head.apply(hidden[order], embedding, targets_of_all, dtype)[: len(targets)]


def score_all():
    hidden_states, head = fast.hidden_states, HeadOfAll(fast.ScoredLogps)

    def of_all(model, packed):
        head.scored = packed.scored
        return hidden_states(model, packed._replace(scored=torch.arange(len(packed.ids))))

    fast.hidden_states, fast.ScoredLogps = of_all, head


def whole_last_block():
    hidden_states = fast.hidden_states

    def of_all(model, packed):
        return hidden_states(model, packed._replace(scored=torch.arange(len(packed.ids))))[packed.scored]

    fast.hidden_states = of_all


def dense_embedding():
    embedding = F.embedding
    F.embedding = lambda ids, weight, *_, **__: embedding(ids, weight)


WITHOUT = {
    ALL: lambda: None,
    "shared prompts": lambda: setattr(fast, "shared_prefix", lambda ids, real: torch.zeros_like(real[0])),
    "padding left out": lambda: setattr(fast, "real_positions", torch.ones_like),
    "head at scored tokens only": score_all,
    "last block at scored tokens only": whole_last_block,
    "gradient written over the logits": lambda: setattr(fast, "ScoredLogps", PlainHead),
    "rows made and undone by a copy": lambda: (
        setattr(fast, "ToRows", ByIndex(lambda x, packed: x[packed.place])),
        setattr(fast, "FromRows", ByIndex(lambda x, packed: x.flatten(0, 1)[packed.home])),
    ),
    "sparse gradient of the lookup": dense_embedding,
    "attention written out (bf16 on a CPU)": lambda: setattr(
        fast, "causal_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ),
    "freed memory kept": lambda: setattr(fast, "keep_freed_memory", lambda: None),
}


# ---- 2. Measuring, by the processes of experiments.bench ----


@dataclasses.dataclass
class Settings:
    shapes: str = knob("", "which of W1,W2,W3; empty: all")
    dtypes: str = knob("bfloat16", "float32,bfloat16, precision of the matrix products")
    rounds: int = knob(2, "how often all variants take their turn", least=1)
    quick: bool = knob(False, "a trial of the command: tiny models, one round; its figures mean nothing")
    cache: str = knob("runs/ablation", "folder that keeps what each process measured; delete it to measure again")
    markdown: str = knob("", "page whose marked block becomes the tables, such as docs/fast.md")


def table(shapes, dtype, found):
    """found: {(shape, dtype, idea): [what bench_worker.py prints, of each round]} -> Markdown.

    Time and peak memory without an idea, as multiples of those with all of them.
    """

    def seconds(shape, idea):
        return statistics.median(s for process in found[shape, dtype, idea] for s in process["timed"])

    def peak(shape, idea):
        return max(process["peak_mb"] for process in found[shape, dtype, idea])

    lines = [f"| left out ({dtype}) | " + " | ".join(f"{shape} time | {shape} peak" for shape in shapes) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(shapes))
    for idea in WITHOUT:
        cells = [
            f"{seconds(shape, idea):.3g} s | {peak(shape, idea):,.0f} MB"
            if idea == ALL
            else f"{seconds(shape, idea) / seconds(shape, ALL):.2f} | {peak(shape, idea) / peak(shape, ALL):.2f}"
            for shape in shapes
        ]
        lines.append(f"| {idea} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    settings = parse_settings(Settings, __doc__)
    shapes = bench.chosen("--shapes", settings.shapes, bench.SHAPES)
    dtypes = bench.chosen("--dtypes", settings.dtypes, bench.DTYPES)
    turns = {}
    for i in range(1 if settings.quick else settings.rounds):
        for shape, dtype, idea in itertools.product(shapes, dtypes, WITHOUT):
            sizes = bench.TRIAL if settings.quick else bench.SHAPES[shape]
            work = dict(sizes, implementation=bench.OURS, dtype=dtype, threads=0, without=idea)
            path = Path(settings.cache) / f"{shape}-{dtype}-{idea.replace(' ', '_')}-{i}.json"
            turns[shape, dtype, idea, i] = path, work
    measured = bench.measure_all(turns, "ablation")
    bench.must_be_all(measured, turns)
    found = defaultdict(list)
    for (*cell, i), process in measured.items():
        warmup = turns[(*cell, i)][1]["warmup"]
        found[tuple(cell)].append({**process, "timed": process["seconds"][warmup:]})
    text = "\n\n".join(table(shapes, dtype, found) for dtype in dtypes)
    print(text)
    if settings.markdown:
        bench.put_into(settings.markdown, "ablation", text)


if __name__ == "__main__":
    run_main(main)
