from __future__ import annotations

import json

import pytest
import typer

from graftlm.cli.errors import Interrupted, ParseError, interrupted, report
from graftlm.core.errors import ConfigError, DataError, GraftError, ModelError, UsageError

BROKEN = DataError(
    "train.jsonl: line 3 [col 7] is not JSON.",
    meaning="A comma is missing.",
    fix="Correct line 3.",
    problems=["row 3: not JSON", "row 9: [/] no text"],
)


def test_three_parts_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(BROKEN, command="graft check", as_json=False, debug=False) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: train.jsonl: line 3 [col 7] is not JSON.\n"
        "  - row 3: not JSON\n"
        "  - row 9: [/] no text\n"
        "  meaning: A comma is missing.\n"
        "  fix: Correct line 3.\n"
    )


def test_parts_that_are_missing_leave_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    report(GraftError("Seen."), command="graft", as_json=False, debug=False)
    assert capsys.readouterr().err == "error: Seen.\n"


def test_long_paths_are_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["folder"] * 60)
    report(ModelError(f"No folder {path}."), command="graft", as_json=False, debug=False)
    assert path in capsys.readouterr().err


def test_json_has_the_same_parts(capsys: pytest.CaptureFixture[str]) -> None:
    report(BROKEN, command="graft check", as_json=True, debug=False)
    out, err = capsys.readouterr()
    assert json.loads(out) == {**BROKEN.as_dict(), "exit_code": 1}
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GraftError("x"), 1),
        (DataError("x"), 1),
        (UsageError("x"), 2),
        (ConfigError("x"), 2),
        (typer.BadParameter("x"), 2),
        (PermissionError(13, "Permission denied", "runs"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (Interrupted("x"), 130),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert report(error, command="graft tune", as_json=False, debug=False) == code


def test_a_bug_is_called_a_bug_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    report(ZeroDivisionError("division by zero"), command="graft tune", as_json=False, debug=False)
    err = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise DataError("Seen.", fix="Mend.")
    except DataError as error:
        report(error, command="graft tune", as_json=False, debug=True)
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "test_errors.py" in err
    assert err.rstrip().endswith("fix: Mend.")


def test_an_interrupt_says_how_to_go_on() -> None:
    assert interrupted(KeyboardInterrupt(), fix="graft tune x --resume").fix == "graft tune x --resume"
    assert interrupted(KeyboardInterrupt("graft tune y"), fix="graft tune x").fix == "graft tune y"


def test_the_parse_error_is_the_parent_of_all_wrong_usage() -> None:
    assert ParseError.__name__ == "UsageError"
    assert issubclass(typer.BadParameter, ParseError)
