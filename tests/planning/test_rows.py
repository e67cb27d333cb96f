"""Workloads from lengths: against the batches that a run really makes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.data.batches import Batches
from graftlm.data.encode import IGNORED, Encoded
from graftlm.planning.base_facts import base_facts
from graftlm.planning.rows import RowLengths
from graftlm.training.recipe import Recipe, make_recipe
from graftlm.training.timeline import Timeline


def recipe(**sections: object) -> Recipe:
    return make_recipe({"model": "sprout", "data": "rows.jsonl", **sections})


def encoded(lengths: list[int]) -> list[Encoded]:
    return [
        Encoded(tuple(range(n)), (IGNORED, *range(1, n)), row, truncated=False)
        for row, n in enumerate(lengths, 1)
    ]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=60),
    size=st.integers(1, 5),
    passes=st.integers(1, 4),
    packing=st.booleans(),
    epochs=st.sampled_from([0.5, 1, 2.5, 3]),
)
def test_steps_and_tokens_are_those_of_real_batches(
    lengths: list[int], size: int, passes: int, packing: bool, epochs: float
) -> None:
    train = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": passes,
        "num_train_epochs": epochs,
    }
    wanted = recipe(data={"path": "rows.jsonl", "max_length": 96, "packing": packing}, train=train)
    found = RowLengths(tuple(lengths), tuple(n - 1 for n in lengths), (5,)).workload(wanted)
    real = Batches(
        encoded(lengths), rows_per_batch=size, max_length=96, packing=packing, seed=1, pad_token_id=0
    )
    assert found.steps == Timeline(real, passes).total_steps(wanted.train)
    assert found.batch_tokens <= real.most_tokens
    widths = [real.batch(0, index).inputs["input_ids"].numel() for index in range(real.count(0))]
    assert found.mean_batch_tokens * real.count(0) >= sum(lengths)
    if size == 1:  # no rows meet, so that no order matters
        assert found.mean_batch_tokens == pytest.approx(sum(widths) / len(widths))
    assert found.train_tokens == sum(lengths)


def test_a_workload_of_max_steps_has_those() -> None:
    rows = RowLengths((10,) * 50, (5,) * 50, (10,))
    assert rows.workload(recipe(train={"max_steps": 7})).steps == 7


def test_rows_are_cut_and_labels_with_them() -> None:
    cut = RowLengths((100, 10), (50, 5), (100,)).cut(40)
    assert (cut.train, cut.targets, cut.held_out) == ((40, 10), (20, 5), (40,))
    assert cut.cut(40) is cut


def test_what_a_run_fills_in_is_filled_in() -> None:
    rows = RowLengths((100,) * 64, (50,) * 64, (100,))
    effective = rows.effective(recipe(), base_facts("sprout"))
    assert effective.data.max_length == base_facts("sprout").context
    assert effective.train.learning_rate == pytest.approx(1.8e-3)
    batch = effective.train.per_device_train_batch_size * effective.train.gradient_accumulation_steps
    assert batch * effective.data.max_length // 100 in range(12, 22)


def test_a_mean_document_is_seen_from_a_token() -> None:
    assert RowLengths((10, 30), (1, 1), ()).workload(recipe()).mean_document == pytest.approx(25.0)
