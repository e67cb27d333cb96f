"""Helpers of a search on the machines of a Ray cluster (https://ray.io), where Ray is installed.

Ray only starts them: what they work on, and who does what, is agreed upon through the folder of the search,
which every machine must see under the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from graftlm.core.errors import UsageError
from graftlm.core.notices import notice


@contextmanager
def on_ray(work: Callable[[str], object], argument: str, count: int, *, gpus: float) -> Iterator[None]:
    """Inside, `count` workers of the cluster call `work(argument)`; leaving waits for them.

    Args:
        gpus: that each of them needs.

    Raises:
        UsageError: Ray is not installed.
    """
    ray = _ray()
    if not ray.is_initialized():
        ray.init(address=None, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    started = [ray.remote(work).options(num_cpus=1, num_gpus=gpus).remote(argument) for _ in range(count)]
    try:
        yield
        for worker in started:
            try:
                ray.get(worker)
            except ray.exceptions.RayError as error:
                notice(f"A worker of the Ray cluster ended early: {str(error).splitlines()[0]}")
    except BaseException:
        for worker in started:
            ray.cancel(worker, force=False)  # as Ctrl-C: what they did is kept
        raise


def require_ray() -> None:
    """Refuse to begin what needs it.

    Raises:
        UsageError: it is not installed.
    """
    _ray()


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        raise UsageError(
            "The package 'ray' is not installed.",
            meaning="It starts workers on the machines of a Ray cluster.",
            fix="pip install ray, or start helpers yourself on any machine: graft search SEARCH --resume",
        ) from None
