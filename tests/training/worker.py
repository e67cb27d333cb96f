"""Runs training jobs in processes of their own, with faults on request.

`worker.py serve` reads one JSON job per line, forks a child for it (torch is imported once) and
answers with the child's exit code and report. `worker.py run JOB` runs one job in this process.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import rig

from graftlm.core.errors import GraftError
from graftlm.training.loop import train
from graftlm.training.low_bit_optim import require_optimizer

# Audit events, and how many of their arguments are paths or descriptors (the last: of a directory).
_EVENTS = {"open": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 2, "os.rmdir": 2, "os.truncate": 1}


class FileFaults:
    """Counts the file events inside the run folder and acts at the one that was asked for.

    A write counts twice: before it, and with half of its bytes written.
    """

    def __init__(self, folder: str, at: int | None, act: Callable[[], None]) -> None:
        self.folder, self.at, self.act, self.count = folder, at, act, 0
        self._write, self._fsync = os.write, os.fsync
        sys.addaudithook(self._audit)
        os.write, os.fsync = self.write, self.fsync

    def _tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in _EVENTS and any(self._inside(item) for item in arguments[: _EVENTS[name]]):
            self._tick()

    def _inside(self, item: Any) -> bool:
        if isinstance(item, int):
            return self._is_ours(item)
        return isinstance(item, str | bytes | os.PathLike) and os.fsdecode(item).startswith(self.folder)

    def _is_ours(self, descriptor: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}").startswith(self.folder)
        except OSError:
            return False

    def write(self, descriptor: int, data: Any) -> int:
        if self._is_ours(descriptor):
            self._tick()
            self.count += 1
            if self.count == self.at:
                self._write(descriptor, memoryview(data)[: len(data) // 2])
                self.act()
        return self._write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        if self._is_ours(descriptor):
            self._tick()
        self._fsync(descriptor)


def full_disk(folder: str, room: int) -> None:
    """Let `room` bytes be written below `folder`, then report a full disk, for good."""
    left, write = room, os.write

    def limited(descriptor: int, data: Any) -> int:
        nonlocal left
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(folder):
            return write(descriptor, data)
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, memoryview(data)[:left])
        left -= written
        return written

    os.write = limited


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Train in `job["run"]`; gives what a test wants to know."""
    run = Path(job["run"])
    known = {item.name for item in fields(rig.Settings)}
    settings = rig.Settings(**{key: value for key, value in job.items() if key in known})
    model = rig.make_model(**job.get("model", {}))
    batches = rig.RowBatches(rig.make_rows(job.get("rows", 7), seed=job.get("data_seed", 11)))
    kill = job.get("signal_at", {})
    calls: dict[str, int] = {}

    def point(phase: str) -> None:
        calls[phase] = calls.get(phase, 0) + 1
        if kill.get("phase") == phase and calls[phase] in kill["calls"]:
            for _ in range(kill.get("times", 1)):
                os.kill(os.getpid(), getattr(signal, kill["signal"]))

    def objective(model: Any, batch: Any) -> Any:
        point("forward")
        parts = rig.objective(model, batch)
        if parts.loss_sum.requires_grad:
            parts.loss_sum.register_hook(lambda grad: point("backward"))
        return parts

    def callback(event: Any) -> None:
        point(event.kind)

    faults = None
    if "kill_event" in job or job.get("count_events"):
        faults = FileFaults(str(run), job.get("kill_event"), lambda: os.kill(os.getpid(), signal.SIGKILL))
    if kill.get("phase") == "save":
        FileFaults(str(run / "checkpoints"), kill["event"], lambda: point("save"))
    if "room" in job:
        full_disk(str(run / "checkpoints"), job["room"])
    evaluate = rig.make_evaluate(model, lambda: point("evaluating")) if settings.eval_steps else None
    try:
        result = train(
            model,
            objective,
            batches,
            rig.trainable(model),
            settings,
            run=run,
            resume=job.get("resume", "if_present"),
            evaluate=evaluate,
            callbacks=[callback],
        )
    except GraftError as error:
        return {"code": error.exit_code, **error.as_dict(), "left": temporaries(run)}
    return {
        "code": result.exit_code,
        "why": result.why,
        "step": result.step,
        "best_step": result.best_step,
        "weights": result.weights,
        "served": batches.served,
        "events": faults.count if faults else 0,
        "left": temporaries(run),
    }


def temporaries(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*.tmp-*")]


def serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    for line in sys.stdin:
        job = json.loads(line)
        require_optimizer(job.get("optim", "adamw"))  # imported here, once, and not by every child
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            # Saved before faults are installed: the report must come through.
            send = os.write
            try:
                report = run_job(job)
                send(writer, json.dumps(report).encode())
                os._exit(report["code"])
            except BaseException as error:
                send(writer, json.dumps({"crash": repr(error)}).encode())
                os._exit(99)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            text = stream.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, (json.dumps({**(json.loads(text) if text else {}), "code": code}) + "\n").encode())


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        outcome = run_job(json.loads(sys.argv[2]))
        print(json.dumps(outcome))
        sys.exit(outcome["code"])
