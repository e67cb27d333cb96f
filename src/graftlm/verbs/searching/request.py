"""What somebody asked `search` for, before there is a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.config import override, read_yaml
from graftlm.training.recipe import long_form
from graftlm.verbs.outputs import next_free, require_new_output
from graftlm.verbs.run_folder import YAML_SUFFIXES
from graftlm.verbs.searching.folder import SearchFolder


def sections_of(
    source: str, given: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]
) -> dict[str, Any]:
    """What the user wrote of a recipe: its file, the options of the command, `--set`."""
    is_recipe = Path(source).suffix.lower() in YAML_SUFFIXES
    sections: dict[str, Any] = long_form(read_yaml(Path(source))) if is_recipe else {"data": {"path": source}}
    for name, section in given.items():
        sections[name] = {**sections.get(name, {}), **section}
    return override(sections, overrides)


def new_folder(out: Path | None, sections: Mapping[str, Any]) -> SearchFolder:
    """A new folder for a search."""
    path = Path(str(sections["data"]["path"])).name.split(".")[0] or "search"
    chosen = out or next_free(Path("searches"), path)
    require_new_output(chosen)
    chosen.mkdir(parents=True, exist_ok=True)
    return SearchFolder(chosen)
