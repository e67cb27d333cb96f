"""The loss of encoder-decoders against the models' own, and training against `transformers` with PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import ModelError
from graftlm.data.batches import Batch
from graftlm.data.pair_batches import PairBatches, longest, padded
from graftlm.data.pairs import Pair
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.encoder_decoder import decoder_ids
from graftlm.objectives.seq2seq import Seq2SeqObjective
from graftlm.testing.models import VOCABULARY, tiny

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers 5 for names that it gave up
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)


def pairs(model: Any, count: int = 6) -> list[Pair]:
    generator = torch.Generator().manual_seed(4)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    found = []
    for row in range(1, count + 1):
        source, target = draw(3 + 2 * row % 24), draw(2 + row % 9)
        found.append(Pair(source, target, decoder_ids(model, target), row, False))
    return found


def whole(rows: Sequence[Pair]) -> Batch:
    return padded(rows, 0, longest(rows))


def expected(model: Any, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """The model's own logits, and the definition of the smoothed cross-entropy, in float64."""
    logits = model(**batch.inputs).logits.double()
    log_p = F.log_softmax(logits, dim=-1)[batch.labels != -100]
    nll = -log_p.gather(1, batch.labels[batch.labels != -100].unsqueeze(1)).sum()
    return (1 - smoothing) * nll - smoothing * log_p.mean(dim=1).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("bart", "none"), ("t5", "none"), ("bart-nf4", "none"), ("bart", "head"), ("t5", "head")],
)
def test_loss_and_gradients(kind: str, smoothing: float, method: str) -> None:
    model = tiny(kind)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    targets = ["q" if kind == "t5" else "q_proj", "lm_head"] if method == "head" else "all-linear"
    attach(model, LoraConfig(r=4, target_modules=targets), storage=FOLDER)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1)
    batch = whole(pairs(model))
    objective = Seq2SeqObjective(model, label_smoothing=smoothing)
    wanted = {(0.0, "none"): "frozen head"}.get((smoothing, method), "head in chunks")
    assert objective.path == wanted
    found = objective(model, batch)
    theirs = expected(model, batch, smoothing)
    assert float(found.loss_sum.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert found.target_tokens == int((batch.labels != -100).sum())
    ours = torch.autograd.grad(found.loss_sum, trained)
    for one, other in zip(ours, torch.autograd.grad(theirs, trained), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-5)


def test_the_models_own_loss() -> None:
    """With labels alone the model shifts, averages and adds up itself."""
    for kind in ("bart", "t5"):
        model = tiny(kind)
        batch = whole(pairs(model))
        own = model(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            labels=batch.labels,
        ).loss
        found = Seq2SeqObjective(model, label_smoothing=0.0)(model, batch)
        assert float((found.loss_sum / found.target_tokens).detach()) == pytest.approx(
            float(own.detach()), rel=1e-6
        )


def test_a_bias_behind_the_head() -> None:
    model = tiny("bart")
    nn.init.normal_(model.final_logits_bias)
    batch = whole(pairs(model))
    objective = Seq2SeqObjective(model, label_smoothing=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        assert float(objective(model, batch).loss_sum) == pytest.approx(
            float(expected(model, batch)), rel=1e-5
        )


def test_logits_that_are_more_than_the_head() -> None:
    class Scaled(transformers.BartForConditionalGeneration):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    model = tiny("bart")
    model.__class__ = Scaled
    batch = whole(pairs(model))
    objective = Seq2SeqObjective(model, label_smoothing=0.1)
    assert objective.path == "full logits" and "after the output head" in objective.why
    found = objective(model, batch)
    assert float(found.loss_sum.detach()) == pytest.approx(
        float(expected(model, batch, 0.1).detach()), rel=1e-5
    )


def test_padding_changes_nothing() -> None:
    model = tiny("t5")
    rows = pairs(model)
    objective = Seq2SeqObjective(model, label_smoothing=0.0)
    together = float(objective(model, whole(rows)).loss_sum.detach())
    alone = sum(float(objective(model, whole([row])).loss_sum.detach()) for row in rows)
    assert together == pytest.approx(alone, rel=1e-6)


def test_a_probe_of_any_length() -> None:
    model = tiny("bart")
    objective = Seq2SeqObjective(model, label_smoothing=0.0, shape=(12, 6))
    for length in (1, 10, 32, 96):
        batch = objective.probe(length)
        assert abs(batch.inputs["input_ids"].numel() + batch.labels.numel() - length) <= 9
        assert float(objective(model, batch).loss_sum.detach()) > 0


def test_a_causal_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no encoder-decoder") as error:
        Seq2SeqObjective(tiny("llama"), label_smoothing=0.0)
    assert "--task sft" in error.value.fix


def test_mbart_turns_its_language_mark_to_the_front() -> None:
    config = transformers.MBartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1,
    )  # fmt: skip
    model = transformers.MBartForConditionalGeneration(config)
    assert decoder_ids(model, [5, 6, 2, 40]) == (40, 5, 6, 2)


class Fixed(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Whole batches as items, so that `Trainer` sees exactly what we see."""

    def __init__(self, batches: Sequence[Batch], *, is_shifted: bool) -> None:
        """`is_shifted`: say what the decoder reads, too; where the trainer smooths, nobody else does."""
        self.batches, self.is_shifted = batches, is_shifted

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.batches[index]
        left_out = () if self.is_shifted else ("decoder_input_ids",)
        inputs = {name: value for name, value in batch.inputs.items() if name not in left_out}
        return {**inputs, "labels": batch.labels}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ten_steps_of_the_trainer_with_peft(smoothing: float, tmp_path: Path) -> None:
    """Equal losses in `Seq2SeqTrainer`: its own shift of the labels, its own smoothing, PEFT's LoRA."""
    peft = pytest.importorskip("peft")
    model = tiny("bart", seed=2)
    source = PairBatches(pairs(model, 40), rows_per_batch=4, rows_per_step=4, seed=0, pad_token_id=0)
    batches = [source.batch(0, index) for index in range(10)]
    theirs = peft.get_peft_model(
        tiny("bart", seed=2),
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1"], task_type="SEQ_2_SEQ_LM"
        ),
    )
    ours = tiny("bart", seed=2)
    adapters = attach(
        ours, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1"]), storage=FOLDER
    )
    start = {
        name.replace("base_model.model.", "").replace(".default", ""): value.detach().clone()
        for name, value in theirs.named_parameters()
        if "lora_" in name
    }
    parameters = adapters.named_parameters("default")
    with torch.no_grad():
        for name, parameter in parameters.items():
            key = next(k for k in start if _place(k) == _place(name))
            parameter.copy_(start[key])
    losses = _trained_here(ours, list(parameters.values()), batches, smoothing)
    assert losses == pytest.approx(_trained_there(theirs, batches, smoothing, tmp_path), rel=2e-5)
    assert losses[-1] < losses[0] or len(set(losses)) == 10


def _place(name: str) -> tuple[str, str]:
    """Path of the layer and which factor it is, whatever else a tool puts into the name."""
    words = [word for word in name.split(".") if word not in ("weight", "default", "parts", "adapters")]
    factor = "A" if any("lora_A" in word for word in words) else "B"
    return ".".join(word for word in words if "lora_" not in word), factor


def _trained_here(
    model: Any, parameters: list[Tensor], batches: Sequence[Batch], smoothing: float
) -> list[float]:
    objective = Seq2SeqObjective(model, label_smoothing=smoothing)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for batch in batches:
        found = objective(model, batch)
        loss = found.loss_sum / found.target_tokens
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _trained_there(model: Any, batches: Sequence[Batch], smoothing: float, folder: Path) -> list[float]:
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=len(batches), learning_rate=1e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=1, logging_steps=1, report_to=[], save_strategy="no", max_grad_norm=0.0,
        label_smoothing_factor=smoothing, optim="adamw_torch", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=Fixed(batches, is_shifted=smoothing > 0),
        data_collator=lambda rows: dict(rows[0]),
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
