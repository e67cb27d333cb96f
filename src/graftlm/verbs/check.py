"""`graft check`: what is in a data file, what is wrong with it, and what would be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from graftlm.core.errors import UsageError
from graftlm.data.check_source import check_source
from graftlm.data.report import CheckReport
from graftlm.data.templates import TemplateName
from graftlm.models.load import load_tokenizer

WINDOW = 1024
"""Tokens, where nobody says; a recipe's default."""


def check(
    data: str | Path,
    *,
    model: str | None = None,
    max_length: int | None = None,
    format: str = "auto",
    template: str = "auto",
) -> CheckReport:
    """Look at `data` with the tokenizer of `model` (without one, lengths count characters). Writes nothing.

    Args:
        max_length: tokens of a training window; 1,024 unless given.

    Raises:
        DataError: nothing in the file can be read, or nothing of it can be trained on.
        UsageError: an option that has no effect without a model.
    """
    if model is None and (max_length is not None or template != "auto"):
        option = "max_length" if max_length is not None else "template"
        raise UsageError(
            f"{option} has no effect without a model.",
            meaning="Windows and chat templates belong to a tokenizer; without one, check counts characters.",
            fix="Name the model: --model M",
        )
    tokenizer = None if model is None else load_tokenizer(model)
    chosen = cast(TemplateName, template)  # any other word is refused below, by name
    return check_source(data, tokenizer, format=format, max_length=max_length or WINDOW, template=chosen)
