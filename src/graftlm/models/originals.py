"""The weights that a quantised base was made from, read again from where it came, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftlm.core.errors import ModelError
from graftlm.models.locate import locate
from graftlm.models.tensor_files import StoredTensor, read_headers
from graftlm.models.weight_files import weight_files
from graftlm.quant.storage import SUFFIXES


def originals_of(model: nn.Module, source: str | Path | None = None) -> Callable[[str], Tensor]:
    """A function that reads the weight of the layer at a path as it was before it was quantised.

    Args:
        model: a quantised base.
        source: folder, hub id or one file of what it was made from; by default what its config names.

    Raises:
        ModelError: nothing says where the base came from, there is no such model, or it is quantised itself.
            The function raises it for a layer that has no weight there.
    """
    config: Any = getattr(model, "config", None)
    name = source or getattr(config, "_name_or_path", "")
    if not name:
        raise ModelError(
            "This base does not say what it was quantised from.",
            meaning="It was made in memory, and a quantised weight does not tell what it was.",
            fix="Load it with graftlm.load_model(name, quantization='nf4').",
        )
    path = Path(name).expanduser()
    tensors = read_headers([path] if path.is_file() else weight_files(locate(name)))
    extra = {f".{suffix}" for suffix in SUFFIXES} - {".weight"}
    if any(key.endswith(tuple(extra)) for key in tensors):
        raise ModelError(
            f"{name} is stored quantised.",
            meaning="The weights before quantising are not in it.",
            fix="Name the 16-bit model that it was made from, and load that with quantization='nf4'.",
        )

    def original(path: str) -> Tensor:
        return _nearest(f"{path}.weight", tensors, str(name)).read()

    return original


def _nearest(wanted: str, tensors: dict[str, StoredTensor], name: str) -> StoredTensor:
    """The tensor whose name ends as that of a parameter does: files leave out or add names at the front."""
    if wanted in tensors:
        return tensors[wanted]
    shared = {key: _common_ending(wanted, key) for key in tensors}
    best = max(shared.values(), default=0)
    found = [key for key, count in shared.items() if count == best]
    if len(found) != 1 or not _has_number(wanted, best):
        raise ModelError(
            f"{name} has no tensor for {wanted}.",
            problems=[f"{key} is one of {len(found)} candidates" for key in found[:3]] if best else [],
            meaning="The files name their tensors in a way of their own.",
            fix="Use another start than 'loftq', or exclude this layer.",
        )
    return tensors[found[0]]


def _common_ending(one: str, other: str) -> int:
    """How many names, counted from the end, two paths share.

    >>> _common_ending("model.layers.0.mlp.weight", "layers.0.mlp.weight")
    4
    """
    count = 0
    for first, second in zip(_backwards(one), _backwards(other), strict=False):
        if first != second:
            break
        count += 1
    return count


def _has_number(path: str, count: int) -> bool:
    """Whether the last `count` names of a path say in which block it is, if any of its names does."""
    names = list(_backwards(path))
    return not any(map(str.isdigit, names)) or any(map(str.isdigit, names[:count]))


def _backwards(path: str) -> Iterable[str]:
    return reversed(path.split("."))
