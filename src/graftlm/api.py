"""One function per verb, and the few names that Python users start from. Everything is wired here."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from graftlm.core.environment import Environment, describe_environment
from graftlm.data.task_report import TaskReport as TaskReport
from graftlm.formats.layout import FOLDER
from graftlm.methods import attach as attaching
from graftlm.methods.adapter_set import AdapterSet, ParameterType
from graftlm.methods.base import MethodConfig
from graftlm.models.attach import attach_from_base
from graftlm.planning.hardware import this_machine
from graftlm.planning.machine import Machine
from graftlm.verbs.chat import chat as chat
from graftlm.verbs.check import check as check
from graftlm.verbs.combine import combine as combine
from graftlm.verbs.demo import demo as demo
from graftlm.verbs.diagnose import diagnose as diagnose
from graftlm.verbs.evaluate import evaluate as evaluate
from graftlm.verbs.merge import merge as merge
from graftlm.verbs.planning import plan as plan
from graftlm.verbs.search import search as search
from graftlm.verbs.tune import tune as tune


def attach(
    model: nn.Module,
    adapter: MethodConfig | str | Path,
    name: str = "default",
    *,
    dtype: ParameterType = "float32",
) -> AdapterSet:
    """Attach a new adapter (from a config) or a saved one (from a folder in PEFT's layout) to a model.

    The first adapter becomes active and trainable and freezes the base; later ones join, inactive and frozen.

    Args:
        model: any `transformers` model, or any module.
        adapter: a config such as `LoraConfig(r=16)`, or a folder.
        name: the adapter's name on this model.
        dtype: `float32` parameters, or `base` for the base's own dtype.

    Raises:
        TargetError, AdapterError, FormatError: the model is untouched.
        ModelError: `init_lora_weights="loftq"` finds no weights from before the base was quantised.

    >>> import graftlm as gl
    >>> model, tokenizer = gl.load_model("sprout")
    >>> adapters = gl.attach(model, gl.LoraConfig(r=4, target_modules="attention"))
    >>> adapters.active
    ('default',)
    """
    if isinstance(adapter, MethodConfig):
        return attach_from_base(model, adapter, name, dtype=dtype)
    return attaching.attach_folder(model, Path(adapter), name, storage=FOLDER)


def adapters(model: nn.Module) -> AdapterSet | None:
    """The `AdapterSet` of a model, or None."""
    return attaching.adapters_of(model)


def env() -> Environment:
    """The machine, versions, and which fast paths are on."""
    return describe_environment()


def machine(*, measure: bool = False) -> Machine:
    """This machine with its rates, as `plan` sees it: kept from an earlier measurement, else assumed.

    Args:
        measure: measure the rates now, where no good measurement is kept: some seconds.
    """
    return this_machine(calibrate=measure)
