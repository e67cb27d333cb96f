"""What a process holds beside the bytes in use, as measured on real runs.

The C library does not hand back what lies between blocks in use, and a hole serves no larger block; libraries
keep kernels, plans and workspaces. On a CPU the constants are least squares over the runs of
`benchmarks/planning_memory.py`, which measures how far the predictions are off; they are the least certain
part of them. A GPU's share is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.planning.rehearsal import StepBytes

MIB = 2**20
AT_LOADING = 22 * MIB
"""The architecture, the tokenizer and the rows."""
ON_GPU = 0.04
"""Share of the bytes of a step that a GPU's allocator holds in pieces of pages."""
IN_FREED, OF_STEP = 0.3, 0.3
"""A measurement between steps finds room in what they freed: so much of it is new, less what they leave."""
HOLES_WITHOUT_GRADIENT = 0.4
"""Share of the bytes in use that lies in holes while text is read or written."""
BETWEEN_MICRO_BATCHES = 24 * MIB
"""Gradients that stay from one micro-batch to the next lie between what these take."""


@dataclass(frozen=True)
class Heap:
    """The memory of a process on a CPU, by what it computes in. Shares are bytes."""

    under_way: int
    """Once a base has computed: kernels, plans of products, the rows."""
    of_a_parameter: float
    """Beside each parameter of the base, after it was measured."""
    of_a_packed_one: float
    """More, where it is stored in few bits."""
    of_a_layer: float
    """Blocks of a layer come and go at the turn of the two passes: so many times what a layer keeps."""
    of_the_largest: float
    """For each value of the largest linear layer: what products rearrange."""
    proving: int
    proving_packed: int

    def beside_weights(self, parameters: int, *, is_packed: bool) -> float:
        """Held before and after training, beside a base of so many parameters."""
        packed = self.of_a_packed_one if is_packed else 0.0
        return self.under_way + (self.of_a_parameter + packed) * parameters

    def beside_step(self, layer: float, largest: int, *, is_first: bool) -> float:
        """Held beside a step whose layers keep `layer` bytes each. `is_first`: it has one micro-batch."""
        more = 0 if is_first else BETWEEN_MICRO_BATCHES
        return self.of_a_layer * layer + self.of_the_largest * largest + more

    def beside_proof(self, *, is_packed: bool) -> int:
        """Held beside what a proof compares."""
        return self.proving_packed if is_packed else self.proving


IN_16_BITS = Heap(128 * MIB, 0.476, 0.167, 7.0, 16.0, 0, 20 * MIB)
"""Matrix units have kernels and rearranged weights of their own."""
IN_32_BITS = Heap(22 * MIB, 0.0, 0.0, 4.5, 0.0, 40 * MIB, 40 * MIB)


def heap_of(itemsize: int) -> Heap:
    """For a computation in values of so many bytes."""
    return IN_16_BITS if itemsize == 2 else IN_32_BITS


def beside_on_gpu(step: StepBytes) -> float:
    """Bytes held beside those of a step."""
    return ON_GPU * max(step.forward, step.backward)


def beside_measuring(measured: float, step: float) -> float:
    """New bytes of a measurement that follows steps of so many bytes at most, whose memory is still held."""
    return max(0.0, IN_FREED * measured - OF_STEP * step)


def beside_reading(live: float, device: str) -> float:
    """Bytes held beside those that are in use while text is read or written."""
    return (HOLES_WITHOUT_GRADIENT if device == "cpu" else ON_GPU) * live
