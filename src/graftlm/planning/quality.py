"""How far methods get, in shares of what full fine-tuning gains, as far as that is known and from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

OURS = "docs/results/methods.md, two tasks on bases of 0.3M and 1.7M"
REGRET = "Schulman et al. 2025, LoRA Without Regret"

Grade = Literal["close to full fine-tuning", "somewhat below", "well below on small bases"]
GRADES: tuple[Grade, ...] = ("close to full fine-tuning", "somewhat below", "well below on small bases")
"""Methods of one grade are equal within what is known; the first grade is the best."""


@dataclass(frozen=True)
class Quality:
    """A band of the gain on held-out rows that full fine-tuning has: 0 as the base, 1 as full fine-tuning."""

    grade: Grade
    low: float
    high: float
    source: str

    @property
    def text(self) -> str:
        """The band, as a person reads it.

        >>> Quality("close to full fine-tuning", 0.82, 1.0, "").text
        '82-100 %'
        """
        return f"{100 * self.low:.0f}-{100 * self.high:.0f} %" if self.low < self.high else "100 %"

    @property
    def middle(self) -> float:
        """Where options are ordered by quality alone."""
        return (self.low + self.high) / 2

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Standing:
    """What is known of one method apart from its cost."""

    quality: Quality
    merges: bool
    """Whether it can be folded into the base's weights: then an answer takes no longer than the base's."""
    charge: float
    """Seconds are multiplied by this when options of one grade are compared: what a method has to save before
    it is taken instead of plain LoRA."""
    why: str
    """Why it is (not) the first to try, as a sentence."""


def _standing(
    grade: int, low: float, high: float, source: str, why: str, *, merges: bool = True, charge: float = 1.25
) -> Standing:
    return Standing(Quality(GRADES[grade], low, high, source), merges, charge, why)


_VARIANTS = "variants end within 1-2 % of each other once the rate is tuned (Learning Rate Matters, 2026)"

HELD_BACK = "lora, held back"
"""LoRA of a small rank with dropout and early stopping, for few examples."""

STANDINGS: Mapping[str, Standing] = {
    "lora": _standing(
        0, 0.82, 1.0, f"{REGRET}; {OURS}",
        "LoRA on all linear layers learns what full fine-tuning learns from sets of this kind, forgets "
        "less and "
        "its file is small",
        charge=1.0,
    ),
    HELD_BACK: _standing(
        0, 0.82, 1.0, f"{REGRET}; r 8-16 and dropout 0.05-0.1 are the usual advice for few examples",
        "few examples are learnt by heart within an epoch or two: a smaller rank, dropout and early "
        "stopping hold "
        "that back",
        charge=0.9,
    ),
    "lora, rank 64": _standing(
        0, 0.85, 1.0,
        f"PEFT's method comparison (Llama-3.2-3B, MetaMathQA): .513, rank 32 .478, full .472; {REGRET}",
        "a higher rank pays where the data hold more than a small one can keep",
    ),
    "lora, eva": _standing(
        0, 0.87, 0.97, OURS,
        "a start from the data was ahead of plain LoRA in every run of ours, and forgot somewhat more",
    ),
    "dora": _standing(
        0, 0.82, 1.0, f"{OURS}: equal to LoRA; {_VARIANTS}",
        "DoRA costs time over LoRA, and no measurement at hand shows it ahead",
    ),
    "full": _standing(
        0, 1.0, 1.0, "the reference",
        "full fine-tuning stores a whole model for each task and forgets most; worth it where data are "
        "plenty",
        charge=2.0,
    ),
    "bottleneck": _standing(
        1, 0.61, 0.90, f"{OURS}; Houlsby et al. 2019 (within 0.4 % of full on GLUE)",
        "bottleneck adapters are small and quick to train, but stay in the model: every answer pays for them",
        merges=False,
    ),
    "ia3": _standing(
        1, 0.55, 0.85, f"{OURS}; Liu et al. 2022",
        "(IA)^3 trains some ten thousand numbers: for very many tasks, or few examples",
    ),
    "prefix": _standing(
        2, 0.47, 0.75, f"{OURS}; Li and Liang 2021",
        "a prefix learns slowly and takes positions of the context",
        merges=False,
    ),
    "prompt": _standing(
        2, 0.05, 0.60, f"{OURS}; Lester et al. 2021 (close to full from 10B on)",
        "a prompt is the smallest adapter there is, and needs a large base",
        merges=False,
    ),
}  # fmt: skip
"""By the name of a candidate (`planning.candidates`)."""

UNKNOWN = Standing(
    Quality(GRADES[1], 0.0, 1.0, "nothing is known of it here"), False, 1.25, "it was asked for by name"
)

STORAGE_LOSS: Mapping[str, str] = {
    "none": "",
    "int8": "int8 changed the held-out loss by -0.3 to +0.1 % (docs/results/qlora.md)",
    "fp8": "fp8 changed the held-out loss by +0.1 to +0.7 % (docs/results/qlora.md)",
    "nf4": "NF4 changed the held-out loss by -0.1 to +0.5 % (docs/results/qlora.md); QLoRA matched 16 bits "
    "up to 65B (Dettmers et al. 2023)",
    "fp4": "FP4 loses more than NF4 (Dettmers et al. 2023)",
}
"""What storing the base in few bits costs, by kind."""

STORAGE_CHARGE: Mapping[str, float] = {"none": 1.0, "int8": 1.4, "fp8": 1.4, "nf4": 1.5, "fp4": 1.7}
"""As `Standing.charge`: what a quantised base has to save in time before it is taken although 16 bits fit."""
