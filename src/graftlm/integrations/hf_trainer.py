"""`transformers.Trainer` for models with adapters: small checkpoints, exact resume, a reference for free.

Works on a model with attached adapters (`gl.attach`) and on a `PeftModel` of `peft_api`. For a trainer of
another library: `class MyTrainer(GraftTrainerMixin, SFTTrainer): ...`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.core.files import write_atomic
from graftlm.formats.layout import CONFIG, TENSORS, fill, read_folder
from graftlm.integrations.peft_api.state_dict import adapters_in
from graftlm.integrations.peft_api.writing import (
    folder_of,
    load_trainer_state,
    save_adapters,
    write_trainer_state,
)
from graftlm.methods.adapter_set import AdapterSet

TRAINED = "adapter_training.safetensors"
"""In a checkpoint, beside the adapters: their parameters as they are trained."""

if TYPE_CHECKING:
    Base = Any
else:
    Base = object


class GraftTrainerMixin(Base):  # type: ignore[misc]
    """What a trainer needs to know of adapters. Put it before the trainer's class.

    `loraplus_lr_ratio` speeds up the matrices next to the output (LoRA+, arXiv 2402.12354).
    """

    def __init__(self, *args: Any, loraplus_lr_ratio: float | None = None, **kwargs: Any) -> None:
        self.loraplus_lr_ratio = loraplus_lr_ratio
        super().__init__(*args, **kwargs)
        let_gradients_through(self.model, self.args)

    @property
    def adapters(self) -> AdapterSet:
        """The adapters of the model in training.

        Raises:
            AdapterError: the model has none.
        """
        return adapters_in(self.accelerator.unwrap_model(self.model))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model without its adapters for the length of a block: the reference of DPO and its like."""
        with self.adapters.disabled():
            yield

    def null_ref_context(self) -> Any:
        """`reference`, under the name that trainers of TRL call."""
        return self.reference()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The trainer's own optimizer; with LoRA+ its groups are split once more, by learning rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*([] if model is None else [model]))
        if self.loraplus_lr_ratio is not None:
            split_fast(optimizer, fast_parameters(self.adapters), self.loraplus_lr_ratio)
        return optimizer

    # Checkpoints: only adapters, in the layout that everything else here reads.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        save_adapters(self.adapters, folder, self.adapters.names)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_atomic(folder / "training_args.json", self.args.to_json_string() + "\n")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_trainer_state(self.adapters, Path(output_dir) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_checkpoint(self.adapters, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_checkpoint(self.adapters, Path(self.state.best_model_checkpoint))


class GraftTrainer(GraftTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` whose checkpoints hold the adapters and nothing of the base.

    Saving, resuming and `load_best_model_at_end` work as documented by transformers; `save_model` writes an
    adapter folder. Optimizer, scheduler and random states are saved by transformers itself.
    """


class Reference(nn.Module):
    """The base under a model's adapters as a model of its own, without memory of its own.

    For trainers that ask for one: `DPOTrainer(model=model, ref_model=Reference(model), ...)`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Not registered: whoever moves, freezes or switches the reference must not touch the model.
        object.__setattr__(self, "_model", model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with adapters_in(self._model).disabled():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(adapters_in(self._model).model, name)


def load_checkpoint(adapters: AdapterSet, folder: Path) -> None:
    """Put the values of a checkpoint into every adapter of the model: the parameters as they were trained,
    or what the adapter's own files hold, where there is nothing else.

    Raises:
        CheckpointError: the checkpoint lacks an adapter of the model; FormatError: one that does not fit.
            Nothing was changed.
    """
    if (folder / TRAINED).is_file():
        load_trainer_state(adapters, load_file(folder / TRAINED))
        return
    folders = {name: folder_of(folder, name) for name in adapters.names}
    missing = [name for name, where in folders.items() if not (where / CONFIG).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} does not hold {', '.join(map(repr, missing))}.",
            meaning="The model has adapters that the checkpoint was written without.",
            fix="Attach the adapters that the interrupted run had, under the same names.",
        )
    tensors = {name: read_folder(where)[1] for name, where in folders.items()}
    for name, where in folders.items():
        fill(adapters, name, tensors[name], str(where / TENSORS), strict=True)


def let_gradients_through(model: nn.Module, args: Any) -> None:
    """With activations recomputed, the first block must see an input that requires gradients."""
    recomputes = getattr(args, "activation_checkpointing", getattr(args, "gradient_checkpointing", False))
    if recomputes and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]


def fast_parameters(adapters: AdapterSet) -> set[int]:
    """Ids of the parameters that LoRA+ speeds up.

    Raises:
        ConfigError: no trained adapter has any.
    """
    found = {
        id(part.get_parameter(key))
        for name in adapters.trainable
        for part in adapters.parts(name).values()
        for key, _ in part.named_parameters()
        if key in part.output_side
    }
    if not found:
        raise ConfigError(
            "loraplus_lr_ratio is set, but no trained parameter is a LoRA B matrix.",
            meaning="LoRA+ speeds up the B matrices of LoRA and DoRA only.",
            fix="Leave loraplus_lr_ratio out.",
        )
    return found


def split_fast(optimizer: torch.optim.Optimizer, fast: set[int], ratio: float) -> None:
    """Move the parameters in `fast` to groups of their own, with `ratio` times the learning rate."""
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in fast]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in fast]
            optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * ratio})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
