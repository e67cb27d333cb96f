from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from graftlm.core.errors import DataError, ModelError
from graftlm.evaluation import perplexity
from graftlm.evaluation.perplexity import row_losses
from graftlm.evaluation.rows import IGNORED, TokenRow, Tokens
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.fusing.attention import attention_layers

TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "The dog ran",
    "He said that the house on the hill was older than anybody in the village could remember. " * 2,
)


def by_definition(model: Any, row: TokenRow) -> tuple[float, int]:
    """Sum of -log p(target | what precedes it), one row at a time, everything in float64."""
    wide = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = wide(torch.tensor([list(row.input_ids)])).logits[0]
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    places = [t for t in range(1, len(row.labels)) if row.labels[t] != IGNORED]
    return -sum(float(log_p[t - 1, row.labels[t]]) for t in places), len(places)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_row_losses_equal_the_definition(
    kind: str, make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]]
) -> None:
    model, rows = make_model(kind), make_rows(12)
    rows.append(Tokens((0, 5, 6, 7, 8, 9), (IGNORED, 5, IGNORED, IGNORED, 8, 9), row=99))
    found = row_losses(model, rows, rows_per_batch=5)
    assert found.complete
    assert [row.index for row in found.rows] == list(range(13))
    for row, measured in zip(rows, found.rows, strict=True):
        loss, tokens = by_definition(model, row)
        assert measured.tokens == tokens
        assert measured.loss_sum == pytest.approx(loss, rel=2e-5)
    assert found.path.startswith("full logits" if kind == "gemma2" else "head in chunks")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [None, PromptTuningConfig(num_virtual_tokens=2)], ids=["base", "prompt"])
def test_rows_are_read_without_padding_where_attention_takes_documents(
    kind: str, method: MethodConfig | None, make_model: Callable[..., Any], make_rows: Callable[..., Any]
) -> None:
    model, rows = make_model(kind), make_rows(9)
    if method is not None:
        attach(model, method, storage=FOLDER)
    expected = row_losses(model, rows)
    with attention_layers(model).in_use():
        shapes: list[torch.Size] = []
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: shapes.append(args[0].shape)
        )
        found = row_losses(model, rows)
        hook.remove()
    assert [tuple(shape) for shape in shapes] == [(1, sum(len(row.input_ids) for row in rows))]
    for mine, other in zip(found.rows, expected.rows, strict=True):
        assert mine.loss_sum == pytest.approx(other.loss_sum, rel=1e-5)


@pytest.mark.parametrize("name", ["stories260K", "gpt2-tiny-en"])
def test_row_losses_of_real_models_equal_the_definition(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for number, text in enumerate(TEXTS):
        ids = tuple(tokenizer(text)["input_ids"])
        rows.append(Tokens(ids, (IGNORED, *ids[1:]), row=number))
    for row, measured in zip(rows, row_losses(model, rows).rows, strict=True):
        loss, tokens = by_definition(model, row)
        assert measured.loss_sum == pytest.approx(loss, rel=1e-5)
        assert measured.tokens == tokens


def test_chunks_and_batches_do_not_change_the_losses(
    make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model(), make_rows(10)
    whole = row_losses(model, rows)
    monkeypatch.setattr(perplexity, "_LOGIT_BYTES", 2000)  # eight tokens at a time
    for small in (row_losses(model, rows, rows_per_batch=1), row_losses(model, rows, tokens_per_batch=50)):
        assert [row.loss_sum for row in small.rows] == pytest.approx([row.loss_sum for row in whole.rows])


def test_full_logits_are_formed_for_few_rows_at_a_time(
    make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model("gemma2"), make_rows(8)
    whole = row_losses(model, rows)
    monkeypatch.setattr(perplexity, "_FULL_LOGIT_BYTES", 1)
    sizes: list[int] = []
    model.register_forward_hook(lambda _m, _i, output: sizes.append(output.logits.shape[0]))
    one_by_one = row_losses(model, rows)
    assert [row.loss_sum for row in one_by_one.rows] == pytest.approx([row.loss_sum for row in whole.rows])
    assert sizes[1:] == [1] * 8  # the first call is the one that finds the cap


def test_out_of_memory_halves_the_batch(
    make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]]
) -> None:
    model, rows = make_model(), make_rows(9)
    whole = row_losses(model, rows)

    def refuse_large(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no room")

    model.register_forward_pre_hook(refuse_large, with_kwargs=True)
    assert [row.loss_sum for row in row_losses(model, rows).rows] == pytest.approx(
        [row.loss_sum for row in whole.rows]
    )


def test_the_model_is_left_as_it_was(
    make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]]
) -> None:
    model = make_model("gpt2")
    model.train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    first = row_losses(model, make_rows(4))
    assert [module.training for module in model.modules()] == flags
    assert first == row_losses(model, make_rows(4))  # no dropout inside
    assert not model.transformer._forward_hooks
    assert torch.is_grad_enabled()


def test_progress_and_stop(make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]]) -> None:
    seen: list[tuple[int, int]] = []
    row_losses(
        make_model(), make_rows(10), rows_per_batch=4, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]
    calls = iter([False, True])
    stopped = row_losses(make_model(), make_rows(10), rows_per_batch=4, should_stop=lambda: next(calls))
    assert not stopped.complete
    assert len(stopped.rows) == 4


def test_refusals_name_rows(make_model: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="No rows"):
        row_losses(make_model(), [])
    with pytest.raises(DataError, match="row 7: no target") as caught:
        row_losses(make_model(), [Tokens((0, 5), (0, IGNORED), row=7)])
    assert caught.value.fix
    long = tuple([5] * 65)
    with pytest.raises(ModelError, match="Row 8 has 65 tokens; the model's context is 64"):
        row_losses(make_model(), [Tokens(long, long, row=8)])
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "vocab_size": 20}
    bart = BartForConditionalGeneration(
        BartConfig(**sizes, encoder_attention_heads=1, decoder_attention_heads=1, decoder_ffn_dim=8)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        row_losses(bart, [Tokens((0, 5), (0, 5), row=1)])
