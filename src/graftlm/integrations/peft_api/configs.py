"""PEFT's configs: its names, its defaults, its habit of being edited after they were made.

They hold what a user wrote; `meaning.method_config` works out what it means, when a model is known.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, Field

from graftlm.core.config import Config
from graftlm.core.errors import FormatError
from graftlm.core.files import write_atomic
from graftlm.core.notices import notice
from graftlm.formats.layout import CONFIG
from graftlm.integrations.peft_api.folders import HUB, adapter_folder
from graftlm.methods.starts.initialise import LoftQConfig


class TaskType(StrEnum):
    """What a model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The methods that these names cover."""

    LORA = "LORA"
    IA3 = "IA3"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"


class PromptTuningInit(StrEnum):
    """What a trained prompt starts from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


Names = str | list[str] | set[str] | tuple[str, ...] | None


class PeftConfig(Config):
    """What all configs share.

    >>> LoraConfig(r=8, lora_alpa=16)
    Traceback (most recent call last):
    graftlm.core.errors.ConfigError: LoraConfig has 1 problem.
      - lora_alpa: unknown key; did you mean 'lora_alpha'?
      fix: Correct the keys above.
    """

    model_config = ConfigDict(frozen=False, validate_default=False)

    peft_type: PeftType | None = None
    task_type: TaskType | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    """True: an adapter made from this config is frozen."""
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    modules_to_save: Names = None

    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain value."""
        return self.model_dump()

    def save_pretrained(self, save_directory: str | Path, **fields: Any) -> None:
        """Write `adapter_config.json`; a saved adapter's own config is written by the model."""
        content = self.model_copy(update=fields).model_dump(mode="json", exclude={"runtime_config"})
        content = {key: sorted(v) if isinstance(getattr(self, key), set) else v for key, v in content.items()}
        write_atomic(Path(save_directory) / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **fields: Any
    ) -> PeftConfig:
        """The config of a saved adapter, from a folder or the hub; `fields` replace what the file says.

        Raises:
            FormatError: no adapter there, or of a method that these names do not cover.
        """
        folder = adapter_folder(pretrained_model_name_or_path, subfolder, _hub_options(fields))
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | fields
        kind = BY_TYPE.get(str(content.get("peft_type")))
        if kind is None:
            raise FormatError(
                f"{folder / CONFIG} is of the method {content.get('peft_type')!r}.",
                meaning="PEFT's names stand for these methods here: " + ", ".join(BY_TYPE) + ".",
                fix="Adapters of Graft's own methods load with gl.attach(model, folder).",
            )
        unknown = sorted(content.keys() - kind.model_fields.keys() - {"runtime_config"})
        if unknown:
            notice(f"{folder / CONFIG}: unknown fields are ignored: {', '.join(unknown)}")
        return kind(**{key: value for key, value in content.items() if key in kind.model_fields})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields:
            type(self)(**{name: value})  # says what is wrong with the name
        super().__setattr__(name, value)

    def replaced(self, **fields: Any) -> Self:
        """A copy with some fields changed."""
        return self.model_copy(update=fields)


def _hub_options(fields: dict[str, Any]) -> dict[str, Any]:
    """Take what concerns a download out of `fields`."""
    return {name: fields.pop(name) for name in HUB if name in fields}


class LoraConfig(PeftConfig):
    """LoRA, rsLoRA, DoRA and the initialisations of LoRA, with PEFT's defaults (rank 8, alpha 8)."""

    peft_type: PeftType = PeftType.LORA
    r: int = 8
    target_modules: Names = None
    """None: the query and value projections (see `default_targets`)."""
    exclude_modules: Names = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names = None
    rank_pattern: dict[str, int] | None = Field(default_factory=dict)
    alpha_pattern: dict[str, int | float] | None = Field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] | LoftQConfig | None = Field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False


class IA3Config(PeftConfig):
    """Learned scales of keys, values and feed-forward activations."""

    peft_type: PeftType = PeftType.IA3
    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True


class PromptLearningConfig(PeftConfig):
    """What prompt and prefix tuning share. Sizes that are None are read off the model."""

    is_prompt_learning: ClassVar[bool] = True

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None


class PrefixTuningConfig(PromptLearningConfig):
    """Trained keys and values in front of every layer's own."""

    peft_type: PeftType = PeftType.PREFIX_TUNING
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None


class PromptTuningConfig(PromptLearningConfig):
    """Trained token embeddings in front of the input."""

    peft_type: PeftType = PeftType.PROMPT_TUNING
    prompt_tuning_init: PromptTuningInit = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter: zero-gated prompts in the top layers."""

    is_adaption_prompt: ClassVar[bool] = True

    peft_type: PeftType = PeftType.ADAPTION_PROMPT
    target_modules: Names = None
    adapter_len: int | None = None
    adapter_layers: int | None = None


class TrainableTokensConfig(PeftConfig):
    """Some rows of the embedding are trained."""

    peft_type: PeftType = PeftType.TRAINABLE_TOKENS
    token_indices: list[int] = Field(default_factory=list)
    target_modules: Names = None
    init_weights: bool = True


BY_TYPE: dict[str, type[PeftConfig]] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "PREFIX_TUNING": PrefixTuningConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "ADAPTION_PROMPT": AdaptionPromptConfig,
    "TRAINABLE_TOKENS": TrainableTokensConfig,
}
