"""How much a search may spend: trials, time or tokens, whichever runs out first."""

from __future__ import annotations

import re
from dataclasses import dataclass

from graftlm.core.errors import UsageError

_PART = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<scale>[kMG](?=\s*tok))?\s*(?P<unit>[a-z]*)")
_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SCALES = {None: 1, "k": 1e3, "M": 1e6, "G": 1e9}
_TOKENS = ("tok", "token", "tokens")
_TRIALS = ("", "trial", "trials")


@dataclass(frozen=True)
class Budget:
    """Limits; None where there is none. Seconds are of work, summed over all processes of a search.

    >>> Budget.parse("24, 30m")
    Budget(trials=24, seconds=1800.0, tokens=None)
    >>> Budget.parse("2M tokens").tokens
    2000000
    """

    trials: int | None = None
    seconds: float | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From `24`, `24 trials`, `30m`, `2h`, `500k tokens`, or several of them with commas.

        Raises:
            UsageError: it cannot be read, or allows nothing.
        """
        found: dict[str, float] = {}
        for part in str(text).split(","):
            match = _PART.fullmatch(part.strip())
            kind = _kind(match["unit"]) if match else None
            if match is None or kind is None or kind in found:
                raise _unreadable(text)
            amount = float(match["number"]) * _SCALES[match["scale"]]
            amount *= _SECONDS.get(match["unit"], 1) if kind == "seconds" else 1
            if kind == "trials" and not amount.is_integer():
                raise _unreadable(text)
            found[kind] = amount
        if any(amount <= 0 for amount in found.values()):
            raise UsageError(
                f"The budget {text!r} allows nothing.",
                meaning="A search trains at least one trial.",
                fix="Give more, for instance --budget 24 (trials), --budget 30m, or --budget '2M tokens'.",
            )
        whole = {kind: int(found[kind]) for kind in ("trials", "tokens") if kind in found}
        return cls(whole.get("trials"), found.get("seconds"), whole.get("tokens"))

    @property
    def text(self) -> str:
        """As a person says it."""
        parts = [
            f"{self.trials:,} trials" if self.trials else "",
            f"{self.seconds / 60:g} min" if self.seconds else "",
            f"{self.tokens:,} tokens" if self.tokens else "",
        ]
        return ", ".join(filter(None, parts))

    def left(self, spent: Spent) -> float:
        """The share that is left of what runs out first, from 1 down to 0.

        >>> Budget(trials=10, seconds=60).left(Spent(trials=5, seconds=45, tokens=0))
        0.25
        """
        shares = [
            1 - used / limit
            for used, limit in (
                (spent.trials, self.trials), (spent.seconds, self.seconds), (spent.tokens, self.tokens),
            )
            if limit is not None
        ]  # fmt: skip
        return max(0.0, min(shares, default=1.0))

    def allows(self, spent: Spent, more: Spent) -> bool:
        """Whether `more` still fits."""
        total = Spent(spent.trials + more.trials, spent.seconds + more.seconds, spent.tokens + more.tokens)
        limits = ((total.trials, self.trials), (total.seconds, self.seconds), (total.tokens, self.tokens))
        return all(limit is None or used <= limit for used, limit in limits)


@dataclass(frozen=True)
class Spent:
    """What was used: trials begun, seconds of training and measuring, tokens that went through the model."""

    trials: int = 0
    seconds: float = 0.0
    tokens: int = 0


def _kind(unit: str) -> str | None:
    if unit in _TRIALS:
        return "trials"
    if unit in _SECONDS:
        return "seconds"
    return "tokens" if unit in _TOKENS else None


def _unreadable(text: str) -> UsageError:
    return UsageError(
        f"Cannot read the budget {text!r}.",
        meaning="It is a number of trials, a time, a number of tokens, or several of them.",
        fix="Write --budget 24, --budget 30m, --budget '2M tokens', or --budget '24, 30m'.",
    )
