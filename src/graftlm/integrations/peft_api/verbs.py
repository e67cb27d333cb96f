"""What PEFT's models can be asked to do with their adapters, said in terms of the `AdapterSet`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from graftlm.core.errors import AdapterError, UsageError
from graftlm.formats.layout import TENSORS, fill, read_folder
from graftlm.integrations.peft_api.configs import PeftConfig
from graftlm.integrations.peft_api.folders import adapter_folder
from graftlm.integrations.peft_api.state_dict import adapters_in, make_adapter, read_adapter
from graftlm.integrations.peft_api.status import ModelStatus, get_model_status
from graftlm.integrations.peft_api.weighted import add_weighted
from graftlm.integrations.peft_api.writing import add_trainer_state, save_adapters
from graftlm.methods.adapter_set import AdapterSet, ParameterType

BASE = "__base__"
"""PEFT's name for no adapter, in a batch that mixes them."""


class AdapterVerbs(nn.Module):
    """The verbs of `PeftModel`, which its `base_model` has as well."""

    peft_config: dict[str, PeftConfig]

    def get_base_model(self) -> nn.Module:
        """The `transformers` model itself, with its adapters."""
        raise NotImplementedError

    @property
    def adapters(self) -> AdapterSet:
        """Graft's own handle on the adapters."""
        return adapters_in(self.get_base_model())

    # State.

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are applied."""
        return list(self.adapters.active)

    @property
    def active_adapter(self) -> str:
        """The first adapter that is applied."""
        names = self.adapters.active
        if not names:
            raise AdapterError("No adapter is active.", fix="Choose one: model.set_adapter(name).")
        return names[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Apply exactly these adapters, and train exactly these unless `inference_mode`."""
        self.adapters.activate(adapter_name)
        self.adapters.train_only([] if inference_mode else adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters too, or no longer; which are active does not change."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        others = [name for name in self.adapters.trainable if name not in names]
        self.adapters.train_only([*others, *names] if requires_grad else others)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone for the length of a block. What is merged stays merged."""
        with self.adapters.disabled():
            yield

    def disable_adapter_layers(self) -> None:
        """Apply no adapter until `enable_adapter_layers`."""
        if not hasattr(self.get_base_model(), "_graft_was_active"):
            object.__setattr__(self.get_base_model(), "_graft_was_active", self.adapters.active)
        self.adapters.activate([])

    def enable_adapter_layers(self) -> None:
        """The inverse of `disable_adapter_layers`."""
        base = self.get_base_model()
        names = vars(base).get("_graft_was_active")
        if names is not None:
            self.adapters.activate([name for name in names if name in self.adapters])
            object.__delattr__(base, "_graft_was_active")

    # Making and removing.

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Make another adapter, inactive and frozen."""
        dtype: ParameterType = "float32" if autocast_adapter_dtype else "base"
        make_adapter(self.get_base_model(), peft_config, adapter_name, dtype=dtype)
        self._describe(adapter_name, peft_config)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> _IncompatibleKeys:
        """Read a saved adapter: a new one, inactive, or new values for one that exists.

        The model goes to evaluation mode unless `is_trainable`, as in PEFT.

        Raises:
            FormatError: anything in the folder does not fit; nothing was changed.
        """
        folder = adapter_folder(model_id, subfolder, options)
        if adapter_name in self.adapters:
            fill(self.adapters, adapter_name, read_folder(folder)[1], str(folder / TENSORS), strict=True)
        else:
            read_adapter(self.get_base_model(), folder, adapter_name, widen=autocast_adapter_dtype)
            self._describe(adapter_name, PeftConfig.from_pretrained(folder))
        if is_trainable:
            self.set_requires_grad(adapter_name)
        else:
            self.eval()
        return _IncompatibleKeys(missing_keys=[], unexpected_keys=[])

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        """Make an adapter whose change is the weighted sum of others' changes, inactive and frozen.

        Options: `svd_rank`, `density`, `majority_sign_method`. `linear` and `cat` are exact here.
        """
        config = add_weighted(self.adapters, adapters, weights, adapter_name, combination_type, options)
        self._describe(adapter_name, config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self.adapters.delete(adapter_name)
        del self.peft_config[adapter_name]

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: Any = None,
        **options: Any,
    ) -> None:
        """Write adapters: `default` into the folder itself, others into subfolders of their names.

        An adapter that lies there is replaced. `state_dict` is not needed: an adapter knows its own tensors.
        """
        if not safe_serialization:
            raise UsageError("Only safetensors are written.", fix="Leave safe_serialization out.")
        if options.pop("push_to_hub", False):
            raise UsageError("Saving does no network I/O.", fix="Save, then upload the folder.")
        if save_embedding_layers is True:
            raise UsageError(
                "Embeddings of the base are not saved beside an adapter.",
                fix="Train and save them with it: modules_to_save=['embed_tokens', 'lm_head'].",
            )
        if is_main_process:
            names = list(self.adapters.names if selected_adapters is None else selected_adapters)
            save_adapters(self.adapters, Path(save_directory), names)
            add_trainer_state(self.adapters, Path(save_directory))

    # Merging.

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (default: the active ones) into the weights; always checked, whole or not at all."""
        self.adapters.merge(adapter_names)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, to the byte."""
        self.adapters.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Fold adapters into the weights and return the plain model; always checked, whole or not at all."""
        if adapter_names is not None:
            self.adapters.activate(adapter_names)
        return self.adapters.merge_and_unload()

    def unload(self) -> nn.Module:
        """Take every adapter off and return the plain model as it was."""
        return self.adapters.detach()

    # Figures.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return self.adapters.count_parameters()

    def print_trainable_parameters(self) -> None:
        """`trainable params: ... || all params: ... || trainable%: ...`"""
        self.adapters.print_trainable_parameters()

    def get_model_status(self) -> ModelStatus:
        """The state of all adapters at a glance."""
        return get_model_status(self)

    def _describe(self, name: str, config: PeftConfig) -> None:
        """Remember the config of a new adapter, with the name of its base."""
        base = str(getattr(getattr(self.get_base_model(), "config", None), "_name_or_path", "") or "")
        config.base_model_name_or_path = base or config.base_model_name_or_path
        self.peft_config[name] = config
