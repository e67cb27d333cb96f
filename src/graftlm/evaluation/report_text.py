"""Text and numbers for the page: everything that a user or a model wrote goes through `text`."""

from __future__ import annotations

import html
import math
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202d\u202e]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MINUS = "\u2212"
_THIN = "\u202f"  # narrow no-break space, before units


def text(value: object) -> str:
    """Escape for HTML, in text and in attributes; half surrogates become U+FFFD.

    Control characters and forced text directions (which can make text read as another) become visible.

    >>> text('<b title="x">')
    '&lt;b title=&quot;x&quot;&gt;'
    """
    plain = _SURROGATE.sub("\ufffd", str(value).replace("\r\n", "\n"))
    return html.escape(_CONTROL.sub(lambda match: _picture(match[0]), plain), quote=True)


def _picture(control: str) -> str:
    if control in "\u202d\u202e":
        return f"[U+{ord(control):04X}]"
    return "\u2421" if control == "\x7f" else chr(0x2400 + ord(control))


def clipped(value: str, most: int = 1500) -> str:
    """Escaped text of at most `most` characters, saying how much is left out."""
    if len(value) <= most:
        return text(value)
    return f'{text(value[:most])}<span class="more"> \u2026 {len(value) - most:,} more characters</span>'


def number(value: float, digits: int = 2) -> str:
    """Fixed digits with a real minus sign.

    >>> number(-1.2345)
    '\u22121.23'
    """
    return f"{value:,.{digits}f}".replace("-", _MINUS)


def signed(value: float, digits: int = 2) -> str:
    """Like `number`, with a plus for what is not negative."""
    return f"{value:+,.{digits}f}".replace("-", _MINUS)


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage.

    >>> percent(0.125, 1)
    '12.5\u202f%'
    """
    return f"{number(share * 100, digits)}{_THIN}%"


def signed_percent(share: float, digits: int = 1) -> str:
    """A relative change as a percentage."""
    return f"{signed(share * 100, digits)}{_THIN}%"


def plain(figure: str) -> str:
    """A figure in plain text as the page has it: a real minus sign, and a unit that stays with its number.

    >>> plain("-3.1 %")
    '\u22123.1\u202f%'
    """
    return figure.replace("-", _MINUS).replace(" %", f"{_THIN}%")


def count(value: float) -> str:
    """A whole number with thousands set apart."""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """Few characters, for axes: 0.0002 becomes 2e-4, 25000 becomes 25k.

    >>> short(0.0002), short(25000), short(0.5), short(3.0)
    ('2e\u22124', '25k', '0.5', '3')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}".replace("-", _MINUS)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if size >= scale:
            return f"{value / (1e3 if unit == 'k' else scale):.4g}{unit}".replace("-", _MINUS)
    return f"{value:.6g}".replace("-", _MINUS)


def precise(value: float) -> str:
    """Four significant digits."""
    return short(value) if abs(value) < 1e-3 else f"{value:.4g}".replace("-", _MINUS)


def size(amount: float) -> str:
    """Bytes in binary units.

    >>> size(3 * 2**30)
    '3.0\u202fGiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f}{_THIN}B" if unit == "B" else f"{amount:.1f}{_THIN}{unit}"
        amount /= 1024
    return f"{amount:.1f}{_THIN}TiB"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(75), duration(7260)
    ('1\u202fmin 15\u202fs', '2\u202fh 1\u202fmin')
    """
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 10:
        return f"{seconds:.1f}{_THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{_THIN}h {minutes}{_THIN}min"
    return f"{minutes}{_THIN}min {rest}{_THIN}s" if minutes else f"{rest}{_THIN}s"
