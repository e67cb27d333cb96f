"""A flat batch filled up to a number of tokens has the same loss and gradients."""

from __future__ import annotations

import torch

from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.data.filled import filled
from graftlm.data.forms import for_attention
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.sft import SftObjective
from graftlm.testing.models import tiny


def batches() -> Batches:
    ids = tuple(n % 30 for n in range(20))
    rows = [Encoded(ids[:n], (-100, *ids[1:n]), n, False) for n in (8, 14, 20)]
    return Batches(rows, rows_per_batch=2, max_length=32, packing=True, seed=0, pad_token_id=0)


def test_shapes_are_fixed_and_padding_is_a_document_without_labels() -> None:
    flat = for_attention(batches().batch(0, 0), "graft", torch.float32)
    real = flat.labels.shape[1]
    wide = filled(flat, 64)
    assert {tuple(wide.inputs[name].shape) for name in ("input_ids", "position_ids")} == {(1, 64)}
    assert wide.labels.shape == (1, 64) and wide.target_tokens == flat.target_tokens
    assert wide.inputs["cu_seq_lens_q"].tolist() == [*flat.inputs["cu_seq_lens_q"].tolist(), 64]
    assert torch.equal(wide.labels[:, :real], flat.labels) and bool((wide.labels[:, real:] == -100).all())


def test_what_is_full_or_not_flat_stays_as_it_is() -> None:
    batch = batches().batch(0, 0)
    assert filled(batch, 1000) is batch
    flat = for_attention(batch, "graft", torch.float32)
    assert filled(flat, flat.labels.shape[1]) is flat and filled(flat, 0) is flat


def test_loss_and_gradients_are_the_same() -> None:
    model = tiny("llama")
    attach(model, LoraConfig(r=4, init_lora_weights=False), storage=FOLDER)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    objective, found = SftObjective(model), []
    with fused(fusable(model)):
        for tokens in (0, 64):
            objective.tokens = tokens
            parts = objective(model, batches().batch(0, 0))
            found.append([parts.loss_sum.detach(), *torch.autograd.grad(parts.loss_sum, parameters)])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
