"""What a process takes on a CPU besides the bytes in use, as measured on real runs.

The C library does not hand back what lies between blocks in use, and a hole serves no larger block. The
constants were fitted to steps of bases from 2M to 130M parameters; they are the least certain part of a
prediction. How far it is off is measured by `benchmarks/planning_memory.py`.
"""

from __future__ import annotations

from graftlm.planning.rehearsal import StepBytes

AT_LOADING, AFTER_LOADING = 22 * 2**20, 90 * 2**20
"""What a run has in memory besides once it is under way: the architecture, the tokenizer and the rows; then
compiled kernels and what libraries keep."""
SCRATCH = 26 * 2**20
"""What operators borrow, and code that is compiled for the shapes of a step."""
HOLES = 0.21
"""Share of the bytes in use that lies in holes at the worst moment of a step."""
HOLES_OF_A_LAYER = 2.4
"""Blocks of a layer come and go at the turn of the two passes: so many times what a layer keeps."""
READ_PACKED = 59 * 2**20
"""More of both where the base is packed: pieces of it are read into memory of their own."""
HOLES_WITHOUT_GRADIENT = 0.4
"""Share of the bytes in use that lies in holes while text is read or written."""
ON_GPU = 0.04
"""Share of the bytes of a step that a GPU's allocator holds in pieces of pages."""


def beside_step(step: StepBytes, layer: float, device: str, *, is_packed: bool) -> float:
    """Bytes held beside those of a step whose layers keep `layer` bytes each."""
    most = max(step.forward, step.backward)
    if device != "cpu":
        return ON_GPU * most
    return SCRATCH + HOLES * most + HOLES_OF_A_LAYER * layer + (READ_PACKED if is_packed else 0)


def beside_reading(live: float, device: str) -> float:
    """Bytes held beside those that are in use while text is read or written."""
    return (HOLES_WITHOUT_GRADIENT if device == "cpu" else ON_GPU) * live
