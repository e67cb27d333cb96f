"""Every error Graft raises on purpose, in one tree.

GraftError (ValueError)          what was seen / what it usually means / what fixes it
├── UsageError                   the request itself is wrong: exit code 2
│   ├── ConfigError              a recipe, a method config or an option
│   └── MissingDependency        an optional package is not installed
├── DataError                    a data file or its rows
├── ModelError                   a base model or tokenizer
├── TargetError                  target modules that do not resolve
├── AdapterError                 a change of adapter state that makes no sense
├── FormatError                  an adapter folder or file
├── MergeError                   a merge that would be wrong
├── CheckpointError              a checkpoint or run folder
├── StorageError                 a disk that is full, read-only or gone
└── TrainingError                a run that cannot go on
"""

from __future__ import annotations

from collections.abc import Sequence


class GraftError(ValueError):
    """An error in three parts: what was *seen*, what it usually *means*, what *fixes* it.

    `problems` lists every single fault where one pass found several, so that nobody has to
    repair a file one message at a time.

    >>> print(GraftError("No rows.", meaning="The file is empty.", fix="Give a file with rows."))
    No rows.
      meaning: The file is empty.
      fix: Give a file with rows.
    """

    exit_code = 1

    def __init__(self, seen: str, *, meaning: str = "", fix: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(seen)
        self.seen = seen
        self.meaning = meaning
        self.fix = fix
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.seen]
        lines += [f"  - {problem}" for problem in self.problems]
        if self.meaning:
            lines.append(f"  meaning: {self.meaning}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The same parts for machines (`--json`)."""
        return {
            "error": type(self).__name__,
            "seen": self.seen,
            "meaning": self.meaning,
            "fix": self.fix,
            "problems": list(self.problems),
        }


class UsageError(GraftError):
    """The request itself is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe, a method config or an option does not validate."""


class MissingDependency(UsageError):
    """An optional package is needed and not installed.

    >>> print(MissingDependency("optuna", extra="search").fix)
    pip install 'graftlm[search]'
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(
            f"The package {package!r} is not installed.",
            meaning=f"It is part of the optional extra {extra!r}.",
            fix=f"pip install 'graftlm[{extra}]'",
        )


class DataError(GraftError):
    """A data file, or rows in it, cannot be used."""


class ModelError(GraftError):
    """A base model or its tokenizer cannot be loaded or used."""


class TargetError(GraftError):
    """Target modules do not resolve on this model."""


class AdapterError(GraftError):
    """A change of adapter state makes no sense; the model is untouched."""


class FormatError(GraftError):
    """An adapter folder or file is damaged, foreign or does not fit."""


class MergeError(GraftError):
    """A merge would be wrong; the model is untouched."""


class CheckpointError(GraftError):
    """A checkpoint or run folder cannot be used."""


class StorageError(GraftError):
    """The disk refused a write; what was there before is intact."""


class TrainingError(GraftError):
    """A run cannot go on."""
