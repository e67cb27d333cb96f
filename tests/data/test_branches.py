"""Prompts with several answers in one line: what a batch holds, and its forms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core.errors import DataError
from graftlm.data.branches import BranchBatch, Branched, apart, branch_batch, sources
from graftlm.data.encode import IGNORED
from graftlm.data.filled import filled
from graftlm.data.forms import DOCUMENTS, PARENTS, document_mask, flat, for_attention

FLOAT = torch.float32
TOKEN = st.integers(1, 99)


@st.composite
def branched(draw: st.DrawFn) -> list[Branched]:
    answers = st.lists(st.lists(TOKEN, max_size=5).map(tuple), min_size=1, max_size=4).map(tuple)
    prompt = st.lists(TOKEN, min_size=1, max_size=6).map(tuple)
    count = draw(st.integers(1, 4))
    return [Branched(draw(prompt), draw(answers), row, truncated=False) for row in range(1, count + 1)]


def predictions(batch: BranchBatch) -> list[tuple[int, int]]:
    """(token that a label is predicted from, label), in order."""
    labels = batch.labels[batch.labels != IGNORED].tolist()
    return list(zip(batch.inputs["input_ids"].flatten()[sources(batch)].tolist(), labels, strict=True))


@given(branched())
@settings(max_examples=60, deadline=None)
def test_every_form_predicts_the_same_from_the_same(rows: list[Branched]) -> None:
    wanted = []
    for row in rows:
        for answer in row.answers:
            wanted += list(zip((row.prompt[-1], *answer), answer, strict=False))
    batch = branch_batch(rows, 0)
    assert batch.target_tokens == len(wanted) == sum(row.target_tokens for row in rows)
    assert batch.real_tokens == sum(row.tokens for row in rows)
    forms = (batch, apart(batch), flat(batch), flat(apart(batch)), filled(flat(batch), 200))
    for form in forms:
        assert predictions(form) == wanted
        assert (form.target_tokens, form.rows) == (batch.target_tokens, batch.rows)


@given(branched())
@settings(max_examples=60, deadline=None)
def test_a_flat_batch_has_no_padding_and_knows_parents(rows: list[Branched]) -> None:
    batch = flat(branch_batch(rows, 0))
    ids, starts = batch.inputs["input_ids"][0], batch.inputs["cu_seq_lens_q"].tolist()
    parents, positions = batch.inputs[PARENTS].tolist(), batch.inputs["position_ids"][0]
    documents = [ids[start:stop].tolist() for start, stop in pairwise(starts)]
    assert documents == [list(each) for row in rows for each in (row.prompt, *row.answers)]
    assert (batch.documents, batch.parents) == ((tuple(map(len, documents)),), (tuple(parents),))
    for start, document, parent in zip(starts, documents, parents, strict=False):
        first = 0 if parent < 0 else len(documents[parent])
        assert positions[start : start + len(document)].tolist() == [*range(first, first + len(document))]


@given(branched())
@settings(max_examples=40, deadline=None)
def test_a_mask_shows_an_answer_its_prompt_and_itself(rows: list[Branched]) -> None:
    batch = branch_batch(rows, 0)
    mask = document_mask(batch)[:, 0]
    for line, row in zip(mask, rows, strict=True):
        wanted = torch.eye(len(line), dtype=torch.bool)
        prompt, start = len(row.prompt), len(row.prompt)
        wanted[:prompt, :prompt] = torch.ones(prompt, prompt).tril().bool()
        for answer in row.answers:
            stop = start + len(answer)
            wanted[start:stop, :prompt] = True
            wanted[start:stop, start:stop] = torch.ones(len(answer), len(answer)).tril().bool()
            start = stop
        assert torch.equal(line, wanted)


def test_who_reads_neither_parents_nor_masks_gets_whole_rows() -> None:
    batch = branch_batch([Branched((5, 6), ((7,), (8, 9)), 1, truncated=False)], 0)
    for name in ("flash_attention_2", "flex_attention"):
        inputs = for_attention(batch, name, FLOAT).inputs
        assert inputs["input_ids"].tolist() == [[5, 6, 7, 0], [5, 6, 8, 9]]
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert PARENTS in for_attention(batch, DOCUMENTS, FLOAT).inputs
    assert PARENTS not in for_attention(apart(batch), DOCUMENTS, FLOAT).inputs
    assert for_attention(batch, "sdpa", FLOAT).inputs["attention_mask"].shape == (1, 1, 5, 5)


def test_an_empty_prompt_is_refused_with_its_row() -> None:
    rows = [Branched(prompt, ((7,),), row, truncated=False) for row, prompt in ((4, (5,)), (9, ()))]
    with pytest.raises(DataError, match="empty prompt") as caught:
        branch_batch(rows, 0)
    assert list(caught.value.problems) == ["row 9"]
