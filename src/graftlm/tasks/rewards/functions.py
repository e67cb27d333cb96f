"""Built-in rewards: functions of what was written and of the reference, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from graftlm.evaluation.metrics import exact_match

Judge = Callable[[str, str], float]
"""A completion and its reference -> 1 for right, 0 for wrong."""

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)")


def same_text(completion: str, reference: str) -> float:
    """The completion is the reference, but for spaces at its ends.

    >>> same_text(" 42\\n", "42"), same_text("42.", "42")
    (1.0, 0.0)
    """
    return float(exact_match(completion, reference))


def same_number(completion: str, reference: str) -> float:
    """The last number of the completion is the last number of the reference, however it is written.

    >>> same_number("12 and 30 make 42.", "So #### 42"), same_number("1,200.0", "1200"), same_number("", "4")
    (1.0, 1.0, 0.0)
    """
    written, wanted = last_number(completion), last_number(reference)
    return float(written is not None and written == wanted)


def contains(completion: str, reference: str) -> float:
    """The reference stands somewhere in the completion, in any letter case.

    >>> contains("It is Paris, of course.", "paris")
    1.0
    """
    return float(reference.strip().casefold() in completion.casefold())


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none.

    >>> last_number("about 1,234.50 or -3")
    -3.0
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


BUILT_IN: Mapping[str, Judge] = {
    "exact_match": same_text,
    "last_number": same_number,
    "contains": contains,
}
"""Name in `task.rewards` -> function."""
