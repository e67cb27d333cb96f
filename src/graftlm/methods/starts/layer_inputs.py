"""What the layers of a base read when batches run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.methods.adapter_set import ATTRIBUTE, AdapterSet
from graftlm.quant.facts import device_of

Batch = Mapping[str, Tensor]
"""Arguments of the model's forward, with `labels` where they say which tokens are learned."""
Consumer = Callable[[Tensor], None]


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """No adapter applied, no dropout, no gradients; every mode as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    adapters = getattr(model, ATTRIBUTE, None)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if isinstance(adapters, AdapterSet):
            stack.enter_context(adapters.disabled())
        model.eval()
        try:
            yield
        finally:
            for module, is_training in modes:
                module.training = is_training


def shared_inputs(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, str]:
    """For each layer that the batch reaches, the first that reads the very same tensor (often itself)."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    held: list[Tensor] = []  # an address stands for a tensor only while the tensor lives

    def watch(path: str) -> Consumer:
        def seen(x: Tensor) -> None:
            held.append(x)
            place = (x.data_ptr(), x.shape, x.stride(), x._version)
            found.setdefault(path, first.setdefault(place, path))

        return seen

    _run(model, {path: (module, watch(path)) for path, module in modules.items()}, batch)
    return {path: found[path] for path in modules if path in found}


def observe(
    model: nn.Module,
    consumers: Mapping[str, tuple[nn.Module, Consumer]],
    batch: Batch,
    *,
    ignored_label: int | None,
) -> None:
    """Run a batch; each consumer gets the rows [n, features] that its layer reads of tokens that count.

    Padding never counts; tokens whose label is `ignored_label` do not either, unless it is None.
    """
    device = device_of(model)
    masks = [mask.to(device) for mask in _masks(model, batch, ignored_label)]

    def rows_of(consume: Consumer) -> Consumer:
        return lambda x: consume(_rows(x, masks))

    _run(model, {path: (module, rows_of(use)) for path, (module, use) in consumers.items()}, batch)


def _run(model: nn.Module, consumers: Mapping[str, tuple[nn.Module, Consumer]], batch: Batch) -> None:
    def hook(consume: Consumer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: consume(args[0])

    device = device_of(model)
    drops_labels = not _is_encoder_decoder(
        model
    )  # there labels only cost a loss; elsewhere they are the input
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels" or not drops_labels}
    with ExitStack() as hooks:
        for module, consume in consumers.values():
            hooks.callback(module.register_forward_pre_hook(hook(consume)).remove)
        model(**inputs)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _masks(model: nn.Module, batch: Batch, ignored_label: int | None) -> Iterable[Tensor]:
    """Boolean [B, T] masks of tokens that count: one for the input, one more for a decoder of its own."""
    attention, labels = batch.get("attention_mask"), batch.get("labels")
    is_learned = None if labels is None or ignored_label is None else labels != ignored_label
    is_real = attention.bool() if attention is not None and attention.dim() == 2 else None
    if _is_encoder_decoder(model):
        return [mask for mask in (is_real, is_learned) if mask is not None]
    if is_real is None or is_learned is None or is_real.shape != is_learned.shape:
        return [mask for mask in (is_real, is_learned) if mask is not None and mask.dim() == 2][:1]
    return [is_real & is_learned]


def _rows(x: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """Rows of [B, T, features], or of [B T, features] where a model flattens; all where no mask fits."""
    for mask in masks:
        if x.shape[:-1] == mask.shape:
            return x[mask]
        if x.dim() == 2 and x.shape[0] == mask.numel():
            return x[mask.flatten()]
    return x.reshape(-1, x.shape[-1])
