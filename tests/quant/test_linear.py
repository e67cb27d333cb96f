"""A linear layer with a packed weight: computing, moving, copying, saving."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme

SCHEMES = [Scheme("nf4"), Scheme("fp4", double_quant=False), Scheme("int8"), Scheme("fp8")]
SCHEMES.append(Scheme("fp8_block"))
ids = [scheme.kind for scheme in SCHEMES]


def layer_of(scheme: Scheme, dtype: torch.dtype = torch.float32) -> QuantisedLinear:
    random = torch.Generator().manual_seed(0)
    packed = encode(torch.randn(24, 80, generator=random).to(dtype), scheme)
    return QuantisedLinear(packed, nn.Parameter(torch.randn(24, generator=random).to(dtype)), dtype)


def stored(layer: QuantisedLinear) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.packed.tensors.items()}


def is_intact(layer: QuantisedLinear, before: dict[str, torch.Tensor]) -> bool:
    after = layer.packed.tensors
    return after.keys() == before.keys() and all(
        after[name].dtype == tensor.dtype and torch.equal(after[name].float(), tensor.float())
        for name, tensor in before.items()
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_with_the_decoded_weight(scheme: Scheme, dtype: torch.dtype) -> None:
    layer = layer_of(scheme, dtype)
    x = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    dense = layer.packed.decode(dtype)
    assert layer.weight.dtype == dtype and torch.equal(layer.weight, dense)
    expected = F.linear(x, dense, layer.bias)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    out = layer(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.05}
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(grad, wanted, **tolerance)


CHANGES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "there and back": (lambda m: m.half().float(), torch.float32),
    "to device": (lambda m: m.to("cpu"), torch.float32),
    "type": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
    "deepcopy": (copy.deepcopy, torch.float32),
    "requires_grad_": (lambda m: m.requires_grad_(True), torch.float32),
    "train": (lambda m: m.train(), torch.float32),
}


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_the_model_touches_what_is_stored(scheme: Scheme, change: str) -> None:
    layer, (apply, dtype) = layer_of(scheme), CHANGES[change]
    before = stored(layer)
    changed = apply(nn.Sequential(layer))[0]
    assert isinstance(changed, QuantisedLinear)
    assert is_intact(changed, before)
    assert changed.dtype == changed.weight.dtype == changed.bias.dtype == dtype
    assert all(not tensor.requires_grad for tensor in changed.packed.tensors.values())


def test_a_deep_copy_shares_nothing() -> None:
    layer = layer_of(Scheme("nf4"))
    twin = copy.deepcopy(layer)
    twin.packed.tensors["codes"].zero_()
    assert layer.packed.tensors["codes"].any()


def test_a_move_that_fails_loses_nothing() -> None:
    layer = layer_of(Scheme("nf4"))
    before = stored(layer)

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        layer._apply(fail)
    assert is_intact(layer, before)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_an_empty_layer_is_filled_by_a_loader(scheme: Scheme) -> None:
    full = layer_of(scheme)
    made = layer_of(scheme).to("meta")
    assert all(tensor.is_meta for tensor in made.packed.tensors.values())
    made.bias = full.bias
    made.load_state_dict(full.state_dict())
    x = torch.randn(4, 80)
    assert torch.equal(made(x), full(x))
    with_memory = layer_of(scheme).to("meta").to_empty(device="cpu")
    assert all(not tensor.is_meta for tensor in with_memory.packed.tensors.values())
    assert with_memory.packed.bits_per_parameter == full.packed.bits_per_parameter


def test_the_meta_device_takes_a_layer_and_its_state_dict() -> None:
    layer = layer_of(Scheme("nf4")).to("meta")
    assert all(tensor.is_meta for tensor in layer.packed.tensors.values())
    shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    full = {name: tensor.shape for name, tensor in layer_of(Scheme("nf4")).state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if "quant_state" not in name} == {
        name: shape for name, shape in full.items() if "quant_state" not in name
    }
    assert layer(torch.randn(2, 80, device="meta")).shape == (2, 24)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_a_state_dict_goes_through_a_layer_of_any_scheme(scheme: Scheme, assign: bool) -> None:
    layer, other = layer_of(scheme), layer_of(Scheme("fp4", block_size=128))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    result = other.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert other.scheme == layer.scheme and is_intact(other, stored(layer))
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)
    assert (other.packed.tensors["codes"].data_ptr() == state["weight"].data_ptr()) is assign


def test_names_that_do_not_belong_or_lack_are_reported() -> None:
    layer = layer_of(Scheme("nf4"))
    state = layer.state_dict()
    result = nn.Sequential(layer).load_state_dict({"0.extra": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["0.weight", "0.bias"] and result.unexpected_keys == ["0.extra"]
    with pytest.raises(RuntimeError, match=r"0\.weight is dense"):
        nn.Sequential(layer).load_state_dict({"0.weight": torch.ones(24, 80), "0.bias": torch.ones(24)})
    del state["weight.absmax"]
    with pytest.raises(RuntimeError, match=r"weight has no tensor 'weight\.absmax'"):
        layer.load_state_dict(state)
    packed = encode(torch.ones(80, 24), Scheme("nf4"))
    wrong = QuantisedLinear(packed, None, torch.float32).state_dict() | {"bias": torch.ones(24)}
    with pytest.raises(RuntimeError, match=r"is a \[80, 24\]; the layer takes \[24, 80\]"):
        layer.load_state_dict(wrong)


def test_a_dense_weight_that_stands_in_is_what_is_saved_and_loaded() -> None:
    layer = layer_of(Scheme("nf4"))
    layer.dense = nn.Parameter(torch.randn(24, 80), requires_grad=False)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert state.keys() == {"weight", "bias"} and torch.equal(state["weight"], layer.dense)
    layer.load_state_dict({**state, "weight": state["weight"] + 1})
    assert torch.equal(layer.weight, state["weight"] + 1)
    layer.load_state_dict(layer_of(Scheme("nf4")).state_dict())
    assert layer.dense is None and torch.equal(layer.weight, layer_of(Scheme("nf4")).weight)


def test_the_layer_says_what_it_is() -> None:
    assert repr(layer_of(Scheme("nf4"))) == "QuantisedLinear(80, 24, bias=True, nf4)"
