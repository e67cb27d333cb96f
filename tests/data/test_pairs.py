"""Sources and targets: encoded as the tokenizer does it, batched by length, the same on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from graftlm.core.errors import DataError
from graftlm.data.pair_batches import PairBatches
from graftlm.data.pair_check import source_findings, with_sources
from graftlm.data.pairs import Limits, Pair, encode_pairs, encode_source, source_text
from graftlm.data.records import Example, Turn

START = 1
LIMITS = Limits(source=64, target=64)


def shift(target: Any) -> tuple[int, ...]:
    return (START, *target[:-1])


def example(source: str, target: str, row: int = 1) -> Example:
    turns = (Turn("user", source, trained=False), Turn("assistant", target, trained=True))
    return Example(turns, row, style="completion")


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "models" / "g2p-bart-us")


def test_the_tokenizers_own_way(tokenizer: Any) -> None:
    found = encode_pairs([example("semi", "sˈɛmi")], tokenizer, LIMITS, shift).rows[0]
    assert list(found.source) == tokenizer("semi")["input_ids"]
    assert list(found.target) == tokenizer(text_target="sˈɛmi")["input_ids"]
    assert found.source[0] == tokenizer.bos_token_id and found.source[-1] == tokenizer.eos_token_id
    assert found.decoder == (START, *found.target[:-1])
    assert (found.tokens, found.target_tokens) == (len(found.source) + len(found.target), len(found.target))
    assert not found.truncated and found.text == "semi"


def test_too_long(tokenizer: Any) -> None:
    rows = [example("abcdefghij", "a"), example("a", "abcdefghij", row=2)]
    found = encode_pairs(rows, tokenizer, Limits(source=6, target=5), shift)
    source, target = found.rows
    assert len(source.source) == 6 and source.source[-1] == tokenizer.eos_token_id, "it is still closed"
    assert len(target.target) == 5 and tokenizer.eos_token_id not in target.target, "no false end is learnt"
    assert [row.truncated for row in found.rows] == [True, True]
    assert [problem.code for problem in found.problems] == ["source_truncated", "target_truncated"]
    assert all(problem.severity == "warning" for problem in found.problems)


def test_no_source(tokenizer: Any) -> None:
    text = Example((Turn("text", "only text", trained=True),), 7, style="text")
    found = encode_pairs([text, example("a", "b", row=8)], tokenizer, LIMITS, shift)
    assert [row.row for row in found.rows] == [8]
    assert [(problem.row, problem.severity) for problem in found.problems] == [(7, "error")]


def test_a_prefix_is_part_of_every_source(tokenizer: Any) -> None:
    limits = Limits(64, 64, prefix="so")
    found = encode_pairs([example("me", "x")], tokenizer, limits, shift).rows[0]
    assert list(found.source) == tokenizer("some")["input_ids"] == encode_source("me", tokenizer, limits)


def test_a_conversation_names_its_speakers() -> None:
    turns = (
        Turn("system", "Be brief.", False), Turn("user", "One?", False), Turn("assistant", "1", True),
        Turn("user", "Two?", False), Turn("assistant", "2", True),
    )  # fmt: skip
    assert source_text(Example(turns, 1)) == "System: Be brief.\nUser: One?\nAssistant: 1\nUser: Two?"
    assert source_text(Example(turns[:3], 1)) == "Be brief.\n\nOne?"


def pairs(lengths: list[tuple[int, int]]) -> list[Pair]:
    return [
        Pair(tuple(range(3, 3 + s)), tuple(range(5, 5 + t)), tuple(range(4, 4 + t)), row, False)
        for row, (s, t) in enumerate(lengths, start=1)
    ]


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=70)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_every_row_once_in_every_epoch(
    lengths: list[tuple[int, int]], size: int, steps: int, epoch: int
) -> None:
    rows = pairs(lengths)
    batches = PairBatches(rows, rows_per_batch=size, rows_per_step=size * steps, seed=3, pad_token_id=0)
    seen: list[int] = []
    for index in range(batches.count(epoch)):
        batch = batches.batch(epoch, index)
        seen += batch.rows
        for line, number in enumerate(batch.rows):
            row = rows[number - 1]
            mask = batch.inputs["attention_mask"][line].bool()
            assert tuple(batch.inputs["input_ids"][line][mask].tolist()) == row.source
            labels = batch.labels[line]
            assert tuple(labels[labels != -100].tolist()) == row.target
            assert tuple(batch.inputs["decoder_input_ids"][line][: len(row.target)].tolist()) == row.decoder
        assert batch.target_tokens == int((batch.labels != -100).sum())
        assert batch.inputs["input_ids"].numel() + batch.labels.numel() <= batches.most_tokens
    assert sorted(seen) == list(range(1, len(rows) + 1))
    assert 0 < batches.packing_rate(epoch) <= 1


def test_half_the_batch_size_keeps_each_steps_rows() -> None:
    rows = pairs([(3 + number % 17, 2 + number % 5) for number in range(50)])
    whole = PairBatches(rows, rows_per_batch=8, rows_per_step=8, seed=0, pad_token_id=0)
    half = PairBatches(rows, rows_per_batch=4, rows_per_step=8, seed=0, pad_token_id=0)
    for step in range(6):
        halves = (*half.batch(1, 2 * step).rows, *half.batch(1, 2 * step + 1).rows)
        assert sorted(whole.batch(1, step).rows) == sorted(halves)
    assert whole.fingerprint != half.fingerprint
    assert whole.batch(1, 0).rows != whole.batch(2, 0).rows


def test_like_lengths_waste_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 200, (2000,), generator=generator).tolist()
    rows = pairs([(length, 5) for length in lengths])
    batches = PairBatches(rows, rows_per_batch=16, rows_per_step=16, seed=0, pad_token_id=0)
    assert batches.packing_rate() > 0.85, "in random order it is about half"


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        PairBatches([], rows_per_batch=1, rows_per_step=1, seed=0, pad_token_id=0)
    batches = PairBatches(pairs([(2, 2)]), rows_per_batch=1, rows_per_step=1, seed=0, pad_token_id=0)
    with pytest.raises(IndexError, match="1 micro-batches"):
        batches.batch(0, 1)


def test_doubts_about_the_whole() -> None:
    text = Example((Turn("text", "only text", trained=True),), 9, style="text")
    rows = [example("a b", "a  b", 1), example("c", "d", 2), example("c", "e", 3), example("c", "d", 4), text]
    kept, problems = with_sources(rows)
    assert [row.row for row in kept] == [1, 2, 3, 4]
    assert [(problem.row, problem.code) for problem in problems] == [(9, "no_source")]
    found = {problem.code: problem.what for problem in source_findings(kept)}
    assert "rows 1" in found["copied"] and found["several_targets_of_one_source"].startswith("1 row")
    assert source_findings([example("x", "y", 1)]) == []
