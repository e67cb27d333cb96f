"""Triton's kernels and the operators that use them: in the interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

import graftlm
from graftlm.core.notices import forget_notices, notices_to
from graftlm.kernels import cross_entropy, cross_entropy_cuda
from graftlm.kernels.triton import forms as triton_forms

HERE = Path(__file__).parent
HAS_TRITON = util.find_spec("triton") is not None and util.find_spec("triton.language") is not None


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("script", "interpret"), [("interpreted", "1"), ("translated", "0")])
def test_without_a_gpu(script: str, interpret: str, tmp_path: Path) -> None:
    """Triton's interpreter runs the kernels on a CPU; its compiler makes code for a GPU that is not there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    source = str(Path(graftlm.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([source, environment.get("PYTHONPATH", "")])
    environment["TRITON_INTERPRET"] = interpret
    command = [sys.executable, str(HERE / f"triton_{script}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("\n")) >= 5


def test_without_triton_the_definitions_run_and_one_notice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("norms", "gating", "low_rank", "cross_entropy", "fp8", "dropout", "rotary"):
        monkeypatch.setitem(sys.modules, f"graftlm.kernels.triton.{name}", None)
    triton_forms._forms.cache_clear()
    forget_notices()
    heard: list[str] = []
    hidden, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    x = torch.randn(5, 8)
    try:
        with notices_to(heard.append):
            loss, grad = cross_entropy_cuda.linear_cross_entropy(hidden, weight, None, labels, 2, True)
            run = triton_forms.accelerated("gated_silu", lambda gate, up: gate + up)
            assert torch.equal(run(x, x), x + x)
    finally:
        triton_forms._forms.cache_clear()
        forget_notices()
    assert len(heard) == 1 and "graftlm[gpu]" in heard[0]
    expected = cross_entropy.linear_cross_entropy(hidden, weight, None, labels, 2, True)
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])


def test_float64_and_rows_beyond_registers_keep_the_definition() -> None:
    wide = torch.empty(1, 2**16 + 1)
    assert triton_forms.triton_form("rms_norm", wide, wide[0]) is None
    assert triton_forms.triton_form("gated_silu", wide.double()) is None


def test_rows_are_put_in_order_only_where_they_are_not() -> None:
    rows = torch.randn(4, 6)
    assert triton_forms.rows_in_order(rows[:, :3]).data_ptr() == rows.data_ptr()
    assert triton_forms.rows_in_order(rows.t()).is_contiguous()
    assert triton_forms.rows_in_order(0.5) == 0.5
