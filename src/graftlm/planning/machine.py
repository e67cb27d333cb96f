"""A machine as a plan sees it: what it has, and how fast it was measured or described to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Rates:
    """What one device does per second. Measured in this process's own kinds of work, or looked up."""

    matrix: Mapping[str, float]
    """Floating-point operations per second of large matrix products, by dtype: `bfloat16`, `float32`."""
    bandwidth: float
    """Bytes per second of copying through memory, read and written bytes counted."""
    operation_seconds: float
    """What one more small operation costs whatever its size: Python, dispatch, launch."""
    disk_read: float
    """Bytes per second in which weights are read."""
    is_measured: bool = False
    """False where the figures come from a table."""
    attention: Mapping[str, float] = field(default_factory=dict)
    """Operations per second of attention over documents, forward and backward, by dtype; where a dtype is
    absent, a share of the matrix rate."""
    decoding: float = 0.0
    """Values of a packed weight that are decoded per second; 0: bytes at the bandwidth."""


@dataclass(frozen=True)
class Machine:
    """Where a run would take place."""

    name: str
    device: Literal["cpu", "cuda"]
    memory_bytes: int
    """Of the device: what a run may take in all."""
    host_memory_bytes: int
    cores: int
    instruction_sets: tuple[str, ...]
    rates: Rates
    source: str
    """Where the figures come from: `measured here on 2026-01-31`, `the table of GPUs`, or a file."""
    idle_bytes: int = 0
    """What a process takes on this device before it has loaded a model: libraries, the CUDA context."""
    start_seconds: float = 6.0
    """From the command to its first line of work: Python and its libraries."""
    price_per_hour: float | None = None
    """In the currency that the user thinks in; None where nobody told."""
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
