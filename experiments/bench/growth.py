"""How time and memory of a step grow with prompt, response, vocabulary and model: minidpo's and TRL's, as one picture.

    python -m experiments.bench.growth --json docs/bench/growth.json --markdown docs/bench.md

The benchmark over a list of shapes: one quantity at a time is varied from BASE. docs/bench.md explains the bound.
"""

import itertools

from experiments.bench.measure import Settings, as_row, measure_all, table, tell
from experiments.bench.shapes import OURS, PEER, fast_flops, random_pairs, work_of
from experiments.common import figure, save_figure
from minidpo.settings import UserError, parse_settings, run_main

BASE = dict(prompt=128, response=32, vocab_size=8192, model=(6, 384))  # model: layers, channels; 64 channels per head
VARIED = {  # quantity: its values, and its name in the picture
    "prompt": ((64, 200, 450, 900), "prompt, tokens"),
    "response": ((16, 64, 128, 256), "each response, tokens"),
    "vocab_size": ((1024, 8192, 25000, 50257), "vocabulary, tokens"),
    "model": (((2, 128), (4, 256), (8, 512), (12, 768)), "weights in the blocks, millions"),
}
COMPARED = (OURS, PEER)
COLUMNS = {  # header: key and format
    "varied": "varied", "value": "value", "implementation": "implementation", "seconds per step": "seconds_median:.3g",
    "min": "seconds_min:.3g", "max": "seconds_max:.3g", "bound, seconds": "bound:.3g", "peak MB": "peak_mb:,.0f",
    "libraries MB": "libraries_mb:,.0f", "state MB": "state_mb:,.0f",
}  # fmt: skip
PAIRS, STEPS, DTYPE = 4, 2, "float32"


def shape_of(prompt, response, vocab_size, model):
    """Returns the shape of a point, as an entry of shapes.SHAPES. All rows have the same length."""
    n_layer, n_embd = model
    config = dict(vocab_size=vocab_size, block_size=1024, n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd)
    lengths = dict(prompt=[prompt - 1] * 2, response=[response - 1] * 2)  # the eot is added
    return dict(model=config, pairs=PAIRS, batches=1, steps=1 + STEPS, warmup=1, lr=1e-6, optimizer="adamw", **lengths)


def label(value):
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def draw(path, result):
    """Draws seconds above and memory below, a column per quantity."""
    if not (picture := figure(path, (15, 6.4))):
        return
    axes = picture.subplots(2, len(VARIED), squeeze=False)
    for column, (name, (_, title)) in enumerate(VARIED.items()):
        above, below = axes[:, column]
        for i, implementation in enumerate(COMPARED):
            points = [p for p in result["points"] if (p["varied"], p["implementation"]) == (name, implementation)]
            values = [p["value"] for p in points]
            places = [12 * v[0] * v[1] ** 2 / 1e6 for v in values] if name == "model" else values
            style = dict(color=f"C{i}", marker="o", markersize=4)
            above.plot(places, [p["seconds_median"] for p in points], label=implementation, **style)
            below.plot(places, [p["peak_mb"] / 1e3 for p in points], **style)
            if implementation == OURS:
                bound = [p["flops"] / result["flops_per_second"] for p in points]
                above.plot(places, bound, "k--", label="bound: the products alone")
                state = [p["state_mb"] / 1e3 for p in points]
                below.plot(places, state, "k:", label="weights, gradients, AdamW's state")
        above.set(title=title.partition(",")[0], ylabel="seconds per step")
        below.set(xlabel=title, ylabel="peak resident memory, GB")
    for cell in axes.flat:
        cell.grid(alpha=0.25)
        cell.set(xlim=(0, None), ylim=(0, 1.3 * cell.get_ylim()[1]))  # room for the legend above the curves
    for cell in axes[:, 0]:
        cell.legend(frameon=False, loc="upper left")
    save_figure(path, picture)


def report(result):
    """Returns every point as a line of a Markdown table, under a line that says where it was measured."""
    rate, settings = result["flops_per_second"], result["settings"]
    where = f"{result['cpu']}, {result['threads']} threads"
    work = f"{settings['dtype']}, {settings['pairs']} pairs per step"
    points = [point | dict(value=label(point["value"]), bound=point["flops"] / rate) for point in result["points"]]
    return f"{where}; {work}; a large matrix product alone: {rate / 1e9:,.0f} GFLOP/s.\n\n{table(points, COLUMNS)}"


def main():
    settings = parse_settings(Settings, __doc__)
    how = dict(dtype=DTYPE, threads=settings.threads)
    square = dict(how, implementation="matmul-rate", without="", device="cpu", size=2048, warmup=0, steps=10)
    points, works = {}, {("rate",): square}
    for varied, (values, _) in VARIED.items():
        for value, name in itertools.product(values, COMPARED):
            cell = varied, label(value), name
            points[cell] = dict(varied=varied, value=value, implementation=name)
            works[cell] = work_of(shape_of(**{**BASE, varied: value}), name, **how)
    measured = measure_all(works, settings)
    if not (rates := measured["rate",]):
        raise UserError("nothing is measured yet.")
    result = {
        "settings": {"pairs": PAIRS, "steps": STEPS, "dtype": DTYPE},
        "flops_per_second": 2 * square["size"] ** 3 / min(s for process in rates for s in process["seconds"]),
        **{name: rates[0][name] for name in ("cpu", "threads", "versions")},
        "points": [
            as_row("", DTYPE, point["implementation"], works[cell], measured[cell])
            | dict(point, flops=fast_flops(works[cell]["model"], random_pairs(works[cell])))
            for cell, point in points.items() if measured[cell]
        ],
    }  # fmt: skip
    tell(settings, "growth", result, report(result), draw, measured)


if __name__ == "__main__":
    run_main(main)
