"""Where the time of a step goes: matrix products, adapter, attention, head, norms, optimizer, copies, gaps.

    python benchmarks/step_profile.py                                   ours, 0.17B, 2,048 tokens a step
    python benchmarks/step_profile.py --side "PEFT, 16-bit adapters"    a peer (see tuning.py --list)
    python benchmarks/step_profile.py --without attention --top 30      and the 30 most expensive operators

Beside each part stands its floor: the arithmetic it needs at the matrix rate that this machine shows, or the
bytes it has to move at its copy rate, both measured in the same run. Host gaps are the wall clock minus all
operators. The profiler itself costs time: shares are what this is for, not tokens per second. (A script of
the name `profile.py` would hide a module of Python's own from everything in this folder.)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import results
from harness.case import Case, parse_case
from harness.machine import Rates, measure_rates
from harness.measurement import Recorder, Run
from harness.parts import GAPS, PARTS, Operator, floors, part_of
from harness.shapes import SHAPES
from harness.sides.registry import GRAFT, SIDES
from harness.table import markdown
from harness.worker import run_process, train_side
from harness.writer import per_step

RESULTS = results.FOLDER / "step_profile.csv"


class ProfilingRecorder(Recorder):
    """Profiles the last step."""

    def __init__(self, run: Run, device: str, steps: int) -> None:
        super().__init__(run, device)
        self.last = steps - 1
        self.wall = 0.0
        self.profiler: Any = None

    def step(self, loss: float, norm: float, tokens: int) -> None:
        super().step(loss, norm, tokens)
        if len(self.run.seconds) == self.last:
            self.profiler = _profiler(self.device)
            self.profiler.start()
            self._since = time.perf_counter()
        elif self.profiler is not None and not self.wall:
            self.wall = time.perf_counter() - self._since
            self.profiler.stop()


def _profiler(device: str) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    return profile(activities=activities, record_shapes=True)


def calls(profiler: Any, device: str) -> Iterator[tuple[Operator, float]]:
    """Every operator call with the seconds it took itself: on the GPU where there is one."""
    for event in profiler.events():
        taken = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        shapes = tuple(tuple(shape) for shape in event.input_shapes if shape)
        within, parent = [], event.cpu_parent
        while parent is not None:
            within.append(parent.name)
            parent = parent.cpu_parent
        yield Operator(event.name.rpartition("::")[2], shapes, tuple(within)), taken / 1e6


def work(case: Case, side: str, folder: Path, top: int) -> None:
    """Train and profile in this process; parts and operators as JSON on the last line."""
    recorder = ProfilingRecorder(Run(side, warm_up=case.warm_up), case.device, case.steps)
    train_side(case, side, folder, recorder)
    parts: dict[str, float] = defaultdict(float)
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    busy = 0.0
    for call, seconds in calls(recorder.profiler, case.device):
        part = part_of(call, case)
        parts[part] += seconds
        busy += seconds
        line = operators[f"{part} | {call.name} | {' '.join('x'.join(map(str, s)) for s in call.shapes[:3])}"]
        line[0] += seconds
        line[1] += 1
    parts[GAPS] += max(0.0, recorder.wall - busy)
    most = sorted(operators.items(), key=lambda item: -item[1][0])[:top]
    print(json.dumps({"wall": recorder.wall, "parts": parts, "operators": most}))


def show(case: Case, found: dict[str, Any], floor: dict[str, float], rates: Rates) -> str:
    """Markdown: the parts with their floors, then the most expensive operators."""
    wall, parts = found["wall"], found["parts"]
    lines: list[tuple[object, ...]] = []
    for part in PARTS:
        taken, least = parts.get(part, 0.0), floor[part]
        times = f"{taken / least:.1f}" if least else ""
        lines.append((part, f"{1e3 * taken:.0f}", f"{100 * taken / wall:.0f} %", f"{1e3 * least:.0f}", times))
    lowest = sum(floor.values())
    lines.append(("**the step**", f"{1e3 * wall:.0f}", "", f"{1e3 * lowest:.0f}", f"{wall / lowest:.1f}"))
    text = [
        f"{rates.matrix / 1e12:.2f} TFLOP/s in matrix products, {rates.copy / 1e9:.0f} GB/s in copies",
        markdown(("part", "ms", "share", "floor ms", "times the floor"), lines),
    ]
    if found["operators"]:
        operators = [
            (*name.split(" | "), f"{1e3 * seconds:.1f}", int(count))
            for name, (seconds, count) in found["operators"]
        ]
        text.append(markdown(("part", "operator", "shapes", "ms", "calls"), operators))
    return "\n\n".join(text)


def keep(case: Case, side: str, found: dict[str, Any], floor: dict[str, float], rates: Rates) -> None:
    """Append one row for each part."""
    where = results.where(__file__, "torch", "transformers", "peft", "trl", "graftlm")
    head = {"side": side, "shape": case.shape, "rows": case.rows, "length": case.length}
    rest = {
        "wall": round(found["wall"], 5),
        "matrix_rate": f"{rates.matrix:.6g}",
        "copy_rate": f"{rates.copy:.6g}",
    }
    results.append(RESULTS, [
        {**head, "part": part, "seconds": round(found["parts"].get(part, 0.0), 5),
         "floor": round(floor[part], 5), **rest, **where}
        for part in PARTS
    ])  # fmt: skip


def main() -> None:
    given = arguments()
    named = (
        "shape",
        "rows",
        "length",
        "rank",
        "device",
        "method",
        "quantization",
        "recompute",
        "steps",
        "data",
    )
    case = Case("profile", without=tuple(given.without), **{name: getattr(given, name) for name in named})
    if given.folder:
        work(parse_case(given.case), given.side, given.folder, given.top)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_process(["-m", "harness.writer", case.dumps(), scratch], "writing the model")
        rates = measure_rates(case)
        command = [__file__, "--folder", scratch, "--case", case.dumps(), "--side", given.side]
        found = json.loads(run_process([*command, "--top", str(given.top)], given.side))
        last = per_step(case, folder)[-1]
    documents = [len(ids) for ids, _ in last]
    floor = floors(case, rates, documents, sum(len(labels) - labels.count(-100) for _, labels in last))
    print(f"{given.side}, {case.shape}, {case.rows} x {case.length}:\n\n{show(case, found, floor, rates)}")
    if given.keep:
        keep(case, given.side, found, floor, rates)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--side", choices=list(SIDES), default=GRAFT, metavar="SIDE")
    parser.add_argument("--shape", default="0.17b", help=f"{', '.join(SHAPES)}; or 1024x8x2816x32000")
    for name, default in (("rows", 4), ("length", 512), ("rank", 16), ("steps", 4), ("top", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", choices=("lora", "dora", "ia3", "prefix", "bottleneck"), default="lora")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--recompute", default="auto", help="a policy of train.recompute")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", default="", help="real examples: a file under the shared data folder")
    parser.add_argument("--without", nargs="+", default=(), metavar="PART", help="see tuning.py")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
