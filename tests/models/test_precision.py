"""What is said about the number format of a base."""

from __future__ import annotations

import pytest
import torch

from graftlm.core.notices import collected, forget_notices
from graftlm.models import precision
from graftlm.models.precision import advise_precision


@pytest.mark.parametrize(
    ("dtype", "parameters", "hardware", "said"),
    [
        (torch.float32, 10**9, True, True),
        (torch.float32, 10**9, False, False),
        (torch.float32, 10**6, True, False),
        (torch.bfloat16, 10**9, True, False),
    ],
)
def test_a_large_model_in_32_bits(
    dtype: torch.dtype, parameters: int, hardware: bool, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: hardware)
    forget_notices()
    advise_precision(dtype, torch.device("cpu"), parameters=parameters, name="some/base")
    assert any("model.dtype: bfloat16" in text for text in collected()) == said
