"""Every property of a method on every kind of model, as one table."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, GraftError
from graftlm.methods.base import MethodConfig
from graftlm.testing.case import Case
from graftlm.testing.expect import expect_refusal
from graftlm.testing.models import KINDS, QUANTISED, unquantised
from graftlm.testing.properties import PROPERTIES, Outcome, check, why_not
from graftlm.testing.snapshot import snapshot

MATRIX = ("llama", "gpt2", "bert", "roberta", "t5", "bart")
"""Two decoders, two encoders, two encoder-decoders."""

ON_QUANTISED = ("llama-nf4",)
"""Kinds of quantised base on which `python -m graftlm.testing` shows every row too."""

REFUSAL = "refusal"
"""The one cell of a kind of model that a method does not take: attaching is refused, nothing changes."""


@dataclass(frozen=True)
class Subject:
    """A method under test: a config for every kind of model, and what it does not promise."""

    config: MethodConfig | Callable[[str], MethodConfig]
    """One config for every kind, or a function from the kind to the config."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """`property` or `property/kind` -> why the method does not have it."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Kind of model -> why attaching to it is refused."""

    def __post_init__(self) -> None:
        named = [key.partition("/") for key in self.exceptions]
        require_known("property", (name for name, _, _ in named), PROPERTIES)
        require_known(
            "kind of model", (*self.refused, *(kind for _, _, kind in named if kind)), (*KINDS, *QUANTISED)
        )

    def case(self, kind: str) -> Case:
        """The method on one kind of model."""
        config = self.config if isinstance(self.config, MethodConfig) else self.config(unquantised(kind))
        return Case(kind, config, self.exceptions)

    def refusal(self, kind: str) -> str:
        """Why attaching to a kind of model is refused, as declared; "" if it is not."""
        return self.refused.get(kind, self.refused.get(unquantised(kind), ""))

    def cells(
        self, kinds: Sequence[str] = MATRIX, properties: Sequence[str] = tuple(PROPERTIES)
    ) -> Iterator[Cell]:
        """Everything there is to check."""
        require_known("property", properties, PROPERTIES)
        require_known("kind of model", kinds, (*KINDS, *QUANTISED))
        for kind in kinds:
            names = [REFUSAL] if self.refusal(kind) else properties
            yield from (Cell(self.case(kind), name) for name in names)


@dataclass(frozen=True)
class Cell:
    """One property of one method on one kind of model."""

    case: Case
    property: str

    def check(self) -> Outcome:
        """Raises AssertionError where the property does not hold."""
        if self.property == REFUSAL:
            _refused(self.case)
            return "refused"
        return check(self.property, self.case)


@dataclass(frozen=True)
class Finding:
    """What came of a cell: an outcome, or `failed`, and the reason or the error in words."""

    kind: str
    property: str
    outcome: Outcome | Literal["failed"]
    words: str = ""


@dataclass(frozen=True)
class Report:
    """All findings about one method."""

    findings: tuple[Finding, ...]

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.outcome == "failed")

    def count(self, outcome: str, name: str | None = None) -> int:
        """How many cells came out so, in all or for one property."""
        return sum(f.outcome == outcome and name in (None, f.property) for f in self.findings)

    def __str__(self) -> str:
        """A line per property, a column per kind; then the reasons and the failures."""
        kinds = list(dict.fromkeys(finding.kind for finding in self.findings))
        names = list(dict.fromkeys(finding.property for finding in self.findings))
        found = {(finding.property, finding.kind): finding.outcome for finding in self.findings}
        width = max(map(len, names), default=0)
        lines = [" " * width + "".join(f"{kind:>11}" for kind in kinds)]
        lines += [f"{n:{width}}" + "".join(f"{found.get((n, k), '-'):>11}" for k in kinds) for n in names]
        reasons = dict.fromkeys(
            f"{f.property}: {f.words}" for f in self.findings if f.words and f.outcome != "failed"
        )
        lines += ["", *reasons] if reasons else []
        lines += [f"FAILED {f.property} on {f.kind}: {f.words}" for f in self.failures]
        return "\n".join(lines)


def examine(
    subject: Subject, kinds: Sequence[str] = MATRIX, properties: Sequence[str] = tuple(PROPERTIES)
) -> Report:
    """Check every cell, whatever fails."""
    return Report(tuple(_finding(cell, subject) for cell in subject.cells(kinds, properties)))


def check_method(
    config: MethodConfig | Callable[[str], MethodConfig],
    *,
    kinds: Sequence[str] = MATRIX,
    exceptions: Mapping[str, str] | None = None,
    refused: Mapping[str, str] | None = None,
    properties: Sequence[str] = tuple(PROPERTIES),
) -> Report:
    """Put a method through all properties on tiny models of each kind.

    Args:
        config: the method's config, or a function that gives one for a kind of model.
        kinds: names from `graftlm.testing.models.KINDS`, and from `QUANTISED` there.
        exceptions: `property` or `property/kind` -> why the method does not have it.
        refused: kind -> why the method does not go on it.
        properties: names from `graftlm.testing.properties.PROPERTIES`.

    Raises:
        AssertionError: with the whole table and every failure.
        ConfigError: a name of a property or of a kind is not known.

    >>> from graftlm.methods.lora import LoraConfig
    >>> report = check_method(LoraConfig(r=2), kinds=["llama", "bert"], properties=["identity", "merge"])
    >>> report.count("holds")
    4
    """
    report = examine(Subject(config, exceptions or {}, refused or {}), kinds, properties)
    if report.failures:
        raise AssertionError(f"{len(report.failures)} of {len(report.findings)} cells failed\n{report}")
    return report


def require_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Names of properties and kinds are spelled right.

    Raises:
        ConfigError: those that are not, with the nearest name.
    """
    choices = list(known)
    problems = [
        f"{name!r} is no {what}{suggest(name, choices)}"
        for name in dict.fromkeys(names)
        if name not in choices
    ]
    if problems:
        raise ConfigError(
            f"This {what} is not known.", problems=problems, fix=f"Choose from: {', '.join(choices)}."
        )


def _finding(cell: Cell, subject: Subject) -> Finding:
    kind = cell.case.kind
    try:
        outcome = cell.check()
    except Exception as error:  # whatever a method raises is a finding about it, and the next cell runs
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        return Finding(kind, cell.property, "failed", words)
    if outcome == "holds":
        return Finding(kind, cell.property, outcome)
    reason = subject.refusal(kind) or why_not(cell.property, cell.case)
    return Finding(kind, cell.property, outcome, reason)


def _refused(case: Case) -> None:
    model = case.base()
    unchanged = snapshot(model)
    expect_refusal(lambda: case.untrained(model=model), GraftError, f"attaching to {case.kind}")
    unchanged()
