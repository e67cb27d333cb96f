"""What can be wrong with a base that is being loaded, in words."""

from __future__ import annotations

import os
from typing import Any

from graftlm.core.config import suggest
from graftlm.core.errors import ModelError
from graftlm.core.notices import notice
from graftlm.models.locate import Location
from graftlm.models.sprout import SPROUT


def check_loaded(location: Location, info: dict[str, Any]) -> None:
    """Refuse a model that its files do not fill; name what they hold beside it.

    Raises:
        ModelError: tensors are missing or misshapen.
    """
    problems = [f"{key}: missing from the checkpoint" for key in sorted(info["missing_keys"])]
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        problems.append(f"{key}: stored as {list(stored)}, the model has {list(wanted)}")
    problems += [str(message) for message in info.get("error_msgs", [])]
    if problems:
        raise ModelError(
            f"The weights of {location.name} do not fill its model ({len(problems)} faults).",
            problems=problems[:20],
            meaning="config.json and the weight files belong to different models, or a file is missing; "
            "loading anyway would leave random values in the base.",
            fix="Copy or download config.json and all *.safetensors of one model.",
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        shown = ", ".join(unexpected[:3]) + (" ..." if len(unexpected) > 3 else "")
        notice(f"{location.name} holds {len(unexpected)} tensors that its model does not use: {shown}")


def check_vocabulary(location: Location, model: Any, tokenizer: Any) -> None:
    """Say so where the tokenizer has tokens that the embedding lacks."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        notice(
            f"The tokenizer of {location.name} has {len(tokenizer)} tokens, its embedding {rows} rows: "
            "text with the tokens beyond cannot be used."
        )


def nothing_quantised(location: Location, *, was_stored: bool) -> ModelError:
    """The error for a model that should have packed weights and has none."""
    if was_stored:
        return ModelError(
            f"{location.name} holds no quantised weight, though its config.json says that it is quantised.",
            meaning="The weights were replaced by dense ones.",
            fix="Remove quantization_config from its config.json, or copy the quantised weights again.",
        )
    return ModelError(
        f"{location.name} has no linear layer that can be quantised.",
        meaning="Its weights are of another kind, or all of them are kept in float32.",
        fix="Load it without quantization.",
    )


def unreachable(location: Location, error: OSError) -> ModelError:
    """The error for files that cannot be had, in the words of their place."""
    if location.folder is not None:
        return ModelError(
            f"{location.folder} cannot be loaded: {first_sentence(error)}",
            meaning="A file of the model is missing or damaged.",
            fix="Copy or download the model again.",
        )
    near = suggest(location.name, [SPROUT]) or "."
    if "gated" in str(error):
        meaning, fix = "Its publisher asks for an agreement.", "Agree on its page, then: hf auth login"
    elif os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        meaning, fix = (
            "HF_HUB_OFFLINE is set and the model is not in the cache.",
            "Unset it, or give a folder.",
        )
    else:
        meaning = "There is no such folder here, and the hub has no such model or cannot be reached."
        fix = "Check the spelling and the network; 'sprout' needs neither."
    return ModelError(
        f"No model {location.name!r}{near}", meaning=f"{meaning} ({first_sentence(error)})", fix=fix
    )


def first_sentence(error: Exception) -> str:
    """Of what another library says."""
    text = " ".join(str(error).split())
    head, separator, _ = text.partition(". ")
    return (head + separator).strip()
