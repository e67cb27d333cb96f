"""Encoding: what is too long is cut sensibly, and nothing is lost without being listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import DataError
from graftlm.data.encode import IGNORED, encode_example, encode_examples
from graftlm.data.formats import detect, to_examples
from graftlm.data.records import Example, Turn
from graftlm.data.sources import read_rows


def pair(prompt: str, answer: str, row: int = 1) -> Example:
    turns = (Turn("user", prompt, False), Turn("assistant", answer, True))
    return Example(turns, row=row, style="completion")


def test_a_long_prompt_loses_its_middle_so_that_the_whole_answer_stays(
    tokenizer_of: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_of("stories260K", "chatml")
    prompt = "Once there was a dog. " + "It ran. " * 40 + "What was it?"
    whole = encode_example(pair(prompt, "The end."), tokenizer, 512)
    limit = int(len(whole.input_ids) * 0.7)
    encodings = encode_examples([pair(prompt, "The end.", row=4)], tokenizer, limit)
    (row,) = encodings.rows
    assert row.truncated and 0.9 * limit < len(row.input_ids) <= limit
    learnt = [label for label in row.labels if label != IGNORED]
    assert learnt == [label for label in whole.labels if label != IGNORED]
    text = tokenizer.decode(row.input_ids)
    assert text.startswith("<|im_start|> user\nOnce there was a dog.")
    assert " ... " in text and "What was it?<|im_end|>" in text
    assert [(problem.row, problem.code) for problem in encodings.problems] == [(4, "prompt_shortened")]


def test_a_long_conversation_ends_at_its_last_whole_answer(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K", "chatml")
    turns = [Turn("assistant" if n % 2 else "user", f"Words of turn {n}.", bool(n % 2)) for n in range(12)]
    encodings = encode_examples([Example(tuple(turns), row=2)], tokenizer, 120)
    (row,) = encodings.rows
    assert row.truncated
    assert row.labels[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [problem.code for problem in encodings.problems] == ["conversation_shortened"]


def test_an_answer_that_is_too_long_keeps_its_beginning(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K")
    encodings = encode_examples([pair("Tell me.", "Once upon a time. " * 50, row=9)], tokenizer, 40)
    (row,) = encodings.rows
    assert len(row.input_ids) == 40 and row.truncated and row.labels[-1] != tokenizer.eos_token_id
    assert [(problem.row, problem.code) for problem in encodings.problems] == [(9, "answer_truncated")]


def test_a_row_with_nothing_to_learn_is_dropped_and_listed(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K")
    rows = [pair("a b c d" * 200, "yes", row=1), pair("Hi", "yes", row=2)]
    encodings = encode_examples(rows, tokenizer, 32)
    assert [row.row for row in encodings.rows] == [2]
    assert [(problem.row, problem.severity, problem.code) for problem in encodings.problems] == [
        (1, "error", "nothing_trained")
    ]
    with pytest.raises(DataError, match="nothing to learn"):
        encode_example(rows[0], tokenizer, 32)
    with pytest.raises(DataError, match="max_length is 1"):
        encode_examples(rows, tokenizer, 1)


@pytest.mark.parametrize("max_length", [2, 7, 64, 10_000])
def test_windows_of_a_long_text_lose_nothing(tokenizer_of: Callable[..., Any], max_length: int) -> None:
    tokenizer = tokenizer_of("stories260K")
    text = "Once upon a time there was a little girl. " * 12
    encodings = encode_examples(
        [Example((Turn("text", text, True),), row=1, style="text")], tokenizer, max_length
    )
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    learnt = [label for row in encodings.rows for label in row.labels if label != IGNORED]
    assert learnt == whole[1:] and not encodings.problems
    assert all(len(row.input_ids) <= max_length and not row.truncated for row in encodings.rows)


def test_pieces_of_a_document_end_without_an_end_token(
    tokenizer_of: Callable[..., Any], shared: Path
) -> None:
    rows = read_rows(shared / "data" / "novel" / "secret_garden_1911.txt")
    examples, _ = to_examples(rows.rows, detect(rows.rows), rows.numbers)
    tokenizer = tokenizer_of("stories260K")
    encoded = encode_examples(examples, tokenizer, 512).rows
    ends = [row for row in encoded if tokenizer.eos_token_id in row.input_ids]
    assert ends == [encoded[-1]]


@pytest.mark.parametrize("template", [None, "chatml"])
@pytest.mark.parametrize(
    "name",
    ["gsm8k/eval.jsonl", "toolcall-demo/glaive_toolcall_en_demo.json", "self-instruct/seed_tasks.jsonl"],
)
def test_every_row_of_real_data_is_encoded_or_listed(
    tokenizer_of: Callable[..., Any], shared: Path, name: str, template: str | None
) -> None:
    tokenizer = tokenizer_of("gpt2-tiny-en", template)
    rows = read_rows(shared / "data" / name)
    examples, _ = to_examples(rows.rows, detect(rows.rows), rows.numbers)
    encodings = encode_examples(examples, tokenizer, 256)
    dropped = [problem.row for problem in encodings.problems if problem.severity == "error"]
    assert sorted([*dropped, *(row.row for row in encodings.rows)]) == sorted(one.row for one in examples)
    codes = Counter(problem.code for problem in encodings.problems)
    cut = codes["answer_truncated"] + codes["prompt_shortened"] + codes["conversation_shortened"]
    assert cut == sum(row.truncated for row in encodings.rows)
    end = tokenizer.eos_token_id if template is None else tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in encodings.rows:
        assert row.labels[0] == IGNORED and row.target_tokens > 0 and len(row.input_ids) <= 256
        if not row.truncated:
            assert next(label for label in reversed(row.labels) if label != IGNORED) == end
