"""`graft check`: what is in a data file, what is wrong with it, and what would be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from graftlm.data.check_source import check_source
from graftlm.data.report import CheckReport
from graftlm.data.templates import TemplateName
from graftlm.models.load import load_tokenizer


def check(
    data: str | Path,
    *,
    model: str | None = None,
    max_length: int = 1024,
    format: str = "auto",
    template: str = "auto",
) -> CheckReport:
    """Look at `data` with the tokenizer of `model` (without one, lengths count characters). Writes nothing.

    Raises:
        DataError: nothing in the file can be read, or nothing of it can be trained on.
    """
    tokenizer = None if model is None else load_tokenizer(model)
    chosen = cast(TemplateName, template)  # any other word is refused below, by name
    return check_source(data, tokenizer, format=format, max_length=max_length, template=chosen)
