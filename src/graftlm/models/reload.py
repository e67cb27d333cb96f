"""`python -m graftlm.models.reload FOLDER DTYPE`: does a model on disk say what it should? One JSON line.

Run in a process of its own, so that nothing in memory can stand in for what is missing on disk.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors import safe_open

from graftlm.models.agreement import Agreement, agreement, logits_on
from graftlm.models.load import load_model

PROBES = "probes.safetensors"


def reload_agreement(folder: Path, dtype: str) -> Agreement:
    """Load the model in `folder` and compare its logits with those in the probe file beside it."""
    with safe_open(folder / PROBES, framework="pt") as file:
        probes = json.loads(file.metadata()["probes"])
        expected = [file.get_tensor(f"logits.{number}") for number in range(len(probes))]
    model, _ = load_model(str(folder), dtype=dtype)
    return agreement(expected, logits_on(model, probes))


if __name__ == "__main__":
    print(json.dumps(reload_agreement(Path(sys.argv[1]), sys.argv[2]).as_dict()))
