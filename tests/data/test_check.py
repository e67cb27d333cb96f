"""The report is true, and what the terminal shows of it can be read with and without colour."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graftlm.cli.show_check import render_check
from graftlm.core.errors import DataError
from graftlm.data.check_source import check_source
from graftlm.data.report import CheckReport


def file_of(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."}
        for n in range(start, start + count)
    ]


def shown(report: CheckReport, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    render_check(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_clean_file(tmp_path: Path, tokenizer_of: Callable[..., Any]) -> None:
    report = check_source(file_of(tmp_path, pairs(100)), tokenizer_of("stories260K", "chatml"))
    assert report.ok and not report.errors
    assert (report.rows, report.examples, report.train_rows, report.held_out_rows) == (100, 100, 70, 30)
    assert report.format.name == "prompt_completion"
    assert report.ends_with_end_token == 1.0 and report.end_token == "<|im_end|>"
    assert 0 < report.trained_share < 0.5
    assert sum(count for _, _, count in report.lengths.histogram) == 70
    learnt = "".join(text for text, trained in report.sample if trained)
    assert learnt.strip().startswith("It is") and learnt.endswith("<|im_end|>")
    assert len(report.template_digest) == 64
    json.dumps(report.as_dict())


def test_every_fault_is_counted(tmp_path: Path, tokenizer_of: Callable[..., Any]) -> None:
    rows = pairs(60)
    rows[4]["completion"] = ""
    rows[5] = dict(rows[3])
    rows[6] = {"prompt": rows[2]["prompt"], "completion": "Who knows?"}
    rows[7]["completion"] = "word " * 400
    rows[8]["prompt"] = "word " * 400
    rows[9]["prompt"] += "</s>"
    report = check_source(file_of(tmp_path, rows), tokenizer_of(), max_length=128)
    assert report.count("empty_answer") == 1 and report.count("nothing_trained") == 1
    assert report.count("answer_truncated") == 1 and report.count("special_token") <= 1
    assert report.rows == 60 and report.examples == 59 and report.usable == 58
    assert report.duplicates.exact == ((6, 4),) and (7, 3) in report.duplicates.contradictions
    assert not report.ok
    assert {problem.row for problem in report.errors} == {5, 9}


def test_rows_of_the_hold_out_that_were_trained_on(tmp_path: Path) -> None:
    train = file_of(tmp_path, pairs(40))
    report = check_source(train, eval_path=file_of(tmp_path, pairs(10, start=35), "eval.jsonl"))
    assert {row for row, _ in report.duplicates.leaked} == {1, 2, 3, 4, 5}
    assert report.count("leak") == 1 and not report.ok


def test_without_a_tokenizer_characters_are_counted(tmp_path: Path) -> None:
    report = check_source(file_of(tmp_path, pairs(50)))
    assert report.lengths.unit == "characters" and report.ends_with_end_token is None
    text = shown(report)
    assert "characters" in text and "no tokenizer" in text and "⟦It is" in text


def test_nothing_to_train_on_is_fatal(tmp_path: Path, tokenizer_of: Callable[..., Any]) -> None:
    empty = file_of(tmp_path, [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(DataError) as error:
        check_source(empty)
    assert error.value.meaning and error.value.fix and len(error.value.problems) == 3
    masked = file_of(tmp_path, [{"prompt": f"{n} " * 200, "completion": "b"} for n in range(3)])
    with pytest.raises(DataError, match="In no row") as error:
        check_source(masked, tokenizer_of(), max_length=16, eval_fraction=0.0)
    assert error.value.meaning and error.value.fix and len(error.value.problems) == 3


def test_the_terminal_with_and_without_colour(tmp_path: Path, tokenizer_of: Callable[..., Any]) -> None:
    rows = pairs(50)
    rows[:15] = [{"prompt": "a", "completion": ""}] * 15
    report = check_source(file_of(tmp_path, rows), tokenizer_of())
    plain = shown(report)
    assert "\x1b" not in plain
    assert "⟦" in plain and "and 5 more: 5 empty_answer" in plain and "█" in plain
    coloured = shown(report, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m" in coloured and "⟦" not in coloured


def test_markup_in_data_is_shown_as_it_is(tmp_path: Path) -> None:
    rows = [{"prompt": f"[bold]{n}[/] [link", "completion": "[/red]"} for n in range(10)]
    assert "⟦[/red]⟧" in shown(check_source(file_of(tmp_path, rows)))


@pytest.mark.parametrize(
    "name", ["banking77/train.csv", "tinyshakespeare/train.txt", "humaneval/HumanEval.jsonl.gz"]
)
def test_real_data(shared: Path, tokenizer_of: Callable[..., Any], name: str) -> None:
    report = check_source(shared / "data" / name, tokenizer_of(), max_length=512)
    assert shown(report)
    assert not report.duplicates.leaked


def test_ten_thousand_rows_take_seconds(shared: Path) -> None:
    start = time.process_time()
    report = check_source(shared / "data" / "banking77" / "train.csv")
    assert report.rows == 10_003
    assert time.process_time() - start < 3
