"""`graft chat`: a conversation with a base or an adapter, in the template it was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from graftlm.core.errors import GraftError, ModelError
from graftlm.data.encode import encode_prompt
from graftlm.data.records import Example, Style, Turn
from graftlm.formats.layout import CONFIG, FOLDER
from graftlm.methods.attach import adapters_of, attach_folder
from graftlm.models.generate import context_length, stop_token_ids
from graftlm.models.load import load_model
from graftlm.objectives.sft import require_causal
from graftlm.verbs.base import load_base, section_of, stored_recipe
from graftlm.verbs.references import ADAPTER, RECIPE, adapter_reference, refuse_registry_name

NAME = "default"


class ChatSession:
    """A conversation. Greedy, so the same words get the same answer.

    Bases without a chat template continue a prompt; there is no conversation to remember then.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, template: Any = "auto", max_new_tokens: int = 256
    ) -> None:
        require_causal(model)
        self.model, self.tokenizer = model, tokenizer
        self.template, self.max_new_tokens = template, max_new_tokens
        self.stops = set(stop_token_ids(model, tokenizer))
        self.turns: list[Turn] = []
        self.uses_adapter = adapters_of(model) is not None

    @property
    def style(self) -> Style:
        """Conversation where the tokenizer has a template for one, else prompt and continuation."""
        return "chat" if self.tokenizer.chat_template and self.template != "plain" else "completion"

    def reply(self, text: str) -> str:
        """The whole answer to `text`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece."""
        turns = [*(self.turns if self.style == "chat" else []), Turn("user", text, trained=False)]
        asked = Example((*turns, Turn("assistant", "", trained=True)), row=1, style=self.style)
        answer = ""
        for piece in self._pieces(encode_prompt(asked, self.tokenizer, self.template)):
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
        room = self._room(len(prompt))
        written: list[int] = []
        shown, cache = "", None
        ids = torch.tensor([prompt], device=self.model.device)
        for _ in range(room):
            with self._adapter():
                output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
            if token in self.stops:
                return
            written.append(token)
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # a character may take several tokens
                yield text[len(shown) :]
                shown = text
            ids = torch.tensor([[token]], device=self.model.device)

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
    model, tokenizer = load_base(section_of(found), found.base)
    attach_folder(model, found.adapter, NAME, storage=FOLDER)
    template = stored_recipe(found.run).data.template if found.run else "auto"
    return ChatSession(model, tokenizer, template=template, max_new_tokens=max_new_tokens)
