"""Layers of bitsandbytes: recognised without importing it, read without a copy, taken over as they are."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graftlm.core.errors import ModelError
from graftlm.quant.convert import is_quantised, quantised_layers
from graftlm.quant.foreign import adopt, is_foreign, packed_of
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme
from graftlm.quant.storage import from_tensors

modules = pytest.importorskip("bitsandbytes.nn")
library = pytest.importorskip("bitsandbytes.functional")

VARIANTS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nf4, plain scales": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4"},
    "stored as bfloat16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
}


def a_linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 64, bias=bias).to(torch.bfloat16)


def four_bit(name: str = "nf4", *, bias: bool = True) -> Any:
    dense, options = a_linear(bias=bias), VARIANTS[name]
    layer = modules.Linear4bit(128, 64, bias=bias, compute_dtype=torch.bfloat16, **options)
    layer.load_state_dict(dense.state_dict())
    layer.weight = modules.Params4bit(dense.weight.detach().clone(), module=layer, **options)
    layer.bias = dense.bias
    return layer.to("cpu")


def eight_bit() -> Any:
    dense = a_linear()
    layer = modules.Linear8bitLt(128, 64, has_fp16_weights=False)
    layer.weight = modules.Int8Params(dense.weight.detach().clone(), requires_grad=False)
    layer.bias = dense.bias
    return layer.to("cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_4_bit_layer_is_read_where_it_lies(name: str) -> None:
    layer = four_bit(name)
    assert is_foreign(layer)
    packed = packed_of(layer)
    scheme = Scheme(layer.weight.quant_type, double_quant=layer.weight.quant_state.nested)
    assert packed.scheme == scheme and packed.shape == (64, 128)
    assert packed.tensors["codes"].data_ptr() == layer.weight.data_ptr()
    assert packed.tensors["scales"].data_ptr() == layer.weight.quant_state.absmax.data_ptr()
    expected = library.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(packed.decode(torch.bfloat16), expected)
    ours = encode(a_linear().weight.detach(), scheme)
    assert all(torch.equal(ours.tensors[part], packed.tensors[part]) for part in ours.tensors)


def test_an_8_bit_layer_is_read_before_and_after_it_was_used() -> None:
    layer = eight_bit()
    expected = encode(a_linear().weight.detach(), Scheme("int8"))
    for _ in range(2):
        packed = packed_of(layer)
        assert packed.scheme == Scheme("int8")
        assert packed.tensors["codes"].data_ptr() == layer.weight.data_ptr()
        assert all(torch.equal(packed.tensors[part], expected.tensors[part]) for part in expected.tensors)
        layer(torch.randn(2, 128).to(torch.bfloat16))  # moves its scales from the weight to the layer


def test_a_state_that_only_the_layer_still_has_is_found() -> None:
    layer = four_bit()
    expected = packed_of(layer).decode()
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert is_foreign(layer) and torch.equal(packed_of(layer).decode(), expected)


def test_a_layer_that_ran_on_a_cpu_is_read_as_it_computes_from_then_on() -> None:
    """Where the CPU can use that, it rearranges its codes and rounds its scales to bfloat16."""
    layer = four_bit().eval()
    before = packed_of(layer).decode()
    x = torch.randn(3, 128).to(torch.bfloat16)
    with torch.no_grad():
        layer(x)
    after = packed_of(layer).decode()
    torch.testing.assert_close(after, before, rtol=2**-7, atol=0)
    assert torch.equal(after.sign(), before.sign())


def test_other_layers_are_not_foreign() -> None:
    ours = QuantisedLinear(encode(torch.ones(2, 64), Scheme("nf4")), None, torch.float32)
    not_yet = modules.Linear4bit(8, 8)
    with_dense = modules.Linear8bitLt(8, 8, has_fp16_weights=True)
    for module in (nn.Linear(2, 2), nn.ReLU(), ours, not_yet, with_dense, modules.Linear8bitLt(8, 8)):
        assert not is_foreign(module)
        with pytest.raises(ModelError, match="holds no weight that bitsandbytes quantised"):
            packed_of(module, name="fc")


def test_a_map_of_its_own_is_refused_and_one_of_its_scales_is_read() -> None:
    layer = four_bit()
    layer.weight.quant_state.code = layer.weight.quant_state.code.flip(0)
    with pytest.raises(ModelError, match="map of codes that is not that of nf4"):
        packed_of(layer, name="q_proj.weight")
    layer = four_bit()
    state = layer.weight.quant_state
    state.state2.code = torch.linspace(-1, 1, 256)
    packed = packed_of(layer)
    assert packed.scheme == Scheme("nf4", double_quant=False)
    scales = library.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(packed.tensors["scales"], scales)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adopted_model_computes_and_saves_the_same(name: str) -> None:
    theirs = nn.Sequential(four_bit(name), nn.ReLU(), nn.Linear(64, 8).to(torch.bfloat16))
    kept = theirs[0]
    x = torch.randn(5, 128).to(torch.bfloat16).requires_grad_()  # as in training: the codes stay in order
    expected, state = theirs(x), copy.deepcopy(theirs.state_dict())
    assert is_quantised(theirs)
    assert adopt(theirs) == ["0"] and list(quantised_layers(theirs)) == ["0"]
    ours = theirs[0]
    assert isinstance(ours, QuantisedLinear) and ours.bias is kept.bias and ours.dtype == torch.bfloat16
    assert torch.equal(ours(x), F.linear(x, ours.weight, ours.bias))
    torch.testing.assert_close(theirs(x), expected, rtol=0.02, atol=0.02)
    now = theirs.state_dict()
    if name != "stored as bfloat16":
        assert now.keys() == state.keys()
        assert all(torch.equal(now[key], state[key]) for key in now if "quant_state" not in key)
    saved = {key.removeprefix("0."): value for key, value in state.items() if key.startswith("0.weight")}
    assert torch.equal(from_tensors(saved).decode(), ours.packed.decode())


def test_an_adopted_8_bit_layer_is_of_the_dtype_of_its_model() -> None:
    theirs = nn.Sequential(nn.Linear(128, 128).to(torch.bfloat16), eight_bit())
    kept = theirs[1]
    expected = library.int8_vectorwise_dequant(kept.weight.data, kept.weight.SCB)
    assert adopt(theirs) == ["1"]
    ours = theirs[1]
    assert isinstance(ours, QuantisedLinear) and ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.packed.decode(), expected)
    x = torch.randn(5, 128).to(torch.bfloat16)
    torch.testing.assert_close(ours(x), a_linear()(x), rtol=0.05, atol=0.05)


def test_nothing_here_imports_bitsandbytes() -> None:
    code = (
        "import sys, torch\n"
        "from graftlm.quant.convert import quantise\n"
        "from graftlm.quant.foreign import adopt\n"
        "from graftlm.quant.scheme import Scheme\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "quantise(model, Scheme('nf4')), adopt(model), model(torch.randn(2, 64)), model.state_dict()\n"
        "sys.exit('bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
