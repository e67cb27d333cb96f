"""Graft: adapt large language models with a small fraction of their parameters, and run those adapters.

    import graftlm as gl
    model, tokenizer = gl.load_model("sprout")
    adapters = gl.attach(model, gl.LoraConfig(r=16, lora_alpha=32))

Names are loaded when they are first used, so that importing the package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graftlm.core.version import __version__ as __version__

if TYPE_CHECKING:
    from graftlm.api import adapters as adapters
    from graftlm.api import attach as attach
    from graftlm.api import chat as chat
    from graftlm.api import check as check
    from graftlm.api import combine as combine
    from graftlm.api import demo as demo
    from graftlm.api import diagnose as diagnose
    from graftlm.api import env as env
    from graftlm.api import evaluate as evaluate
    from graftlm.api import machine as machine
    from graftlm.api import merge as merge
    from graftlm.api import plan as plan
    from graftlm.api import search as search
    from graftlm.api import tune as tune
    from graftlm.core.errors import GraftError as GraftError
    from graftlm.methods.adapter_set import AdapterSet as AdapterSet
    from graftlm.methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from graftlm.methods.bottleneck import BottleneckConfig as BottleneckConfig
    from graftlm.methods.full import FullConfig as FullConfig
    from graftlm.methods.ia3 import IA3Config as IA3Config
    from graftlm.methods.lora import LoraConfig as LoraConfig
    from graftlm.methods.prefix import PrefixTuningConfig as PrefixTuningConfig
    from graftlm.methods.prompt import PromptTuningConfig as PromptTuningConfig
    from graftlm.methods.tokens import TrainableTokensConfig as TrainableTokensConfig
    from graftlm.models.load import load_model as load_model
    from graftlm.models.save_quantised import save_base as save_base
    from graftlm.quant.foreign import adopt as adopt
    from graftlm.training.recipe import Recipe as Recipe

_HOMES = {
    **dict.fromkeys(
        (
            *("adapters", "attach", "chat", "check", "combine", "demo", "diagnose", "env", "evaluate"),
            *("machine", "merge", "plan", "search", "tune"),
        ),
        "graftlm.api",
    ),
    "GraftError": "graftlm.core.errors",
    "AdapterSet": "graftlm.methods.adapter_set",
    "AdaptionPromptConfig": "graftlm.methods.adaption_prompt",
    "BottleneckConfig": "graftlm.methods.bottleneck",
    "FullConfig": "graftlm.methods.full",
    "IA3Config": "graftlm.methods.ia3",
    "LoraConfig": "graftlm.methods.lora",
    "PrefixTuningConfig": "graftlm.methods.prefix",
    "PromptTuningConfig": "graftlm.methods.prompt",
    "TrainableTokensConfig": "graftlm.methods.tokens",
    "load_model": "graftlm.models.load",
    "save_base": "graftlm.models.save_quantised",
    "adopt": "graftlm.quant.foreign",
    "Recipe": "graftlm.training.recipe",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graftlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
