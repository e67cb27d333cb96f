"""Where adapters act on what a whole stack of layers reads: virtual tokens in its input or in its cache.

The parts only say what the virtual tokens are. Masks, positions, caches, several adapters at once and
different ones per row are worked out between the model and its stack, once for all methods.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from graftlm.methods.site import Site
from graftlm.methods.virtual import checkpointing
from graftlm.methods.virtual.cache import is_filled
from graftlm.methods.virtual.call import Arguments, Call, begin
from graftlm.methods.virtual.hooked import HookedPlace
from graftlm.methods.virtual.masks import with_columns
from graftlm.methods.virtual.output import without_front
from graftlm.methods.virtual.rows import Rows, rows_of
from graftlm.methods.virtual.stacks import argument_names, facts_of


class Gate(HookedPlace):
    """Stands at a stack of layers."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__(model, path)
        self._facts = facts_of(model, self.module)
        self._call: Call | None = None
        self._wanted = self._kept = 0
        self._is_checkpointing = False

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        stack = self.module
        handles: list[RemovableHandle] = [
            stack.register_forward_pre_hook(self._before, with_kwargs=True),
            stack.register_forward_hook(self._after),
        ]
        table = _position_table(stack)
        if "position_ids" not in self._facts.arguments and table is not None:
            handles.append(table.register_forward_hook(self._after_positions))
        if self._facts.shifts_labels:
            handles += [
                model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                model.register_forward_hook(self._after_model),
            ]
        if self._facts.is_encoder:
            decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
            handles.append(decoder.register_forward_pre_hook(self._before_reader, with_kwargs=True))
        return handles

    def uninstall(self) -> None:
        checkpointing.take_back(self.module)
        super().uninstall()

    def _rows(self) -> Rows | None:
        """Who has virtual tokens now."""
        if self.route is not None and self.is_enabled:
            return rows_of((), self.route, {name: self.adapter(name) for name in self.names})
        return rows_of([(name, self.adapter(name)) for name in self.shown], None, {})

    # Around the stack.

    def _before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        self._call, self._kept, self._wanted = None, self._wanted, 0
        if self._is_checkpointing:  # the last call failed half-way
            self._stop_checkpointing()
        rows = self._rows()
        if rows is None:
            return None
        given = _bound(self._facts.arguments, args, kwargs)
        self._call = call = begin(stack, self._facts, rows, given)
        if call.view is not None and checkpointing.is_checkpointed(stack):
            checkpointing.give(stack, call.view)
            self._is_checkpointing = True
        return (), given

    def _after(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, self._call = self._call, None
        if self._is_checkpointing:
            self._stop_checkpointing()
        if call is None:
            return None
        facts = self._facts
        return call.result(output, self._kept, is_whole=facts.is_encoder, pools_first=facts.pools_first)

    def _after_positions(self, table: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """BART and its kin look positions up by column, which are not a row's own where rows differ."""
        if self._call is None or self._call.positions is None:
            return None
        return F.embedding(self._call.positions + getattr(table, "offset", 0), table.get_parameter("weight"))

    def _stop_checkpointing(self) -> None:
        checkpointing.take_back(self.module)
        self._is_checkpointing = False

    # Around the model: the last virtual token predicts the first real one.

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        self._wanted = 0
        rows = self._rows()
        given = _bound(argument_names(model), args, kwargs)
        labels = given.get("labels")
        if rows is None or labels is None or given.get("shift_labels") is not None:
            return None
        if is_filled(given.get("past_key_values")):
            return None
        has_prompt = [bool(group.inputs) for group in rows.groups]
        if not any(has_prompt):
            return None
        self._wanted = 1
        labels = F.pad(labels, (1, 0), value=-100)
        if rows.index is not None:
            others = ~torch.tensor(has_prompt)[rows.index].to(labels.device)
            labels[:, 1] = labels[:, 1].masked_fill(others, -100)
        return (), given | {"labels": labels}

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        kept, self._kept = self._kept, 0
        if not kept:
            return None
        logits = output[1] if isinstance(output, tuple) else output.logits
        return without_front(output, kept, logits.shape[1])

    # Around the decoder that reads what this stack returns.

    def _before_reader(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        rows = self._rows()
        given = _bound(argument_names(decoder), args, kwargs)
        hidden, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if rows is None or hidden is None:
            return None
        counts = [sum(len(part.embeddings()) for part in group.inputs) for group in rows.groups]
        layout = rows.layout(counts, hidden.device)
        if mask is None and layout.seen is not None:
            mask = torch.ones(hidden.shape[0], hidden.shape[1] - layout.width, device=hidden.device)
        if mask is None or mask.shape[-1] + layout.width != hidden.shape[1]:
            return None
        mask = with_columns(mask, layout.width, 0, layout.seen, is_causal=False)
        return (), given | {"encoder_attention_mask": mask}


def _position_table(stack: nn.Module) -> nn.Embedding | None:
    """The stack's table of learned positions."""
    table = getattr(stack, "embed_positions", None)
    table = table.base_layer if isinstance(table, Site) else table
    return table if isinstance(table, nn.Embedding) else None


def _bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """All arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
