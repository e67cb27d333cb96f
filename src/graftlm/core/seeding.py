"""Random state of the whole process: seeded, captured and put back exactly."""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any, cast


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and every GPU).

    >>> import random
    >>> seed_everything(7); first = random.random()
    >>> seed_everything(7); random.random() == first
    True
    """
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*parts: object) -> int:
    """A seed for one purpose: equal parts give equal seeds, others unrelated ones. 63 bits, as torch takes.

    >>> derived_seed("order", 0, 1) == derived_seed("order", 0, 1) != derived_seed("order", 0, 2)
    True
    """
    digest = hashlib.sha256(f"graft {' '.join(map(str, parts))}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def capture_rng() -> dict[str, Any]:
    """The state of every generator `seed_everything` seeds, as JSON values; advances none of them.

    GPU states are included once the process uses a GPU. Needs no device synchronisation.
    """
    import numpy
    import torch

    version, words, gauss = random.getstate()
    # legacy=True: (name, key, position, has_gauss, cached_gaussian)
    name, key, position, has_gauss, cached = cast("tuple[Any, ...]", numpy.random.get_state(legacy=True))
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), _pack(key.tobytes()), int(position), int(has_gauss), float(cached)],
        "torch": _pack(torch.get_rng_state().numpy().tobytes()),
        "cuda": [_pack(state.numpy().tobytes()) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_initialized()
        else [],
    }


def restore_rng(state: dict[str, Any]) -> list[str]:
    """Put back what `capture_rng` gave; what could not be put back here is returned as sentences."""
    import numpy
    import torch

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, key, position, has_gauss, cached = state["numpy"]
    words = numpy.frombuffer(_unpack(key), dtype=numpy.uint32)
    numpy.random.set_state((name, words, position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    saved = state["cuda"]
    here = torch.cuda.device_count() if saved else 0
    for device in range(min(here, len(saved))):
        torch.cuda.set_rng_state(_tensor(saved[device]), device)
    if here < len(saved):
        return [
            f"Random state of {len(saved)} GPUs was saved and {here} are here: "
            "dropout will not repeat the interrupted run exactly."
        ]
    return []


def _tensor(text: str) -> Any:
    import torch

    return torch.frombuffer(bytearray(_unpack(text)), dtype=torch.uint8)


def _pack(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unpack(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
