"""What is known of a base before a weight of it is read: from its config, and the sizes of its files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from graftlm.methods.families import blocks_of
from graftlm.models.architecture import concrete, family_of
from graftlm.models.ending import TEXT, Ending
from graftlm.models.heads import ended, stored_ending
from graftlm.models.load import load_config
from graftlm.models.locate import Location, locate
from graftlm.models.stored_scheme import stored_kind
from graftlm.models.tensor_files import read_headers
from graftlm.models.weight_files import weight_files
from graftlm.planning.known_bases import SOURCE, known_config
from graftlm.quant.convert import dense_weight, quantisable
from graftlm.training.memory_classes import (
    DENSE,
    EMBEDDINGS,
    EXPERTS,
    HEAD,
    NORMS,
    OTHER,
    class_of_tensor,
    output_head,
)

_NUMBER = re.compile(r"^.*?\.\d+\.")
_NAMED = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}


@dataclass(frozen=True)
class LinearShape:
    """Linear layers of one role and shape."""

    role: str
    """The path inside its block, or the whole path outside of one: `self_attn.q_proj`, `lm_head`."""
    rows: int
    """Values that the layer gives."""
    columns: int
    """Values that it takes."""
    count: int
    is_quantisable: bool
    """Whether a quantised base stores it in few bits."""
    in_block: bool
    """Whether it belongs to a numbered block."""
    stack: str = "decoder"
    """Of an encoder-decoder: which half; else `decoder`."""

    @property
    def parameters(self) -> int:
        """Of all of them, without biases."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class BaseFacts:
    """A base in figures; everything that memory and time are predicted from."""

    name: str
    source: str
    """Where its config comes from: `its folder`, `the hub`, `the hub's cache`, `the table of known bases`."""
    architecture: str
    """The model type of transformers: `llama`, `t5`."""
    dtype: str
    """What the checkpoint is stored in."""
    layers: int
    """Numbered blocks; of an encoder-decoder both halves."""
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    """Longest text that it takes; 0 where positions have no end."""
    is_tied: bool
    """The output head is the table of the embeddings."""
    is_encoder_decoder: bool
    parameters: Mapping[str, int]
    """Numbers by class of tensor, as `training.memory_classes` names them, of the dense base."""
    linears: tuple[LinearShape, ...]
    stored_bytes: int
    """Of its weight files; estimated from the config where there are none here."""
    stored_quantised: str | None = None
    """The kind of packed weights that the checkpoint holds."""
    ending: Ending = TEXT
    config: Any = field(default=None, repr=False, compare=False)
    """Of transformers, with the ending."""

    @property
    def total(self) -> int:
        """Parameters in all."""
        return sum(self.parameters.values())

    @property
    def quantisable(self) -> int:
        """Numbers that a quantised base stores in few bits."""
        return sum(shape.parameters for shape in self.linears if shape.is_quantisable)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the config."""
        content = asdict(self) | {"total": self.total}
        content.pop("config")
        return content


def base_facts(name: str | Path, ending: Ending = TEXT) -> BaseFacts:
    """The facts of the base `name`: a folder, `sprout` or a hub id. No weight is read.

    A hub id is looked for in the hub's cache, then among well-known bases, then on the hub.

    Raises:
        ModelError: there is no such base, or transformers does not know its architecture.

    >>> base_facts("meta-llama/Llama-3.1-8B").total
    8030261248
    """
    return _facts(str(name), ending)


@lru_cache(maxsize=64)
def _facts(name: str, ending: Ending) -> BaseFacts:
    location = locate(name)
    config, source = _config(location)
    own = stored_ending(config)
    ending = own if ending == TEXT else ending
    model = empty_model(config, name, ending)
    parameters = dict(_by_class(model))
    stored, dtype = _stored(location, config, sum(parameters.values()))
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 1))
    width = int(text.hidden_size)
    return BaseFacts(
        name=name,
        source=source,
        architecture=str(config.model_type),
        dtype=dtype,
        layers=_layers(model),
        hidden_size=width,
        intermediate_size=_inner(text, width),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_size=int(getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or width // heads),
        vocabulary=int(text.vocab_size),
        context=int(getattr(text, "max_position_embeddings", 0) or 0),
        is_tied=_is_tied(model),
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        parameters=parameters,
        linears=tuple(_linears(model)),
        stored_bytes=stored,
        stored_quantised=stored_kind(config, name),
        ending=ending,
        config=ended(config, ending),
    )


def empty_model(config: Any, name: str, ending: Ending, dtype: torch.dtype = torch.float32) -> Any:
    """The model of that config and ending without memory: all on the meta device.

    Raises:
        ModelError: there is no such model.
    """
    model_class, own = concrete(family_of(config, name, ending), ended(config, ending))
    with torch.device("meta"):
        model = model_class._from_config(own, dtype=dtype)
    model.tie_weights()
    if getattr(own, "scale_decoder_outputs", True) is False:  # Flan-T5 has a head of its own all the same
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model.eval()


def _config(location: Location) -> tuple[Any, str]:
    if location.folder is not None:
        return load_config(location), "its folder"
    try:
        cached = AutoConfig.from_pretrained(
            location.reference, trust_remote_code=False, local_files_only=True
        )
        return cached, "the hub's cache"
    except OSError:
        known = known_config(location.name)
        return (load_config(location), "the hub") if known is None else (known, SOURCE)


def _stored(location: Location, config: Any, parameters: int) -> tuple[int, str]:
    """Bytes of the weight files, and the dtype of the weights."""
    named = _NAMED.get(str(config.dtype))
    if location.folder is None:
        named = named or "float32"
        return parameters * getattr(torch, named).itemsize, named
    tensors = read_headers(weight_files(location))
    size = sum(tensor.nbytes for tensor in tensors.values())
    first = next((str(each.dtype) for each in tensors.values() if str(each.dtype) in _NAMED), "")
    return size, named or _NAMED.get(first, "float32")


def _by_class(model: nn.Module) -> Iterator[tuple[str, int]]:
    counts: dict[str, int] = {}
    seen: set[int] = set()
    head = output_head(model)
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                name = HEAD if module is head else class_of_tensor(module, tensor)
                counts[name] = counts.get(name, 0) + tensor.numel()
    order = (DENSE, EXPERTS, EMBEDDINGS, HEAD, NORMS, OTHER)
    yield from ((name, counts[name]) for name in order if name in counts)


def _is_tied(model: Any) -> bool:
    head, table = output_head(model), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(table, "weight", head)


def _linears(model: Any) -> Iterator[LinearShape]:
    packed = quantisable(model)
    found: dict[tuple[str, int, int, bool, bool, str], int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            rows, columns = dense_weight(module).shape
            role = _NUMBER.sub("", path)
            stack = "encoder" if ".encoder." in f".{path}." or path.startswith("encoder.") else "decoder"
            stack = stack if model.config.is_encoder_decoder else "decoder"
            key = (role, rows, columns, path in packed, role != path, stack)
            found[key] = found.get(key, 0) + 1
    for (role, rows, columns, is_packed, in_block, stack), count in found.items():
        yield LinearShape(role, rows, columns, count, is_packed, in_block, stack)


def _layers(model: nn.Module) -> int:
    return len(blocks_of(model))


def _inner(text: Any, width: int) -> int:
    names = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "n_inner")
    found = (getattr(text, name, None) for name in names)
    return int(next((size for size in found if size), 4 * width))
