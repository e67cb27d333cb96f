"""Recorded micro-batches as CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.recorded import CudaRecorder, RecordedSft
from graftlm.objectives.sft import SftObjective
from graftlm.training.step import to_device

from .test_recorded import TOKENS, adapted, batches, gradients


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_and_gradients_are_those_of_the_step() -> None:
    model, parameters = adapted("llama", LoraConfig(r=4, target_modules="all-linear"), torch.bfloat16)
    model = model.cuda()
    plain, source = SftObjective(model), batches(1)
    recorded = RecordedSft(plain, model, parameters, TOKENS, CudaRecorder())
    with fused(fusable(model)):
        for index in [*range(source.count(0))] * 2:
            batch = to_device(source.batch(0, index), torch.device("cuda"))
            expected = gradients(plain, model, batch, parameters)
            for one, other in zip(gradients(recorded, model, batch, parameters), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=5e-2, atol=1e-3)
