from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.core.errors import ModelError
from graftlm.models.tensor_files import DTYPES, read_headers


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (24,), dtype=torch.uint8, generator=generator)
    tensors = {name: raw.clone().view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    tensors |= {
        "BOOL": raw > 100,
        "matrix": torch.randn(5, 7),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_what_is_read_is_what_safetensors_reads(file: Path) -> None:
    expected, found = load_file(file), read_headers([file])
    assert found.keys() == expected.keys()
    for name, stored in found.items():
        tensor = stored.read()
        assert (stored.dtype, stored.shape) == (expected[name].dtype, tuple(expected[name].shape))
        assert tensor.dtype == stored.dtype and tensor.shape == expected[name].shape
        same = tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8)
        assert torch.equal(*same), name


def test_a_tensor_is_memory_of_its_own(file: Path) -> None:
    stored = read_headers([file])["matrix"]
    first = stored.read()
    first.zero_()
    assert stored.read().abs().sum() > 0


def test_a_name_in_two_files(file: Path) -> None:
    other = file.with_name("other.safetensors")
    other.write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="twice") as caught:
        read_headers([file, other])
    assert "model.safetensors and other.safetensors" in caught.value.problems[0]


def rewrite(file: Path, change: dict[str, object]) -> None:
    """Replace fields of the tensor `matrix` in the header, whatever that makes of the file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["matrix"] |= change
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [5, 8]},
        {"shape": [-5, -7]},
        {"shape": [10**9, 10**9]},
        {"shape": "5x7"},
        {"shape": [True, 35]},
        {"data_offsets": [0, 140]},
        {"data_offsets": [10**12, 10**12 + 140]},
        {"data_offsets": [4]},
        {"dtype": "F4"},
        {"dtype": None},
    ],
)
def test_a_header_that_contradicts_itself(file: Path, change: dict[str, object]) -> None:
    rewrite(file, change)
    with pytest.raises(ModelError) as caught:
        read_headers([file])
    assert str(file) in caught.value.seen and caught.value.fix


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="cut short"):
        read_headers([file])


def test_a_file_that_shrinks_between_header_and_tensor(file: Path) -> None:
    last = max(read_headers([file]).values(), key=lambda stored: stored.start)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="1 bytes less"):
        last.read()


def test_any_damage_of_the_header_is_an_error_or_harmless(file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    chance = random.Random(0)
    for _ in range(300):
        place, value = chance.randrange(8 + length), chance.randrange(256)
        file.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        try:
            for stored in read_headers([file]).values():
                stored.read()
        except ModelError as error:
            assert error.fix
