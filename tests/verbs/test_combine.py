"""`graft combine`: adapter folders in, one adapter folder out, which we and PEFT load."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from runs import files_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from graftlm.cli.main import run
from graftlm.core.errors import AdapterError, ConfigError, FormatError, GraftError, UsageError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach, attach_folder
from graftlm.methods.base import MethodConfig
from graftlm.methods.combining.combine import combine as combine_in_model
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.models.load import load_model
from graftlm.models.sprout import sprout_folder
from graftlm.testing.case import stir
from graftlm.verbs import combine as verb
from graftlm.verbs.combine import combine
from graftlm.verbs.tune_result import TuneResult

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)
"""What PEFT says about the embedded base."""

IDS = torch.arange(3, 43).unsqueeze(0)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONFIGS: dict[str, MethodConfig] = {
    "a": LoraConfig(r=4, target_modules=("q_proj", "v_proj")),
    "b": LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules="all-linear"),
    "tuned head": LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)),
    "factors": IA3Config(),
    "norms": FullConfig(parts="norms"),
    "other factors": IA3Config(target_modules=("q_proj", "down_proj"), feedforward_modules=("down_proj",)),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the embedded base that all change it, by name. Nobody may change their folders."""
    folder, model = tmp_path_factory.mktemp("adapters"), sprout()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        adapters = attach(model, config, storage=FOLDER)
        stir(adapters, seed=seed)
        adapters.save(folder / name)
        adapters.detach()
    return {name: folder / name for name in CONFIGS}


def sprout() -> Any:
    return load_model("sprout", dtype="float32")[0]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def with_adapter(folder: Path) -> Tensor:
    model = sprout()
    attach_folder(model, folder, storage=FOLDER)
    return logits(model)


def with_peft(folder: Path) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(sprout_folder(), dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(base, folder).eval())


def in_model(made: Mapping[str, Path], weights: Mapping[str, float], **options: Any) -> Tensor:
    """The same combination made on a model."""
    model = sprout()
    adapters = attach_folder(
        model, made[next(iter(weights))], next(iter(weights)).replace(" ", "-"), storage=FOLDER
    )
    for name in list(weights)[1:]:
        adapters.load(made[name], name.replace(" ", "-"))
    combine_in_model(adapters, {n.replace(" ", "-"): w for n, w in weights.items()}, "sum", **options)
    adapters.activate("sum")
    return logits(model)


CASES: list[tuple[dict[str, float], dict[str, Any]]] = [
    ({"a": 0.7, "b": -0.3}, {}),
    ({"a": 1.0, "b": 1.0}, {"how": "svd", "rank": 3}),
    ({"a": 1.0, "b": 1.0}, {"how": "ties", "density": 0.7}),
    ({"b": 0.5}, {}),
    ({"a": 1.0, "tuned head": 0.5}, {}),
    ({"tuned head": 1.0}, {}),
    ({"factors": 0.6, "other factors": 0.6}, {}),
    ({"norms": 0.5}, {}),
]


@pytest.mark.parametrize(("weights", "options"), CASES)
def test_files_without_the_base_are_what_the_model_would_give(
    weights: dict[str, float], options: dict[str, Any], made: dict[str, Path], tmp_path: Path
) -> None:
    result = combine({made[name]: weight for name, weight in weights.items()}, tmp_path / "sum", **options)
    assert result.passed and result.out == tmp_path / "sum"
    ours = with_adapter(result.out)
    torch.testing.assert_close(ours, in_model(made, weights, **options), rtol=1e-4, atol=1e-4)
    if result.method != "FULL":  # PEFT has no such method
        torch.testing.assert_close(ours, with_peft(result.out), rtol=1e-4, atol=1e-4)
    assert float((ours - logits(sprout())).abs().max()) > 1e-2


def test_the_base_is_loaded_only_if_its_values_are_needed(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UsageError("No model here.")

    monkeypatch.setattr(verb, "load_model", refuse)
    combine({made["a"]: 2.0, made["b"]: -1.0}, tmp_path / "one")
    combine({made["factors"]: 2.0, made["other factors"]: -1.0}, tmp_path / "two")
    combine({made["tuned head"]: 1.0}, tmp_path / "three")
    with pytest.raises(AdapterError, match=r"(?s)cannot be loaded.*No model here.*--base"):
        combine({made["tuned head"]: 0.5}, tmp_path / "four")
    with pytest.raises(AdapterError, match="cannot be loaded"):
        combine({made["tuned head"]: 1.0, made["a"]: 1.0}, tmp_path / "five")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_with_weight_1_is_a_copy(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    combine({made[name]: 1}, tmp_path / "copy")
    mine, theirs = files_of(tmp_path / "copy"), files_of(made[name])
    assert mine[TENSORS] == theirs[TENSORS] and mine[CONFIG] == theirs[CONFIG]
    assert mine.keys() == theirs.keys()


def test_a_run_folder_is_an_adapter_too(tuned: TuneResult, tmp_path: Path) -> None:
    result = combine({tuned.run: 0.5}, tmp_path / "half")
    assert (result.method, result.rank, result.kept) == ("LORA", 4, 1.0)
    assert with_adapter(result.out).isfinite().all()


def test_what_it_says(made: dict[str, Path], tmp_path: Path) -> None:
    exact = combine({made["a"]: 0.7, made["b"]: -0.3}, tmp_path / "exact")
    assert exact.verdict == "Combined." and len(exact.lines) == 1
    assert exact.lines[0] == f"Combine: +0.7 a -0.3 b by linear, LORA, rank 6 -> {tmp_path / 'exact'}"
    cut = combine({made["a"]: 1, made["b"]: 1}, tmp_path / "cut", rank=2)
    assert 0 < cut.lowest_kept <= cut.kept < 1 and cut.lowest_at.startswith("model.layers.")
    assert f"rank 2 keeps {100 * cut.kept:.2f} %" in cut.verdict and len(cut.lines) == 2
    made_of = json.loads((tmp_path / "cut" / "graft.json").read_text())["combined"]
    assert made_of["weights"] == [{"adapter": "a", "weight": 1.0}, {"adapter": "b", "weight": 1.0}]
    assert (made_of["how"], made_of["rank"], made_of["kept"]) == ("linear", 2, cut.kept)
    assert json.dumps(cut.as_dict())


def test_the_same_request_writes_the_same_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        combine({made["a"]: 1, made["b"]: 1}, tmp_path / name, how="dare", density=0.5, seed=3, rank=4)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_peft_files_without_graft_json(made: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(made[name], tmp_path / name)
        (tmp_path / name / "graft.json").unlink()
    combine({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "sum")
    expected = in_model(made, {"a": 1, "b": 1})
    torch.testing.assert_close(with_adapter(tmp_path / "sum"), expected, rtol=1e-4, atol=1e-4)
    renamed(tmp_path / "b", "another/model")
    with pytest.raises(AdapterError, match=r"(?s)different bases.*another/model.*--base"):
        combine({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "no")
    combine({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "yes", base="sprout")
    assert json.loads((tmp_path / "yes" / CONFIG).read_text())["base_model_name_or_path"] == "sprout"


def renamed(folder: Path, name: str) -> None:
    content = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": name}
    (folder / CONFIG).write_text(json.dumps(content))


def test_adapters_of_other_bases_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    model = sprout()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    adapters = attach(model, LoraConfig(r=2, target_modules=("q_proj",)), storage=FOLDER)
    adapters.save(tmp_path / "other")
    refused({made["a"]: 1, tmp_path / "other": 1}, tmp_path / "new", AdapterError, "different bases")
    refused({made["tuned head"]: 1, tmp_path / "other": 1}, tmp_path / "new", AdapterError, "another base")


def refused(
    weights: Mapping[Any, float], out: Path, kind: type[GraftError], words: str, **options: Any
) -> None:
    with pytest.raises(kind, match=words):
        combine(weights, out, **options)
    assert not out.exists()


def test_wrong_requests_write_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    both, out = {made["a"]: 1, made["b"]: 1}, tmp_path / "new"
    refused({}, out, UsageError, "No adapters")
    refused({made["a"]: 1, tmp_path / "nowhere": 1}, out, FormatError, "There is no")
    refused({made["a"]: 1, "support@3": 1}, out, UsageError, "registry")
    refused(both, out, ConfigError, "did you mean 'ties'", how="teis")
    refused(both, out, ConfigError, "more than the sum of the ranks", rank=7)
    refused({made["a"]: 1, made["factors"]: 1}, out, AdapterError, "different methods")
    refused({made["a"]: float("inf")}, out, AdapterError, "no numbers")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        combine(both, tmp_path / "mine")
    assert files_of(tmp_path) == {"mine/notes.txt": b"keep"}


def test_a_tensor_that_nobody_knows_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["a"], tmp_path / "odd")
    tensors = load_file(tmp_path / "odd" / TENSORS)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "odd" / TENSORS)
    refused({tmp_path / "odd": 1, made["b"]: 1}, tmp_path / "new", AdapterError, "lora_C")


def test_embeddings_of_the_base_are_carried_along(made: dict[str, Path], tmp_path: Path) -> None:
    """PEFT writes them beside an adapter of a resized vocabulary."""
    table = sprout().get_input_embeddings().weight.detach().clone()
    key = "base_model.model.model.embed_tokens.weight"
    for name in ("a", "b"):
        shutil.copytree(made[name], tmp_path / name)
        save_file(load_file(made[name] / TENSORS) | {key: table}, tmp_path / name / TENSORS)
    combine({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "sum")
    assert torch.equal(load_file(tmp_path / "sum" / TENSORS)[key], table)
    save_file(load_file(made["b"] / TENSORS) | {key: table + 1}, tmp_path / "b" / TENSORS)
    refused({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "no", AdapterError, "different embeddings")


def blocks(language: str, repository: Path) -> list[str]:
    page = (repository / "docs/how-to/combine.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_about_it_says_what_runs(
    made: dict[str, Path], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, source in (("support", "a"), ("tone", "b")):
        shutil.copytree(made[source], tmp_path / "runs" / name / "adapter")
    commands = [shlex.split(line) for block in blocks("sh", repository) for line in block.splitlines()]
    assert len(commands) >= 4 and all(words[0] == "graft" for words in commands)
    for words in commands:
        assert run(words[1:]) == 0, words
    for number, code in enumerate(blocks("python", repository)):
        script = tmp_path / f"block{number}.py"
        script.write_text(code, encoding="utf-8")
        runpy.run_path(str(script))
    assert {"both", "less-tone", "signs", "model", "both-folder", "half"} <= {
        p.name for p in tmp_path.iterdir()
    }
