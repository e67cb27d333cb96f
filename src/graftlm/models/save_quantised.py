"""Write a quantised base so that it loads again, here and in `transformers`, without its 16-bit original.

nf4, fp4 and int8 are written as bitsandbytes has them: its tensors' names in safetensors files and its
`quantization_config` in config.json; fp8_block as the fine-grained FP8 of `transformers`. fp8 has a layout of
its own: for each layer `weight` (float8_e4m3fn [out, in]) and `weight_scale` (float32 [out, 1]), the weight
being their product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import ModelError, StorageError
from graftlm.core.files import staged_directory
from graftlm.core.storage import require_space
from graftlm.methods.attach import adapters_of
from graftlm.models.bars import no_bars
from graftlm.models.stored_scheme import quantization_config
from graftlm.quant.convert import quantised_layers
from graftlm.quant.embedding import QuantisedEmbedding
from graftlm.quant.foreign import is_foreign
from graftlm.quant.linear import QuantisedLinear


def save_base(model: Any, tokenizer: Any, folder: str | Path, *, max_shard_size: str = "2GB") -> None:
    """Write a quantised base and its tokenizer into `folder`, which must not exist yet.

    `load_model(folder)` gives the very same packed weights; so does `transformers` with bitsandbytes, where
    the kind is nf4, fp4 or int8.

    Args:
        max_shard_size: of one weight file, as `save_pretrained` takes it.

    Raises:
        ModelError: the model is not quantised by us, has adapters or a merged weight in it.
        UsageError: `folder` exists.
        StorageError: the disk has no room for it, or refuses.
    """
    layers = _saveable(model)
    tensors = _in_file(model, layers)
    target = Path(folder)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    require_space(target, needed)
    with staged_directory(target, needed=needed) as staging, _described(model, layers), no_bars():
        try:
            model.save_pretrained(
                staging, state_dict=tensors, save_original_format=False, max_shard_size=max_shard_size
            )
            tokenizer.save_pretrained(staging)
        except SafetensorError as error:  # how safetensors tells what the operating system refused
            raise StorageError(
                f"Cannot write the model to {folder}: {error}.",
                meaning="The disk or the quota is full, or the disk is gone.",
                fix="Free some space, or choose another folder.",
            ) from error


def _saveable(model: Any) -> dict[str, QuantisedLinear]:
    """The packed layers, all of one scheme, of a model that is a base and nothing else."""
    layers = quantised_layers(model)
    if adapters_of(model) is not None:
        raise ModelError(
            "The model has adapters attached; save_base writes a base.",
            fix="Save the adapters with adapters.save(folder) and take them off: adapters.unload().",
        )
    merged = [path for path, layer in layers.items() if layer.dense is not None]
    if merged:
        raise ModelError(
            f"{len(merged)} layers hold a merged weight beside the packed one.",
            problems=merged[:5],
            fix="Dequantise the model and save it dense, or undo the merge.",
        )
    if not layers:
        foreign = any(is_foreign(module) for module in model.modules())
        raise ModelError(
            "The model has no layers that Graft quantised.",
            meaning="bitsandbytes quantised it." if foreign else "Its weights are dense.",
            fix="model.save_pretrained(folder)",
        )
    if any(isinstance(module, QuantisedEmbedding) for module in model.modules()):
        raise ModelError(
            "The embeddings of the model are stored in 8 bits, for which checkpoints have no format.",
            fix="Load it with head='16bit', save that, and give head='int8' whenever it is loaded.",
        )
    kinds = sorted({layer.scheme.kind for layer in layers.values()})
    if len(kinds) > 1:
        raise ModelError(
            f"The layers are stored as {' and '.join(kinds)}; a saved base has one kind.",
            fix="Load the 16-bit model with one quantization.",
        )
    return layers


def _in_file(model: Any, layers: Mapping[str, QuantisedLinear]) -> dict[str, Tensor]:
    """Every tensor by its name in the file: the names of the original checkpoint, as far as a packed weight
    can have them. One that was cut out of a larger tensor keeps the name of its layer."""
    own = model.state_dict()
    dense = {}
    found = {}
    names = {path: _original_path(model, path) for path in layers}
    for name, tensor in own.items():
        path = next((path for path in _around(name) if path in layers), None)
        if path is None or name == f"{path}.bias":
            dense[name] = tensor
        else:
            found[names[path] + name.removeprefix(path)] = tensor.contiguous()
    return {**revert_weight_conversion(model, dense), **found}


def _around(name: str) -> Iterator[str]:
    """The modules that a tensor of that name may belong to."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _original_path(model: Any, path: str) -> str:
    """What the checkpoint called this layer. A stand-in for its weight is sent back: it must come whole."""
    stand_in = torch.empty(0, device="meta")
    (name, tensor), *others = revert_weight_conversion(model, {f"{path}.weight": stand_in}).items()
    is_whole = tensor is stand_in and not others and name.endswith(".weight")
    return name.removesuffix(".weight") if is_whole else path


@contextmanager
def _described(model: Any, layers: Mapping[str, QuantisedLinear]) -> Iterator[None]:
    """Inside, the model's config says how it is quantised."""
    first = next(iter(layers.values()))
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    model.config.quantization_config = quantization_config(
        first.scheme, str(first.dtype).removeprefix("torch."), dense
    )
    try:
        yield
    finally:
        del model.config.quantization_config
