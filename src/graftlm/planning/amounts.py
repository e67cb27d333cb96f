"""Bytes, seconds and money in words, as plans say them."""

from __future__ import annotations


def in_gib(count: float) -> str:
    """Bytes of memory.

    >>> in_gib(3 * 2**30), in_gib(250 * 2**20)
    ('3.0 GiB', '0.24 GiB')
    """
    gib = count / 2**30
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:.1f} GiB" if gib >= 1 else f"{gib:.2f} GiB"


def in_time(seconds: float) -> str:
    """Seconds as people say them: no more digits than a prediction has.

    >>> in_time(8.4), in_time(75), in_time(7260), in_time(200000)
    ('8 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def in_count(number: float) -> str:
    """Parameters or tokens.

    >>> in_count(41943040), in_count(650), in_count(8030261248)
    ('41.9 M', '650', '8.0 B')
    """
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= scale:
            return f"{number / (1e3 if unit == 'k' else scale):.1f} {unit}"
    return f"{number:,.0f}"
