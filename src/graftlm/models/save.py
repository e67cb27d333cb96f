"""Write a dense model and its tokenizer in the `transformers` layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graftlm.core.errors import StorageError
from graftlm.core.storage import require_space
from graftlm.models.bars import no_bars


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save into an existing folder, as safetensors, without progress bars of other packages.

    Raises:
        StorageError: the disk has no room for it, or refuses.
    """
    require_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()))
    try:
        with no_bars():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # how safetensors tells what the operating system refused
        raise StorageError(
            f"Cannot write the model to {folder}: {error}.",
            meaning="The disk or the quota is full, or the disk is gone.",
            fix="Free some space, or choose another folder.",
        ) from error
