"""Micro-batches as one: below each other, or in one row."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from graftlm.data.batches import Batch, Batches
from graftlm.data.encode import Encoded
from graftlm.data.filled import filled
from graftlm.data.forms import flat
from graftlm.data.joined import beside, joined
from graftlm.data.labels.encode import LabelledRow, collate_labelled
from graftlm.data.labels.records import Labelled

LENGTHS = st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=4)


def made(lengths: list[int], *, packing: bool, start: int) -> Batch:
    """One micro-batch of rows of these lengths, with ids that occur nowhere else."""
    rows, first = [], start
    for number, length in enumerate(lengths):
        ids = tuple(range(first, first + length))
        rows.append(Encoded(ids, (-100, *ids[1:]), start + number, False))
        first += length
    layout = {"max_length": 20, "packing": packing, "seed": 1, "pad_token_id": 0}
    return Batches(rows, rows_per_batch=len(rows), **layout).batch(0, 0)  # type: ignore[arg-type]


@given(LENGTHS, st.booleans())
def test_what_lies_below_each_other_is_flat_as_what_lies_beside(
    lengths: list[list[int]], packing: bool
) -> None:
    batches = [made(each, packing=packing, start=100 * number) for number, each in enumerate(lengths, 1)]
    below, row = flat(joined(batches)), beside([flat(batch) for batch in batches])
    assert below.inputs.keys() == row.inputs.keys()
    assert all(torch.equal(below.inputs[name], row.inputs[name]) for name in row.inputs)
    assert torch.equal(below.labels, row.labels) and below.rows == row.rows
    assert below.target_tokens == row.target_tokens == sum(batch.target_tokens for batch in batches)
    assert below.real_tokens == row.real_tokens == sum(map(sum, lengths))


@given(LENGTHS, st.integers(0, 5))
def test_each_may_be_filled_up_before(lengths: list[list[int]], more: int) -> None:
    batches = [flat(made(each, packing=True, start=100)) for each in lengths]
    wide = [filled(batch, batch.labels.shape[1] + more) for batch in batches]
    row = beside(wide)
    ends = row.inputs["cu_seq_lens_q"].tolist()
    assert ends[-1] == row.labels.shape[1] == sum(map(sum, lengths)) + more * len(lengths)
    assert ends == sorted(set(ends))
    assert int((row.labels != -100).sum()) == row.target_tokens


def test_what_a_kind_of_batch_has_besides_goes_along() -> None:
    def rows(count: int, kinds: tuple[int, ...]) -> list[LabelledRow]:
        return [LabelledRow((5, 6, 7), kinds, (0.0, 1.0), Labelled(("",), (), 0), False)] * count

    first, second = (collate_labelled(rows(*each), 0, 8, "one label") for each in ((2, (0, 1, 1)), (1, ())))
    found = joined([first, second])
    assert type(found) is type(first) and found.targets.tolist() == [1, 1, 1]
    assert found.inputs["token_type_ids"].tolist()[2] == [0] * found.labels.shape[1]
