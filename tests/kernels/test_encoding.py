"""Packing weights: bitsandbytes to the bit, in memory that does not grow with the weight."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graftlm.kernels import decoding
from graftlm.kernels.codebooks import codebook, dynamic_map
from graftlm.kernels.encoding import (
    encode_blocks,
    encode_rows_fp8,
    encode_rows_int8,
    encode_scales,
    encode_tiles_fp8,
)

library = pytest.importorskip("bitsandbytes.functional")
# Its definition in plain torch; wrapped, it would be compiled for every new shape.
library_decode = inspect.unwrap(
    pytest.importorskip("bitsandbytes.backends.default.ops")._dequantize_4bit_compute
)

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONTENTS = ("normal", "constant", "zero", "subnormal", "tiny", "huge", "sparse", "outlier", "borders")


def numbers(content: str, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """What a weight may hold; huge is what the dtype can."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=draw)
    largest = 1e4 if dtype == torch.float16 else 1e34
    made = {
        "normal": normal,
        "constant": normal[:1].expand(count),
        "zero": torch.zeros(count),
        "subnormal": normal * (6e-8 if dtype == torch.float16 else 1e-40),
        "tiny": normal * (1e-5 if dtype == torch.float16 else 1e-37),
        "huge": normal * largest,
        "sparse": normal * (torch.rand(count, generator=draw) < 0.1),
        "outlier": torch.cat([normal[1:] * 1e-3, torch.tensor([-50.0])]),
        "borders": borders()[torch.randint(len(borders()), (count,), generator=draw)],
    }
    return made[content].to(dtype)


def borders() -> Tensor:
    """Exactly halfway between two values, and right beside that."""
    values = torch.cat([codebook("nf4"), codebook("fp4").unique()])
    halfway = (values[:-1] + values[1:]) / 2
    beside = [torch.nextafter(halfway, torch.tensor(end)) for end in (-2.0, 2.0)]
    return torch.cat([halfway, *beside, values]).clamp(-1, 1)


weights = st.builds(
    lambda content, shape, dtype, seed: numbers(content, math.prod(shape), dtype, seed).view(shape),
    st.sampled_from(CONTENTS),
    st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 300)),
        st.sampled_from([(1, 1), (1, 64), (3, 64), (7, 33), (64, 64), (300, 64), (5, 4100)]),
    ),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
schemes = st.tuples(st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKS))


def library_scales(state: Any) -> Tensor:
    """The scales of a 4-bit weight in float32, read by the library."""
    if not state.nested:
        return state.absmax
    return library.dequantize_blockwise(state.absmax, state.state2) + state.offset


@settings(max_examples=400, deadline=None)
@given(weight=weights, scheme=schemes)
def test_4_bit_codes_scales_and_values_are_those_of_bitsandbytes(
    weight: Tensor, scheme: tuple[str, int]
) -> None:
    kind, block = scheme
    given_codes, state = library.quantize_4bit(weight, quant_type=kind, blocksize=block)
    codes, scales = encode_blocks(weight, kind, block)
    assert torch.equal(codes, given_codes.flatten())
    assert torch.equal(scales, state.absmax)

    _, nested = library.quantize_4bit(weight, quant_type=kind, blocksize=block, compress_statistics=True)
    scale_codes, scale_scales, offset = encode_scales(scales)
    assert torch.equal(scale_codes, nested.absmax)
    assert torch.equal(scale_scales, nested.state2.absmax)
    assert torch.equal(offset, nested.offset)
    assert torch.equal(nested.state2.code, dynamic_map()) and torch.equal(nested.code, codebook(kind))

    for stored, theirs in (
        ([codes, scales], state),
        ([codes, scale_codes, scale_scales, offset], nested),
    ):
        read = library_scales(theirs)
        assert torch.equal(decoding.plain_scales(stored), read)
        for dtype in DTYPES:
            ours = decoding.decode(stored, kind, block, *weight.shape, dtype)
            table = codebook(kind)
            assert torch.equal(ours, library_decode(codes, read, table, block, weight.shape, dtype))
            if dtype == weight.dtype and reads_natively(weight, block):
                native = library.dequantize_4bit(given_codes, theirs).view_as(
                    ours
                )  # one byte comes as [n, 1]
                assert torch.equal(without_subnormals(ours), without_subnormals(native))


def reads_natively(weight: Tensor, block: int) -> bool:
    """Whether the library's own kernel reads it, and reads it right: the one for AVX-512 takes every row to
    begin a block, so that it reads wrong scales where a row is no whole number of blocks."""
    columns = weight.shape[1]
    return columns % 2 == 0 and block < 2048 and (columns % 16 != 0 or columns % block == 0)


def without_subnormals(values: Tensor) -> Tensor:
    """The instruction that the library rounds to bfloat16 with makes zeros of them."""
    smallest = 1.2e-38 if values.dtype == torch.bfloat16 else 0.0
    return torch.where(values.abs() < smallest, 0.0, values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_border_between_two_codes_is_where_the_library_has_it(kind: str) -> None:
    near = borders()
    steps = torch.linspace(-1, 1, 40_001)
    values = torch.cat([near, steps, steps * 0.01])
    values = torch.cat([values, values.new_zeros(-len(values) % 63)]).view(-1, 63)
    values = torch.cat([torch.ones(len(values), 1), values], dim=1)  # every scale is one
    codes, scales = encode_blocks(values, kind, 64)
    assert (scales == 1).all()
    assert torch.equal(codes, library.quantize_4bit(values, quant_type=kind, blocksize=64)[0].flatten())


def test_the_table_of_scale_codes_is_that_of_the_library_at_every_step() -> None:
    steps = (torch.arange(2**16) + 0.5) / (2**16 - 1) * 2 - 1
    near = [steps, torch.nextafter(steps, torch.tensor(-2.0)), torch.nextafter(steps, torch.tensor(2.0))]
    half = torch.cat(near).clamp(-1, 1).view(-1, 128)
    half[:, 0] = 1.0
    values = torch.cat([half, -half], dim=1).flatten()  # every scale is one, and the mean next to nothing
    offset = values.mean()
    assert abs(offset) < 1e-9
    expected, state = library.quantize_blockwise(values - offset, blocksize=256)
    codes, scales, ours = encode_scales(values)
    assert torch.equal(codes, expected) and torch.equal(scales, state.absmax) and torch.equal(ours, offset)


@settings(max_examples=200, deadline=None)
@given(weight=weights)
def test_8_bit_codes_scales_and_values_are_those_of_bitsandbytes(weight: Tensor) -> None:
    largest = weight.abs().amax(dim=1).float()
    weight = weight[(largest == 0) | (largest > 1e-36)]  # below that, the library gives anything
    assume(len(weight))
    codes, scales = encode_rows_int8(weight)
    given_codes, given_scales, _ = library.int8_vectorwise_quant(weight.clone())
    assert torch.equal(codes, given_codes) and torch.equal(scales, given_scales)
    values = decoding.decode([codes, scales], "int8", 64, *weight.shape, torch.float32)
    assert torch.equal(values, library.int8_vectorwise_dequant(codes, scales))


def test_rows_too_small_for_8_bits_become_zero_and_not_noise() -> None:
    weight = torch.tensor([[1e-40, -3e-39], [1e-3, 1.0]])
    codes, scales = encode_rows_int8(weight)
    assert codes[0].tolist() == [0, 0] and codes[1].tolist() == [0, 127]
    values = decoding.decode([codes, scales], "int8", 64, 2, 2, torch.float32)
    assert (values[0] == 0).all() and values[1, 1] == 1


@settings(max_examples=200, deadline=None)
@given(weight=weights)
def test_float8_is_off_by_one_part_in_16_at_most(weight: Tensor) -> None:
    codes, scales = encode_rows_fp8(weight)
    values = decoding.decode([codes, scales], "fp8", 64, *weight.shape, torch.float64)
    wide, unit = weight.double(), scales.double().unsqueeze(1)
    assert torch.isfinite(codes.float()).all() and (scales > 0).all()
    # Half a step: 2^-4 of a normal number, half of the smallest subnormal one (2^-9) under that.
    assert ((values - wide).abs() <= torch.maximum(wide.abs() / 16, unit / 1024) * 1.001).all()


@settings(max_examples=100, deadline=None)
@given(weight=weights)
def test_float8_by_tiles_is_float8_of_each_tile(weight: Tensor) -> None:
    """Every tile alone, as one row, has the same codes and scale."""
    codes, scales = encode_tiles_fp8(weight)
    values = decoding.decode([codes, scales], "fp8_block", 64, *weight.shape, torch.float32)
    assert scales.shape == (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for i, rows in enumerate(scales):
        for j, scale in enumerate(rows):
            tile = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            alone, own = encode_rows_fp8(weight[tile].reshape(1, -1))
            assert torch.equal(own[0], scale)
            assert torch.equal(codes[tile].float().flatten(), alone.float()[0])
            assert torch.equal(values[tile], codes[tile].float() * scale)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(512, 1024), (1021, 1023), (3, 400_001)])
def test_pieces_leave_no_seam(kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, state = library.quantize_4bit(weight, quant_type=kind, blocksize=64)
    ours = encode_blocks(weight, kind, 64)
    assert torch.equal(ours[0], codes.flatten()) and torch.equal(ours[1], state.absmax)
    assert torch.equal(encode_blocks(weight.t().contiguous().t(), kind, 64)[0], ours[0])


def test_rows_come_in_pieces_without_a_seam() -> None:
    weight = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    for encode in (encode_rows_int8, encode_rows_fp8):
        codes, scales = encode(weight)
        for row in (0, 130, 131, 699):
            alone = encode(weight[row : row + 1])
            assert torch.equal(codes[row].float(), alone[0][0].float())
            assert torch.equal(scales[row], alone[1][0])


class Allocations(TorchDispatchMode):
    """The largest piece of memory that any operation returns, in bytes; `given` does not count."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given, self.largest = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() != self.given:
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return out


BY_KIND = {"int8": encode_rows_int8, "fp8": encode_rows_fp8, "fp8_block": encode_tiles_fp8}


@pytest.mark.parametrize("kind", ["nf4", "fp4", *BY_KIND])
def test_nothing_larger_than_the_codes_is_made_on_the_way(kind: str) -> None:
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Allocations(weight) as seen:
        if kind in ("nf4", "fp4"):
            encode_blocks(weight, kind, 64)
        else:
            BY_KIND[kind](weight)
    assert seen.largest <= weight.numel() // (2 if kind in ("nf4", "fp4") else 1)


def test_what_is_not_finite_shows_in_the_scales_only() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.randn(4, 64)
        weight[2, 7] = bad
        _, scales = encode_blocks(weight, "nf4", 64)
        assert torch.isfinite(scales).tolist() == [True, True, False, True]
