"""Load a base model and its tokenizer: from the package, a folder or the hub; safetensors only.

Code that comes with a checkpoint is never run, pickles are never read, and weights that are missing,
misshapen or left over are never passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from graftlm.core.errors import ModelError
from graftlm.core.notices import notice
from graftlm.models.architecture import concrete, family_of, generation_config
from graftlm.models.bars import no_bars
from graftlm.models.ending import Ending
from graftlm.models.footprint import footprint
from graftlm.models.heads import begin_head, ended, is_for, stored_ending
from graftlm.models.load_faults import (
    check_loaded,
    check_vocabulary,
    first_sentence,
    nothing_quantised,
    unreachable,
)
from graftlm.models.locate import Location, check_tokenizer, locate
from graftlm.models.padding import ensure_padding
from graftlm.models.precision import AUTO, check_dtype, choose_device, choose_dtype
from graftlm.models.quantised_load import Progress, load_quantised
from graftlm.models.stored_scheme import SIXTEEN_BIT, check_head, require_equal, stored_kind
from graftlm.models.streaming.disk import load_from_disk, stream_from_disk
from graftlm.models.streaming.embedding import check_embeddings
from graftlm.models.streaming.place import placed
from graftlm.models.streaming.streamed import DISK, HOST, RESIDENT, check_placement
from graftlm.models.tensor_files import read_headers
from graftlm.models.weight_files import weight_files
from graftlm.quant.convert import quantised_layers
from graftlm.quant.embedding import quantise_embeddings
from graftlm.quant.scheme import Scheme


@dataclass(frozen=True)
class _Kind:
    """What is to be loaded, as far as it is decided before a weight is read."""

    family: Any
    config: Any
    dtype: torch.dtype
    scheme: Scheme | None
    """What to quantise to."""
    is_stored_packed: bool
    new_head: Ending | None
    """The head that the checkpoint does not have."""

    @property
    def is_packed(self) -> bool:
        return self.is_stored_packed or self.scheme is not None


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = AUTO,
    quantization: str | None = None,
    double_quant: bool = True,
    head: str = SIXTEEN_BIT,
    device: str | torch.device = AUTO,
    placement: str = RESIDENT,
    embeddings: str = RESIDENT,
    ending: Ending | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load the base `name` and its tokenizer, ready for adapters.

    Args:
        name: a local folder, a hub id, or `"sprout"`, the embedded base.
        dtype: `"auto"` (see `choose_dtype`), `"float32"`, `"bfloat16"`, `"float16"`.
        quantization: `"nf4"`, `"fp4"`, `"int8"` or `"fp8"`: linear layers are quantised while they are read,
            so that memory peaks at the quantised model. None or `"none"`: weights stay as they are stored,
            quantised ones too (by bitsandbytes or `save_base`).
        double_quant: whether the scales of a 4-bit kind are quantised as well.
        head: `"int8"` or `"fp8"` also store the embeddings and the output head of a quantised base in 8 bits.
        device: `"auto"` is the first GPU, else the CPU.
        placement: where layers lie while a pass does not need them: `"resident"`, all in memory; `"disk"`, in
            the checkpoint's files; `"host"`, in the machine's memory.
        embeddings: `"host"` leaves the input embeddings in the machine's memory; a GPU gets rows of them.
        ending: what the base is to end in; None leaves it as it is stored.
        progress: called with (bytes read, bytes in all) while a quantised base is loaded.

    Returns:
        The `transformers` model in evaluation mode, and its tokenizer with a padding token.

    Raises:
        ModelError: what was named cannot be loaded, has no such ending, or needs its embeddings on the GPU.
        ConfigError: an unknown dtype, quantization or placement.
    """
    scheme = None if quantization in (None, "none") else Scheme.parse(quantization, double_quant=double_quant)
    check_dtype(dtype)
    check_head(head)
    where = choose_device(device)
    check_placement(placement, where)
    check_embeddings(embeddings, where)
    location = locate(name)
    with _quiet(location):
        kind = _kind_of(location, scheme, dtype, where, ending)
        tokenizer = _load_tokenizer(location, kind.config)
        if placement == DISK:
            model = _load_streamed(location, kind)
        elif kind.is_packed:
            model = _load_packed(location, kind, "cpu" if placement == HOST else where, progress)
        else:
            model = _load_dense(location, kind)
        if kind.is_packed and head != SIXTEEN_BIT:
            quantise_embeddings(model, head)
    if kind.is_packed:
        notice(f"{location.name}: {footprint(model)}.")
    _finish(location, model, tokenizer)
    return placed(model, where, placement, embeddings, location.name), tokenizer


def _kind_of(
    location: Location,
    scheme: Scheme | None,
    dtype: str | torch.dtype,
    device: torch.device,
    ending: Ending | None,
) -> _Kind:
    config = load_config(location)
    stored = stored_kind(config, location.name)
    if stored is not None:
        require_equal(stored, scheme, location.name)
    own = stored_ending(config)
    ending = ending or own
    family = family_of(config, location.name, ending)
    chosen = choose_dtype(dtype, stored=_stored_dtype(location, config), device=device, name=location.name)
    to = scheme if stored is None else None
    new_head = None if is_for(own, ending) else ending
    return _Kind(family, ended(config, ending), chosen, to, stored is not None, new_head)


def _finish(location: Location, model: Any, tokenizer: Any) -> None:
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    else:  # the head reads the last token that is no padding, or the config is all that says what that is
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = location.name  # what adapters will say they belong to: never a path of ours
    check_vocabulary(location, model, tokenizer)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of the base `name`, with a padding token; no weights are loaded.

    Raises:
        ModelError: the base or its tokenizer cannot be loaded.
    """
    location = locate(name)
    with _quiet(location):
        return _load_tokenizer(location, load_config(location))


def load_config(location: Location) -> Any:
    """The config alone; ModelError where it cannot be had, or `transformers` does not know it."""
    try:
        config = AutoConfig.from_pretrained(location.reference, trust_remote_code=False)
    except OSError as error:
        raise unreachable(location, error) from None
    except ValueError as error:
        raise ModelError(
            f"{location.name} is not a model that transformers knows: {first_sentence(error)}",
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
            f"The tokenizer of {location.name} cannot be loaded: {first_sentence(error)}",
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


def _load_dense(location: Location, kind: _Kind) -> Any:
    try:
        model, info = kind.family.from_pretrained(
            location.reference,
            config=kind.config,
            dtype=kind.dtype,
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
        raise unreachable(location, error) from None
    _check(location, kind, model, info)
    return model


def _check(location: Location, kind: _Kind, model: Any, info: dict[str, Any]) -> None:
    """Refuse what is not whole; a head that the checkpoint does not have is begun."""
    if kind.new_head is not None:
        begin_head(model, info, kind.new_head)
    check_loaded(location, info)


def _load_packed(
    location: Location, kind: _Kind, device: str | torch.device, progress: Progress | None
) -> Any:
    load = partial(load_quantised, device=torch.device(device), progress=progress)
    return _load_by_tensor(location, kind, load)[0]


def _load_streamed(location: Location, kind: _Kind) -> Any:
    load = partial(load_from_disk, packed=kind.is_stored_packed, name=location.name)
    model, info = _load_by_tensor(location, kind, load)
    stream_from_disk(model, info["places"], location.name)
    return model


def _load_by_tensor(location: Location, kind: _Kind, load: Any) -> tuple[Any, dict[str, Any]]:
    """What `load` gives, checked: the model, and what is known of the loading."""
    try:
        tensors = read_headers(weight_files(location))
        with no_bars():
            model, info = load(*concrete(kind.family, kind.config), tensors, kind.scheme, dtype=kind.dtype)
        _check(location, kind, model, info)
        if kind.is_packed and not quantised_layers(model):
            raise nothing_quantised(location, was_stored=kind.is_stored_packed)
        if model.can_generate():
            model.generation_config = generation_config(location.reference)
    except OSError as error:
        raise unreachable(location, error) from None
    return model, info


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
