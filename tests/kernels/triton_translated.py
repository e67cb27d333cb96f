"""Triton's kernels compiled for a GPU that is not there (sm_90): `python triton_translated.py`."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graftlm.kernels.triton import cross_entropy as triton_cross_entropy
from graftlm.kernels.triton import dropout as triton_dropout
from graftlm.kernels.triton import fp8 as triton_fp8
from graftlm.kernels.triton import gating as triton_gating
from graftlm.kernels.triton import low_rank as triton_low_rank
from graftlm.kernels.triton import norms as triton_norms
from graftlm.kernels.triton import rotary as triton_rotary

HALF, WHOLE, FLOAT, COUNT = "*bf16", "*fp32", "fp32", "i32"

KERNELS: tuple[tuple[Any, str, dict[str, Any]], ...] = (
    (triton_norms._forward, f"{HALF} {HALF} {HALF} {WHOLE} {COUNT} {COUNT} {FLOAT}", {"size": 4096}),
    (triton_norms._backward, f"{HALF} {HALF} {HALF} {WHOLE} {HALF} {COUNT} {COUNT} {COUNT}", {"size": 4096}),
    (triton_gating._forward, f"{HALF} {HALF} {HALF} {COUNT} {COUNT} {COUNT}", {"size": 1024}),
    (triton_gating._backward, " ".join([HALF] * 5 + [COUNT] * 4), {"size": 1024}),
    (
        triton_low_rank._add,
        " ".join([HALF, HALF, WHOLE, HALF, FLOAT] + [COUNT] * 8),
        {"rows_size": 64, "columns_size": 128, "rank_size": 16, "widen": False},
    ),
    (
        triton_dropout._drop,
        f"{HALF} {HALF} i64 {COUNT} {COUNT} {COUNT} {COUNT}",
        {"adds": True, "size": 1024},
    ),
    (
        triton_rotary._turn,
        " ".join([HALF] * 4 + [COUNT] * 9),
        {"inverse": True, "heads_size": 32, "width_size": 128},
    ),
    (
        triton_fp8._round_row,
        f"{HALF} {WHOLE} *fp8e4nv {WHOLE} {COUNT} {COUNT} {FLOAT}",
        {"has_factors": True, "size": 4096},
    ),
    (
        triton_cross_entropy._row,
        f"{HALF} *i64 {WHOLE} {COUNT} {COUNT}",
        {"need_grad": True, "size": 4096},
    ),
)


def translated(kernel: Any, types: str, constants: dict[str, Any]) -> str:
    """The kernel's PTX for Hopper."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    text: str = made.asm["ptx"]
    return text


if __name__ == "__main__":
    for kernel, types, constants in KERNELS:
        text = translated(kernel, types, constants)
        assert "sm_90" in text and "cvt.rn" in text, kernel
        print(kernel.fn.__module__.rpartition("_")[2], kernel.fn.__name__)
