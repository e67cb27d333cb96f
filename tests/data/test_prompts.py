"""Prompts of every shape: what is asked, what it is judged by, and what is left out and listed."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from graftlm.core.errors import DataError
from graftlm.data.prompts import Prompt, encode_prompts, to_prompts
from graftlm.models.sprout import sprout_folder

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def read(*rows: dict[str, Any], format: str = "auto") -> list[Prompt]:
    found, _, problems = to_prompts(rows, format, range(1, len(rows) + 1), "rows.jsonl")
    assert not problems
    return found


@pytest.mark.parametrize("row, asked, reference", [
    ({"question": "2+2?", "answer": "4"}, "2+2?", "4"),
    ({"prompt": "2+2?", "completion": "4"}, "2+2?", "4"),
    ({"prompt": "2+2?", "solution": 4}, "2+2?", "4"),
    ({"prompt": "Say something."}, "Say something.", ""),
    ({"problem": "2+2?", "ground_truth": 4.0, "level": 1}, "2+2?", "4.0"),
    ({"source": "2+2?", "target": "4"}, "2+2?", "4"),
    ({"prompt": CHAT, "answer": "4"}, CHAT, "4"),
    ({"prompt": CHAT}, CHAT, ""),
    ({"messages": [*CHAT, {"role": "assistant", "content": "4"}]}, CHAT, "4"),
    ({"prompt": CHAT, "chosen": "4", "rejected": "5"}, CHAT, ""),
], ids=lambda each: "-".join(each) if isinstance(each, dict) else "")  # fmt: skip
def test_shapes(row: dict[str, Any], asked: Any, reference: str) -> None:
    (found,) = read(row)
    assert (found.asked, found.reference) == (asked, reference)
    assert found.columns == row


def test_broken_rows_are_listed() -> None:
    rows = [{"prompt": "Why?"}, {"prompt": " "}, {"prompt": "How?"}]
    found, _, problems = to_prompts(rows, "auto", [3, 4, 5], "rows.jsonl")
    assert [prompt.row for prompt in found] == [3, 5]
    assert [(problem.row, problem.code) for problem in problems] == [(4, "empty_prompt")]


def test_text_asks_nothing() -> None:
    with pytest.raises(DataError, match="Nothing is asked"):
        read({"text": "Once upon a time."})


def test_a_prompt_is_what_the_model_sees_before_its_answer() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(sprout_folder())
    prompts = read({"prompt": CHAT}, {"prompt": [{"role": "user", "content": "word " * 200}]})
    encoded, problems = encode_prompts(prompts, tokenizer, longest=60)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(encoded[0].input_ids) == expected
    assert encoded[0].labels == (-100,) * encoded[0].tokens and encoded[0].target_tokens == 0
    assert [(problem.row, problem.code) for problem in problems] == [(2, "long_prompt")]
