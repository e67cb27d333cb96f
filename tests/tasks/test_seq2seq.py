"""An encoder-decoder tuned from raw data to a merged model: on a real base, and with wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from graftlm.core.errors import ConfigError, DataError, ModelError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.generate import decode, stop_token_ids
from graftlm.models.generate_answers import generate_answers
from graftlm.models.load import load_model
from graftlm.verbs.chat import ChatSession, chat
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.merge import merge
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

SETTINGS = (
    "data.format=source_target(word, gb)",
    "train.max_steps=8",
    "train.save_steps=2",
    "train.eval_steps=4",
    "train.per_device_train_batch_size=8",
    "output.report_to=none",
)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def base(shared: Path) -> str:
    return str(shared / "models" / "g2p-bart-us")


@pytest.fixture(scope="module")
def words(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (shared / "data/g2p-english/train.jsonl").read_text(encoding="utf-8").splitlines()[:160]
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(base: str, words: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    out = tmp_path_factory.mktemp("tuned") / "run"
    return tune(words, model=base, task="seq2seq", out=out, overrides=SETTINGS)


def test_a_run(tuned: TuneResult) -> None:
    before, after = (tuned.figures[when] for when in ("before", "after"))
    assert after["held_out_loss"] < before["held_out_loss"]
    assert list(tuned.figures["measures"])[:2] == ["chrf", "character_error_rate"]
    plan = json.loads((tuned.run / "plan.json").read_text())
    assert plan["task"] == "seq2seq" and plan["loss_path"] == "frozen head"
    assert plan["windows_filled"] > 0.7, "rows of like length go together"
    log = (tuned.run / "events.jsonl").read_text()
    assert '"perplexity"' in log
    report = tuned.report.read_text(encoding="utf-8")
    assert "chrF" in report and "Character error rate" in report


def test_evaluated_by_the_columns_that_were_named(tuned: TuneResult, words: Path) -> None:
    found = evaluate(tuned.run, data=words, limit=40)
    assert found.comparison.loss.after.value < found.comparison.loss.before.value
    assert found.comparison.loss.before.value > 2, "against the British column, not the first one"


@pytest.mark.slow
def test_merged_and_talked_to(tuned: TuneResult, tmp_path: Path) -> None:
    session = chat(tuned.run)
    answers = [session.reply(word) for word in ("lightning", "teapot")]
    merged = merge(tuned.run, out=tmp_path / "merged")
    assert merged.reloaded.is_same_model
    plain = chat(tmp_path / "merged")
    assert [plain.reply(word) for word in ("lightning", "teapot")] == answers
    session.toggle_adapter()
    base = [session.reply(word) for word in ("lightning", "teapot")]
    assert all(text and text.isprintable() for text in [*answers, *base])


@pytest.mark.slow
def test_killed_and_resumed(base: str, words: Path, tuned: TuneResult, tmp_path: Path) -> None:
    """Equal to the bit: batches, dropout and answers are functions of the recipe."""
    run = tmp_path / "run"
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-m", "graftlm", "tune", str(words), "--model", base, "--task", "seq2seq"]
    child = subprocess.Popen([*command, "--out", str(run), *options], stderr=subprocess.DEVNULL)
    over = threading.Event()
    threading.Thread(target=_kill_after, args=(run / "events.jsonl", child.pid, over)).start()
    child.wait(timeout=300)
    over.set()
    result = tune(run, resume=True)
    assert files_of(result.adapter) == files_of(tuned.adapter)
    assert result.figures["after"] == tuned.figures["after"]


def _kill_after(log: Path, pid: int, over: threading.Event) -> None:
    while not over.is_set():
        if log.exists() and '"step": 3' in log.read_text(encoding="utf-8"):
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.005)


@pytest.mark.parametrize("config", [PromptTuningConfig(num_virtual_tokens=4), LoraConfig(r=4)])
def test_a_session_writes_what_generation_does(base: str, config: MethodConfig) -> None:
    model, tokenizer = load_model(base)
    adapters = attach(model, config, storage=FOLDER)
    for parameter in adapters.named_parameters("default").values():
        nn.init.normal_(parameter, std=0.05)
    words, session = ["lightning", "teapot", "strength"], ChatSession(model, tokenizer)
    written = generate_answers(
        model,
        [tokenizer(word)["input_ids"] for word in words],
        max_new_tokens=63,
        stop_ids=stop_token_ids(model, tokenizer),
    )
    expected = [decode(tokenizer, answer.token_ids) for answer in written]
    assert [session.reply(word) for word in words] == expected
    assert len(set(expected)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qlora", "ia3", "bottleneck", "prefix", "prompt", "full", "dora"])
def test_other_methods(method: str, base: str, words: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, "train.max_steps=2", "train.learning_rate=1e-4"]
    run = tune(words, model=base, task="seq2seq", method=method, out=tmp_path / "run", overrides=settings)
    proof = " ".join(map(str, run.lines))
    assert "reload bit-equal" in proof and "DIFFERS" not in proof


def test_scores_by_name_and_beams(base: str, words: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, "train.max_steps=1", "eval.metrics=[word_error_rate, chrf]", "task.num_beams=3"]
    found = tune(words, model=base, task="seq2seq", out=tmp_path / "run", overrides=settings)
    assert list(found.figures["measures"])[:2] == ["word_error_rate", "chrf"]
    recipe = (found.run / "recipe.yaml").read_text()
    assert "num_beams: 3" in recipe and "packing: false" in recipe


def refused(
    error: type[Exception], text: str, source: Path, tmp_path: Path, model: str, settings: Sequence[str] = ()
) -> Any:
    with pytest.raises(error, match=text) as caught:
        tune(source, model=model, task="seq2seq", out=tmp_path / "run", overrides=settings)
    return caught.value


def test_wrong_input(base: str, words: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"only text {n}"}) + "\n" for n in range(80)))
    found = refused(DataError, "nothing to train on|anything to train on", texts, tmp_path, base)
    assert "nothing stands before the text" in str(found)
    empty = tmp_path / "empty.jsonl"
    rows = [{"input": f"a{n}", "target": "b" if n else ""} for n in range(80)]
    empty.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "row 1" in str(refused(DataError, "1 of 80 rows", empty, tmp_path, base))
    named = ("data.format=source_target(word, gb)",)
    refused(ModelError, "no encoder-decoder", words, tmp_path, "sprout", named)
    refused(ConfigError, "train_on: all has no effect", words, tmp_path, base, (*named, "data.train_on=all"))
    found = refused(
        ConfigError, "problem", words, tmp_path, base, (*named, "task.label_smoothing=1.5", "task.beams=2")
    )
    assert "label_smoothing" in str(found) and "num_beams" in str(found)
    settings = (*named, "task.max_target_length=65")
    refused(ConfigError, "decoder of this base has room for 64", words, tmp_path, base, settings)
    refused(ConfigError, "context of this base is 64", words, tmp_path, base, (*named, "data.max_length=65"))
