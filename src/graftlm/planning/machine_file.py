"""A machine that is not here, written down in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from graftlm.core.config import Config
from graftlm.planning.gpus import CONTEXT_BYTES, DISK_READ, GIGA, OPERATION_SECONDS, gpu_named
from graftlm.planning.machine import Machine, Rates
from graftlm.planning.sizes import parse_bytes

CPU_OPERATION_SECONDS = 20e-6
CPU_IDLE_BYTES = 350 * 2**20


class RatesSection(Config):
    """What the device does per second. With `gpu`, each figure replaces that of the table."""

    matrix: dict[Literal["bfloat16", "float16", "float32", "fp8"], float] = Field(default_factory=dict)
    """Operations per second of matrix products, by dtype."""
    bandwidth: float | None = Field(None, gt=0)
    """Bytes per second of copies, read and written ones counted."""
    operation_seconds: float | None = Field(None, gt=0)
    """What one more small operation costs."""
    disk_read: float | None = Field(None, gt=0)
    """Bytes per second in which weights are read."""

    @field_validator("matrix")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if wrong := [kind for kind, rate in value.items() if rate <= 0]:
            raise ValueError(f"the rate in {', '.join(wrong)} must be above 0")
        return value


class MachineFile(Config):
    """The keys of a machine's file."""

    aliases: ClassVar[Mapping[str, str]] = {
        "gpu_memory": "memory", "vram": "memory", "ram": "host_memory", "price": "price_per_hour",
    }  # fmt: skip

    name: str | None = None
    device: Literal["cpu", "cuda"] | None = None
    """Unwritten: `cuda` with `gpu`, else `cpu`."""
    gpu: str | None = None
    """A card of the table, for what is not written here."""
    memory: str | int | None = None
    """Of the device: bytes, or text such as 24GB or 24GiB."""
    host_memory: str | int | None = None
    cores: int = Field(0, ge=0)
    instruction_sets: tuple[str, ...] = ()
    rates: RatesSection = RatesSection()
    idle_memory: str | int | None = None
    """What a process takes before it has loaded a model."""
    price_per_hour: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _is_enough(self) -> Self:
        if self.gpu is not None and self.device == "cpu":
            raise ValueError("gpu and device: cpu contradict each other; leave one of them out")
        missing = [] if self.gpu or self.memory is not None else ["memory"]
        if self.gpu is None:
            missing += [] if self.rates.matrix else ["rates.matrix"]
            missing += [] if self.rates.bandwidth else ["rates.bandwidth"]
        if missing:
            raise ValueError(f"without gpu these are needed: {', '.join(missing)}")
        return self

    def machine(self, path: Path) -> Machine:
        """What the file at `path` describes."""
        base = gpu_named(self.gpu).machine if self.gpu else None
        is_gpu = base is not None or self.device == "cuda"
        memory = _bytes(self.memory, base.memory_bytes if base else 0)
        return Machine(
            name=self.name or (base.name if base else path.stem),
            device="cuda" if is_gpu else "cpu",
            memory_bytes=memory,
            host_memory_bytes=_bytes(self.host_memory, 0 if is_gpu else memory),
            cores=self.cores,
            instruction_sets=self.instruction_sets,
            rates=_rates(self.rates, base.rates if base else None, is_gpu=is_gpu),
            source=f"the file {path.name}",
            idle_bytes=_bytes(self.idle_memory, CONTEXT_BYTES if is_gpu else CPU_IDLE_BYTES),
            price_per_hour=self.price_per_hour,
        )


def _rates(section: RatesSection, known: Rates | None, *, is_gpu: bool) -> Rates:
    matrix = dict(known.matrix) if known else {}
    matrix.update({str(kind): rate for kind, rate in section.matrix.items()})
    seconds = OPERATION_SECONDS if is_gpu else CPU_OPERATION_SECONDS
    return Rates(
        matrix=matrix,
        bandwidth=section.bandwidth or (known.bandwidth if known else GIGA),
        operation_seconds=section.operation_seconds or (known.operation_seconds if known else seconds),
        disk_read=section.disk_read or (known.disk_read if known else DISK_READ),
        attention={} if section.matrix or known is None else known.attention,
    )


def _bytes(value: str | int | None, otherwise: int) -> int:
    return otherwise if value is None else parse_bytes(value)
