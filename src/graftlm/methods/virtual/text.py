"""Token ids of a text that virtual tokens begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError


def token_ids(
    text: str, count: int, *, tokenizer: str | None, base: nn.Module, options: Mapping[str, Any]
) -> Tensor:
    """`count` ids: the text's, repeated or cut. Code that comes with a tokenizer is never run.

    Raises:
        ConfigError: there is no tokenizer to be found, or the text has no tokens.
    """
    from transformers import AutoTokenizer

    source = tokenizer or str(getattr(getattr(base, "config", None), "_name_or_path", "") or "")
    if not source:
        raise ConfigError(
            "There is no tokenizer to read the text with.",
            meaning="The base was not loaded from a folder.",
            fix="Give tokenizer_name_or_path.",
        )
    safe = {key: value for key, value in options.items() if key != "trust_remote_code"}
    try:
        ids = list(AutoTokenizer.from_pretrained(source, trust_remote_code=False, **safe)(text)["input_ids"])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No tokenizer can be loaded from {source}: {error}", fix="Correct tokenizer_name_or_path."
        ) from None
    if not ids:
        raise ConfigError(f"The text {text!r} has no tokens.", fix="Give another text.")
    return torch.tensor((ids * -(-count // len(ids)))[:count])
