"""Bytes of a data file to decoded lines; every undecodable line becomes a problem."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.records import Problem

#: A longer line is not a row but a damaged file; it is reported, not parsed.
LINE_CAP = 16 * 1024 * 1024

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_bytes(path: Path) -> bytes:
    """The file's bytes, decompressed if its name ends in `.gz`.

    Raises:
        DataError: the file cannot be opened or is a damaged archive.
    """
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as stream:
                return stream.read()
        return path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path.name} is not a complete gzip file: {error}",
            meaning="The download was cut short, or the file is not compressed at all.",
            fix="Download it again, or take '.gz' off the name of an uncompressed file.",
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}",
            meaning="The file's permissions or its disk refuse it.",
            fix="Check the permissions of the file and its folder.",
        ) from None


def decode(data: bytes) -> tuple[list[str | None], list[Problem]]:
    r"""Lines without their line ends; a line that cannot be used is None and has a problem.

    UTF-8 with or without byte-order mark, UTF-16 with one; LF and CRLF.

    >>> decode(b"\xef\xbb\xbfone\r\ntwo\n")[0]
    ['one', 'two', '']
    >>> lines, problems = decode(b"fine\ncaf\xe9\n")
    >>> lines, problems[0].row
    (['fine', None, ''], 2)
    """
    if data.startswith(_UTF16):
        try:
            return _capped(_split(data.decode("utf-16")))
        except UnicodeDecodeError:
            return [None], [_not_utf8(1, data[:2], "")]
    try:
        return _capped(_split(data.decode("utf-8-sig")))
    except UnicodeDecodeError:
        return _decode_by_line(data.removeprefix(codecs.BOM_UTF8))


def _split(text: str) -> list[str | None]:
    # Not splitlines(): that also cuts at U+2028 and form feeds, which JSON strings may hold.
    return [line.removesuffix("\r") for line in text.split("\n")]


def _capped(lines: list[str | None]) -> tuple[list[str | None], list[Problem]]:
    problems = []
    for index, line in enumerate(lines):
        if line is not None and len(line) > LINE_CAP:
            lines[index] = None
            problems.append(_too_long(index + 1, len(line)))
    return lines, problems


def _decode_by_line(data: bytes) -> tuple[list[str | None], list[Problem]]:
    lines: list[str | None] = []
    problems = []
    for number, raw in enumerate(data.split(b"\n"), start=1):
        try:
            lines.append(raw.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            lines.append(None)
            problems.append(
                _not_utf8(number, raw[error.start : error.start + 1], f" in column {error.start + 1}")
            )
    capped, too_long = _capped(lines)
    return capped, problems + too_long


def _not_utf8(number: int, byte: bytes, where: str) -> Problem:
    return Problem(
        number,
        "error",
        "encoding",
        f"not UTF-8 text (byte 0x{byte.hex()}{where})",
        "Save the file as UTF-8; for a Latin-1 or Windows file: iconv -f CP1252 -t UTF-8 OLD > NEW",
    )


def _too_long(number: int, length: int) -> Problem:
    return Problem(
        number,
        "error",
        "line_too_long",
        f"the line has {length:,} characters (limit {LINE_CAP:,})",
        "Check that every row has its own line.",
    )
