"""The tensor files: the library's own bytes, strict names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from graftlm.core.errors import CheckpointError
from graftlm.training.tensors import read_tensors, tensor_bytes, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(2, 2, dtype=torch.bfloat16),
    "step": torch.tensor(3.0),
    "strided": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "ids": torch.tensor([1, -2]),
    "tiny": torch.tensor([True, False, True]),
    "wide": torch.tensor([0.1], dtype=torch.float64),
    "none": torch.zeros(0, 3),
    "large": torch.arange(1 << 19, dtype=torch.float32),
}


def test_the_library_reads_every_value_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", TENSORS)
    loaded = load_file(tmp_path / "t")
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
        for name, value in TENSORS.items()
    )
    size = (tmp_path / "t").stat().st_size
    assert size <= tensor_bytes(TENSORS) <= size + 4096


def test_float32_files_are_the_librarys_own_bytes(tmp_path: Path) -> None:
    plain = {name: value.contiguous() for name, value in TENSORS.items() if value.dtype == torch.float32}
    plain.pop("none")
    write_tensors(tmp_path / "t", plain)
    assert (tmp_path / "t").read_bytes() == save(plain)
    write_tensors(tmp_path / "empty", {})
    assert load_file(tmp_path / "empty") == {}


def test_everything_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", TENSORS)
    expected = {**TENSORS, "a": torch.ones(2, 2), "b": torch.zeros(3, 2), "new": torch.zeros(1)}
    del expected["ids"]
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path / "t", expected)
    assert caught.value.problems == (
        "a: is BF16 [2, 2], the model has F32 [2, 2]",
        "b: is F32 [2, 3], the model has F32 [3, 2]",
        "ids: unexpected",
        "new: missing",
    )
