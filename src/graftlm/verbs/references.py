"""What people may write where a verb wants an adapter: a run folder, an adapter folder, or a base."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from graftlm.core.config import read_yaml
from graftlm.core.errors import FormatError, UsageError
from graftlm.formats.layout import CONFIG

ADAPTER, RECIPE = "adapter", "recipe.yaml"
VERSIONED = re.compile(r"[A-Za-z0-9._-]+@[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Reference:
    """An adapter on disk, the base that it names, and the recipe of its run where there is one."""

    adapter: Path
    base: str
    run: Path | None
    part: str | None = None
    """Which task of the run it belongs to, where the run has several."""


def adapter_reference(text: str, base: str | None = None) -> Reference:
    """Find the adapter that `text` names; `base` overrides the base that its files name.

    Raises:
        FormatError: there is no adapter; UsageError: nobody says which base it belongs to.
    """
    refuse_registry_name(text)
    folder = Path(text)
    if (folder / CONFIG).is_file():
        run = folder.absolute().parents[1]
        part = folder.name if folder.absolute().parent == run / ADAPTER and (run / RECIPE).is_file() else None
        return Reference(folder, base or _named_base(folder), None if part is None else run, part)
    if (folder / ADAPTER / CONFIG).is_file():
        return Reference(folder / ADAPTER, base or _named_base(folder / ADAPTER), run=folder)
    if several := sorted(path.parent for path in (folder / ADAPTER).glob(f"*/{CONFIG}")):
        raise UsageError(
            f"The run in {folder} has {len(several)} adapters, one for each of its tasks.",
            fix=f"Name one of them: {', '.join(map(str, several))}",
        )
    if (folder / RECIPE).is_file():
        raise FormatError(
            f"The run in {folder} has no adapter yet.",
            meaning="It was interrupted before its end.",
            fix=f"graft tune {shlex.quote(str(folder))} --resume",
        )
    raise FormatError(
        f"{folder} is neither an adapter folder nor a run folder."
        if folder.exists()
        else f"There is no {folder}.",
        meaning=f"An adapter folder holds {CONFIG}, a run folder holds {ADAPTER}/{CONFIG}.",
        fix="Check the path.",
    )


def refuse_registry_name(text: str) -> None:
    """Say what a name such as `support@3` is, rather than that no such folder exists.

    Raises:
        UsageError: it is one.
    """
    if VERSIONED.fullmatch(text) and not Path(text).exists():
        raise UsageError(
            f"There is no folder {text}; it looks like a name in the registry.",
            meaning="The registry of adapters is not in this version of Graft.",
            fix="Give a run folder or an adapter folder.",
        )


def recipe_model(run: Path) -> dict[str, object]:
    """The `model` section of a run's recipe."""
    section = read_yaml(run / RECIPE).get("model", {})
    return section if isinstance(section, dict) else {}


def base_of_config(folder: Path) -> str | None:
    """The base that the config of an adapter names; None where it names none.

    Raises:
        FormatError: the config is no JSON.
    """
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(
            f"{folder / CONFIG} is not valid JSON: {error}.",
            meaning="The file is damaged or cut off.",
            fix="Copy or train the adapter again.",
        ) from None
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return str(name) if name else None


def _named_base(folder: Path) -> str:
    name = base_of_config(folder)
    if name is None:
        raise UsageError(
            f"{folder / CONFIG} does not name the base of the adapter.",
            meaning="The tool that wrote it left the name out.",
            fix="Name it: --base MODEL.",
        )
    return str(name)
