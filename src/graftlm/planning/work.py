"""Amounts of work, and how long a machine takes for them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from graftlm.planning.gpus import ATTENTION_SHARE
from graftlm.planning.machine import Machine

ATTENTION_BACKWARD = 2.5
"""Arithmetic of attention backward, as a multiple of forward."""
ATTENTION_START = 400.0
"""Tokens that each token of a document costs besides those that it sees, as if it saw them."""
SLOWER_THAN_KNOWN = 4.0
"""How many times slower a dtype is that the machine has no rate for than its float32 (it is emulated)."""


@dataclass(frozen=True)
class Work:
    """What something takes, apart from the machine.

    >>> Work(flops=1e9, operations=2) + Work(flops=1e9) * 2
    Work(flops=3000000000.0, attention=0.0, bytes=0.0, decoded=0.0, operations=2.0)
    """

    flops: float = 0.0
    """Arithmetic of matrix products."""
    attention: float = 0.0
    """Arithmetic inside attention."""
    bytes: float = 0.0
    """Read from and written to the device's memory."""
    decoded: float = 0.0
    """Values of packed weights that are read into a dense form."""
    operations: float = 0.0
    """Small operations, whatever their size."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(float(getattr(self, each.name) * times) for each in fields(self)))


def matrix_rate(machine: Machine, dtype: str) -> float:
    """Operations per second of matrix products in a dtype."""
    known = machine.rates.matrix
    return known[dtype] if dtype in known else known.get("float32", max(known.values())) / SLOWER_THAN_KNOWN


def device_seconds(work: Work, machine: Machine, dtype: str) -> float:
    """What the device itself takes: arithmetic, and bytes that are moved beside it."""
    rates, matrix = machine.rates, matrix_rate(machine, dtype)
    attention = rates.attention.get(dtype, ATTENTION_SHARE * matrix)
    found = work.flops / matrix + work.attention / attention + work.bytes / rates.bandwidth
    if work.decoded:
        packed = 0.6 + 2  # bytes of a value in 4 bits with its scale, read, and of one in 16 bits, written
        found += work.decoded / rates.decoding if rates.decoding else work.decoded * packed / rates.bandwidth
    return found


def host_seconds(work: Work, machine: Machine) -> float:
    """What asking for the operations takes. A GPU works meanwhile; a processor does one after the other."""
    return work.operations * machine.rates.operation_seconds
