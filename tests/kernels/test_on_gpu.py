"""Every operator with a CUDA form against its definition in float64 on the CPU. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.core.notices import forget_notices, notices_to
from graftlm.formats.layout import FOLDER
from graftlm.kernels import cross_entropy, dropout, fp8_products, pointwise_reference
from graftlm.kernels.encoding import encode_rows_fp8
from graftlm.kernels.triton import forms as triton_forms
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.testing.models import batch, tiny

pytestmark = pytest.mark.gpu

GRAFT = torch.ops.graft
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(1, 1), (3, 5), (129, 65), (7, 4096), (2048, 1024)]


def values(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Every value within a few roundings of its own size and of the largest."""
    difference = (found.double().cpu() - exact.double()).abs()
    size = max(1.0, float(exact.abs().max()))
    assert bool((difference <= ROUNDING[dtype] * (exact.abs() + 0.25 * size)).all()), float(difference.max())


def compare(
    operator: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Any], dtype: torch.dtype
) -> None:
    """The operator on CUDA in `dtype`, and its definition on the same rounded numbers in float64."""
    rounded = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    found = operator(*(x.cuda() if isinstance(x, Tensor) else x for x in rounded))
    exact = definition(
        *(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in rounded)
    )
    for mine, its in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, exact)), strict=True):
        assert mine.is_cuda
        close(mine, its, dtype)


@pytest.fixture(autouse=True)
def with_triton() -> None:
    """A fallback would pass every test here; the forms must have been imported."""
    assert triton_forms._forms() is not None


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elementwise(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, other, grad = (values(*shape, seed=seed) for seed in range(3))
    weight = values(shape[1], seed=3)
    compare(GRAFT.rms_norm, pointwise_reference.rms_norm, (x, weight, 1e-6), dtype)
    scale = (x.to(dtype).double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    found = GRAFT.rms_norm_backward(*(t.to(dtype).cuda() for t in (grad, x, weight)), scale.float().cuda())
    flow, rows, factor = (t.to(dtype).double() for t in (grad, x, weight))
    close(found, pointwise_reference.rms_norm_backward(flow, rows, factor, scale), dtype)
    compare(GRAFT.gated_silu, pointwise_reference.gated_silu, (x, other), dtype)
    compare(GRAFT.gated_silu_backward, pointwise_reference.gated_silu_backward, (grad, x, other), dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("heads", "width", "turning"), [(1, 8, 8), (3, 64, 32), (32, 128, 128)])
def test_rotary(heads: int, width: int, turning: int, inverse: bool, dtype: torch.dtype) -> None:
    q = values(2, 7, heads, width).transpose(1, 2)
    k = values(2, 1, 7, width, seed=1)
    angles = values(1, 7, turning // 2, seed=2).repeat(1, 1, 2)
    compare(GRAFT.rope, pointwise_reference.rope, (q, k, angles.cos(), angles.sin(), inverse), dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("rank", [1, 16, 70, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_add(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    y, s, b = values(*shape), values(shape[0], rank, seed=1), values(shape[1], rank, seed=2, spread=0.1)
    y, s, b = (t.to(dtype) for t in (y, s, b))
    found = y.cuda()
    GRAFT.add_low_rank(found, s.cuda(), b.cuda(), 0.5)
    close(found, y.double() + 0.5 * s.double() @ b.double().t(), dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_drops_what_it_drops_on_a_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, seed = values(*shape).to(dtype), torch.tensor(2**61 + 5)
    expected = dropout._dropped(x, 0.3, seed)
    assert torch.equal(GRAFT.dropped(x.cuda(), 0.3, seed).cpu(), expected)
    out = torch.ones_like(x).cuda()
    GRAFT.add_dropped(out, x.cuda(), 0.3, seed)
    close(out, 1 + expected.double(), dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (5, 1000), (1100, 5000), (3, 128_256)])
def test_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    hidden, weight = values(rows, 64), values(vocabulary, 64, seed=1, spread=0.3)
    labels = torch.arange(rows).mul(7).remainder(vocabulary)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    on_gpu = (hidden.cuda(), weight.cuda(), None, labels.cuda(), 16, True)
    loss, grad = GRAFT.linear_cross_entropy(*on_gpu)
    exact, of_hidden = cross_entropy.linear_cross_entropy(
        hidden.double(), weight.double(), None, labels, 16, True
    )
    assert abs(float(loss) - float(exact)) <= ROUNDING[dtype] * float(exact)
    assert (grad.double().cpu() - of_hidden).norm() <= 4 * ROUNDING[dtype] * of_hidden.norm()


@pytest.mark.parametrize("shape", [(1, 16, 16), (33, 64, 128), (512, 1024, 4096)], ids=str)
def test_fp8_products(shape: tuple[int, int, int]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := fp8_products.why_not(device)) is not None:
        pytest.skip(reason)
    tokens, rows, columns = shape
    x, grad = values(tokens, columns).bfloat16(), values(tokens, rows, seed=1, spread=1e-4).bfloat16()
    stored = list(encode_rows_fp8(values(rows, columns, seed=2, spread=0.02)))
    on_gpu = [tensor.cuda() for tensor in stored]
    defined = fp8_products.multiply_as_defined
    y = GRAFT.quantised_linear(x.cuda(), on_gpu, fp8_products.FP8_PRODUCTS, 64, rows, columns, None)
    dx = GRAFT.quantised_linear_backward(grad.cuda(), on_gpu, fp8_products.FP8_PRODUCTS, 64, rows, columns)
    expected = (
        fp8_products.linear(x, stored, None, defined),
        fp8_products.linear_backward(grad, stored, defined),
    )
    for mine, its in zip((y, dx), expected, strict=True):
        assert (mine.double().cpu() - its.double()).norm() <= 0.01 * its.double().norm()


@pytest.mark.parametrize("dropped", [0.0, 0.25])
def test_a_whole_model(dropped: float) -> None:
    """All forms together, with the same seeds: loss and gradients of a CPU in float32."""
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = tiny("llama")
        config = LoraConfig(r=4, lora_dropout=dropped, init_lora_weights=False)
        attach(model, config, storage=FOLDER)
        model.to(device).train()
        with fused(fusable(model)):
            torch.manual_seed(1)
            loss = model(**{name: tensor.to(device) for name, tensor in batch("llama").items()}).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained)
        found[device] = torch.cat([loss.detach().view(1), *(grad.flatten() for grad in gradients)]).cpu()
    assert (found["cpu"] - found["cuda"]).norm() <= 1e-3 * found["cpu"].norm()


def test_nothing_is_said_where_triton_is_installed() -> None:
    heard: list[str] = []
    forget_notices()
    with notices_to(heard.append):
        GRAFT.gated_silu(torch.ones(2, 2).cuda(), torch.ones(2, 2).cuda())
    assert not heard
