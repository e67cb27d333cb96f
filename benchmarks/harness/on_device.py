"""Models with random weights drawn on the device, the same for every side: nothing is read or copied.

A model is made without memory first and then filled layer by layer, so that a base that only fits quantised
never exists in 16 bits. Values depend on the seed, the device and the order of layers alone.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable
from typing import Any

from harness.case import Case

SPREAD = 0.02
Convert = Callable[[Any], None]
"""What happens to a decoder layer once it has its weights: it is quantised, for instance."""


def random_model(case: Case, convert: Convert | None = None) -> Any:
    """The model of a case on its device, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    config = case.model.config(max(case.length, 2048))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    backbone = model.model
    with torch.device(case.device):  # holds nothing but buffers, which are computed and not drawn
        backbone.rotary_emb = type(backbone.rotary_emb)(config)
    for index, layer in enumerate(backbone.layers):
        _fill(layer, case.device, index)
        if convert is not None:
            convert(layer)
    for index, module in enumerate((backbone.embed_tokens, backbone.norm)):
        _fill(module, case.device, len(backbone.layers) + index)
    if config.tie_word_embeddings:
        model.lm_head.weight = backbone.embed_tokens.weight
    else:
        _fill(model.lm_head, case.device, len(backbone.layers) + 2)
    return model.eval()


def graft_model(case: Case) -> Any:
    """Ours: dense, or quantised layer by layer."""
    from graftlm.quant.convert import quantise
    from graftlm.quant.scheme import Scheme

    if case.quantization == "none":
        return random_model(case)
    scheme = Scheme.parse(case.quantization.partition("-")[0])

    def convert(layer: Any) -> None:
        quantise(layer, scheme)

    return random_model(case, convert)


def transformers_model(case: Case, is_four_bit: bool) -> Any:
    """Theirs: dense, or with the linear layers of bitsandbytes, as `from_pretrained` leaves them."""
    if not is_four_bit:
        return random_model(case)
    import torch
    from torch import nn

    bitsandbytes: Any = importlib.import_module("bitsandbytes.nn")

    def convert(layer: Any) -> None:
        for path, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                packed = bitsandbytes.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                    device="meta",
                )
                packed.weight = bitsandbytes.Params4bit(
                    module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                layer.set_submodule(path, packed.to(case.device))

    model = random_model(case, convert)
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    return model


def start_alike(named_parameters: Any) -> None:
    """Draw every A matrix of an adapter from a seed that its layer's path gives; B is zero already.

    `named_parameters`: pairs of a name that holds the path of a decoder layer's module, and the A matrix.
    """
    import torch

    for name, parameter in named_parameters:
        path = name[name.index("layers.") :].split(".lora")[0]
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(path.encode()))
        with torch.no_grad():
            drawn = torch.empty(parameter.shape, device=parameter.device).uniform_(-1, 1, generator=generator)
            parameter.copy_(drawn / math.sqrt(parameter.shape[-1]))


def _fill(module: Any, device: str, seed: int) -> None:
    """Memory and values for a module without either."""
    import torch

    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() >= 2:
                parameter.normal_(0.0, SPREAD, generator=generator)
            else:
                parameter.fill_(1.0)
