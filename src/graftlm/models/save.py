"""Write a dense model and its tokenizer in the `transformers` layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from graftlm.core.storage import require_space


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save into an existing folder, as safetensors, without progress bars of other packages.

    Raises:
        StorageError: the disk has no room for it.
    """
    require_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()))
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
