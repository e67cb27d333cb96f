"""Rewards by adapters: reward models on the same base as the policy, loaded beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.core.files import sha256_file
from graftlm.formats.layout import FOLDER, TENSORS
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import adapters_of
from graftlm.objectives.reward_adapter import NAME, RewardAdapter
from graftlm.tasks.rewards.rewards import Reward, Score, Written


@dataclass
class AdapterReward:
    """The reward of an adapter; `on_model` says which model it stands on while it scores."""

    name: str
    folder: Path
    digest: str
    _loaded: RewardAdapter | None = field(default=None, repr=False)

    def __call__(self, written: Sequence[Written]) -> list[Score]:
        if self._loaded is None:
            raise RuntimeError(f"{self.name} stands on no model")
        values = self._loaded([(*each.prompt.input_ids, *each.tokens) for each in written])
        return [Score(value) for value in values]

    def put_on(self, adapters: AdapterSet) -> None:
        """Load it beside the other adapters of a model, once."""
        if self._loaded is None or self._loaded.adapters is not adapters:
            taken = sum(name.startswith(NAME) for name in adapters.names)
            self._loaded = RewardAdapter(adapters, self.folder, f"{NAME}_{taken}" if taken else NAME)

    def take_off(self) -> None:
        """Forget the model."""
        self._loaded = None


def adapter_reward(name: str, folder: Path) -> AdapterReward:
    """The reward of the adapter in a folder, or in a run's folder.

    Raises:
        ConfigError: there is no adapter.
    """
    inside = next((each for each in (folder, folder / "adapter") if (each / TENSORS).is_file()), None)
    if inside is None:
        raise ConfigError(
            f"{folder} holds no adapter.",
            meaning="A reward adapter is the result of a run with --task reward on the same base.",
            fix="Train one: graft tune PAIRS --task reward --model M, and name its folder: adapter:RUN",
        )
    return AdapterReward(name, inside, sha256_file(inside / TENSORS))


@contextmanager
def on_model(rewards: Sequence[Reward], model: nn.Module) -> Iterator[None]:
    """Inside, reward adapters stand on this model. A model without any adapter has none afterwards either.

    Raises:
        FormatError: an adapter is no reward model, or belongs to another base.
    """
    wanted = [reward for reward in rewards if isinstance(reward, AdapterReward)]
    if not wanted:
        yield
        return
    with ExitStack() as stack:
        adapters = adapters_of(model)
        if adapters is None:
            adapters = AdapterSet(model, FOLDER)
            stack.callback(adapters.detach)
            for reward in wanted:
                stack.callback(reward.take_off)
        for reward in wanted:
            reward.put_on(adapters)
        yield
