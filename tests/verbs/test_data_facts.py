"""What is gathered of rows: of runs, of named data, and of rows that other trainers made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import write_rows

from graftlm.core.errors import DataError, FormatError, UsageError
from graftlm.data.encode import IGNORED, Encoded
from graftlm.diagnosis.facts.data import DataFacts
from graftlm.models.load import load_model, load_tokenizer
from graftlm.tasks.table import task_of
from graftlm.training.recipe import make_recipe
from graftlm.verbs.diagnosing.data import KEPT, data_facts
from graftlm.verbs.diagnosing.foreign_rows import facts_of_tokens
from graftlm.verbs.diagnosing.row_facts import ends_of
from graftlm.verbs.diagnosing.rows import View, views, whole_texts
from graftlm.verbs.diagnosing.subject import Subject, subject_of
from graftlm.verbs.diagnosing.task_data import facts_of_task
from graftlm.verbs.tune_result import TuneResult

SUMS = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(60)]
LONG = [{"prompt": "Count.", "completion": " ".join(map(str, range(n)))} for n in range(4, 64)]
JUDGED = [{"prompt": f"Say {n}.", "chosen": f"{n} " * 40, "rejected": f"No {n}."} for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("sprout")


def facts_of(path: Path, rows: Sequence[dict[str, Any]], tokenizer: Any, *settings: str) -> DataFacts:
    data = write_rows(path / "rows.jsonl", rows)
    task = task_of(make_recipe({"model": {"name": "sprout"}, "data": {"path": str(data)}}, settings))
    task.read()
    task.encode(tokenizer)
    return facts_of_task(task, tokenizer)


def test_of_clean_rows(tmp_path: Path, tokenizer: Any) -> None:
    found = facts_of(tmp_path, SUMS, tokenizer, "task=sft")
    assert found.ends and (found.ends.rows, found.ends.without, found.ends.token) == (30, 0, "<|end|>")
    assert found.begins is None  # the embedded base has no begin token
    assert found.rendering and (found.rendering.name, found.rendering.refused) == ("chat", 0)
    assert found.rendering.compared == 30 and found.rendering.differing == 0
    assert found.masks and (found.masks.compared, found.masks.wrong, found.masks.untrained) == (30, 0, 0)
    assert 0 < found.masks.trained < found.masks.tokens and found.masks.prompted == 30
    assert found.cuts and (found.cuts.rows, found.cuts.answers, found.cuts.others) == (30, 0, 0)
    assert found.overlap and (found.overlap.train, found.overlap.held_out, found.overlap.leaked) == (
        30,
        30,
        0,
    )


@pytest.mark.parametrize("rows", [LONG, JUDGED], ids=["sft", "dpo"])
def test_lengths_are_those_before_the_cut(rows: list[dict[str, Any]], tmp_path: Path, tokenizer: Any) -> None:
    short, long = (
        facts_of(tmp_path, rows, tokenizer, f"data.max_length={limit}").cuts for limit in (48, 4096)
    )
    assert short and long and short.answers > 0 and long.answers == 0
    assert short.wanted == long.wanted > 48 and short.percentile_95 == long.percentile_95
    assert short.rows == long.rows


def test_rows_without_room_for_an_answer_are_lost_answers(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        *SUMS,
        *({"prompt": "one two three four " * 40 + str(n), "completion": "Yes."} for n in range(40)),
    ]
    found = facts_of(tmp_path, rows, tokenizer, "task=sft", "data.max_length=64", "data.eval_fraction=0.2")
    assert found.cuts and found.cuts.answers > 20 and found.cuts.wanted > 64


def test_of_several_tasks(tmp_path: Path, tokenizer: Any) -> None:
    parts = {
        name: {"task": "sft", "data": {"path": str(write_rows(tmp_path / f"{name}.jsonl", SUMS))}}
        for name in ("one", "other")
    }
    recipe = make_recipe({"model": {"name": "sprout"}, "task": {"type": "multi", "tasks": parts}})
    task = task_of(recipe)
    task.read()
    task.recipe = task.settled()
    task.require_base(load_model("sprout")[0])
    task.encode(tokenizer)
    assert (found := facts_of_task(task, tokenizer)).ends and found.ends.rows == 60


def test_kept_by_a_run(tuned: TuneResult) -> None:
    kept = json.loads((tuned.run / KEPT).read_text(encoding="utf-8"))
    found = data_facts(subject_of(tuned.run))
    assert found is not None and found.ends is not None and found.rendering is not None
    assert found.rendering.digest_now == found.rendering.digest == kept["rendering"]["digest"]
    assert DataFacts.from_dict(kept).cuts == found.cuts


def test_damaged_facts_are_refused(tmp_path: Path) -> None:
    (tmp_path / KEPT).write_text('{"ends": 3}')
    with pytest.raises(FormatError, match="does not hold facts"):
        data_facts(Subject(tmp_path, run=tmp_path))


def test_of_named_data(sums: Path, tmp_path: Path) -> None:
    found = data_facts(Subject(tmp_path, base="sprout", data=str(sums)))
    assert found is not None and found.masks is not None and found.masks.rows > 0
    with pytest.raises(UsageError, match="which base"):
        data_facts(Subject(tmp_path, data=str(sums)))
    assert data_facts(Subject(tmp_path)) is None


def row(ids: list[int], labels: list[int] | None = None, mask: list[int] | None = None) -> dict[str, Any]:
    return {"input_ids": ids} | ({"labels": labels} if labels else {}) | (
        {"attention_mask": mask} if mask else {}
    )  # fmt: skip


def test_of_tokenised_rows(tokenizer: Any) -> None:
    end, pad, no = tokenizer.eos_token_id, tokenizer.pad_token_id, IGNORED
    rows = [
        row([9, 10, 11, end], [no, no, 11, end]),
        row([9, 10, 11, end], [no, no, 11, no]),  # the end is masked
        row([9, 10, 11], [no, no, 11]),  # and here there is none
        row([pad, pad, 9, 10, end], [no, no, 9, 10, end], [0, 0, 1, 1, 1]),
        row([9, 10, 11, 12], [no, no, no, no]),
    ]
    found = facts_of_tokens(rows, range(1, 6), tokenizer)
    assert found.ends and (found.ends.rows, found.ends.without, found.ends.masked) == (4, 2, 1)
    assert found.ends.examples == (2, 3)
    assert found.masks and (found.masks.untrained, found.masks.trained) == (1, 6)
    assert found.overlap is None and found.rendering is None and not found.ends.pad_is_end
    padded = facts_of_tokens([row([9, 10, end, end], None, [1, 1, 1, 0])], [1], tokenizer)
    assert padded.ends and padded.ends.pad_is_end


def test_answers_that_fill_the_limit_were_cut(tokenizer: Any) -> None:
    end, no = tokenizer.eos_token_id, IGNORED
    cut, whole = row([9, 10, 11, 12], [no, no, 11, 12]), row([9, 10, 11, end], [no, no, 11, end])
    text = row([9, 10, 11, 12])
    for rows, answers in (([cut, cut, whole], 2), ([cut, whole], 0), ([text, text, whole], 0)):
        found = facts_of_tokens(rows, range(1, len(rows) + 1), tokenizer)
        assert found.cuts and found.cuts.answers == answers


def test_broken_tokenised_rows_are_all_named(tokenizer: Any) -> None:
    rows = [row([1, 2], [1]), row([1, 2]), {"input_ids": "text"}, row([1], None, [1, 1])]
    with pytest.raises(DataError) as raised:
        facts_of_tokens(rows, [1, 2, 3, 4], tokenizer)
    assert [problem.partition(":")[0] for problem in raised.value.problems] == ["row 1", "row 3", "row 4"]


def test_windows_of_a_text_are_one_row() -> None:
    found = views([Encoded((1, 2, 3), (-100, 2, 3), 4, False), Encoded((3, 5), (-100, 5), 4, False)])
    firsts, lasts = whole_texts(found)
    assert [list(view.ids) for view in (*firsts, *lasts)] == [[1, 2, 3], [3, 5]]


def test_texts_that_go_on_need_no_end(tokenizer: Any) -> None:
    found = [View((9, 10), (-100, 10), 1, False), View((9, 10), (-100, 10), 2, False)]
    assert ends_of(found, tokenizer, [tokenizer.eos_token_id], unfinished=[1]).rows == 1
