"""From a name to a base model: the embedded one, a folder on this disk, or a hub id.

A folder is looked through before anything is loaded, so that what is wrong with it is said in its
own words: an adapter instead of a base, a missing shard, a file cut short.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from graftlm.core.errors import ModelError
from graftlm.models.sprout import SPROUT, sprout_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


@dataclass(frozen=True)
class Location:
    """A base model that can be loaded: `reference` is what `transformers` is given."""

    name: str
    reference: str
    folder: Path | None


def locate(name: str | Path) -> Location:
    """Find the base called `name`; a local folder is checked for what a base must hold.

    Raises:
        ModelError: no such folder, or one that holds no loadable base, with what it holds instead.
    """
    text = str(name)
    if text == SPROUT:
        return Location(text, str(sprout_folder()), sprout_folder())
    folder = Path(text).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return Location(text, str(folder), folder)
    if folder.exists():
        raise ModelError(
            f"{text} is a file, not a model.",
            meaning="A base is a folder with config.json and *.safetensors, a hub id, or 'sprout'.",
            fix=f"Give its folder: {folder.parent}",
        )
    if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise ModelError(
            f"No folder {text}.",
            meaning="It is written like a path, and nothing is there.",
            fix="Check the path, or give a hub id such as Qwen/Qwen3-0.6B, or 'sprout'.",
        )
    return Location(text, text, None)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a base model."""
    _refuse_adapters(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model: it has no config.json.",
            meaning=f"The folder holds {_listing(folder)}.",
            fix="Give the folder that was written by save_pretrained, or a hub id, or 'sprout'.",
        )
    for file in _weight_files(folder):
        _check_weight_file(file)


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without a readable tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{folder} has no tokenizer.",
            meaning=f"The folder holds {_listing(folder)}.",
            fix="Copy tokenizer.json and tokenizer_config.json of this model into the folder.",
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a model's folder.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} is not valid JSON: {error}.",
            meaning="The file was cut short or edited by hand.",
            fix="Copy or download the file again.",
        ) from None
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} holds {type(loaded).__name__}, not an object.", fix="Copy it again.")
    return loaded


def _refuse_adapters(folder: Path) -> None:
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            kind = "an adapter" if place == folder else "a run"
            base = read_json(place / "adapter_config.json").get("base_model_name_or_path")
            raise ModelError(
                f"{folder} is {kind}, not a base model.",
                meaning=f"Its adapter was trained on {base}." if base else "Its base is not recorded.",
                fix=f"Give the base: {base}" if base else "Give the model that it was trained on.",
            )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{folder / _INDEX} has no weight_map.", fix="Copy or download it again.")
        files = [folder / str(shard) for shard in sorted(set(shards.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:4])}.",
                meaning="A download or a copy did not finish.",
                fix="Copy or download the missing files.",
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} has weights only as {', '.join(pickles[:4])}.",
            meaning="These files are Python pickles, which can run code when they are opened; "
            "Graft reads safetensors only.",
            fix="Ask its publisher for safetensors, or convert it where you trust it: "
            "model.save_pretrained(folder).",
        )
    raise ModelError(
        f"{folder} has no weights: no *.safetensors.",
        meaning=f"The folder holds {_listing(folder)}.",
        fix="Copy or download model.safetensors of this model.",
    )


def _check_weight_file(file: Path) -> None:
    """Opening reads the header and compares it with the file's length; no tensor is loaded."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(
            f"{file} is corrupt or cut short: {error}.",
            meaning="The header does not fit the file; usually a download or a copy did not finish.",
            fix="Copy or download this file again.",
        ) from None


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
