"""How good a policy is: the rewards of its likeliest answers, and how far it has moved from its base."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from graftlm.core.errors import DataError
from graftlm.data.branches import Branched
from graftlm.data.prompts import EncodedPrompt
from graftlm.evaluation.divergence import first_answer_divergences, is_base
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.models.generate import Generated, Progress, StopFlag, decode
from graftlm.objectives.policy_settings import SamplingSettings
from graftlm.tasks.policy.writer import totals_of, with_end, write
from graftlm.tasks.rewards.adapter import on_model
from graftlm.tasks.rewards.rewards import Reward, Written

MOST = 256
"""Held-out prompts that are answered when nobody asked for exact match by name."""
DURING_TRAINING = 64
"""Held-out prompts that are answered between steps."""
MOVED = 64
"""Held-out prompts at whose answers the distance from the base is taken."""


@dataclass(frozen=True)
class PolicyMeasure:
    """Answers held-out prompts and has the answers judged.

    Args:
        ends: tokens that end an answer. seed: of the answers that the distance from the base is taken at.
    """

    tokenizer: Any
    settings: SamplingSettings
    rewards: Sequence[Reward]
    ends: Sequence[int]
    seed: int

    def rewarded(
        self, model: nn.Module, prompts: Sequence[EncodedPrompt], stop: StopFlag
    ) -> list[EvaluatedRow]:
        """A row for each prompt, with what the likeliest answer to it is worth.

        Figures: `reward`, each single one as `reward/NAME` where there are several, and `answer_tokens`.
        Where a reward fails, its figures are missing. The loss of a row is its reward with the sign turned,
        0 where there is none.
        """
        drawn = write(model, prompts, self.settings, self.ends, None, stop)
        written = [
            Written(prompt, decode(self.tokenizer, each.token_ids), with_end(each))
            for prompt, each in zip(prompts, drawn, strict=True)
        ]
        with on_model(self.rewards, model):
            scores = [reward(written) for reward in self.rewards]
        totals = totals_of(scores, self.settings.reward_weights)[2].tolist()
        rows = []
        for place, (each, total) in enumerate(zip(written, totals, strict=True)):
            figures = {"answer_tokens": float(len(each.tokens))}
            is_judged = total == total
            figures |= {"reward": total} if is_judged else {}
            if len(self.rewards) > 1:
                said = zip(self.rewards, (by[place].value for by in scores), strict=True)
                figures |= {f"reward/{reward.name}": value for reward, value in said if value is not None}
            rows.append(self._row(each, -total if is_judged else 0.0, figures))
        return rows

    def moved(self, model: nn.Module, prompts: Sequence[EncodedPrompt], stop: StopFlag) -> list[float]:
        """The KL divergence from the base in nats per token, along answers that the policy draws.

        At each token it is exact, over the whole vocabulary. 0 for the base.
        """
        if is_base(model):
            return [0.0] * len(prompts)
        drawn = write(model, prompts, self.settings, self.ends, self.seed, stop)
        rows = [_branch(prompt, each) for prompt, each in zip(prompts, drawn, strict=True)]
        return first_answer_divergences(model, rows, should_stop=stop)

    def measure(
        self,
        model: nn.Module,
        prompts: Sequence[EncodedPrompt],
        *,
        name: str,
        path: str,
        progress: Progress,
        stop: StopFlag,
    ) -> Evaluation:
        """Rewards of all prompts, the distance from the base at `MOVED` of them.

        Raises:
            DataError: the rewards fail on every answer.
        """
        started = time.monotonic()
        rows = self.rewarded(model, prompts, stop)
        if not any("reward" in row.figures for row in rows):
            raise DataError(
                f"No answer of {name} could be judged: the rewards say nothing of all {len(rows):,}.",
                problems=[reward.name for reward in self.rewards],
                meaning="A reward function raises, or returns no number, whatever was written.",
                fix="Call the function by hand with a prompt of the data and an answer.",
            )
        progress(len(prompts), len(prompts) + 1)
        some = spread_over(range(len(prompts)), MOVED)
        far = dict(zip(some, self.moved(model, [prompts[each] for each in some], stop), strict=True))
        progress(len(prompts) + 1, len(prompts) + 1)
        for place, value in far.items():
            rows[place] = _with(rows[place], "kl", value)
        measures = ("reward", "kl", "answer_tokens")
        seconds = time.monotonic() - started
        return Evaluation(name, tuple(rows), seconds, True, path, measures, loss_title="")

    def _row(self, written: Written, loss: float, figures: dict[str, float]) -> EvaluatedRow:
        prompt = written.prompt
        content = f"{list(prompt.input_ids)}|{prompt.prompt.reference}"
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        asked = decode(self.tokenizer, prompt.input_ids)
        reference = prompt.prompt.reference or None
        return EvaluatedRow(prompt.row, digest, loss, 1, asked, written.text, reference, figures)


def spread_over(found: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spread.

    >>> spread_over(range(10), 4)
    [0, 2, 5, 7]
    """
    if len(found) <= most:
        return list(found)
    return [found[place * len(found) // most] for place in range(most)]


def _branch(prompt: EncodedPrompt, answer: Generated) -> Branched:
    return Branched(prompt.input_ids, (with_end(answer),), prompt.row, False)


def _with(row: EvaluatedRow, name: str, value: float) -> EvaluatedRow:
    return replace(row, figures={**row.figures, name: value})
