"""Layers of a base in FP8 that multiply in 8 bits too, while a model is trained. Opt-in: values change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.kernels.fp8_products import STEP, why_not
from graftlm.quant.convert import quantised_layers
from graftlm.quant.facts import device_of
from graftlm.quant.linear import QuantisedLinear


@dataclass(frozen=True)
class Fp8Products:
    """The layers that do, of `total` in FP8. Shapes that tensor cores do not take stay with 16 bits."""

    total: int
    layers: Sequence[QuantisedLinear]

    @property
    def summary(self) -> str:
        """As every `FasterPart`."""
        return f"{len(self.layers)} of {self.total} layers in FP8 multiply in 8 bits"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """As every `FasterPart`."""
        for layer in self.layers:
            layer.multiplies_in_fp8 = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer.multiplies_in_fp8 = False


def fp8_products(model: nn.Module) -> Fp8Products:
    """The layers of a model that can multiply in 8 bits.

    Raises:
        ConfigError: the device cannot, or no layer of the model can.
    """
    device = device_of(model)
    reason = why_not(device)
    if reason is not None:
        raise ConfigError(
            f"{device} does not multiply in FP8 with a scale for each row: {reason}",
            meaning="NVIDIA GPUs do from Hopper (H100) on, with a torch built for them.",
            fix="Leave model.products out: a base in fp8 is then read into 16 bits for each product.",
        )
    found = [layer for layer in quantised_layers(model).values() if layer.scheme.kind == "fp8"]
    fitting = [layer for layer in found if all(size % STEP == 0 for size in layer.shape)]
    if not fitting:
        raise ConfigError(
            f"None of the {len(found)} layers in FP8 has both sides divisible by {STEP}.",
            fix="Leave model.products out.",
        )
    return Fp8Products(len(found), fitting)
