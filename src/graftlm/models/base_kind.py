"""What kind of model a base is, told from its config alone."""

from __future__ import annotations

from typing import Any, Literal

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graftlm.models.load import load_config
from graftlm.models.locate import locate

BaseKind = Literal["causal", "encoder-decoder", "encoder"]
"""Continues text, reads in one half and writes in the other, or only reads."""


def base_kind(name: str) -> BaseKind:
    """The kind of the base `name`; no weights are loaded.

    Raises:
        ModelError: there is no such base.

    >>> base_kind("sprout")
    'causal'
    """
    return kind_of(load_config(locate(name)))


def kind_of(config: Any) -> BaseKind:
    """The kind by the classes that the checkpoint names, or by its architecture where it names none."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = config.architectures or [causal.get(config.model_type, "")]
    return "causal" if set(causal.values()).intersection(named) else "encoder"
