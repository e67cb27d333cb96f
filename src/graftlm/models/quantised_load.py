"""Load a model whose linear layers are stored in few bits, one tensor at a time.

transformers does the loading, with all its renamings and conversions; it hands every weight of a linear layer
over as soon as it is read. What is kept of it is the packed weight, so that memory peaks at the quantised
model and about one tensor. The packed layers take their places at the end, when transformers is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftlm.core.errors import ModelError
from graftlm.models.arriving import ArrivingWeight, on_their_way
from graftlm.models.stored_scheme import METHOD
from graftlm.models.tensor_files import StoredTensor
from graftlm.quant.convert import dense_weight, forget_quantisation, packed_layer, quantisable
from graftlm.quant.packed import PackedWeight, encode
from graftlm.quant.scheme import Scheme

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""


@dataclass
class Intake:
    """What arrives during one load."""

    scheme: Scheme | None
    """What to quantise to; None where the checkpoint holds packed weights."""
    device: torch.device
    planned: frozenset[str] = frozenset()
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def plan(self, model: nn.Module) -> None:
        """Look at the empty model: which layers are to be packed, and what shape everything has."""
        self.planned = frozenset(quantisable(model)) if self.scheme is not None else frozenset()
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def takes(self, name: str) -> bool:
        """Whether the weight of that name is to come here rather than go into the model."""
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and (self.scheme is None or path in self.planned)

    def take(self, model: nn.Module, name: str, value: Tensor) -> Tensor | None:
        """Keep a weight in few bits; returns what is to go into the model after all."""
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear | Conv1D):
            return value.dense() if isinstance(value, ArrivingWeight) else value
        shape = tuple(dense_weight(module).shape)
        if isinstance(value, ArrivingWeight):
            if value.packed is not None and value.packed.shape != shape:
                self.faults.append(_mismatch(name, value.packed.shape, shape))
            elif value.packed is not None:
                self.packed[path] = _moved(value.packed, self.device)
        elif self.scheme is None:
            return value
        elif value.shape != module.get_parameter("weight").shape:
            self.faults.append(_mismatch(name, value.shape, module.get_parameter("weight").shape))
        else:
            weight = value.to(self.device)
            try:
                oriented = weight.t() if isinstance(module, Conv1D) else weight
                self.packed[path] = encode(oriented, self.scheme, name=name)
            except ModelError as error:
                self.faults.append(error.seen)
        return None

    def put_in_place(self, model: nn.Module, absent: Iterable[str]) -> None:
        """Put the packed layers into the loaded model, and pack what came by another way; what did not come
        at all (`absent`) stays as it is."""
        if self.scheme is not None:
            for path in self.planned - self.packed.keys() - {name.rpartition(".")[0] for name in absent}:
                module = model.get_submodule(path)
                self.packed[path] = encode(dense_weight(module), self.scheme, name=f"{path}.weight")
        for path in sorted(self.packed):
            model.set_submodule(path, packed_layer(model.get_submodule(path), self.packed.pop(path)))

    def misshapen(self, model: nn.Module) -> list[tuple[str, torch.Size, torch.Size]]:
        """What was loaded in another shape than the model had: (name, stored, expected)."""
        loaded = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return [(name, loaded[name], shape) for name, shape in self.shapes.items() if loaded[name] != shape]


def load_quantised(
    model_class: Any,
    config: Any,
    tensors: Mapping[str, StoredTensor],
    scheme: Scheme | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The model of that class and config, filled from `tensors`, and what transformers says of the loading.

    Args:
        scheme: what to quantise to; None where the checkpoint is quantised already.
        dtype: of everything that stays dense, and of what packed weights are decoded to.
        device: where packed weights go at once; everything else comes on the CPU.

    Raises:
        ModelError: weights that are not finite, damaged or of another shape, all of them named.
    """
    intake = Intake(scheme, device)
    tick = _counter(tensors, progress)
    weights = on_their_way(tensors, tick, intake.faults, packed=scheme is None)
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            quantization_config=_Request(intake),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are reported
        )
    except RuntimeError as error:
        if not intake.faults:
            raise
        raise _unusable(intake.faults) from error
    if intake.faults:
        raise _unusable(intake.faults)
    known = {name for name, *_ in info["mismatched_keys"]}
    extra = [entry for entry in intake.misshapen(model) if entry[0] not in known]
    info["mismatched_keys"] = [*info["mismatched_keys"], *extra]
    intake.put_in_place(model, [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    return model, info


@register_quantization_config(METHOD)
class _Request(QuantizationConfigMixin):  # type: ignore[misc]
    """How a load reaches transformers. Read from a config.json it has no intake, and is refused."""

    def __init__(self, intake: Intake | None = None, **stored: Any) -> None:
        self.quant_method = METHOD
        self.intake = intake

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Request:
        return self


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Hands the weights that an `Intake` wants over to it."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.quantization_config.intake is None:
            raise ModelError(
                "This model was quantised by Graft.",
                meaning="transformers alone cannot read it.",
                fix="graftlm.load_model(folder)",
            )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return bool(self.quantization_config.intake.takes(param_name))

    def get_quantize_ops(self) -> ConversionOps:
        return _Handover(self.quantization_config.intake)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.quantization_config.intake.plan(model)

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        """Leave no trace: a model with packed layers can be moved and cast like any other."""
        forget_quantisation(model)


class _Handover(ConversionOps):  # type: ignore[misc]
    """The last conversion of a weight."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        *,
        model: nn.Module,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        remaining = {}
        for name, given in input_dict.items():
            value = given[0] if isinstance(given, list) else given
            rest = self.intake.take(model, name, value) if self.intake.takes(name) else value
            if rest is not None:
                remaining[name] = rest
                continue
            missing_keys.discard(name)
            model.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]
        return remaining


def _counter(tensors: Mapping[str, StoredTensor], progress: Progress | None) -> Callable[[int], None]:
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return tick


def _moved(packed: PackedWeight, device: torch.device) -> PackedWeight:
    tensors = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
    return PackedWeight(packed.scheme, packed.shape, tensors)


def _mismatch(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return f"{name}: stored as {list(stored)}, the model has {list(expected)}"


def _unusable(faults: list[str]) -> ModelError:
    return ModelError(
        f"{len(faults)} weights cannot be used.",
        problems=faults[:20],
        meaning="A damaged download, files of another model, or a model whose training diverged.",
        fix="Copy or download the model again.",
    )
