"""The machine of a plan: this one, measured once, or one that is described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graftlm.core.config import build, read_yaml
from graftlm.core.environment import describe_environment
from graftlm.core.errors import ConfigError
from graftlm.planning.calibration import assumed_rates
from graftlm.planning.gpus import CONTEXT_BYTES, GIB, GPUS, gpu_named
from graftlm.planning.kept_rates import kept_or_measured
from graftlm.planning.machine import Machine
from graftlm.planning.machine_file import MachineFile
from graftlm.planning.sizes import parse_bytes


def this_machine(*, calibrate: bool = True) -> Machine:
    """This machine with its rates: measured at the first call (some seconds) and kept for the user.

    Args:
        calibrate: False takes rates that were kept, and where there are none assumes usual ones of such a
            machine instead of measuring.
    """
    found = describe_environment()
    measured = kept_or_measured(found, measure_now=calibrate)
    machine = Machine(
        name=found.cpu or "this machine",
        device="cpu",
        memory_bytes=found.memory_bytes,
        host_memory_bytes=found.memory_bytes,
        cores=found.cores,
        instruction_sets=found.instruction_sets,
        rates=measured.rates if measured else assumed_rates(found),
        source=measured.source if measured else "assumed for a machine of this kind; not measured",
        idle_bytes=measured.idle_bytes if measured else CONTEXT_BYTES,
        start_seconds=measured.start_seconds if measured else Machine.start_seconds,
    )
    if not found.gpus:
        return machine
    return replace(machine, name=found.gpus[0].name, device="cuda", memory_bytes=found.gpus[0].memory_bytes)


def described(*, gpu: str | None, memory: str | None) -> Machine:
    """A machine with the named GPU, with one of that much memory, or with the named one at that memory.

    Args:
        gpu: as in `gpus.GPUS`, however it is written.
        memory: "24GB"; without `gpu`, rates are those of the slowest usual card of about that size.

    Raises:
        ConfigError: neither is given, the GPU is not in the table, or the size is none.
    """
    if gpu is None and memory is None:
        raise ConfigError("Neither a GPU nor its memory is given.", fix="Add --gpu or --gpu-memory.")
    size = parse_bytes(memory) if memory is not None else None
    if gpu is not None:
        machine = gpu_named(gpu).machine
        return machine if size is None else replace(machine, memory_bytes=size)
    assert size is not None
    return _of_size(size)


def read_machine(path: Path) -> Machine:
    """The machine that a YAML file describes (see `machine_file.MachineFile` for its keys).

    Raises:
        ConfigError: every problem of the file, with the nearest right name.
    """
    return build(MachineFile, read_yaml(path), source=str(path)).machine(path)


def _of_size(size: int) -> Machine:
    """Of cards with bfloat16 that have at least nine tenths of that memory, the slowest of the smallest."""
    usual = [card for card in GPUS.values() if card.bfloat16]
    large = [card for card in usual if card.gib * GIB >= 0.9 * size] or [
        max(usual, key=lambda card: card.gib)
    ]
    least = min(card.gib for card in large)
    card = min((card for card in large if card.gib <= 1.1 * least), key=lambda card: card.bfloat16)
    return replace(
        card.machine,
        name=f"a GPU with {size / 1e9:g} GB",
        memory_bytes=size,
        source=f"the memory that was given; rates of {card.name} from the table of GPUs, not measured here",
    )
