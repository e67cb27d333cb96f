"""Recipes: the contract's example, every problem at once, names of other tools, overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.config import dump_yaml, override
from graftlm.core.errors import ConfigError
from graftlm.methods.lora import LoraConfig
from graftlm.training.method_section import Method
from graftlm.training.recipe import (
    DataSection,
    ModelSection,
    Recipe,
    TrainSection,
    load_recipe,
    long_form,
    make_recipe,
)

FULL = """
model:  {name: sprout, dtype: auto, quantization: none, double_quant: true, compute_dtype: bfloat16}
data:   {path: train.jsonl, format: auto, eval_path: null, eval_fraction: 0.1, max_length: 1024,
         packing: true, train_on: completion}
task:   sft
method: {type: lora, r: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: all-linear, bias: none,
         use_rslora: false}
train:  {num_train_epochs: 3, max_steps: null, per_device_train_batch_size: 4,
         gradient_accumulation_steps: 4, learning_rate: 2.0e-4,
         lr_scheduler_type: cosine, warmup_ratio: 0.03, weight_decay: 0.0, max_grad_norm: 1.0, optim: adamw,
         loraplus_lr_ratio: null, recompute: auto, save_steps: 100, eval_steps: 100,
         early_stopping_patience: null, seed: 42}
eval:   {metrics: auto, before_after: true}
output: {dir: null, register_as: null, report_to: [tensorboard]}
"""
LEAST = {"model": "sprout", "data": "rows.jsonl"}


def written(text: str, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(text: str, folder: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        load_recipe(written(text, folder), overrides)
    assert refused.value.exit_code == 2
    return refused.value.problems


def test_the_example_of_the_contract_is_the_default(tmp_path: Path) -> None:
    recipe = load_recipe(written(FULL, tmp_path))
    least = Recipe(model=ModelSection(name="sprout"), data=DataSection(path="train.jsonl"), task="sft")
    assert recipe == least


def test_short_forms(tmp_path: Path) -> None:
    short = load_recipe(written("model: sprout\ndata: rows.jsonl\nmethod: lora\n", tmp_path))
    assert (short.model.name, short.data.path, short.method.type) == ("sprout", "rows.jsonl", "lora")
    overridden = load_recipe(written("model: sprout\ndata: rows.jsonl\n", tmp_path), ["data.packing=false"])
    assert (overridden.data.path, overridden.data.packing) == ("rows.jsonl", False)


def test_every_problem_at_once(tmp_path: Path) -> None:
    found = problems(
        "model: {}\ndata: {path: x, max_length: 4}\nmethod: {r: 0, lora_alpa: 1}\n"
        "zorp: 1\ntrain: {seed: -1}\n",
        tmp_path,
    )
    starts = ["model.name", "data.max_length", "method.r", "method.lora_alpa", "train.seed", "zorp"]
    assert sorted(line.partition(":")[0] for line in found) == sorted(starts)


@pytest.mark.parametrize(
    ("section", "alias", "name"),
    [
        (section, alias, name)
        for section, kind in (
            ("model", ModelSection), ("data", DataSection), ("method", LoraConfig), ("train", TrainSection)
        )
        for alias, name in kind.aliases.items()
    ],
)  # fmt: skip
def test_names_of_other_tools_lead_to_ours(section: str, alias: str, name: str, tmp_path: Path) -> None:
    """Every alias is unknown as such, names a field that exists, and is suggested."""
    kinds = {"model": ModelSection, "data": DataSection, "method": LoraConfig, "train": TrainSection}
    assert name in kinds[section].model_fields
    assert alias not in kinds[section].model_fields
    content = {**LEAST, section: {**long_form(LEAST).get(section, {}), alias: 1}}
    with pytest.raises(ConfigError) as refused:
        make_recipe(content)
    assert f"{section}.{alias}: unknown key; did you mean '{name}'?" in refused.value.problems


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("model.quantization=nf5", "'none', 'nf4', 'fp4', 'int8' or 'fp8'"),
        ("model.double_quant=false", "double_quant has no effect with quantization: none"),
        ("model.compute_dtype=float32", "compute_dtype belongs to a quantised base; write dtype"),
        ("method=lorra", "no such method; did you mean 'lora'"),
        ("task=stf", "no such task; did you mean 'sft'?"),
        ("train.optim=adamw8bit", "'adamw', 'adamw_8bit', 'paged_adamw_8bit' or 'paged_adamw_32bit'"),
        ("output.register_as=mine", "the registry is not in this version"),
        ("train.learning_rate=0", "greater than 0"),
        ("method.lora_alpha=0", "method.lora_alpha: Input should be greater than 0"),
        ("train.learning_rate=fast", "valid number"),
        ("train.warmup_ratio=1.0", "less than 1"),
        ("data.train_on=answers", "'completion' or 'all'"),
        ("output.report_to=wandb", "tensorboard"),
    ],
)
def test_values_that_are_refused(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_recipe(LEAST, [assignment])
    assert says in "\n".join(refused.value.problems)


def test_qlora_is_lora_on_four_bits() -> None:
    recipe = make_recipe(LEAST, ["method=qlora"])
    assert (recipe.model.quantization, recipe.model.double_quant) == ("nf4", True)
    assert recipe.method.config == Method.parse("lora").config
    assert recipe.method.summary.startswith("qlora r=16")
    assert make_recipe(LEAST, ["method=qlora", "model.quantization=int8"]).model.quantization == "int8"
    assert make_recipe(LEAST).model.quantization == "none"
    built = Recipe(
        model=ModelSection(name="a"), data=DataSection(path="b"), method=Method.parse({"type": "qlora"})
    )
    assert built.model.quantization == "nf4"
    with pytest.raises(ConfigError) as refused:
        make_recipe(LEAST, ["method=qlora", "model.quantization=none"])
    assert "qlora trains on a quantised base" in refused.value.problems[0]


def test_a_quantised_base_has_one_type() -> None:
    recipe = make_recipe(LEAST, ["model.quantization=nf4", "model.dtype=float32"])
    assert recipe.model.compute_dtype == "float32"
    with pytest.raises(ConfigError) as refused:
        make_recipe(LEAST, ["model.quantization=nf4", "model.dtype=float32", "model.compute_dtype=bfloat16"])
    assert "contradict each other" in refused.value.problems[0]


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8", "fp8"])
def test_a_complete_recipe_means_the_same(method: str, quantization: str) -> None:
    """What a run writes beside its results, read again: defaults are then written values."""
    import yaml

    if (method, quantization) == ("qlora", "none"):
        return
    recipe = make_recipe(LEAST, [f"method={method}", f"model.quantization={quantization}"])
    assert Recipe.model_validate(yaml.safe_load(dump_yaml(recipe))) == recipe


def test_lora_plus_belongs_to_lora() -> None:
    assert make_recipe(LEAST, ["method=dora", "train.loraplus_lr_ratio=4"]).train.loraplus_lr_ratio == 4
    with pytest.raises(ConfigError) as refused:
        make_recipe(LEAST, ["method=prompt", "train.loraplus_lr_ratio=4"])
    assert "lora and dora only" in refused.value.problems[0]


def test_overrides() -> None:
    recipe = make_recipe(
        LEAST, ["train.learning_rate=1e-4", "method.target_modules=[q_proj, v_proj]", "output.report_to=none"]
    )
    assert recipe.train.learning_rate == 1e-4, "YAML reads 1e-4 as a string; people mean the number"
    assert list(recipe.method.config.target_modules or ()) == ["q_proj", "v_proj"]
    assert recipe.output.report_to == ()
    for wrong in ("train", "train.=1", "=1"):
        with pytest.raises(ConfigError, match="Cannot read the override"):
            make_recipe(LEAST, [wrong])
    assert override(LEAST, []) == LEAST


def test_options_without_effect_are_refused() -> None:
    make_recipe(LEAST, ["data.eval_path=x", "data.eval_fraction=0.1"])  # as a complete recipe spells it
    with pytest.raises(ConfigError):
        make_recipe(LEAST, ["data.eval_path=x", "data.eval_fraction=0.2"])
    with pytest.raises(ConfigError):
        make_recipe(LEAST, ["eval.before_after=false", "eval.max_forgetting=0.1"])


@given(
    rate=st.floats(1e-8, 1.0),
    rank=st.integers(1, 512),
    steps=st.none() | st.integers(1, 10**6),
    path=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_what_is_written_is_read_back(rate: float, rank: int, steps: int | None, path: str) -> None:
    import yaml

    recipe = Recipe(
        model=ModelSection(name=path), data=DataSection(path=path), method=Method.parse({"r": rank}),
        train=TrainSection(learning_rate=rate, max_steps=steps),
    )  # fmt: skip
    again = Recipe.model_validate(yaml.safe_load(dump_yaml(recipe)))
    assert again == recipe
    assert dump_yaml(again) == dump_yaml(recipe)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No file"):
        load_recipe(tmp_path / "nowhere.yaml")
    for text, says in (("a: [", "not valid YAML"), ("- a", "holds list"), ("", "holds NoneType")):
        with pytest.raises(ConfigError, match=says):
            load_recipe(written(text, tmp_path))
    written("", tmp_path).write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("asked, policy", [("true", "everything"), ("false", "nothing"), ("auto", "auto")])
def test_the_usual_name_of_recomputation(asked: str, policy: str) -> None:
    usual = f"train.gradient_checkpointing={asked}"
    assert make_recipe(LEAST, [usual]).train.recompute == policy
    assert make_recipe(LEAST, [usual, f"train.recompute={policy}"]).train.recompute == policy
    with pytest.raises(ConfigError) as refused:
        make_recipe(LEAST, [usual, "train.recompute=cheap"])
    assert "contradict each other" in refused.value.problems[0]


def test_recomputation_is_one_of_the_policies() -> None:
    with pytest.raises(ConfigError) as refused:
        make_recipe(LEAST, ["train.recompute=some"])
    assert len(refused.value.problems) == 1 and "'feed_forward', 'everything'" in refused.value.problems[0]
    with pytest.raises(ConfigError) as refused:
        make_recipe(LEAST, ["train.gradient_checkpointing=often"])
    assert "true, false or auto" in refused.value.problems[0]
