"""A page of results whose tables are filled in from files: written, or only checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def write_page(about: str | None, page: Path, filled: Callable[[str], str]) -> None:
    """The command line of such a page: `--check` changes nothing, and fails where the page is out of date.

    Args:
        about: the help text.
        filled: the page's text with fresh tables.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the page is out of date"
    )
    given = parser.parse_args()
    text = page.read_text(encoding="utf-8")
    new = filled(text)
    shown = page.relative_to(page.parents[2])
    if given.check:
        raise SystemExit(f"{shown} is out of date" if new != text else 0)
    page.write_text(new, encoding="utf-8")
    print(f"wrote {shown}")
