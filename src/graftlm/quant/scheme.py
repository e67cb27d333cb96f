"""What to quantise a base to: the choices a user makes, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError

KINDS = ("nf4", "fp4", "int8", "fp8", "fp8_block")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Scheme:
    """How weights are stored.

    >>> Scheme.parse("nf4")
    Scheme(kind='nf4', double_quant=True, block_size=64)
    """

    kind: str
    """`nf4`, `fp4`: 4 bits, a scale for each block. `int8`, `fp8`: 8 bits, a scale for each row.
    `fp8_block`: 8 bits, a scale for each tile of 128 x 128."""
    double_quant: bool = True
    """Whether the scales of a 4-bit kind are stored in 8 bits (0.127 bits per parameter, not 0.5)."""
    block_size: int = 64

    @classmethod
    def parse(cls, name: str, *, double_quant: bool = True) -> Self:
        """The scheme of that name.

        Raises:
            ConfigError: no such kind.
        """
        if name not in KINDS:
            raise ConfigError(
                f"Unknown quantization {name!r}{suggest(name, KINDS) or '.'}",
                fix=f"Use one of none, {', '.join(KINDS)}.",
            )
        return cls(name, double_quant=double_quant)

    @property
    def is_four_bit(self) -> bool:
        return self.kind in ("nf4", "fp4")

    @property
    def has_row_scales(self) -> bool:
        """Whether each row can be read by itself."""
        return self.kind in ("int8", "fp8")
