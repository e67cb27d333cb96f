"""Classifiers from data to an adapter that says the same wherever it is loaded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from graftlm.core.config import read_yaml
from graftlm.core.errors import AdapterError, ConfigError, DataError
from graftlm.core.notices import collected, forget_notices
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.models.heads import ending_of_adapter
from graftlm.models.load import load_model
from graftlm.training.recipe import make_recipe
from graftlm.verbs.chat import chat
from graftlm.verbs.combine import combine
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.merge import merge
from graftlm.verbs.tune import tune

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers 5 for names that it gave up
    "ignore:.* is deprecated and will be removed in v6:FutureWarning"
)

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = [f"w{number}" for number in range(40)]
SETTINGS = (
    "train.max_steps=8", "train.save_steps=4", "train.eval_steps=4", "output.report_to=none",
    "train.per_device_train_batch_size=8", "train.learning_rate=1e-2",
)  # fmt: skip
IDS = torch.tensor([[0, 4, 9, 12, 2], [0, 7, 2, 1, 1], [0, 20, 21, 22, 2]])


@pytest.fixture(autouse=True)
def fresh_notices() -> Iterator[None]:
    forget_notices()
    yield
    forget_notices()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model of the RoBERTa architecture, without dropout."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=44, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=34, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    _tokenizer(roberta=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=44, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(roberta=False).save_pretrained(folder)
    return folder


def _tokenizer(*, roberta: bool) -> Any:
    from tokenizers import processors

    made = Tokenizer(WordLevel({w: n for n, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    if roberta:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def write(path: Path, kind: str, rows: int = 120) -> Path:
    """Rows that can be learnt: what is told depends on the words alone."""
    generator = torch.Generator().manual_seed(5)
    lines = []
    for _ in range(rows):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        drawn = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        words = [WORDS[number] for number in drawn]
        row: dict[str, Any] = {"text": " ".join(words)}
        if kind == "names":
            row["label"] = "low" if drawn[0] < 20 else "high"
        elif kind == "several":
            row["labels"] = [name for name, found in (("a", drawn[0] < 20), ("b", drawn[-1] < 20)) if found]
        elif kind == "numbers":
            row["score"] = sum(drawn) / 400 + 0.001
        elif kind == "pairs":
            row = {"premise": words[0], "hypothesis": " ".join(words[1:]), "label": int(drawn[0] < 20)}
        else:
            row = {"tokens": words, "ner_tags": ["B-LOW" if number < 10 else "O" for number in drawn]}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def run(
    base: Path, data: Path, out: Path, *settings: str, task: str = "classification", **options: Any
) -> Any:
    return tune(data, model=str(base), task=task, out=out, overrides=[*SETTINGS, *settings], **options)


def said(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, attention_mask=(IDS != 1).long()).logits
    return found


FRESH = """
import sys, torch
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.models.heads import ending_of_adapter
from graftlm.models.load import load_model
from pathlib import Path
base, adapter, out = map(Path, sys.argv[1:])
model, _ = load_model(base, ending=ending_of_adapter(adapter), dtype="float32")
attach_folder(model, adapter, storage=FOLDER)
ids = torch.tensor(%s)
from safetensors.torch import save_file
with torch.no_grad():
    save_file({"logits": model.eval()(input_ids=ids, attention_mask=(ids != 1).long()).logits}, out)
""" % (IDS.tolist(),)  # noqa: UP031  braces would have to be doubled


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["names", *(pytest.param(kind, marks=SLOW) for kind in ("several", "numbers", "tags"))]
)
def test_it_says_the_same_wherever_it_is_loaded(encoder: Path, tmp_path: Path, kind: str) -> None:
    """Here, in a fresh process, in PEFT, and merged, in `transformers` alone."""
    peft = pytest.importorskip("peft")
    task = "token_classification" if kind == "tags" else "classification"
    result = run(encoder, write(tmp_path / "rows.jsonl", kind), tmp_path / "run", "method.r=4", task=task)
    assert result.figures["merge"]["is_same_model"]
    ending = ending_of_adapter(result.adapter)
    assert ending is not None
    model, _ = load_model(encoder, ending=ending, dtype="float32")
    attach_folder(model, result.adapter, storage=FOLDER)
    ours = said(model)

    from safetensors.torch import load_file

    command = [sys.executable, "-c", FRESH, str(encoder), str(result.adapter), str(tmp_path / "fresh")]
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "fresh")["logits"], ours)

    family = transformers.AutoModelForTokenClassification if kind == "tags" else (
        transformers.AutoModelForSequenceClassification
    )  # fmt: skip
    plain = family.from_pretrained(encoder, num_labels=len(ending.labels))
    theirs = peft.PeftModel.from_pretrained(plain, result.adapter)
    torch.testing.assert_close(said(theirs), ours, rtol=1e-5, atol=1e-6)

    merged = merge(result.run, tmp_path / "merged")
    assert merged.passed and merged.reloaded.is_same_model
    alone = family.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said(alone), ours, rtol=1e-4, atol=1e-5)
    assert tuple(alone.config.id2label[n] for n in range(alone.config.num_labels)) == ending.labels
    here, _ = load_model(tmp_path / "merged")
    assert torch.equal(said(here), said(alone))


@pytest.mark.parametrize(
    "method",
    ["qlora", "prefix", *(pytest.param(m, marks=SLOW) for m in ("ia3", "bottleneck", "prompt", "full"))],
)
def test_every_method(encoder: Path, tmp_path: Path, method: str) -> None:
    result = run(encoder, write(tmp_path / "rows.jsonl", "names"), tmp_path / "run", method=method)
    assert set(result.figures["measures"]) >= {"accuracy", "macro_f1", "mcc", "loss"}
    assert (tmp_path / "run" / "report.html").is_file()
    assert "low" in (tmp_path / "run" / "report.html").read_text()


def test_the_recipe_of_a_run_names_its_labels(encoder: Path, tmp_path: Path) -> None:
    result = run(encoder, write(tmp_path / "rows.jsonl", "names"), tmp_path / "run")
    recipe = read_yaml(result.run / "recipe.yaml")
    assert recipe["task"] == {
        "type": "classification", "problem_type": "single_label_classification",
        "labels": ["high", "low"], "label_smoothing": 0.0,
    }  # fmt: skip
    assert recipe["data"]["packing"] is False
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "w1 w2", "label": "low"}\n{"text": "w30", "label": "huge"}\n')
    with pytest.raises(DataError) as error:
        evaluate(result.run, data=other)
    assert "row 2: the label 'huge'" in str(error.value)
    for adapter in (result.run, result.adapter):  # with the recipe, and with what lies beside the adapter
        found = evaluate(adapter, data=tmp_path / "rows.jsonl", limit=40)
        assert [change.name for change in found.comparison.measures] == ["accuracy", "macro_f1", "mcc"]


def test_an_interrupted_run_goes_on_exactly(encoder: Path, tmp_path: Path) -> None:
    """By a signal after the checkpoint of step 4; the labels come from the recipe of the run."""
    data = write(tmp_path / "rows.jsonl", "names")
    whole, run_folder = run(encoder, data, tmp_path / "whole"), tmp_path / "half"
    over = threading.Event()

    def stop_later() -> None:
        while (
            not over.is_set() and not (run_folder / "checkpoints" / "step-000004" / "MANIFEST.json").exists()
        ):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=stop_later)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        run(encoder, data, run_folder)
    over.set()
    watcher.join()
    again = tune(run_folder, resume=True)
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert again.figures["after"] == whole.figures["after"]


@pytest.mark.parametrize(
    "kind", ["names", "tags", *(pytest.param(kind, marks=SLOW) for kind in ("several", "numbers", "pairs"))]
)
def test_causal_bases(decoder: Path, tmp_path: Path, kind: str) -> None:
    task = "token_classification" if kind == "tags" else "classification"
    result = run(decoder, write(tmp_path / "rows.jsonl", kind), tmp_path / "run", task=task)
    plan = json.loads((result.run / "plan.json").read_text())
    assert plan["loss_path"] == "the head on the tokens that are read"
    assert result.figures["merge"]["is_same_model"]


@SLOW
def test_it_learns(decoder: Path, tmp_path: Path) -> None:
    """Whether the first word is one of twenty."""
    data = write(tmp_path / "rows.jsonl", "names", rows=400)
    settings = ("train.max_steps=200", "train.learning_rate=3e-3")
    result = run(decoder, data, tmp_path / "run", *settings, method="full")
    accuracy = result.figures["measures"]["accuracy"]
    assert accuracy["after"][0] > 0.9 and accuracy["difference"][1] > 0


def rows_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_wrong_data(encoder: Path, tmp_path: Path) -> None:
    one = rows_of(tmp_path / "one.jsonl", [{"text": f"w{n}", "label": "a"} for n in range(40)])
    with pytest.raises(DataError, match=r"training rows .* have the label 'a'"):
        run(encoder, one, tmp_path / "run")
    names = [{"text": f"w{n % 40} w{n}", "label": "ab"[n % 2]} for n in range(90)]
    outside = rows_of(tmp_path / "outside.jsonl", [*names, {"text": "w1", "label": "c"}])
    with pytest.raises(DataError) as error:
        run(encoder, outside, tmp_path / "run", "task.labels=[a, b]")
    assert "row 91: the label 'c' ('label') is none of the 2 labels" in str(error.value)
    (tmp_path / "labels.json").write_text('["a"]')
    with pytest.raises(DataError, match="45 of 90 rows"):
        names_file = rows_of(tmp_path / "names.jsonl", names)
        run(encoder, names_file, tmp_path / "run", f"task.labels={tmp_path / 'labels.json'}")
    assert not (tmp_path / "run").exists()


def test_wrong_settings(encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", "several")
    with pytest.raises(ConfigError, match="label_smoothing has no effect"):
        run(encoder, data, tmp_path / "run", "task.label_smoothing=0.1")
    with pytest.raises(ConfigError, match=r"eval\.metrics has no effect"):
        run(encoder, data, tmp_path / "run", "eval.metrics=[exact_match]")
    with pytest.raises(ConfigError, match="YAML reads yes, no"):
        run(encoder, data, tmp_path / "run", "task.labels=[yes, no]")
    with pytest.raises(ConfigError, match="more than once"):
        run(encoder, data, tmp_path / "run", "task.labels=[a, b, a]")
    with pytest.raises(ConfigError, match="problem_type"):
        make_recipe(
            {"model": "x", "data": "y", "task": {"type": "classification", "problem_type": "ranking"}}
        )


def test_doubts_are_said(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{n % 40} w{n // 40}", "label": "ab"[n % 2]} for n in range(100)]
    rows += [{"text": "w3 w0", "label": "c"}]
    run(encoder, rows_of(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    notes = " ".join(collected())
    assert "another label elsewhere" in notes and "fewer than 10 training rows: c" in notes


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("names", r"(low|high) \d+\.\d %\n(low|high) \d+\.\d %"),
        pytest.param("several", r"[ab] \d+\.\d %\n[ab] \d+\.\d %", marks=SLOW),
        pytest.param("numbers", r"-?[\d.e-]+", marks=SLOW),
        pytest.param("tags", r"(.+\t(O|B-LOW)\n?)+", marks=SLOW),
    ],
)
def test_chat_tells_labels(encoder: Path, tmp_path: Path, kind: str, answer: str) -> None:
    task = "token_classification" if kind == "tags" else "classification"
    result = run(encoder, write(tmp_path / "rows.jsonl", kind), tmp_path / "run", task=task)
    session = chat(result.run)
    assert re.fullmatch(answer, session.reply("w1 w30"))
    assert session.toggle_adapter() is False and session.reply("w1 w30")


@pytest.mark.slow
def test_merges_of_a_quantised_base(encoder: Path, tmp_path: Path) -> None:
    """Into what it was trained on, dense; into the original; and in few bits again."""
    result = run(encoder, write(tmp_path / "rows.jsonl", "names"), tmp_path / "run", method="qlora")
    assert merge(result.run, tmp_path / "dense").passed
    assert merge(result.run, tmp_path / "original", into="original").passed
    packed = merge(result.run, tmp_path / "packed", requantize="int8", force=True)
    assert packed.requantized is not None and packed.requantized.envelope.nll_change is None
    assert any("loss not measured" in line for line in packed.lines)
    model, _ = load_model(tmp_path / "packed")
    assert said(model).shape == (3, 2)


def test_combined_heads(encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", "names")
    one = run(encoder, data, tmp_path / "one", "method.r=2")
    other = run(encoder, data, tmp_path / "other", "method.r=2", "train.max_steps=3")
    combine({str(one.run): 0.5, str(other.run): 0.5}, tmp_path / "both")
    ending = ending_of_adapter(tmp_path / "both")
    assert ending is not None and ending.labels == ("high", "low")
    assert len(evaluate(tmp_path / "both", data=data).comparison.measures) == 3
    several = run(encoder, write(tmp_path / "more.jsonl", "several"), tmp_path / "several", "method.r=2")
    with pytest.raises(AdapterError, match="heads for different labels"):
        combine({str(one.run): 0.5, str(several.run): 0.5}, tmp_path / "none")
