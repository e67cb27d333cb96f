"""`AutoPeftModel...`: base and adapter in one call, from the adapter's folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import transformers

from graftlm.core.errors import FormatError
from graftlm.integrations.peft_api.configs import PeftConfig
from graftlm.integrations.peft_api.model import PeftModel


class AutoPeftModel:
    """Loads the base that an adapter names, and the adapter onto it."""

    base_class: ClassVar[str] = "AutoModel"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> PeftModel:
        """Options (`dtype`, `device_map`, ...) are those of the base's own `from_pretrained`.

        Raises:
            FormatError: the adapter does not name its base.
        """
        name = pretrained_model_name_or_path
        where: dict[str, Any] = {} if revision is None else {"revision": revision}
        said = config or PeftConfig.from_pretrained(name, subfolder, **where)
        if not said.base_model_name_or_path:
            raise FormatError(
                f"The adapter {name} does not name its base.",
                fix="Load the base, then PeftModel.from_pretrained(base, folder).",
            )
        kind = getattr(transformers, cls.base_class)
        base = kind.from_pretrained(said.base_model_name_or_path, revision=said.revision or "main", **options)
        return PeftModel.from_pretrained(
            base, name, adapter_name, is_trainable, config, subfolder=subfolder, **where
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For models that continue text."""

    base_class: ClassVar[str] = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For models that turn text into text."""

    base_class: ClassVar[str] = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For models that classify whole texts."""

    base_class: ClassVar[str] = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For models that classify tokens."""

    base_class: ClassVar[str] = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For models that find answers in a text."""

    base_class: ClassVar[str] = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models that turn texts into vectors."""
