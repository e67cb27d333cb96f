"""A reward adapter beside a policy: two adapters on the same weights, and no second model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.core.errors import FormatError
from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED
from graftlm.data.forms import for_attention
from graftlm.data.longest_first import longest_first
from graftlm.formats import peft_config
from graftlm.formats.layout import CONFIG, TENSORS, check_base, fill, read_folder
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.generate import evaluation_mode
from graftlm.objectives.sft import attention_of, wanted_states
from graftlm.quant.facts import device_of, dtype_of

NAME = "reward"
TOKENS_PER_BATCH = 8192


class RewardAdapter:
    """Scores answers with the adapter of a reward model, on the base of a model that writes text.

    The adapter is loaded beside the policy's, frozen, and active only while it scores; its head, which the
    base has no place for, is kept here.
    """

    def __init__(self, adapters: AdapterSet, folder: Path, name: str = NAME) -> None:
        """
        Args:
            adapters: of the causal model whose answers are scored.
            folder: the adapter of a reward model, trained on the same base.
            name: under which it is loaded.

        Raises:
            FormatError: it is no reward adapter, or belongs to another base; nothing is added.
        """
        self.adapters, self.name = adapters, name
        self._model: Any = adapters.model
        self.head = self._load(folder)

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each row of tokens: a prompt and an answer, without padding. The model is left as it
        was: active adapters, modes and random state.

        Raises:
            ValueError: a row has no token.
        """
        if not all(len(row) for row in rows):
            raise ValueError("a row without a token has no reward")
        found = [0.0] * len(rows)
        with self.adapters.activated(self.name), evaluation_mode(self._model):
            for places in longest_first([len(row) for row in rows], tokens=TOKENS_PER_BATCH):
                states = self._last_states([rows[place] for place in places])
                rewards = states.to(self.head.dtype) @ self.head
                for place, reward in zip(places, rewards.tolist(), strict=True):
                    found[place] = reward
        return found

    def _last_states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The hidden state of the last token of each row. Shape: [rows, H]."""
        device, dtype = device_of(self._model), dtype_of(self._model)
        batch = for_attention(_padded(rows, device), attention_of(self._model), dtype)
        return wanted_states(self._model, batch.inputs, batch.labels != IGNORED)

    def _load(self, folder: Path) -> Tensor:
        """Load the adapter without its head, and give the head's weight [H] in float32."""
        content, tensors = read_folder(folder)
        config = peft_config.from_json(content, tensors, str(folder / CONFIG))
        copies = config.modules_to_save or ()
        found = [(name, key) for name in copies for key in tensors if f".{name}." in f".{key}"]
        own = [(name, key) for name, key in found if tensors[key].dim() == 2 and len(tensors[key]) == 1]
        if len(own) != 1:
            raise FormatError(
                f"{folder} is no adapter of a reward model.",
                meaning="A reward model has a head with one row of weights, saved with its adapter.",
                fix="Train one: graft tune PAIRS --task reward --model M.",
            )
        ((name, key),) = own
        rest, backbone = tuple(each for each in copies if each != name), self._model.base_model_prefix
        outside = [path for path, _ in self._model.named_children() if path != backbone]
        self.adapters.add(self.name, config.replace(modules_to_save=rest or None))
        with ExitStack() as undo:
            undo.callback(self.adapters.delete, self.name)
            check_base(self._model, folder, outside, strict=True)
            others = {each: value for each, value in tensors.items() if each != key}
            fill(self.adapters, self.name, others, str(folder / TENSORS), strict=True)
            undo.pop_all()
        return tensors[key].squeeze(0).float().to(device_of(self._model))


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Rows padded on the right, with a label on the last token of each."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]).to(device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).to(device)
    labels = torch.full((len(rows), width), IGNORED)
    for line, row in zip(labels, rows, strict=True):
        line[len(row) - 1] = 0
    lengths = tuple((len(row),) for row in rows)
    real, numbers = sum(map(len, rows)), tuple(range(len(rows)))
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, len(rows), real, numbers, lengths)
