"""Compiled layers: the same losses, one code for all of them, no new code for other batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from graftlm.core.errors import TrainingError
from graftlm.core.notices import forget_notices, notices_to
from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.kernels.attention import attention_is_native
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models import regional_compile
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.recompute.policy import recomputing
from graftlm.models.regional_compile import compiled_layers, own_forward
from graftlm.objectives.sft import SftObjective
from graftlm.testing.models import tiny


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_and_batches() -> tuple[Any, Batches]:
    model = tiny("llama").bfloat16()
    attach(model, LoraConfig(r=4, init_lora_weights=False), storage=FOLDER)
    ids = tuple(n % 30 for n in range(30))
    rows = [Encoded(ids[:n], (-100, *ids[1:n]), n, False) for n in range(6, 30)]
    return model.train(), Batches(rows, rows_per_batch=1, max_length=64, packing=True, seed=0, pad_token_id=0)


def gradients(model: Any, objective: SftObjective, batch: Any) -> list[torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = objective(model, batch).loss_sum
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


NATIVE = attention_is_native(torch.bfloat16, 8)


@pytest.mark.slow
@pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))
@pytest.mark.filterwarnings("ignore")  # torch warns itself, in its compiler
@pytest.mark.parametrize("policy", ["nothing", "everything"])
def test_the_same_gradients_from_one_code(policy: Any) -> None:
    """Whatever the documents are: only the first layer, whose input needs no gradient, has its own code."""
    model, batches = model_and_batches()
    objective = SftObjective(model)
    found = compiled_layers(model)
    assert found.summary == f"{found.total} of {found.total} layers compiled"
    with fused(fusable(model)), recomputing(model, policy):
        expected = [gradients(model, objective, batches.batch(0, number)) for number in range(3)]
    objective.tokens = batches.most_tokens
    with ExitStack() as stack:
        stack.enter_context(fused(fusable(model)))
        stack.enter_context(found.in_use())
        stack.enter_context(recomputing(model, policy))
        same = [gradients(model, objective, batches.batch(0, number)) for number in range(3)]
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    for one, other in zip(same, expected, strict=True):
        for mine, its in zip(one, other, strict=True):
            assert (mine - its).norm() <= 5e-2 * its.norm() + 1e-3
    assert not any("forward" in vars(module) for module in model.modules())


def test_evaluation_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any, **__: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled)
    model, _ = model_and_batches()
    ids = torch.arange(8).unsqueeze(0)
    with compiled_layers(model).in_use(), torch.no_grad():
        model(input_ids=ids)
        model.eval()
        model(input_ids=ids)
        with torch.enable_grad(), pytest.raises(AssertionError, match="compiled"):
            model.train()(input_ids=ids)


def test_a_compiler_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.BackendCompilerFailed(
            regional_compile.own_forward, OSError("no compiler"), None
        )

    monkeypatch.setattr(torch, "compile", lambda function, **_: fails)
    model, _ = model_and_batches()
    ids = torch.arange(8).unsqueeze(0)
    with compiled_layers(model).in_use(), pytest.raises(TrainingError, match=r"torch\.compile") as error:
        model(input_ids=ids)
    assert "train.compile: off" in str(error.value)
    expected = model(input_ids=ids).logits
    heard: list[str] = []
    forget_notices()
    with notices_to(heard.append), compiled_layers(model, on_failure="go on").in_use():
        found = [model(input_ids=ids).logits for _ in range(2)]
    assert all(torch.equal(logits, expected) for logits in found)
    assert len(heard) == 1 and "torch.compile failed" in heard[0]


def test_layers_may_be_left_out() -> None:
    model, _ = model_and_batches()
    last = model.model.layers[-1]
    found = compiled_layers(model, [last])
    assert last not in found.layers.values() and len(found.layers) == found.total - 1
    assert own_forward(last).__name__ == "forward"
