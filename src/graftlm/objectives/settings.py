"""What a recipe may say of a task, by its name: each objective has its settings in its own file."""

from __future__ import annotations

from collections.abc import Mapping

from graftlm.core.config import Config
from graftlm.objectives.classification import ClassificationSettings
from graftlm.objectives.kto import KtoSettings
from graftlm.objectives.multi import MULTI, MultiSettings
from graftlm.objectives.policy_settings import GrpoSettings, PpoSettings, RlooSettings
from graftlm.objectives.preference import DpoSettings, IpoSettings
from graftlm.objectives.reference_free import OrpoSettings, SimpoSettings
from graftlm.objectives.reward import RewardSettings
from graftlm.objectives.seq2seq import Seq2SeqSettings
from graftlm.objectives.sft import SftSettings
from graftlm.objectives.token_classification import TokenClassificationSettings

AUTO = "auto"


class AutoSettings(Config):
    """The task is told from the data; it has no settings of its own."""


SETTINGS: Mapping[str, type[Config]] = {
    AUTO: AutoSettings,
    "sft": SftSettings,
    "seq2seq": Seq2SeqSettings,
    "classification": ClassificationSettings,
    "token_classification": TokenClassificationSettings,
    "dpo": DpoSettings,
    "ipo": IpoSettings,
    "simpo": SimpoSettings,
    "orpo": OrpoSettings,
    "kto": KtoSettings,
    "grpo": GrpoSettings,
    "rloo": RlooSettings,
    "ppo": PpoSettings,
    "reward": RewardSettings,
    MULTI: MultiSettings,
}
"""Name of a task -> its settings."""
