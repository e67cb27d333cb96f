"""`PeftModel`: a thin wrapper around a model with adapters, so that scripts find what they look for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from graftlm.core.errors import AdapterError
from graftlm.integrations.peft_api.checkpointing import enable_activation_checkpointing
from graftlm.integrations.peft_api.configs import PeftConfig, TaskType
from graftlm.integrations.peft_api.folders import adapter_folder
from graftlm.integrations.peft_api.state_dict import make_adapter, read_adapter
from graftlm.integrations.peft_api.verbs import BASE, AdapterVerbs
from graftlm.integrations.peft_api.writing import is_trainer_state, load_trainer_state
from graftlm.methods.attach import adapters_of


class Tuner(AdapterVerbs):
    """What PEFT calls the `base_model`; the `transformers` model is its `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config = {}

    def get_base_model(self) -> nn.Module:
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class PeftModel(AdapterVerbs):
    """A model with adapters, under the names that PEFT gives to everything.

    Attributes that it does not have are those of the model. For `isinstance` it is of the model's class too,
    so that `transformers.Trainer` and its like treat it as that model, and save it by `save_pretrained`.
    """

    task_type: TaskType | None = None
    base_model: Tuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        _refuse_adapted(model)
        make_adapter(model, peft_config, adapter_name, dtype="float32" if autocast_adapter_dtype else "base")
        self._wrap(model, adapter_name, peft_config)

    def _wrap(self, model: nn.Module, name: str, config: PeftConfig) -> None:
        nn.Module.__init__(self)
        self.base_model = Tuner(model)
        self._describe(name, config)
        self.train(model.training)
        if getattr(model, "is_activation_checkpointing", getattr(model, "is_gradient_checkpointing", False)):
            model.get_submodule("").enable_input_require_grads()  # type: ignore[operator]

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> PeftModel:
        """A saved adapter on `model`, from a folder or the hub; frozen unless `is_trainable`.

        Raises:
            FormatError: a tensor is missing, unexpected or of another shape, or the adapter was trained on
                another base; the model is untouched. PEFT warns, or says nothing.
        """
        _refuse_adapted(model)
        folder = adapter_folder(model_id, subfolder, options)
        said = PeftConfig.from_pretrained(folder) if config is None else config
        adapters = read_adapter(model, folder, adapter_name, widen=autocast_adapter_dtype)
        said.inference_mode = not is_trainable
        adapters.train_only([adapter_name] if is_trainable else [])
        wrapped = class_for(said.task_type).__new__(class_for(said.task_type))
        wrapped._wrap(model, adapter_name, said)
        return wrapped if is_trainable else wrapped.eval()

    def get_base_model(self) -> nn.Module:
        # torch.compile cannot follow an attribute of a class that has a __getattr__ of its own.
        model = self._modules["base_model"]._modules["model"]  # type: ignore[union-attr]
        assert model is not None
        return model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:  # type: ignore[override]
        """The config of every adapter by name."""
        return self.base_model.peft_config

    # Calling the model.

    @property
    def forward(self) -> Callable[..., Any]:
        """The model's own forward, its signature included; `adapter_names` gives one adapter per row."""
        base = self.get_base_model()
        own = base.forward

        @wraps(own)
        def forward(*args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
            # A forward that was taken before somebody replaced it is the one that was replaced.
            call = base if base.forward == own else own
            if adapter_names is None:
                return call(*args, **kwargs)
            with self.adapters.routed(_rows(adapter_names)):
                return call(*args, **kwargs)

        return forward

    @forward.setter
    def forward(self, replacement: Callable[..., Any]) -> None:
        """What a trainer puts in the place of forward is meant for the model itself."""
        base = self.get_base_model()
        if isinstance(replacement, MethodType) and replacement.__self__ is self:
            replacement = MethodType(replacement.__func__, base)
        base.forward = replacement

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's `generate`; `adapter_names` gives one adapter per row."""
        generate: Any = self.get_base_model().generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        with self.adapters.routed(_rows(adapter_names)):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    # What scripts read from the model.

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.get_base_model().config

    @property
    def generation_config(self) -> Any:
        """How the model generates; setting it sets the model's own."""
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.get_base_model().generation_config = config

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next(self.get_base_model().parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's weights."""
        found: torch.dtype = self.get_base_model().dtype  # type: ignore[assignment]
        return found

    @property
    def modules_to_save(self) -> set[str] | None:
        """Modules that are trained whole, over all adapters."""
        configs = [self.adapters.config(name) for name in self.adapters.names]
        return {name for config in configs for name in config.modules_to_save or ()} or None

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass; gradients reach the adapters either way."""
        enable_activation_checkpointing(self.get_base_model(), gradient_checkpointing_kwargs, **options)

    activation_checkpointing_enable = gradient_checkpointing_enable

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Parameters by the names of `state_dict()`, or adapters from a checkpoint of a Trainer."""
        if is_trainer_state(self.adapters, state_dict):
            load_trainer_state(self.adapters, state_dict)
            return _IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        found: _IncompatibleKeys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        return found

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        base = self.__dict__.get("_modules", {}).get("base_model")
        return type(self) if base is None else type(base.model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


class PeftModelForCausalLM(PeftModel):
    """A model that continues text."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A model that turns text into text."""


class PeftModelForSequenceClassification(PeftModel):
    """A model that classifies whole texts."""


class PeftModelForTokenClassification(PeftModel):
    """A model that classifies tokens."""


class PeftModelForQuestionAnswering(PeftModel):
    """A model that finds answers in a text."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model that turns texts into vectors."""


BY_TASK: Mapping[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def class_for(task: TaskType | None) -> type[PeftModel]:
    """The wrapper for a task."""
    return PeftModel if task is None else BY_TASK[task]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Attach a new adapter to `model` and wrap it. `mixed` models need nothing else here.

    Raises:
        ConfigError, TargetError, AdapterError: the model is untouched.
    """
    peft_config.revision = revision or peft_config.revision
    kind = class_for(peft_config.task_type)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _refuse_adapted(model: nn.Module) -> None:
    if isinstance(model, AdapterVerbs) or adapters_of(model) is not None:
        raise AdapterError(
            "This model has adapters already.",
            meaning="A second wrapper around them would be a tower that nothing can merge.",
            fix="Use model.add_adapter(...) or model.load_adapter(...), or model.unload() first.",
        )


def _rows(names: Sequence[str]) -> list[str | None]:
    return [None if name == BASE else name for name in names]
