"""Adapted layers with one input, computed together: the same values, nothing left behind, less kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftlm.formats.layout import FOLDER
from graftlm.kernels.sources import recomputing_cheap_parts
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.methods.site import Site
from graftlm.models.fusing.feed_forward import feed_forward_parts
from graftlm.models.fusing.norms import norms
from graftlm.models.fusing.projections import Projections, projections
from graftlm.quant.convert import quantise
from graftlm.quant.scheme import Scheme
from graftlm.testing.models import batch, tiny

CONFIGS = {
    "lora": LoraConfig(r=4, init_lora_weights=False),
    "dora": LoraConfig(r=4, init_lora_weights=False, use_dora=True),
    "lora_bias": LoraConfig(r=4, init_lora_weights=False, lora_bias=True),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
}


def step(model: Any) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    output = model(**batch("llama"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return output.logits, list(torch.autograd.grad(output.loss, trained))


def assert_alike(first: tuple[Tensor, list[Tensor]], second: tuple[Tensor, list[Tensor]]) -> None:
    for one, other in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm() + 1e-7


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_outputs_and_gradients(name: str) -> None:
    model = tiny("llama")
    attach(model, CONFIGS[name], storage=FOLDER)
    expected = step(model)
    found, layers = projections(model), len(model.model.layers)
    assert found.summary == (
        f"{7 * layers} of {7 * layers} adapted linear layers "
        f"({5 * layers} of them in {2 * layers} groups with one input)"
    )
    with found.in_use():
        assert_alike(step(model), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_same_on_a_packed_base() -> None:
    model = tiny("llama")
    quantise(model, Scheme.parse("nf4"))
    attach(model, CONFIGS["lora"], storage=FOLDER)
    expected = step(model)
    with projections(model).in_use():
        assert_alike(step(model), expected)


def test_dropout_draws_a_mask_for_each_layer() -> None:
    model = tiny("llama")
    attach(model, LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.3), storage=FOLDER)
    model.train()
    expected = step(model)
    with projections(model).in_use():
        first = step(model)
        assert_alike(first, step(model))
    assert (first[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()  # seeds in the order of the layers


def test_the_observing_pass_leaves_everything_as_it_was() -> None:
    model = tiny("llama")
    attach(model, CONFIGS["lora"], storage=FOLDER)
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    projections(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_with_hooks_or_trained_weights_or_several_adapters_are_left_alone() -> None:
    model = tiny("llama")
    adapters = attach(model, CONFIGS["lora"], storage=FOLDER)
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    calls = []
    first.q_proj.base_layer.register_forward_hook(lambda *_: calls.append(1))
    second.q_proj.base_layer.weight.requires_grad_()
    found = projections(model)
    whole, layers = found.whole, len(model.model.layers)
    assert whole == 7 * layers - 2 and calls
    assert [len(sites) for around, sites in found.groups if around in (first, second)] == [2, 2]
    adapters.add("other", CONFIGS["lora"])
    adapters.activate(["default", "other"])
    assert projections(model).whole == 0


class Pair(nn.Module):
    """Two layers; `use` says how they are called."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def both(pair: Any, x: Tensor) -> Tensor:
    return pair.left(x) * pair.right(x)


def grouped(use: Callable[[Any, Tensor], Tensor] = both) -> tuple[Pair, Projections]:
    torch.manual_seed(0)
    model = Pair(use)
    attach(model, LoraConfig(r=2, init_lora_weights=False, target_modules=("left", "right")), storage=FOLDER)
    sites = tuple(module for module in model.modules() if isinstance(module, Site))
    return model, Projections(2, 2, [(model, sites)])


def group_of(site: Site) -> Any:
    forward: Any = site.forward
    return next(cell.cell_contents for cell in forward.__closure__ if hasattr(cell.cell_contents, "waiting"))


@pytest.mark.parametrize(
    "use",
    [
        both,
        lambda pair, x: pair.left(x) * pair.left(x) + pair.right(x),
        lambda pair, x: pair.right(x) + pair.left(x + 1),
        lambda pair, x: pair.left(x),
        lambda pair, x: checkpoint(both, pair, x, use_reentrant=False),
        lambda pair, x: checkpoint(pair.left, x, use_reentrant=False) * pair.right(x),
    ],
)
def test_however_they_are_called_the_values_are_right_and_nothing_waits(
    use: Callable[[Any, Tensor], Tensor],
) -> None:
    model, found = grouped(use)
    results = []
    for together in (False, True):
        x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        with found.in_use() if together else torch.enable_grad():
            out = model(x * 1)
            if together:
                assert not group_of(model.left).waiting
            trained = [p for p in model.parameters() if p.requires_grad]
            results.append((out, list(torch.autograd.grad(out.sum(), [x, *trained], allow_unused=True))))
            if together:
                assert not group_of(model.left).waiting
    for one, other in zip(results[1][1], results[0][1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(results[1][0], results[0][0])


def test_an_input_that_was_changed_in_place_is_another_input() -> None:
    model, found = grouped(lambda pair, x: pair.left(x) * pair.right(x.mul_(2)))
    with torch.no_grad():
        expected = model(torch.ones(2, 4))
        with found.in_use():
            assert torch.equal(model(torch.ones(2, 4)), expected)


def test_an_error_leaves_nothing_behind() -> None:
    def failing(pair: Any, x: Tensor) -> Tensor:
        pair.left(x)
        raise KeyError

    model, found = grouped(failing)
    with pytest.raises(KeyError), found.in_use():
        group = group_of(model.left)
        model(torch.ones(2, 4))
    assert not group.waiting
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    model, found = grouped()
    expected = model(torch.ones(2, 4))
    with found.in_use(), mode():
        torch.testing.assert_close(model(torch.ones(2, 4)), expected.detach())


def kept_bytes(model: Any) -> int:
    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1],
        lambda t: t,
    ):
        output = model(**batch("llama")).logits
    del output
    return sum(sizes.values())


def test_cheap_parts_are_made_again_to_the_bit() -> None:
    model = tiny("llama")
    attach(model, CONFIGS["lora"], storage=FOLDER)
    with norms(model).in_use(), feed_forward_parts(model).in_use(), projections(model).in_use():
        expected, before = step(model), kept_bytes(model)
        with recomputing_cheap_parts():
            found, after = step(model), kept_bytes(model)
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, other)
    rows = batch("llama")["input_ids"].numel()
    config = model.config
    layers = config.num_hidden_layers  # the first norm's input, the embedding's output, needs no gradient
    values = (2 * layers - 1) * config.hidden_size + layers * config.intermediate_size
    assert before - after == 4 * rows * values
