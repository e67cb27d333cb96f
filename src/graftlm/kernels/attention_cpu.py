"""Attention on a CPU: compiled for bfloat16, else by its definition."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from graftlm.kernels import attention_reference
from graftlm.kernels.native import attention_call


def attention_is_native(dtype: torch.dtype, head_dim: int) -> str | None:
    """None where the compiled kernel of this machine takes such tensors, else the reason why it does not."""
    if dtype != torch.bfloat16:
        return f"the compiled attention takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not 0 < head_dim <= attention_call.WIDEST:
        return f"the compiled attention takes heads of up to {attention_call.WIDEST} values, not {head_dim}"
    found = attention_call.library()
    return found if isinstance(found, str) else None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    parents: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """`attention_reference.attention`, compiled."""
    compiled = _compiled(q, k, v, parents, scale, window)
    if compiled is None:
        return attention_reference.attention(q, k, v, starts, parents, scale, window)
    documents = attention_reference.documents_of(starts, parents, len(q))
    return attention_call.forward(compiled, _rows(q), _rows(k), _rows(v), documents, scale, window)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    parents: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_reference.attention_backward`, compiled."""
    compiled = _compiled(q, k, v, parents, scale, window)
    if compiled is None:
        return attention_reference.attention_backward(grad, q, k, v, out, lse, starts, parents, scale, window)
    documents = attention_reference.documents_of(starts, parents, len(q))
    q, k, v, out, lse = _rows(q), _rows(k), _rows(v), _rows(out), lse.contiguous()
    return attention_call.backward(compiled, _rows(grad), q, k, v, out, lse, documents, scale, window)


def _compiled(
    q: Tensor, k: Tensor, v: Tensor, parents: Tensor | None, scale: float, window: int | None
) -> ctypes.CDLL | None:
    """The compiled code, if these are what it takes for granted."""
    if parents is not None and window is not None:
        return None
    if {k.dtype, v.dtype} != {q.dtype} or scale <= 0 or attention_is_native(q.dtype, q.shape[-1]) is not None:
        return None
    found = attention_call.library()
    return None if isinstance(found, str) else found


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
