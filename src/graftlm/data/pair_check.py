"""What is wrong with sources and targets as a whole: copies, sources that ask for two answers, no source."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.data.duplicates import as_ranges
from graftlm.data.pairs import source_text
from graftlm.data.records import Example, Problem


def with_sources(examples: Sequence[Example]) -> tuple[list[Example], list[Problem]]:
    """The examples with something to read before what is written, and a problem for each of the others."""
    found, problems = [], []
    for example in examples:
        if any(not turn.trained for turn in example.turns):
            found.append(example)
            continue
        what = "nothing stands before the text to write"
        fix = "An encoder-decoder needs a source and a target: name their columns with data.format."
        problems.append(Problem(example.row, "error", "no_source", what, fix))
    return found, problems


def source_findings(examples: Sequence[Example]) -> list[Problem]:
    """Doubts about the whole: targets that copy their source, and sources with several targets.

    >>> from graftlm.data.records import Turn
    >>> def row(number, target):
    ...     return Example((Turn("user", "a", False), Turn("assistant", target, True)), number)
    >>> [problem.code for problem in source_findings([row(1, "a"), row(2, "b")])]
    ['copied', 'several_targets_of_one_source']
    """
    texts = [(_even(source_text(example)), _even(example.answer), example.row) for example in examples]
    found = []
    copied = [row for source, target, row in texts if source == target]
    if copied:
        what = f"{len(copied)} targets are copies of their source (rows {as_ranges(copied)})"
        fix = "Remove them if the model is not meant to learn to copy."
        found.append(Problem(None, "warning", "copied", what, fix))
    targets: dict[str, str] = {}
    several = [row for source, target, row in texts if targets.setdefault(source, target) != target]
    if several:
        what = f"{len(several)} rows have another target than an earlier row with the same source"
        fix = f"That is fine where several answers are right; else keep one (rows {as_ranges(several)})."
        found.append(Problem(None, "warning", "several_targets_of_one_source", what, fix))
    return found


def _even(text: str) -> str:
    return " ".join(text.split())
