"""Random state: seeded, captured and put back through JSON."""

from __future__ import annotations

import json
import random

import numpy
import pytest
import torch

from graftlm.core.seeding import capture_rng, restore_rng, seed_everything


def draw() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.random(),
        numpy.random.standard_normal(),
        torch.rand(3).tolist(),
        torch.nn.functional.dropout(torch.ones(64)).tolist(),
        torch.randn(5).tolist(),
    ]


def test_the_same_seed_gives_the_same_numbers() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(2**32 + 6)
    assert draw() != first


def test_state_survives_json_and_is_not_moved_by_capturing() -> None:
    seed_everything(1)
    draw()
    state = json.loads(json.dumps(capture_rng(), allow_nan=False))
    first = draw()
    assert restore_rng(state) == [] and draw() == first
    assert restore_rng(state) == [] and capture_rng() == state


def test_a_missing_gpu_is_told() -> None:
    state = capture_rng()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    state["cuda"] = ["AAAA"]
    assert "1 GPUs" in restore_rng(state)[0]


@pytest.mark.gpu
def test_gpu_state_is_put_back() -> None:
    torch.rand(1, device="cuda")
    state = json.loads(json.dumps(capture_rng()))
    first = torch.rand(8, device="cuda")
    assert restore_rng(state) == [] and torch.equal(torch.rand(8, device="cuda"), first)
