"""The `method` section of a recipe: `type` picks a method, every other key is a field of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from graftlm.core.config import build, suggest
from graftlm.core.errors import ConfigError
from graftlm.methods.base import MethodConfig
from graftlm.methods.table import method

LATER = "not in this version of Graft"


@dataclass(frozen=True)
class Kind:
    """What a type of a recipe stands for: a method, and what recipes start from where it differs."""

    peft_type: str
    meaning: str
    fields: Mapping[str, Any]


QLORA = "qlora"

TYPES: Mapping[str, Kind] = {
    "lora": Kind("LORA", "two thin matrices beside each linear layer", {}),
    QLORA: Kind("LORA", "LoRA on a base stored in 4 bits (`model.quantization: nf4`)", {}),
    "dora": Kind("LORA", "LoRA with direction and length apart", {"use_dora": True}),
    "ia3": Kind("IA3", "a learned factor on keys, values and feed-forward", {}),
    "bottleneck": Kind("BOTTLENECK", "a small network after each sublayer", {}),
    "prefix": Kind("PREFIX_TUNING", "keys and values before every layer", {"prefix_projection": True}),
    "prompt": Kind("PROMPT_TUNING", "tokens before the input", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "adaption_prompt": Kind("ADAPTION_PROMPT", "gated prompts in the top layers (LLaMA-Adapter)", {}),
    "tokens": Kind("TRAINABLE_TOKENS", "some rows of the embedding", {}),
    "full": Kind("FULL", "every parameter, as the baseline", {}),
    "biases": Kind("FULL", "the biases only (BitFit)", {"parts": "biases"}),
    "norms": Kind("FULL", "the normalisation layers only", {"parts": "norms"}),
}
"""Names of recipes. Methods of other packages go by their own type name."""


@dataclass(frozen=True)
class Method:
    """A method as a recipe names it. In YAML: one mapping, `type` beside the config's fields.

    >>> Method.parse({"type": "lora", "r": 8}).config.r
    8
    """

    type: str
    config: MethodConfig

    @classmethod
    def parse(cls, value: Any) -> Method:
        """From a mapping or a bare type name.

        Raises:
            ConfigError: the type is unknown, or fields of its config are wrong; all of them at once.
        """
        if isinstance(value, Method):
            return value
        fields = {"type": value} if isinstance(value, str) else dict(value or {})
        name = fields.pop("type", "lora")
        kind = _kind(name)
        return cls(name, build(method(kind.peft_type), {**kind.fields, **fields}, source=f"method {name}"))

    def as_dict(self) -> dict[str, Any]:
        """The inverse of `parse`."""
        return {"type": self.type, **self.config.model_dump(mode="json")}

    @property
    def summary(self) -> str:
        """The type and the fields that say how large the adapter is."""
        sizes = ("r", "lora_alpha", "num_virtual_tokens", "placement", "reduction_factor", "adapter_len")
        fields = self.config.model_dump(mode="json")
        shown = [f"{key.removeprefix('lora_')}={fields[key]}" for key in sizes if key in fields]
        return " ".join([self.type, *shown])


MethodSection = Annotated[Method, PlainValidator(Method.parse), PlainSerializer(Method.as_dict)]
"""The type of the section in a recipe."""


def _kind(name: Any) -> Kind:
    if name in TYPES:
        return TYPES[name]
    try:
        method(str(name))
    except ConfigError:
        hint = suggest(str(name), list(TYPES)) or f"; available: {', '.join(TYPES)}"
        raise _wrong(f"no such method{hint}", name) from None
    return Kind(str(name), "a method of another package", {})


def _wrong(what: str, name: Any) -> ConfigError:
    return ConfigError("The method is not usable.", problems=[f"type: {what} (got {name!r})"])
