"""Which base an adapter belongs to: an exact digest, and a signature that survives another dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import FormatError
from graftlm.methods.site import Site, base_modules

SAMPLES_PER_TENSOR = 64
SIGNATURE_LENGTH = 128
TOLERANCE = 0.02


@dataclass(frozen=True)
class BaseIdentity:
    """A base model's name, digest (SHA-256 over sampled weights) and signature (sampled values)."""

    name: str
    digest: str
    signature: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `graft.json`."""
        return {"name": self.name, "digest": self.digest, "signature": list(self.signature)}

    @classmethod
    def from_dict(cls, content: Any, source: str) -> BaseIdentity:
        """The inverse of `as_dict`.

        Raises:
            FormatError: the file does not hold an identity.
        """
        try:
            signature = tuple(float(value) for value in content["signature"])
            return cls(str(content["name"]), str(content["digest"]), signature)
        except (KeyError, TypeError, ValueError):
            raise FormatError(
                f"{source} does not say which base it belongs to.", meaning="It is damaged."
            ) from None

    def is_same(self, other: BaseIdentity) -> bool:
        """Bit-equal samples."""
        return self.digest == other.digest

    def is_close(self, other: BaseIdentity) -> bool:
        """The same weights up to rounding to another dtype: within 2 % of the typical size of a weight."""
        if len(self.signature) != len(other.signature):
            return False
        mine, theirs = torch.tensor(self.signature), torch.tensor(other.signature)
        typical = mine.abs().mean()
        return bool(((mine - theirs).abs() <= TOLERANCE * torch.maximum(mine.abs(), typical)).all())


def identify(model: nn.Module, *, without: Sequence[str] = ()) -> BaseIdentity:
    """The identity of a model's base weights, whatever is attached to or merged into it.

    Modules at the paths `without` do not count: an adapter that brings its own copy of a head fits any head.
    """
    digest = hashlib.sha256()
    values: list[Tensor] = []
    for path, tensor in sorted(_base_parameters(model), key=lambda item: item[0]):
        if any(path.startswith(f"{skipped}.") for skipped in without):
            continue
        sample = _sample(tensor.detach(), SAMPLES_PER_TENSOR)
        digest.update(f"{path}{tuple(tensor.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        values.append(sample)
    signature = _sample(torch.cat(values), SIGNATURE_LENGTH) if values else torch.empty(0)
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return BaseIdentity(
        name, digest.hexdigest(), tuple(float(f"{value:.6g}") for value in signature.tolist())
    )


def _sample(tensor: Tensor, count: int) -> Tensor:
    """Evenly spaced elements, on the CPU in float32."""
    flat = tensor.reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].float().cpu()


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    aside = {
        (id(site.base_layer), key): original
        for site in model.modules()
        if isinstance(site, Site)
        for key, original in site.originals.items()
    }
    for path, module in base_modules(model).items():
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{key}", aside.get((id(module), key), parameter)
