"""Every failure is made for real and recognised, and is gone after its fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from case import Case, judge
from cases.collected import every_case


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Model has .tie_word_embeddings=True.:UserWarning",
    "ignore:Merging unties the embeddings:UserWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:Input and output embeddings are no longer tied:UserWarning",
)
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_case(case: Case, tmp_path: Path) -> None:
    broken, fixed = judge(case, tmp_path).of(case.rule)
    assert broken is not None
    assert fixed is None, fixed.seen
    assert broken.seen and broken.meaning and broken.fix
    assert 0.5 <= broken.confidence <= 1
