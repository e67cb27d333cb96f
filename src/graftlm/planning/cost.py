"""What a run costs."""

from __future__ import annotations

from graftlm.planning.machine import Machine

HOUR = 3600


def cost(seconds: float, machine: Machine) -> float | None:
    """In the currency of the machine's price; None where nobody told one.

    >>> from dataclasses import replace
    >>> from graftlm.planning.gpus import gpu_named
    >>> cost(1800, replace(gpu_named("rtx4090").machine, price_per_hour=0.5))
    0.25
    """
    return None if machine.price_per_hour is None else seconds / HOUR * machine.price_per_hour
