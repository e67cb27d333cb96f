"""Whether the micro-batches of a run are recorded and played again (`objectives.recorded`)."""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.core.errors import ConfigError
from graftlm.models.fusing.attention import AttentionLayers
from graftlm.objectives.sft import SftObjective
from graftlm.quant.facts import device_of
from graftlm.training.recipe import Recipe
from graftlm.verbs.step_setup import StepSetup


@dataclass(frozen=True)
class RecordChoice:
    """The decision and its reason; in `plan.json`."""

    records: bool
    why: str


def record_choice(setup: StepSetup, recipe: Recipe, *, compiles: bool) -> RecordChoice:
    """Only where the recipe says so: nobody has measured yet what it gains.

    Raises:
        ConfigError: the recipe says so, and it is not possible; all reasons are listed.
    """
    asked, obstacles = recipe.train.recorded_steps, obstacles_of(setup, recipe, compiles=compiles)
    if asked == "on" and obstacles:
        raise ConfigError(
            "train.recorded_steps: on is not possible here.", problems=obstacles, fix="Leave it at auto."
        )
    if asked != "auto":
        return RecordChoice(asked == "on", "the recipe says so")
    return RecordChoice(False, obstacles[0] if obstacles else "its gain was not measured on this device")


def obstacles_of(setup: StepSetup, recipe: Recipe, *, compiles: bool) -> list[str]:
    """Everything that stands against it: what is recorded has one shape and place, and asks for no number."""
    objective, method, policy = setup.objective, recipe.method.config, setup.recompute.policy
    dropout = getattr(method, "lora_dropout", 0.0) or getattr(method, "dropout", 0.0)
    found = {
        f"steps are recorded on CUDA, and the device is {device_of(setup.model).type}": (
            device_of(setup.model).type != "cuda"
        ),
        "only supervised fine-tuning is recorded": type(objective) is not SftObjective,
        f"logits are formed by the {objective.path}, not by a frozen head": objective.path != "frozen head",
        "its attention does not take documents in one row together": not takes_documents_together(setup),
        f"backward recomputes {policy}": policy != "nothing",
        "dropout of the adapter draws its seed on the host": bool(dropout),
        "virtual tokens are put in front of every document": bool(method.positions_taken),
        f"the layers come from {recipe.model.placement} one by one": recipe.model.placement != "resident",
        "the input embeddings lie in the machine's memory": recipe.model.embeddings != "resident",
        "layers are compiled": compiles,
    }
    return [why for why, applies in found.items() if applies]


def takes_documents_together(setup: StepSetup) -> bool:
    """Whether attention is one computation, however many documents there are."""
    parts = [part for part in setup.fusable.parts if isinstance(part, AttentionLayers)]
    return bool(parts) and not parts[0].why and "document by document" not in parts[0].way
