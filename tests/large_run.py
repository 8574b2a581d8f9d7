"""One whole run of each stage with random weights of a large model, killed and resumed: the peak of memory by phase.

    python tests/large_run.py --preset gpt2-large --out runs/large

Rows of 64 tokens, 64 rows per step, one row per forward pass, --fast, RMSprop: two steps with an evaluation and a save
after each. The process is killed after the first save, and a second one resumes. docs/large.md shows the output. The
peaks are resident memory, without what the libraries took before.
"""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import minidpo.run  # noqa: E402
import train_dpo  # noqa: E402
import train_sft  # noqa: E402
from experiments.bench.worker import forget_peak, memory_mb  # noqa: E402
from minidpo import checkpoint  # noqa: E402
from minidpo.model import GPT, PRESETS, GPTConfig  # noqa: E402
from minidpo.settings import run_main  # noqa: E402
from minidpo.tokenizer import Tokenizer  # noqa: E402

PHASES = {  # phase: functions that are it, in either stage
    "load": [(checkpoint, "load")],
    "reference": [(train_dpo, "cached_reference")],
    "start check": [(train_dpo, "check_start")],
    "step": [(train_dpo, "train_step"), (train_sft, "train_step")],
    "evaluation": [(train_dpo, "evaluate"), (train_sft, "evaluate")],
    "samples": [(minidpo.run, "complete")],
    "save": [(checkpoint, "save")],
}


def save_with_tokenizer(folder, model):
    """Saves the model with a tokenizer: the 256 bytes, the eot, and words that no text has, one per row left."""
    more = [b"%d" % i for i in range(10**6, 10**6 + model.config.vocab_size - 257)]
    checkpoint.save(folder, model, Tokenizer([bytes([i]) for i in range(256)] + more))


def make(folder, preset, rows):
    """Writes a run with random weights, and the data: rows of 64 tokens, half of them response."""
    save_with_tokenizer(folder, GPT(GPTConfig.preset(preset)))
    for name, n in (("train", rows), ("held_out", 4)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i in range(n):
                prompt, b, c = chr(35 + i % 90) * 31, "b" * 31, "c" * 31
                file.write(json.dumps({"prompt": prompt, "completion": b, "chosen": b, "rejected": c}) + "\n")


def run_phases(stage, argv, die):
    """Runs the command of a stage and prints a line for each phase. die: SIGKILL after the first save."""
    peaks, base = {}, memory_mb("cpu")

    def measured(phase, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            forget_peak("cpu")
            began, result = time.monotonic(), function(*args, **kwargs)
            peak, seconds = peaks.get(phase, (0, 0))
            peaks[phase] = max(peak, memory_mb("cpu", peak=True) - base), seconds + time.monotonic() - began
            if die and phase == "save":
                print_phases()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def print_phases():
        for phase, (peak, seconds) in peaks.items():
            print(f"    {phase:12} {peak * 1e6 / 2**30:6.2f} GiB {seconds:6.0f} s", flush=True)

    for phase, places in PHASES.items():
        for owner, name in places:
            mock.patch.object(owner, name, measured(phase, getattr(owner, name))).start()
    sys.argv = ["command", *argv]
    run_main({"sft": train_sft, "dpo": train_dpo}[stage].main)
    print_phases()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="gpt2-large", choices=tuple(PRESETS))
    parser.add_argument("--out", default="runs/large", type=Path)
    parser.add_argument("--rows", default=64, type=int)
    parser.add_argument("--phases", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phases:
        stage, die, *argv = args.phases
        return run_phases(stage, argv, die == "die")
    args.out.mkdir(parents=True)
    make(args.out, args.preset, args.rows)
    for stage in ("sft", "dpo"):
        flags = ["--init", args.out, "--data", args.out / "train.jsonl", "--eval-data", args.out / "held_out.jsonl"]
        flags += ["--out", args.out / stage, "--batch-size", args.rows, "--micro-batch-size", 1, "--epochs", 2]
        flags += ["--optimizer", "rmsprop", "--warmup-steps", 0, "--save-every", 1, "--eval-every", 1, "--samples", 4]
        flags += ["--sample-tokens", 16, "--device", "cpu", "--fast"]
        for how in ("die", "resume"):
            print(f"{stage}, " + ("killed after the first save" if how == "die" else "resumed"), flush=True)
            words = map(str, flags + ["--resume"] * (how == "resume"))
            command = [sys.executable, __file__, "--phases", stage, how, *words]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
            print(*(line for line in done.stdout.splitlines() if line.startswith(("memory", "    "))), sep="\n")
            if done.returncode != (-signal.SIGKILL if how == "die" else 0):
                sys.exit(done.stderr)


if __name__ == "__main__":
    main()
