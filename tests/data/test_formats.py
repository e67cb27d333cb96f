"""Formats: each is recognised, says why, and becomes the right turns; faults name their row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core.errors import ConfigError, DataError, GraftError
from graftlm.data.formats import NAMES, detect, to_examples
from graftlm.data.records import Example
from graftlm.data.sources import read_rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]


def convert(row: dict[str, Any], format: str = "auto") -> Example:
    examples, problems = to_examples([row], detect([row], format))
    assert not [problem for problem in problems if problem.severity == "error"]
    return examples[0]


def shape(example: Example) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.text, turn.trained) for turn in example.turns]


ASKED = [("user", "Hi", False), ("assistant", "Yo", True)]


@pytest.mark.parametrize(
    ("row", "name", "style"),
    [
        ({"messages": CHAT}, "messages", "chat"),
        ({"conversations": SHAREGPT}, "sharegpt", "chat"),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, "alpaca", "chat"),
        ({"instruction": "Hi", "context": "", "response": "Yo"}, "alpaca", "chat"),
        ({"instruction": "Hi", "instances": [{"input": "", "output": "Yo"}]}, "alpaca", "chat"),
        ({"prompt": "Hi", "completion": "Yo"}, "prompt_completion", "completion"),
        ({"Prompt": "Hi", "Response": "Yo"}, "prompt_completion", "completion"),
        ({"question": "Hi", "answer": "Yo"}, "question_answer", "completion"),
        ({"question": "Hi", "sql": "Yo"}, "source_target", "completion"),
        ({"input": "Hi", "target": "Yo"}, "source_target", "completion"),
        ({"document": "Hi", "summary": "Yo", "references": ["x"]}, "source_target", "completion"),
        ({"input": "Hi", "references": ["Yo", "Yep"]}, "source_target", "completion"),
        ({"word": "Hi", "us": "Yo"}, "source_target", "completion"),
        ({"text": "Hi", "label": "Yo"}, "text_label", "completion"),
        ({"text": "Hi", "category": "Yo"}, "text_label", "completion"),
        ({"sentence": "Hi", "intent": "Yo"}, "text_label", "completion"),
    ],
)
def test_formats_are_recognised_by_their_columns(row: dict[str, Any], name: str, style: str) -> None:
    found = detect([row])
    assert found.name == name and found.why and found.origin == "detected"
    example = convert(row)
    assert shape(example) == ASKED and example.style == style
    assert shape(convert(row, name)) == ASKED  # the same when named


def test_text_is_learnt_whole() -> None:
    assert shape(convert({"text": "Once.", "id": 3})) == [("text", "Once.", True)]


def test_tool_conversations() -> None:
    turns = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "add"}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
        {"from": "human", "value": "Thanks"},
    ]
    row = {"conversations": turns, "tools": '[{"name": "add"}]'}
    examples, problems = to_examples([row], detect([row]))
    assert [turn.role for turn in examples[0].turns] == ["system", "user", "tool_call", "tool", "assistant"]
    assert [turn.trained for turn in examples[0].turns] == [False, False, True, False, True]
    assert examples[0].tools == '[{"name": "add"}]'
    assert [problem.code for problem in problems] == ["unanswered_turn"]


def test_openai_tool_calls_weights_and_parts() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
        {"role": "assistant", "content": "Hm.", "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    example = convert({"messages": turns})
    assert shape(example)[1] == ("assistant", "Hm.", False)
    assert shape(example)[2] == ("tool_call", '{"name": "add", "arguments": {"a": 1}}', True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "No"}},
        {"chosen": CHAT, "rejected": CHAT},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        {"messages": CHAT, "label": True},
    ],
)
def test_preference_data_is_refused_unless_asked_for(row: dict[str, Any]) -> None:
    found = detect([row])
    assert found.name == "preference"
    with pytest.raises(DataError, match="preference") as error:
        to_examples([row], found)
    assert "--task dpo" in error.value.meaning or "--task kto" in error.value.meaning
    assert shape(convert(row, "preference")) == ASKED


def test_rows_with_faults_are_listed_by_number_and_left_out() -> None:
    rows = [
        {"messages": CHAT},
        {"messages": "text"},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": CHAT[:1]},
        {"messages": [CHAT[0], {"role": "assistant", "content": " "}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "image"}]}]},
        {"other": 1},
    ]
    examples, problems = to_examples(rows, detect(rows), numbers=[2, 4, 6, 8, 10, 12, 14])
    assert [example.row for example in examples] == [2]
    assert [(problem.row, problem.code) for problem in problems] == [
        (4, "no_turns"),
        (6, "unknown_role"),
        (8, "no_answer"),
        (10, "empty_answer"),
        (12, "not_text"),
        (14, "no_turns"),
    ]
    pairs = [
        {"prompt": "a", "completion": 5},
        {"prompt": "", "completion": "b"},
        {"prompt": "c", "completion": {}},
    ]
    examples, problems = to_examples(pairs, detect(pairs))
    assert examples[0].answer == "5"
    assert [problem.code for problem in problems] == ["empty_prompt", "not_text"]


@pytest.mark.parametrize("wrong", [{"instances": []}, {"instances": "x"}, {"output": "y", "history": "x"}])
def test_nested_columns_of_another_shape_are_listed(wrong: dict[str, Any]) -> None:
    good = {
        "instruction": "a",
        **({"instances": [{"output": "b"}]} if "instances" in wrong else {"output": "b"}),
    }
    rows = [good, {"instruction": "a", **wrong}]
    examples, problems = to_examples(rows, detect(rows))
    assert [example.row for example in examples] == [1]
    assert [problem.row for problem in problems] == [2]


def test_no_usable_column_lists_columns_and_near_names() -> None:
    with pytest.raises(DataError, match="No usable column") as error:
        detect([{"promt": "a", "complection": "b"}])
    assert "'promt'" in error.value.seen
    assert any("'prompt'" in line for line in error.value.problems)
    assert "source_target(promt, complection)" in error.value.fix


def test_a_named_format_must_exist_and_fit() -> None:
    rows = [{"a": "x", "b": "y"}]
    with pytest.raises(ConfigError, match="messages"):
        detect(rows, "mesages")
    with pytest.raises(DataError, match="a, b"):
        detect(rows, "alpaca")
    with pytest.raises(ConfigError, match="no column 'c'"):
        detect(rows, "source_target(a, c)")
    with pytest.raises(ConfigError, match="takes 2 columns"):
        detect(rows, "source_target(a)")
    assert detect(rows, "source_target(a, b)").origin == "user"
    assert set(NAMES) >= {"messages", "sharegpt", "text"}


KEYS = ["messages", "conversations", "instruction", "instances", "output", "prompt", "completion", "chosen"]
KEYS += ["rejected", "label", "text", "tools", "system", "history", "role", "content", "tool_calls", "word"]
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(KEYS)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]), inner, max_size=3
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5), min_size=1, max_size=3))
def test_rows_of_any_shape_give_typed_errors_only(rows: list[dict[str, Any]]) -> None:
    for name in ("auto", *NAMES):
        try:
            examples, problems = to_examples(rows, detect(rows, name))
        except GraftError as error:
            assert error.seen and error.fix
        else:
            listed = {problem.row for problem in problems if problem.severity == "error"}
            assert {one.row for one in examples} | listed == set(range(1, len(rows) + 1))
            assert all(one.answer.strip() for one in examples)


def test_several_possible_targets_are_pointed_out(shared: Path) -> None:
    found = detect(read_rows(shared / "data" / "g2p-english" / "eval.jsonl").rows)
    assert found.columns == {"source": "word", "target": "us"}
    assert [problem.code for problem in found.problems] == ["several_targets"]
    assert "source_target(word, gb)" in found.problems[0].fix


EXPECTED = {
    "banking77/train.csv": "text_label",
    "clinc150/validation.parquet": "text_label",
    "e2e-nlg/train.jsonl": "source_target",
    "e2e-nlg/eval.jsonl": "source_target",
    "gpteacher-code/eval.jsonl": "alpaca",
    "gsm8k/eval.jsonl": "question_answer",
    "hh-harmless/eval.jsonl": "preference",
    "humaneval/HumanEval.jsonl.gz": "prompt_completion",
    "novel/secret_garden_1911.txt": "text",
    "preference-demo/dpo_en_demo.json": "preference",
    "preference-demo/kto_en_demo.json": "preference",
    "scitldr/eval.jsonl": "source_target",
    "self-instruct/seed_tasks.jsonl": "alpaca",
    "sentence-polarity/eval.jsonl": "text_label",
    "t0-mix/eval.jsonl": "prompt_completion",
    "toolcall-demo/glaive_toolcall_en_demo.json": "sharegpt",
    "wikisql/eval.jsonl": "source_target",
    "xstest/xstest_prompts.csv": "text_label",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_shared_data_sets(shared: Path, name: str) -> None:
    rows = read_rows(shared / "data" / name)
    found = detect(rows.rows)
    assert found.name == EXPECTED[name]
    examples, _ = to_examples(rows.rows, detect(rows.rows, found.name), rows.numbers)
    assert len(examples) >= len(rows.rows) // 2
    assert all(example.turns[-1].trained for example in examples)
