"""Where a saved adapter lies: a folder on this disk, or one fetched from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from graftlm.core.config import suggest
from graftlm.core.errors import FormatError, UsageError
from graftlm.formats.layout import CONFIG, EXTRA, TENSORS

HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
"""Options that concern a download."""
PLACING = ("torch_device", "device_map", "max_memory", "offload_folder", "low_cpu_mem_usage")
"""Options about where parameters go; an adapter stands where its layer stands."""


def adapter_folder(
    name: str | Path, subfolder: str | None = None, options: Mapping[str, Any] | None = None
) -> Path:
    """The folder of the adapter called `name`; a hub id is downloaded first.

    Raises:
        FormatError: there is no adapter by that name, neither here nor on the hub.
        UsageError: an option that would change what is loaded, and is not known.
    """
    unknown = [key for key, value in (options or {}).items() if value and key not in HUB + PLACING]
    if unknown:
        raise UsageError(
            f"Loading does not know {', '.join(unknown)}{suggest(unknown[0], HUB + PLACING)}.",
            fix="Leave it out.",
        )
    options = {key: value for key, value in (options or {}).items() if key in HUB}
    folder = Path(name) / subfolder if subfolder else Path(name)
    if folder.is_dir() or str(name).startswith((".", "/", "~")):
        if not (folder / CONFIG).is_file():
            raise FormatError(
                f"{folder} holds no {CONFIG}.", meaning="It is not an adapter folder.", fix="Check the path."
            )
        return folder
    found = [_fetch(str(name), file, subfolder, options) for file in (CONFIG, TENSORS, EXTRA)]
    if found[0] is None or found[1] is None:
        raise FormatError(
            f"No adapter called {name}.",
            meaning=f"There is no such folder here, and no {CONFIG} with {TENSORS} under that hub id.",
            fix="Check the name; without a network, give a folder.",
        )
    return found[0].parent


def _fetch(name: str, file: str, subfolder: str | None, options: Mapping[str, Any]) -> Path | None:
    try:
        path = cached_file(
            name,
            file,
            subfolder=subfolder or "",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )
    except OSError:  # what transformers makes of every refusal of the hub
        return None
    return Path(path) if path is not None else None
