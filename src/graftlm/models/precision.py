"""Which number format and device a base gets."""

from __future__ import annotations

import torch

from graftlm.core.config import suggest
from graftlm.core.environment import cpu_computes_bfloat16
from graftlm.core.errors import ConfigError, ModelError
from graftlm.core.notices import notice

AUTO = "auto"

WORTH_SAYING = 50_000_000
"""Parameters from which a slower number format costs enough to be told."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Names people write, and what they mean."""


def choose_device(device: str | torch.device) -> torch.device:
    """`"auto"` is the first GPU, else the CPU.

    Raises:
        ModelError: the device does not exist here.
    """
    if str(device) == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        # torch reports an unknown name, a build without CUDA and a missing device in these two
        raise ModelError(
            f"Cannot use the device {str(device)!r}: {str(error).splitlines()[0]}",
            fix="Use 'auto' or 'cpu'; `graft env` lists what this machine has.",
        ) from None
    return chosen


def check_dtype(dtype: str | torch.dtype) -> None:
    """Refuse a dtype that Graft does not know, before anything is loaded."""
    if dtype == AUTO or dtype in DTYPES or dtype in DTYPES.values():
        return
    known = [AUTO, *DTYPES]
    raise ConfigError(
        f"Unknown dtype {str(dtype)!r}{suggest(str(dtype), known) or '.'}",
        fix=f"Use one of {', '.join(known)}.",
    )


def choose_dtype(
    dtype: str | torch.dtype, *, stored: torch.dtype, device: torch.device, name: str
) -> torch.dtype:
    """The dtype a base computes in; `stored` is the checkpoint's own.

    `"auto"`: bfloat16 on a GPU that has it; on a CPU the stored dtype, except that 16 bits
    without hardware for them become float32 (same values, more memory, faster), with a notice.
    """
    check_dtype(dtype)
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != AUTO:
        return DTYPES[dtype]
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        notice(f"{name} runs in float32: this GPU has no bfloat16 arithmetic.")
        return torch.float32
    if stored == torch.bfloat16 and not cpu_computes_bfloat16():
        notice(
            f"{name} is stored in bfloat16 and runs in float32: this processor has no bfloat16 arithmetic."
        )
        return torch.float32
    if stored == torch.float16:
        notice(f"{name} is stored in float16 and runs in float32: gradients underflow in float16 on a CPU.")
        return torch.float32
    return stored


def advise_precision(dtype: torch.dtype, device: torch.device, *, parameters: int, name: str) -> None:
    """A notice where a model of some size runs in 32 bits on a processor that is faster in 16."""
    if device.type != "cpu" or dtype != torch.float32 or parameters < WORTH_SAYING:
        return
    if cpu_computes_bfloat16():
        notice(
            f"{name} is stored in float32 and runs in it; this processor multiplies bfloat16 several times "
            "as fast: model.dtype: bfloat16."
        )
