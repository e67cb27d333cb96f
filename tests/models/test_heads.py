"""New heads: begun by their seed alone, on every kind of base; stored heads are kept or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from graftlm.core.errors import FormatError, ModelError
from graftlm.core.notices import collected, forget_notices
from graftlm.data.labels.values import Problem
from graftlm.formats.ending import ending_facts
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.models.ending import TEXT, Ending
from graftlm.models.heads import describe_head, ending_of_adapter, head_modules, stored_ending, with_head
from graftlm.models.load import load_model
from graftlm.quant.convert import quantised_layers
from graftlm.testing.models import ENCODER, tiny

from .bases import checkpoint, tokenizer

LABELS = ("ham", "spam", "eggs")
ROWS, TOKENS = Ending("rows", LABELS, seed=3), Ending("tokens", LABELS, seed=3)
HEADS = {"gpt2": "score", "llama": "score", "roberta": "classifier", "bert": "classifier"}


@pytest.fixture(autouse=True)
def fresh_notices() -> Iterator[None]:
    forget_notices()
    yield
    forget_notices()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of language models, causal and masked; that of BERT has no pooler."""
    folder = tmp_path_factory.mktemp("bases")
    found = {kind: checkpoint(folder / kind, kind) for kind in ("gpt2", "llama")}
    for kind, name in (("roberta", "Roberta"), ("bert", "Bert")):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**ENCODER, type_vocab_size=2)
        config.num_labels = 2
        getattr(transformers, f"{name}ForMaskedLM")(config).save_pretrained(folder / kind)
        tokenizer().save_pretrained(folder / kind)
        found[kind] = folder / kind
    return found


def head_of(model: Any) -> dict[str, torch.Tensor]:
    heads = tuple(f"{path}." for path in head_modules(model))
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith(heads)}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "roberta", "bert"])
@pytest.mark.parametrize("ending", [ROWS, TOKENS], ids=["rows", "tokens"])
def test_a_head_depends_on_its_seed_alone(bases: dict[str, Path], kind: str, ending: Ending) -> None:
    torch.manual_seed(1)
    one, _ = load_model(bases[kind], ending=ending)
    torch.manual_seed(2)
    other, _ = load_model(bases[kind], ending=ending)
    changed, _ = load_model(bases[kind], ending=Ending(ending.kind, LABELS, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(head_of(one).values(), head_of(changed).values(), strict=True)
    )
    assert all(torch.isfinite(p).all() for p in one.parameters())
    assert one.config.id2label == dict(enumerate(LABELS)) and one.num_labels == 3
    assert one.config.problem_type == "single_label_classification"
    logits = one(input_ids=torch.tensor([[4, 5, 6]])).logits
    assert logits.shape == ((1, 3) if ending.kind == "rows" else (1, 3, 3))
    assert "random at first" in describe_head(one) and not collected()


def test_a_pooler_that_the_checkpoint_lacks_is_new_too(bases: dict[str, Path]) -> None:
    model, _ = load_model(bases["bert"], ending=ROWS)
    assert head_modules(model) == ("classifier", "bert.pooler")
    config = with_head(LoraConfig(r=2, target_modules=["query"]), model)
    assert config.modules_to_save == ("classifier", "bert.pooler") and config.task_type == "SEQ_CLS"
    names = attach(model, config, storage=FOLDER).named_parameters("default")
    assert any("pooler" in name for name in names) and any("classifier" in name for name in names)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "roberta", "bert"])
def test_the_body_of_a_quantised_base_is_packed_and_its_head_is_not(
    bases: dict[str, Path], kind: str
) -> None:
    model, _ = load_model(bases[kind], ending=ROWS, quantization="nf4")
    plain, _ = load_model(bases[kind], ending=ROWS)
    packed = quantised_layers(model)
    assert packed and not any(path.startswith(head_modules(model)) for path in packed)
    for name, value in head_of(plain).items():
        assert torch.equal(head_of(model)[name].float(), value.float()), name
    assert torch.isfinite(model(input_ids=torch.tensor([[4, 5, 6]])).logits).all()


def test_a_base_that_streams_from_disk(bases: dict[str, Path]) -> None:
    plain, _ = load_model(bases["llama"], ending=ROWS)
    streamed, _ = load_model(bases["llama"], ending=ROWS, placement="disk")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, streamed(input_ids=ids).logits)


def classifier(folder: Path, labels: tuple[str, ...] = ("no", "yes"), problem: str | None = None) -> Path:
    config = transformers.RobertaConfig(**(ENCODER | {"num_labels": len(labels)}))
    config.id2label, config.problem_type = dict(enumerate(labels)), problem
    config.label2id = {label: number for number, label in enumerate(labels)}
    torch.manual_seed(0)
    transformers.RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_stored_head_is_kept_for_its_own_labels(tmp_path: Path) -> None:
    base = classifier(tmp_path / "base")
    stored = load_file(base / "model.safetensors")["classifier.out_proj.weight"]
    for ending in (None, Ending("rows", ("no", "yes"), seed=5)):
        model, _ = load_model(base, ending=ending)
        assert torch.equal(model.classifier.out_proj.weight, stored)
        assert head_modules(model) == ("classifier",)  # it is trained all the same
        assert "from the checkpoint" in describe_head(model)
    assert not collected()
    for labels in (("yes", "no"), ("a", "b"), LABELS):
        model, _ = load_model(base, ending=Ending("rows", labels))
        assert model.num_labels == len(labels)
        assert not torch.equal(model.classifier.out_proj.weight[:2], stored)


def test_a_head_without_names_is_kept_for_numbers(tmp_path: Path) -> None:
    base = classifier(tmp_path / "base", ("LABEL_0", "LABEL_1"))
    stored = load_file(base / "model.safetensors")["classifier.out_proj.weight"]
    model, _ = load_model(base, ending=Ending("rows", ("0", "1")))
    assert torch.equal(model.classifier.out_proj.weight, stored)
    assert model.config.id2label == {0: "0", 1: "1"}


def test_a_damaged_stored_head_is_no_new_one(tmp_path: Path) -> None:
    base = classifier(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["classifier.dense.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not fill"):
        load_model(base)


def test_a_body_that_is_not_whole_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    for quantization in (None, "nf4"):
        base = checkpoint(tmp_path / f"base-{quantization}", "llama")
        tensors = load_file(base / "model.safetensors")
        name = next(key for key in tensors if "layers.0" in key and "proj" in key)
        del tensors[name]
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="do not fill") as caught:
            load_model(base, ending=ROWS, quantization=quantization)
        assert [name in problem for problem in caught.value.problems] == [True]


def test_models_without_such_a_head(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "bart")
    with pytest.raises(ModelError, match="labels tokens"):
        load_model(base, ending=TOKENS)
    with pytest.raises(ModelError, match="does not write text"):
        load_model(classifier(tmp_path / "labels"), ending=TEXT)
    model, _ = load_model(base)
    assert head_modules(model) == () and ending_facts(model) == {}
    config = IA3Config()
    assert with_head(config, model) is config


@pytest.mark.parametrize("problem", ["one label", "several labels", "number"])
def test_an_ending_lies_beside_the_adapter(bases: dict[str, Path], tmp_path: Path, problem: Problem) -> None:
    labels = ("number",) if problem == "number" else LABELS
    ending = Ending("rows", labels, problem)
    model, _ = load_model(bases["roberta"], ending=ending)
    adapters = attach(model, with_head(LoraConfig(r=2), model), storage=FOLDER)
    adapters.save(tmp_path / "adapter", "default")
    assert ending_of_adapter(tmp_path / "adapter") == ending
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["task_type"] == "SEQ_CLS" and content["modules_to_save"] == ["classifier"]
    path = tmp_path / "adapter" / "graft.json"
    facts = json.loads(path.read_text())
    # An adapter that PEFT wrote: how many labels there are is told by its tensors.
    path.unlink()
    told = ending_of_adapter(tmp_path / "adapter")
    assert told is not None and told.labels == tuple(f"LABEL_{n}" for n in range(len(labels)))
    path.write_text(json.dumps(facts | {"ending": {"labels": 3}}))
    with pytest.raises(FormatError, match="ends in"):
        ending_of_adapter(tmp_path / "adapter")


def test_adapters_of_text_say_nothing(tmp_path: Path) -> None:
    model = tiny("llama")
    attach(model, LoraConfig(r=2), storage=FOLDER).save(tmp_path / "adapter", "default")
    assert ending_of_adapter(tmp_path / "adapter") is None
    assert "ending" not in json.loads((tmp_path / "adapter" / "graft.json").read_text())


def test_stored_endings() -> None:
    config = transformers.LlamaConfig(architectures=["LlamaForTokenClassification"], num_labels=2)
    assert stored_ending(config) == Ending("tokens", ("LABEL_0", "LABEL_1"))
    assert stored_ending(transformers.LlamaConfig(architectures=["LlamaForCausalLM"])) == TEXT
    one = transformers.BertConfig(architectures=["BertForSequenceClassification"], num_labels=1)
    assert stored_ending(one).problem == "number"
