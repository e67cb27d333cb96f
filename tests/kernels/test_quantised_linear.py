"""Linear layers on packed weights against float64: values, gradients, memory, threads, compilation."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graftlm.kernels import buffers, decoding, quantised_cpu
from graftlm.kernels.native import call
from graftlm.kernels.quantised import decode, quantised_linear
from graftlm.quant.packed import PackedWeight, encode
from graftlm.quant.scheme import Scheme

SCHEMES = [Scheme("nf4"), Scheme("nf4", double_quant=False), Scheme("fp4"), Scheme("int8")]
SCHEMES += [Scheme("fp8"), Scheme("fp8_block")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["compiled", "definition"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the compiled reader and without."""
    if request.param == "definition":
        monkeypatch.setattr(call, "library", lambda: None)
    elif call.library() is None:
        pytest.skip("no compiled code on this machine")
    return str(request.param)


def packed(rows: int, columns: int, scheme: Scheme = SCHEMES[0]) -> PackedWeight:
    return encode(draw(rows, columns, seed=rows + columns) / columns**0.5, scheme)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return quantised_linear(
        x, weight.stored, weight.scheme.kind, weight.scheme.block_size, *weight.shape, bias
    )


def exact(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight that `dtype` can hold, in float64."""
    scheme = weight.scheme
    return decoding.decode(weight.stored, scheme.kind, scheme.block_size, *weight.shape, dtype).double()


def error(ours: Tensor, definition: Tensor, size: Tensor) -> float:
    """Largest error over `size`, the same sum with every term positive."""
    difference = (ours.detach().double() - definition.detach().double()).abs()
    return float((difference / size.detach().double().clamp_min(1e-30)).max()) if ours.numel() else 0.0


def check(weight: PackedWeight, dtype: torch.dtype, leading: tuple[int, ...], *, with_bias: bool) -> None:
    rows, columns = weight.shape
    x = draw(*leading, columns, dtype=dtype, seed=1).requires_grad_()
    bias = draw(rows, dtype=dtype, seed=2).requires_grad_() if with_bias else None
    y = linear(x, weight, bias)
    assert y.shape == (*leading, rows) and y.dtype == dtype
    dense, bound, grad = exact(weight, dtype), ROUNDING[dtype], draw(*leading, rows, dtype=dtype, seed=3)
    x64, added = x.detach().double(), 0 if bias is None else bias.detach().double()
    size = x64.abs() @ dense.abs().T + (0 if bias is None else bias.detach().double().abs())
    assert error(y, x64 @ dense.T + added, size) < bound
    y.backward(grad)
    assert x.grad is not None and x.grad.dtype == dtype
    assert error(x.grad, grad.double() @ dense, grad.double().abs() @ dense.abs()) < bound
    if bias is not None:
        flat = grad.double().reshape(-1, rows)
        assert bias.grad is not None
        assert error(bias.grad[None], flat.sum(0)[None], flat.abs().sum(0)[None] + 1e-6) < bound


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.lists(st.integers(0, 5), min_size=0, max_size=3),
    st.booleans(),
)
def check_everything(
    scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int], leading: list[int], with_bias: bool
) -> None:
    check(packed(*shape, scheme), dtype, tuple(leading), with_bias=with_bias)


def test_values_and_gradients_are_those_of_the_definition() -> None:
    check_everything()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_weight_of_several_pieces(
    dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised_cpu, "PIECE", 1)
    check(packed(600, 515), dtype, (7,), with_bias=with_bias)


def test_gradients_that_are_not_asked_for() -> None:
    weight, bias = packed(8, 16), torch.zeros(8, requires_grad=True)
    linear(draw(5, 16), weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 5.0))
    assert not linear(draw(5, 16), weight).requires_grad


def test_input_of_any_layout() -> None:
    weight = packed(8, 16)
    x = draw(16, 4, 5).permute(2, 1, 0)
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight))


def test_autocast_chooses_the_type_as_for_every_linear_layer() -> None:
    weight, x = packed(8, 16), draw(5, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight)
        plain = torch.nn.functional.linear(x.detach(), weight.decode(torch.float32))
    assert y.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_results_do_not_share_memory() -> None:
    """Neither with each other nor with a buffer that the next call writes to."""
    weight = packed(64, 64)
    for tokens in (1, 2, 9):
        x = draw(tokens, 64, dtype=torch.bfloat16)
        first = linear(x, weight)
        before = first.clone()
        linear(x * 2, packed(64, 64, SCHEMES[2]))
        assert torch.equal(first, before)
    first = weight.decode(torch.bfloat16)
    assert first.data_ptr() != weight.decode(torch.bfloat16).data_ptr()


def test_only_the_packed_tensors_are_kept_for_backward() -> None:
    weight = packed(64, 128)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = draw(9, 128, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(x, weight, draw(64).bfloat16())
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in weight.stored}


def test_no_dense_weight_is_made(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece of it at a time is, in memory that stays the same over layers and calls."""
    if path == "definition":
        pytest.skip("the definition makes one")
    monkeypatch.setattr(quantised_cpu, "PIECE", 2**15)
    monkeypatch.setattr(buffers, "_held", buffers._Held())
    weights = [packed(1024, 768), packed(512, 1280)]
    x = draw(16, 768, dtype=torch.bfloat16).requires_grad_()
    for _ in range(2):
        linear(x, weights[0]).sum().backward()
        linear(draw(16, 1280, dtype=torch.bfloat16), weights[1])
    (held,) = buffers._held.by_dtype.values()
    assert len(held) == 1280 * quantised_cpu.NARROWEST
    gc.collect()
    assert not [found for found in gc.get_objects() if is_dense(found)]


def is_dense(found: object) -> bool:
    return type(found) is Tensor and tuple(found.shape) in ((1024, 768), (512, 1280))


def test_memory_lent_in_inference_serves_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_held", buffers._Held())
    weight, x = packed(8, 16), draw(5, 16).requires_grad_()
    with torch.inference_mode():
        inferred = linear(x.detach(), weight)
    y = linear(x, weight)
    y.sum().backward()
    assert torch.equal(y, inferred)


def test_threads_do_not_disturb_each_other() -> None:
    weights = [packed(256, 128), packed(128, 256), packed(64, 320)]
    inputs = [draw(33, weight.shape[1], dtype=torch.bfloat16) for weight in weights]
    expected = [forward_and_backward(x, weight) for x, weight in zip(inputs, weights, strict=True)]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(15):
            found = forward_and_backward(inputs[index], weights[index])
            if not all(map(torch.equal, found, expected[index])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def forward_and_backward(x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = linear(x, weight)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def two_layers(x: Tensor) -> Tensor:
    return linear(linear(x, packed(32, 64)).relu(), packed(16, 32), draw(16, seed=5))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    gradients = []
    for call_it in (two_layers, lambda x: checkpoint(two_layers, x, use_reentrant=use_reentrant)):
        x = draw(5, 64).requires_grad_()
        call_it(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("tokens", "scheme"), [(1, SCHEMES[0]), (6, SCHEMES[3])])
def test_compiles_without_a_graph_break(tokens: int, scheme: Scheme) -> None:
    weight, bias = packed(32, 64, scheme), draw(32)

    def layer(x: Tensor) -> Tensor:
        return linear(x.sin(), weight, bias).cos().sum()

    gradients = []
    for call_it in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = draw(2, tokens, 64).requires_grad_()
        call_it(x).backward()
        gradients.append(x.grad)
        with torch.no_grad():
            torch.testing.assert_close(call_it(x), layer(x))
    torch.testing.assert_close(*gradients)


# opcheck cannot multiply 8-bit floats, which it does with every input
@pytest.mark.parametrize("scheme", SCHEMES[:-2], ids=lambda scheme: scheme.kind)
def test_operators_are_what_they_declare(scheme: Scheme) -> None:
    weight = packed(12, 40, scheme)
    layout = (weight.stored, scheme.kind, scheme.block_size, *weight.shape)
    operators = torch.ops.graft
    for dtype in DTYPES[:2]:
        torch.library.opcheck(operators.decode, (*layout, dtype))
        torch.library.opcheck(operators.quantised_linear, (draw(5, 40, dtype=dtype), *layout, None))
        grad = draw(5, 12, dtype=dtype)
        torch.library.opcheck(operators.quantised_linear_backward, (grad, *layout))
        torch.library.opcheck(
            operators.quantised_linear_accumulate, (draw(5, 40, dtype=dtype), grad, *layout)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, 40), (700, 1100), (5, 5000)])
def test_gradients_of_several_layers_are_added_up_where_they_lie(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for scheme in SCHEMES:
        weight = packed(*shape, scheme)
        layout = (weight.stored, scheme.kind, scheme.block_size, *weight.shape)
        before, grad = draw(6, shape[1], dtype=dtype, seed=1), draw(6, shape[0], dtype=dtype, seed=2)
        out = before.clone()
        torch.ops.graft.quantised_linear_accumulate(out, grad, *layout)
        definition = before.double() + grad.double() @ exact(weight, dtype)
        size = before.double().abs() + grad.double().abs() @ exact(weight, dtype).abs()
        assert error(out, definition, size) < 4 * ROUNDING[dtype]


def test_decode_equals_the_definition_to_the_bit() -> None:
    for scheme in SCHEMES:
        weight = packed(31, 67, scheme)
        layout = (weight.stored, scheme.kind, scheme.block_size, *weight.shape)
        for dtype in DTYPES:
            assert torch.equal(decode(*layout, dtype), decoding.decode(*layout, dtype))
