"""The plan's choice of what is recomputed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.core.errors import ConfigError
from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.load import load_model
from graftlm.models.recompute import tiles
from graftlm.models.recompute.kept import counted
from graftlm.models.recompute.policy import Policy, recomputing
from graftlm.objectives.sft import SftObjective
from graftlm.testing.models import tiny
from graftlm.training import recompute
from graftlm.training.recipe import Recipe, make_recipe
from graftlm.verbs.recompute import choose_recompute, policy_of_plan
from graftlm.verbs.tune import tune

ROWS, LENGTH = 4, 64


def recipe(*overrides: str) -> Recipe:
    sizes = (f"train.per_device_train_batch_size={ROWS}", f"data.max_length={LENGTH}")
    return make_recipe({"model": "any", "data": "any"}, [*sizes, *overrides])


def small(kind: str = "llama", **changes: Any) -> Any:
    model = tiny(kind, num_hidden_layers=4, max_position_embeddings=128, **changes)
    attach(model, LoraConfig(r=4), storage=FOLDER)
    return model


def measured(model: Any, policy: Policy, *, rows: int = ROWS, length: int = LENGTH) -> int:
    """Bytes that a whole micro-batch keeps, counted."""
    ids = torch.randint(3, 40, (rows, length)).tolist()
    encoded = [Encoded(tuple(row), (-100, *row[1:]), at, False) for at, row in enumerate(ids)]
    layout: dict[str, Any] = {"rows_per_batch": rows, "packing": True, "seed": 0, "pad_token_id": 0}
    batch = Batches(encoded, max_length=length, **layout).batch(0, 0)
    objective = SftObjective(model)
    model.train()
    with fused(fusable(model)), recomputing(model, policy), counted(model) as found:
        loss = objective(model, batch)
    del loss
    return found.total


@pytest.mark.parametrize("policy", ["nothing", "cheap", "feed_forward", "everything"])
def test_the_prediction_is_what_is_kept(policy: Policy) -> None:
    model = small()
    found = choose_recompute(model, SftObjective(model), fusable(model), recipe(f"train.recompute={policy}"))
    assert found.policy == policy and found.why == "the recipe says so"
    one_layer = measured(model, "nothing") // 4
    assert found.activation_bytes == pytest.approx(measured(model, policy) + one_layer, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["nothing", "cheap", "feed_forward", "everything"])
def test_the_prediction_holds_for_a_larger_model(policy: Policy) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "head_dim": 64}
    model = small(**sizes, vocab_size=32000, num_key_value_heads=8).bfloat16()
    probe_tokens = 1024
    wanted = recipe(f"train.recompute={policy}", "data.max_length=128", "train.per_device_train_batch_size=8")
    found = choose_recompute(model, SftObjective(model), fusable(model), wanted)
    one_layer = measured(model, "nothing", rows=8, length=128) // 4
    kept = measured(model, policy, rows=8, length=probe_tokens // 8)
    assert found.activation_bytes == pytest.approx(kept + one_layer, rel=0.15)


def test_the_prediction_knows_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    objective, found, wanted = SftObjective(model), fusable(model), recipe("train.recompute=everything")
    whole = choose_recompute(model, objective, found, wanted).activation_bytes
    for module in (tiles, recompute):
        monkeypatch.setattr(module, "FROM", ROWS * LENGTH)
    tiled = choose_recompute(model, objective, found, wanted).activation_bytes
    one_layer = measured(model, "feed_forward") // 4
    assert tiled == pytest.approx(measured(model, "everything") + one_layer, rel=0.15)
    assert tiled < whole


def test_the_cheapest_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    objective, found = SftObjective(model), fusable(model)
    states = recompute._state_bytes(model)
    needed = {
        policy: choose_recompute(
            model, objective, found, recipe(f"train.recompute={policy}")
        ).activation_bytes
        for policy in ("nothing", "cheap", "feed_forward", "everything")
    }
    for policy, count in needed.items():
        free = round((count + states) / recompute.SAFETY) + 2
        monkeypatch.setattr(recompute, "free_bytes", lambda _, free=free: free)
        choice = choose_recompute(model, objective, found, recipe())
        assert choice.policy == policy or needed[choice.policy] == count
        assert (choice.activation_bytes, choice.free_bytes) == (count, free)
        assert f"{choice.policy} takes about" in choice.why and "free for it" in choice.why
    monkeypatch.setattr(recompute, "free_bytes", lambda _: 0)
    assert choose_recompute(model, objective, found, recipe()).policy == "everything"


def test_choosing_changes_nothing() -> None:
    """Neither the random state nor the model's modes nor its parameters."""
    model = small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    choose_recompute(model, SftObjective(model), fusable(model), recipe())
    assert torch.equal(torch.rand(3), expected)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_policy_that_is_not_possible_stops_the_run() -> None:
    model = small()
    with pytest.raises(ConfigError, match="offload is not possible"):
        choose_recompute(model, SftObjective(model), fusable(model), recipe("train.recompute=offload"))


def test_a_small_model_keeps_its_activations() -> None:
    model: Any
    model, _ = load_model("sprout", dtype="float32")
    attach(model, LoraConfig(r=2), storage=FOLDER)
    assert choose_recompute(model, SftObjective(model), fusable(model), recipe()).policy == "nothing"


@pytest.mark.parametrize(
    "written, policy",
    [({"recompute": "feed_forward"}, "feed_forward"), ({"recompute": "keep"}, "nothing"),
     ({"recompute": "recompute"}, "everything"), ({}, None)],
)  # fmt: skip
def test_a_plan_remembers_the_policy(written: dict[str, str], policy: str | None, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert policy_of_plan(path) is None
    path.write_text(json.dumps(written))
    assert policy_of_plan(path) == policy


def test_a_run_that_goes_on_keeps_its_policy(sums: Path, tmp_path: Path) -> None:
    """Also where the memory that is free today would allow another one."""
    from interrupting import interrupted
    from runs import SETTINGS

    run = tmp_path / "run"
    interrupted("while training", run, lambda: tune(sums, model="sprout", out=run, overrides=SETTINGS))
    plan = json.loads((run / "plan.json").read_text())
    assert plan["recompute"] == "nothing" and plan["activation_bytes"] > 0 < plan["free_bytes"]
    (run / "plan.json").write_text(json.dumps({**plan, "recompute": "everything"}))
    tune(run, resume=True)
    resumed = json.loads((run / "plan.json").read_text())
    assert (resumed["recompute"], resumed["recompute_why"]) == ("everything", "the run began with it")
