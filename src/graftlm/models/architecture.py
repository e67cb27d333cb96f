"""Which class of `transformers` a base belongs to."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from graftlm.core.errors import ModelError
from graftlm.models.ending import TEXT, Ending


def family_of(config: Any, name: str, ending: Ending = TEXT) -> Any:
    """The `Auto...` class of `transformers` whose models have this ending.

    Raises:
        ModelError: the checkpoint is neither.
    """
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
        f"{name} is a {', '.join(names)}, which does not write text.",
        meaning="Graft tunes causal and sequence-to-sequence language models; this checkpoint is an "
        "encoder, a bare backbone or another kind of model.",
        fix="Choose a base whose architecture ends in ForCausalLM or ForConditionalGeneration.",
    )


def concrete(family: Any, config: Any) -> tuple[Any, Any]:
    """The class that the family stands for with this config, and the config it takes, without a word of how
    the checkpoint is quantised."""
    is_sequence = family is AutoModelForSeq2SeqLM
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if is_sequence else MODEL_FOR_CAUSAL_LM_MAPPING
    found = mapping[type(config)]
    classes = found if isinstance(found, list | tuple) else (found,)
    named = [each for each in classes if each.__name__ in (config.architectures or ())]
    chosen = (named or classes)[0]
    own = copy.deepcopy(config)
    text_config = config.sub_configs.get("text_config")
    if text_config is not None and chosen.config_class is text_config:
        own = own.get_text_config()
    for part in (own, own.get_text_config()):
        vars(part).pop("quantization_config", None)
    return chosen, own


def generation_config(reference: str) -> Any:
    """How the base says it wants to write: generation_config.json, else what config.json says of it."""
    try:
        return GenerationConfig.from_pretrained(reference)
    except OSError:
        return GenerationConfig.from_pretrained(
            reference, config_file_name="config.json", _from_model_config=True
        )
