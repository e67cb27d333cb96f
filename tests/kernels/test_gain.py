"""A gain on columns against its definition in float64; the compiled code against the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core import compiling
from graftlm.kernels import gain as module
from graftlm.kernels import gain_cpu
from graftlm.kernels.gain import apply_gain, gain_backward, with_gain, with_gain_on_rows

from .drawn import DTYPES, TOLERANCE, draw, relative


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 200),
    st.sampled_from([1, 3, 16, 33, 130]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
)
def test_values_and_gradients_are_those_of_the_definition(
    rows: int, columns: int, dtype: torch.dtype, has_bias: bool, has_zero: bool
) -> None:
    precise = torch.promote_types(dtype, torch.float32)
    x, grad = draw(rows, columns, dtype=dtype), draw(rows, columns, dtype=dtype, seed=1)
    gain = draw(columns, dtype=precise, seed=2).abs() + 0.5
    gain[0] = 0.0 if has_zero else gain[0]
    bias = draw(columns, dtype=dtype, seed=3) if has_bias else None
    wide = torch.zeros(columns, dtype=torch.float64) if bias is None else bias.double()
    exact = gain.double() * (x.double() - wide) + wide
    size = gain.abs().double() * (x.double().abs() + wide.abs()) + wide.abs()
    out = x.clone()
    apply_gain(out, gain, bias)
    assert relative(out, exact, size) < TOLERANCE[dtype]
    of_y, of_gain = gain_backward(grad, out, gain, bias)
    assert of_gain is not None
    assert (
        relative(of_y, grad.double() * gain.double(), grad.double().abs() * gain.abs().double())
        < TOLERANCE[dtype]
    )
    kept = (out.double() - wide) / gain.double().masked_fill(gain == 0, 1.0) * (gain != 0)
    terms = (out.double().abs() + wide.abs()) / gain.double().masked_fill(gain == 0, 1.0)
    assert relative(of_gain, (grad.double() * kept).sum(0), (grad.double().abs() * terms).sum(0)) < 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 200), st.sampled_from([1, 3, 16, 33, 130]), st.sampled_from(DTYPES[:2]), st.booleans())
def test_the_compiled_code_gives_the_values_of_the_plain_one(
    rows: int, columns: int, dtype: torch.dtype, has_bias: bool
) -> None:
    x, grad, gain = (
        draw(rows, columns, dtype=dtype),
        draw(rows, columns, dtype=dtype, seed=1),
        draw(columns, seed=2),
    )
    bias = draw(columns, dtype=dtype, seed=3) if has_bias else None
    if compiling.find_compiler() is None or compiling.is_switched_off():
        pytest.skip("no C compiler")
    compiled, plain = x.clone(), x.clone()
    assert gain_cpu.apply(compiled, x, gain, bias)
    module._apply_gain(plain, gain, bias)
    assert torch.equal(compiled, plain)
    found = gain_cpu.backward(grad, x, gain, True, True)
    expected = module._gain_backward(grad, x, gain, True, True)
    assert found is not None and torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)
    alone = gain_cpu.backward(grad, x, gain, False, True), gain_cpu.backward(grad, x, gain, True, False)
    assert alone[0] is not None and alone[1] is not None
    assert torch.equal(alone[0][1], found[1]) and torch.equal(alone[1][0], found[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.sampled_from([1, 3, 16, 33, 130]), st.sampled_from(DTYPES), st.booleans())
def test_a_gain_on_rows_keeps_their_layout(
    rows: int, columns: int, dtype: torch.dtype, is_transposed: bool
) -> None:
    precise = torch.promote_types(dtype, torch.float32)
    x, gain = draw(rows, columns, dtype=dtype), draw(rows, dtype=precise, seed=2)
    x = x.t().contiguous().t() if is_transposed else x
    found = with_gain_on_rows(x, gain)
    assert found.dtype == dtype and found.stride() == x.stride()
    exact = gain.double().unsqueeze(1) * x.double()
    near = torch.finfo(dtype).eps * exact.abs() + 2 * torch.finfo(precise).eps * x.double().abs() + 1e-7
    for values in (found, module._with_gain_on_rows(x, gain)):
        assert ((values.double() - exact).abs() <= near).all()


def test_special_values() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -0.0, 3e38]])
    for dtype in (torch.float32, torch.bfloat16):
        out = with_gain(x.to(dtype), torch.tensor([2.0, 2.0, 2.0, 2.0]))
        assert out[0, 0].isnan() and out[0, 1:].tolist()[::2] == [float("inf"), float("inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_opcheck(dtype: torch.dtype) -> None:
    x, gain, bias = draw(6, 5, dtype=dtype), draw(5), draw(5, dtype=dtype)
    for given_ in (x, draw(5, 6, dtype=dtype).T):
        torch.library.opcheck(torch.ops.graft.with_gain, (given_, gain, bias))
        torch.library.opcheck(torch.ops.graft.apply_gain, (given_.clone(), gain, None))
        torch.library.opcheck(torch.ops.graft.with_gain_on_rows, (given_, draw(6)))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(torch.ops.graft.gain_backward, (given_, given_, gain, *needs))
