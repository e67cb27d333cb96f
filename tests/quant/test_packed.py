"""The packed value: what it holds, what it costs, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.errors import ConfigError, ModelError
from graftlm.quant.packed import PackedWeight, encode, layout
from graftlm.quant.scheme import BLOCKS, KINDS, Scheme

SCHEMES = [Scheme("nf4"), Scheme("nf4", double_quant=False), Scheme("fp4"), Scheme("int8"), Scheme("fp8")]
SCHEMES.append(Scheme("fp8_block"))


def hollow(scheme: Scheme, shape: tuple[int, int]) -> PackedWeight:
    """A weight that takes no memory."""
    parts = layout(scheme, shape).items()
    return PackedWeight(scheme, shape, {k: torch.empty(s, dtype=d, device="meta") for k, (s, d) in parts})


schemes = st.builds(Scheme, st.sampled_from(KINDS), st.booleans(), st.sampled_from(BLOCKS))


@given(scheme=schemes, shape=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_the_layout_is_what_encode_makes(scheme: Scheme, shape: tuple[int, int]) -> None:
    packed = encode(torch.randn(shape), scheme)
    expected = layout(scheme, shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == expected
    assert hollow(scheme, shape).bits_per_parameter == packed.bits_per_parameter
    assert packed.decode().shape == shape


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("nf4", 4.127), ("fp4", 4.127), ("int8", 8.031), ("fp8", 8.031), ("fp8_block", 8.002)],
)
def test_bits_per_parameter(scheme: str, bits: float) -> None:
    packed = hollow(Scheme.parse(scheme), (1024, 1024))
    assert packed.bits_per_parameter == pytest.approx(bits, abs=5e-4)
    assert hollow(Scheme("nf4", double_quant=False), (1024, 1024)).bits_per_parameter == 4.5


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_decoded_is_near_what_was_encoded(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 130, generator=torch.Generator().manual_seed(1)).to(dtype)
    error = (encode(weight, scheme).decode(dtype) - weight).double().norm() / weight.double().norm()
    assert error < {"nf4": 0.1, "fp4": 0.13, "int8": 0.01, "fp8": 0.03, "fp8_block": 0.03}[scheme.kind]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_encoding_what_was_decoded_changes_nothing_but_by_rounding(scheme: Scheme) -> None:
    """Codes are fixed points: packing a decoded weight again finds the same values to 1 %."""
    once = encode(torch.randn(64, 128, generator=torch.Generator().manual_seed(2)), scheme).decode()
    twice = encode(once, scheme).decode()
    assert (twice - once).norm() / once.norm() < 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_named(bad: float, scheme: Scheme, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 100).to(dtype)
    weight[5, 17] = weight[7, 99] = bad
    with pytest.raises(ModelError, match=r"layers\.3\.weight holds 2 values that are NaN or infinite"):
        encode(weight, scheme, name="layers.3.weight")


def test_numbers_beyond_any_scale_are_refused() -> None:
    with pytest.raises(ModelError, match="w holds values up to 3e"):
        encode(torch.full((64, 64), 3e38), Scheme("nf4"), name="w")
    with pytest.raises(ModelError, match="w holds values up to 1e"):
        encode(torch.full((64, 64), 1e300, dtype=torch.float64), Scheme("int8"), name="w")


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(0, 4)], ids=str)
def test_what_is_no_matrix_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"w is a \["):
        encode(weight, Scheme("nf4"), name="w")
    with pytest.raises(ModelError, match=r"int32"):
        encode(torch.ones(4, 4, dtype=torch.int32), Scheme("nf4"), name="w")


def test_an_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        Scheme.parse("nf5")
    assert Scheme.parse("fp4", double_quant=False) == Scheme("fp4", double_quant=False)
