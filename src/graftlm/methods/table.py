"""Every method by the type name that its files carry. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

from graftlm.core.errors import ConfigError
from graftlm.methods.adaption_prompt import AdaptionPromptConfig
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.methods.tokens import TrainableTokensConfig

METHODS: Mapping[str, type[MethodConfig]] = {
    "LORA": LoraConfig,
    "TRAINABLE_TOKENS": TrainableTokensConfig,
    "IA3": IA3Config,
    "BOTTLENECK": BottleneckConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "ADAPTION_PROMPT": AdaptionPromptConfig,
    "FULL": FullConfig,
}


def method(peft_type: str) -> type[MethodConfig]:
    """The config class of a type name; other packages add theirs by the entry point `graftlm.methods`.

    Raises:
        ConfigError: nobody offers that type.
    """
    if peft_type in METHODS:
        return METHODS[peft_type]
    for entry in entry_points(group="graftlm.methods"):
        if entry.name == peft_type:
            found = entry.load()
            assert isinstance(found, type) and issubclass(found, MethodConfig)
            return found
    raise ConfigError(
        f"The method {peft_type!r} is not known.",
        meaning="This version of Graft does not have it.",
        fix=f"Known methods: {', '.join(METHODS)}.",
    )
