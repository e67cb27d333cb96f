"""Whether compiling the layers of a model pays in a run: a pure function, so a run that goes on agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Switch = Literal["auto", "on", "off"]

_MEASURED: Mapping[tuple[str, str], float] = MappingProxyType({("cpu", "bfloat16"): -0.08})
"""Share of a step that compiled layers save beside the native kernels (benchmarks/tuning.py, row
lora-512-compiled): they are slower, since layers that share an input are no longer computed together."""
SECONDS_PER_PRODUCT = 2.5e-12
"""Of a training step, for each parameter of the base and token, on two cores with bfloat16 matrix units."""
SECONDS_TO_COMPILE = 25.0
"""Once in a run, whatever the number of layers: equal layers share their code."""
MARGIN = 2.0
"""How many times over the saving must pay for the compilation."""


@dataclass(frozen=True)
class CompileChoice:
    """The decision, its reason, and the numbers behind it; in `plan.json`."""

    compiles: bool
    why: str
    saved_seconds: float
    """Predicted for the whole run, below 0 where it would cost; 0 where no gain was measured."""
    compile_seconds: float = SECONDS_TO_COMPILE

    @property
    def text(self) -> str:
        """As a person reads it.

        >>> CompileChoice(False, "the recipe says so", 0.0).text
        'not compiled (the recipe says so)'
        """
        return f"{'compiled' if self.compiles else 'not compiled'} ({self.why})"


def measured_gain(device: str, dtype: str) -> float | None:
    """Share of a step that compiled layers save, below 0 where they cost; None where nobody measured it.

    >>> measured_gain("cuda", "bfloat16") is None
    True
    """
    return _MEASURED.get((device, dtype))


def choose_compile(
    asked: Switch,
    *,
    gain: float | None,
    steps: int,
    tokens_per_step: int,
    parameters: int,
    obstacle: str = "",
) -> CompileChoice:
    """Compile if the recipe says so, or if it is predicted to save more than it costs.

    Args:
        gain: as of `measured_gain`, for the base's device ("cpu") and dtype ("bfloat16").
        tokens_per_step: of one optimizer step, padding included.
        parameters: of the base.
        obstacle: why this model's layers cannot be compiled in this run; empty if they can.

    >>> small = dict(gain=0.1, tokens_per_step=2048, parameters=170_000_000)
    >>> choose_compile("auto", steps=100, **small).why
    'predicted to save 9 s in 100 steps and to cost 25 s'
    >>> choose_compile("auto", steps=2000, **small).compiles
    True
    """
    saved = round((gain or 0.0) * steps * tokens_per_step * parameters * SECONDS_PER_PRODUCT, 1)
    if asked != "auto":
        return CompileChoice(asked == "on", "the recipe says so", saved)
    if obstacle:
        return CompileChoice(False, obstacle, 0.0)
    if gain is None:
        return CompileChoice(False, "its gain was not measured on this device in this dtype", 0.0)
    if gain <= 0.0:
        return CompileChoice(False, f"steps were {-gain:.0%} slower with compiled layers", saved)
    why = f"predicted to save {saved:.0f} s in {steps:,} steps and to cost {SECONDS_TO_COMPILE:.0f} s"
    return CompileChoice(saved >= MARGIN * SECONDS_TO_COMPILE, why, saved)
