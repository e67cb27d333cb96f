"""`graft check` as a function: reads, writes nothing, refuses options that would do nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import ConfigError, DataError, UsageError
from graftlm.data.task_report import TaskReport
from graftlm.verbs.check import check


def test_with_and_without_a_model(sums: Path) -> None:
    plain = check(sums)
    counted = check(sums, model="sprout", max_length=32)
    assert plain.ok and counted.ok
    assert plain.as_dict() != counted.as_dict()
    assert sorted(path.name for path in sums.parent.iterdir()) == ["sums.jsonl"]


@pytest.mark.parametrize(
    ("option", "value"), [("max_length", 64), ("template", "chat"), ("template", "zorp")]
)
def test_options_that_need_a_model(option: str, value: object, sums: Path) -> None:
    with pytest.raises(UsageError, match=f"{option} has no effect without a model") as refused:
        check(sums, **{option: value})  # type: ignore[arg-type]
    assert "--model" in refused.value.fix


def test_unknown_names(sums: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown template 'zorp'"):
        check(sums, model="sprout", template="zorp")
    with pytest.raises(ConfigError, match="Unknown data format 'zorp'"):
        check(sums, format="zorp")
    with pytest.raises(DataError, match="No file"):
        check(sums.with_name("nowhere.jsonl"))


def rows_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def checked(path: Path, **options: Any) -> TaskReport:
    found = check(path, **options)
    assert isinstance(found, TaskReport)
    return found


def test_pairs_are_told_and_their_faults_are_listed(tmp_path: Path) -> None:
    good = [{"prompt": f"{n}+1?", "chosen": f"It is {n + 1}, surely.", "rejected": "5"} for n in range(40)]
    bad = [
        {"prompt": "2+2?", "chosen": "4", "rejected": "4"},
        {"prompt": "", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": "", "rejected": "5"},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "chosen_score": 1, "rejected_score": 2},
    ]
    report = checked(rows_of(tmp_path, [*good, *bad]))
    assert report.task == "dpo" and "'chosen' and 'rejected'" in report.why
    assert not report.ok and report.usable == 40 and report.rows == 44
    counts = report.as_dict()["counts"]
    wanted = {"same_answers": 1, "empty_prompt": 1, "empty_answer": 1, "swapped_pair": 1, "length_bias": 1}
    assert counts == wanted
    assert ("prompts", "40 different ones") in report.facts
    assert [problem.row for problem in report.errors] == [41, 42, 43, 44]


def test_labels_are_counted_and_doubts_told(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "good" if n % 4 else "bad"} for n in range(48)]
    rows += [{"text": "text 1", "label": "bad"}, {"text": "new", "label": "rare"}]
    report = checked(rows_of(tmp_path, rows))
    assert report.task == "classification" and report.ok
    assert dict(report.facts)["most frequent"].startswith("72.0% of the rows")
    assert {problem.code for problem in report.warnings} == {"contradiction", "rare_label"}
    assert report.repeated == (49,)


def test_labels_outside_the_map(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": ("good", "bad", "god")[n % 3]} for n in range(30)]
    report = checked(rows_of(tmp_path, rows), task="classification", overrides=["task.labels=[good, bad]"])
    assert len(report.errors) == 10 and "did you mean 'good'?" in str(report.errors[0])


@pytest.mark.parametrize(
    ("rows", "task", "code"),
    [
        ([{"text": f"text {n}", "label": "same"} for n in range(9)], "classification", "one_class"),
        ([{"words": ["a", "b"], "tags": ["O", "O"]}] * 3, "token_classification", "one_class"),
        ([{"prompt": f"{n}?", "completion": "x", "label": True} for n in range(9)], "kto", "one_mark"),
        ([{"prompt": "1?"}, {"prompt": ""}], "grpo", "empty"),
        ([{"words": ["a"], "tags": [1, 0]}, {"words": ["b"], "tags": [1]}], "token_classification", "uneven"),
    ],
)  # fmt: skip
def test_what_nothing_can_be_learnt_from(
    rows: list[dict[str, Any]], task: str, code: str, tmp_path: Path
) -> None:
    report = checked(rows_of(tmp_path, rows), task=task)
    assert any(code in problem.code for problem in report.problems), report.problems


def test_a_task_without_a_usable_row(tmp_path: Path) -> None:
    rows = [{"prompt": "1?", "chosen": "a", "rejected": "a"}]
    with pytest.raises(DataError, match="no row for task dpo") as refused:
        check(rows_of(tmp_path, rows), task="dpo")
    assert refused.value.problems == (
        "row 1: the chosen and the rejected answer are the same. Remove the row.",
    )


def test_only_settings_of_the_task_change_a_check(sums: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.seed=3 has no effect"):
        check(sums, overrides=["train.seed=3"])
    with pytest.raises(ConfigError, match="no such task"):
        check(sums, task="zorp")


def test_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n}+1?", "chosen": f"{n + 1}", "rejected": "I do not know."} for n in range(40)]
    report = checked(rows_of(tmp_path, pairs), model="sprout", max_length=8)
    assert report.lengths.unit == "tokens"
    assert "too_long" in {problem.code for problem in report.warnings}
