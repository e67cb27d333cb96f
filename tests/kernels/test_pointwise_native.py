"""The compiled elementwise layers on every path of the C source, with every number of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.core import compiling
from graftlm.core.notices import collected, forget_notices
from graftlm.kernels import pointwise_cpu as layers
from graftlm.kernels import pointwise_reference as definitions
from graftlm.kernels.cross_entropy import linear_cross_entropy
from graftlm.kernels.native import pointwise_call as native

from .compiled import compiled

VARIANTS = {
    "this machine": ("-march=native",),
    "without AVX-512": ("-march=native", "-mno-avx512f"),
    "without instructions of its own": (),
}
NAMES = (
    *("rms_norm", "rms_norm_backward", "rope"),
    *("gated_silu", "gated_silu_backward", "gated_gelu", "gated_gelu_backward"),
)


@pytest.fixture(scope="module", params=VARIANTS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The source compiled for this machine, or for a lesser one."""
    folder = tmp_path_factory.mktemp("built")
    library = compiled(native.SOURCE, *VARIANTS[request.param], folder=folder)
    return native.load(library)


@pytest.fixture
def using(built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: built)


def arguments(name: str, dtype: torch.dtype, rows: int = 5, width: int = 700, heads: int = 3) -> list[Any]:
    random = torch.Generator().manual_seed(width)

    def values(*shape: int) -> Tensor:
        return (3 * torch.randn(shape, generator=random)).to(dtype)

    x, y, z, weight = *(values(rows, width) for _ in range(3)), values(width)
    if name == "rope":
        angle = torch.rand(1, rows, 64, generator=random) * 7
        q, k = values(2, rows, heads, 70).transpose(1, 2), values(2, rows, 1, 70).transpose(1, 2)
        return [q, k, angle.cos().to(dtype), angle.sin().to(dtype), False]
    given: dict[str, list[Any]] = {
        "rms_norm": [x, weight, 1e-6],
        "rms_norm_backward": [y, x, weight, definitions.rms_norm(x, weight, 1e-6)[1]],
        "gated_silu": [x, y],
        "gated_silu_backward": [z, x, y],
        "gated_gelu": [x, y],
        "gated_gelu_backward": [z, x, y],
    }
    return given[name]


def results(form: Callable[..., Tensor | tuple[Tensor, ...]], given: list[Any]) -> tuple[Tensor, ...]:
    found = form(*given)
    return (found,) if isinstance(found, Tensor) else found


@pytest.mark.usefixtures("using")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_each_path_computes_the_definition(name: str, dtype: torch.dtype) -> None:
    given = arguments(name, dtype)
    for mine, its in zip(
        results(getattr(layers, name), given), results(getattr(definitions, name), given), strict=True
    ):
        unit = its.abs().max().item() * 2e-6
        torch.testing.assert_close(mine, its, rtol=torch.finfo(dtype).eps, atol=unit)


@pytest.mark.usefixtures("using")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_path_computes_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=random).to(dtype) for rows in (9, 700))
    given = (hidden, weight, None, torch.randint(700, (9,), generator=random), 4, True)
    loss, gradient = linear_cross_entropy(*given)
    monkeypatch.setattr(native, "library", lambda: None)
    expected, its = linear_cross_entropy(*given)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (gradient - its).float().norm() <= 4 * torch.finfo(dtype).eps * its.float().norm()


@pytest.mark.usefixtures("using")
def test_extreme_gates() -> None:
    """No exponential overflows; what is not a number stays none."""
    gate = torch.tensor([-torch.inf, -3e38, -200.0, -88.0, 0.0, 88.0, 200.0, 3e38, torch.inf, torch.nan])
    for kind in ("silu", "gelu"):
        found = getattr(layers, f"gated_{kind}")(gate[None], torch.ones(1, 10))[0]
        assert found[:4].abs().max() <= 1e-35
        assert torch.equal(found[5:9], gate[5:9]) and found[4] == 0 and found[9].isnan()
        backward = getattr(layers, f"gated_{kind}_backward")
        for mine in backward(torch.ones(1, 9), gate[None, 1:], torch.ones(1, 9)):
            assert bool(torch.isfinite(mine[0, :6]).all()) and mine[0, 8].isnan()


@pytest.mark.parametrize("name", NAMES)
def test_several_threads_write_what_one_writes(name: str) -> None:
    given, threads = arguments(name, torch.bfloat16, rows=301, heads=16), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(results(getattr(layers, name), given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_types_that_it_does_not_compute_are_left_to_the_definition() -> None:
    for dtype in (torch.float16, torch.float64):
        for name in NAMES:
            given = arguments(name, dtype)
            for mine, its in zip(
                results(getattr(layers, name), given), results(getattr(definitions, name), given), strict=True
            ):
                assert torch.equal(mine, its)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not looked for a library yet."""
    native.library.cache_clear()
    forget_notices()
    yield
    native.library.cache_clear()
    forget_notices()


@pytest.mark.usefixtures("fresh")
def test_switched_off_by_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(compiling.SWITCH, "0")
    given = arguments("gated_silu", torch.float32)
    assert torch.equal(layers.gated_silu(*given), definitions.gated_silu(*given))
    assert capsys.readouterr().err == "" and collected() == ()


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_a_notice_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(compiling.SWITCH, raising=False)
    monkeypatch.setattr(compiling, "find_compiler", lambda: None)
    for _ in range(2):
        assert not native.is_native(torch.ones(1))
    assert capsys.readouterr().err.count("plain torch") == 1
