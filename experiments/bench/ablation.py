"""The ideas of minidpo/scale/fast.py, each with what takes its place when it is left out.

`python -m experiments.bench --ablation` measures a step without each of them. docs/fast.md shows the result.
`WITHOUT` at the end maps the name of an idea to a function that takes it out of the running process.
"""

import torch
import torch.nn.functional as F

from minidpo.scale import fast


class ByIndex:
    """Takes the place of ToRows or FromRows: PyTorch's own indexing, with its own backward."""

    def __init__(self, index):
        self.apply = index


class PlainHead:
    """Takes the place of ScoredLogps: logits, log-softmax and gather as in train_dpo.py, each in memory of its own."""

    @staticmethod
    def apply(hidden, embedding, targets, dtype):
        logits = F.linear(hidden.to(dtype), embedding.to(dtype)).to(torch.promote_types(dtype, torch.float32))
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


class HeadOfAll:
    """Takes the place of ScoredLogps: computes the logits at all N tokens and uses those at the scored tokens."""

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
