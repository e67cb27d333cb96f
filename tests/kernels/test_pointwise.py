"""Fused elementwise layers against their definitions in float64, compiled and in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels.native import pointwise_call as native
from graftlm.kernels.pointwise import gated_gelu, gated_silu, rms_norm, rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Layer = Callable[..., Tensor]


@pytest.fixture(params=["compiled", "plain torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain torch":
        monkeypatch.setattr(native, "library", lambda: None)
    return str(request.param)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gated_by_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers has it, for the first values of each head."""
    turning, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((turning * cos + torch.cat((-second, first), -1) * sin, rest), dim=-1)


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(out, inputs, torch.randn(out.shape).bfloat16().to(out.dtype))


def require_rounded(found: Tensor, exact: Tensor) -> None:
    """Rounded once: half a unit in the last place, and the error of float32 sums over a row."""
    assert found.shape == exact.shape
    unit = 2e-6 * max(1.0, exact.abs().max().item())
    error = (found.double() - exact).abs()
    assert bool((error <= 0.501 * torch.finfo(found.dtype).eps * exact.abs() + unit).all())


def require_layer(layer: Layer, definition: Layer, inputs: list[Tensor]) -> None:
    """Values and gradients of one that has one result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    precise = [x.detach().double().requires_grad_() for x in inputs]
    found, exact = layer(*leaves), definition(*precise)
    assert found.dtype == inputs[0].dtype
    require_rounded(found, exact)
    for mine, its in zip(gradients(found, *leaves), gradients(exact, *precise), strict=True):
        assert mine.dtype == inputs[0].dtype
        require_rounded(mine, its)


def check_norm(rows: tuple[int, ...], width: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, weight = (3 * torch.randn(*rows, width)).to(dtype), torch.randn(width).to(weight_dtype)
    require_layer(
        lambda leaf: rms_norm(leaf, weight, 1e-5), lambda leaf: norm(leaf, weight.double(), 1e-5), [x]
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("width", [1, 16, 255, 256, 700, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(width: int, dtype: torch.dtype) -> None:
    check_norm((2, 3), width, dtype, dtype)
    check_norm((5,), width, dtype, torch.float32)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(2, 3, 16), (7, 300), (4, 512), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    require_layer(gated_silu, gated, [(4 * torch.randn(shape)).to(dtype) for _ in range(2)])
    require_layer(gated_gelu, gated_by_gelu, [(2 * torch.randn(shape)).to(dtype) for _ in range(2)])


def angles(rows: int, tokens: int, turning: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """With halves that differ, as no model has them."""
    angle = torch.rand(rows, tokens, turning) * 7
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check_rope(
    heads: tuple[int, int], tokens: int, turning: int, rest: int, rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens + turning)
    sizes = [(2, tokens, each, turning + rest) for each in heads]
    leaves = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    precise = [leaf.detach().double().requires_grad_() for leaf in leaves]
    cos, sin = angles(rows, tokens, turning, dtype)
    found = rope(leaves[0].transpose(1, 2), leaves[1].transpose(1, 2), cos, sin)
    exact = [turned(x.transpose(1, 2), cos.double(), sin.double()) for x in precise]
    for one, its in zip(found, exact, strict=True):
        assert one.transpose(1, 2).is_contiguous()
        require_rounded(one, its)
    both, all_exact = (torch.cat([x.flatten() for x in each]) for each in (found, exact))
    for mine, its in zip(gradients(both, *leaves), gradients(all_exact, *precise), strict=True):
        require_rounded(mine, its)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("turning", "rest"), [(2, 0), (64, 0), (128, 0), (32, 96), (10, 3), (512, 0), (600, 0)]
)
def test_rope(turning: int, rest: int, dtype: torch.dtype) -> None:
    check_rope((4, 2), 5, turning, rest, 1, dtype)
    check_rope((1, 3), 3, turning, rest, 2, dtype)


def test_rope_with_more_precise_angles() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 4, 6).bfloat16(), torch.randn(1, 1, 4, 6).bfloat16()
    cos, sin = angles(1, 4, 6, torch.float32)
    for found, x in zip(rope(q, k, cos, sin), (q, k), strict=True):
        require_rounded(found, turned(x.double(), cos.double(), sin.double()))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 9), width=st.integers(1, 600), data=st.data(), dtype=st.sampled_from(DTYPES[:2]))
def test_any_shape_and_stride(rows: int, width: int, data: st.DataObject, dtype: torch.dtype) -> None:
    torch.manual_seed(rows + width)
    wide = torch.randn(3, rows, width + data.draw(st.integers(0, 5))).to(dtype)
    x, gate, up = wide[..., -width:]
    weight = torch.randn(width).to(dtype)
    if not rows:
        assert rms_norm(x, weight, 1e-6).shape == gated_silu(gate, up).shape == (0, width)
        return
    require_layer(
        lambda leaf: rms_norm(leaf, weight, 1e-6), lambda leaf: norm(leaf, weight.double(), 1e-6), [x]
    )
    require_layer(gated_silu, gated, [gate, up])
    heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    check_rope(heads, rows, 2 * data.draw(st.integers(1, 70)), data.draw(st.integers(0, 5)), 1, dtype)


@pytest.mark.parametrize("turned_over", [False, True])
def test_columns_that_do_not_lie_together(turned_over: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 8).t() if turned_over else torch.randn(8, 80)[:, ::2]
    up, weight = torch.randn(8, 40), torch.randn(80)[::2]
    require_layer(
        lambda leaf: rms_norm(leaf, weight, 1e-6), lambda leaf: norm(leaf, weight.double(), 1e-6), [x]
    )
    require_layer(gated_silu, gated, [x, up])


def test_what_is_kept_for_backward() -> None:
    """The inputs themselves and one number a row: no copy of anything."""
    x, up = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated_silu(rms_norm(x, torch.ones(32), 1e-6), up)
    inputs = {x.data_ptr(), up.data_ptr()}
    fresh = [tensor for tensor in kept if tensor.data_ptr() not in inputs]
    weight, scales, normed = 32, 64, 64 * 32
    assert sorted(tensor.numel() for tensor in fresh) == [weight, scales, normed]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_operators_pass_opcheck(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y, weight = torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype), torch.randn(7).to(dtype)
    operators = torch.ops.graft
    _, scale = operators.rms_norm(x, weight, 1e-6)
    torch.library.opcheck(operators.rms_norm, (x, weight, 1e-6))
    torch.library.opcheck(operators.rms_norm_backward, (y, x, weight, scale))
    torch.library.opcheck(operators.gated_silu, (x, y))
    torch.library.opcheck(operators.gated_silu_backward, (x, y, x))
    torch.library.opcheck(operators.gated_gelu, (x, y))
    torch.library.opcheck(operators.gated_gelu_backward, (x, y, x))
    q, k = torch.randn(2, 3, 5, 6).to(dtype), torch.randn(2, 1, 5, 6).to(dtype)
    for inverse in (False, True):
        torch.library.opcheck(operators.rope, (q, k, *angles(1, 5, 4, dtype), inverse))
    strided = x.t().contiguous().t()
    torch.library.opcheck(operators.rms_norm, (strided, weight, 1e-6))
    torch.library.opcheck(operators.gated_silu, (strided, y))


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda leaf: rms_norm(leaf, weight, 1e-6), [x])
    assert torch.autograd.gradcheck(gated_silu, [x, y])
    assert torch.autograd.gradcheck(gated_gelu, [x, y])
    q, k = (torch.randn(1, heads, 3, 6, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    cos, sin = angles(1, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: rope(a, b, cos, sin), [q, k])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    cos, sin = angles(1, 4, 16, torch.float32)

    def both(x: Tensor, up: Tensor) -> Tensor:
        middle = gated_silu(rms_norm(x, torch.ones(16), 1e-6), up)
        q, k = rope(middle.view(1, 1, 4, 16), up.view(1, 1, 4, 16), cos, sin)
        return q + k

    x, up = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, up), both(x, up))
    for mine, its in zip(gradients(compiled(x, up), x, up), gradients(both(x, up), x, up), strict=True):
        assert torch.allclose(mine, its)
