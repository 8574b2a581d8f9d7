"""One training run: its folder, and what the loops of both stages share.

A run folder holds settings.json, bpe.json, checkpoint.pt, metrics.jsonl, samples.md, curves.png and report.md.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from minidpo import checkpoint, dataset
from minidpo.checkpoint import FILE
from minidpo.device import DEVICES, DTYPES, pick_device, pick_dtype
from minidpo.files.writing import atomic_write, claim
from minidpo.report import draw_curves, read_metrics, write_report
from minidpo.sampling import complete
from minidpo.scale import parallel
from minidpo.settings import NEW, UserError, at_end, knob

# What a run writes: --overwrite replaces these files and nothing else. The first four are there after the first save.
WRITTEN = ("settings.json", "bpe.json", "metrics.jsonl", FILE, "samples.md", "curves.png", "report.md")


@dataclasses.dataclass(kw_only=True)
class RunSettings:
    """The knobs of a training run that say nothing about its method. A row is one text in SFT and one pair in DPO."""

    epochs: float = knob(1.0, "passes over the training rows; 0.5 is half a pass")
    batch_size: int = knob(64, "rows per optimiser step", least=1)
    micro_batch_size: int = knob(0, "rows per forward pass, to save memory; 0: as many as fit")
    micro_tokens: int = knob(0, "input tokens per forward pass, padding counted, to save memory; 0: no limit")
    recompute: bool = knob(False, "save memory: compute each block again in the backward pass (a third more work)")
    fast: bool = knob(False, "less time and memory: log-probabilities by minidpo/scale/fast.py")
    compile: bool = knob(False, "torch.compile the blocks: faster on a GPU, after a minute of compiling")
    max_length: int = knob(0, "longest row in tokens; 0: the model's context")
    max_steps: int = knob(0, "stop early, after this many optimiser steps; 0: no early stop")
    eval_data: str = knob("", "held-out rows for the curves; empty: the dataset's own, none for a file")
    eval_every: int = knob(50, "optimiser steps between evaluations on the held-out rows; 0: at the end only")
    save_every: int = knob(100, "optimiser steps between checkpoints", least=1)
    samples: int = knob(8, "prompts that are completed for the report, held-out ones if there are any")
    sample_tokens: int = knob(128, "longest of these completions, in tokens", least=1)
    seed: int = knob(0, "any integer: order of the rows, sampling, first weights, dropout", least=-(2**63))
    device: str = knob("auto", "auto, cpu, cuda or mps", choices=DEVICES)
    dtype: str = knob("auto", "precision of the matrix products", choices=DTYPES)
    resume: bool = knob(False, "continue the run in --out, with its settings")
    overwrite: bool = knob(False, "replace the run in --out")

    def cut(self, batches, rows):
        """The batches (lists of indices of `rows`) in micro-batches, as --micro-batch-size and --micro-tokens say."""
        return dataset.micro_batches(batches, rows, self.micro_batch_size, self.micro_tokens)


def place(model, settings):
    """Moves the model to the device and picks the precision. "auto" in `settings` becomes what was picked."""
    settings.device = pick_device(settings.device)
    settings.dtype = pick_dtype(settings.dtype, settings.device, model.config.n_embd)
    model.to(settings.device)


def count_steps(rows, settings):
    """Returns (optimiser steps in all epochs, the step to stop after). They differ if --max-steps is given."""
    total = math.ceil(settings.epochs * math.ceil(len(rows) / settings.batch_size))
    return total, min(total, settings.max_steps or total)


def steps(rows, settings, first_step=0):
    """Yields (step, indices of the rows of this step), both counted from 0.

    The order depends on seed and epoch alone, so a resumed run finds its place by counting.
    """
    steps_per_epoch = math.ceil(len(rows) / settings.batch_size)
    for step in range(first_step, count_steps(rows, settings)[1]):
        if step == first_step or step % steps_per_epoch == 0:
            order = dataset.batches(rows, settings.batch_size, settings.seed, step // steps_per_epoch)
        yield step, order[step % steps_per_epoch]


class Run:
    """The folder of one run. With --overwrite, the run that is there stays until the new one has saved.

    `stage` is the name on the progress bar. With several processes, only process 0 writes.
    """

    def __init__(self, settings, stage):
        self.settings, self.stage = settings, stage
        self.path = self.folder = Path(settings.out)  # folder: where it writes; path/NEW while an older run is kept
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file. Give a folder.")
        with parallel.first_before_others():  # the others wait until process 0 has claimed the folder
            self._claim()
        held = [name for name in WRITTEN if (self.path / name).exists()]
        init = Path(settings.init)
        if settings.init and init.exists() and self.path.exists() and init.samefile(self.path) and not settings.resume:
            raise UserError(f"--out is the model to start from, --init {init}. Give another folder as --out.")
        if settings.resume and settings.overwrite:
            raise UserError("--resume continues a run and --overwrite removes it: give one of them.")
        if settings.resume and not checkpoint.exists(self.path):
            raise UserError(f"{self.path / FILE} not found: nothing was saved to resume. Start again with --overwrite.")
        if held and not settings.resume and not settings.overwrite:
            how = "Add --resume to continue, or --overwrite to replace it."
            raise UserError(f"{self.path} already holds a run ({held[0]}). {how}")

    @parallel.by_process_0
    def _claim(self):
        """Keeps other processes out of the folder, and clears what a killed process has left there."""
        claim(self.path)
        for part in [part for name in WRITTEN for part in self.path.glob(f"{name}.*.part")]:
            part.unlink()
        self._replace()
        at_end.callback(self._replace)

    def _replace(self):
        """If the run in NEW has saved, moves it into the place of the older run. Then removes NEW.

        If the process is killed here, the next command on this folder completes the move. While files are moved, the
        folder has no checkpoint.pt, so nobody loads files of two runs.
        """
        if (self.path / NEW / FILE).exists():
            for name in WRITTEN[3:]:
                (self.path / name).unlink(missing_ok=True)
            for name in WRITTEN[:4]:
                if (self.path / NEW / name).exists():
                    os.replace(self.path / NEW / name, self.path / name)
        shutil.rmtree(self.path / NEW, ignore_errors=True)
        self.folder = self.path

    def load(self):
        """Returns (model, tokenizer, saved state) of this run with --resume, else of --init, with the state {}."""
        model, tokenizer, saved = checkpoint.load(self.path if self.settings.resume else self.settings.init)
        return model, tokenizer, saved if self.settings.resume else {}

    def plan(self, rows, saved, *data):
        """Sets where the loop begins and ends. `data`: what a resumed run must find unchanged.

        Raises UserError if a resumed run was started with other data, or if nothing is left to do.
        """
        self.rows, self.data = rows, checkpoint.fingerprint(*data)
        if self.settings.resume and saved.get("data") != self.data:
            raise UserError(f"{self.path} was started with other data. Restore it, or start a new run.")
        self.first_step = first = saved.get("step", 0)
        self.total_steps, self.last_step = total, last = count_steps(rows, self.settings)
        if first > last or last == 0 or first == last and (self.path / "report.md").exists():
            raise UserError(f"{self.path} has made {first} of {last} steps. Raise --epochs or --max-steps.")
        if last <= (warmup := self.settings.warmup_steps):
            print(f"warning: all {last} steps are warm-up. Lower --warmup-steps {warmup}, or --batch-size.")

    @contextlib.contextmanager
    def training(self, model, tokenizer, optimizer, **keep):
        """`with run.training(...) as steps:` opens the folder and gives the (step, indices) of the loop.

        A checkpoint holds the model, the optimiser's state and `keep`: tensors and plain values that a resumed run
        needs again. After Ctrl-C the loop finishes its step, saves and stops.
        """
        parallel.all_sum(0)  # wait until every process has checked the folder
        self._open(tokenizer)
        bar = tqdm(total=self.last_step, initial=self.first_step, desc=self.stage, unit="step")
        with CatchInterrupt() as interrupt, bar as self.bar:

            def stepping():
                for step, indices in steps(self.rows, self.settings, self.first_step):
                    self.started = time.perf_counter()
                    yield step, indices
                    done, stop = step + 1, parallel.anywhere(interrupt.requested)
                    if done == self.last_step or done % self.settings.save_every == 0 or stop:
                        state = dict(step=done, optimizer=optimizer.state_dict(), data=self.data, **keep)
                        self.save(model, tokenizer, state)
                    if stop and done < self.last_step:
                        how = f"To continue, run this script with --out {self.path} --resume."
                        raise UserError(f"stopped after step {done} and saved. {how}")

            yield stepping()

    @parallel.by_process_0
    def _open(self, tokenizer):
        lines = []
        if self.first_step:  # a killed run may have logged steps that its checkpoint does not hold
            lines = [m for m in read_metrics(self.path) if m["step"] <= self.first_step]
            (self.path / "report.md").unlink(missing_ok=True)  # written last: a run that has one is finished
        elif checkpoint.exists(self.path):
            self.folder = self.path / NEW
        else:
            for name in WRITTEN:
                (self.path / name).unlink(missing_ok=True)
        values = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in ("resume", "overwrite")}
        defaults = {field.name: field.default for field in dataclasses.fields(self.settings)}
        changed = [f"{name} {value!r}" for name, value in values.items() if value != defaults[name]]
        atomic_write(self.folder / "settings.json", json.dumps(values, indent=2) + "\n")
        atomic_write(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in lines))
        print(f"settings {values.get('settings')}: {', '.join(changed)}. The others have their defaults.")

    def speed(self, **counts):
        """speed(tokens=n) -> {"tokens_per_second": n / seconds since this step began}."""
        seconds = time.perf_counter() - self.started
        return {f"{name}_per_second": count / seconds for name, count in counts.items()}

    def evaluates_after(self, step):
        """Whether the held-out rows are evaluated after this step: every --eval-every steps, and at the end."""
        return step + 1 == self.last_step or self.settings.eval_every and (step + 1) % self.settings.eval_every == 0

    @parallel.by_process_0
    def log(self, step, metrics):
        """Appends one line to metrics.jsonl. The file counts steps from 1."""
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, **metrics}) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        shown = {"loss": "loss", "rewards/accuracies": "accuracy"}
        self.bar.update()
        self.bar.set_postfix_str(", ".join(f"{shown[k]} {metrics[k]:.3f}" for k in shown if k in metrics))

    @parallel.by_process_0
    def save(self, model, tokenizer, state):
        """Writes checkpoint.pt."""
        with open(self.folder / "metrics.jsonl", "ab") as file:
            os.fsync(file.fileno())  # after a power cut the log may hold extra steps, and never lacks one
        checkpoint.save(self.folder, model, tokenizer, state)
        if self.folder != self.path:
            self._replace()

    def complete(self, model, tokenizer, prompts):
        """Completes the prompts (lists of ids) for the report, --micro-batch-size or 256 at a time."""
        at_once = self.settings.micro_batch_size or 256
        return complete(model, tokenizer, prompts, self.settings.sample_tokens, self.settings.seed, batch_size=at_once)

    @parallel.by_process_0
    def finish(self, samples, note):
        """Writes samples.md, curves.png and report.md. samples: {"prompt": [...], column name: [...], ...} of texts."""
        write_report(self.path, samples, note, curves=draw_curves(self.path))
        print(f"report: {self.path / 'report.md'}")


class CatchInterrupt:
    """`with CatchInterrupt() as interrupt:` turns a first Ctrl-C into `interrupt.requested = True`.

    SIGTERM and SIGHUP (a closed terminal) do the same. So a loop can finish its step and save. A second signal stops
    the process at once.
    """

    def __enter__(self):
        self.requested = False
        signals = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows has no SIGHUP
        self._previous = {s: signal.signal(s, self._on_signal) for s in signals}
        return self

    def _on_signal(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing this step, then saving (press Ctrl-C again to stop at once)", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
