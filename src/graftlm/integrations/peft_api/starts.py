"""Starting values drawn from torch's generator in PEFT's order, so that a seed gives the run that PEFT gives.

PEFT makes every factor as a fresh `nn.Linear` or a normal tensor and then draws or sets it again. All of its
draws count, also where values are dropped: dropout and shuffling go on from where they leave the generator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import MethodConfig, Part
from graftlm.methods.dora import DoraEmbedding, DoraLinear
from graftlm.methods.ia3 import IA3Config, IA3Input, IA3Output
from graftlm.methods.lora import LoraConfig
from graftlm.methods.low_rank import LoraEmbedding, LoraLinear
from graftlm.methods.prefix import Prefix, PrefixTuningConfig
from graftlm.methods.prompt import Prompt, PromptTuningConfig
from graftlm.methods.starts.initialise import orthogonal

Init = bool | str


@torch.no_grad()
def draw_as_in_peft(adapters: AdapterSet, name: str, state: Tensor, *, keep: bool = True) -> None:
    """Draw the starting values of a new adapter again, from the generator's `state` before it was made.

    With `keep=False` they are only drawn: the adapter has its values from a file. Where PEFT's way of
    starting is not known here, nothing is done.
    """
    init = _init(adapters.config(name), keep=keep)
    if init is None:
        return
    torch.set_rng_state(state)
    for part in adapters.parts(name).values():
        for key, value in _drawn(part, init).items():
            if keep:
                part.get_parameter(key).copy_(value)


def _init(config: MethodConfig, *, keep: bool) -> Init | None:
    """How an adapter starts, where PEFT's draws for it are known and are not those that were made."""
    if isinstance(config, LoraConfig):
        return _init_of_lora(config, keep=keep)
    if isinstance(config, IA3Config):
        return config.init_ia3_weights
    if isinstance(config, PromptTuningConfig):
        return "drop" if config.prompt_tuning_init == "TEXT" or not keep else None
    if isinstance(config, PrefixTuningConfig):
        return "drop" if config.init_weights == "zero" or not keep else None
    return None


def _init_of_lora(config: LoraConfig, *, keep: bool) -> Init | None:
    init: Init = config.init_lora_weights
    if init in ("pissa", "olora"):  # computed from the weights; what PEFT draws before is dropped
        return "drop"
    known: tuple[Init, ...] = (True, "gaussian", False, "orthogonal")
    if config.use_dora and keep:  # lengths would have to follow
        known = known[:2]
    return init if init in known else None


def _drawn(part: Part, init: Init) -> dict[str, Tensor]:
    if isinstance(part, DoraLinear | DoraEmbedding):  # its lengths are the base's: the product is zero
        return {f"lora.{key}": value for key, value in _drawn(part.lora, init).items()}
    if isinstance(part, LoraLinear):
        return _linear(part, init)
    if isinstance(part, LoraEmbedding):
        a, b = torch.randn(part.lora_embedding_A.shape), torch.randn(part.lora_embedding_B.shape)
        if init == "drop":
            return {}
        if init is not False:
            a, b = torch.zeros_like(a), nn.init.normal_(b)
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if isinstance(part, IA3Output | IA3Input):
        factors = torch.randn(part.ia3_l.shape)
        return {"ia3_l": torch.ones_like(factors) if init else factors}
    if isinstance(part, Prompt | Prefix):
        torch.randn(part.prompt_embeddings.shape)  # what stands there comes from elsewhere
    return {}


def _linear(part: LoraLinear, init: Init) -> dict[str, Tensor]:
    rank, columns = part.lora_A.shape
    a = nn.Linear(columns, rank, bias=False).weight
    second = nn.Linear(rank, part.lora_B.shape[0], bias=part.lora_B_bias is not None)
    bias = {} if part.lora_B_bias is None else {"lora_B_bias": second.bias}
    if init == "drop":
        return {}
    if init is False:
        return {"lora_A": a, "lora_B": second.weight, **bias}
    if init == "orthogonal":
        start = orthogonal((part.lora_B.shape[0], columns), rank)
        return {"lora_A": start.a, "lora_B": start.b, **bias}
    if init == "gaussian":
        nn.init.normal_(a, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    zeros = {key: torch.zeros_like(value) for key, value in {"lora_B": second.weight, **bias}.items()}
    return {"lora_A": a, **zeros}
