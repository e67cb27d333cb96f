"""Writing the answers of a step with the policy as it is, having them judged, and keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftlm.core.seeding import capture_rng, derived_seed, restore_rng, seed_everything
from graftlm.data.branches import BranchBatch, Branched, branch_batch
from graftlm.data.prompts import EncodedPrompt
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.generate import Generated, Sampling, StopFlag, decode, evaluation_mode, generate_ids
from graftlm.models.generate_groups import GroupWriter
from graftlm.objectives.policy_settings import SamplingSettings
from graftlm.quant.facts import device_of
from graftlm.tasks.policy.rollouts import RolloutFiles, Rollouts
from graftlm.tasks.rewards.adapter import on_model
from graftlm.tasks.rewards.rewards import Reward, Score, Written
from graftlm.training.step import to_device

TOKENS = 2**15
"""Tokens that are written side by side, prompts and room for answers together; no more than so many rows:"""
ROWS = 256

LogProbs = Callable[[nn.Module, BranchBatch], dict[str, Tensor]]
"""What is known of the tokens of a batch under a model, [N] each, by name."""


class Judging(Protocol):
    """What an algorithm makes of the rewards."""

    def __call__(self, found: Rollouts) -> Rollouts:
        """The rollouts with advantages."""


@dataclass(frozen=True)
class Passes:
    """Forward passes over finished answers, [N] each by name: of the policy, and of the base."""

    policy: LogProbs | None
    base: LogProbs | None


@dataclass(frozen=True)
class RolloutWriter:
    """Answers of a step, judged; from the run folder where they were written before.

    Args:
        ends: tokens that end an answer. group: answers to each prompt. seed: of the run; each step draws by
            it and its own number.
    """

    model: nn.Module
    draw: GroupWriter
    adapters: AdapterSet
    tokenizer: Any
    settings: SamplingSettings
    rewards: Sequence[Reward]
    files: RolloutFiles
    passes: Passes
    judge: Judging
    ends: Sequence[int]
    group: int
    prompts_per_batch: int
    seed: int
    stop: StopFlag

    def __call__(self, step: int, prompts: Sequence[EncodedPrompt]) -> Rollouts:
        kept = self.files.load(step, [prompt.row for prompt in prompts])
        if kept is not None:
            return kept
        # Somebody's rewards may draw numbers. A run that goes on does not call them again, and its dropout
        # must fall as if it had.
        before, seed = capture_rng(), derived_seed("rollouts", self.seed, step)
        seed_everything(seed)
        try:
            return self._written(step, prompts, seed)
        finally:
            restore_rng(before)

    def _written(self, step: int, prompts: Sequence[EncodedPrompt], seed: int) -> Rollouts:
        asked = [prompt for prompt in prompts for _ in range(self.group)]
        drawn = self._drawn(prompts, seed)
        answers = tuple(with_end(each) for each in drawn)
        written = [
            Written(prompt, decode(self.tokenizer, each.token_ids), tokens)
            for prompt, each, tokens in zip(asked, drawn, answers, strict=True)
        ]
        with on_model(self.rewards, self.model):
            scores = [reward(written) for reward in self.rewards]
        found = Rollouts(
            tuple(prompt.row for prompt in prompts),
            answers,
            torch.tensor([each.finish == "end" for each in drawn]),
            *totals_of(scores, self.settings.reward_weights),
        )
        found = self.judge(replace(found, of_tokens=self._passed(prompts, found)))
        self.files.save(step, found, self._lines(written, scores, found))
        return found

    def _drawn(self, prompts: Sequence[EncodedPrompt], seed: int) -> list[Generated]:
        settings = self.settings
        drawn = self.draw(
            [prompt.input_ids for prompt in prompts],
            self.group,
            max_new_tokens=settings.max_completion_length,
            stop_ids=self.ends,
            sampling=Sampling(settings.temperature, settings.top_p, seed),
            rows_per_batch=rows_at_once(prompts, settings),
            should_stop=self.stop,
        )
        return _whole(drawn)

    def _passed(self, prompts: Sequence[EncodedPrompt], found: Rollouts) -> dict[str, Tensor]:
        """Log-probabilities of all answers, under the policy and the base, as far as they are wanted."""
        parts: dict[str, list[Tensor]] = {}
        device, size = device_of(self.model), self.prompts_per_batch
        with evaluation_mode(self.model):
            for start in range(0, len(prompts), size):
                if self.stop():
                    raise KeyboardInterrupt
                rows = [
                    Branched(prompts[each].input_ids, self._answers(found, each), prompts[each].row, False)
                    for each in range(start, min(start + size, len(prompts)))
                ]
                batch = to_device(branch_batch(rows, self.tokenizer.pad_token_id or 0), device)
                for known, base in ((self.passes.policy, False), (self.passes.base, True)):
                    with self.adapters.disabled() if base else nullcontext():
                        for name, values in (known(self.model, batch) if known else {}).items():
                            parts.setdefault(name, []).append(values.cpu())
        return {name: torch.cat(values) for name, values in parts.items()}

    def _answers(self, found: Rollouts, prompt: int) -> tuple[tuple[int, ...], ...]:
        return found.answers[prompt * self.group : (prompt + 1) * self.group]

    def _lines(
        self, written: Sequence[Written], scores: Sequence[Sequence[Score]], found: Rollouts
    ) -> list[dict[str, object]]:
        """The answers as people read them."""
        lines = []
        for place, each in enumerate(written):
            told = {reward.name: by[place] for reward, by in zip(self.rewards, scores, strict=True)}
            total = float(found.totals[place])
            line: dict[str, object] = {
                "row": each.prompt.row,
                "prompt": each.prompt.prompt.asked,
                "completion": each.text,
                "tokens": len(each.tokens),
                "ended": bool(found.ended[place]),
                "rewards": {name: score.value for name, score in told.items()},
                "reward": None if total != total else total,
            }
            if "advantages" in found.of_answers:
                line["advantage"] = float(found.of_answers["advantages"][place])
            if failed := {name: score.failure for name, score in told.items() if score.failure}:
                line["failed"] = failed
            lines.append(line)
        return lines


def write(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    settings: SamplingSettings,
    ends: Iterable[int],
    seed: int | None,
    stop: StopFlag,
) -> list[Generated]:
    """An answer to each prompt: drawn by `seed`, or the likeliest tokens where it is None.

    Raises:
        KeyboardInterrupt: somebody asked to stop.
    """
    sampling = None if seed is None else Sampling(settings.temperature, settings.top_p, seed)
    drawn = generate_ids(
        model,
        [prompt.input_ids for prompt in prompts],
        max_new_tokens=settings.max_completion_length,
        stop_ids=ends,
        sampling=sampling,
        rows_per_batch=rows_at_once(prompts, settings),
        should_stop=stop,
    )
    return _whole(drawn)


def rows_at_once(prompts: Sequence[EncodedPrompt], settings: SamplingSettings) -> int:
    """How many answers are written side by side."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    return min(ROWS, max(1, TOKENS // (longest + settings.max_completion_length)))


def with_end(answer: Generated) -> tuple[int, ...]:
    """The tokens of an answer as they are learnt from: an end token is one of them."""
    return answer.token_ids if answer.end_id is None else (*answer.token_ids, answer.end_id)


def totals_of(
    scores: Sequence[Sequence[Score]], weights: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards [A, F], where they failed [A, F], and the weighted sums [A].

    A sum is NaN where a reward failed, or where none of them says anything of an answer.

    >>> totals_of([[Score(1.0), Score(None)], [Score(None), Score(None)]], None)[2].tolist()
    [1.0, nan]
    """
    nan = float("nan")
    table = torch.tensor(
        [[nan if each.value is None else each.value for each in by] for by in scores]
    ).T.double()
    failed = torch.tensor([[bool(each.failure) for each in by] for by in scores]).T
    weighted = table * torch.tensor(weights or [1.0] * len(scores), dtype=torch.float64)
    totals = weighted.nansum(dim=1)
    totals[failed.any(dim=1) | table.isnan().all(dim=1)] = nan
    return table.contiguous(), failed.contiguous(), totals.float()


def _whole(drawn: list[Generated]) -> list[Generated]:
    """All answers, or the end of the step: somebody asked to stop in the middle."""
    if any(each.finish == "cancelled" for each in drawn):
        raise KeyboardInterrupt
    return drawn
