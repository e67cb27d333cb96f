"""Single numbers of a packed weight are those of the decoded one."""

from __future__ import annotations

import pytest
import torch

from graftlm.quant.packed import encode
from graftlm.quant.sampling import values_at
from graftlm.quant.scheme import KINDS, Scheme


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(7, 37), (1, 1), (64, 300)])
def test_every_number_is_the_decoded_one(kind: str, double_quant: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    packed = encode(torch.randn(shape), Scheme(kind, double_quant=double_quant))
    index = torch.randperm(shape[0] * shape[1])
    assert torch.equal(values_at(packed, index), packed.decode().flatten()[index])
