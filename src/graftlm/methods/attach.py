"""Attach an adapter to a model: resolve everything first, then commit it whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from graftlm.methods.adapter_set import ATTRIBUTE, AdapterSet, ParameterType
from graftlm.methods.base import MethodConfig
from graftlm.methods.storage import Storage


def attach(
    model: nn.Module,
    config: MethodConfig,
    name: str = "default",
    *,
    storage: Storage[AdapterSet],
    dtype: ParameterType = "float32",
) -> AdapterSet:
    """Add an adapter to a model. The first becomes active and trainable, and freezes the base; later ones
    join the same `AdapterSet`, inactive and frozen.

    Raises:
        TargetError, AdapterError: nothing in the model was changed.
    """
    return _attached(model, name, storage, lambda adapters: adapters.add(name, config, dtype=dtype))


def attach_folder(
    model: nn.Module, folder: Path, name: str = "default", *, storage: Storage[AdapterSet]
) -> AdapterSet:
    """Attach the adapter that lies in `folder`; like `attach`, the first becomes active and trainable.

    Raises:
        FormatError: the folder is damaged or belongs to another base; the model is untouched.
    """
    return _attached(model, name, storage, lambda adapters: adapters.load(folder, name))


def _attached(
    model: nn.Module, name: str, storage: Storage[AdapterSet], make: Callable[[AdapterSet], None]
) -> AdapterSet:
    existing = adapters_of(model)
    adapters = AdapterSet(model, storage) if existing is None else existing
    is_first = not adapters.names
    with ExitStack() as undo:
        if existing is None:
            undo.callback(adapters.detach)
        make(adapters)
        undo.pop_all()
    if is_first:
        adapters.activate(name)
        adapters.train_only(name)
    return adapters


def adapters_of(model: nn.Module) -> AdapterSet | None:
    """The `AdapterSet` of a model, or None."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, AdapterSet) else None
