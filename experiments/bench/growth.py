"""How a step's time and memory grow with prompt, responses, vocabulary and model: ours and TRL's, as one picture.

    python -m experiments.bench.growth --json docs/bench/growth.json --markdown docs/bench.md

One quantity at a time is varied from BASE; each point is a process of its own (see experiments.bench). With the seconds
goes what the matrix products of the step would take at the rate that this machine reaches on a large square product
alone: the FLOPs of the fast path (`flops` below) over that rate. No step that makes these products can be faster; how
far it is above says what the rest costs: memory traffic, smaller products, and everything that is no product.

What a process measured is kept in --cache: the command given again goes on where it was stopped.
"""

import dataclasses
import statistics
from pathlib import Path

from experiments.bench.bench import DTYPES, OURS, PEER, installed, measure_all, must_be_all, tell
from experiments.bench.worker import random_pairs
from minidpo.files import atomic
from minidpo.settings import knob, parse_settings, run_main

BASE = dict(prompt=128, response=32, vocab_size=8192, model=(6, 384))  # model: layers, channels; 64 channels a head
VARIED = {
    "prompt": (64, 200, 450, 900),
    "response": (16, 64, 128, 256),
    "vocab_size": (1024, 8192, 25000, 50257),
    "model": ((2, 128), (4, 256), (8, 512), (12, 768)),
}
AXES = {
    "prompt": "prompt, tokens",
    "response": "each response, tokens",
    "vocab_size": "vocabulary, tokens",
    "model": "weights in the blocks, millions",
}
COMPARED = (OURS, PEER)
RATE = "matmul-rate"


@dataclasses.dataclass
class Settings:
    pairs: int = knob(4, "pairs a step", least=1)
    steps: int = knob(2, "timed steps of each process, after one that is not", least=1)
    dtype: str = knob("float32", "precision of the matrix products", choices=DTYPES)
    threads: int = knob(0, "threads of each process; 0: as PyTorch picks them")
    cache: str = knob("runs/growth", "folder that keeps what each process measured")
    json: str = knob("", "file for the figures, with a picture beside it (.png); empty: print them only")
    markdown: str = knob("", "page whose marked block becomes the table, such as docs/bench.md")
    overwrite: bool = knob(False, "forget what --cache holds")


def work_at(point, pairs):
    """A point (the fields of BASE) -> what bench_worker.py takes of model and pairs. All rows are of equal length."""
    n_layer, n_embd = point["model"]
    shape = dict(vocab_size=point["vocab_size"], block_size=1024, n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd)
    lengths = {name: [point[name] - 1] * 2 for name in ("prompt", "response")}  # the eot makes up the length
    return dict(model=shape, pairs=pairs, batches=1, lr=1e-6, **lengths)


def flops(work):
    """Floating-point operations in the matrix products of a step, as the fast path makes them.

    A product of (n, a) and (a, b) takes 2 n a b, and comes three times: forward, and backward for both factors. Each
    layer has 12 C^2 weights: 3 C^2 make queries, keys and values, 9 C^2 come after the attention, which in the last
    layer only the scored positions need, as the head does. A prompt runs once for its two responses. Attention's two
    products count for the positions that a token can see.
    """
    L, C, V = (work["model"][name] for name in ("n_layer", "n_embd", "vocab_size"))
    total = 0
    for prompt, *responses in random_pairs(work)[: work["pairs"]]:
        P = len(prompt)
        rests = [len(response) - 1 for response in responses]  # the last token of a response is only a target
        tokens = P + sum(rests)
        scored = sum(len(response) for response in responses)
        linear = ((L - 1) * 12 * C * C + 3 * C * C) * tokens + (9 * C * C + V * C) * scored
        seen = P * (P + 1) / 2 + sum(r * P + r * (r + 1) / 2 for r in rests)
        total += 3 * 2 * (linear + L * 2 * C * seen)
    return total


def point_of(name, value, implementation, work, measured):
    """One point of the JSON: seconds a step, memory as in `bench.as_row`, and the FLOPs of the fast path."""
    seconds = measured["seconds"][work["warmup"] :]
    return {
        "varied": name,
        "value": value,
        "implementation": implementation,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        **{name: measured[name] for name in ("peak_mb", "libraries_mb", "state_mb", "losses")},
        "flops": flops(work),
    }


def where(point):
    """The place of a point on the horizontal axis."""
    value = point["value"]
    return 12 * value[0] * value[1] ** 2 / 1e6 if point["varied"] == "model" else value


def label(value):
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def draw(path, result):
    """Seconds above, memory below, a column a quantity. Needs the extra `plot`; without it says so, returns False."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "minidpo[plot]")')
        return False
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    axes = figure.subplots(2, len(VARIED), squeeze=False)
    for column, name in enumerate(VARIED):
        above, below = axes[:, column]
        for i, implementation in enumerate(COMPARED):
            points = [p for p in result["points"] if (p["varied"], p["implementation"]) == (name, implementation)]
            places, style = [where(p) for p in points], dict(color=f"C{i}", marker="o", markersize=4)
            above.plot(places, [p["seconds_median"] for p in points], label=implementation, **style)
            below.plot(places, [p["peak_mb"] / 1e3 for p in points], **style)
            if implementation == OURS:
                bound = [p["flops"] / result["flops_per_second"] for p in points]
                above.plot(places, bound, "k--", label="FLOP bound")
                state = [p["state_mb"] / 1e3 for p in points]
                below.plot(places, state, "k:", label="weights, gradients, AdamW's state")
        above.set(title=AXES[name].partition(",")[0], ylabel="seconds a step")
        below.set(xlabel=AXES[name], ylabel="peak resident memory, GB")
    for cell in axes.flat:
        cell.grid(alpha=0.25)
        cell.set(xlim=(0, None), ylim=(0, None))
    for cell in axes[:, 0]:
        cell.legend(frameon=False)
    with atomic(path) as file:
        figure.savefig(file, dpi=90, format="png")
    return True


def table(result):
    """Every point as a line of a Markdown table."""
    rate, settings = result["flops_per_second"], result["settings"]
    lines = [
        f"{result['cpu']}, {result['threads']} threads; {settings['dtype']}, {settings['pairs']} pairs a step; "
        f"a large matrix product alone: {rate / 1e9:,.0f} GFLOP/s.",
        "",
        "| varied | value | implementation | s a step (least to most) | bound, s | peak MB | libraries MB | state MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in result["points"]:
        spread = f"{p['seconds_min']:.3g} to {p['seconds_max']:.3g}"
        lines.append(
            f"| {p['varied']} | {label(p['value'])} | {p['implementation']} | {p['seconds_median']:.3g} ({spread}) | "
            f"{p['flops'] / rate:.3g} | {p['peak_mb']:,.0f} | {p['libraries_mb']:,.0f} | {p['state_mb']:,.0f} |"
        )
    return "\n".join(lines)


def main():
    settings = parse_settings(Settings, __doc__)
    implementations = installed(COMPARED)
    common = dict(dtype=settings.dtype, threads=settings.threads)
    works = {(RATE, 2048, RATE): dict(common, implementation=RATE, size=2048, warmup=0, steps=10)}
    for name, values in VARIED.items():
        for value in values:
            for implementation in implementations:
                work = work_at({**BASE, name: value}, settings.pairs)
                works[name, value, implementation] = dict(
                    work, **common, implementation=implementation, warmup=1, steps=1 + settings.steps
                )
    turns = {}
    for (name, value, implementation), work in works.items():
        path = Path(settings.cache) / f"{name}-{label(value)}-{implementation}.json"
        turns[name, value, implementation] = path, work
    measured = measure_all(turns, "growth", settings.overwrite)

    rate, *points = measured.items()
    result = {
        "settings": {name: getattr(settings, name) for name in ("pairs", "steps", "dtype")},
        "flops_per_second": 2 * works[rate[0]]["size"] ** 3 / min(rate[1]["seconds"]),
        **{name: rate[1][name] for name in ("cpu", "threads", "versions")},
        "points": [point_of(*key, works[key], found) for key, found in points],
    }
    tell(settings, "growth", result, table(result), draw)
    must_be_all(measured, turns)


if __name__ == "__main__":
    run_main(main)
