"""What adapters of whole stacks must know of a model: where its stacks are, and what they read and cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.models.auto import modeling_auto as auto

from graftlm.core.errors import TargetError
from graftlm.methods.base import TaskType

Role = Literal["backbone", "encoder", "decoder"]

TASKS: tuple[tuple[TaskType, Mapping[str, Any]], ...] = (
    ("SEQ_2_SEQ_LM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("CAUSAL_LM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ("SEQ_CLS", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ("TOKEN_CLS", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("QUESTION_ANS", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
)


@dataclass(frozen=True)
class KeyValues:
    """The shape of what one stack caches, the same in every layer."""

    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers per token: keys and values of all layers."""
        return self.layers * 2 * self.heads * self.head_dim


def stack_path(model: nn.Module, role: Role) -> str:
    """The path of a stack of layers, by its first name in `named_modules`.

    Raises:
        TargetError: the model is no `transformers` model, or has no such stack.
    """
    found: Any = None
    if role == "backbone":
        found = getattr(model, "base_model", None)
    elif is_encoder_decoder(model):
        found = model.get_encoder() if role == "encoder" else model.get_decoder()  # type: ignore[operator]
    path: str | None = next((path for path, module in model.named_modules() if module is found), None)
    if path is None:
        raise TargetError(
            f"{type(model).__name__} has no {role} that reads tokens.",
            meaning="Virtual tokens stand before the layers of a transformers model.",
            fix="Use an adapter of layers, such as LoRA.",
        )
    return path


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads in one stack and writes in another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def task_of(model: nn.Module) -> TaskType:
    """PEFT's name of what a model is for, from its class."""
    names = [kind.__name__ for kind in type(model).__mro__]
    for task, classes in TASKS:
        if not set(names).isdisjoint(classes.values()):
            return task
    return "FEATURE_EXTRACTION"


def is_causal(stack: nn.Module) -> bool:
    """Whether tokens of this stack never see later ones."""
    said = [getattr(module, "is_causal", None) for module in stack.modules()]
    attentions = [answer for answer in said if isinstance(answer, bool)]
    config: Any = stack.config
    if attentions:
        return any(attentions)
    return bool(getattr(config, "is_decoder", "use_cache" in argument_names(stack)))


def takes(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward has an argument of that name."""
    return argument in argument_names(module)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The arguments of a module's forward, in order, without `self`."""
    names = inspect.signature(type(module).forward).parameters
    return tuple(names)[1:]


def key_values(model: nn.Module, stack: nn.Module) -> KeyValues:
    """The shape of the stack's keys and values, from its config.

    Raises:
        TargetError: the layers differ, or the config does not say.
    """
    config: Any = stack.config
    config = config.get_text_config() if not is_encoder_decoder(model) else config
    kinds = set(getattr(config, "layer_types", None) or ())
    odd = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
    shared: Any = getattr(config, "num_kv_shared_layers", 0)
    if odd or shared or _is_uneven(config):
        raise TargetError(
            f"The attention layers of {type(model).__name__} differ in shape{f' ({odd})' if odd else ''}.",
            meaning="A prefix has the same keys and values in every layer.",
            fix="Use prompt tuning, or an adapter of layers.",
        )
    own = (
        ("num_decoder_layers", "decoder_layers", "decoder_attention_heads")
        if is_encoder_decoder(model)
        else ()
    )
    layers = _first(config, *own[:2], "num_hidden_layers")
    queries = _first(config, *own[2:], "num_attention_heads")
    heads = _first(config, "num_key_value_heads") or queries
    head_dim = _first(config, "head_dim", "d_kv") or (config.hidden_size // queries if queries else None)
    if not (layers and heads and head_dim):
        raise TargetError(
            f"The config of {type(model).__name__} does not say how many keys and values its layers have.",
            fix="Use prompt tuning, or an adapter of layers.",
        )
    return KeyValues(layers, heads, head_dim)


def _is_uneven(config: Any) -> bool:
    """Gemma 4 gives some layers other heads than the rest."""
    if getattr(config, "global_head_dim", None) is not None:
        return True
    layers = getattr(config, "per_layer_config", None) or ()
    shapes = {
        (getattr(layer, "head_dim", None), getattr(layer, "num_key_value_heads", None))
        for layer in (layers.values() if isinstance(layers, Mapping) else layers)
    }
    return len(shapes) > 1


def _first(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


@dataclass(frozen=True)
class Facts:
    """What is known of a stack and of the model around it."""

    arguments: tuple[str, ...]
    is_causal: bool
    is_encoder: bool
    """Of an encoder-decoder: what it returns is read by the decoder, virtual tokens included."""
    is_decoder: bool
    """Of an encoder-decoder: it has a second cache, of what it reads from the encoder."""
    shifts_labels: bool
    """The model around it predicts each label from the token before."""
    pools_first: bool
    """The model around it reads the first position for the whole sequence, virtual or not, as in PEFT."""
    first_position: int
    """RoBERTa and its kin count positions from the padding index on."""


def facts_of(model: nn.Module, stack: nn.Module) -> Facts:
    """Read off the classes; nothing is called."""
    is_pair, is_whole = is_encoder_decoder(model), stack is model
    is_encoder = is_pair and stack is model.get_encoder()  # type: ignore[operator]
    causal, task = is_causal(stack), task_of(model)
    return Facts(
        arguments=argument_names(stack),
        is_causal=causal,
        is_encoder=is_encoder,
        is_decoder=is_pair and not is_encoder,
        shifts_labels=not is_whole and task == "CAUSAL_LM",
        pools_first=not is_whole and task == "SEQ_CLS" and not causal,
        first_position=first_position(stack),
    )


def first_position(stack: nn.Module) -> int:
    """Where a stack begins to count positions: RoBERTa and its kin do so behind the padding index."""
    embeddings: Any = getattr(stack, "embeddings", None)
    counts_from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
    return int(embeddings.padding_idx) + 1 if counts_from_padding else 0
