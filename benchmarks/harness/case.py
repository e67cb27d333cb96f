"""One row of a comparison: what every side has to do, whoever it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from harness.shapes import Shape, shape_of

Method = Literal["lora", "dora", "ia3", "prefix", "bottleneck"]


@dataclass(frozen=True)
class Case:
    """Model, adapter, tokens and steps of one row.

    Synthetic data: `rows` rows of `length` tokens a step. Real data (`data` names a file under the shared
    folder): `examples` unpacked examples a step, cut at `length`; who packs does it in windows of `length`,
    `rows` of them at a time.
    """

    row: str
    shape: str = "0.17b"
    method: Method = "lora"
    rank: int = 16
    rows: int = 4
    length: int = 512
    steps: int = 5
    warm_up: int = 1
    rate: float = 2e-4
    dropout: float = 0.0
    quantization: str = "none"
    """Of the base; `fp8-products`: stored in FP8 and multiplied so."""
    recompute: str = "auto"
    """A policy of ours; peers recompute everything or nothing."""
    device: Literal["cpu", "cuda"] = "cpu"
    data: str = ""
    examples: int = 16
    adapters: int = 1
    """Attached adapters; one of them is trained."""
    active: int = 1
    """Of the attached ones; they are summed."""
    without: tuple[str, ...] = ()
    """Faster parts of ours that stay off, by the names of their files in models/fusing."""
    on_device: bool = False
    """Weights are drawn on the device by every side alike, instead of read from a folder."""

    @property
    def model(self) -> Shape:
        return shape_of(self.shape)

    def but(self, **changes: Any) -> Case:
        """The same with some fields changed."""
        return replace(self, **changes)

    def dumps(self) -> str:
        """As JSON, for another process."""
        return json.dumps(asdict(self))


def parse_case(text: str) -> Case:
    """What `Case.dumps` wrote.

    >>> parse_case(Case("a", without=("norms",)).dumps()) == Case("a", without=("norms",))
    True
    """
    fields = json.loads(text)
    return Case(**{**fields, "without": tuple(fields["without"])})
