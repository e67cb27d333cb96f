"""Which base an adapter belongs to: an exact digest, and a signature that survives another dtype.

A base that is stored in few bits counts with the numbers that its layers compute with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import FormatError
from graftlm.methods.site import Site, base_modules
from graftlm.quant.embedding import QuantisedEmbedding, TiedHead
from graftlm.quant.packed import PackedWeight
from graftlm.quant.sampling import values_at
from graftlm.quant.scheme import Scheme
from graftlm.quant.weights import WeightHandle

SAMPLES_PER_TENSOR = 64
SIGNATURE_LENGTH = 128
TOLERANCE = 0.02


@dataclass(frozen=True)
class BaseIdentity:
    """A base model's name, digest (SHA-256 over sampled weights) and signature (sampled values), and what it
    is stored in where that is few bits."""

    name: str
    digest: str
    signature: tuple[float, ...]
    scheme: Scheme | None = None

    def as_dict(self) -> dict[str, Any]:
        """What `graft.json` says of it."""
        base = {"name": self.name, "digest": self.digest, "signature": list(self.signature)}
        return {"base": base} | ({"base_quantization": asdict(self.scheme)} if self.scheme else {})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str) -> BaseIdentity:
        """The inverse of `as_dict`; other keys are left alone.

        Raises:
            FormatError: the file does not hold an identity.
        """
        try:
            base, stored = content["base"], content.get("base_quantization")
            signature = tuple(float(value) for value in base["signature"])
            scheme = Scheme(**stored) if stored else None
            return cls(str(base["name"]), str(base["digest"]), signature, scheme)
        except (KeyError, TypeError, ValueError):
            raise FormatError(
                f"{source} does not say which base it belongs to.", meaning="It is damaged."
            ) from None

    def is_same(self, other: BaseIdentity) -> bool:
        """Bit-equal samples."""
        return self.digest == other.digest

    def is_close(self, other: BaseIdentity) -> bool:
        """The same weights up to rounding to another dtype: within 2 % of the typical size of a weight.

        Up to quantisation where either is quantised: rounding to few bits changes a weight by 10 % and more,
        and never turns its sign.
        """
        if len(self.signature) != len(other.signature):
            return False
        mine, theirs = torch.tensor(self.signature), torch.tensor(other.signature)
        if self.scheme or other.scheme:
            return bool((mine * theirs >= 0).all())
        typical = mine.abs().mean()
        return bool(((mine - theirs).abs() <= TOLERANCE * torch.maximum(mine.abs(), typical)).all())


def identify(model: nn.Module, *, without: Sequence[str] = ()) -> BaseIdentity:
    """The identity of a model's base weights, whatever is attached to or merged into it.

    Modules at the paths `without` do not count: an adapter that brings its own copy of a head fits any head.
    """
    digest = hashlib.sha256()
    values: list[Tensor] = []
    for path, weight in sorted(_base_weights(model), key=lambda item: item[0]):
        if any(path.startswith(f"{skipped}.") for skipped in without):
            continue
        sample = _sample(weight, SAMPLES_PER_TENSOR)
        digest.update(f"{path}{_shape(weight)}".encode())
        digest.update(sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        values.append(sample)
    signature = _sample(torch.cat(values), SIGNATURE_LENGTH) if values else torch.empty(0)
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return BaseIdentity(
        name,
        digest.hexdigest(),
        tuple(float(f"{value:.6g}") for value in signature.tolist()),
        scheme_of(model),
    )


def scheme_of(model: nn.Module) -> Scheme | None:
    """What the linear layers of a model are stored in; None where they are dense."""
    modules = base_modules(model).values()
    handles = (WeightHandle(module) for module in modules if not isinstance(module, QuantisedEmbedding))
    return next((handle.packed.scheme for handle in handles if handle.is_packed), None)


@dataclass(frozen=True)
class _Packed:
    """A packed weight, and whether the model's architecture has it as [in, out]."""

    value: PackedWeight
    is_transposed: bool


def _shape(weight: Tensor | _Packed) -> tuple[int, ...]:
    """As the architecture has it."""
    if isinstance(weight, Tensor):
        return tuple(weight.shape)
    rows, columns = weight.value.shape
    return (columns, rows) if weight.is_transposed else (rows, columns)


def _sample(weight: Tensor | _Packed, count: int) -> Tensor:
    """Evenly spaced elements, in the order of the architecture's own weight, on the CPU in float32."""
    shape = _shape(weight)
    size = math.prod(shape)
    index = torch.linspace(0, size - 1, min(count, size), dtype=torch.float64).long()
    if isinstance(weight, Tensor):
        return weight.detach().reshape(-1)[index.to(weight.device)].float().cpu()
    if weight.is_transposed:
        index = (index % shape[1]) * shape[0] + index // shape[1]
    return values_at(weight.value, index).cpu()


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | _Packed]]:
    aside = {id(site.base_layer): site.originals for site in model.modules() if isinstance(site, Site)}
    for path, module in base_modules(model).items():
        handle = WeightHandle(module)
        if isinstance(module, TiedHead):
            yield f"{path}.weight", _Packed(module.embedding.packed, is_transposed=False)
        held = handle.held(recurse=False) | aside.get(id(module), {})
        for key, own in held.items():
            yield f"{path}.{key}", _Packed(handle.packed, handle.made_from is Conv1D) if own is None else own
