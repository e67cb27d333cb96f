"""What streaming a base from a disk will cost, said before it is paid."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from graftlm.models.streaming.files import Range

_SAMPLE = 64 * 2**20
_CHUNK = 4 * 2**20


def cost_of_reading(layers: Sequence[Sequence[Range]], name: str) -> str:
    """One sentence: how much a pass reads, and how long that takes at the rate that is measured now."""
    sizes = [sum(each.nbytes for each in ranges) for ranges in layers]
    whole = sum(sizes)
    held = min(2 * max(sizes), whole)
    largest_range = max((each for ranges in layers for each in ranges), key=lambda each: each.nbytes)
    rate = read_rate(largest_range) if whole >= _SAMPLE else None  # small files tell how fast it seeks
    seconds = "" if rate is None else f" ({whole / rate:,.1f} s at the {rate / 1e9:.2f} GB/s measured here)"
    return (
        f"{len(layers)} layers of {name} stay on disk, up to {_size(held)} in memory at a time; "
        f"each pass, forward or backward, reads {_size(whole)}{seconds}, less what the system has cached"
    )


def read_rate(sample: Range) -> float | None:
    """Bytes per second at which the disk gives up to 64 MB that are in no cache; None where the system has no
    call to drop its cache."""
    if not hasattr(os, "posix_fadvise"):
        return None
    stop = min(sample.stop, sample.start + _SAMPLE)
    with sample.file.path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), sample.start, stop - sample.start, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        for start in range(sample.start, stop, _CHUNK):
            os.pread(file.fileno(), min(_CHUNK, stop - start), start)
        return (stop - sample.start) / max(time.perf_counter() - began, 1e-9)


def _size(count: int) -> str:
    """
    >>> _size(16_100_000_000), _size(3_000)
    ('16.1 GB', '0.0 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
