"""Load a base model and its tokenizer: from the package, a folder or the hub; safetensors only.

Code that comes with a checkpoint is never run, pickles are never read, and weights that are missing,
misshapen or left over are never passed over in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, ModelError
from graftlm.core.notices import notice
from graftlm.models.locate import Location, check_tokenizer, locate
from graftlm.models.padding import ensure_padding
from graftlm.models.precision import AUTO, check_dtype, choose_device, choose_dtype
from graftlm.models.sprout import SPROUT


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = AUTO,
    quantization: str | None = None,
    device: str | torch.device = AUTO,
) -> tuple[Any, Any]:
    """Load the base `name` and its tokenizer, ready for adapters.

    Args:
        name: a local folder, a hub id, or `"sprout"`, the embedded base.
        dtype: `"auto"` (see `choose_dtype`), `"float32"`, `"bfloat16"`, `"float16"` or a torch dtype.
        quantization: None or `"none"`; other values belong to a later version and are refused.
        device: `"auto"` is the first GPU, else the CPU.

    Returns:
        The `transformers` model in evaluation mode, and its tokenizer with a padding token.

    Raises:
        ModelError: what was named cannot be loaded as a causal or sequence-to-sequence model.
        ConfigError: an unknown dtype or quantization.
    """
    _check_quantization(quantization)
    check_dtype(dtype)
    where = choose_device(device)
    location = locate(name)
    with _quiet(location):
        config = _load_config(location)
        tokenizer = _load_tokenizer(location, config)
        family = _model_class(location, config)
        chosen = choose_dtype(dtype, stored=_stored_dtype(location, config), device=where, name=location.name)
        model = _load_weights(location, family, chosen)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = location.name  # what adapters will say they belong to: never a path of ours
    _check_vocabulary(location, model, tokenizer)
    return model.to(where), tokenizer


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of the base `name`, with a padding token; no weights are loaded.

    Raises:
        ModelError: the base or its tokenizer cannot be loaded.
    """
    location = locate(name)
    with _quiet(location):
        return _load_tokenizer(location, _load_config(location))


def _load_config(location: Location) -> Any:
    try:
        config = AutoConfig.from_pretrained(location.reference, trust_remote_code=False)
    except OSError as error:
        raise _unreachable(location, error) from None
    except ValueError as error:
        raise ModelError(
            f"{location.name} is not a model that transformers knows: {_first_sentence(error)}",
            meaning="Its architecture is newer than the installed transformers, needs code of its own "
            "(which Graft never runs), or config.json is damaged.",
            fix="pip install --upgrade transformers, or choose another base.",
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{location.name} is stored quantised.",
            meaning="This version trains on bases stored in float32, bfloat16 or float16.",
            fix="Name the unquantised model that it was made from.",
        )
    return config


def _load_tokenizer(location: Location, config: Any) -> Any:
    if location.folder is not None:
        check_tokenizer(location.folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.reference, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"The tokenizer of {location.name} cannot be loaded: {_first_sentence(error)}",
            meaning="Its files are incomplete, or it needs a package that is not installed.",
            fix="Copy or download tokenizer.json of this model; sentencepiece models also need "
            "pip install sentencepiece.",
        ) from None
    ensure_padding(tokenizer, int(config.get_text_config().vocab_size), location.name)
    return tokenizer


def _model_class(location: Location, config: Any) -> Any:
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    sequence = set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
    names = config.architectures or [
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if config.is_encoder_decoder else {}).get(
            config.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "unnamed")
        )
    ]
    if sequence.intersection(names):
        return AutoModelForSeq2SeqLM
    if causal.intersection(names):
        return AutoModelForCausalLM
    raise ModelError(
        f"{location.name} is a {', '.join(names)}, which does not write text.",
        meaning="Graft tunes causal and sequence-to-sequence language models; this checkpoint is an "
        "encoder, a bare backbone or another kind of model.",
        fix="Choose a base whose architecture ends in ForCausalLM or ForConditionalGeneration.",
    )


def _stored_dtype(location: Location, config: Any) -> torch.dtype:
    """The checkpoint's own dtype: from its config, else from its first floating tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    named = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for file in sorted(location.folder.glob("*.safetensors")) if location.folder else []:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a mapping: it cannot be iterated
                kind = tensors.get_slice(key).get_dtype()
                if kind in named:
                    return named[kind]
    return torch.float32


def _load_weights(location: Location, family: Any, dtype: torch.dtype) -> Any:
    try:
        model, info = family.from_pretrained(
            location.reference,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are reported, below
        )
    except SafetensorError as error:
        raise ModelError(
            f"The weights of {location.name} are corrupt: {error}.",
            meaning="A download did not finish.",
            fix="Delete this model from the hub cache and load it again.",
        ) from None
    except OSError as error:
        raise _unreachable(location, error) from None
    _check_loaded(location, info)
    return model


def _check_loaded(location: Location, info: dict[str, Any]) -> None:
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


def _check_vocabulary(location: Location, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        notice(
            f"The tokenizer of {location.name} has {len(tokenizer)} tokens, its embedding {rows} rows: "
            "text with the tokens beyond cannot be used."
        )


def _check_quantization(quantization: str | None) -> None:
    if quantization not in (None, "none"):
        raise ConfigError(
            f"quantization={quantization!r} is not in this version.",
            meaning="Bases are loaded in float32, bfloat16 or float16.",
            fix="Leave it out, and use dtype='bfloat16' to save memory.",
        )


def _unreachable(location: Location, error: OSError) -> ModelError:
    if location.folder is not None:
        return ModelError(
            f"{location.folder} cannot be loaded: {_first_sentence(error)}",
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
        f"No model {location.name!r}{near}", meaning=f"{meaning} ({_first_sentence(error)})", fix=fix
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    head, separator, _ = text.partition(". ")
    return (head + separator).strip()


@contextmanager
def _quiet(location: Location) -> Iterator[None]:
    """Keep transformers' reports off the terminal: what matters in them is raised or noticed. Bars stay
    for downloads only."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if location.folder is not None:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
