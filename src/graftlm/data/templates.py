"""Which template turns examples into text, and what of that text is trained."""

from __future__ import annotations

import hashlib
from typing import Literal, Protocol, get_args

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, DataError
from graftlm.data.chat_template import ChatTemplate
from graftlm.data.plain_template import PlainTemplate
from graftlm.data.records import Example
from graftlm.data.segments import Segment
from graftlm.data.tokenizer import Tokenizer

TemplateName = Literal["auto", "chat", "plain"]


class Template(Protocol):
    """Renders examples for one tokenizer."""

    @property
    def name(self) -> str:
        """`chat` (the tokenizer's own) or `plain` (the fallback)."""

    @property
    def source(self) -> str:
        """The template's text."""

    @property
    def end(self) -> str:
        """The text of the token that ends an answer, "" if the tokenizer has none."""

    def segments(self, example: Example) -> list[Segment]:
        """The example as text, cut where training starts and stops."""

    def prompt(self, example: Example) -> str:
        """The text before the last trained answer, as at inference."""


def choose_template(tokenizer: Tokenizer, template: TemplateName = "auto") -> Template:
    """The tokenizer's chat template where it has one, else the plain fallback; or the one named.

    Raises:
        DataError: `chat` is asked of a tokenizer without a chat template.
        ConfigError: an unknown name.
    """
    if template not in get_args(TemplateName):
        raise ConfigError(
            f"Unknown template {template!r}{suggest(template, get_args(TemplateName))}",
            fix="Use auto, chat (the tokenizer's own) or plain.",
        )
    if template == "plain" or (template == "auto" and not tokenizer.chat_template):
        return PlainTemplate(tokenizer)
    if not tokenizer.chat_template:
        raise DataError(
            "This tokenizer has no chat template.",
            meaning="It belongs to a base model, which was not trained on conversations.",
            fix="Use template auto, which then writes a plain one, or an instruction-tuned model.",
        )
    return ChatTemplate(tokenizer)


def render(example: Example, tokenizer: Tokenizer, template: TemplateName = "auto") -> list[Segment]:
    """One example as text segments (for many examples make the template once: `choose_template`).

    Raises:
        DataError: the template refuses the conversation, or hides where the answers are.
    """
    return choose_template(tokenizer, template).segments(example)


def end_token_ids(tokenizer: Tokenizer, template: TemplateName = "auto") -> tuple[int, ...]:
    """Ids at which generation stops: the tokenizer's end token and the template's end-of-turn token."""
    mark = choose_template(tokenizer, template).end
    ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(mark) if mark else None]
    return tuple(dict.fromkeys(int(one) for one in ids if one is not None))


def template_digest(template: Template) -> str:
    """SHA-256 of the template's text: two runs with the same digest saw the same template."""
    return hashlib.sha256(template.source.encode()).hexdigest()
