"""The names and tensors of bitsandbytes: each library reads what the other wrote; damage is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.core.errors import ModelError
from graftlm.kernels.codebooks import codebook, dynamic_map
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import PackedWeight, encode
from graftlm.quant.scheme import Scheme
from graftlm.quant.storage import SUFFIXES, from_tensors, is_packed, stored_dtype, to_tensors

SCHEMES = [
    Scheme("nf4"),
    Scheme("fp4", block_size=128),
    Scheme("nf4", double_quant=False, block_size=4096),
    Scheme("int8"),
    Scheme("fp8"),
    Scheme("fp8_block"),
]
STATE = "weight.quant_state.bitsandbytes__nf4"


def a_weight(shape: tuple[int, int] = (33, 70), dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def same(one: PackedWeight, other: PackedWeight) -> bool:
    return (
        (one.scheme, one.shape, one.tensors.keys()) == (other.scheme, other.shape, other.tensors.keys())
        and all(one.tensors[name].dtype == other.tensors[name].dtype for name in one.tensors)
        and all(torch.equal(one.tensors[name].float(), other.tensors[name].float()) for name in one.tensors)
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_goes_through_a_file(scheme: Scheme, dtype: torch.dtype, tmp_path: Path) -> None:
    packed = encode(a_weight(), scheme)
    tensors = to_tensors(packed, dtype)
    assert set(tensors) <= set(SUFFIXES) and is_packed(tensors)
    save_file(tensors, tmp_path / "one.safetensors")
    read = load_file(tmp_path / "one.safetensors")
    assert same(from_tensors(read), packed)
    assert stored_dtype(read) == (dtype if scheme.is_four_bit else None)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 512])
@pytest.mark.parametrize("shape", [(64, 128), (33, 70), (7, 33), (1, 1)], ids=str)
def test_bitsandbytes_reads_what_we_write_and_we_what_it_writes(
    kind: str, double_quant: bool, block_size: int, shape: tuple[int, int]
) -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    weight = a_weight(shape)
    scheme = Scheme(kind, double_quant=double_quant, block_size=block_size)
    ours = to_tensors(encode(weight, scheme), torch.bfloat16)
    theirs = modules.Params4bit(
        weight.clone(), quant_type=kind, compress_statistics=double_quant, blocksize=block_size
    ).to("cpu")

    written = {"weight": theirs.data} | {
        f"weight.{name}": value for name, value in theirs.quant_state.as_dict(packed=True).items()
    }
    assert same(from_tensors(written), encode(weight, scheme))
    assert stored_dtype(written) == torch.bfloat16
    assert written.keys() == ours.keys()
    for name, tensor in written.items():
        if name != STATE.replace("nf4", kind):
            assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
        else:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(ours[name].tolist()))

    statistics = {name.removeprefix("weight."): value for name, value in ours.items() if name != "weight"}
    read = modules.Params4bit.from_prequantized(ours["weight"], statistics, device="cpu")
    assert read.quant_state == theirs.quant_state
    assert read.quant_state.offset == theirs.quant_state.offset and torch.equal(read.data, theirs.data)


def test_codes_in_a_tensor_of_another_dtype_are_the_same_bytes() -> None:
    tensors = to_tensors(encode(a_weight((64, 64)), Scheme("nf4")), torch.bfloat16)
    wide = {**tensors, "weight": tensors["weight"].view(-1).view(torch.bfloat16).unsqueeze(1)}
    assert same(from_tensors(wide), from_tensors(tensors))


def test_8_bit_weights_of_bitsandbytes_are_read() -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    layer = modules.Linear8bitLt(70, 33, has_fp16_weights=False)
    layer.weight = modules.Int8Params(a_weight(dtype=torch.float16), requires_grad=False)
    written = {name: value for name, value in layer.to("cpu").state_dict().items() if name != "bias"}
    ours = to_tensors(encode(a_weight(dtype=torch.float16), Scheme("int8")), torch.float16)
    assert written.keys() == ours.keys()
    assert all(torch.equal(written[name], ours[name]) for name in ours)
    assert same(from_tensors(written), encode(a_weight(dtype=torch.float16), Scheme("int8")))


@pytest.mark.parametrize("scales", [torch.tensor(0.5), torch.full((33,), 0.5), torch.full((33, 1), 0.5)])
def test_scales_of_float8_come_by_row_by_column_of_rows_or_as_one(scales: Tensor) -> None:
    codes = a_weight().to(torch.float8_e4m3fn)
    read = from_tensors({"weight": codes, "weight_scale": scales})
    assert torch.equal(read.decode(), codes.float() * 0.5)


class Foreign:
    """A weight whose scales were quantised with another map or another block size."""

    @staticmethod
    def of(table: Tensor, block: int) -> tuple[dict[str, Tensor], Tensor]:
        """The stored tensors, and the values they stand for."""
        plain = encode(a_weight((40, 64)), Scheme("nf4", double_quant=False))
        tensors = to_tensors(plain, torch.bfloat16)
        random = torch.Generator().manual_seed(3)
        codes = torch.randint(0, 256, (40,), dtype=torch.uint8, generator=random)
        inner = torch.rand(-(-40 // block), generator=random)
        state = json.loads(bytes(tensors[STATE].tolist()))
        state |= {"nested_blocksize": block, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors |= {
            "weight.absmax": codes,
            "weight.nested_absmax": inner,
            "weight.nested_quant_map": table,
            STATE: as_text(state),
        }
        scales = table[codes.int()] * inner.repeat_interleave(block)[:40] + 0.25
        both = torch.stack([plain.tensors["codes"] >> 4, plain.tensors["codes"] & 15], 1).view(40, 64)
        return tensors, codebook("nf4")[both.int()] * scales.unsqueeze(1)


@pytest.mark.parametrize(
    ("table", "block"),
    [
        (dynamic_map().clone().index_fill_(0, torch.tensor(0), -1.0), 256),
        (torch.linspace(-1, 1, 256), 256),
        (dynamic_map(), 32),
    ],
    ids=["one value", "linear", "block"],
)
def test_scales_with_a_map_or_block_of_their_own_keep_their_values(table: Tensor, block: int) -> None:
    tensors, values = Foreign.of(table, block)
    read = from_tensors(tensors)
    assert read.scheme == Scheme("nf4", double_quant=False)
    assert torch.equal(read.decode(), values)


def as_text(state: Any) -> Tensor:
    text = state if isinstance(state, str) else json.dumps(state)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def described(**changes: Any) -> dict[str, Any]:
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [33, 70],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.1,
    }
    return {name: value for name, value in (state | changes).items() if value != "absent"}


DESCRIPTIONS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{quant_type", "not JSON"),
    "not UTF-8": (torch.full((9,), 255, dtype=torch.uint8), "not JSON"),
    "too deep": ("[" * 4000, "description"),
    "too long": ("x" * 5000, "not a short text"),
    "other dtype": (torch.ones(9), "not a short text"),
    "a list": ("[1, 2]", "impossible quant_type, blocksize"),
    "a number": ("7", "impossible"),
    "another kind": (described(quant_type="fp4"), "'nf4' in one place and 'fp4'"),
    "an unknown kind": (described(quant_type="af4"), "impossible quant_type"),
    "no kind": (described(quant_type="absent"), "impossible quant_type"),
    "a kind of list": (described(quant_type=["nf4"]), "impossible quant_type"),
    "a block of 63": (described(blocksize=63), "impossible blocksize"),
    "a block of 0": (described(blocksize=0), "impossible blocksize"),
    "a block of true": (described(blocksize=True), "impossible blocksize"),
    "a block of text": (described(blocksize="64"), "impossible blocksize"),
    "a dtype of integers": (described(dtype="int64"), "impossible dtype"),
    "a dtype that is an attribute": (described(dtype="__name__"), "impossible dtype"),
    "a shape of one": (described(shape=[2310]), "impossible shape"),
    "a shape of three": (described(shape=[33, 10, 7]), "impossible shape"),
    "a negative shape": (described(shape=[-33, -70]), "impossible shape"),
    "an endless shape": (described(shape=[2**62, 2**62]), "impossible shape"),
    "a huge shape": (described(shape=[2**40, 70]), "with codes"),
    "a shape of fractions": (described(shape=[33.0, 70.0]), "impossible shape"),
    "another shape": (described(shape=[70, 34]), "with codes"),
    "no shape": (described(shape=None), "impossible shape"),
    "an offset of NaN": (described(nested_offset=float("nan")), "impossible nested_offset"),
    "an infinite offset": (described(nested_offset=float("inf")), "impossible nested_offset"),
    "an offset of text": (described(nested_offset="0.1"), "impossible nested_offset"),
    "no offset": (described(nested_offset="absent"), "impossible nested_offset"),
    "a nested block of 0": (described(nested_blocksize=0), "impossible nested_blocksize"),
    "a nested block of billions": (described(nested_blocksize=2**47), "impossible nested_blocksize"),
    "no nested fields": (described(nested_offset="absent", nested_blocksize="absent"), "with scales"),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_hostile_description_is_refused_by_name(case: str) -> None:
    state, message = DESCRIPTIONS[case]
    tensors = to_tensors(encode(a_weight(), Scheme("nf4")), torch.bfloat16)
    tensors[STATE] = state if isinstance(state, Tensor) else as_text(state)
    with pytest.raises(ModelError, match=message) as caught:
        from_tensors(tensors, name="model.q_proj.weight")
    assert "The quantised weight model.q_proj.weight" in caught.value.seen


def test_equal_sizes_in_bytes_but_not_in_shape_are_refused() -> None:
    tensors = to_tensors(encode(a_weight(), Scheme("nf4")), torch.bfloat16)
    assert from_tensors({**tensors, STATE: as_text(described(shape=[70, 33]))}).shape == (70, 33)
    layer = QuantisedLinear(encode(a_weight(), Scheme("nf4")), None, torch.bfloat16)
    with pytest.raises(ModelError, match=r"is a \[70, 33\]; the layer takes \[33, 70\]"):
        layer.fill(from_tensors({**tensors, STATE: as_text(described(shape=[70, 33]))}))


CHANGES: dict[str, tuple[str, Tensor | None, str]] = {
    "codes too short": ("weight", torch.zeros(10, 1, dtype=torch.uint8), "with codes"),
    "codes too long": ("weight", torch.zeros(9999, 1, dtype=torch.uint8), "with codes"),
    "no codes": ("weight", None, "has no tensor 'weight'"),
    "no scales": ("weight.absmax", None, "has no tensor 'weight.absmax'"),
    "scales too short": ("weight.absmax", torch.zeros(3, dtype=torch.uint8), "with scales"),
    "plain scales": ("weight.absmax", torch.zeros(37), "with scales"),
    "no map": ("weight.quant_map", None, "has no tensor 'weight.quant_map'"),
    "the map of fp4": ("weight.quant_map", codebook("fp4"), "map of codes"),
    "a short map": ("weight.quant_map", torch.zeros(4), "map of codes"),
    "no nested scales": ("weight.nested_absmax", None, "has no tensor"),
    "nested scales of NaN": ("weight.nested_absmax", torch.tensor([torch.nan]), "NaN or infinite"),
    "nested scales too many": ("weight.nested_absmax", torch.ones(2), "with scale_scales"),
    "no nested map": ("weight.nested_quant_map", None, "has no tensor"),
    "a short nested map": ("weight.nested_quant_map", torch.ones(3), "do not fit their own map"),
    "nothing real": ("weight", torch.zeros(1155, 1, dtype=torch.uint8, device="meta"), "meta device"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_tensors_that_contradict_each_other_are_refused(case: str) -> None:
    name, tensor, message = CHANGES[case]
    tensors = to_tensors(encode(a_weight(), Scheme("nf4")), torch.bfloat16)
    changed = {key: value for key, value in {**tensors, name: tensor}.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        from_tensors(changed, name="w")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_8_bit_tensors_that_contradict_each_other_are_refused(kind: str) -> None:
    tensors = to_tensors(encode(a_weight(), Scheme(kind)), torch.bfloat16)
    scales = "SCB" if kind == "int8" else "weight_scale"
    with pytest.raises(ModelError, match="with scales"):
        from_tensors({**tensors, scales: torch.ones(34)})
    with pytest.raises(ModelError, match="NaN or infinite"):
        from_tensors({**tensors, scales: torch.full((33,), torch.inf)})
    with pytest.raises(ModelError, match="no scales of a kind known here"):
        from_tensors({"weight": tensors["weight"]})
    with pytest.raises(ModelError, match="no scales of a kind known here"):
        from_tensors({**tensors, "weight": a_weight()})
    with pytest.raises(ModelError, match="with scales"):
        from_tensors({"weight": a_weight().to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(33)})
    with pytest.raises(ModelError, match=r"codes of shape \[2310\]"):
        from_tensors({**tensors, "weight": tensors["weight"].flatten()})


def test_a_file_of_large_layers_holds_at_most_4_13_bits_per_parameter(tmp_path: Path) -> None:
    """The attention of an 8B model. Each layer brings 1.3 KB of maps and names, which small ones feel."""
    shapes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
    layers = {name: torch.empty(shape).normal_(0, 0.02).bfloat16() for name, shape in shapes.items()}
    count = sum(weight.numel() for weight in layers.values())
    packed = {name: encode(weight, Scheme("nf4")) for name, weight in layers.items()}
    in_memory = sum(
        tensor.untyped_storage().nbytes() for one in packed.values() for tensor in one.tensors.values()
    )
    tensors = {
        f"model.layers.31.self_attn.{name}.{suffix}": tensor
        for name, one in packed.items()
        for suffix, tensor in to_tensors(one, torch.bfloat16).items()
    }
    save_file(tensors, tmp_path / "layers.safetensors")
    on_disk = (tmp_path / "layers.safetensors").stat().st_size
    assert 8 * in_memory / count <= 4.1272
    assert 8 * on_disk / count <= 4.13
