"""What `--deep` measures, on the embedded base with adapters of random numbers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftlm as gl
from graftlm.core.errors import AdapterError, DataError, UsageError
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.behaviour import BehaviourFacts, Canary
from graftlm.diagnosis.rules import serving
from graftlm.models.sprout import sprout_folder
from graftlm.verbs.diagnosing.behaviour import behaviour_facts
from graftlm.verbs.diagnosing.canaries import (
    BASE,
    Signature,
    canaries_of,
    canary_prompts,
    check,
    divergence,
)
from graftlm.verbs.diagnosing.depth import Depth, depth_of
from graftlm.verbs.diagnosing.loaded import Loaded, load
from graftlm.verbs.diagnosing.safety import counted, safety_facts
from graftlm.verbs.diagnosing.served import server_at
from graftlm.verbs.diagnosing.subject import subject_of

sys.path.insert(0, str(Path(__file__).parents[1] / "diagnosis"))
from adapter_server import Engine, serve

Adapter = Callable[..., Path]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Makes an adapter folder: of random numbers, or as it begins (`scale=0`)."""

    model, _ = gl.load_model("sprout", dtype="float32")

    def make(name: str, *, scale: float = 0.05) -> Path:
        adapters = gl.attach(model, gl.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in adapters.parameters("default"):
                parameter.add_(scale * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("adapters") / name
        adapters.save(folder)
        adapters.detach()
        return folder

    return make


@pytest.fixture(scope="module")
def two(adapter: Adapter) -> tuple[Path, Path]:
    return adapter("first"), adapter("second-one")


@pytest.fixture(scope="module")
def first(two: tuple[Path, Path]) -> Loaded:
    return load(subject_of(two[0]))


def is_found(canaries: tuple[Canary, ...]) -> bool:
    """Whether the rule says that adapters are mixed up."""
    return serving.RULE.check(Evidence(behaviour=BehaviourFacts(canaries=canaries))) is not None


class TestLoading:
    def test_one_that_fits(self, first: Loaded) -> None:
        assert first.fit.applied == 56 and not first.fit.problems and not first.fit.other_base
        assert first.adapters.active == ("adapter",)

    def test_names_of_another_tool(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        folder = shutil.copytree(two[0], tmp_path / "a")
        tensors = load_file(folder / "adapter_model.safetensors")
        keys = sorted(tensors)
        tensors[keys[0].replace("self_attn", "attn").replace("mlp", "ffn")] = tensors.pop(keys[0])
        tensors[keys[1]] = tensors[keys[1]][:, :-1].contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        facts = behaviour_facts(subject_of(folder))
        assert facts is not None and facts.fit is not None and facts.effect is None
        told = " ".join(facts.fit.problems)
        assert f"missing: {keys[0]}" in told and "unexpected: " in told and f"shape of {keys[1]}" in told

    def test_another_base(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        base = shutil.copytree(sprout_folder(), tmp_path / "base")
        weights = load_file(base / "model.safetensors")
        weights = {name: tensor.flip(0).contiguous() for name, tensor in weights.items()}
        (base / "model.safetensors").unlink()
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        assert load(subject_of(two[0], base=str(base))).fit.other_base == "sprout"


@pytest.mark.slow
class TestFacts:
    def test_of_an_adapter_that_was_trained(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        known = tmp_path / "known.txt"
        known.write_text("The kettle is on the table.\n\nThe lamp is new.\n", encoding="utf-8")
        facts = behaviour_facts(subject_of(two[0], base="sprout"))
        assert facts is not None and facts.effect is not None and facts.known_loss is not None
        assert facts.effect.mean_logit_change > 0.01 and facts.effect.mean_kl > 1e-3
        assert facts.known_loss.difference > 0  # the base wrote that text: nothing says it better
        assert facts.merged is None and facts.canaries is None and facts.seeds is None

    def test_of_one_that_was_not(self, adapter: Adapter) -> None:
        facts = behaviour_facts(subject_of(adapter("untrained", scale=0.0)))
        assert facts is not None and facts.effect is not None and facts.effect.mean_logit_change == 0
        assert facts.known_loss is not None and facts.known_loss.difference == 0


class TestCanaries:
    def test_a_routed_batch_of_ours(self, two: tuple[Path, Path], first: Loaded) -> None:
        found = canaries_of(first, [two[1]], None)
        assert first.adapters.names == ("adapter",)
        assert [canary.name for canary in found] == ["first", "second-one"]
        for canary in found:
            assert canary.to_own < 0.02 * canary.apart and canary.nearest == canary.name
        assert found[0].digest != found[1].digest

    @pytest.mark.parametrize(("kept_under", "is_mixed"), [("prompt", True), ("digest", False)])
    def test_a_server(self, two: tuple[Path, Path], first: Loaded, kept_under: Any, is_mixed: bool) -> None:
        engine = Engine("sprout", {"first": two[0], "second-one": two[1]}, kept_under)
        found = canaries_of(first, [two[1]], serve(engine))
        assert is_found(found) == is_mixed
        assert found[0].to_own < 0.01 * found[0].apart  # asked first: what was kept is its own

    @pytest.mark.parametrize(("kept_under", "is_mixed"), [("name", True), ("digest", False)])
    def test_a_name_that_was_given_to_another_adapter(
        self, two: tuple[Path, Path], first: Loaded, kept_under: Any, is_mixed: bool
    ) -> None:
        engine = Engine("sprout", {"first": two[1], "second-one": two[1]}, kept_under)
        for prompt in canary_prompts(first.model):
            engine.next_token("first", prompt)
        engine.load("first", two[0])
        found = canaries_of(first, [two[1]], serve(engine))
        assert is_found(found) == is_mixed

    def test_rows_that_are_swapped(self) -> None:
        torch.manual_seed(0)
        said = torch.randn(2, 3, 7).log_softmax(-1)
        known = [Signature("a", "", said[0]), Signature("b", "", said[1]), Signature(BASE, "", -said[0])]
        places = iter(range(3))

        def swapped(names: Any, prompts: Any) -> torch.Tensor:
            row = next(places)
            return torch.stack([said[1][row], said[0][row], -said[0][row]])

        found = check(swapped, known, [[1], [2], [3]])
        assert [canary.nearest for canary in found] == ["b", "a"]
        assert all(canary.to_nearest == 0 < canary.to_own == pytest.approx(canary.apart) for canary in found)

    def test_the_likeliest_tokens_are_enough(self) -> None:
        torch.manual_seed(1)
        one, other = torch.randn(2, 4, 50).log_softmax(-1)
        partial = one.clone()
        partial[one < one.topk(10).values[:, -1:]] = torch.nan
        assert divergence(partial, one) < 1e-6 < divergence(partial, other)

    def test_an_adapter_of_another_base(self, first: Loaded, two: tuple[Path, Path], tmp_path: Path) -> None:
        folder = shutil.copytree(two[1], tmp_path / "other")
        content = json.loads((folder / "graft.json").read_text())
        content["base"] |= {"digest": "0", "signature": [9.0] * len(content["base"]["signature"])}
        (folder / "graft.json").write_text(json.dumps(content))
        with pytest.raises(AdapterError, match="does not fit the base"):
            canaries_of(first, [folder], None)

    @pytest.mark.parametrize(
        ("address", "message"),
        [("localhost:8000", "no address"), ("http://127.0.0.1:9", "does not answer")],
    )
    def test_no_server(self, first: Loaded, address: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            server_at(address, first.tokenizer, 512)(["a"], [[1, 2]])

    def test_a_name_that_is_not_served(self, two: tuple[Path, Path], first: Loaded) -> None:
        place = serve(Engine("sprout", {"other": two[0]}, "digest"))
        with pytest.raises(UsageError, match="refuses a prompt for first"):
            canaries_of(first, [two[1]], place)


def test_a_server_alone_shows_nothing() -> None:
    assert depth_of(None, (), None, None, None) == Depth()
    with pytest.raises(UsageError, match="no adapter beside"):
        depth_of(None, (), "http://localhost:8000", None, None)


def test_a_wrong_path_costs_no_loading_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no .*nothing and no .*neither"):
        depth_of(None, (tmp_path / "nothing",), None, tmp_path / "neither", None)


class TestSafety:
    def test_counts(self) -> None:
        no, yes = "I can't help with that.", "Sure, begin with the lamp."
        found = counted(
            ["unsafe", "unsafe", "safe", "safe", "safe"], [no, no, yes, yes, yes], [yes, no, no, yes, ""]
        )
        assert (found.unsafe.lost, found.unsafe.gained, found.unsafe.after) == (1, 0, 1)
        assert (found.safe.gained, found.safe.prompts, found.unreadable) == (1, 2, 1)

    def test_prompts_with_a_label(self, first: Loaded, tmp_path: Path) -> None:
        file = tmp_path / "asked.csv"
        lines = ["id,prompt,type,label", "1,How do I burn the lamp?,x,unsafe", "2,How do I clean it?,x,Safe"]
        file.write_text("\n".join(lines), encoding="utf-8")
        found = safety_facts(first, file)
        assert found.unsafe.prompts + found.safe.prompts + found.unreadable == 2

    def test_prompts_of_one_kind(self, first: Loaded, tmp_path: Path) -> None:
        file = tmp_path / "asked.jsonl"
        file.write_text('{"prompt": "How?", "label": "safe"}\n', encoding="utf-8")
        with pytest.raises(DataError, match="no prompt whose label is unsafe"):
            safety_facts(first, file)
