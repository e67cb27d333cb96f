"""Packing and batches: every row once, labels right, no row sees another, order a pure function; and the
forms that each kind of attention reads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core.errors import DataError
from graftlm.data.batches import Batch, Batches
from graftlm.data.encode import IGNORED, Encoded, encode_examples
from graftlm.data.formats import detect, to_examples
from graftlm.data.forms import DOCUMENTS, document_mask, flat, for_attention
from graftlm.data.packing import best_fit
from graftlm.data.sources import read_rows

FLOAT = torch.float32


def rows_of(lengths: list[int], vocabulary: int = 90) -> list[Encoded]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for number, length in enumerate(lengths, start=1):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = max(1, length // 3)
        rows.append(Encoded(tuple(ids), (IGNORED,) * prompt + tuple(ids[prompt:]), number, truncated=False))
    return rows


def batches_of(rows: list[Encoded], **changes: Any) -> Batches:
    settings = {"rows_per_batch": 2, "max_length": 32, "packing": True, "seed": 7, "pad_token_id": 0}
    return Batches(rows, **(settings | changes))


def every(batches: Batches, epoch: int) -> list[Batch]:
    return [batches.batch(epoch, index) for index in range(batches.count(epoch))]


def documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every document of a packed batch, found by its mask alone."""
    found = []
    mask = document_mask(batch)[:, 0]
    for line in range(mask.shape[0]):
        start = 0
        for stop in range(1, mask.shape[1] + 1):
            if stop == mask.shape[1] or not mask[line, stop, start]:
                ids = batch.inputs["input_ids"][line, start:stop].tolist()
                found.append((ids, batch.labels[line, start:stop].tolist()))
                start = stop
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=40),
    rows_per_batch=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_packing(lengths: list[int], rows_per_batch: int, seed: int, epoch: int) -> None:
    rows = rows_of(lengths)
    batches = batches_of(rows, rows_per_batch=rows_per_batch, seed=seed)
    seen: list[int] = []
    for batch in every(batches, epoch):
        ids, mask = batch.inputs["input_ids"], document_mask(batch)
        assert mask.dtype == torch.bool and mask.shape == (ids.shape[0], 1, ids.shape[1], ids.shape[1])
        assert ids.shape[1] <= 32 and ids.shape[0] <= rows_per_batch
        assert mask.any(-1).all() and not mask.triu(1).any()
        assert batch.target_tokens == int((batch.labels != IGNORED).sum())
        assert batch.target_tokens == int((batch.labels[:, 1:] != IGNORED).sum())
        assert batch.real_tokens == sum(len(rows[row - 1].input_ids) for row in batch.rows)
        found = documents(batch)
        for row in batch.rows:
            assert (list(rows[row - 1].input_ids), list(rows[row - 1].labels)) in found
        positions = batch.inputs["position_ids"]
        starts = (positions == 0) & (ids != 0)
        assert (batch.labels[starts] == IGNORED).all()
        seen += batch.rows
    assert sorted(seen) == list(range(1, len(lengths) + 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80), st.randoms())
def test_best_fit(lengths: list[int], capacity: int, random: Any) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    windows = best_fit(lengths, order, capacity)
    assert sorted(row for window in windows for row in window) == sorted(order)
    loads = [sum(lengths[row] for row in window) for window in windows]
    assert all(load <= capacity for load in loads)
    assert sum(2 * load <= capacity for load in loads) <= 1
    assert len(windows) == len(best_fit(lengths, sorted(order), capacity))


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_is_a_pure_function_of_seed_and_epoch(packing: bool) -> None:
    rows = rows_of([5, 9, 12, 3, 30, 7, 7, 7, 16, 2])
    one, other = batches_of(rows, packing=packing), batches_of(rows, packing=packing)
    late = [batch.rows for batch in every(other, 3)]  # asked out of order
    assert [batch.rows for batch in every(one, 0)] == [batch.rows for batch in every(other, 0)]
    assert [batch.rows for batch in every(one, 3)] == late
    assert [batch.rows for batch in every(one, 0)] != late
    assert [batch.rows for batch in every(batches_of(rows, packing=packing, seed=8), 0)] != [
        batch.rows for batch in every(one, 0)
    ]
    flat = [row for batch in every(one, 1) for row in batch.rows]
    halved = batches_of(rows, packing=packing, rows_per_batch=1)
    assert [row for batch in every(halved, 1) for row in batch.rows] == flat
    assert halved.count(1) >= one.count(1) and one.batch(1, 0).labels.shape[0] == 2


def test_the_fingerprint_tells_content_and_settings_apart() -> None:
    rows = rows_of([5, 9, 12])
    assert batches_of(rows).fingerprint == batches_of(list(rows)).fingerprint
    changed = [Encoded(row.input_ids, (*row.labels[:-1], IGNORED), row.row, False) for row in rows]
    prints = {
        batches_of(rows).fingerprint,
        batches_of(changed).fingerprint,
        batches_of(rows, seed=1).fingerprint,
        batches_of(rows, packing=False).fingerprint,
        batches_of(rows, max_length=64).fingerprint,
        batches_of(rows, rows_per_batch=1).fingerprint,
    }
    assert len(prints) == 6


def test_padding_is_masked_by_position_even_if_it_is_the_end_token() -> None:
    end = 4
    rows = [Encoded((9, 8, end), (IGNORED, 8, end), 1, False), Encoded((9, end), (IGNORED, end), 2, False)]
    batch = batches_of(rows, packing=False, pad_token_id=end).batch(0, 0)
    assert int((batch.labels == end).sum()) == 2
    assert batch.inputs["attention_mask"].sum() == 5 == batch.real_tokens
    packed = batches_of(rows, pad_token_id=end).batch(0, 0)
    assert int((packed.labels == end).sum()) == 2


def test_rows_that_do_not_fit_and_no_rows_are_errors() -> None:
    with pytest.raises(DataError, match="33 tokens"):
        batches_of(rows_of([33]))
    with pytest.raises(DataError, match="no rows"):
        batches_of([])
    with pytest.raises(IndexError):
        batches_of(rows_of([3])).batch(0, 1)


def model_of(kind: str, attention: str, shared: Path | None = None) -> Any:
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    marks = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=90, num_key_value_heads=2, **size, **marks)
        return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64, **marks)
        return GPT2LMHeadModel._from_config(config, attn_implementation=attention).eval()
    assert shared is not None
    return AutoModelForCausalLM.from_pretrained(
        shared / "models" / kind, attn_implementation=attention
    ).eval()


def loss_of(model: Any, batch: Batch) -> float:
    """Sum over target tokens, from the logits."""
    ready = for_attention(batch, model.config._attn_implementation, torch.float32)
    with torch.no_grad():
        logits = model(**ready.inputs, use_cache=False).logits[:, :-1]
    targets = batch.labels[:, 1:]
    return float(
        torch.nn.functional.cross_entropy(
            logits[targets != IGNORED], targets[targets != IGNORED], reduction="sum"
        )
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_loss_is_the_loss_of_the_documents_alone(kind: str, attention: str) -> None:
    model = model_of(kind, attention)
    rows = rows_of([4, 11, 7, 9, 20, 3, 2])
    alone = sum(loss_of(model, batches_of([row], packing=False).batch(0, 0)) for row in rows)
    packed = sum(loss_of(model, batch) for batch in every(batches_of(rows), 0))
    padded = sum(loss_of(model, batch) for batch in every(batches_of(rows, packing=False), 0))
    assert packed == pytest.approx(alone, rel=1e-5)
    assert padded == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_changing_one_document_leaves_the_logits_of_its_neighbours(kind: str) -> None:
    model = model_of(kind, "sdpa")
    batch = batches_of(rows_of([9, 12, 8]), rows_per_batch=1).batch(0, 0)
    starts = (batch.inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    changed = batch.inputs["input_ids"].clone()
    changed[0, starts[1] : starts[2]] = 5
    inputs = for_attention(batch, "sdpa", torch.float32).inputs
    with torch.no_grad():
        before = model(**inputs).logits
        after = model(**{**inputs, "input_ids": changed}).logits
    same = (before == after).all(-1)[0]
    assert same[: starts[1]].all() and same[starts[2] :].all() and not same[starts[1] : starts[2]].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_on_a_trained_model(shared: Path, tokenizer_of: Any, attention: str) -> None:
    model = model_of("stories260K", attention, shared)
    rows = read_rows(shared / "data" / "e2e-nlg" / "train.jsonl").rows[:40]
    examples, _ = to_examples(rows, detect(rows))
    encoded = list(encode_examples(examples, tokenizer_of("stories260K"), 256).rows)
    options = {"max_length": 256, "pad_token_id": 2, "rows_per_batch": 3}
    alone = sum(
        loss_of(model, batches_of([row], **{**options, "packing": False}).batch(0, 0)) for row in encoded
    )
    packed = sum(loss_of(model, batch) for batch in every(batches_of(encoded, **options), 0))
    assert packed == pytest.approx(alone, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=20),
    rows_per_batch=st.integers(1, 4),
    packing=st.booleans(),
)
def test_a_flat_batch_holds_every_row_and_no_padding(
    lengths: list[int], rows_per_batch: int, packing: bool
) -> None:
    rows = rows_of(lengths)
    batches = batches_of(rows, rows_per_batch=rows_per_batch, packing=packing)
    for batch in every(batches, 0):
        found = flat(batch)
        ids, starts = found.inputs["input_ids"], found.inputs["cu_seq_lens_q"].tolist()
        assert ids.shape == found.labels.shape == (1, batch.real_tokens) and set(found.inputs) == {
            "input_ids", "position_ids", "cu_seq_lens_q"
        }  # fmt: skip
        assert batch.inputs["input_ids"].numel() <= batches.most_tokens
        assert (found.target_tokens, found.real_tokens) == (batch.target_tokens, batch.real_tokens)
        assert found.rows == batch.rows and len(starts) == len(batch.rows) + 1
        for row, (start, stop) in zip(batch.rows, pairwise(starts), strict=True):
            assert tuple(ids[0, start:stop].tolist()) == rows[row - 1].input_ids
            assert tuple(found.labels[0, start + 1 : stop].tolist()) == rows[row - 1].labels[1:]
            assert found.labels[0, start] == IGNORED
            assert found.inputs["position_ids"][0, start:stop].tolist() == list(range(stop - start))


def test_padded_rows_and_unknown_documents_are_left_alone() -> None:
    padded = batches_of(rows_of([9, 5]), packing=False).batch(0, 0)
    assert for_attention(padded, "sdpa", FLOAT) is padded is for_attention(padded, "eager", FLOAT)
    unknown = Batch(padded.inputs, padded.labels, 1, 1, (1, 2))
    assert for_attention(unknown, DOCUMENTS, FLOAT) is unknown


def test_a_mask_is_made_only_for_who_reads_one() -> None:
    packed = batches_of(rows_of([9, 12, 8]), rows_per_batch=1).batch(0, 0)
    assert "attention_mask" not in packed.inputs
    for name in ("flash_attention_2", "flex_attention", DOCUMENTS):
        assert "attention_mask" not in for_attention(packed, name, FLOAT).inputs
    mask = for_attention(packed, "sdpa", FLOAT).inputs["attention_mask"]
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 32, 32)


def test_eager_attention_ignores_a_boolean_mask_and_is_given_an_additive_one() -> None:
    """Should this begin to fail, eager takes boolean masks too."""
    model = model_of("llama", "eager")
    batch = batches_of(rows_of([9, 12, 8]), rows_per_batch=1).batch(0, 0)

    def logits(who: Any, implementation: str) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = who(**for_attention(batch, implementation, FLOAT).inputs).logits
        return found

    right = logits(model_of("llama", "sdpa"), "sdpa")
    assert (logits(model, "sdpa") - right).abs().max() > 1e-3
    assert (logits(model, "eager") - right).abs().max() < 1e-5
