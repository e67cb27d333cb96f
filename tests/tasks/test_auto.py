"""`task: auto`: what is told from which data and base, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, GPT2Config, RobertaConfig

from graftlm.core.errors import DataError
from graftlm.models.base_kind import kind_of
from graftlm.tasks import auto
from graftlm.tasks.auto import told

PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
MARK = {"prompt": "2+2?", "completion": "4", "label": True}
TAGS = {"tokens": ["Ann", "left"], "ner_tags": ["B-PER", "O"]}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}
NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "yes"}


def file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def labelled(count: int = 12) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": ("good", "bad")[number % 2]} for number in range(count)]


@pytest.fixture
def base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(auto, "base_kind", lambda name: name)
    return str(request.param)


@pytest.mark.parametrize(
    ("rows", "base", "task", "why"),
    [
        ([PAIR] * 2, "causal", "dpo", "'chosen' and 'rejected'"),
        ([PAIR] * 2, "encoder-decoder", "dpo", "one is better"),
        ([MARK] * 2, "causal", "kto", "true or false"),
        ([TAGS] * 2, "encoder", "token_classification", "'tokens' and 'ner_tags'"),
        ([TAGS] * 2, "causal", "token_classification", "a tag each"),
        (labelled(), "encoder", "classification", "2 different ones"),
        (labelled(), "causal", "classification", "'text' and 'label'"),
        (labelled(), "encoder-decoder", "seq2seq", "writes in the other"),
        ([NLI] * 4, "encoder", "classification", "'premise' and 'hypothesis' and 'label'"),
        ([NLI] * 4, "causal", "classification", "1 different"),
        ([CHAT] * 2, "causal", "sft", "continues text"),
        ([CHAT] * 2, "encoder-decoder", "seq2seq", "reads in one half"),
        ([{"text": "Once upon a time."}] * 2, "causal", "sft", "continues text"),
        ([{"text": f"t {n}", "label": f"an answer of its own {n}"} for n in range(9)], "causal", "sft", ""),
        ([{"input": "a", "output": "b"}] * 4, "causal", "sft", ""),
    ],
    indirect=["base"],
)
def test_told(rows: list[dict[str, Any]], base: str, task: str, why: str, tmp_path: Path) -> None:
    found = told(file(tmp_path, rows), "auto", base)
    assert found.task == task
    assert why in found.why


@pytest.mark.parametrize(
    ("rows", "format", "base", "task"),
    [
        ([PAIR] * 2, "preference", "causal", "sft"),
        ([PAIR] * 2, "prompt_completion(prompt, chosen)", "causal", "sft"),
        (labelled(), "text_label", "causal", "classification"),
        (labelled(), "text_label(text, label)", "encoder", "classification"),
        (labelled(), "source_target(text, label)", "causal", "sft"),
        ([TAGS] * 2, "words_tags(tokens, ner_tags)", "encoder", "token_classification"),
    ],
    indirect=["base"],
)
def test_a_named_format_says_what_the_rows_are(
    rows: list[dict[str, Any]], format: str, base: str, task: str, tmp_path: Path
) -> None:
    assert told(file(tmp_path, rows), format, base).task == task


@pytest.mark.parametrize("base", ["encoder"], indirect=True)
def test_an_encoder_without_labels_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only reads text: the rows have 'messages'") as refused:
        told(file(tmp_path, [CHAT]), "auto", base)
    assert "text_label" in refused.value.fix


def test_without_a_base_it_is_taken_for_one_that_writes(tmp_path: Path) -> None:
    assert told(file(tmp_path, [CHAT]), "auto", None).task == "sft"
    assert told(file(tmp_path, labelled()), "auto", None).task == "classification"


def test_the_kind_of_a_base_is_told_from_its_config() -> None:
    assert kind_of(BartConfig()) == "encoder-decoder"
    assert kind_of(GPT2Config()) == "causal"
    assert kind_of(RobertaConfig(architectures=["RobertaForMaskedLM"])) == "encoder"
    assert kind_of(RobertaConfig(architectures=["RobertaForCausalLM"])) == "causal"
