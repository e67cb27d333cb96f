"""A model on disk, looked at by a process that has nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from graftlm.models.agreement import logits_on
from graftlm.models.load import load_model
from graftlm.models.reload import PROBES, reload_agreement
from graftlm.models.save import save_model

ROWS = [[3, 4, 5, 6], [9, 8, 7]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and, beside it, what it should say."""
    folder = tmp_path_factory.mktemp("saved")
    model, tokenizer = load_model("sprout", dtype="float32")
    save_model(model, tokenizer, folder)
    tensors = {f"logits.{number}": logits for number, logits in enumerate(logits_on(model, ROWS))}
    save_file(tensors, folder / PROBES, metadata={"probes": json.dumps(ROWS)})
    return folder


def test_the_same_model(saved: Path) -> None:
    found = reload_agreement(saved, "float32")
    assert found.largest_logit_difference == 0.0
    assert (found.probes, found.tokens) == (2, 7)


def test_in_a_process_of_its_own(saved: Path, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graftlm.models.reload", str(saved), "float32"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["is_same_model"]


def test_other_weights_are_seen(saved: Path) -> None:
    model, tokenizer = load_model("sprout", dtype="float32")
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data.mul_(1.5)
    save_model(model, tokenizer, saved)
    assert not reload_agreement(saved, "float32").is_same_model
