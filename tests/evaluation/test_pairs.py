"""What an encoder-decoder is measured by, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graftlm.data.pairs import Pair
from graftlm.evaluation.pairs import pair_losses
from graftlm.models.encoder_decoder import decoder_ids
from graftlm.testing.models import VOCABULARY, tiny


def pairs(model: Any, count: int = 11) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for row in range(1, count + 1):
        source = torch.randint(3, VOCABULARY, (1 + 5 * row % 13,), generator=generator).tolist()
        target = torch.randint(3, VOCABULARY, (1 + row % 6,), generator=generator).tolist()
        found.append(Pair(tuple(source), tuple(target), decoder_ids(model, target), row, False))
    return found


@torch.no_grad()
def alone(model: Any, row: Pair) -> float:
    logits = model(
        input_ids=torch.tensor([row.source]), decoder_input_ids=torch.tensor([row.decoder])
    ).logits[0]
    return float(F.cross_entropy(logits.double(), torch.tensor(row.target), reduction="sum"))


@pytest.mark.parametrize("kind", ["bart", "t5", "t5-nf4"])
@pytest.mark.parametrize("rows_per_batch", [1, 4, 16])
def test_each_row_as_if_alone(kind: str, rows_per_batch: int) -> None:
    model = tiny(kind)
    rows = pairs(model)
    found = pair_losses(model, rows, rows_per_batch=rows_per_batch)
    assert found.complete and found.path == "head in chunks"
    assert [each.index for each in found.rows] == list(range(len(rows)))
    for row, each in zip(rows, found.rows, strict=True):
        assert each.tokens == len(row.target)
        assert each.loss_sum == pytest.approx(alone(model, row), rel=2e-5)


def test_a_stop_is_heard() -> None:
    model = tiny("bart")
    found = pair_losses(model, pairs(model), rows_per_batch=2, should_stop=lambda: True)
    assert not found.complete and not found.rows


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("bart").train()
    pair_losses(model, pairs(model))
    assert model.training and not model.lm_head._forward_pre_hooks
