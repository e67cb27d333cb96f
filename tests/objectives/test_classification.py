"""Heads of rows and tokens: losses against float64 definitions, flat batches against the models' own logits,
and training against `transformers` with PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import ConfigError
from graftlm.data.batches import Batch
from graftlm.data.labels.encode import (
    LabelledBatch,
    LabelledRow,
    TaggedRow,
    collate_labelled,
    collate_tagged,
)
from graftlm.data.labels.records import Labelled, Tagged
from graftlm.data.labels.values import Problem
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.fusing.attention import attention_layers
from graftlm.models.heads import PROBLEMS, with_head
from graftlm.objectives.classification import (
    ClassificationObjective,
    ClassificationSettings,
    require_matching,
    row_losses,
)
from graftlm.objectives.row_logits import LAST, OWN, RowLogits
from graftlm.objectives.token_classification import TokenClassificationObjective
from graftlm.testing.models import DECODER, ENCODER, VOCABULARY

from .trainer import start_equally, trained_here, trained_there

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
"""Of peft: it asks transformers 5 for names that it gave up, and tells what it sets for GPT-2."""

LABELS = 3
LORA = {
    "roberta": ["query", "value", "dense"],
    "bert": ["query", "value"],
    "llama": ["q_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("Roberta", {**ENCODER, **NO_DROPOUT}),
    "bert": ("Bert", {**ENCODER, **NO_DROPOUT, "pad_token_id": 0}),
    "llama": ("Llama", {**DECODER, "classifier_dropout": 0.0}),
    "gpt2": ("GPT2", GPT2),
}


def classifier(kind: str, told: Problem = "one label", *, tokens: bool = False) -> Any:
    """A tiny model with a head, without dropout, the same whenever it is made."""
    name, settings = SETTINGS[kind]
    labels = 1 if told == "number" else LABELS
    config = getattr(transformers, f"{name}Config")(
        **(settings | {"num_labels": labels, "problem_type": PROBLEMS[told]})
    )
    torch.manual_seed(1)
    end = "ForTokenClassification" if tokens else "ForSequenceClassification"
    return getattr(transformers, f"{name}{end}")(config).eval()


def labelled(told: Problem, count: int = 5, seed: int = 0) -> list[LabelledRow]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(3, VOCABULARY, (3 + 2 * number,), generator=generator).tolist()
        values = torch.rand(LABELS, generator=generator)
        target = {
            "one label": F.one_hot(values.argmax(), LABELS).tolist(),
            "several labels": (values > 0.5).tolist(),
            "number": values[:1].tolist(),
        }[told]
        record = Labelled(("text",), (), number + 1)
        rows.append(LabelledRow(tuple(ids), (), tuple(map(float, target)), record, False))
    return rows


def batch_of(told: Problem, pad: int, **options: Any) -> LabelledBatch:
    return collate_labelled(labelled(told, **options), pad, 64, told)


def tagged(count: int = 5, seed: int = 0) -> list[TaggedRow]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = 3 + 2 * number
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        labels = torch.randint(LABELS, (length,), generator=generator).tolist()
        labels[:: 2 + number] = [-100] * len(labels[:: 2 + number])
        rows.append(TaggedRow(tuple(ids), tuple(labels), Tagged(("w",), ("t",), number + 1), False))
    return rows


def definition(logits: Tensor, targets: Tensor, told: Problem, smoothing: float = 0.0) -> Tensor:
    """The sum over rows, in float64."""
    logits = logits.double()
    if told == "number":
        return ((logits[:, 0] - targets.double()) ** 2).sum()
    if told == "several labels":
        p = logits.sigmoid()
        return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(1).sum()
    log_p = logits - logits.logsumexp(1, keepdim=True)
    right = log_p.gather(1, targets.unsqueeze(1)).sum()
    return -(1 - smoothing) * right - smoothing * log_p.mean(1).sum()


@pytest.mark.parametrize("told", ["one label", "several labels", "number"])
@pytest.mark.parametrize("kind", ["roberta", "bert", "llama", "gpt2"])
def test_losses_and_gradients(kind: str, told: Problem) -> None:
    model = classifier(kind, told)
    smoothing = 0.1 if told == "one label" else 0.0
    batch = batch_of(told, model.config.pad_token_id)
    objective = ClassificationObjective(model, told, label_smoothing=smoothing)
    assert objective.path == (LAST if kind in ("llama", "gpt2") else OWN)
    found = objective(model, batch)
    theirs = definition(model(**batch.inputs).logits, batch.targets, told, smoothing)
    assert float(found.loss_sum.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert found.target_tokens == len(batch.rows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(found.loss_sum, parameters, allow_unused=True)
    expected = torch.autograd.grad(theirs, parameters, allow_unused=True)
    for one, other in zip(ours, expected, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [False, True])
def test_rows_side_by_side_say_the_same(kind: str, tokens: bool) -> None:
    """Without padding, where the model's attention takes documents."""
    model = classifier(kind, tokens=tokens)
    batch = collate_tagged(tagged(), 0, 64) if tokens else batch_of("one label", 0)
    logits = RowLogits(model)
    assert logits.path == LAST
    padded = logits(model, batch)
    layers = attention_layers(model)
    assert not layers.why
    with layers.in_use():
        flat = logits(model, batch)
        filled = logits(model, batch, 96)
    expected = model(**batch.inputs).logits
    expected = expected[batch.labels != -100] if tokens else expected
    for found in (padded, flat, filled):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_pad_token_at_the_end_of_a_text_is_read() -> None:
    """The model's own rule, the last token that is no padding token, would read the one before."""
    model = classifier("llama")
    rows = [LabelledRow((5, 6, 7, 0), (), (1.0, 0.0, 0.0), Labelled(("x",), ("a",), 1), False)]
    batch = collate_labelled(rows, 0, 64, "one label")
    found = RowLogits(model)(model, batch)
    hidden = model.model(input_ids=torch.tensor([[5, 6, 7, 0]]))[0][:, -1]
    torch.testing.assert_close(found, model.score(hidden))


def test_with_virtual_tokens() -> None:
    model = classifier("llama")
    attach(model, with_head(PromptTuningConfig(num_virtual_tokens=4), model), storage=FOLDER)
    batch = batch_of("one label", 0)
    torch.testing.assert_close(RowLogits(model)(model, batch), model(**batch.inputs).logits)


def test_label_smoothing_needs_one_label() -> None:
    with pytest.raises(ConfigError, match="several labels"):
        require_matching("several labels", 0.1)
    require_matching("one label", 0.1)


def test_settings() -> None:
    assert ClassificationSettings(labels="labels.json").labels == ("labels.json",)
    with pytest.raises(ConfigError, match="did you mean 'labels'"):
        ClassificationSettings(id2label=("a", "b"))


@pytest.mark.parametrize("told", ["one label", "several labels", "number"])
def test_probes_have_the_length_asked_for(told: Problem) -> None:
    model = classifier("roberta", told)
    objective = ClassificationObjective(model, told, longest=16)
    for length in (1, 16, 100):
        batch = objective.probe(length)
        assert abs(batch.real_tokens - length) <= 8
        assert float(objective(model, batch).loss_sum.detach()) > 0


def test_half_precision_is_summed_in_float32() -> None:
    losses = row_losses(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1]), "one label")
    assert losses.dtype == torch.float32
    assert row_losses(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1), "number").dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "told", "smoothing"),
    [
        ("roberta", "one label", 0.0), ("roberta", "one label", 0.1), ("roberta", "several labels", 0.0),
        ("roberta", "number", 0.0), ("bert", "one label", 0.0), ("llama", "one label", 0.0),
        ("gpt2", "several labels", 0.0),
    ],
)  # fmt: skip
def test_ten_steps_of_the_trainer_with_peft(
    kind: str, told: Problem, smoothing: float, tmp_path: Path
) -> None:
    """Equal losses: LoRA in the body, a trained copy of the head."""
    base = classifier(kind, told)
    pad = base.config.pad_token_id
    batches = [batch_of(told, pad, seed=seed) for seed in range(10)]
    objective = partial(ClassificationObjective, told=told, label_smoothing=smoothing)
    ours, theirs = _side_by_side(kind, base, classifier(kind, told), "SEQ_CLS")
    losses = trained_here(ours, partial(objective(base), base), batches)
    for batch in batches:
        assert (batch.inputs["input_ids"][:, -1] == pad).any()
    given = [{**batch.inputs, "labels": batch.targets} for batch in batches]
    assert losses == pytest.approx(trained_there(theirs, given, tmp_path, smoothing), rel=2e-5)
    assert len(set(losses)) == 10


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_ten_steps_of_token_classification(kind: str, tmp_path: Path) -> None:
    base = classifier(kind, tokens=True)
    batches = [collate_tagged(tagged(seed=seed), base.config.pad_token_id, 64) for seed in range(10)]
    ours, theirs = _side_by_side(kind, base, classifier(kind, tokens=True), "TOKEN_CLS")
    losses = trained_here(ours, partial(TokenClassificationObjective(base), base), batches)
    given = [{**batch.inputs, "labels": batch.labels} for batch in batches]
    assert losses == pytest.approx(trained_there(theirs, given, tmp_path), rel=2e-5)


def _side_by_side(kind: str, ours: Any, theirs: Any, task: str) -> tuple[list[nn.Parameter], Any]:
    """The parameters of an adapter on `ours`, and PEFT's model with the same start."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": _targets(kind, ours)}
    adapters = attach(ours, with_head(LoraConfig(**settings), ours), storage=FOLDER)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**settings, task_type=task))
    parameters = adapters.named_parameters("default")
    start_equally(parameters, wrapped)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert sum(p.numel() for p in parameters.values()) == trained
    return list(parameters.values()), wrapped


def _targets(kind: str, model: nn.Module) -> list[str]:
    """Whole paths: in PEFT the name `dense` would hit the head as well."""
    names: Sequence[str] = LORA[kind]
    return [
        path for path, _ in model.named_modules()
        if path.rpartition(".")[2] in names and not path.startswith("classifier")
    ]  # fmt: skip


def test_batches_without_documents_keep_their_order() -> None:
    batch: Batch = batch_of("one label", 0)
    assert batch.documents == tuple((length,) for length in (3, 5, 7, 9, 11))
    assert (batch.labels != -100).sum(1).tolist() == [1] * 5
