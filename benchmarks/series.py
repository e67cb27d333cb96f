"""Everything that docs/results/performance.md shows of a CPU, one script after the other, then the page.

    python benchmarks/series.py                       all parts, kept in results/; then the page's tables
    python benchmarks/series.py --parts tuning levers these parts
    python benchmarks/series.py --rounds 1            half the time, no spread
    python benchmarks/series.py --list                the parts and about how long they take on two cores

Run it on a machine that does nothing else. A part that fails is named at the end, and the others still run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from harness.results import BENCHMARKS

PARTS: dict[str, tuple[int, tuple[tuple[str, ...], ...]]] = {
    "tuning": (26, (("tuning.py", "--full", "--keep", "--rounds", "ROUNDS"),)),
    "levers": (4, (("levers.py", "--keep", "--rounds", "ROUNDS"),)),
    "policies": (2, (("levers.py", "--policies", "--keep", "--rounds", "ROUNDS"),)),
    "profile": (2, (
        ("step_profile.py", "--keep"),
        ("step_profile.py", "--keep", "--side", "PEFT, 16-bit adapters"),
    )),
    "growth": (6, (("growth.py", "--keep"),)),
    "long": (10, (("long_context.py", "--keep"),)),
    "page": (0, (("performance_page.py",),)),
}  # fmt: skip
"""Minutes, and the commands."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2, help="of what takes turns")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    given = parser.parse_args()
    failed = []
    for name in given.parts:
        minutes, commands = PARTS[name]
        if given.list:
            print(f"{name}: about {minutes} minutes")
            continue
        started = time.monotonic()
        for command in commands:
            filled = [str(given.rounds) if word == "ROUNDS" else word for word in command]
            print(f"\n== {name}: {' '.join(filled)}", flush=True)
            if subprocess.run([sys.executable, str(BENCHMARKS / filled[0]), *filled[1:]]).returncode:
                failed.append(" ".join(filled))
        print(f"== {name}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
