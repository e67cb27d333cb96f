"""Attention over documents against its definition in float64 and torch's own, every path of the source."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from graftlm.core import compiling
from graftlm.core.errors import TrainingError
from graftlm.core.notices import forget_notices
from graftlm.kernels.attention import attention, attention_is_native
from graftlm.kernels.native import attention_call

from .compiled import compiled

ERROR = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
"""Of the root mean square of a result, or of 0.1 where that is less: a few roundings."""


@dataclass(frozen=True)
class Problem:
    lengths: tuple[int, ...]
    heads: int
    group: int
    width: int
    shared: int = 0
    window: int | None = None
    seed: int = 0
    above: tuple[int, ...] = ()
    """Beside `lengths`, the document that each one continues, or -1."""

    @property
    def parents(self) -> Tensor | None:
        return torch.tensor(self.above) if self.above else None

    @property
    def starts(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v, grad: parts of one tensor, as a fused projection yields them; the gradient is dense."""
        random = torch.Generator().manual_seed(self.seed)
        tokens, queries = sum(self.lengths), self.heads * self.group
        count = queries + 2 * self.heads
        both = torch.randn(self.shared + tokens, count, self.width, generator=random).to(dtype)
        q, k, v = both.split([queries, self.heads, self.heads], 1)
        grad = torch.randn(tokens, queries, self.width, generator=random).to(dtype)
        return [q[self.shared :], k, v, grad]


def definition(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In one matrix, masked. Documents count from 1 here, as `bucketize` does."""
    token = torch.arange(len(q))
    document = torch.bucketize(token, problem.starts, right=True)
    lengths = torch.tensor(problem.lengths)
    above = torch.tensor(problem.above or [-1] * len(lengths))
    position = token - problem.starts[document - 1]
    position += torch.where(above < 0, 0, lengths[above])[document - 1]
    distance = position.unsqueeze(1) - position
    related = (document.unsqueeze(1) == document) | (above[document - 1].unsqueeze(1) == document - 1)
    seen = (distance >= 0) & related
    if problem.window is not None:
        seen &= distance < problem.window
    seen = torch.nn.functional.pad(seen, (problem.shared, 0), value=True)
    k, v = (x.repeat_interleave(problem.group, 1) for x in (k, v))
    scores = problem.scale * torch.einsum("nhd,mhd->hnm", q, k)
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def results(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    *inputs, grad = problem.inputs(dtype)
    inputs = [x.requires_grad_() for x in inputs]
    bounds, parents = problem.starts, problem.parents
    out = attention(*inputs, bounds, scale=problem.scale, window=problem.window, parents=parents)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def check(problem: Problem, dtype: torch.dtype) -> None:
    *inputs, grad = (x.double() for x in problem.inputs(dtype))
    inputs = [x.requires_grad_() for x in inputs]
    out = definition(problem, *inputs)
    wanted = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    for found, value in zip(results(problem, dtype), wanted, strict=True):
        assert found.dtype == dtype and found.shape == value.shape and found.is_contiguous()
        error = (found.double() - value).norm() / max(value.norm(), 0.1 * value.numel() ** 0.5)
        assert error <= ERROR[dtype], (problem, float(error))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    length = st.integers(1, 70) | st.sampled_from([31, 32, 33, 64, 127, 128, 129, 256, 257, 300])
    lengths = tuple(draw(st.lists(length, min_size=1, max_size=6)))
    return Problem(
        lengths,
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 4])),
        width=draw(st.sampled_from([8, 16, 20, 32, 64, 80, 96, 128, 256])),
        shared=draw(st.sampled_from([0, 0, 0, 1, 31, 32, 33, 70, 257])),
        window=draw(st.sampled_from([None, None, None, 1, 2, 31, 32, 33, 64, 100])),
        seed=draw(st.integers(0, 2**31)),
        above=draw(st.just(()) | families(len(lengths))),
    )


@st.composite
def families(draw: st.DrawFn, count: int) -> tuple[int, ...]:
    """Which document each one continues: any in front that continues none itself, or none."""
    above: list[int] = []
    for number in range(count):
        above.append(draw(st.sampled_from([-1, *(other for other in range(number) if above[other] < 0)])))
    return tuple(above)


VARIANTS = {
    "this machine": (),
    "without a matrix unit": ("-mno-amx-tile",),
    "without bfloat16 instructions": ("-mno-amx-tile", "-mno-avx512bf16"),
}


@pytest.fixture(scope="module", params=VARIANTS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The source compiled for this machine, or for a lesser one."""
    folder = tmp_path_factory.mktemp("built")
    library = compiled(attention_call.SOURCE, "-march=native", *VARIANTS[request.param], folder=folder)
    loaded = attention_call.load(library)
    if not loaded.graft_attention_state():
        pytest.skip("the processor lacks AVX-512")
    return loaded


@pytest.fixture
def using(built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_call, "library", lambda: built)


@given(problems())
@settings(max_examples=40, deadline=None)
def check_compiled(problem: Problem) -> None:
    assert attention_is_native(torch.bfloat16, problem.width) is None
    check(problem, torch.bfloat16)


@pytest.mark.usefixtures("using")
def test_compiled() -> None:
    check_compiled()


@pytest.mark.usefixtures("using")
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_steep_weights(scale: float) -> None:
    """Steep: one key has nearly all the weight, and the highest score rises along a document."""
    problem = Problem((300, 40), 1, 2, 64)
    q, k, v, grad = problem.inputs(torch.bfloat16)
    k = (k * torch.linspace(0.1, 1, len(k)).view(-1, 1, 1)).bfloat16()
    made = [x.detach().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, wanted = (
        attention(*made, problem.starts, scale=scale),
        attention(*wide, problem.starts, scale=scale),
    )
    assert (out - wanted).norm() <= 1e-2 * wanted.norm()
    found = torch.autograd.grad(out, made, grad)
    for mine, value in zip(found, torch.autograd.grad(wanted, wide, grad.double()), strict=True):
        assert (mine - value).norm() <= 2e-2 * value.norm()


@given(problems(), st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=25, deadline=None)
def check_reference(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype)


def test_definition_in_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_call, "library", lambda: "switched off here")
    assert attention_is_native(torch.bfloat16, 64) == "switched off here"
    check_reference()


native = pytest.mark.skipif(
    attention_is_native(torch.bfloat16, 64) is not None, reason="no compiled attention on this machine"
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "problem",
    [
        Problem((700, 1, 33, 257), 3, 2, 80, shared=40),
        Problem((1500,), 1, 2, 64),
        Problem((900,), 1, 1, 32, window=70),
        Problem((300, 50, 33, 128, 70, 9), 2, 2, 64, shared=5, above=(-1, 0, -1, 0, 2, 2)),
    ],
)
def test_the_same_bits_with_any_number_of_threads(problem: Problem) -> None:
    found = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        found.append(results(problem, torch.bfloat16))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@native
def test_matrix_products_of_torch_in_between() -> None:
    """Both set the matrix unit up in their own ways."""
    problem = Problem((200,), 2, 1, 64)
    a, b = torch.randn(256, 512).bfloat16(), torch.randn(512, 384).bfloat16()
    product, expected = a @ b, results(problem, torch.bfloat16)
    for _ in range(3):
        found = results(problem, torch.bfloat16)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(a @ b, product)


@native
def test_torch_agrees_on_plain_causal_attention() -> None:
    """Our distance to float64 is no greater than torch's own."""
    problem = Problem((300,), 2, 1, 64)
    q, k, v, grad = problem.inputs(torch.bfloat16)

    def theirs(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype).transpose(0, 1).unsqueeze(0).requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*inputs, is_causal=True)
        gradients = torch.autograd.grad(out, inputs, grad.to(dtype).transpose(0, 1).unsqueeze(0))
        return [x.detach()[0].transpose(0, 1) for x in (out, *gradients)]

    exact = theirs(torch.float64)
    for mine, its, value in zip(results(problem, torch.bfloat16), theirs(torch.bfloat16), exact, strict=True):
        assert (mine - value).norm() <= 1.2 * (its - value).norm()


@native
def test_long_document() -> None:
    """Sampled rows of 5,000 tokens; scores of all of them would be far more than inputs and outputs."""
    problem = Problem((5000,), 1, 1, 64, window=None)
    q, k, v, _ = problem.inputs(torch.bfloat16)
    out = attention(q, k, v, problem.starts, scale=0.125)
    for row in (0, 31, 32, 2047, 4999):
        scores = 0.125 * (k[: row + 1, 0].double() @ q[row, 0].double())
        expected = scores.softmax(0) @ v[: row + 1, 0].double()
        assert (out[row, 0] - expected).norm() <= 1e-2 * expected.norm()


def test_what_is_kept_for_backward() -> None:
    """Inputs, output, and one number a row: nothing of the size of scores, no copy."""
    problem = Problem((40, 20), 2, 2, 16)
    inputs = [x.requires_grad_() for x in problem.inputs(torch.bfloat16)[:3]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = attention(*inputs, problem.starts, scale=1.0)
    known = {x.data_ptr() for x in (*inputs, out)}
    assert sorted(x.numel() for x in kept if x.data_ptr() not in known) == [3, 60 * 4]


@pytest.mark.parametrize("parents", [False, True], ids=["apart", "continued"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_operators(dtype: torch.dtype, parents: bool) -> None:
    above = (-1, 0) if parents else ()
    problem = Problem((40, 20), 2, 2, 16, shared=3, above=above)
    q, k, v, grad = problem.inputs(dtype)
    rest = (problem.starts, problem.parents, problem.scale, None if parents else 17)
    out, lse = torch.ops.graft.attention(q, k, v, *rest)
    torch.library.opcheck(torch.ops.graft.attention, (q, k, v, *rest))
    torch.library.opcheck(torch.ops.graft.attention_backward, (grad, q, k, v, out, lse, *rest))


def test_gradients_by_differences() -> None:
    problem = Problem((5, 3, 2), 1, 2, 4, shared=2)
    inputs = [x.requires_grad_() for x in problem.inputs(torch.float64)[:3]]

    def run(*x: Tensor) -> Tensor:
        parents = torch.tensor([-1, 0, 0])
        return attention(*x, problem.starts, scale=0.7, window=4, parents=parents)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traced() -> None:
    problem = Problem((40, 20), 2, 2, 16)
    q, k, v, _ = problem.inputs(torch.bfloat16)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, problem.starts, scale=0.25)

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(q, k, v), run(q, k, v))


def test_autocast_decides_the_type() -> None:
    problem = Problem((10,), 1, 1, 16)
    q, k, v, _ = problem.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(q, k.bfloat16(), v, problem.starts, scale=0.25)
    assert torch.equal(found, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), problem.starts, scale=0.25))


def test_a_document_that_continues_another_is_its_end() -> None:
    """Two answers to a prompt give what each gives behind the prompt alone, and so do their gradients."""
    both = Problem((45, 20, 37), 2, 2, 16, above=(-1, 0, 0))
    q, k, v, grad = both.inputs(torch.float64)
    prompt, first, second = range(45), range(45, 65), range(65, 102)
    found = results(both, torch.float64)
    wanted = [torch.zeros_like(each) for each in found]
    for answer in (first, second):
        alone = torch.tensor([*prompt, *answer])
        parts = [x[alone].detach().requires_grad_() for x in (q, k, v)]
        out = attention(*parts, torch.tensor([0, len(alone)]), scale=both.scale)
        upstream = grad[alone] * torch.where(alone < 45, 0.5, 1.0).view(-1, 1, 1)
        gradients = torch.autograd.grad(out, parts, upstream)
        wanted[0][alone] = out.detach()
        for total, gradient in zip(wanted[1:], gradients, strict=True):
            total[alone] += gradient
    for mine, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_without_tokens(dtype: torch.dtype) -> None:
    """An answer that is empty, a prompt that is, and keys before all that nobody's query sees alone."""
    check(Problem((40, 0, 20, 0, 33), 1, 2, 16, shared=3, above=(-1, 0, 0, -1, 3)), dtype)


def test_no_tokens() -> None:
    x = torch.zeros(0, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    out = attention(x, x, x, torch.tensor([0]), scale=1.0)
    out.sum().backward()
    assert out.shape == x.shape and x.grad is not None and x.grad.shape == x.shape


def test_what_does_not_fit_is_refused() -> None:
    q = torch.zeros(4, 3, 16)
    starts = torch.tensor([0, 4])
    for k, bounds, window in (
        (torch.zeros(4, 2, 16), starts, None),
        (torch.zeros(3, 3, 16), starts, None),
        (torch.zeros(4, 3, 8), starts, None),
        (torch.zeros(4, 3, 16), starts.float(), None),
        (torch.zeros(4, 3, 16), starts, 0),
        (torch.zeros(4, 3, 16), torch.tensor([0, 3]), None),
        (torch.zeros(4, 3, 16), torch.tensor([0, 5, 4]), None),
        (torch.zeros(4, 3, 16), torch.tensor([1, 4]), None),
    ):
        with pytest.raises(TrainingError, match="fit together"):
            attention(q, k, k, bounds, scale=1.0, window=window)
    three = torch.tensor([0, 1, 2, 4])
    for parents in ([-1, 0], [-1, 1, 0], [-1, 0, 1], [-2, 0, 0], [-1, 0, 0.0]):
        with pytest.raises(TrainingError, match="fit together"):
            attention(q, q, q, three, scale=1.0, parents=torch.tensor(parents))


def test_why_it_is_not_native() -> None:
    assert "float32" in (attention_is_native(torch.float32, 64) or "")
    assert "300" in (attention_is_native(torch.bfloat16, 300) or "")


@pytest.fixture
def fresh() -> Iterator[None]:
    """A process that has not looked for a library yet."""
    attention_call.library.cache_clear()
    forget_notices()
    yield
    attention_call.library.cache_clear()
    forget_notices()


@pytest.mark.usefixtures("fresh")
def test_switched_off_by_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(compiling.SWITCH, "0")
    assert attention_is_native(torch.bfloat16, 64) == "GRAFT_NATIVE=0"
    check(Problem((40, 20), 2, 2, 16), torch.bfloat16)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_the_definition_runs_and_a_notice_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "find_compiler", lambda: None)
    for _ in range(2):
        check(Problem((40, 20), 2, 2, 16), torch.bfloat16)
    assert "No C compiler" in (attention_is_native(torch.bfloat16, 64) or "")
    assert capsys.readouterr().err.count("plain torch") == 1
