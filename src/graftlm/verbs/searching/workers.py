"""Further processes that work on a search: on this machine, or on those of a Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from graftlm.core.config import suggest
from graftlm.core.errors import UsageError
from graftlm.core.notices import notice
from graftlm.integrations.ray import on_ray, require_ray

PROCESSES, RAY = "processes", "ray"
PLACES = (PROCESSES, RAY)
_LOG = "helper-{}.log"


def require_place(place: str, workers: int) -> None:
    """Refuse what cannot be used, before anything is begun.

    Raises:
        UsageError: there is no such place, or what it needs is not installed.
    """
    if place not in PLACES:
        raise UsageError(
            f"There is no place {place!r} for helpers{suggest(place, PLACES)}.",
            meaning="Processes that help with a search run on this machine or on a Ray cluster.",
            fix=f"Choose one of {', '.join(PLACES)}.",
        )
    if place == RAY and workers > 1:
        require_ray()


def helpers(
    folder: Path, workers: int, place: str, work: Callable[[str], object]
) -> AbstractContextManager[None]:
    """Inside, `workers` - 1 processes besides this one work on the search in `folder`.

    Args:
        place: one of `PLACES`.
        work: what a worker elsewhere calls with the folder.
    """
    if workers < 2:
        return nullcontext()
    if place == RAY:
        gpus = 1.0 if torch.cuda.is_available() else 0.0
        return on_ray(work, str(folder.resolve()), workers - 1, gpus=gpus)
    return _processes(folder, workers)


@contextmanager
def _processes(folder: Path, workers: int) -> Iterator[None]:
    """They share the processor evenly; what they say is in files of the search."""
    threads = max(1, torch.get_num_threads() // workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "graftlm", "search", str(folder), "--resume"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        started = []
        for number in range(1, workers):
            log = stack.enter_context((folder / _LOG.format(number)).open("ab"))
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        try:
            yield
        except BaseException:
            for process in started:
                process.send_signal(signal.SIGINT)
            raise
        finally:
            for number, process in enumerate(started, start=1):
                if process.wait() not in (0, 1, 130):
                    notice(f"Helper {number} failed; what it said is in {folder / _LOG.format(number)}.")
