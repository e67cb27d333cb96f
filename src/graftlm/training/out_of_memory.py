"""Running out of memory, in three parts: torch says it in different ways on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graftlm.core.errors import TrainingError

OUT_OF_MEMORY = "Out of memory"
"""How the error begins."""
_CPU_SAYS = "DefaultCPUAllocator: can't allocate memory"


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Inside, running out of memory is a `TrainingError`.

    >>> with memory_errors(torch.device("cpu")):
    ...     raise torch.OutOfMemoryError("asked for 3 GiB")
    Traceback (most recent call last):
    graftlm.core.errors.TrainingError: Out of memory on cpu: asked for 3 GiB...
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_lack_of_memory(error):
            raise
        raise TrainingError(
            f"{OUT_OF_MEMORY} on {device}: {_first_line(error)}",
            meaning="One micro-batch does not fit; the last checkpoint is intact.",
            fix="Halve per_device_train_batch_size and double gradient_accumulation_steps (the same result), "
            "set gradient_checkpointing: true, or shorten max_length; then start in a new folder.",
        ) from error


def _is_lack_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_SAYS in str(error)


def _first_line(error: Exception) -> str:
    """What was said, without the place in torch's sources."""
    said = (str(error).splitlines() or [""])[0]
    return said[said.index(_CPU_SAYS) :] if _CPU_SAYS in said else said or type(error).__name__
