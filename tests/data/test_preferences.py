"""Preference pairs and marked answers: every shape, every fault with its row, lengths and their bias."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from graftlm.core.errors import DataError
from graftlm.data.branches import Branched
from graftlm.data.formats import detect
from graftlm.data.preferences.check import length_facts, mark_findings, pair_findings
from graftlm.data.preferences.encode import encode_marked, encode_preferences
from graftlm.data.preferences.records import Marked, Preference
from graftlm.data.preferences.rows import to_marked, to_preferences
from graftlm.data.records import Problem, Turn
from graftlm.data.row_batches import RowBatches
from graftlm.data.sources import read_rows
from graftlm.data.tokenizer import Tokenizer
from graftlm.models.sprout import sprout_folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found: Tokenizer = AutoTokenizer.from_pretrained(sprout_folder())
    return found


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)
    ]


def pairs_of(*rows: dict[str, Any]) -> tuple[list[Preference], list[Problem]]:
    return to_preferences(rows, detect(rows), range(1, len(rows) + 1))


def marked_of(*rows: dict[str, Any]) -> tuple[list[Marked], list[Problem]]:
    return to_marked(rows, detect(rows), range(1, len(rows) + 1))


DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"question": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": "2+2? 4", "rejected": "2+2? 5"},
        {"prompt": turns("2+2?"), "chosen": turns("", "4")[1:], "rejected": turns("", "5")[1:]},
        {"chosen": turns("2+2?", "4"), "rejected": turns("2+2?", "5")},
        {"prompt": "2+2?", "chosen": turns("2+2?", "4"), "rejected": turns("2+2?", "5")},
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
        {"chosen": "2+2? 4", "rejected": "2+2? 5"},
    ],
)
def test_shapes(row: dict[str, Any]) -> None:
    found, problems = pairs_of(row)
    assert problems == []
    assert [turn.text.strip() for turn in found[0].prompt] == ["2+2?"]
    assert [turn.trained for turn in found[0].prompt] == [False]
    assert (found[0].chosen.text.strip(), found[0].rejected.text.strip()) == ("4", "5")


def test_a_conversation_is_a_prompt_up_to_where_the_answers_part() -> None:
    found, _ = pairs_of({"chosen": DIALOGUE + " 4", "rejected": DIALOGUE + " 5"})
    assert [turn.text for turn in found[0].prompt] == ["Hi", "Yes?", "2+2?"]
    found, _ = pairs_of({"prompt": DIALOGUE, "chosen": DIALOGUE + " 4", "rejected": DIALOGUE + " 5"})
    assert [turn.text for turn in found[0].prompt] == ["Hi", "Yes?", "2+2?"]
    assert found[0].chosen == Turn("assistant", "4", True)


def test_system_tools_and_scores_come_along() -> None:
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "system": "Be brief.", "chosen_score": 9}
    found, problems = pairs_of({**row, "rejected_score": 2.5, "tools": '[{"name": "add"}]'})
    assert problems == [] and found[0].margin == 6.5
    assert found[0].prompt[0] == Turn("system", "Be brief.", False)
    assert "add" in found[0].tools
    assert pairs_of(row)[0][0].margin is None
    assert pairs_of({"prompt": "?", "chosen": "4", "rejected": "5", "margin": 1})[0][0].margin == 1.0


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": " 4 "}, "same_answers"),
        ({"chosen": turns("2+2?", "4"), "rejected": turns("2+2?", "4")}, "same_answers"),
        ({"prompt": "2+2?", "chosen": "", "rejected": "5"}, "empty_answer"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": None}, "empty_answer"),
        ({"prompt": "  ", "chosen": "4", "rejected": "5"}, "empty_prompt"),
        ({"chosen": "4", "rejected": "5"}, "no_prompt"),
        ({"chosen": turns("2+2?", "4"), "rejected": turns("2+3?", "5")}, "different_prompts"),
        ({"chosen": turns("2+2?", "4", "No"), "rejected": turns("2+2?", "5")}, "different_prompts"),
        ({"prompt": "2+2?", "chosen": 4, "rejected": "5"}, "no_turns"),
        ({"prompt": "?", "chosen": "4", "rejected": "5", "margin": -1}, "swapped_pair"),
        (
            {"prompt": "?", "chosen": "4", "rejected": "5", "chosen_score": 1, "rejected_score": 2},
            "swapped_pair",
        ),
        ({"prompt": "?", "chosen": "4", "rejected": "5", "margin": "much"}, "not_a_number"),
    ],
)
def test_faults_are_listed_with_their_rows(row: dict[str, Any], code: str) -> None:
    good = {"prompt": "3+3?", "chosen": "6", "rejected": "7"}
    found, problems = pairs_of(*([good] if "prompt" in row else []), row)
    assert [(problem.code, problem.severity) for problem in problems] == [(code, "error")]
    assert problems[0].row == len(found) + 1
    assert problems[0].fix


def test_marks() -> None:
    for row in (
        {"messages": turns("2+2?", "4"), "label": True},
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"prompt": turns("2+2?"), "completion": turns("", "4")[1:], "label": True},
    ):
        found, problems = marked_of(row)
        assert problems == []
        assert [turn.text for turn in found[0].prompt] == ["2+2?"]
        assert found[0].answers == ((Turn("assistant", "4", True), True),)
    found, _ = marked_of({"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    assert [(answer.text, good) for answer, good in found[0].answers] == [("4", True), ("5", False)]
    rows = [
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"prompt": "?", "completion": "4", "label": 1},
    ]
    assert [problem.code for problem in marked_of(*rows)[1]] == ["no_mark"]


def test_other_data_are_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match="--task kto"):
        pairs_of({"prompt": "2+2?", "completion": "4", "label": True})
    for convert in (pairs_of, marked_of):
        with pytest.raises(DataError, match="hold no preferences"):
            convert({"prompt": "2+2?", "completion": "4"})


def long_pair(words: int, turns_before: int = 0) -> Preference:
    before = [
        Turn("user" if n % 2 == 0 else "assistant", f"said {n} " * 10, False) for n in range(turns_before)
    ]
    answers = ("yes " * words, "no " * words)
    chosen, rejected = (Turn("assistant", text.strip(), True) for text in answers)
    return Preference((*before, Turn("user", "Is it?", False)), chosen, rejected, row=7)


def test_the_prompt_is_there_once_and_answers_end(tokenizer: Any) -> None:
    found = encode_preferences([long_pair(3)], tokenizer, 64)
    row = found.rows[0]
    assert found.problems == () and not row.truncated and row.row == 7
    assert tokenizer.decode(row.prompt).endswith("Is it?<|end|>\n<|assistant|>\n")
    assert tokenizer.decode(row.answers[0]).startswith("yes yes yes")
    assert {tokenizer.decode(answer[-1:]) for answer in row.answers} == {"<|end|>"}


def test_old_turns_are_left_out_before_anything_is_cut(tokenizer: Any) -> None:
    pair = long_pair(6, turns_before=6)
    whole = encode_preferences([pair], tokenizer, 1000).rows[0]
    found = encode_preferences([pair], tokenizer, 128)
    row = found.rows[0]
    assert row.truncated and row.answers == whole.answers
    said = tokenizer.decode(row.prompt)
    assert said.startswith("<|user|>\nsaid 4") and said.endswith("Is it?<|end|>\n<|assistant|>\n")
    assert [problem.code for problem in found.problems] == ["row_shortened"]


def test_answers_are_cut_last_and_pairs_that_are_then_the_same_are_dropped(tokenizer: Any) -> None:
    found = encode_preferences([long_pair(60)], tokenizer, 40)
    row = found.rows[0]
    assert len(row.prompt) + max(map(len, row.answers)) == 40
    assert "longest answer" in found.problems[0].what
    same = Preference(
        (Turn("user", "Is it?", False),), Turn("assistant", "yes " * 60, True),
        Turn("assistant", "yes " * 60 + "no", True), row=3,
    )  # fmt: skip
    found = encode_preferences([same], tokenizer, 40)
    assert found.rows == ()
    assert [problem.code for problem in found.problems] == ["row_shortened", "same_answers"]


@settings(max_examples=30, deadline=None)
@given(words=st.integers(1, 60), before=st.integers(0, 5), limit=st.integers(16, 200))
def test_no_row_exceeds_its_length(words: int, before: int, limit: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sprout_folder())
    pair = long_pair(words, before)
    for row in encode_preferences([pair], tokenizer, limit).rows:
        assert len(row.prompt) + max(map(len, row.answers)) <= limit
        assert row.prompt and all(row.answers) and row.answers[0] != row.answers[1]
    marked = encode_marked([Marked.of_pair(pair)], tokenizer, limit).rows
    assert [row.is_good for row in marked] == [True, False]


def pair(number: int, chosen: str, rejected: str) -> Preference:
    better, worse = (Turn("assistant", text, True) for text in (chosen, rejected))
    return Preference((Turn("user", f"Question {number}?", False),), better, worse, row=number)


def test_lengths_that_give_the_better_answer_away() -> None:
    fair = [pair(n, "four words are here", "five words that are here") for n in range(40)]
    fair += [pair(n, "five words that are here", "four words are here") for n in range(40, 80)]
    assert pair_findings(fair) == []
    biased = pair_findings([pair(n, "a long answer with many words", "short") for n in range(40)])
    assert [finding.code for finding in biased] == ["length_bias"]
    assert "100 %" in biased[0].what and "longer" in biased[0].fix
    assert pair_findings([pair(1, "a long answer with many words", "short")]) == []


def test_pairs_turned_round_and_lopsided_marks() -> None:
    found = pair_findings([pair(1, "yes", "no"), pair(1, "no", "yes"), pair(2, "yes", "no")])
    assert [finding.code for finding in found] == ["contradiction"]
    good = Marked((Turn("user", "?", False),), ((Turn("assistant", "yes", True), True),), row=1)
    bad = Marked((Turn("user", "?", False),), ((Turn("assistant", "no", True), False),), row=2)
    assert mark_findings([good, bad]) == []
    assert [finding.code for finding in mark_findings([good, good])] == ["one_mark"]
    lopsided = mark_findings([good] * 9 + [bad])
    assert lopsided[0].code == "lopsided_marks" and "undesirable_weight=9" in lopsided[0].fix
    assert mark_findings([good] * 9 + [bad], undesirable_weight=9.0) == []


def test_real_pairs(shared: Path) -> None:
    """The HH-RLHF pairs: three answers are empty. Lengths are even; LLaMA-Factory's are known."""
    rows = read_rows(shared / "data" / "hh-harmless" / "train.jsonl")
    found, problems = to_preferences(rows.rows, detect(rows.rows), rows.numbers)
    assert len(found) == 1609
    assert [(problem.row, problem.code) for problem in problems] == [
        (row, "empty_answer") for row in (341, 945, 1518)
    ]
    assert all(pair.prompt[-1].role == "user" for pair in found)
    demo = read_rows(shared / "data" / "preference-demo" / "kto_en_demo.json")
    marked, _ = to_marked(demo.rows, detect(demo.rows), demo.numbers)
    assert sum(good for record in marked for _, good in record.answers) == 150


def test_row_batches_are_a_function_of_seed_and_epoch(tokenizer: Any) -> None:
    rows = encode_preferences([pair(n, f"yes {n}", f"no {n}") for n in range(10)], tokenizer, 64).rows

    def numbers(some: Sequence[Branched]) -> Any:
        return [row.row for row in some]

    def made(seed: int, size: int) -> Any:
        return RowBatches(rows, numbers, ids=lambda row: row.answers[0], rows_per_batch=size, seed=seed)

    def order(batches: Any, epoch: int) -> list[int]:
        return [row for index in range(batches.count(epoch)) for row in batches.batch(epoch, index)]

    one = made(1, 4)
    assert one.count(0) == 3 and sorted(order(one, 0)) == list(range(10))
    assert order(one, 0) == order(made(1, 2), 0) != order(one, 1)
    assert order(made(2, 4), 0) != order(one, 0)
    assert one.fingerprint == made(1, 4).fingerprint != made(2, 4).fingerprint
    with pytest.raises(IndexError):
        one.batch(0, 3)
    assert length_facts(rows)[1][0] == "Chosen is the longer answer"
