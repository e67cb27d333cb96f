"""The commands that findings give."""

from __future__ import annotations

from collections.abc import Mapping


def tune_again(rule: str, changes: Mapping[str, object]) -> str:
    """The run once more with other values, into a new folder beside it.

    >>> tune_again("D04", {"train.learning_rate": 2e-4})
    'graft tune RUN/recipe.yaml --set train.learning_rate=0.0002 --out RUN-d04'
    """
    values = " ".join(f"--set {key}={_written(value)}" for key, value in changes.items())
    return f"graft tune RUN/recipe.yaml {values} --out RUN-{rule.lower()}"


def _written(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
