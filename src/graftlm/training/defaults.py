"""Values of a recipe that nobody wrote, fitted to base and data; what was written is never changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftlm.core.errors import ConfigError
from graftlm.methods.base import MethodConfig
from graftlm.training.recipe import Recipe

REFERENCE_RATE, REFERENCE_WIDTH, WIDTH_EXPONENT = 2e-4, 4096, 0.8
"""LoRA's usual 2e-4 belongs to models about 4,096 wide; narrower ones want more. The exponent is measured on
models 64 and 128 wide (docs/results/learning-rate.md)."""
HIGHEST_RATE = 5e-3
SHORTEST = 8
"""The least `data.max_length`."""
ROWS_PER_STEP = 16
"""Examples in one optimizer step."""
TOKENS_PER_PASS = 4096
"""Tokens of one forward pass where the batch size is fitted: small in memory, enough for matrix units."""


def fitted_length(recipe: Recipe, context: int | None) -> Recipe:
    """The recipe with `max_length` within the base's context; a longer one that was written is an error.

    Raises:
        ConfigError: `data.max_length` was written and does not fit.
    """
    wanted = recipe.data.max_length
    if context is None or wanted <= context:
        return recipe
    if "max_length" in recipe.data.model_fields_set:
        raise ConfigError(
            f"data.max_length is {wanted}, but the context of this base is {context} tokens.",
            meaning="Positions beyond the context were never trained.",
            fix=f"Set data.max_length to at most {context}.",
        )
    return recipe.model_copy(update={"data": recipe.data.replace(max_length=context)})


def room_beside(method: MethodConfig, context: int | None) -> int | None:
    """The part of a base's context that an adapter leaves to the text.

    Raises:
        ConfigError: next to nothing is left.
    """
    if context is None:
        return None
    left = context - method.positions_taken
    if left < SHORTEST:
        raise ConfigError(
            f"{method.positions_taken} virtual tokens leave {max(0, left)} of {context} positions to text.",
            meaning="Virtual tokens stand in the base's context like real ones.",
            fix="Set method.num_virtual_tokens to a smaller number; 10 to 100 are usual.",
        )
    return left


def fitted(
    recipe: Recipe, lengths: Sequence[int], hidden_size: int, rate_scale: float = 1.0
) -> tuple[Recipe, list[str]]:
    """The recipe with unwritten values filled in, and a sentence for each.

    `lengths` are the tokens of the training rows. Batch settings aim at `ROWS_PER_STEP` examples per
    optimizer step, whether rows are packed into windows or not. `rate_scale` is the task's.
    """
    written = recipe.train.model_fields_set
    changes: dict[str, Any] = {}
    notes: list[str] = []
    if "learning_rate" not in written:
        changes["learning_rate"] = usual_rate(recipe, hidden_size, rate_scale)
        notes.append(f"learning rate {changes['learning_rate']:.1e} for a model {hidden_size} wide")
    is_free = not written & {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if is_free and not recipe.data.packing:
        passes = -(-ROWS_PER_STEP // max(1, TOKENS_PER_PASS // max(lengths, default=1)))
        size = round(ROWS_PER_STEP / passes)
        changes["per_device_train_batch_size"] = size
        changes["gradient_accumulation_steps"] = passes
        notes.append(f"{size * passes} rows per step, {size} at a time")
    if is_free and recipe.data.packing:
        rows_per_window = max(1.0, recipe.data.max_length * len(lengths) / max(1, sum(lengths)))
        wanted = max(1, round(ROWS_PER_STEP / rows_per_window))
        passes = -(-wanted // max(1, TOKENS_PER_PASS // recipe.data.max_length))
        size = max(1, round(wanted / passes))
        windows = size * passes
        changes["per_device_train_batch_size"] = size
        changes["gradient_accumulation_steps"] = passes
        notes.append(
            f"{windows} window{'' if windows == 1 else 's'} of {recipe.data.max_length} tokens (about "
            f"{windows * rows_per_window:.0f} rows) per step"
        )
    train = recipe.train.replace(**changes)
    return recipe.model_copy(update={"train": train}), notes


def usual_rate(recipe: Recipe, hidden_size: int, rate_scale: float) -> float:
    """The learning rate of a recipe that does not name one."""
    return float(f"{rate_scale * rate_for(recipe.method.config, hidden_size):.1e}")


def rate_for(method: MethodConfig, hidden_size: int) -> float:
    """Learning rate of a method for a model of this width.

    >>> from graftlm.methods.full import FullConfig
    >>> rate_for(FullConfig(), 4096)
    4e-05
    """
    return float(f"{rate_for_width(hidden_size) * method.rate_scale:.1e}")


def rate_for_width(hidden_size: int) -> float:
    """Learning rate of LoRA for a model of this width.

    >>> rate_for_width(4096), rate_for_width(256)
    (0.0002, 0.0018)
    """
    rate = REFERENCE_RATE * (REFERENCE_WIDTH / hidden_size) ** WIDTH_EXPONENT
    return float(f"{min(rate, HIGHEST_RATE):.1e}")
