"""Reading, replacing and restoring the weights of a layer, to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import MergeError
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
