"""`graft tune` with every method: trained, saved, proved, and resumed to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interrupting import interrupted
from runs import SETTINGS, files_of

from graftlm.core.config import read_yaml
from graftlm.core.errors import TargetError
from graftlm.training.method_section import TYPES, Method
from graftlm.training.recipe import Recipe
from graftlm.verbs.merge import merge
from graftlm.verbs.tune import tune

WITHOUT_RANK = tuple(setting for setting in SETTINGS if not setting.startswith("method."))
FIELDS = {
    "tokens": ("method.token_indices=[5, 6, 7]",),
    "adaption_prompt": ("method.adapter_layers=2",),
}
UNMERGEABLE = ("bottleneck", "prefix", "prompt", "adaption_prompt")
VARIANTS = {
    **{name: (f"method.type={name}", *FIELDS.get(name, ())) for name in TYPES if name != "biases"},
    "lora, EVA": ("method.init_lora_weights=eva",),
    "lora, PiSSA": ("method.init_lora_weights=pissa",),
    "qlora, LoftQ": ("method.type=qlora", "method.init_lora_weights=loftq"),
    "dora on nf4": ("method.type=dora", "model.quantization=nf4"),
    "ia3 on nf4": ("method.type=ia3", "model.quantization=nf4"),
    "bottleneck on int8": ("method.type=bottleneck", "model.quantization=int8"),
    "bottleneck, parallel": ("method.type=bottleneck", "method.placement=parallel"),
    "prompt, checkpointing": ("method.type=prompt", "train.gradient_checkpointing=true"),
    "prefix, checkpointing": ("method.type=prefix", "train.gradient_checkpointing=true"),
}


QUICK = ("ia3", "prefix", "prompt, checkpointing")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in QUICK else pytest.mark.slow) for v in VARIANTS]
)
def test_every_method_is_tuned_and_resumed(variant: str, sums: Path, tmp_path: Path) -> None:
    settings = (*WITHOUT_RANK, *VARIANTS[variant], "eval.metrics=[loss]")
    whole = tune(sums, model="sprout", out=tmp_path / "whole", overrides=settings)
    assert whole.passed or whole.figures["after"]["held_out_loss"] > whole.figures["before"]["held_out_loss"]
    name = Recipe.model_validate(read_yaml(whole.run / "recipe.yaml")).method.type
    assert (whole.figures["merge"] is None) == (name in UNMERGEABLE)
    run = tmp_path / "cut"
    interrupted("while training", run, lambda: tune(sums, model="sprout", out=run, overrides=settings))
    resumed = tune(run, resume=True)
    assert files_of(resumed.adapter) == files_of(whole.adapter)
    assert resumed.figures["after"] == whole.figures["after"]


@pytest.mark.slow
def test_checkpointing_changes_nothing(sums: Path, tmp_path: Path) -> None:
    """Prompts and prefixes are recomputed in backward as they were in forward."""
    for name in ("prompt", "prefix"):
        settings = (*WITHOUT_RANK, f"method.type={name}", "eval.metrics=[loss]")
        found = [
            tune(sums, model="sprout", out=tmp_path / f"{name}-{recompute}",
                 overrides=(*settings, f"train.gradient_checkpointing={recompute}"))
            for recompute in ("true", "false")
        ]  # fmt: skip
        losses = [result.figures["after"]["held_out_loss"] for result in found]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_base_without_biases_says_so_before_anything_is_written(sums: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no biases"):
        tune(sums, model="sprout", method="biases", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_full_tuning_becomes_a_plain_model(sums: Path, tmp_path: Path) -> None:
    settings = (*WITHOUT_RANK, "method.type=full", "eval.metrics=[loss]")
    run = tune(sums, model="sprout", out=tmp_path / "run", overrides=settings)
    merged = merge(run.run, tmp_path / "merged")
    assert merged.as_dict()["in_memory"]["is_same_model"]
    assert torch.isfinite(torch.tensor(run.figures["after"]["held_out_loss"]))


def test_a_method_in_words() -> None:
    assert Method.parse({"type": "prompt"}).summary == "prompt num_virtual_tokens=20"
