"""Layers that stay in the checkpoint's own files and are read, layer by layer, when a pass needs them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError, ModelError
from graftlm.models.arriving import on_their_way
from graftlm.models.quantised_load import load_quantised
from graftlm.models.streaming.cost import cost_of_reading
from graftlm.models.streaming.files import MappedFile, Range, joined, mapped, outside
from graftlm.models.streaming.streamed import DISK, begin_streaming, streamed_layers, streamed_tensors
from graftlm.models.tensor_files import StoredTensor
from graftlm.quant.scheme import Scheme

_MOST_COPIED = 0.05
"""Share of a layer's bytes that may lie in memory after all (a tensor that had to be converted)."""


@dataclass(frozen=True)
class Piece:
    """What one layer has in the files: its byte ranges, and its tensors with the count of writes to each."""

    ranges: tuple[Range, ...]
    tensors: tuple[tuple[Tensor, int], ...]


class DiskMover:
    """Asks the system for the bytes of a layer ahead of their use, and releases them after it."""

    placement = DISK

    def __init__(self, pieces: Sequence[Piece], files: Iterable[MappedFile], name: str) -> None:
        self.pieces, self.files = list(pieces), list(files)
        self._whole = joined(each for piece in pieces for each in piece.ranges)
        self.why = cost_of_reading([piece.ranges for piece in pieces], name)

    def require_intact(self) -> None:
        """At the beginning of a pass.

        Raises:
            ModelError: a file was changed or cut.
        """
        for file in self.files:
            file.require_unchanged()

    def fetch(self, layer: int) -> None:
        """The system reads on while this process computes.

        Raises:
            ModelError: a file was changed or cut, or somebody wrote to a weight: what was written is lost.
        """
        piece = self.pieces[layer]
        if any(tensor._version != version for tensor, version in piece.tensors):
            raise ModelError(
                f"A weight of layer {layer} was written to, and lies in a file.",
                meaning="What is written there is lost as soon as the layer is released.",
                fix="Load the base with placement='resident' to change its weights.",
            )
        for file in {each.file for each in piece.ranges}:
            file.require_unchanged()
        for each in piece.ranges:
            each.file.ask(each.start, each.stop)

    def settle(self, layer: int) -> None:
        """What has not come yet is waited for here, not page by page in the middle of a product."""
        for each in self.pieces[layer].ranges:
            each.file.bring(each.start, each.stop)

    def keep(self, layers: Collection[int]) -> None:
        """The memory of all others is the system's again. Touching a page maps whatever lies with it in one
        block of the cache, which may be the end of a layer that is long past."""
        kept = [each for layer in layers for each in self.pieces[layer].ranges]
        for each in outside(self._whole, kept):
            each.file.let_go(each.start, each.stop)


def load_from_disk(
    model_class: Any,
    config: Any,
    tensors: Mapping[str, StoredTensor],
    scheme: Scheme | None,
    *,
    dtype: torch.dtype,
    packed: bool,
    name: str,
) -> tuple[Any, dict[str, Any]]:
    """The model of that class and config over the files of `tensors`, and what transformers says of the
    loading. Call `stream_from_disk` once it is known to be complete.

    Args:
        packed: whether the checkpoint holds quantised weights.

    Raises:
        ModelError: the files hold another number format than `dtype`.
        ConfigError: they are to be quantised to `scheme`.
    """
    _refuse_packing(scheme, name)
    _require_stored_as(tensors, dtype, packed=packed, name=name)
    given, places = mapped(tensors)
    if packed:
        model, info = load_quantised(
            model_class, config, given, None, dtype=dtype, device=torch.device("cpu")
        )
    else:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=on_their_way(given, lambda count: None, [], packed=False),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are reported
        )
    info["places"] = places
    return model, info


def stream_from_disk(model: nn.Module, places: Mapping[int, Range], name: str) -> None:
    """From now on the layers of `model` are in memory only while a pass needs them.

    Raises:
        ModelError: loading converted weights, which are therefore not those of the files.
    """
    pieces: list[Piece] = []
    copied = whole = 0
    for layer in streamed_layers(model):
        ranges: list[Range] = []
        held: list[tuple[Tensor, int]] = []
        for tensor in streamed_tensors(layer):
            place = places.get(tensor.untyped_storage().data_ptr())
            whole += tensor.nbytes
            if place is None:
                copied += tensor.nbytes
            else:
                ranges.append(place)
                held.append((tensor, tensor._version))
        pieces.append(Piece(tuple(joined(ranges)), tuple(held)))
    if copied > _MOST_COPIED * whole:
        raise ModelError(
            f"{copied / whole:.0%} of the layers of {name} cannot be used from its files.",
            meaning="transformers rearranges them while it loads (the experts of a mixture, for instance).",
            fix="Rearrange it once, on a machine with memory for it: model, tokenizer = gl.load_model(name); "
            "model.save_pretrained(folder, save_original_format=False); tokenizer.save_pretrained(folder)",
        )
    _own_vectors(model)
    begin_streaming(model, DiskMover(pieces, {place.file for place in places.values()}, name))


def _refuse_packing(scheme: Scheme | None, name: str) -> None:
    if scheme is None:
        return
    raise ConfigError(
        f"{name} is not stored as {scheme.kind}: it cannot be quantised and stay on disk.",
        meaning="With placement='disk' weights are computed with as they lie in the checkpoint's files.",
        fix="Quantise it once, on a machine with memory for the quantised model, and name that folder: "
        f"gl.save_base(*gl.load_model({name!r}, quantization={scheme.kind!r}), folder)",
    )


def _own_vectors(model: nn.Module) -> None:
    """Norms and biases of the layers in memory of their own: they are small, and lie on shared pages."""
    for layer in streamed_layers(model):
        for parameter in layer.parameters():
            if parameter.dim() <= 1:
                parameter.data = parameter.data.clone()


def _require_stored_as(
    tensors: Mapping[str, StoredTensor], dtype: torch.dtype, *, packed: bool, name: str
) -> None:
    """Weights are taken as they lie: they must lie as they are computed with."""
    dense = [each for each in tensors.values() if each.dtype.is_floating_point and each.dtype.itemsize > 1]
    others: dict[torch.dtype, int] = {}
    for each in dense:
        if each.dtype != dtype and len(each.shape) > 1:
            others[each.dtype] = others.get(each.dtype, 0) + each.nbytes
    if packed or sum(others.values()) <= _MOST_COPIED * sum(each.nbytes for each in dense):
        return
    most = max(others, key=others.__getitem__)
    stored, wanted = (str(each).removeprefix("torch.") for each in (most, dtype))
    raise ModelError(
        f"{name} is stored in {stored} and is to compute in {wanted}: it cannot be used from its files.",
        meaning="With placement='disk' weights are computed with as they lie there; to convert them in every "
        "pass would take longer than the pass.",
        fix=f"dtype={stored!r} uses it as it is. Or convert it once, on a machine with memory for it: "
        f"model, tokenizer = gl.load_model({name!r}, dtype={wanted!r}); model.save_pretrained(folder); "
        "tokenizer.save_pretrained(folder)",
    )
