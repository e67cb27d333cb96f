"""The compiled reader of packed weights equals its definition to the bit, on every path of the C source."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.core import compiling
from graftlm.core.notices import collected, forget_notices
from graftlm.kernels import decoding
from graftlm.kernels.native import call
from graftlm.kernels.quantised import decode

from .compiled import compiled

KINDS = ("nf4", "fp4", "int8", "fp8", "fp8_block")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Problem = tuple[list[Tensor], str, int, int, int]

needs_compiler = pytest.mark.skipif(compiling.find_compiler() is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("source", sorted(Path(call.__file__).parent.glob("*.c")), ids=lambda path: path.stem)
def test_every_source_compiles_as_it_is_in_use(source: Path) -> None:
    assert ctypes.CDLL(str(compiling.build(source, threads=False)))


EDGES = (
    *(0.0, 65504.0, 65519.996, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 1e-40, 3e38),
    *(torch.inf, torch.nan),
)


def every_size(count: int, random: torch.Generator) -> Tensor:
    """Scales: usual ones, ties in 16 bits, and such that products overflow, are subnormal or vanish."""
    usual = 0.02 * torch.exp(torch.empty(count).normal_(generator=random))
    wild = torch.exp(torch.empty(count).uniform_(-45, 20, generator=random))
    ties = ((wild.view(torch.int32) & -0x10000) | 0x8000).view(torch.float32)
    half_ties = ((usual.view(torch.int32) & -0x2000) | 0x1000).view(torch.float32)
    edges = torch.tensor(EDGES)[torch.randint(len(EDGES), (count,), generator=random)]
    choice = torch.randint(5, (1, count), generator=random)
    return torch.stack([usual, wild, ties, half_ties, edges]).gather(0, choice)[0]


def stored_weight(kind: str, rows: int, columns: int, block: int, *, nested: bool, seed: int) -> list[Tensor]:
    """Random codes and scales."""
    random = torch.Generator().manual_seed(seed)

    def codes(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=random)

    if not kind.endswith("4"):
        both = codes(rows * columns).view(rows, columns)
        code_type = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        down, across = -(-rows // decoding.TILE), -(-columns // decoding.TILE)
        scales = every_size(down * across if kind == "fp8_block" else rows, random)
        return [both.view(code_type), scales.view(down, across) if kind == "fp8_block" else scales]
    blocks = -(-rows * columns // block)
    packed = codes(-(-rows * columns // 2))
    if not nested:
        return [packed, every_size(blocks, random)]
    return [packed, codes(blocks), every_size(-(-blocks // 256), random), torch.tensor(0.02)]


def same_bits(ours: Tensor, definition: Tensor) -> bool:
    """Equal to the bit; any NaN equals any other."""
    kind = torch.int32 if ours.dtype == torch.float32 else torch.int16
    equal = ours.view(kind) == definition.view(kind)
    return bool((equal | (ours.isnan() & definition.isnan())).all())


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kind, block = draw(st.sampled_from(KINDS)), draw(st.sampled_from([32, 64, 128, 4096]))
    rows, columns = draw(st.integers(1, 40) | st.integers(125, 140)), draw(st.integers(1, 900))
    nested, seed = draw(st.booleans()), draw(st.integers(0, 2**31))
    return stored_weight(kind, rows, columns, block, nested=nested, seed=seed), kind, block, rows, columns


VARIANTS = {
    "this machine": ("-march=native",),
    "without AVX-512": ("-march=native", "-mno-avx512f"),
    "without instructions of its own": (),
}


@pytest.fixture(scope="module", params=VARIANTS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The source compiled for this machine, or for a lesser one."""
    folder = tmp_path_factory.mktemp("built")
    library = compiled(call.SOURCE, *VARIANTS[request.param], folder=folder)
    return call.load(library)


@pytest.fixture
def using(built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "library", lambda: built)


@given(problems(), st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None)
def check_decode(problem: Problem, dtype: torch.dtype) -> None:
    assert call.reader(*problem, dtype) is not None
    assert same_bits(decode(*problem, dtype), decoding.decode(*problem, dtype))


@pytest.mark.usefixtures("using")
def test_values_equal_the_definition_to_the_bit() -> None:
    check_decode()


@pytest.mark.usefixtures("using")
def test_quantised_scales_are_rounded_twice() -> None:
    """After the product and after the sum: a fused multiply-add differs in the last place of some."""
    stored = stored_weight("nf4", 64, 512, 32, nested=True, seed=3)
    stored[2] = torch.tensor([0.013, 0.0071, 0.0117, 0.0213])
    problem = (stored, "nf4", 32, 64, 512)
    assert same_bits(decode(*problem, torch.float32), decoding.decode(*problem, torch.float32))


@given(problems(), st.sampled_from(DTYPES), st.data())
@settings(max_examples=40, deadline=None)
def check_parts(problem: Problem, dtype: torch.dtype, data: st.DataObject) -> None:
    _, _, _, rows, columns = problem
    weight = call.reader(*problem, dtype)
    assert weight is not None
    first = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    last = data.draw(st.integers(first[0] + 1, rows)), data.draw(st.integers(first[1] + 1, columns))
    out = torch.full((last[0] - first[0], last[1] - first[1]), 7.0, dtype=dtype)
    weight.read(out, range(first[0], last[0]), range(first[1], last[1]))
    whole = decoding.decode(*problem, dtype)
    assert same_bits(out, whole[first[0] : last[0], first[1] : last[1]].contiguous())


@pytest.mark.usefixtures("using")
def test_any_part_of_the_weight_can_be_read() -> None:
    check_parts()


@pytest.mark.usefixtures("using")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 63, 4200])
def test_products_use_the_rounded_weight(kind: str, columns: int) -> None:
    for dtype in DTYPES:
        check_products(kind, columns, dtype)


def check_products(kind: str, columns: int, dtype: torch.dtype) -> None:
    stored = stored_weight(kind, 9, columns, 64, nested=True, seed=columns)
    stored[1] = torch.full_like(stored[1], 100 if kind.endswith("4") else 0.01)
    if kind.endswith("4"):
        stored[2].fill_(0.05)
    if kind.startswith("fp8"):
        codes = stored[0].view(torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = call.reader(stored, kind, 64, 9, columns, dtype)
    assert weight is not None
    dense = decoding.decode(stored, kind, 64, 9, columns, dtype).double()
    size = x.double().abs() @ dense.abs().T
    assert ((weight.multiply(x).double() - x.double() @ dense.T).abs() <= 3e-6 * size).all()


@needs_compiler
def test_several_threads_write_what_one_writes() -> None:
    problem = (stored_weight("nf4", 301, 515, 64, nested=True, seed=0), "nf4", 64, 301, 515)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = decode(*problem, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(several, decoding.decode(*problem, torch.bfloat16))


def test_what_does_not_fit_is_left_to_the_definition() -> None:
    """The compiled code trusts sizes: nothing may reach it that it would read past the end of."""
    stored = stored_weight("nf4", 4, 64, 64, nested=True, seed=0)
    assert call.reader(stored, "nf4", 64, 5, 64, torch.float32) is None
    assert call.reader(stored[:2], "nf4", 64, 4, 64, torch.float32) is None
    assert call.reader(stored, "nf4", 64, 4, 64, torch.float64) is None
    strided = torch.zeros(256, dtype=torch.uint8)[::2]
    assert call.reader([strided, *stored[1:]], "nf4", 64, 4, 64, torch.float32) is None
    wide = decode(stored, "nf4", 64, 4, 64, torch.float64)
    assert torch.equal(wide, decoding.decode(stored, "nf4", 64, 4, 64, torch.float64))


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has not looked for a library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compiling.SWITCH, raising=False)
    call.library.cache_clear()
    forget_notices()
    yield tmp_path / "graft" / "kernels"
    call.library.cache_clear()
    forget_notices()


def test_without_a_compiler_the_definition_runs_and_a_notice_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    problem = (stored_weight("nf4", 3, 70, 64, nested=True, seed=0), "nf4", 64, 3, 70)
    for _ in range(2):
        assert torch.equal(decode(*problem, torch.bfloat16), decoding.decode(*problem, torch.bfloat16))
    said = capsys.readouterr().err
    assert said.count("plain torch") == 1
    assert "apt install gcc" in said


def test_switched_off_by_the_user(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(compiling.SWITCH, "0")
    assert call.library() is None
    assert not fresh.exists()
    assert capsys.readouterr().err == "" and collected() == ()
