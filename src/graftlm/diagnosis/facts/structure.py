"""Facts from the files of an adapter, from its base's config, and from a model in somebody's own loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graftlm.diagnosis.facts.data import Facts


@dataclass(frozen=True)
class BaseShape:
    """What the config of the base says."""

    ties: bool
    """Whether the output head and the embedding are one tensor."""
    vocabulary: int
    """Rows of the embedding."""
    has_head: bool
    """Whether its checkpoint ends in a head that labels rows or tokens."""


@dataclass(frozen=True)
class FileFacts:
    """What the files of an adapter hold."""

    attention: int
    """Adapted modules inside of attention."""
    feed_forward: int
    """Adapted modules of blocks outside of attention."""
    adapted_ends: tuple[str, ...]
    """Adapted modules that are the embedding or the output head."""
    copied: Mapping[str, int]
    """Bytes of the modules that are held whole, by path."""
    copied_ends: tuple[str, ...]
    """Those of them that are the embedding or the output head."""
    ends_are_equal: bool
    """Whether the copies of embedding and output head hold the same numbers."""
    adapter_bytes: int
    """Of everything that is no copy."""
    rows: int
    """Rows of the longest copied embedding or output head; 0 where none is copied."""
    outputs: int
    """Places of which it can be told whether they moved: those that LoRA and its kin adapt."""
    still: int
    """Of those: the change is exactly zero."""


@dataclass(frozen=True)
class LoopState(Facts):
    """A model and its optimizer as they stood in somebody's own loop."""

    trainable: int
    """Tensors that require gradients."""
    unknown: int | None = None
    """Of those: tensors that the optimizer does not hold. None: there was no optimizer to look at."""
    stale: int | None = None
    """Tensors that the optimizer holds, and that are no part of the model."""
    active: tuple[str, ...] = ()
    """Adapters that answer."""
    optimised: tuple[str, ...] = ()
    """Adapters of which the optimizer holds tensors."""
    irregular: tuple[str, ...] = ()
    """What differs from layer to layer: which adapters are active, or merged, or enabled."""
    dropouts: int | None = None
    """Dropout layers that were active while the model was evaluated. None: no evaluation was looked at."""
    repeat_difference: float | None = None
    """Largest difference between two computations of the same logits in an evaluation."""
    examples: tuple[str, ...] = ()
    """Names of a few tensors that the optimizer does not hold."""


@dataclass(frozen=True)
class StructureFacts:
    """A field is None where it was not looked at."""

    type: str = ""
    """PEFT's name of the method: `LORA`."""
    labels: str = ""
    """The class of the model it was trained on, where that labels rows or tokens."""
    head_saved: bool = False
    """Whether the files hold the head of that model."""
    ensures_tying: bool = False
    """Whether the config asks to keep embedding and head one tensor."""
    files: FileFacts | None = None
    base: BaseShape | None = None
    siblings: Mapping[str, float] = field(default_factory=dict)
    """Adapters saved beside this one: name -> share of their places that moved."""
    logged_steps: int | None = None
    """Steps that another trainer's log counts."""
    loop: LoopState | None = None
    split_tie: bool | None = None
    """Of a whole model: whether its files hold two different tensors where its config says that they are
    one."""
