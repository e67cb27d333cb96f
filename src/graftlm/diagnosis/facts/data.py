"""Facts from the rows as they were encoded: counts of rows, so that those of several tasks add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Facts:
    """A group of facts that can be kept as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`; what another version wrote besides is left out."""
        known = {field.name for field in fields(cls)}
        return cls(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in content.items()
                if key in known
            }
        )


@dataclass(frozen=True)
class Ends(Facts):
    """How the trained part of whole rows ends; rows that were cut are not counted."""

    rows: int
    without: int
    """Rows whose last trained token is no end token."""
    masked: int
    """Of those: an end token follows, and nothing is learnt from it."""
    token: str
    """The end token; nothing where the tokenizer has none."""
    pad_is_end: bool
    examples: tuple[int, ...] = ()
    """Numbers of a few rows without."""


@dataclass(frozen=True)
class Begins(Facts):
    """How rows begin."""

    rows: int
    doubled: int
    """Rows that begin with two begin tokens."""
    without: int
    """Rows that begin with none."""
    token: str
    """The begin token; nothing where the tokenizer has none."""
    is_expected: bool
    """Whether prompts begin with it when the model is used: the tokenizer or its chat template writes it."""
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rendering(Facts):
    """The template that made texts of conversations."""

    name: str
    """`chat` (the tokenizer's own) or `plain` (the fallback)."""
    digest: str
    """SHA-256 of the template in training."""
    rows: int
    refused: int
    """Rows that the template could not render."""
    reason: str
    """Of the first of them."""
    compared: int
    differing: int
    """Of the compared rows: those that do not begin with the prompt as the model gets it in use."""
    conversations: int
    """Rows that are conversations."""
    has_own: bool
    """Whether the tokenizer has a chat template."""
    digest_now: str = ""
    """Of the template that the tokenizer has now; nothing where nobody looked."""
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Masks(Facts):
    """What of the rows is trained on."""

    rows: int
    untrained: int
    """Rows of which nothing is trained."""
    tokens: int
    trained: int
    """Tokens with a loss."""
    prompted: int
    """Rows that have a prompt."""
    compared: int
    wrong: int
    """Of the compared rows: those whose trained tokens do not say the answer."""
    examples: tuple[int, ...] = ()
    """Numbers of a few rows that are untrained or wrong."""


@dataclass(frozen=True)
class Cuts(Facts):
    """What did not fit."""

    rows: int
    """Rows to train on before anything was left out."""
    answers: int
    """Rows whose answer lost its end, or that were dropped whole as it did not begin in time."""
    others: int
    """Rows that lost something else."""
    limit: int
    """The most tokens of a row."""
    percentile_95: int
    """Tokens of a row at the 95th percentile, before anything was left out as far as that is known."""
    wanted: int
    """Tokens that nearly all rows fit into (99 of 100)."""
    context: int = 0
    """The most tokens that the base takes; 0 where its tokenizer does not say."""
    examples: tuple[int, ...] = ()
    """Numbers of a few rows whose answer lost its end."""
    lengths: tuple[int, ...] = ()
    """Tokens of rows spread evenly over all lengths, shortest first: for the picture."""


@dataclass(frozen=True)
class Overlap(Facts):
    """Rows that are there more than once."""

    train: int
    held_out: int
    repeated: int
    """Training rows that repeat an earlier one."""
    leaked: int
    """Held-out rows of which at least half stands in the training rows."""
    touched: int
    """Held-out rows that share any sequence of 13 words with a few training rows."""
    pairs: tuple[str, ...] = ()
    """A few of the leaked: `held-out row = training row`."""


@dataclass(frozen=True)
class DataFacts:
    """Facts from the rows as they were encoded; a group is None where it was not looked at."""

    ends: Ends | None = None
    begins: Begins | None = None
    rendering: Rendering | None = None
    masks: Masks | None = None
    cuts: Cuts | None = None
    overlap: Overlap | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`.

        >>> facts = DataFacts(overlap=Overlap(90, 10, 0, 1, 2, pairs=("7 = 3",)))
        >>> DataFacts.from_dict(facts.as_dict()) == facts
        True
        """
        found: dict[str, Any] = {
            name: kind.from_dict(content[name]) for name, kind in GROUPS.items() if content.get(name)
        }
        return cls(**found)


GROUPS: Mapping[str, type[Facts]] = {
    "ends": Ends,
    "begins": Begins,
    "rendering": Rendering,
    "masks": Masks,
    "cuts": Cuts,
    "overlap": Overlap,
}
