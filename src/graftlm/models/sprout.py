"""Where the embedded base lies: a small Llama model in the package itself."""

from __future__ import annotations

from pathlib import Path

from graftlm.core.errors import ModelError

SPROUT = "sprout"
"""The name people give instead of a folder or a hub id."""

FOLDER = Path(__file__).parent / "weights" / SPROUT


def sprout_folder() -> Path:
    """The folder of the embedded base.

    Raises:
        ModelError: this installation lacks it.
    """
    if not (FOLDER / "config.json").is_file():
        raise ModelError(
            "The embedded base 'sprout' is missing from this installation.",
            meaning="The package was copied or built without its data files.",
            fix="Install it again (pip install --force-reinstall graftlm), or name another model.",
        )
    return FOLDER


def known_text_path() -> Path:
    """Held-out text of the kind that the embedded base was trained on: JSON Lines with `text`."""
    return sprout_folder() / "known.jsonl"


def demo_data_path() -> Path:
    """The raw data of `graft demo`: JSON Lines with `prompt` and `completion`."""
    return sprout_folder() / "demo.jsonl"
