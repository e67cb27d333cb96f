"""A padding token for tokenizers that come without one; the vocabulary never grows."""

from __future__ import annotations

import re
from typing import Any

from graftlm.core.notices import notice

_PADS = re.compile(r"[<\[|]*(finetune_right_)?pad(_id)?[>\]|]*", re.IGNORECASE)
_RESERVED = re.compile(r"<\|?(reserved|unused|extra|dummy)[\w-]*\|?>|\[unused\d+\]", re.IGNORECASE)


def ensure_padding(tokenizer: Any, rows: int, name: str) -> None:
    """Give `tokenizer` a padding token with an id below `rows` (the embedding's rows), in this order:
    a token made for it, a reserved one, the unknown token, the end token, token 0.

    The end token comes last because trainers that mask "the padding token" by its id would then never
    train a model to stop; Graft masks by position, so even that choice is safe here.
    """
    if tokenizer.pad_token_id is not None:
        return
    token = _choose(tokenizer, rows)
    tokenizer.pad_token = token
    if token == tokenizer.eos_token:
        notice(f"{name} has no padding token: its end token {token!r} pads, masked by position.")


def _choose(tokenizer: Any, rows: int) -> str:
    special = {
        entry.content: index for index, entry in tokenizer.added_tokens_decoder.items() if entry.special
    }
    usable = [token for token, index in sorted(special.items(), key=lambda item: item[1]) if index < rows]
    ends = {tokenizer.eos_token, tokenizer.bos_token}
    for pattern in (_PADS, _RESERVED):
        for token in usable:
            if pattern.fullmatch(token) and token not in ends:
                return str(token)
    if tokenizer.unk_token is not None and tokenizer.unk_token not in ends:
        return str(tokenizer.unk_token)
    if tokenizer.eos_token is not None:
        return str(tokenizer.eos_token)
    return str(tokenizer.convert_ids_to_tokens(0))
