"""The recipe: everything a run needs to know, in one strict YAML file. Field names are the field's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from graftlm.core.config import Config, build, override, read_yaml
from graftlm.methods.full import FullConfig
from graftlm.methods.lora import LoraConfig
from graftlm.training.method_section import LATER, QLORA, Method, MethodSection
from graftlm.training.parts import parts_of, with_paths
from graftlm.training.task_section import TaskChoice, TaskSection
from graftlm.training.train_section import TrainSection

SHORT = {"model": "name", "data": "path", "task": "type", "method": "type"}
"""What a section means when only a string is given: `model: sprout` and `data: rows.jsonl` are enough."""


Quantization = Literal["none", "nf4", "fp4", "int8", "fp8"]
ComputeType = Literal["bfloat16", "float32", "float16"]
Metric = Literal[
    "loss",
    "exact_match",
    "chrf",
    "bleu",
    "rouge1",
    "rouge2",
    "rougeL",
    "character_error_rate",
    "word_error_rate",
]


class ModelSection(Config):
    """The base."""

    aliases: ClassVar[Mapping[str, str]] = {
        "model_name_or_path": "name",
        "base_model": "name",
        "torch_dtype": "dtype",
        "load_in_4bit": "quantization",
        "load_in_8bit": "quantization",
        "bnb_4bit_quant_type": "quantization",
        "bnb_4bit_use_double_quant": "double_quant",
        "bnb_4bit_compute_dtype": "compute_dtype",
    }

    name: str
    """`sprout` (embedded), a local folder, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights and the computation."""
    quantization: Quantization = "none"
    """How the linear layers are stored: as they are, or in 4 or 8 bits. `method: qlora` implies `nf4`."""
    double_quant: bool = True
    """Store the scales of `nf4` and `fp4` in 8 bits too: 4.13 bits per parameter, not 4.5."""
    compute_dtype: ComputeType = "bfloat16"
    """What a quantised base computes in, and what it keeps embeddings, norms and the output head in."""
    products: Literal["16-bit", "fp8"] = "16-bit"
    """How a base in `fp8` is multiplied: read into 16 bits, or in 8 bits (NVIDIA GPUs from Hopper on). Then
    loss and gradients of the first batch must agree with those in 16 bits."""
    placement: Literal["resident", "disk", "host"] = "resident"
    """Where layers lie while a pass does not need them: in memory, in the checkpoint's files (`disk`, on a
    CPU) or in the machine's memory (`host`, for a GPU)."""
    embeddings: Literal["resident", "host"] = "resident"
    """Where the input embeddings lie: with the rest, or in the machine's memory (`host`, for a GPU: the head
    must not share them)."""

    @model_validator(mode="before")
    @classmethod
    def _one_type(cls, value: Any) -> Any:
        """`dtype` alone is enough: a quantised base computes in it."""
        if not isinstance(value, Mapping) or value.get("quantization", "none") == "none":
            return value
        named = value.get("dtype")
        return {"compute_dtype": named, **value} if named in get_args(ComputeType) else value

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        if self.quantization not in ("nf4", "fp4") and not self.double_quant:
            raise ValueError(f"double_quant has no effect with quantization: {self.quantization}")
        if self.products == "fp8" and self.quantization != "fp8":
            raise ValueError(
                f"products: fp8 multiplies a base that is stored in fp8; quantization is {self.quantization}"
            )
        if self.quantization == "none" and self.compute_dtype != "bfloat16":
            raise ValueError("compute_dtype belongs to a quantised base; write dtype")
        if self.quantization != "none" and self.dtype not in ("auto", self.compute_dtype):
            raise ValueError(
                f"dtype: {self.dtype} and compute_dtype: {self.compute_dtype} contradict each other; "
                "leave one of them out"
            )
        return self


class DataSection(Config):
    """Where the examples are and how they become tokens."""

    aliases: ClassVar[Mapping[str, str]] = {
        "max_seq_length": "max_length",
        "cutoff_len": "max_length",
        "sequence_len": "max_length",
        "sample_packing": "packing",
        "val_size": "eval_fraction",
        "val_set_size": "eval_fraction",
        "train_on_inputs": "train_on",
        "dataset": "path",
    }

    path: str
    """JSONL, JSON, CSV, TSV, Parquet or text file, or a hub data set `owner/name[:split]`."""
    format: str = "auto"
    """A format by name, with columns if wanted: `source_target(question, sql)`."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """The tokenizer's chat template where there is one (`auto`), or one of the two by force."""
    eval_path: str | None = None
    """Held-out rows in a file of their own; otherwise `eval_fraction` of `path` is held out."""
    eval_fraction: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the rows held out; at least 30 rows, never more than half."""
    hold_out: Literal["rows", "passages"] = "rows"
    """What is kept on one side: equal and nearly equal rows, or all rows that share a passage of 13 words as
    well, such as one text behind two questions."""
    max_length: int = Field(1024, ge=8)
    """Longest row in tokens, and the width of a packed window; at most the base's context."""
    packing: bool = True
    """Several rows side by side in one window, which do not see each other."""
    train_on: Literal["completion", "all"] = "completion"
    """Loss on the answers only, or on everything."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do about rows that cannot be used: stop and list them, or leave them out and say so."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if (
            self.eval_path is not None
            and self.eval_fraction != type(self).model_fields["eval_fraction"].default
        ):
            raise ValueError("eval_fraction has no effect beside eval_path; leave one of them out")
        if self.eval_path is not None and self.hold_out != "rows":
            raise ValueError("hold_out has no effect beside eval_path; leave one of them out")
        return self


class EvalSection(Config):
    """What is measured."""

    metrics: Literal["auto"] | tuple[Metric, ...] = "auto"
    """`auto`: held-out loss, and exact match where answers are short; or by name what answers are judged by,
    the first before all others. `bleu` and `rouge...` need the extra `metrics`."""
    before_after: bool = True
    """Measure the base on the same rows first."""
    known_path: str | None = None
    """Text that the base already knows, to measure forgetting; otherwise the base writes it."""
    max_forgetting: float | None = Field(None, gt=0)
    """How much the loss on known text may rise before the verdict is FAIL (0.05: 5 %); none: only shown."""

    @model_validator(mode="after")
    def _gate_has_a_measure(self) -> Self:
        if self.max_forgetting is not None and not self.before_after:
            raise ValueError(
                "max_forgetting has no effect with before_after: false; the base is not measured"
            )
        return self


class OutputSection(Config):
    """Where results go."""

    dir: str | None = None
    """Run folder; none: `runs/<data>-<number>`."""
    register_as: None = None
    """The registry is not in this version."""
    report_to: tuple[Literal["tensorboard"], ...] = ("tensorboard",)
    """Trackers that read the run's events; `none` for none."""

    @field_validator("register_as", mode="before")
    @classmethod
    def _no_registry(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError(f"the registry is {LATER}; leave it empty")
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return () if value in ("none", None) else (value,) if isinstance(value, str) else value


class Recipe(Config):
    """One run, whole. Only `model` and `data` have no default."""

    aliases: ClassVar[Mapping[str, str]] = {"base_model": "model", "lora": "method", "training": "train"}

    model: ModelSection
    data: DataSection
    task: TaskSection = TaskChoice.parse("auto")
    method: MethodSection = Method.parse("lora")
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="before")
    @classmethod
    def _names_are_enough(cls, value: Any) -> Any:
        return _with_quantised_base(with_paths(long_form(value))) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _tasks_are_usable(self) -> Self:
        parts_of(self)
        return self

    @model_validator(mode="after")
    def _qlora_is_quantised(self) -> Self:
        if self.method.type == QLORA and self.model.quantization == "none":
            raise ValueError(
                "method.type: qlora trains on a quantised base, and model.quantization is none; "
                "choose nf4, fp4, int8 or fp8, or method.type: lora"
            )
        return self

    @model_validator(mode="after")
    def _a_streamed_base_is_not_copied(self) -> Self:
        config = self.method.config
        if self.model.placement != "resident" and isinstance(config, FullConfig) and config.parts == "all":
            raise ValueError(
                f"method.type: {self.method.type} trains a copy of every weight in memory, and "
                f"model.placement: {self.model.placement} is for a base that does not fit there; "
                "choose lora, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _only_lora_has_two_sides(self) -> Self:
        if self.train.loraplus_lr_ratio is not None and not isinstance(self.method.config, LoraConfig):
            raise ValueError(
                "train.loraplus_lr_ratio speeds up the B matrices of lora and dora only; leave it out"
            )
        return self


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply `section.field=value` overrides, validate everything at once.

    Relative paths inside a recipe are relative to the current folder, as on the command line.

    Raises:
        ConfigError: every problem of the file, with the nearest right name.
    """
    return build(Recipe, override(long_form(read_yaml(path)), overrides), source=str(path))


def make_recipe(sections: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from command-line options and overrides."""
    return build(Recipe, override(long_form(sections), overrides), source="The command")


def long_form(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Short forms written out, so that overrides can reach inside."""
    return {
        key: {SHORT[key]: value} if key in SHORT and isinstance(value, str) else value
        for key, value in mapping.items()
    }


def _with_quantised_base(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`qlora` written out: its base is stored in nf4 where nobody chose."""
    method, model = mapping.get("method"), mapping.get("model")
    kind = method.get("type") if isinstance(method, Mapping) else getattr(method, "type", None)
    if kind != QLORA:
        return dict(mapping)
    if isinstance(model, ModelSection) and "quantization" not in model.model_fields_set:
        return {**mapping, "model": model.replace(quantization="nf4")}
    if isinstance(model, Mapping):
        return {**mapping, "model": {"quantization": "nf4", **model}}
    return dict(mapping)
