"""`adapted_linears` against its definition in float64: values, gradients, dropout, schema, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.kernels.adapted import Adapted, Frozen, Given, adapted_linears
from graftlm.kernels.adapted_products import Packing
from graftlm.kernels.dropout import keep_mask, kept_share, new_seed
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme

from .drawn import DTYPES, TOLERANCE, draw, relative

KINDS = ("dense", "transposed", "given", "nf4", "int8")


@dataclass(frozen=True)
class Problem:
    """One layer of a group: how it is stored, its sizes, and what belongs to it."""

    kind: str
    out: int
    rank: int
    scale: float
    has_bias: bool
    upon: str
    """`gain`, `shift` or nothing."""


@st.composite
def problems(draw_from: st.DrawFn) -> Problem:
    pick: Callable[..., object] = lambda *of: draw_from(st.sampled_from(of))  # noqa: E731
    out, rank = draw_from(st.integers(1, 29)), draw_from(st.integers(1, 9))
    return Problem(
        str(pick(*KINDS)), out, rank, draw_from(st.sampled_from([0.5, 1.7])), bool(pick(False, True)),
        str(pick("", "gain", "shift")),
    )  # fmt: skip


@dataclass
class Case:
    """A layer as it is given, the dense weight it stands for, and the leaves that get gradients."""

    adapted: Adapted
    weight: Tensor | None
    leaves: dict[str, Tensor]


def build(
    problem: Problem, leading: Sequence[int], width: int, dtype: torch.dtype, p: float, seed: int
) -> Case:
    precise = torch.promote_types(dtype, torch.float32)
    leaves = {
        "a": draw(problem.rank, width, dtype=precise, seed=seed),
        "b": draw(problem.out, problem.rank, dtype=precise, seed=seed + 1),
    }
    weight = draw(problem.out, width, dtype=dtype, seed=seed + 2)
    bias = draw(problem.out, dtype=dtype, seed=seed + 3) if problem.has_bias else None
    layer: Frozen | Given
    if problem.kind == "given":
        leaves["given"] = draw(*leading, problem.out, dtype=dtype, seed=seed + 4)
    if problem.upon == "gain":
        leaves["gain"] = draw(problem.out, dtype=precise, seed=seed + 5).abs() + 0.5
    if problem.upon == "shift":
        leaves["shift"] = draw(problem.out, dtype=precise, seed=seed + 6)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    if problem.kind == "given":
        layer = Given(leaves["given"], bias)
    elif problem.kind in ("dense", "transposed"):
        layer = Frozen((weight.T.contiguous().T if problem.kind == "transposed" else weight,), bias)
    else:
        packed = encode(weight, Scheme.parse(problem.kind))
        scheme, weight = packed.scheme, packed.decode(dtype)
        layer = Frozen(tuple(packed.stored), bias, Packing(scheme.kind, scheme.block_size, *packed.shape))
    upon = {name: leaves.get(name) for name in ("gain", "shift")}
    adapted = Adapted(layer, leaves["a"], leaves["b"], problem.scale, p, **upon)
    return Case(adapted, None if problem.kind == "given" else weight, leaves)


def definition(case: Case, leaves: dict[str, Tensor], x: Tensor, keep: Tensor, *, positive: bool) -> Tensor:
    """What the layer gives in float64; with `positive`, the same sum with every term positive."""
    sign = torch.abs if positive else lambda tensor: tensor
    bias = case.adapted.layer.bias
    wide = torch.zeros((), dtype=torch.float64) if bias is None else sign(bias.double())
    if case.weight is None:
        y = leaves["given"] - (-wide if positive else wide)
    else:
        y = x @ sign(case.weight.double()).T
    y = y + case.adapted.scale * (x * keep) @ leaves["a"].T @ leaves["b"].T
    return leaves.get("gain", 1.0) * y + wide + leaves.get("shift", 0.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(problems(), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 33),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.3]),
    st.sets(st.integers(0, 2), max_size=2),
)
def test_values_and_gradients_are_those_of_the_definition(
    group: list[Problem], leading: list[int], width: int, dtype: torch.dtype, p: float, unused: set[int]
) -> None:
    x = draw(*leading, width, dtype=dtype, seed=1).requires_grad_()
    cases = [build(problem, leading, width, dtype, p, 10 * i) for i, problem in enumerate(group, 1)]
    torch.manual_seed(7)
    outputs = adapted_linears(x, [case.adapted for case in cases])
    torch.manual_seed(7)
    masks = [torch.ones(x.shape, dtype=torch.float64)] * len(cases)
    if p:
        rows = torch.Size((x[..., 0].numel(), width))
        keeps = [keep_mask(rows, p, new_seed(), x.device).double() for _ in cases]
        masks = [keep.view(x.shape) / kept_share(p) for keep in keeps]
    exact: list[tuple[Tensor, dict[str, Tensor], list[Tensor]]] = []
    for positive in (False, True):
        at = (x.detach().double().abs() if positive else x.detach().double()).requires_grad_()
        values, all_leaves = [], {}
        for i, (case, keep) in enumerate(zip(cases, masks, strict=True)):
            leaves = {
                name: (leaf.detach().double().abs() if positive else leaf.detach().double()).requires_grad_()
                for name, leaf in case.leaves.items()
            }
            values.append(definition(case, leaves, at, keep, positive=positive))
            all_leaves |= {f"{i}.{name}": leaf for name, leaf in leaves.items()}
        exact.append((at, all_leaves, values))
    (true_x, true_leaves, true_values), (size_x, size_leaves, sizes) = exact
    weights = [draw(*value.shape, dtype=dtype, seed=5) for value in outputs]
    used = [i for i in range(len(cases)) if i not in unused] or [0]
    for i, found in enumerate(outputs):
        assert found.dtype == dtype and found.shape == true_values[i].shape
        assert relative(found, true_values[i], sizes[i]) < TOLERANCE[dtype]
    torch.autograd.backward([outputs[i] for i in used], [weights[i] for i in used])
    torch.autograd.backward([true_values[i] for i in used], [weights[i].double() for i in used])
    torch.autograd.backward([sizes[i] for i in used], [weights[i].double().abs() for i in used])
    ours = {f"{i}.{name}": leaf for i, case in enumerate(cases) for name, leaf in case.leaves.items()}
    for name, mine in {"x": x, **ours}.items():
        true, size = ({"x": of_x, **of}[name] for of_x, of in ((true_x, true_leaves), (size_x, size_leaves)))
        if true.grad is None:
            assert mine.grad is None, name
            continue
        assert mine.grad is not None and mine.grad.dtype == mine.dtype and size.grad is not None
        assert relative(mine.grad, true.grad, size.grad) < 2 * TOLERANCE[dtype], name


def layer(out: int = 5, width: int = 4, **more: object) -> Adapted:
    plain = Adapted(
        Frozen((draw(out, width, seed=9),)), draw(2, width, seed=3).requires_grad_(),
        draw(out, 2, seed=4).requires_grad_(), 0.5,
    )  # fmt: skip
    return replace(plain, **more)


def kept_bytes(compute: Callable[[], object]) -> dict[int, int]:
    """Bytes of every storage that is kept for backward, by its place."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = compute()
    del held
    return kept


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("has_gain", [False, True])
def test_the_input_is_kept_once_and_nothing_else_that_is_large(p: float, has_gain: bool) -> None:
    x = draw(64, 256, dtype=torch.bfloat16)
    weight = draw(128, 256, dtype=torch.bfloat16)
    gains = [torch.ones(128, requires_grad=trained) if has_gain else None for trained in (True, False)]
    group = [
        layer(128, 256, layer=Frozen((weight,)), dropout=p, gain=gain) for gain in (*gains, None)
    ]  # fmt: skip
    outputs: list[Tensor] = []
    kept = kept_bytes(lambda: outputs.extend(adapted_linears(x, group)))
    own = {
        t.untyped_storage().data_ptr()
        for one in group
        for t in (one.a, one.b, one.gain, weight)
        if t is not None
    }
    kept = {place: size for place, size in kept.items() if place not in own}
    assert x.untyped_storage().data_ptr() in kept
    assert [out.untyped_storage().data_ptr() in kept for out in outputs] == [has_gain, False, False]
    thin = 64 * 6 * 2
    assert sum(kept.values()) <= x.nbytes + has_gain * outputs[0].nbytes + thin + 3 * 8


def test_an_input_without_gradient_gets_none_and_frozen_factors_cost_none() -> None:
    x = draw(3, 4)
    one = layer()
    adapted_linears(x, [one])[0].sum().backward()
    assert x.grad is None and one.a.grad is not None
    still = layer(a=one.a.detach(), b=one.b.detach())
    x.requires_grad_()
    adapted_linears(x, [still])[0].sum().backward()
    assert still.a.grad is None and x.grad is not None
    with torch.no_grad():
        assert not adapted_linears(x, [one])[0].requires_grad


def test_every_layer_and_call_has_a_mask_of_its_own_and_the_generator_decides() -> None:
    x, one = torch.ones(8, 64), layer(3, 64, layer=Frozen((torch.zeros(3, 64),)), dropout=0.5)
    torch.manual_seed(11)
    (first, second), (third,) = adapted_linears(x, [one, one]), adapted_linears(x, [one])
    torch.manual_seed(11)
    assert torch.equal(first, adapted_linears(x, [one])[0])
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_without_dropout_the_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    adapted_linears(draw(2, 4), [layer()])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3])
def test_dropout_keeps_the_expectation_in_bfloat16(p: float) -> None:
    """1 / (1 - p) rounded to bfloat16 would shift every output by up to 0.4 %."""
    x = torch.ones(256, 2048, dtype=torch.bfloat16)
    zero = Given(torch.zeros(256, 1, dtype=torch.bfloat16))
    one = Adapted(zero, torch.full((1, 2048), 2.0**-11), torch.ones(1, 1), 1.0, p)
    torch.manual_seed(0)
    mean = torch.cat([adapted_linears(x, [one])[0] for _ in range(8)]).double().mean()
    assert abs(mean.item() - 1.0) < 1.2e-3


def test_a_gain_of_one_leaves_the_output_to_the_bit() -> None:
    y, x = draw(6, 5, dtype=torch.bfloat16), draw(6, 4, dtype=torch.bfloat16)
    for bias in (None, draw(5, dtype=torch.bfloat16)):
        one = layer(layer=Given(y, bias), b=torch.zeros(5, 2), gain=torch.ones(5))
        assert torch.equal(adapted_linears(x, [one])[0], y)


def test_a_gain_near_one_is_not_rounded_away_in_bfloat16() -> None:
    """The gain 1.01 is 1.0078 in bfloat16; over many outputs that are rounded, the mean must be right."""
    y = draw(20_000, 1, dtype=torch.bfloat16)
    x, a, b = torch.zeros(20_000, 1, dtype=torch.bfloat16), torch.zeros(1, 1), torch.zeros(1, 1)
    one = Adapted(Given(y), a, b, 1.0, gain=torch.tensor([1.01]))
    changed = adapted_linears(x, [one])[0].double() - y.double()
    slope = (changed * y.double()).sum() / y.double().square().sum()
    assert abs(slope.item() - 0.01) < 5e-4


def test_a_gain_of_zero_gets_a_gradient_of_zero() -> None:
    gain = torch.tensor([0.0, 2.0], requires_grad=True)
    one = Adapted(Given(torch.ones(3, 2)), torch.ones(1, 1), torch.ones(2, 1), 1.0, gain=gain)
    adapted_linears(torch.ones(3, 1), [one])[0].sum().backward()
    torch.testing.assert_close(gain.grad, torch.tensor([0.0, 6.0]))


def test_the_output_may_be_changed_in_place_as_that_of_a_linear_layer() -> None:
    """Some models clamp queries in place."""
    gradients = []
    for is_in_place in (False, True):
        x, group = draw(2, 3, 4).requires_grad_(), [layer(), layer(6)]
        found, other = adapted_linears(x, group)
        found = found.clamp_(-0.5, 0.5) if is_in_place else found.clamp(-0.5, 0.5)
        gradients.append(torch.autograd.grad(found.sum() + other.sum(), [x, group[0].a, group[1].b]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_output_with_a_gain_that_was_changed_in_place_is_an_error_and_no_wrong_gradient() -> None:
    (out,) = adapted_linears(draw(3, 4), [layer(gain=torch.ones(5, requires_grad=True))])
    with torch.no_grad():
        out.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_refused_instead_of_being_zero() -> None:
    one = layer()
    (out,) = adapted_linears(draw(2, 4), [one])
    (first,) = torch.autograd.grad(out.sin().sum(), one.a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_strided_inputs_have_the_gradients_of_the_definition() -> None:
    x = draw(4, 3, 6).requires_grad_()
    group = [layer(5, 6), layer(3, 6, layer=Frozen((draw(6, 3).T,)))]
    gradients = []
    for at in (x.permute(1, 0, 2), x.permute(1, 0, 2).contiguous()):
        outputs = adapted_linears(at, group)
        loss = sum((out.transpose(0, 1) * out.transpose(0, 1)).sum() for out in outputs)
        gradients.append(torch.autograd.grad(loss, [x, group[0].a, group[1].b]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_opcheck(dtype: torch.dtype) -> None:
    y, s, b = draw(6, 5, dtype=dtype), draw(6, 8, dtype=dtype)[:, 2:4], draw(5, 2, dtype=dtype)
    torch.library.opcheck(torch.ops.graft.add_low_rank, (y, s, b, 0.5))
