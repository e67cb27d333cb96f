"""Reading, replacing and restoring the weights of a layer, to the byte."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import MergeError
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme
from graftlm.quant.weights import WeightHandle, widened

LAYERS = [nn.Linear(3, 5), nn.Linear(3, 5, bias=False), Conv1D(5, 3), nn.Embedding(5, 3), nn.LayerNorm(3)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_read_is_wide_and_what_is_replaced_comes_back(layer: nn.Module, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    handle = WeightHandle(layer)
    parameters = dict(layer.named_parameters())
    read = handle.read()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert read.keys() == parameters.keys()
    assert all(tensor.dtype == wide and not tensor.requires_grad for tensor in read.values())
    if not isinstance(layer, nn.LayerNorm):
        assert handle.shape == (5, 3) == tuple(read["weight"].shape)

    changed = {name: tensor + 1 for name, tensor in read.items()}
    originals = handle.replace(changed)
    assert all(originals[name] is parameters[name] for name in parameters)
    again = handle.read()
    for name in parameters:
        assert torch.equal(again[name], changed[name].to(dtype).to(wide))
        assert layer.get_parameter(name).is_contiguous() and layer.get_parameter(name).dtype == dtype
    handle.restore(originals)
    assert all(layer.get_parameter(name) is parameters[name] for name in parameters)


def test_the_orientation_is_that_of_nn_linear_and_survives_a_round_trip() -> None:
    layer = Conv1D(5, 3)
    stored = layer.weight.detach().clone()
    handle = WeightHandle(layer)
    assert torch.equal(handle.read()["weight"], stored.T)
    handle.replace({"weight": handle.read()["weight"]})
    assert torch.equal(layer.weight, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replacement_shares_no_memory_with_what_was_given(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 3).to(dtype)
    given = torch.ones(3, 3, dtype=dtype)
    WeightHandle(layer).replace({"weight": given})
    given.zero_()
    assert torch.equal(layer.weight, torch.ones(3, 3, dtype=dtype))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_replacement_keeps_the_flag(requires_grad: bool) -> None:
    layer = nn.Linear(3, 3).requires_grad_(requires_grad)
    handle = WeightHandle(layer)
    handle.replace({"bias": torch.ones(3)})
    assert layer.bias.requires_grad is requires_grad and layer.bias.grad_fn is None


def test_containers_are_read_by_path() -> None:
    last = nn.Linear(5, 2)
    head = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), last)
    handle = WeightHandle(head)
    assert set(handle.read()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    originals = handle.replace({"2.bias": torch.ones(2)})
    assert torch.equal(last.bias, torch.ones(2))
    handle.restore(originals)
    assert last.bias is originals["2.bias"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_packed_weights_are_not_dense(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 5)
    WeightHandle(layer).require_dense()
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(MergeError, match=r"(?s)weight.*bfloat16"):
        WeightHandle(layer).require_dense()


def test_widened_never_narrows() -> None:
    for dtype, wide in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        assert widened(torch.ones(2, dtype=dtype)).dtype == wide


# Quantised layers: ours and those of bitsandbytes.

KINDS = ("nf4", "fp4", "int8", "fp8")


def packed_layer(
    kind: str = "nf4", *, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> QuantisedLinear:
    torch.manual_seed(0)
    packed = encode(torch.randn(6, 64), Scheme(kind))
    return QuantisedLinear(packed, nn.Parameter(torch.randn(6, dtype=dtype)) if bias else None, dtype)


def foreign_layer(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A layer of bitsandbytes with random weights, quantised."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(64, 128, dtype=dtype)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(128, 64, quant_type=kind, compute_dtype=dtype)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, module=layer)
    layer.bias = nn.Parameter(torch.randn(64, dtype=dtype), requires_grad=False)
    return layer.to("cpu")


def theirs(layer: Any) -> Tensor:
    """What bitsandbytes itself decodes, in float32."""
    bnb = pytest.importorskip("bitsandbytes")
    if hasattr(layer, "state"):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * (scales / 127).unsqueeze(1)
    state = copy.deepcopy(layer.weight.quant_state)
    state.dtype = torch.float32
    found: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, state)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_layer_reads_like_the_dense_one_that_it_stands_for(kind: str) -> None:
    layer = packed_layer(kind)
    handle = WeightHandle(layer)
    dense = layer.packed.decode()
    assert handle.is_packed and not handle.is_transposed
    assert handle.shape == (6, 64) and handle.dtype == torch.bfloat16 and handle.device.type == "cpu"
    assert torch.equal(handle.weight(), dense.to(torch.bfloat16))
    assert handle.read().keys() == {"weight", "bias"}
    assert torch.equal(handle.read()["weight"], dense), "in float32, not rounded on the way"
    assert handle.held()["weight"] is None and handle.held()["bias"] is layer.bias
    assert WeightHandle(packed_layer(kind, bias=False)).held() == {"weight": None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_weight_stands_in_for_a_packed_one_and_its_bytes_stay(kind: str) -> None:
    layer = packed_layer(kind)
    handle, x = WeightHandle(layer), torch.randn(3, 64, dtype=torch.bfloat16)
    stored = [tensor.clone() for tensor in layer.packed.stored]
    before, bias = layer(x), layer.bias
    changed = handle.read()["weight"] + 1
    originals = handle.replace({"weight": changed, "bias": torch.ones(6)})
    assert originals == {"weight": None, "bias": bias}
    assert handle.dtype == torch.bfloat16 and torch.equal(handle.weight(), changed.to(torch.bfloat16))
    expected = nn.functional.linear(x, changed.to(torch.bfloat16), torch.ones(6, dtype=torch.bfloat16))
    assert torch.equal(layer(x), expected) and torch.equal(handle.call({}, x), expected)
    assert torch.equal(handle.call(originals, x), before), "as it came, while others stand in"
    handle.restore(originals)
    assert torch.equal(layer(x), before) and layer.bias is bias and layer.dense is None
    assert all(map(torch.equal, layer.packed.stored, stored))


def test_what_replaces_a_packed_weight_is_frozen_and_rounded_once() -> None:
    layer = packed_layer(dtype=torch.float16)
    handle = WeightHandle(layer)
    exact = handle.read()["weight"] + torch.randn(6, 64) * 1e-3
    handle.replace({"weight": exact})
    assert layer.dense is not None and not layer.dense.requires_grad
    assert torch.equal(layer.dense, exact.to(torch.float16))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_of_bitsandbytes_reads_as_it_decodes_itself(kind: str, dtype: torch.dtype) -> None:
    layer = foreign_layer(kind, dtype)
    handle = WeightHandle(layer)
    assert handle.is_packed and handle.shape == (64, 128)
    assert handle.dtype == (torch.float16 if kind == "int8" else dtype)
    torch.testing.assert_close(handle.read()["weight"], theirs(layer), rtol=1e-6, atol=1e-6)
    assert torch.equal(handle.weight(), handle.packed.decode(handle.dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_that_bitsandbytes_rearranged_for_its_kernel_is_still_read_right(kind: str) -> None:
    """After a forward pass in eval mode on a CPU with AVX-512 the bytes lie in another order, and scales are
    rounded to bfloat16: what the layer computes with is what a merge must start from."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = foreign_layer(kind, torch.float32).eval()
    exact = theirs(layer)
    rearrange = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = rearrange(layer.weight.data, layer.weight.quant_state)
    found = WeightHandle(layer)
    assert found.dtype == torch.float32 and found.shape == (64, 128)
    error = (found.read()["weight"] - exact).abs() / exact.abs().clamp(min=1e-6)
    assert error.max() < 2**-8, "the rounding of a scale; a wrong order would be off by 100 % and more"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_dense_weight_stands_in_for_one_of_bitsandbytes(kind: str) -> None:
    layer = foreign_layer(kind).train()
    handle, x = WeightHandle(layer), torch.randn(3, 128, dtype=torch.bfloat16)
    stored, before = layer.weight.data.clone(), layer(x)
    merged = handle.read()["weight"] * 2
    originals = handle.replace({"weight": merged})
    dense = nn.functional.linear(x, merged.to(handle.dtype).to(x.dtype), layer.bias)
    torch.testing.assert_close(handle.call({}, x), dense)
    assert torch.equal(handle.call(originals, x), before)
    handle.restore(originals)
    assert torch.equal(layer(x), before) and torch.equal(layer.weight.data, stored)
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}


def test_a_layer_that_moved_takes_its_packed_weight_back() -> None:
    layer = packed_layer(dtype=torch.float32)
    handle = WeightHandle(layer)
    originals = handle.replace({"weight": torch.ones(6, 64)})
    stored = [tensor.clone() for tensor in layer.packed.stored]
    layer.to(torch.bfloat16)
    assert layer.dense is not None and layer.dense.dtype == torch.bfloat16
    handle.restore(originals)
    assert all(map(torch.equal, layer.packed.stored, stored)) and handle.dtype == torch.bfloat16


def test_a_packed_layer_needs_no_dense_storage_and_other_8_bit_weights_do() -> None:
    for kind in KINDS:
        WeightHandle(packed_layer(kind)).require_dense()
    WeightHandle(foreign_layer("int8")).require_dense()
