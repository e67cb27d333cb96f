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
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from graftlm.core.config import suggest
from graftlm.core.errors import ModelError
from graftlm.core.notices import notice
from graftlm.models.architecture import concrete, family_of, generation_config
from graftlm.models.bars import no_bars
from graftlm.models.footprint import footprint
from graftlm.models.locate import Location, check_tokenizer, locate
from graftlm.models.padding import ensure_padding
from graftlm.models.precision import AUTO, check_dtype, choose_device, choose_dtype
from graftlm.models.quantised_load import Progress, load_quantised
from graftlm.models.sprout import SPROUT
from graftlm.models.stored_scheme import SIXTEEN_BIT, check_head, require_equal, stored_kind
from graftlm.models.tensor_files import read_headers
from graftlm.models.weight_files import weight_files
from graftlm.quant.convert import quantised_layers
from graftlm.quant.embedding import quantise_embeddings
from graftlm.quant.scheme import Scheme


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = AUTO,
    quantization: str | None = None,
    double_quant: bool = True,
    head: str = SIXTEEN_BIT,
    device: str | torch.device = AUTO,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load the base `name` and its tokenizer, ready for adapters.

    Args:
        name: a local folder, a hub id, or `"sprout"`, the embedded base.
        dtype: `"auto"` (see `choose_dtype`), `"float32"`, `"bfloat16"`, `"float16"` or a torch dtype.
        quantization: `"nf4"`, `"fp4"`, `"int8"` or `"fp8"`: linear layers are quantised while they are
            read, so that memory peaks at the quantised model. None or `"none"`: weights stay as they are
            stored; a base stored quantised (by bitsandbytes or `save_base`) stays so, too.
        double_quant: whether the scales of a 4-bit kind are quantised as well.
        head: `"int8"` or `"fp8"` also store the embeddings and the output head of a quantised base in 8 bits.
        device: `"auto"` is the first GPU, else the CPU.
        progress: called with (bytes read, bytes in all) while a quantised base is loaded.

    Returns:
        The `transformers` model in evaluation mode, and its tokenizer with a padding token.

    Raises:
        ModelError: what was named cannot be loaded as a causal or sequence-to-sequence model.
        ConfigError: an unknown dtype or quantization.
    """
    scheme = None if quantization in (None, "none") else Scheme.parse(quantization, double_quant=double_quant)
    check_dtype(dtype)
    check_head(head)
    where = choose_device(device)
    location = locate(name)
    with _quiet(location):
        config = _load_config(location)
        stored = stored_kind(config, location.name)
        if stored is not None:
            require_equal(stored, scheme, location.name)
        tokenizer = _load_tokenizer(location, config)
        family = family_of(config, location.name)
        chosen = choose_dtype(dtype, stored=_stored_dtype(location, config), device=where, name=location.name)
        if scheme is None and stored is None:
            model = _load_dense(location, family, chosen)
        else:
            scheme = scheme if stored is None else None
            options = {"dtype": chosen, "device": where, "progress": progress}
            model = _load_packed(location, family, config, scheme, **options)
            if head != SIXTEEN_BIT:
                quantise_embeddings(model, head)
            notice(f"{location.name}: {footprint(model)}.")
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


def _load_dense(location: Location, family: Any, dtype: torch.dtype) -> Any:
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


def _load_packed(location: Location, family: Any, config: Any, scheme: Scheme | None, **options: Any) -> Any:
    try:
        tensors = read_headers(weight_files(location))
        with no_bars():
            model, info = load_quantised(*concrete(family, config), tensors, scheme, **options)
        _check_loaded(location, info)
        if not quantised_layers(model):
            raise _nothing_quantised(location, was_stored=scheme is None)
        model.generation_config = generation_config(location.reference)
    except OSError as error:
        raise _unreachable(location, error) from None
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


def _nothing_quantised(location: Location, *, was_stored: bool) -> ModelError:
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
