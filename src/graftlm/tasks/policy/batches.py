"""Batches that a policy writes itself: the prompts in them are fixed beforehand, the answers are not."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from graftlm.core.seeding import derived_seed
from graftlm.data.branches import BranchBatch, Branched, branch_batch
from graftlm.data.prompts import EncodedPrompt
from graftlm.tasks.policy.rollouts import Rollouts

B = TypeVar("B", bound=BranchBatch)

Write = Callable[[int, Sequence[EncodedPrompt]], Rollouts]
"""Number of a step and its prompts -> what the policy answers, judged."""
Form = Callable[[BranchBatch, Mapping[str, Any]], B]
"""Prompts with answers, and the tensors and facts that belong to them -> a batch of the objective."""


@dataclass(frozen=True)
class Layout:
    """How prompts are dealt out to steps.

    prompts_per_batch: in a forward pass. batches_per_step: passes of an optimizer step. iterations: optimizer
    steps on the same answers. most_new: tokens that all answers to one prompt can have. takes_truncated:
    whether something is learnt from answers that were cut off.
    """

    prompts_per_batch: int
    batches_per_step: int
    iterations: int
    most_new: int
    takes_truncated: bool
    seed: int
    pad_token_id: int

    @property
    def prompts_per_step(self) -> int:
        return self.prompts_per_batch * self.batches_per_step


class RolloutBatches(Generic[B]):
    """The micro-batches of every epoch; all steps have equally many prompts.

    The last step of an epoch is filled up with its first prompts. `write` is called at the first micro-batch
    of a step, with the policy as it is then; before `begin`, prompts stand in for their answers.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt], layout: Layout, form: Form[B], names: Sequence[str]):
        self._prompts, self._layout, self._form, self._names = tuple(prompts), layout, form, tuple(names)
        self._write: Write | None = None
        self._held: tuple[int, Rollouts] | None = None

    def begin(self, write: Write) -> None:
        """From here on, answers are those of the policy."""
        self._write = write

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all prompts and how they are dealt out."""
        digest = hashlib.sha256(str(self._layout).encode())
        for prompt in self._prompts:
            digest.update(array("q", [prompt.row, len(prompt.input_ids), *prompt.input_ids]).tobytes())
        return digest.hexdigest()

    @property
    def most_tokens(self) -> int:
        """What no micro-batch exceeds."""
        longest = max(len(prompt.input_ids) for prompt in self._prompts)
        return self._layout.prompts_per_batch * (longest + self._layout.most_new)

    def packing_rate(self, epoch: int = 0) -> float:
        """1: rows are not packed."""
        return 1.0

    def count(self, epoch: int) -> int:
        """Micro-batches of an epoch (the same in every epoch)."""
        return self._steps * self._layout.batches_per_step

    def batch(self, epoch: int, index: int) -> B:
        """Micro-batch `index` (from 0) of that epoch.

        Raises:
            IndexError: there is no such micro-batch.
            KeyboardInterrupt: somebody asked to stop while the answers were written.
        """
        layout = self._layout
        if not 0 <= index < self.count(epoch):
            raise IndexError(f"epoch {epoch} has {self.count(epoch)} micro-batches, not {index + 1}")
        step, place = divmod(index, layout.batches_per_step)
        group = step // layout.iterations
        prompts = self._of_step(epoch, group)
        here = range(place * layout.prompts_per_batch, (place + 1) * layout.prompts_per_batch)
        if self._write is None:
            return self._stand_in([prompts[each] for each in here])
        first = epoch * self._steps + group * layout.iterations + 1
        return self._batch(self._rollouts(first, prompts), prompts, here)

    @property
    def _steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self._prompts) // self._layout.prompts_per_step) * self._layout.iterations

    def _of_step(self, epoch: int, group: int) -> list[EncodedPrompt]:
        generator = torch.Generator().manual_seed(derived_seed("prompts", self._layout.seed, epoch))
        order = torch.randperm(len(self._prompts), generator=generator).tolist()
        size = self._layout.prompts_per_step
        places = range(group * size, (group + 1) * size)
        return [self._prompts[order[place % len(order)]] for place in places]

    def _rollouts(self, step: int, prompts: Sequence[EncodedPrompt]) -> Rollouts:
        if self._held is None or self._held[0] != step:
            assert self._write is not None
            self._held = (step, self._write(step, prompts))
        return self._held[1]

    def _batch(self, found: Rollouts, prompts: Sequence[EncodedPrompt], here: range) -> B:
        """The answers that something is learnt from; a batch without any has no targets."""
        taught, size = found.taught(self._layout.takes_truncated).tolist(), found.group
        rows, chosen = [], []
        for place in here:
            kept = [each for each in range(place * size, (place + 1) * size) if taught[each]]
            answers = tuple(found.answers[each] for each in kept)
            rows += [Branched(prompts[place].input_ids, answers, prompts[place].row, False)] if kept else []
            chosen += kept
        if not chosen:
            return self._stand_in([prompts[place] for place in here], targets=0)
        answers_at, tokens_at = torch.tensor(chosen), found.tokens_of(chosen)
        tensors = {name: value[answers_at] for name, value in found.of_answers.items()}
        tensors |= {name: value[tokens_at] for name, value in found.of_tokens.items()}
        plain = branch_batch(rows, self._layout.pad_token_id)
        return self._form(plain, {**tensors, "facts": found.facts(self._names)})

    def _stand_in(self, prompts: Sequence[EncodedPrompt], targets: int | None = None) -> B:
        """Prompts whose second half stands for an answer: text of the right kind, for what looks at it."""
        rows = []
        for prompt in prompts:
            ids, half = prompt.input_ids, max(1, len(prompt.input_ids) // 2)
            rows.append(Branched(ids[:half], (ids[half:] or ids[-1:],), prompt.row, False))
        batch = self._form(branch_batch(rows, self._layout.pad_token_id), {})
        return batch if targets is None else replace(batch, target_tokens=targets)
