"""The `train` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from graftlm.core.config import Config
from graftlm.models.recompute.policy import Policy
from graftlm.training.compile_choice import Switch


class TrainSection(Config):
    """The optimisation."""

    aliases: ClassVar[Mapping[str, str]] = {
        "lr": "learning_rate",
        "epochs": "num_train_epochs",
        "num_epochs": "num_train_epochs",
        "iters": "max_steps",
        "batch_size": "per_device_train_batch_size",
        "micro_batch_size": "per_device_train_batch_size",
        "grad_accumulation_steps": "gradient_accumulation_steps",
        "lr_scheduler": "lr_scheduler_type",
        "activation_checkpointing": "recompute",
        "random_seed": "seed",
        "optimizer": "optim",
    }

    num_train_epochs: float = Field(3, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, gt=0)
    """Optimizer steps; wins over `num_train_epochs`."""
    per_device_train_batch_size: int = Field(4, gt=0)
    """Rows, or windows when packed, in one forward pass. Unwritten: fitted to 16 rows per step."""
    gradient_accumulation_steps: int = Field(4, gt=0)
    """Forward passes per optimizer step. Unwritten: fitted with the batch size."""
    learning_rate: float = Field(2e-4, gt=0)
    """Highest learning rate. Unwritten: fitted to the width of the base."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0.0)
    """On matrices only."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm; the norm before that is what the log shows."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """AdamW; `8bit`: its state in 8 bits, `paged`: in memory that a GPU can lend from the machine. Those need
    bitsandbytes."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """Learning rate of B over that of A (arXiv 2402.12354); none: the same."""
    recompute: Literal["auto", Policy] = "auto"
    """Activations that are computed again in backward instead of being kept; `auto`: as few as memory allows.
    `gradient_checkpointing` is understood too: true is `everything`, false `nothing`."""
    compile: Switch = "auto"
    """Layers through `torch.compile`; `auto`: if that is predicted to save more time than it costs."""
    recorded_steps: Switch = "auto"
    """Micro-batches recorded once for a shape and played again (CUDA graphs), for small models whose kernels
    the host cannot start fast enough. `auto`: where that was measured to gain, which is nowhere yet."""
    save_steps: int = Field(100, gt=0)
    """Optimizer steps between checkpoints."""
    save_total_limit: int = Field(2, gt=0)
    """Checkpoints kept besides the best one."""
    eval_steps: int = Field(100, gt=0)
    """Optimizer steps between measurements of the held-out loss."""
    early_stopping_patience: int | None = Field(None, gt=0)
    """Measurements without improvement after which the run stops and keeps its best step."""
    on_failure: Literal["warn", "stop"] = "warn"
    """What happens when a known failure shows while the run goes on: it is said, or the run stops."""
    seed: int = Field(42, ge=0)
    """Of the hold-out, the order of rows, initialisation and dropout."""

    @field_validator("compile", "recorded_steps", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        """YAML reads `on` and `off` as booleans."""
        return ("on" if value else "off") if isinstance(value, bool) else value

    @model_validator(mode="before")
    @classmethod
    def _usual_name(cls, value: Any) -> Any:
        """`gradient_checkpointing` says the same with two values."""
        if not isinstance(value, Mapping) or "gradient_checkpointing" not in value:
            return value
        rest = {key: entry for key, entry in value.items() if key != "gradient_checkpointing"}
        asked = value["gradient_checkpointing"]
        if asked not in (True, False, "auto"):
            raise ValueError(f"gradient_checkpointing is true, false or auto (got {asked!r})")
        policy = {True: "everything", False: "nothing"}.get(asked, "auto")
        # A run that goes on has `recompute` in its recipe, and may be asked for as it was the first time.
        if rest.get("recompute", policy) != policy:
            raise ValueError(
                f"gradient_checkpointing and recompute: {rest['recompute']} contradict each other; "
                "leave one of them out"
            )
        return {**rest, "recompute": policy}
