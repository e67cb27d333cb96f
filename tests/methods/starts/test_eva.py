"""EVA: its analysis against a float64 definition, its directions and ranks against PEFT's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError, DataError
from graftlm.core.notices import forget_notices, notices_to
from graftlm.methods.lora import LoraConfig
from graftlm.methods.starts import eva
from graftlm.methods.starts.eva import eva_start, initialise_from_data
from graftlm.methods.starts.initialise import EvaConfig
from graftlm.methods.starts.input_space import InputSpace
from graftlm.methods.starts.layer_inputs import base_alone, observe, shared_inputs

from ..test_experts import mixture
from ..tiny import batch, graft, logits, snapshot, stir, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


def steep(kind: str) -> Any:
    """A tiny model whose hidden states vary far more in some directions than in others."""
    model = tiny(kind)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.mul_(0.8 ** torch.arange(table.shape[1]))
    return model


def batches(kind: str, count: int = 6) -> list[dict[str, Tensor]]:
    """Batches with padding, and with prompts that are not learned."""
    found = []
    for seed in range(count):
        one = batch(kind, rows=8, length=32, seed=seed)
        one["attention_mask"][:3, -5:] = 0
        if one["labels"].dim() == 2 and kind != "t5":
            one["labels"][:, :6] = -100
        found.append(one)
    return found


# The analysis.


def rows(count: int, features: int = 10, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 0.7 ** torch.arange(features)
    return torch.randn(count, features, generator=generator) * spread + torch.linspace(-2, 2, features)


def test_batches_give_the_principal_components_of_all_rows() -> None:
    data = rows(200).double()
    centred = data - data.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    space = InputSpace(10)
    for part in data.float().split([50, 3, 70, 77]):
        space.add(part)
    found = space.directions(10).double()
    torch.testing.assert_close((found * vectors).sum(1).abs(), torch.ones(10).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        space.shares, (values.square() / centred.square().sum()).float(), rtol=1e-4, atol=1e-6
    )


def test_few_directions_of_many_are_close_to_the_exact_ones() -> None:
    data = rows(4000, 40)
    exact = torch.linalg.svd(data.double() - data.double().mean(0), full_matrices=False)[2][:3]
    space = InputSpace(6)
    for part in data.split(500):
        space.add(part)
    assert torch.linalg.svdvals(space.directions(3).double() @ exact.t()).min() > 0.999


def test_the_randomised_analysis_finds_the_same_and_leaves_the_random_state() -> None:
    data = rows(900, 700)
    state = torch.get_rng_state()
    space = InputSpace(4)
    space.add(data)
    assert torch.equal(torch.get_rng_state(), state)
    exact = torch.linalg.svd(data - data.mean(0), full_matrices=False)[2][:4]
    assert torch.linalg.svdvals(space.directions(4) @ exact.t()).min() > 0.999


def test_rows_wait_until_there_are_enough() -> None:
    space = InputSpace(4)
    space.add(rows(3))
    assert space.is_empty and space.waiting == 3 and not space.is_still(1, 0.5)
    space.add(rows(3, seed=1))
    assert not space.is_empty and space.waiting == 0
    assert space.is_still(0, 1.0) and not space.is_still(1, 0.0)


# What layers read.


def test_layers_that_read_one_tensor_share_it() -> None:
    model = tiny("llama")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    leader = shared_inputs(model, modules, batch("llama"))
    assert leader["model.layers.1.self_attn.v_proj"] == "model.layers.1.self_attn.q_proj"
    assert leader["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.gate_proj"
    assert leader["model.layers.1.mlp.down_proj"] == "model.layers.1.mlp.down_proj"
    assert len(set(leader.values())) == 4 * 2 + 1


@pytest.mark.parametrize(("ignored", "expected"), [(-100, 3), (None, 6)])
def test_padding_and_tokens_that_are_not_learned_do_not_count(ignored: int | None, expected: int) -> None:
    model = tiny("llama")
    one = batch("llama", rows=2, length=4)
    one["attention_mask"][0, 2:] = 0
    one["labels"][1, :1] = -100
    one["labels"][0, :2] = -100
    seen: list[Tensor] = []
    module = model.model.layers[0].mlp.down_proj
    observe(model, {"x": (module, seen.append)}, one, ignored_label=ignored)
    assert [len(x) for x in seen] == [expected]


def test_watching_changes_nothing() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    adapters = graft(model)
    stir(adapters)
    with adapters.disabled():
        expected = logits(model, batch("llama"))
    check = snapshot(model)
    with base_alone(model):
        assert not model.training
        assert torch.equal(logits(model, batch("llama")), expected)
    check()
    assert adapters.active == ("default",)


# The start.

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one rank": ("llama", {"r": 4, "target_modules": list(ATTENTION)}, {"rho": 1.0}),
    "dealt out": ("llama", {"r": 4, "target_modules": list(ATTENTION)}, {"rho": 2.0}),
    "all tokens": ("llama", {"r": 2, "target_modules": ["q_proj", "up_proj"]}, {"use_label_mask": False}),
    "scaling left": ("llama", {"r": 3, "target_modules": list(ATTENTION)}, {"adjust_scaling_factors": False}),
    "whitened": ("llama", {"r": 3, "target_modules": ["o_proj", "down_proj"]}, {"whiten": True}),
    "pattern": (
        "llama",
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
        {"rho": 1.5},
    ),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"]}, {"rho": 2.0}),
    "encoder": ("bert", {"r": 4, "target_modules": ["query", "value"]}, {"use_label_mask": False}),
}


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning", "ignore:lora with eva initialization:UserWarning"
)
@pytest.mark.parametrize("case", CASES)
def test_directions_and_ranks_are_pefts(case: str) -> None:
    kind, fields, settings = CASES[case]
    fields = {**fields, "lora_alpha": 12, "init_lora_weights": "eva"}
    theirs: Any = peft.get_peft_model(
        steep(kind), peft.LoraConfig(**fields, eva_config=peft.EvaConfig(**settings))
    )
    data = batches(kind)
    peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    ours = eva_start(steep(kind), LoraConfig(**fields, eva_config=settings), data)

    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {path: len(a) for path, a in ours.directions.items()} == {
        path: layer.r["default"] for path, layer in layers.items()
    }
    for path, a in ours.directions.items():
        expected = layers[path].lora_A["default"].weight.detach()
        torch.testing.assert_close(a.norm(dim=1), expected.norm(dim=1), rtol=1e-2, atol=0)
        angles = torch.linalg.svdvals(torch.linalg.qr(a.t())[0].t() @ torch.linalg.qr(expected.t())[0])
        assert angles.min() > 0.995, path
        assert ours.config.scaling_at(path) == pytest.approx(layers[path].scaling["default"])


def test_a_layer_without_directions_is_no_target_any_more() -> None:
    model = steep("llama")
    config = LoraConfig(
        r=1, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=8)
    )
    begin = eva_start(model, config, batches("llama"))
    assert sum(len(a) for a in begin.directions.values()) == 14
    assert 0 < len(begin.directions) < 14
    adapters = graft(model, begin.config)
    assert set(adapters.parts("default")) == set(begin.directions)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_rank_that_changes_keeps_the_scaling(use_rslora: bool) -> None:
    config = LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="eva", use_rslora=use_rslora)
    begin = eva_start(steep("llama"), config, batches("llama"))
    assert len({len(a) for a in begin.directions.values()}) > 1
    for path in begin.directions:
        assert begin.config.scaling_at(path) == pytest.approx(config.scaling)


def test_one_call_starts_an_attached_adapter() -> None:
    forget_notices()
    model, inputs = steep("llama"), batch("llama")
    base = logits(model, inputs)
    with notices_to(lambda text: None):
        adapters = graft(model, LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="eva"))
    adapters.add("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    initialise_from_data(adapters, "default", batches("llama"))
    assert adapters.active == ("default",) == adapters.trainable
    assert torch.equal(logits(model, inputs), base)
    begun = {
        path: part.get_parameter("lora_A").detach().clone()
        for path, part in adapters.parts("default").items()
    }
    for a in begun.values():
        torch.testing.assert_close(a @ a.t(), torch.eye(len(a)), rtol=0, atol=1e-4)
    assert len(adapters.config("default").rank_pattern) > 0  # type: ignore[attr-defined]
    stir(adapters)
    assert not torch.allclose(logits(model, inputs), base, atol=1e-3)

    again = graft(steep("llama"), LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="eva"))
    initialise_from_data(again, "default", batches("llama"))
    assert all(
        torch.equal(part.get_parameter("lora_A"), begun[p]) for p, part in again.parts("default").items()
    )


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama-tied"])
def test_other_architectures_and_embeddings(kind: str) -> None:
    tables = ["wte"] if kind == "gpt2" else ["embed_tokens"] if kind == "llama-tied" else []
    model = steep(kind)
    config = LoraConfig(r=2, target_modules=["all-linear", *tables], init_lora_weights="eva")
    adapters = graft(model, config)
    base = logits(model, batch(kind))
    initialise_from_data(adapters, "default", batches(kind))
    assert torch.equal(logits(model, batch(kind)), base)


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"modules_to_save": ["mlp"]}, {"trainable_token_indices": [3, 4]}]
)
def test_it_goes_with_what_lora_goes_with(fields: dict[str, Any]) -> None:
    model = steep("llama")
    base = logits(model, batch("llama"))
    adapters = graft(model, LoraConfig(r=4, init_lora_weights="eva", **fields))
    initialise_from_data(adapters, "default", batches("llama"))
    torch.testing.assert_close(logits(model, batch("llama")), base, rtol=0, atol=1e-5)
    own = {name: p for name, p in adapters.named_parameters("default").items() if name.endswith("lora_A")}
    assert len({a.shape[0] for a in own.values()}) > 1
    for a in own.values():
        torch.testing.assert_close(a @ a.t(), torch.eye(len(a)), rtol=0, atol=1e-4)


def test_experts_beside_it_keep_their_ranks() -> None:
    config = LoraConfig(
        r=4,
        target_modules="attention",
        target_parameters=["experts.down_proj"],
        rank_pattern={"down_proj": 2},
        init_lora_weights="eva",
    )
    model = mixture("Mixtral")
    adapters = graft(model, config)
    initialise_from_data(adapters, "default", batches("llama"))
    part = adapters.parts("default")["model.layers.0.mlp.experts"]
    assert part.get_parameter("factors.down_proj.lora_A").shape[0] == 4 * 2
    with pytest.raises(ConfigError, match="none is a target"):
        eva_start(model, config.replace(target_modules=[]), batches("llama"))


def test_too_few_tokens_are_an_error_and_change_nothing() -> None:
    model = tiny("llama")
    adapters = graft(model, LoraConfig(r=8, init_lora_weights="eva"))
    check = snapshot(model)
    with pytest.raises(DataError, match="too few tokens"):
        initialise_from_data(adapters, "default", [batch("llama", rows=1, length=5)])
    with pytest.raises(DataError, match="no batches"):
        initialise_from_data(adapters, "default", [])
    check()


def test_only_an_eva_adapter_starts_from_data() -> None:
    adapters = graft(tiny("llama"))
    with pytest.raises(ConfigError, match="does not start from data"):
        initialise_from_data(adapters, "default", batches("llama"))


def test_directions_that_never_settle_are_taken_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva, "LIMIT", 3)
    forget_notices()
    heard: list[str] = []
    config = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig(tau=1.0)
    )
    with notices_to(heard.append):
        eva_start(tiny("llama"), config, batches("llama", 2))
    assert len(heard) == 1 and "after 3 batches" in heard[0]


@pytest.mark.parametrize("fields", [{"rho": 0.5}, {"tau": 2.0}, {"rhoo": 2.0}])
def test_wrong_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoraConfig(init_lora_weights="eva", eva_config=fields)
