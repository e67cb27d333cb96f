"""Which safetensors files hold the weights of a base, in a folder or in the cache of the hub."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.hub import cached_file

from graftlm.core.errors import ModelError
from graftlm.models.locate import Location, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(location: Location) -> list[Path]:
    """The files, downloaded where that is needed, in the order of their names.

    Raises:
        ModelError: an index that names files outside of its folder; OSError: a file that cannot be had.
    """
    index = _find(location, INDEX)
    if index is None:
        whole = _find(location, WHOLE)
        if whole is None:
            raise FileNotFoundError(f"{location.reference} has neither {WHOLE} nor {INDEX}.")
        return [whole]
    shards = read_json(index).get("weight_map")
    names = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
    strange = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if strange or not names:
        raise ModelError(
            f"{index} names no weight files of its folder.",
            problems=strange[:10],
            meaning="The index is damaged.",
            fix="Copy or download it again.",
        )
    found = [_find(location, name) for name in names]
    missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing:
        raise FileNotFoundError(f"{location.reference} lacks {', '.join(missing[:4])}.")
    return [file for file in found if file is not None]


def _find(location: Location, name: str) -> Path | None:
    if location.folder is not None:
        file = location.folder / name
        return file if file.is_file() else None
    found = cached_file(location.reference, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
