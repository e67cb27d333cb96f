"""`graft chat`: a conversation with a base or an adapter, in the template it was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from graftlm.core.errors import GraftError, ModelError
from graftlm.data.encode import encode_prompt
from graftlm.data.pairs import Limits, encode_source, source_text
from graftlm.data.records import Example, Style, Turn
from graftlm.formats.layout import CONFIG, FOLDER
from graftlm.methods.attach import adapters_of, attach_folder
from graftlm.models.encoder_decoder import is_encoder_decoder, start_token
from graftlm.models.ending import TEXT
from graftlm.models.generate import context_length, stop_token_ids
from graftlm.models.heads import ending_of_adapter
from graftlm.models.load import load_model
from graftlm.quant.facts import device_of
from graftlm.verbs.base import load_base, section_of, stored_recipe
from graftlm.verbs.label_text import label_text, tells_labels
from graftlm.verbs.references import ADAPTER, RECIPE, adapter_reference, refuse_registry_name

NAME = "default"
NO_LIMIT = 2**20
"""Tokens of a source where the base has no limit of its own."""


class ChatSession:
    """A conversation. Greedy, so the same words get the same answer.

    Bases without a chat template continue a prompt, and encoder-decoders answer a source; there is no
    conversation to remember then.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: Any = "auto",
        source_prefix: str = "",
        max_new_tokens: int = 256,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.template, self.max_new_tokens, self.source_prefix = template, max_new_tokens, source_prefix
        self.is_pair = is_encoder_decoder(model)
        self.stops = set(stop_token_ids(model, tokenizer))
        self.turns: list[Turn] = []
        self.uses_adapter = adapters_of(model) is not None

    @property
    def style(self) -> Style:
        """Conversation where the tokenizer has a template for one, else prompt and continuation."""
        has_turns = self.tokenizer.chat_template and self.template != "plain" and not self.is_pair
        return "chat" if has_turns else "completion"

    def reply(self, text: str) -> str:
        """The whole answer to `text`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; of a classifier its labels."""
        if tells_labels(self.model):
            with self._adapter():
                yield label_text(self.model, self.tokenizer, text)
            return
        turns = [*(self.turns if self.style == "chat" else []), Turn("user", text, trained=False)]
        asked = Example((*turns, Turn("assistant", "", trained=True)), row=1, style=self.style)
        answer = ""
        for piece in self._pieces(self._encoded(asked)):
            answer += piece
            yield piece
        self.turns = [*turns, Turn("assistant", answer, trained=True)]

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns = []

    def toggle_adapter(self) -> bool:
        """Switch the adapter off or on; returns whether it acts now.

        Raises:
            GraftError: there is no adapter to switch.
        """
        if adapters_of(self.model) is None:
            raise GraftError(
                "This is a base without an adapter.", fix="Give a run or an adapter to compare with."
            )
        self.uses_adapter = not self.uses_adapter
        return self.uses_adapter

    @torch.no_grad()
    def _pieces(self, prompt: list[int]) -> Iterator[str]:
        room = self._room(1 if self.is_pair else len(prompt))
        written: list[int] = []
        shown, cache = "", None
        ids, given = self._begun(prompt)
        name = "decoder_input_ids" if self.is_pair else "input_ids"
        for _ in range(room):
            with self._adapter():
                output = self.model(**given, **{name: ids}, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
            if token in self.stops:
                return
            written.append(token)
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # a character may take several tokens
                yield text[len(shown) :]
                shown = text
            ids = torch.tensor([[token]], device=device_of(self.model))

    def _encoded(self, asked: Example) -> list[int]:
        if not self.is_pair:
            return encode_prompt(asked, self.tokenizer, self.template)
        limit = context_length(self.model) or NO_LIMIT
        return encode_source(
            source_text(asked), self.tokenizer, Limits(limit, limit, prefix=self.source_prefix)
        )

    def _begun(self, prompt: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        """What is read first, and what stays given: an encoder-decoder has read its source already."""
        ids = torch.tensor([prompt], device=device_of(self.model))
        if not self.is_pair:
            return ids, {}
        mask = torch.ones_like(ids)
        with self._adapter():
            read = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        forced = getattr(self.model.generation_config, "forced_bos_token_id", None)  # such as a language
        start = [start_token(self.model), *([] if forced is None else [forced])]
        begun = torch.tensor([start], device=device_of(self.model))
        return begun, {"encoder_outputs": read, "attention_mask": mask}

    def _adapter(self) -> Any:
        adapters = adapters_of(self.model)
        return nullcontext() if adapters is None or self.uses_adapter else adapters.disabled()

    def _room(self, prompt: int) -> int:
        limit = context_length(self.model)
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - prompt)
        if room < 1:
            raise ModelError(
                f"The conversation has {prompt} tokens; the context of this base is {limit}.",
                fix="Start afresh with /reset, or write less.",
            )
        return room


def chat(
    reference: str | Path, *, base: str | None = None, prompt: str | None = None, max_new_tokens: int = 256
) -> ChatSession:
    """Open a conversation with a run, an adapter or a base; a first `prompt` is answered by `.reply(prompt)`.

    Raises:
        GraftError: nothing of that name can be loaded.
    """
    folder = Path(reference)
    if not any((folder / part).is_file() for part in (CONFIG, f"{ADAPTER}/{CONFIG}", RECIPE)):
        refuse_registry_name(str(reference))
        model, tokenizer = load_model(str(reference))
        return ChatSession(model, tokenizer, max_new_tokens=max_new_tokens)
    found = adapter_reference(str(reference), base)
    ending = ending_of_adapter(found.adapter) or TEXT
    model, tokenizer = load_base(section_of(found), found.base, ending=ending)
    attach_folder(model, found.adapter, NAME, storage=FOLDER)
    recipe = stored_recipe(found.run) if found.run else None
    template = recipe.data.template if recipe else "auto"
    prefix = getattr(recipe.task.settings, "source_prefix", "") if recipe else ""
    return ChatSession(
        model, tokenizer, template=template, source_prefix=prefix, max_new_tokens=max_new_tokens
    )
