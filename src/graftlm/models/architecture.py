"""Which class of `transformers` a base belongs to."""

from __future__ import annotations

import copy
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from graftlm.core.errors import ModelError
from graftlm.models.ending import TEXT, Ending

MAPPINGS = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSeq2SeqLM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForTokenClassification: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
"""Family -> the class of each config in it."""
LABELLING = {"rows": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}


def family_of(config: Any, name: str, ending: Ending = TEXT) -> Any:
    """The `Auto...` class of `transformers` whose models have this ending.

    Raises:
        ModelError: there is none.
    """
    if ending.kind != "text":
        return _labelling(config, name, ending)
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
        meaning="Text is written by causal and sequence-to-sequence language models; this checkpoint is an "
        "encoder, a bare backbone or another kind of model.",
        fix="Choose a base whose architecture ends in ForCausalLM or ForConditionalGeneration; to label text "
        "with this one: --task classification.",
    )


def _labelling(config: Any, name: str, ending: Ending) -> Any:
    family = LABELLING[ending.kind]
    if type(config) in MAPPINGS[family]:
        return family
    raise ModelError(
        f"transformers has no {config.model_type} that labels {ending.kind}.",
        meaning=f"{name} cannot get such a head.",
        fix="Choose another base: BERT, RoBERTa, DeBERTa, ModernBERT, and most causal models have one.",
    )


def concrete(family: Any, config: Any) -> tuple[Any, Any]:
    """The class that the family stands for with this config, and the config it takes, without a word of how
    the checkpoint is quantised."""
    found = MAPPINGS[family][type(config)]
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
