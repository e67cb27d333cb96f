"""Trainers of TRL for models with adapters, with what goes wrong there without a word refused in words.

    import trl
    from graftlm.integrations.trl import bridged

    trainer = bridged(trl.DPOTrainer)(model=model, args=trl.DPOConfig("out"), train_dataset=pairs, ...)

`model` has adapters (`gl.attach`, or a `PeftModel` of `peft_api`). Checkpoints hold the adapters and
nothing of the base, and resume exactly; the reference of DPO, KTO, GRPO and RLOO is the same weights with the
adapters off; nothing is sent anywhere. For what Graft trains itself (`graft tune --task dpo`) none of this is
needed.

Two things differ from TRL with PEFT: where the adapter has learnt before, TRL takes a copy of it as the
reference, this the base under it (merge what was learnt, to start from that); and an adapter's own dropout
stays on under `disable_dropout`, which is said.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from graftlm.core.errors import AdapterError, TargetError, UsageError
from graftlm.core.notices import notice
from graftlm.integrations.hf_trainer import GraftTrainerMixin, Reference
from graftlm.integrations.peft_api.state_dict import adapters_in
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.prompt import PromptTuningConfig

LOADS_REFERENCE = "create_model_from_path"
"""What a trainer of TRL calls to load a second model as its reference."""
OWN_HEAD = "add_fused_lm_head"
"""What those trainers call that multiply with the weight of the output head themselves."""
ENDS = ("get_output_embeddings", "get_input_embeddings")

if TYPE_CHECKING:
    Base = Any
else:
    Base = object


class TrlMixin(GraftTrainerMixin, Base):  # type: ignore[misc]
    """What a trainer of TRL needs to know of adapters; `bridged` puts it before the trainer's class."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        require_trainable(model, type(self))
        if kwargs.get("peft_config") is not None:
            raise AdapterError(
                "peft_config is for PEFT's classes; this model has its adapter already.",
                fix="Leave peft_config out.",
            )
        with _same_weights_as_reference(type(self), model):
            super().__init__(model, *args, **kwargs)
        _say_dropout(self.adapters, self.args)

    def _send_telemetry(self) -> None:
        """TRL reports every trainer that is made; this one does not."""


def bridged(trainer: type) -> type:
    """The trainer class of TRL, made to know adapters.

    Raises:
        UsageError: this TRL loads references in another way than the versions this was tested with.
    """
    module = sys.modules[trainer.__module__]
    if "ref_model" in inspect.getsource(module) and not hasattr(module, LOADS_REFERENCE):
        raise UsageError(
            f"{trainer.__name__} of this TRL has no {LOADS_REFERENCE}.",
            meaning="It loads its reference in another way: a second model would be in memory.",
            fix="pip install trl==1.16.0, or `graft tune --task` for the same objective.",
        )
    return type(trainer.__name__, (TrlMixin, trainer), {"__doc__": trainer.__doc__})


def require_trainable(model: nn.Module, trainer: type) -> None:
    """Refuse adapters that a trainer of TRL would pass by, or fails on.

    Raises:
        AdapterError: there is no adapter, or one that is a prompt; TargetError: it acts on the output head or
            on the embeddings.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"The model is {model!r}.",
            meaning="A trainer that is bridged takes a model with its adapter attached.",
            fix="model, tokenizer = gl.load_model(NAME); gl.attach(model, gl.LoraConfig())",
        )
    adapters = adapters_in(model)
    if not any(hasattr(module, OWN_HEAD) for module in _modules_of(trainer)):
        return
    at_ends = _at_ends(adapters)
    if at_ends:
        raise TargetError(
            f"{trainer.__name__} would not train the adapters on {', '.join(at_ends)}.",
            meaning="It multiplies with the weight of the output head itself: what is adapted there changes "
            "nothing and gets no gradient. Tied embeddings share that weight.",
            fix="Leave these modules out of target_modules and modules_to_save, or use `graft tune`.",
        )
    prompts = [each for each in adapters.trainable if isinstance(adapters.config(each), PromptTuningConfig)]
    if prompts:
        raise AdapterError(
            f"{trainer.__name__} cannot train the prompt of {', '.join(map(repr, prompts))}.",
            meaning="It asks a model for probabilities, not logits; a prompt takes its own positions "
            "out of logits.",
            fix="Use `graft tune`, prefix tuning, or a method that adapts layers: LoRA, IA3, bottleneck.",
        )


def _at_ends(adapters: AdapterSet) -> list[str]:
    """Paths of trained places at the output head and the embeddings."""
    found = [getattr(adapters.model, name, lambda: None)() for name in ENDS]
    paths = {path for name in adapters.trainable for path in adapters.parts(name)}
    places = {path: adapters.model.get_submodule(path) for path in paths}
    return sorted(path for path, place in places.items() if any(place is end for end in found))


def _modules_of(trainer: type) -> list[ModuleType]:
    """The files of TRL that a trainer's classes come from."""
    names = dict.fromkeys(kind.__module__ for kind in trainer.__mro__ if kind.__module__.startswith("trl."))
    return [sys.modules[name] for name in names]


@contextmanager
def _same_weights_as_reference(trainer: type, model: nn.Module) -> Iterator[None]:
    """While a trainer is made: who loads a reference gets a view of the model with its adapters off."""

    def view(*args: Any, **kwargs: Any) -> Reference:
        return Reference(model)

    kept = [
        (module, getattr(module, LOADS_REFERENCE))
        for module in _modules_of(trainer)
        if hasattr(module, LOADS_REFERENCE)
    ]
    for module, _ in kept:
        setattr(module, LOADS_REFERENCE, view)
    try:
        yield
    finally:
        for module, load in kept:
            setattr(module, LOADS_REFERENCE, load)


def _say_dropout(adapters: AdapterSet, args: Any) -> None:
    """`disable_dropout` of TRL finds modules of torch; an adapter's dropout is none."""
    rates = [getattr(adapters.config(name), "lora_dropout", 0.0) for name in adapters.trainable]
    if getattr(args, "disable_dropout", False) and any(rates):
        notice("disable_dropout leaves the adapter's own dropout on; lora_dropout=0 switches it off.")
