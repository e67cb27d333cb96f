"""`graft tune` on a base that stays on disk: the same run, to the bit."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SETTINGS, Outcome, assignments

from graftlm.core.errors import ConfigError
from graftlm.core.notices import forget_notices
from graftlm.methods.attach import adapters_of
from graftlm.models.streaming.streamed import placement_of
from graftlm.training.recipe import make_recipe
from graftlm.verbs.chat import chat
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

STORED = (*(item for item in SETTINGS if not item.startswith("model.dtype")), "model.dtype=bfloat16")
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    forget_notices()
    folder = tmp_path_factory.mktemp("runs") / "streamed"
    return tune(sums, model="sprout", out=folder, overrides=(*STORED, "model.placement=disk"))


def test_it_is_the_run_of_a_resident_base(run: TuneResult, sums: Path, tmp_path: Path) -> None:
    resident = tune(sums, model="sprout", out=tmp_path / "resident", overrides=STORED)
    assert (run.run / ADAPTER).read_bytes() == (resident.run / ADAPTER).read_bytes()
    plans = [json.loads((each.run / "plan.json").read_text()) for each in (run, resident)]
    assert [plan["placement"] for plan in plans] == ["disk", "resident"]
    assert "each pass, forward or backward, reads" in plans[0]["placement_why"]
    assert plans[1]["placement_why"] == "the whole base is in memory"


def test_what_is_proved_and_said(run: TuneResult) -> None:
    assert run.passed
    assert any("its layers on disk" in line for line in run.lines)
    assert any("reload bit-equal, merge verified" in line for line in run.lines)


def test_evaluation_and_conversation_stream_as_the_run_did(run: TuneResult, sums: Path) -> None:
    assert evaluate(run.run, data=sums, limit=6).comparison.loss.rows == 6
    session = chat(run.run, max_new_tokens=3)
    assert placement_of(session.model)[0] == "disk" and adapters_of(session.model) is not None
    assert isinstance(session.reply("1 + 2 ="), str)


@pytest.mark.parametrize(
    ("settings", "near"),
    [
        (("model.placement=disk", "method.type=full"), "trains a copy of every weight in memory"),
        (("model.placement=disc",), "placement"),
    ],
)
def test_recipes_that_make_no_sense(settings: tuple[str, ...], near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_recipe({"model": "sprout", "data": "rows.jsonl"}, settings)
    assert near in str(caught.value)


def test_norms_and_biases_can_be_trained() -> None:
    settings = ("model.placement=disk", "method.type=norms")
    assert make_recipe({"model": "sprout", "data": "rows.jsonl"}, settings).model.placement == "disk"


@pytest.mark.slow
def test_the_command_of_the_guide(
    command: Callable[..., Outcome], sums: Path, repository: Path, tmp_path: Path
) -> None:
    text = (repository / "docs/how-to/stream.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^graft tune .*$", text, flags=re.MULTILINE)
    words = [str(sums) if word.endswith(".jsonl") else word for word in shlex.split(line)[1:]]
    done = command(*words, "--out", str(tmp_path / "run"), *assignments(STORED))
    assert done.code == 0, done.err
