"""Progress for people: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
from typing import Any

from graftlm.training.callbacks import Event
from graftlm.training.progress_bar import ProgressBar, ProgressLines, progress_display

STEP = {
    "loss": 2.0,
    "learning_rate": 1e-4,
    "tokens_per_second": 2000.0,
    "memory_bytes": 2**30,
    "seconds": 0.5,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(display: Any) -> None:
    display(Event("start", {"start_step": 0, "total_steps": 3}))
    for step in (1, 2, 3):
        display(Event("step", {"step": step, **STEP}))
    display(Event("evaluate", {"step": 3, "loss": 1.25, "tokens": 9, "rows": 4}))
    display(Event("skipped", {"step": 3, "why": "not finite", "rows": tuple(range(20))}))
    display(Event("notice", {"text": "[odd] text"}))
    display(Event("end", {"step": 3, "seconds": 1.0, "why": "finished"}))


def test_lines_for_a_file() -> None:
    stream = io.StringIO()
    display = progress_display(stream, line_seconds=60)
    assert isinstance(display, ProgressLines)
    play(display)
    assert stream.getvalue().splitlines() == [
        "step 1/3  loss 2.0000  lr 1.00e-04  2,000 tok/s  1.00 GiB  about 1 s left",
        "step 3/3  loss 2.0000  lr 1.00e-04  2,000 tok/s  1.00 GiB  about 0 s left",
        "step 3: held-out loss 1.2500 (4 rows)",
        "step 3 skipped: not finite (rows 0, 1, 2, 3, 4, 5, 6, 7, ...)",
        "[odd] text",
    ]


def test_a_bar_for_a_terminal() -> None:
    stream = Terminal()
    display = progress_display(stream)
    assert isinstance(display, ProgressBar)
    play(display)
    assert "held-out loss 1.2500" in stream.getvalue() and "[odd] text" in stream.getvalue()


def test_a_resumed_and_an_interrupted_run_say_so() -> None:
    stream = io.StringIO()
    display = progress_display(stream)
    display(Event("start", {"start_step": 5, "total_steps": 9}))
    display(Event("interrupted", {"step": 6}))
    assert stream.getvalue() == "resuming after step 5 of 9\nstopped at step 6; go on with --resume\n"
