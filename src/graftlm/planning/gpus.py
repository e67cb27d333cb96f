"""Published figures of GPUs, and what a run sees of them.

A data sheet gives what the units could do; long products reach a part of it. The shares below were set by
published training runs (on A100, H100, H200 and RTX 4090).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError
from graftlm.planning.machine import Machine, Rates

TERA, GIGA, GIB = 1e12, 1e9, 2**30

MATRIX_SHARE = 0.75
"""Of the published rate, in large matrix products of a training step (780 of 989 TFLOP/s were seen on an H200
in short bursts; a sustained step holds less)."""
CARD_SHARE = 0.95
"""The same of GeForce and RTX cards, which run above the clock that they are specified at (130 to 150 of 165
and 155 TFLOP/s were seen in whole steps on an RTX 4090 and an RTX A6000)."""
BANDWIDTH_SHARE = 0.85
"""Of the published bandwidth, in copies."""
ATTENTION_SHARE = 0.4
"""Of the matrix rate, in attention forward and backward (FlashAttention 2: 305 to 365 of 780)."""
OPERATION_SECONDS = 5e-6
"""Of the host for one more small operation: about 5 milliseconds a layer in a step, as in published profiles
of steps that the host holds up."""
DISK_READ = 1.5e9
"""Bytes per second of a data centre's or a good consumer's solid-state disk."""
CONTEXT_BYTES = 500 * 2**20
"""What CUDA and its libraries take before the first tensor."""

_AMPERE = "NVIDIA Ampere GA102 whitepaper"
_ADA = "NVIDIA Ada whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell whitepaper"
_SHEET = "NVIDIA data sheet"


@dataclass(frozen=True)
class GpuFacts:
    """One card as its maker describes it. Rates are dense (no sparsity), in TFLOP/s, with sums in 32 bits."""

    name: str
    gib: float
    """Memory that a process sees, error correction on where the card has it on by default."""
    bandwidth: float
    """GB/s."""
    bfloat16: float
    """0 where the card has none."""
    float16: float
    float32: float
    """Outside the matrix units: what torch computes in float32 by default."""
    fp8: float
    source: str

    @property
    def rates(self) -> Rates:
        """What a run gets of them."""
        published = {
            "bfloat16": self.bfloat16,
            "float16": self.float16,
            "float32": self.float32,
            "fp8": self.fp8,
        }
        share = CARD_SHARE if self.name.startswith(("GeForce", "RTX")) else MATRIX_SHARE
        matrix = {kind: share * rate * TERA for kind, rate in published.items() if rate}
        return Rates(
            matrix=matrix,
            bandwidth=BANDWIDTH_SHARE * self.bandwidth * GIGA,
            operation_seconds=OPERATION_SECONDS,
            disk_read=DISK_READ,
            attention={kind: ATTENTION_SHARE * rate for kind, rate in matrix.items() if kind != "fp8"},
        )

    @property
    def machine(self) -> Machine:
        """A machine with one of them. Of the host nothing is known."""
        notes = () if self.bfloat16 else (f"{self.name} has no bfloat16: bases run in float32.",)
        return Machine(
            name=self.name,
            device="cuda",
            memory_bytes=round(self.gib * GIB),
            host_memory_bytes=0,
            cores=0,
            instruction_sets=(),
            rates=self.rates,
            source=f"the table of GPUs ({self.source}); not measured here",
            idle_bytes=CONTEXT_BYTES,
            notes=notes,
        )


def _gpu(
    name: str, gib: float, bandwidth: float, rates: tuple[float, float, float, float], source: str
) -> GpuFacts:
    return GpuFacts(name, gib, bandwidth, *rates, source)


GPUS: Mapping[str, GpuFacts] = {
    "t4": _gpu("Tesla T4", 14.6, 320, (0, 65, 8.1, 0), _SHEET),
    "v100": _gpu("Tesla V100 SXM2 16 GB", 15.8, 900, (0, 125, 15.7, 0), _SHEET),
    "v100-32gb": _gpu("Tesla V100 SXM2 32 GB", 31.7, 900, (0, 125, 15.7, 0), _SHEET),
    "a10": _gpu("A10", 22.1, 600, (125, 125, 31.2, 0), _SHEET),
    "a10g": _gpu("A10G", 22.1, 600, (70, 70, 35, 0), "AWS and NVIDIA product pages"),
    "l4": _gpu("L4", 22.0, 300, (121, 121, 30.3, 242.5), _SHEET),
    "l40": _gpu("L40", 44.4, 864, (181, 181, 90.5, 362), _SHEET),
    "l40s": _gpu("L40S", 44.4, 864, (362, 362, 91.6, 733), _SHEET),
    "a100-40gb": _gpu("A100 SXM 40 GB", 39.4, 1555, (312, 312, 19.5, 0), _SHEET),
    "a100": _gpu("A100 SXM 80 GB", 79.2, 2039, (312, 312, 19.5, 0), _SHEET),
    "h100-pcie": _gpu("H100 PCIe", 79.2, 2000, (756, 756, 51, 1513), _SHEET),
    "h100": _gpu("H100 SXM", 79.2, 3350, (989.4, 989.4, 67, 1979), _SHEET),
    "h200": _gpu("H200 SXM", 139.8, 4800, (989.4, 989.4, 67, 1979), _SHEET),
    "b200": _gpu("B200", 178.0, 7700, (2250, 2250, 75, 4500), _SHEET),
    "a6000": _gpu("RTX A6000", 44.6, 768, (154.8, 154.8, 38.7, 0), _SHEET),
    "rtx6000-ada": _gpu("RTX 6000 Ada", 47.4, 960, (364.2, 364.2, 91.1, 728.5), _SHEET),
    "rtx-pro-6000": _gpu("RTX PRO 6000 Blackwell", 94.9, 1792, (503.8, 503.8, 125, 1007.6), _SHEET),
    "rtx3060": _gpu("GeForce RTX 3060 12 GB", 11.6, 360, (25.5, 25.5, 12.7, 0), "NVIDIA product page"),
    "rtx3070": _gpu("GeForce RTX 3070", 7.7, 448, (40.6, 40.6, 20.3, 0), _AMPERE),
    "rtx3080": _gpu("GeForce RTX 3080", 9.7, 760, (59.5, 59.5, 29.8, 0), _AMPERE),
    "rtx3090": _gpu("GeForce RTX 3090", 23.6, 936, (71, 71, 35.6, 0), _AMPERE),
    "rtx4060": _gpu("GeForce RTX 4060", 7.6, 272, (30.2, 30.2, 15.1, 60.5), _ADA),
    "rtx4060ti-16gb": _gpu("GeForce RTX 4060 Ti 16 GB", 15.6, 288, (44.1, 44.1, 22.1, 88.3), _ADA),
    "rtx4070": _gpu("GeForce RTX 4070", 11.6, 504, (58.3, 58.3, 29.1, 116.6), _ADA),
    "rtx4070ti": _gpu("GeForce RTX 4070 Ti", 11.6, 504, (80.2, 80.2, 40.1, 160.4), _ADA),
    "rtx4080": _gpu("GeForce RTX 4080", 15.6, 717, (97.5, 97.5, 48.7, 194.9), _ADA),
    "rtx4090": _gpu("GeForce RTX 4090", 23.5, 1008, (165.2, 165.2, 82.6, 330.3), _ADA),
    "rtx5070": _gpu("GeForce RTX 5070", 11.5, 672, (61.7, 61.7, 30.9, 123.5), _BLACKWELL),
    "rtx5070ti": _gpu("GeForce RTX 5070 Ti", 15.5, 896, (87.9, 87.9, 43.9, 175.8), _BLACKWELL),
    "rtx5080": _gpu("GeForce RTX 5080", 15.5, 960, (112.6, 112.6, 56.3, 225.1), _BLACKWELL),
    "rtx5090": _gpu("GeForce RTX 5090", 31.4, 1792, (209.5, 209.5, 104.8, 419), _BLACKWELL),
}
"""By the name that people write, spaces and dashes aside."""

_WORDS_WITHOUT_MEANING = re.compile(r"\b(nvidia|geforce|tesla|graphics|gpu|sxm\d?)\b|[^a-z0-9]")


def gpu_named(name: str) -> GpuFacts:
    """The card of that name, however it is written.

    >>> gpu_named("NVIDIA GeForce RTX 4090").gib
    23.5
    >>> gpu_named("4090") is gpu_named("rtx4090")
    True

    Raises:
        ConfigError: the table does not have it.
    """
    known = {_plain(key): facts for key, facts in GPUS.items()}
    known |= {_plain(facts.name): facts for facts in GPUS.values()}
    asked = _plain(name)
    for spelling in (asked, f"rtx{asked}", asked.removesuffix("80gb")):
        if spelling in known:
            return known[spelling]
    raise ConfigError(
        f"No GPU {name!r} in the table{suggest(name.lower(), list(GPUS)) or '.'}",
        meaning=f"It has {', '.join(GPUS)}.",
        fix="Use one of them, or describe the machine in a file (--machine FILE).",
    )


def _plain(name: str) -> str:
    return _WORDS_WITHOUT_MEANING.sub("", name.lower())
