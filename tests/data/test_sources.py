"""Reading: every kind of file, every broken row with its number, and only typed errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftlm.core.errors import DataError
from graftlm.data.plain_text import parse_text
from graftlm.data.sources import SUFFIXES, read_rows

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(1, 4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.replace("\n", "\r\n")),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),  # the time would be part of the test's name
        ("a.csv", "prompt,completion\r\n1+1=,2\r\n2+2=,4\r\n3+3=,6\r\n"),
        ("a.tsv", "prompt\tcompletion\n1+1=\t2\n2+2=\t4\n\n3+3=\t6"),
    ],
)
def test_every_text_kind_gives_the_same_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    found = read_rows(write(tmp_path, name, content))
    assert found.rows == ROWS
    assert not found.problems


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet").rows == ROWS
    with pytest.raises(DataError, match="Parquet"):
        read_rows(write(tmp_path, "b.parquet", LINES))


def test_all_broken_lines_are_collected_with_their_numbers(tmp_path: Path) -> None:
    lines = [
        b'{"text": "fine"}',
        b'{"text": "cut off',
        b"",
        b"{'text': 'python'}",
        b'["a", "list"]',
        b'{"text": "caf\xe9"}',
        b'{"text": "\\ud83d half"}',
        b'{"text": "also fine"} ',
        b"{}",
        b'{"a": 1} {"b": 2}',
    ]
    found = read_rows(write(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert found.numbers == [1, 8]
    assert [(problem.row, problem.code) for problem in found.problems] == [
        (2, "broken_json"),
        (4, "broken_json"),
        (5, "not_an_object"),
        (6, "encoding"),
        (7, "half_character"),
        (9, "empty_row"),
        (10, "broken_json"),
    ]
    assert all(problem.fix for problem in found.problems)


def test_broken_csv_rows(tmp_path: Path) -> None:
    text = 'text,label\n"two\nlines",a\nno label\nfine,b\na,b,c\n"open,c\n'
    found = read_rows(write(tmp_path, "a.csv", text))
    assert found.numbers == [2, 5]
    assert found.rows[0] == {"text": "two\nlines", "label": "a"}
    assert [problem.row for problem in found.problems] == [4, 6, 7]


def test_a_missing_file_lists_near_names(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", LINES)
    with pytest.raises(DataError, match="No file") as error:
        read_rows(tmp_path / "trian.jsonl")
    assert "train.jsonl" in error.value.fix
    with pytest.raises(DataError, match="is a folder") as error:
        read_rows(tmp_path)
    assert "train.jsonl" in error.value.fix
    with pytest.raises(DataError, match=r"No file") as error:
        read_rows(tmp_path / "nowhere" / "train.jsonl")
    assert "does not exist" in error.value.meaning


@pytest.mark.parametrize("content", ["", "\n\n", " \r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_an_empty_file_is_an_error_with_three_parts(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError) as error:
        read_rows(write(tmp_path, name, content))
    assert error.value.seen and error.value.meaning and error.value.fix


def test_a_file_with_only_broken_rows_lists_them_all(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_rows(write(tmp_path, "a.jsonl", "nonsense\n" * 5))
    assert len(error.value.problems) == 5


def test_an_unknown_ending_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_rows(write(tmp_path, "a.xlsx", b"PK"))
    assert ".parquet" in error.value.fix


def test_a_damaged_archive(tmp_path: Path) -> None:
    whole = gzip.compress(LINES.encode())
    for damaged in (b"not gzip", whole[:-12], whole[:10] + b"\xff" * 20):
        with pytest.raises(DataError, match="gzip"):
            read_rows(write(tmp_path, "a.jsonl.gz", damaged))


def test_lines_beyond_the_limit_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.data.raw_text.LINE_CAP", 100)
    found = read_rows(write(tmp_path, "a.jsonl", LINES + json.dumps({"text": "x" * 200})))
    assert [(problem.row, problem.code) for problem in found.problems] == [(4, "line_too_long")]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400), suffix=st.sampled_from([*SUFFIXES, ".jsonl.gz", ".csv.gz"]))
def test_random_bytes_give_typed_errors_only(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = write(tmp_path, f"random{suffix}", content)
    try:
        found = read_rows(path)
    except DataError as error:
        assert error.seen and error.fix
    else:
        assert len(found.rows) == len(found.numbers)
        assert found.numbers == sorted(found.numbers)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=20), min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    ),
    cut=st.integers(0, 300),
    noise=st.binary(max_size=3),
)
def test_damaged_json_lines_give_typed_errors_only(
    tmp_path: Path, rows: list[dict[str, str]], cut: int, noise: bytes
) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = write(tmp_path, "damaged.jsonl", data[:cut] + noise + data[cut:])
    try:
        read_rows(path)
    except DataError as error:
        assert error.seen and error.fix


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="ab \n.", max_size=300), max_size=30))
def test_the_pieces_of_a_text_are_the_text(parts: list[str]) -> None:
    text = "\n\n".join(parts)
    rows, numbers, _ = parse_text(text.split("\n"))
    assert "".join(row["text"] for row in rows) == (text if text.strip() else "")
    assert numbers == sorted(numbers)
    if rows:
        assert [row["continues"] for row in rows] == [True] * (len(rows) - 1) + [False]


def test_a_novel_becomes_a_few_hundred_rows(shared: Path) -> None:
    path = shared / "data" / "novel" / "secret_garden_1911.txt"
    found = read_rows(path)
    assert 200 < len(found.rows) < 500
    assert "".join(row["text"] for row in found.rows) == path.read_text(encoding="utf-8")
    lines = path.read_text(encoding="utf-8").split("\n")
    for row, number in zip(found.rows, found.numbers, strict=True):
        assert lines[number - 1].strip() in row["text"]


def test_every_shared_file_is_read_without_problems(shared: Path) -> None:
    for path in sorted((shared / "data").glob("*/*")):
        if path.suffix != ".md" and path.name != "categories.json":
            found = read_rows(path)
            assert found.rows and not found.problems, path
