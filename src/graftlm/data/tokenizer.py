"""What the data layer asks of a tokenizer (any `transformers` tokenizer has it)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerBase` used here."""

    @property
    def is_fast(self) -> bool:
        """Whether tokens can be mapped back to characters (offsets)."""

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the special tokens."""

    chat_template: Any
    bos_token: Any
    bos_token_id: Any
    eos_token: Any
    eos_token_id: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenise."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Render a conversation with the tokenizer's own (sandboxed) Jinja template."""

    def get_added_vocab(self) -> dict[str, int]:
        """Tokens added beside the trained vocabulary, such as end-of-turn marks."""

    def convert_tokens_to_ids(self, *args: Any, **kwargs: Any) -> Any:
        """Ids of token texts."""

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Text of ids."""


def end_marks(tokenizer: Tokenizer) -> list[str]:
    """Texts that are one token and no ordinary words: special and added tokens, longest first."""
    marks: Iterable[str] = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return sorted((mark for mark in marks if mark and mark.strip()), key=len, reverse=True)


def begin_mark(tokenizer: Tokenizer) -> str:
    """The text of the token this tokenizer puts before every text, or ""."""
    ids = tokenizer("a")["input_ids"]
    starts = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if starts else ""
