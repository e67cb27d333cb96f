"""LoRA on raw parameters: a model whose expert stacks were changed by s B A, expert by expert, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from graftlm.core.errors import ConfigError, TargetError
from graftlm.methods.experts import ParameterLora
from graftlm.methods.lora import LoraConfig

from .tiny import DECODER, batch, graft, logits, snapshot, stir, tiny

MIXTURES = ("Mixtral", "Qwen3Moe", "GptOss")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def mixture(family: str, *, seed: int = 0) -> Any:
    """A tiny model with four experts of which a token visits two. GptOss stores [expert, in, out]."""
    torch.manual_seed(seed)
    settings = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    settings |= {"num_local_experts": 4, "num_experts": 4, "rope_scaling": None}
    if family == "GptOss":
        settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name or name.endswith("gate.weight"):
                parameter.normal_(std=0.2)
    return model


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": EXPERTS} | fields
    )


def changes(adapters: Any, name: str = "default") -> dict[str, Tensor]:
    """s B_e A_e of every expert, by path of the parameter, written out."""
    found = {}
    for path, part in adapters.parts(name).items():
        if not isinstance(part, ParameterLora):
            continue
        base = adapters.model.get_submodule(path).base_layer
        for key, pair in part.factors.items():
            weight = base.get_parameter(key)
            a, b = pair.lora_A.detach().double(), pair.lora_B.detach().double()
            r, experts = a.shape[0] // weight.shape[0], weight.shape[0]
            each = []
            for e in range(experts):
                a_e = a[e * r : (e + 1) * r]
                b_e = torch.stack([b[:, k * experts + e] for k in range(r)], dim=1)
                each.append(2.0 * b_e @ a_e)
            change = torch.stack(each)
            found[f"{path}.{key}"] = change.mT if base.is_transposed else change
    return found


def changed_model(make: Callable[[], Any], all_changes: list[dict[str, Tensor]]) -> Any:
    model = make()
    with torch.no_grad():
        for one in all_changes:
            for path, change in one.items():
                model.get_parameter(path).add_(change)
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_each_expert_gets_its_own_change(family: str) -> None:
    model, inputs = mixture(family), batch("llama")
    base = logits(model, inputs)
    adapters = graft(model, config())
    assert torch.equal(logits(model, inputs), base)
    stir(adapters, size=1.0)
    expected = logits(changed_model(lambda: mixture(family), [changes(adapters)]), inputs)
    assert not torch.allclose(expected, base, atol=1e-2)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    with adapters.disabled():
        assert torch.equal(logits(model, inputs), base)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    adapters.unmerge()
    adapters.detach()
    assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_gradient_is_that_of_a_changed_stack(family: str) -> None:
    model, inputs = mixture(family), batch("llama")
    adapters = graft(model, config())
    stir(adapters)
    model(**inputs).loss.backward()
    dense = changed_model(lambda: mixture(family), [changes(adapters)])
    dense(**inputs).loss.backward()
    path = "model.layers.1.mlp.experts"
    part, base = adapters.parts("default")[path], model.get_submodule(path).base_layer
    pair = part.get_submodule("factors.down_proj")
    gradient = dense.get_parameter(f"{path}.down_proj").grad
    gradient = gradient.mT if base.is_transposed else gradient
    a = pair.get_parameter("lora_A").detach().unflatten(0, (4, 3))
    b = pair.get_parameter("lora_B").detach().unflatten(1, (3, 4)).permute(2, 0, 1)
    torch.testing.assert_close(pair.get_parameter("lora_A").grad.unflatten(0, (4, 3)), 2 * b.mT @ gradient)
    their_b = pair.get_parameter("lora_B").grad.unflatten(1, (3, 4)).permute(2, 0, 1)
    torch.testing.assert_close(their_b, 2 * gradient @ a.mT)
    assert all(p.grad is None for name, p in model.named_parameters() if "adapters" not in name)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_routed_batch_is_each_row_alone(family: str) -> None:
    model, inputs = mixture(family), batch("llama")
    adapters = graft(model, config(target_modules=["q_proj"]), "a")
    adapters.add("b", config(r=2, lora_alpha=4, target_parameters=["experts.down_proj"]))
    stir(adapters, "a", size=1.0)
    stir(adapters, "b", size=1.0, seed=1)
    with adapters.routed(["a", "b", None]):
        mixed = logits(model, inputs)
    for row, names in enumerate(["a", "b", []]):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        with adapters.activated(names):
            torch.testing.assert_close(mixed[row : row + 1], logits(model, alone), rtol=0, atol=1e-5)


def test_two_adapters_together_add_their_changes_of_the_weights() -> None:
    """Experts are not linear in their weights: outputs must not be summed here."""
    model, inputs = mixture("Mixtral"), batch("llama")
    adapters = graft(model, config(), "a")
    adapters.add("b", config(r=2, lora_alpha=4))
    stir(adapters, "a", size=1.0)
    stir(adapters, "b", size=1.0, seed=1)
    both = [changes(adapters, name) for name in ("a", "b")]
    expected = logits(changed_model(lambda: mixture("Mixtral"), both), inputs)
    adapters.activate(["a", "b"])
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    adapters.unmerge("a")
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)


def test_a_plain_matrix_is_a_parameter_too() -> None:
    model, inputs = mixture("Qwen3Moe"), batch("llama")
    fields = {"target_parameters": ["mlp.gate.weight"], "init_lora_weights": False}
    adapters = graft(model, config(**fields))
    part = adapters.parts("default")["model.layers.0.mlp.gate"]
    a, b = part.get_parameter("factors.weight.lora_A"), part.get_parameter("factors.weight.lora_B")
    assert a.shape == (3, 32) and b.shape == (4, 3)
    expected = logits(model, inputs)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)


def test_ranks_by_pattern_and_shapes() -> None:
    adapters = graft(
        mixture("Mixtral"), config(rank_pattern={"down_proj": 5}, alpha_pattern={"down_proj": 20})
    )
    part = adapters.parts("default")["model.layers.0.mlp.experts"]
    shapes = {name: tuple(p.shape) for name, p in part.named_parameters()}
    assert shapes == {
        "factors.gate_up_proj.lora_A": (4 * 3, 32),
        "factors.gate_up_proj.lora_B": (96, 3 * 4),
        "factors.down_proj.lora_A": (4 * 5, 48),
        "factors.down_proj.lora_B": (32, 5 * 4),
    }
    scalings = [part.get_submodule(f"factors.{name}").scaling for name in ("gate_up_proj", "down_proj")]
    assert scalings == [2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = mixture("Mixtral").to(dtype)
    adapters = graft(model, config(init_lora_weights=False))
    assert logits(model, batch("llama")).dtype == dtype
    assert all(p.dtype == torch.float32 for p in adapters.parameters("default"))


def test_lora_plus_speeds_up_b() -> None:
    part = graft(mixture("Mixtral"), config()).parts("default")["model.layers.0.mlp.experts"]
    assert {name.rpartition(".")[2] for name in part.output_side} == {"lora_B"}
    assert set(part.output_side) <= {name for name, _ in part.named_parameters()}


# Refusals.


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"target_parameters": None},
        {"target_parameters": []},
    ],
)
def test_what_has_no_meaning_here_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"target_parameters cannot be used with|names no module"):
        config(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_parameters": ["experts.up"]}, "'experts.up' matches no parameter"),
        ({"target_parameters": ["norm.weight"]}, "neither a matrix nor a stack"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "by another field"),
        ({"rank_pattern": {"up_proj": 2}}, "matches none"),
    ],
)
def test_targets_that_do_not_resolve_are_refused(fields: dict[str, Any], words: str) -> None:
    model = mixture("Mixtral")
    check = snapshot(model)
    with pytest.raises(TargetError, match=words):
        graft(model, config(**fields))
    check()


def test_a_model_without_stacks_has_none_to_name() -> None:
    with pytest.raises(TargetError, match="matches no parameter"):
        graft(tiny("llama"), config())
