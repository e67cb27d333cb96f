"""Recorded micro-batches. The recorder here traces a step to operations with every host value fixed, as a
CUDA graph does; tracing fails where a number is asked of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from graftlm.core.errors import TrainingError
from graftlm.data.batches import Batch, Batches
from graftlm.data.encode import Encoded
from graftlm.data.fixed import DOCUMENTS, fixed
from graftlm.data.forms import flat
from graftlm.kernels.attention import attention_is_native
from graftlm.methods.base import MethodConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.models.attach import attach_from_base
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.recorded import Play, RecordedSft, Step
from graftlm.objectives.sft import SftObjective

from ..models.bases import small

TOKENS = 64


class Traced:
    """Plays a traced graph."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, step: Step, places: dict[str, Tensor]) -> Play:
        self.recorded += 1
        names = list(places)
        with pytest.MonkeyPatch.context() as patch:  # as transformers finds it while a CUDA graph is recorded
            for place in ("masking_utils", "modeling_utils"):
                patch.setattr(f"transformers.{place}.is_tracing", lambda tensor=None: True)
            graph = make_fx(lambda *values: step(dict(zip(names, values, strict=True))))(*places.values())

        def play() -> Sequence[Tensor | None]:
            found: Sequence[Tensor | None] = graph(*places.values())
            return found

        return play


def batches(seed: int, rows: int = 24) -> Batches:
    draw = torch.Generator().manual_seed(seed)
    encoded = []
    for row in range(rows):
        length = int(torch.randint(5, 30, (), generator=draw))
        ids = torch.randint(4, 16, (length,), generator=draw).tolist()
        start = int(torch.randint(1, length - 1, (), generator=draw))
        encoded.append(Encoded(tuple(ids), (*(-100,) * start, *ids[start:]), row + 1, False))
    return Batches(encoded, max_length=TOKENS, rows_per_batch=1, packing=True, seed=0, pad_token_id=0)


def gradients(
    objective: Any, model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter]
) -> list[Tensor]:
    parts = objective(model, batch)
    (parts.loss_sum / parts.target_tokens).backward()
    found = [parts.loss_sum.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)]
    for parameter in parameters:
        parameter.grad = None
    return found


METHODS = pytest.mark.parametrize(
    "config",
    [LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"), IA3Config(),
     LoraConfig(r=4, target_modules="all-linear", use_dora=True)],
    ids=["lora", "ia3", "dora"],
)  # fmt: skip


def adapted(
    kind: str, config: MethodConfig, dtype: torch.dtype = torch.float32
) -> tuple[Any, list[nn.Parameter]]:
    """A model in training mode with an adapter that changes something, and its parameters."""
    torch.manual_seed(0)
    model = small(kind).to(dtype).train()
    parameters = list(attach_from_base(model, config, "default").parameters("default"))
    for parameter in parameters:
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model, parameters


@METHODS
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fixed_shapes_change_no_loss_and_no_gradient(
    kind: str, config: MethodConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlm.objectives.recorded.MOST_SHAPES", 0)
    model, parameters = adapted(kind, config)
    plain, source = SftObjective(model), batches(1)
    assert plain.path == "frozen head"
    fixed_shapes = RecordedSft(plain, model, parameters, TOKENS, Traced())
    with fused(fusable(model)):
        for index in range(source.count(0)):
            batch = source.batch(0, index)
            expected = gradients(plain, model, batch, parameters)
            for one, other in zip(gradients(fixed_shapes, model, batch, parameters), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    attention_is_native(torch.bfloat16, 16) is not None,
    reason="attention here reads the documents on the host",
)
@METHODS
@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_what_was_recorded_is_played_for_other_batches(
    kind: str, config: MethodConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parameters = adapted(kind, config, torch.bfloat16)
    plain, recorder, source = SftObjective(model), Traced(), batches(1)
    recorded = RecordedSft(plain, model, parameters, TOKENS, recorder)
    unrecorded = RecordedSft(plain, model, parameters, TOKENS, recorder)
    with fused(fusable(model)):
        for index in range(source.count(0)):
            batch = source.batch(0, index)
            found = gradients(recorded, model, batch, parameters)
            with monkeypatch.context() as patch:  # further shapes are computed by the same operations
                patch.setattr("graftlm.objectives.recorded.MOST_SHAPES", 0)
                expected = gradients(unrecorded, model, batch, parameters)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert 0 < recorder.recorded < recorded.played == source.count(0)


def test_gradients_of_a_window_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.objectives.recorded.MOST_SHAPES", 0)
    model, parameters = adapted("llama", LoraConfig(r=4, target_modules="all-linear"))
    plain, source, sums = SftObjective(model), batches(2), []
    with fused(fusable(model)):
        for objective in (plain, RecordedSft(plain, model, parameters, TOKENS, Traced())):
            for index in range(3):
                (objective(model, source.batch(0, index)).loss_sum / 7).backward()
            sums.append([p.grad.clone() for p in parameters if p.grad is not None])
            for parameter in parameters:
                parameter.grad = None
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_are_taken_before_the_next_is_played() -> None:
    model, parameters = adapted("llama", LoraConfig(r=2))
    recorded = RecordedSft(SftObjective(model), model, parameters, TOKENS, Traced())
    source = batches(4)
    with fused(fusable(model)):
        first = recorded(model, source.batch(0, 0)).loss_sum
        recorded(model, source.batch(0, 1))
        with pytest.raises(TrainingError, match="played again"):
            first.backward()


def test_a_step_that_asks_for_a_number_is_refused() -> None:
    model, parameters = adapted("llama", LoraConfig(r=2))
    recorded = RecordedSft(SftObjective(model), model, parameters, TOKENS, Traced())

    def asks(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if float(output.sum()) > 0 else output * 2

    found = fusable(model)
    model.get_submodule("model.layers.0.mlp").register_forward_hook(asks)
    with fused(found), pytest.raises(TrainingError, match="cannot be recorded"):
        recorded(model, batches(5).batch(0, 0))


def test_evaluation_is_as_without() -> None:
    model = small("llama")
    parameters = list(attach_from_base(model, LoraConfig(r=2), "default").parameters("default"))
    plain, recorder, batch = SftObjective(model), Traced(), batches(6).batch(0, 0)
    recorded = RecordedSft(plain, model, parameters, TOKENS, recorder)
    with torch.no_grad():
        assert torch.equal(recorded(model.eval(), batch).loss_sum, plain(model, batch).loss_sum)
    assert recorder.recorded == 0


def test_shapes_are_few() -> None:
    source = batches(7, rows=200)
    found = [fixed(flat(source.batch(0, index)), TOKENS) for index in range(source.count(0))]
    assert len({each.shape for each in found}) <= 8 < len(found)
    for each in found:
        starts = each.inputs["cu_seq_lens_q"]
        assert starts[-1] == TOKENS and bool((starts.diff() >= 0).all()) and len(starts) > DOCUMENTS
        assert len(each.index) == len(each.targets) and bool((each.index[each.targets < 0] == 0).all())
