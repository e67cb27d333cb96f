"""What is measured of one side in one process: time, memory, and the losses that prove it did the work."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


@dataclass
class Run:
    """One process. Bytes, seconds; lists have one value for each optimizer step."""

    side: str
    round: int = 0
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Of all processors together."""
    tokens: list[int] = field(default_factory=list)
    """Real ones: no padding."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    warm_up: int = 0
    imports: int = 0
    """Resident after the imports."""
    weights: int = 0
    """Of the base, as it is stored in memory."""
    loaded: int = 0
    """Most up to the loaded model with its adapter."""
    peak: int = 0
    """Most of the whole process, loading included."""
    peak_training: int = 0
    """Most from the first step on; equal to `peak` where the system does not let a process reset it."""
    allocated: int = 0
    reserved: int = 0
    """Most on the GPU from the first step on; 0 without one."""
    first_step: float = 0.0
    """From the end of the imports to the end of the first step: loading and compiling included."""
    failed: str = ""
    """Why there are no figures."""
    note: str = ""
    """What the side wants said about itself."""

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a step over the median second a step, without warm-up.

        Steps of different length are weighed by their tokens.
        """
        taken, tokens = self.seconds[self.warm_up :], self.tokens[self.warm_up :]
        if len(set(tokens)) <= 1:
            return tokens[0] / statistics.median(taken) if taken else 0.0
        return sum(tokens) / sum(taken)

    @property
    def processor_seconds(self) -> float:
        """Median of a step."""
        return statistics.median(self.processor[self.warm_up :])

    @property
    def above_weights(self) -> int:
        """Most memory in training beyond libraries and frozen weights: adapters, optimizer, activations."""
        if self.allocated:
            return self.allocated - self.weights
        return self.peak_training - self.imports - self.weights


class Recorder:
    """Fills a `Run` while a side works."""

    def __init__(self, run: Run, device: str) -> None:
        self.run, self.device = run, device
        self._start = time.perf_counter()
        self._before = (0.0, 0.0)

    def imported(self) -> None:
        """All libraries are there."""
        self.run.imports = resident("VmRSS")
        self._start = time.perf_counter()

    def base(self, model: Any) -> None:
        """The base is loaded, and nothing is attached to it yet."""
        self.run.weights = stored_bytes(model)

    def begin(self) -> None:
        """The first step begins."""
        self.run.loaded = resident("VmHWM")
        reset_peak(self.device)
        self._before = (time.perf_counter(), time.process_time())

    def step(self, loss: float, norm: float, tokens: int) -> None:
        """A step has ended, and the next begins."""
        synchronise(self.device)
        now = (time.perf_counter(), time.process_time())
        run = self.run
        run.seconds.append(now[0] - self._before[0])
        run.processor.append(now[1] - self._before[1])
        run.tokens.append(tokens)
        run.losses.append(loss)
        run.norms.append(norm)
        if len(run.seconds) == 1:
            run.first_step = now[0] - self._start
        self._before = (time.perf_counter(), time.process_time())

    def end(self) -> None:
        """All steps are done."""
        run = self.run
        run.peak_training = resident("VmHWM")
        run.peak = max(run.loaded, run.peak_training)
        if self.device == "cuda":
            import torch

            run.allocated = torch.cuda.max_memory_allocated()
            run.reserved = torch.cuda.max_memory_reserved()


def resident(kind: str) -> int:
    """`VmRSS` (now), `VmHWM` (the most so far) or another field of this process's status, in bytes; 0 where
    no system tells."""
    if not STATUS.is_file():
        return 0
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def reset_peak(device: str) -> None:
    """Peaks count from here, where the system allows it."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    try:
        RESET.write_text("5", encoding="utf-8")
    except OSError:
        return


def synchronise(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def stored_bytes(model: Any) -> int:
    """Distinct storages of the parameters and buffers of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())
