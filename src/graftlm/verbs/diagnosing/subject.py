"""What is diagnosed: a run, an adapter from elsewhere, or a merged model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.core.config import build, read_yaml
from graftlm.core.errors import FormatError
from graftlm.formats.layout import CONFIG
from graftlm.training.recipe import Recipe
from graftlm.verbs.diagnosing.depth import Depth
from graftlm.verbs.references import ADAPTER, RECIPE, base_of_config, refuse_registry_name

MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Subject:
    """Where to look, and what somebody said about base and data."""

    folder: Path
    """As it was named."""
    run: Path | None = None
    """The run folder, where there is one."""
    adapters: tuple[Path, ...] = ()
    """Adapter folders: none while a run has not ended, several where it has several tasks."""
    merged: Path | None = None
    """A whole model, where that is what was named."""
    base: str | None = None
    """The base: as given, else as the adapter or the recipe names it."""
    data: str | None = None
    """Data as given; a run has its own."""
    depth: Depth = field(default_factory=Depth)
    """What to compare with when base and adapter are run."""

    @property
    def adapter(self) -> Path | None:
        """The first adapter."""
        return self.adapters[0] if self.adapters else None

    @property
    def shown(self) -> str:
        """The folder as a command needs it."""
        return shlex.quote(str(self.folder))

    def recipe(self) -> Recipe | None:
        """The recipe of the run.

        Raises:
            ConfigError: it was edited, or another version of Graft wrote it.
        """
        if self.run is None:
            return None
        path = self.run / RECIPE
        return build(Recipe, read_yaml(path), source=str(path))


def subject_of(reference: str | Path, *, base: str | None = None, data: str | None = None) -> Subject:
    """Find out what `reference` is.

    Raises:
        FormatError: neither a run, nor an adapter, nor a model.
    """
    refuse_registry_name(str(reference))
    folder = Path(reference)
    if (folder / RECIPE).is_file():
        found = tuple(sorted(path.parent for path in (folder / ADAPTER).glob(f"*/{CONFIG}")))
        adapters = (folder / ADAPTER,) if (folder / ADAPTER / CONFIG).is_file() else found
        return Subject(folder, folder, adapters, base=base or _of_recipe(folder), data=data)
    if (folder / CONFIG).is_file():
        run = next((up for up in folder.absolute().parents[:2] if (up / RECIPE).is_file()), None)
        return Subject(folder, run, (folder,), base=base or base_of_config(folder), data=data)
    if (folder / MODEL_CONFIG).is_file():
        return Subject(folder, merged=folder, base=base, data=data)
    raise FormatError(
        f"{folder} is no run folder, adapter folder or model."
        if folder.exists()
        else f"There is no {folder}.",
        meaning=f"A run folder holds {RECIPE}, an adapter folder {CONFIG}, a model {MODEL_CONFIG}.",
        fix="Check the path.",
    )


def _of_recipe(run: Path) -> str | None:
    section: Any = read_yaml(run / RECIPE).get("model")
    name = section.get("name") if isinstance(section, dict) else section
    return str(name) if name else None
