"""The ideas of minidpo/scale/fast.py, each with what takes its place when it is left out.

`python -m experiments.bench --ablation` measures a step without each of them; docs/fast.md shows the result.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import train_dpo
from minidpo.scale import fast


def replace(**values):
    """Replaces functions and classes of minidpo/scale/fast.py. Of a class only `apply` is called."""
    vars(fast).update(values)


def all_scored(packed):
    return packed._replace(scored=torch.arange(len(packed.ids)))


def plain_head(hidden, embedding, targets, dtype):
    """Computes logits, log-softmax and gather as train_dpo.py does, each in memory of its own."""
    return train_dpo.token_logps(F.linear(hidden.to(embedding.dtype), embedding), targets)


def head_at_all_tokens():
    """Computes the logits at all N tokens, and uses those at the scored tokens."""
    hidden_states, head, now = fast.hidden_states, fast.ScoredLogps, SimpleNamespace()

    def all_hidden_states(model, packed):
        unscored = torch.ones(len(packed.ids), dtype=torch.bool).index_fill(0, packed.scored, False)
        now.order = torch.cat([packed.scored, unscored.nonzero().squeeze(-1)])
        return hidden_states(model, all_scored(packed))

    def all_logps(hidden, embedding, targets, dtype):
        targets_of_all = F.pad(targets, (0, len(now.order) - len(targets)))
        return head.apply(hidden[now.order], embedding, targets_of_all, dtype)[: len(targets)]

    replace(hidden_states=all_hidden_states, ScoredLogps=SimpleNamespace(apply=all_logps))


def last_block_at_all_tokens():
    hidden_states = fast.hidden_states
    replace(hidden_states=lambda model, packed: hidden_states(model, all_scored(packed))[packed.scored])


WITHOUT = {  # idea: takes it out of the running process
    "shared prompts": lambda: replace(shared_prefix=lambda ids, real: torch.zeros_like(real)),
    "padding left out": lambda: replace(real_positions=torch.ones_like),
    "head at scored tokens only": head_at_all_tokens,
    "last block at scored tokens only": last_block_at_all_tokens,
    "gradient in place of the logits": lambda: replace(ScoredLogps=SimpleNamespace(apply=plain_head)),
    "attention written out (bf16 on a CPU)": lambda: replace(
        causal_attention=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ),
    "freed memory kept": lambda: replace(keep_freed_memory=lambda: None),
}
