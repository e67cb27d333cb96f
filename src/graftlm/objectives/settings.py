"""What a recipe may say of a task, by its name: each objective has its settings in its own file."""

from __future__ import annotations

from collections.abc import Mapping

from graftlm.core.config import Config
from graftlm.objectives.sft import SftSettings

AUTO = "auto"


class AutoSettings(Config):
    """The task is told from the data; it has no settings of its own."""


SETTINGS: Mapping[str, type[Config]] = {
    AUTO: AutoSettings,
    "sft": SftSettings,
}
"""Name of a task -> its settings."""
