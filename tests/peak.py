"""The peak of this process's memory, for tests that run as `python -c` in a process of their own."""

import gc

from experiments.bench.worker import forget_peak, memory_mb


class Peak:
    """`with Peak(device) as peak:` ... `peak.bytes`: the most memory in use in the block, less that in use before."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        gc.collect()
        forget_peak(self.device)
        self.before = memory_mb(self.device)
        return self

    def __exit__(self, *_):
        self.bytes = round(1e6 * (memory_mb(self.device, peak=True) - self.before))
