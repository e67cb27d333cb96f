"""PEFT's names: the same calls on PEFT and on Graft, and the same results."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import graftlm as gl
from graftlm.core.errors import AdapterError, ConfigError, FormatError, GraftError, TargetError, UsageError
from graftlm.integrations import peft_api

from ..methods.tiny import batch, logits, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Position ids are not supported for parameter efficient tuning:UserWarning",
)
LIBRARIES = [pytest.param(peft, id="peft"), pytest.param(peft_api, id="graft")]

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"task_type": "CAUSAL_LM", "lora_alpha": 16}),
    "lora gaussian": ("gpt2", "LoraConfig", {"init_lora_weights": "gaussian", "r": 3}),
    "lora random": ("bert", "LoraConfig", {"init_lora_weights": False, "task_type": "SEQ_CLS"}),
    "lora embedding": ("llama", "LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}),
    "lora t5": ("t5", "LoraConfig", {"task_type": "SEQ_2_SEQ_LM", "use_rslora": True}),
    "lora bias": ("bert", "LoraConfig", {"bias": "all", "target_modules": ["query", "value"]}),
    "dora": ("llama", "LoraConfig", {"use_dora": True, "r": 4}),
    "patterns": ("llama", "LoraConfig", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}),
    "adaption prompt": (
        "llama",
        "AdaptionPromptConfig",
        {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    ),
    "orthogonal": ("gpt2", "LoraConfig", {"init_lora_weights": "orthogonal", "r": 4}),
    "token rows": ("llama", "LoraConfig", {"trainable_token_indices": [3, 5]}),
    "only token rows": ("llama", "TrainableTokensConfig", {"token_indices": [4, 6, 9]}),
    "ia3": ("bart", "IA3Config", {"task_type": "SEQ_2_SEQ_LM"}),
    "ia3 random": ("roberta", "IA3Config", {"task_type": "SEQ_CLS", "init_ia3_weights": False}),
    "prefix": ("llama", "PrefixTuningConfig", {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}),
    "prefix t5": ("t5", "PrefixTuningConfig", {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}),
    "prefix projected": (
        "gpt2",
        "PrefixTuningConfig",
        {
            "num_virtual_tokens": 3,
            "task_type": "CAUSAL_LM",
            "prefix_projection": True,
            "encoder_hidden_size": 6,
        },
    ),
    "prompt": ("gpt2", "PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prompt bert": ("bert", "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}),
    "prefix bert": ("bert", "PrefixTuningConfig", {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}),
    "prompt t5": ("t5", "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}),
    "prompt sampled": (
        "llama",
        "PromptTuningConfig",
        {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
}


def build(library: Any, case: str, *, seed: int = 3, **changes: Any) -> Any:
    """A wrapped tiny model of PEFT or of ours."""
    kind, config, fields = CASES[case]
    model = tiny(kind)
    torch.manual_seed(seed)
    return library.get_peft_model(model, getattr(library, config)(**{**fields, **changes}))


@torch.no_grad()
def loss(model: Any, kind: str) -> Tensor:
    found: Tensor = model(**batch(kind)).loss
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_seed_gives_the_adapter_that_peft_makes(case: str) -> None:
    """Same tensors under the same keys, same outputs, same counts, and the generator goes on alike."""
    theirs = build(peft, case)
    theirs_next = torch.rand(3)
    ours = build(peft_api, case)
    assert torch.equal(torch.rand(3), theirs_next)
    expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    found = peft_api.get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    kind = CASES[case][0]
    torch.testing.assert_close(loss(ours.eval(), kind), loss(theirs.eval(), kind), rtol=1e-5, atol=1e-6)
    (trained, total), (their_trained, their_total) = (
        model.get_nb_trainable_parameters() for model in (ours, theirs)
    )
    assert trained == their_trained
    # PEFT trains the base's own biases; here they are copies.
    assert total == their_total or "bias" in case


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weights_train_like_those_of_peft(init: str) -> None:
    """PEFT edits the base for these; here it stays as it is, and the losses are the same."""
    found = []
    for library in (peft, peft_api):
        model = build(library, "lora", init_lora_weights=init, r=4).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(4):
            value = model(**batch("llama")).loss
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.item())
        found.append(torch.rand(1).item())
    assert found[5:] == pytest.approx(found[:5], rel=1e-4)
    assert found[3] < found[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
def test_adapters_go_both_ways(case: str, direction: str, tmp_path: Path) -> None:
    first, second = (peft_api, peft) if direction == "ours to theirs" else (peft, peft_api)
    kind = CASES[case][0]
    model = build(first, case).eval()
    model.save_pretrained(tmp_path)
    loaded = second.PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert not loaded.training
    if second is peft_api:  # PEFT leaves the base trainable beside a loaded prompt
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loss(loaded, kind), loss(model, kind), rtol=1e-5, atol=1e-6)


def test_what_scripts_read_from_a_model_is_there() -> None:
    base = tiny("llama")
    model = peft_api.get_peft_model(base, peft_api.LoraConfig(task_type="CAUSAL_LM"))
    assert type(model) is peft_api.PeftModelForCausalLM
    assert isinstance(model, peft_api.PeftModel) and isinstance(model, transformers.LlamaForCausalLM)
    assert model.get_base_model() is base and model.base_model.model is base and model.model is base
    assert model.config is base.config and model.generation_config is base.generation_config
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    config = model.peft_config["default"]
    assert (config.peft_type, config.task_type) == (peft_api.PeftType.LORA, peft_api.TaskType.CAUSAL_LM)
    assert model.active_peft_config is config and not config.is_prompt_learning
    assert model.can_generate() and not hasattr(model, "no_such_thing")
    assert model.adapters.names == ("default",)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(name.startswith("base_model.model.model.layers") for name in names)


def walk(library: ModuleType) -> list[Tensor]:
    """One walk through everything that a model with several adapters can do."""
    model = build(library, "lora", init_lora_weights=False).eval()
    inputs = batch("llama")
    seen = [logits(model, inputs)]
    torch.manual_seed(8)
    model.add_adapter("other", library.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    seen.append(logits(model, inputs))
    model.set_adapter("other")
    seen.append(logits(model, inputs))
    with model.disable_adapter():
        seen.append(logits(model, inputs))
    model.base_model.set_adapter(["default", "other"])
    seen.append(logits(model, inputs))
    model.merge_adapter()
    seen.append(logits(model, inputs))
    model.unmerge_adapter()
    seen.append(logits(model, inputs))
    model.base_model.disable_adapter_layers()
    seen.append(logits(model, inputs))
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "__base__", "other"]).logits
    seen.append(mixed)
    model.add_weighted_adapter(["default"], [0.5], "part", combination_type="cat")
    model.set_adapter("part")
    seen.append(logits(model, inputs))
    model.delete_adapter("other")
    assert sorted(model.peft_config) == ["default", "part"]
    model.set_adapter("default")
    seen.append(logits(model.merge_and_unload(), inputs))
    return seen


def test_a_walk_through_the_verbs_gives_what_peft_gives() -> None:
    for step, (found, expected) in enumerate(zip(walk(peft_api), walk(peft), strict=True)):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, s=step: f"{s}: {text}"
        )


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_flags_of_trainable_parameters(library: Any) -> None:
    model = build(library, "lora")
    model.add_adapter("other", library.LoraConfig(target_modules=["down_proj"]))

    def trained() -> set[str]:
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {
            module for module in ("q_proj", "v_proj", "down_proj") if any(module in name for name in names)
        }

    assert trained() == {"q_proj", "v_proj"}
    model.set_adapter("other")
    assert trained() == {"down_proj"}
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()
    model.set_requires_grad("other")
    assert trained() == {"down_proj"}


def test_the_status_is_that_of_peft() -> None:
    found = []
    for library in (peft, peft_api):
        model = build(library, "lora")
        model.add_adapter("other", library.LoraConfig(target_modules=["down_proj", "q_proj"]))
        model.set_adapter("other")
        model.merge_adapter()
        found.append(vars(model.get_model_status()))
    theirs, ours = found
    assert ours == {key: theirs[key] for key in ours}


def test_folders_are_laid_out_as_by_peft(tmp_path: Path) -> None:
    model = build(peft_api, "lora")
    model.add_adapter("other", peft_api.LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    names = {"adapter_config.json", "adapter_model.safetensors", "graft.json"}
    assert files == names | {f"other/{name}" for name in names}
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    again = peft_api.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    again.load_adapter(tmp_path, "other", subfolder="other")
    assert again.adapters.config("other").r == 2


def test_saving_replaces_what_lies_there(tmp_path: Path) -> None:
    build(peft_api, "lora", r=2).save_pretrained(tmp_path)
    build(peft_api, "lora", r=4).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert {
        tensor.shape[0]
        for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
        if "_A" in key
    } == {4}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
    ]


def test_loading_into_an_adapter_that_exists(tmp_path: Path) -> None:
    first, second = build(peft_api, "lora random", seed=1), build(peft_api, "lora random", seed=2)
    first.save_pretrained(tmp_path)
    assert not torch.allclose(loss(first.eval(), "bert"), loss(second.eval(), "bert"))
    result = second.load_adapter(tmp_path, "default", is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(loss(first, "bert"), loss(second, "bert"))
    assert second.adapters.trainable == ("default",)


def test_training_goes_on_from_a_folder(tmp_path: Path) -> None:
    """Prompt and prefix tuning too, which PEFT refuses."""
    for case in ("lora", "prefix", "prompt"):
        build(peft_api, case).save_pretrained(tmp_path / case)
        kind = CASES[case][0]
        model = peft_api.PeftModel.from_pretrained(tiny(kind), tmp_path / case, is_trainable=True)
        model(**batch(kind)).loss.backward()
        assert all(p.grad is not None for p in model.adapters.parameters("default"))


def test_configs_are_read_and_written_like_those_of_peft(tmp_path: Path) -> None:
    peft.LoraConfig(r=5, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = peft_api.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft_api.LoraConfig)
    assert (config.r, list(config.target_modules or ()), config.lora_alpha) == (5, ["q_proj"], 8)
    peft_api.LoraConfig(r=3, target_modules={"v_proj", "q_proj"}).save_pretrained(tmp_path / "ours")
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert (read.r, read.target_modules) == (3, {"q_proj", "v_proj"})


NEEDED: dict[str, dict[str, Any]] = {
    "LoraConfig": {},
    "IA3Config": {},
    "PrefixTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PromptTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "AdaptionPromptConfig": {"adapter_len": 3, "adapter_layers": 1},
    "TrainableTokensConfig": {"token_indices": [3]},
}


@pytest.mark.parametrize("name", NEEDED)
def test_every_field_of_peft_is_accepted_at_its_neutral_value(name: str) -> None:
    needed = NEEDED[name]
    fields = getattr(peft, name)(**needed).to_dict()
    fields.pop("runtime_config", None)
    peft_api.get_peft_model(tiny("llama"), getattr(peft_api, name)(**fields))


REFUSED: dict[str, dict[str, Any]] = {
    "use_qalora": {"use_qalora": True},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "kasa_config": {"kasa_config": {"beta": 1}},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "megatron_config": {"megatron_config": {"a": 1}},
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_with_a_meaning_that_is_missing_here_is_refused(field: str) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError) as refused:
        peft_api.get_peft_model(model, peft_api.LoraConfig(**REFUSED[field]))
    assert any(problem.startswith(field) for problem in refused.value.problems)
    assert not any("adapters" in name for name, _ in model.named_modules())


def test_unknown_fields_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lora_dropout'"):
        peft_api.LoraConfig(lora_drop=0.1)
    config = peft_api.LoraConfig()
    config.r = 4
    with pytest.raises(ConfigError, match="did you mean 'lora_alpha'"):
        config.lora_alfa = 3
    assert config.r == 4


@pytest.mark.parametrize("config", [peft.LoraConfig(), gl.LoraConfig()], ids=["peft", "graft"])
def test_a_config_of_another_library_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="not one of the configs here"):
        peft_api.inject_adapter_in_model(config, tiny("llama"))


def test_a_second_wrapper_is_refused() -> None:
    model = build(peft_api, "lora")
    for again in (model, model.get_base_model()):
        with pytest.raises(AdapterError, match="adapters already"):
            peft_api.get_peft_model(again, peft_api.LoraConfig())


def test_what_saving_would_not_do_is_refused(tmp_path: Path) -> None:
    model = build(peft_api, "lora")
    with pytest.raises(UsageError, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UsageError, match="network"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(UsageError, match="modules_to_save"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert not list(tmp_path.iterdir())


def test_options_of_loading(tmp_path: Path) -> None:
    build(peft_api, "lora").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'token'"):
        peft_api.PeftModel.from_pretrained(tiny("llama"), tmp_path, tokens="x")
    base = tiny("llama").to(torch.bfloat16)
    model = peft_api.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False, device_map="cpu")
    assert {p.dtype for p in model.adapters.parameters("default")} == {torch.bfloat16}


def test_a_generation_config_reaches_the_model() -> None:
    model = build(peft_api, "lora")
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False)
    assert model.generate(torch.tensor([[3, 4]])).shape == (1, 4)


@pytest.mark.parametrize("name", ["./nowhere", "nobody/no-such-adapter"])
def test_an_adapter_that_is_nowhere(name: str) -> None:
    with pytest.raises(FormatError):
        peft_api.PeftModel.from_pretrained(tiny("llama"), name)


def test_names_of_other_architectures_are_left_out_with_a_warning() -> None:
    names = ["q_proj", "v_proj", "query_key_value"]
    with pytest.warns(UserWarning, match="query_key_value"):
        model = peft_api.get_peft_model(tiny("llama"), peft_api.LoraConfig(target_modules=names))
    assert len(model.adapters.parts("default")) == 4
    with pytest.raises(TargetError):
        peft_api.get_peft_model(tiny("llama"), peft_api.LoraConfig(target_modules=["query_key_value"]))


@pytest.mark.parametrize(
    ("task", "head"), [("SEQ_CLS", "classifier"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")]
)
def test_a_new_head_is_trained_and_saved(task: str, head: str, tmp_path: Path) -> None:
    kinds = {
        "SEQ_CLS": transformers.BertForSequenceClassification,
        "TOKEN_CLS": transformers.BertForTokenClassification,
        "QUESTION_ANS": transformers.BertForQuestionAnswering,
    }
    base = kinds[task](tiny("bert").config)
    model = peft_api.get_peft_model(copy.deepcopy(base), peft_api.LoraConfig(task_type=task))
    assert model.modules_to_save == {head}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    keys = {key for key in load_file(tmp_path / "adapter_model.safetensors") if head in key}
    assert keys == {f"base_model.model.{head}.weight", f"base_model.model.{head}.bias"}
    assert type(loaded).__name__ == type(model).__name__


def test_a_task_without_its_head_is_refused() -> None:
    with pytest.raises(TargetError, match="classifier or score"):
        peft_api.get_peft_model(tiny("llama"), peft_api.LoraConfig(task_type="SEQ_CLS"))


def test_injecting_leaves_the_model_unwrapped() -> None:
    base, config = tiny("llama"), {"r": 4, "target_modules": ["q_proj"]}
    torch.manual_seed(0)
    model = peft_api.inject_adapter_in_model(peft_api.LoraConfig(**config), base)
    assert model is base
    torch.manual_seed(0)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), tiny("llama"))
    expected = peft.get_peft_model_state_dict(theirs)
    found = peft_api.get_peft_model_state_dict(model)
    assert {key.removeprefix("base_model.model.") for key in found} == expected.keys()
    with pytest.raises(FormatError, match="missing"):
        peft_api.set_peft_model_state_dict(model, dict(list(found.items())[1:]))
    peft_api.set_peft_model_state_dict(model, found)


def test_state_dicts_go_both_ways() -> None:
    theirs, ours = build(peft, "lora random", seed=1), build(peft_api, "lora random", seed=2)
    peft_api.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(loss(ours.eval(), "bert"), loss(theirs.eval(), "bert"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_preparing_for_kbit_training_does_what_peft_does(dtype: torch.dtype) -> None:
    ours, theirs = tiny("llama").to(dtype), tiny("llama").to(dtype)
    assert peft_api.prepare_model_for_kbit_training(ours) is ours
    peft.prepare_model_for_kbit_training(theirs)
    flags = [[(n, p.dtype, p.requires_grad) for n, p in m.named_parameters()] for m in (ours, theirs)]
    assert flags[0] == flags[1]


def test_recomputed_activations_still_train_the_adapter() -> None:
    model, plain = (build(peft_api, "lora random", seed=1).train() for _ in range(2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for each in (model, plain):
        each(**batch("bert")).loss.backward()
    for name, parameter in plain.adapters.named_parameters("default").items():
        torch.testing.assert_close(model.adapters.named_parameters("default")[name].grad, parameter.grad)


def test_auto_models_load_base_and_adapter(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft_api.get_peft_model(base, peft_api.LoraConfig(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_api.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))


def test_a_copy_is_independent() -> None:
    model = build(peft_api, "lora random").eval()
    twin = copy.deepcopy(model)
    before = loss(model, "bert")
    with torch.no_grad():
        for parameter in twin.adapters.parameters("default"):
            parameter.add_(1.0)
    assert torch.equal(loss(model, "bert"), before)
    assert not torch.equal(loss(twin, "bert"), before)


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own
def test_a_wrapped_model_compiles_without_graph_breaks() -> None:
    model = build(peft_api, "lora", init_lora_weights=False).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = batch("llama")
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))


def test_unloading_gives_the_very_base_back() -> None:
    base = tiny("llama")
    flags = [parameter.requires_grad for parameter in base.parameters()]
    before = logits(base, batch("llama"))
    model = peft_api.get_peft_model(base, peft_api.LoraConfig(init_lora_weights=False))
    assert model.unload() is base
    assert torch.equal(logits(base, batch("llama")), before)
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    with pytest.raises(AdapterError, match="no adapters"):
        model.active_adapters  # noqa: B018


def test_generation_with_one_adapter_per_row() -> None:
    model = build(peft_api, "lora", init_lora_weights=False).eval()
    ids = batch("llama")["input_ids"]
    mixed = model.generate(
        input_ids=ids, max_new_tokens=4, do_sample=False, adapter_names=["default", "__base__", "default"]
    )
    whole = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(mixed[[0, 2]], whole[[0, 2]])
    assert torch.equal(mixed[1], base[1])


@pytest.mark.parametrize("way", ["svd", "linear", "cat", "ties", "dare_linear", "magnitude_prune"])
def test_one_adapter_of_weight_one_is_itself(way: str) -> None:
    model = build(peft_api, "lora", init_lora_weights=False, use_rslora=True).eval()
    options = {} if way in ("svd", "linear", "cat") else {"density": 1.0}
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type=way, **options)
    before = logits(model, batch("llama"))
    model.set_adapter("same")
    torch.testing.assert_close(logits(model, batch("llama")), before)
    assert model.peft_config["same"].use_rslora


def test_weighted_sums_refuse_what_they_cannot_do() -> None:
    model = build(peft_api, "lora")
    for changes in ({"combination_type": "dare_ties"}, {"svd_clamp": 1}, {"weights": [1.0, 2.0]}):
        asked: dict[str, Any] = {"adapters": ["default"], "weights": [1.0], "adapter_name": "new", **changes}
        with pytest.raises(GraftError):
            model.add_weighted_adapter(**asked)
    assert model.adapters.names == ("default",)


LORA_TABLE = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
KNOWN_TYPES = sorted(set(LORA_TABLE) & set(transformers.CONFIG_MAPPING))


@pytest.mark.parametrize("model_type", KNOWN_TYPES)
def test_default_targets_of_lora_are_those_of_peft(model_type: str) -> None:
    from graftlm.integrations.peft_api.defaults import lora_targets

    config = transformers.CONFIG_MAPPING[model_type]()
    for field in (
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
    ):
        if hasattr(config, field) and model_type not in ("gemma4", "nemotron_h"):
            setattr(config, field, 1)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModel.from_config(config)
    expected, found = LORA_TABLE[model_type], lora_targets(model)
    if model_type == "blip-2":  # names for two language models, of which a model has one
        assert set(found) < set(expected)
    else:
        assert found == expected if isinstance(expected, str) else sorted(found) == sorted(expected)


def test_default_targets_of_ia3_are_those_of_peft() -> None:
    from graftlm.integrations.peft_api.defaults import IA3

    constants = peft.utils.constants
    inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for model_type, names in constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items():
        if model_type in transformers.CONFIG_MAPPING:
            outputs, scaled = IA3[model_type]
            assert sorted(scaled) == sorted(inputs[model_type]), model_type
            assert sorted({*outputs, *scaled}) == sorted(names), model_type
