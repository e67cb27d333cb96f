"""Memory that operators borrow for one call and that is there again for the next. It never leaves them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_Tensors = dict[torch.dtype, Tensor]


class _Held(threading.local):
    def __init__(self) -> None:
        self.by_dtype: _Tensors = {}


class _Stream:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_dtype: _Tensors = {}


_held = _Held()
_streams: defaultdict[tuple[torch.device, int], _Stream] = defaultdict(_Stream)


def borrowed(count: int, dtype: torch.dtype) -> Tensor:
    """`count` values [count] on the CPU, of any content, for this thread until it calls again.

    Each thread has its own, as large as the largest that it asked for.
    """
    return _at_least(count, dtype, torch.device("cpu"), _held.by_dtype)


@contextmanager
def borrowed_on_stream(count: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """`count` values [count] on a CUDA device for what is queued inside, on its current stream.

    What is queued later waits for it there, so that one for each stream is enough. A graph that is being
    captured gets memory of its own, which lives as long as the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        yield torch.empty(count, dtype=dtype, device=device)
        return
    stream = _streams[device, torch.cuda.current_stream(device).cuda_stream]
    with stream.lock:
        yield _at_least(count, dtype, device, stream.by_dtype)


def _at_least(count: int, dtype: torch.dtype, device: torch.device, held: _Tensors) -> Tensor:
    if dtype not in held or len(held[dtype]) < count:
        held.pop(dtype, None)  # first, so that the old and the new are never there together
        with torch.inference_mode(False):  # a tensor born in inference mode would not serve training
            held[dtype] = torch.empty(count, dtype=dtype, device=device)
    return held[dtype][:count]
