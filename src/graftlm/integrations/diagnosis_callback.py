"""Known failures of a loop of `transformers.Trainer`, told while it runs and kept for `graft diagnose`."""

from __future__ import annotations

from typing import Any

import transformers

from graftlm.core.notices import notice
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.structure import LoopState, StructureFacts
from graftlm.diagnosis.rules import evaluation_mode, optimizer_weights, untrained_adapter
from graftlm.diagnosis.table import diagnose
from graftlm.integrations.loop_state import note_evaluation, note_training

RULES = (untrained_adapter.RULE, optimizer_weights.RULE, evaluation_mode.RULE)


class DiagnosisCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """`Trainer(..., callbacks=[DiagnosisCallback()])`: says what it finds as notices, and leaves
    `graft-state.json` in the trainer's folder."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._is_trained_since = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Whether the optimizer holds what is trained."""
        if given.get("optimizer") is not None:
            self._tell(note_training(given["model"], args.output_dir, given["optimizer"]))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """How the model stands when it is evaluated: looked at once for every time that it is trained."""
        if self._is_trained_since:
            self._is_trained_since = False
            self._tell(note_evaluation(given["model"], args.output_dir))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The next evaluation is looked at again."""
        self._is_trained_since = True

    def _tell(self, found: LoopState) -> None:
        for finding in diagnose(Evidence(structure=StructureFacts(loop=found)), RULES):
            if finding.rule not in self._said:
                self._said.add(finding.rule)
                notice(f"{finding.rule} {finding.title}: {finding.seen} {finding.fix}")
