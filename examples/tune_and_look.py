"""One function for a whole run: data in, an adapter that is measured and proved out.

python examples/tune_and_look.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import graftlm as gl


def main(folder: Path) -> None:
    """Tune, measure on other rows, talk."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(120)]
    train, unseen = folder / "train.jsonl", folder / "unseen.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:90]))
    unseen.write_text("".join(json.dumps(row) + "\n" for row in rows[90:]))

    print(gl.check(train, model="sprout").ok)
    run = gl.tune(train, model="sprout", out=folder / "run", overrides=["train.max_steps=12"])
    print(run.verdict)
    print("report:", run.report)

    measured = gl.evaluate(run.run, data=unseen)
    print(measured.verdict)
    print(gl.chat(run.run).reply("What is twice 21?"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tune-and-look"))
