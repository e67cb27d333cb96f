"""`graft combine` as people type it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.load import load_model
from graftlm.testing.case import stir


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters of the embedded base, `a` and `b`, and one with a colon in its name."""
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = load_model("sprout", dtype="float32")
    for seed, name in enumerate(("a", "b", "c:2")):
        adapters = attach(model, LoraConfig(r=2, target_modules=("q_proj",)), storage=FOLDER)
        stir(adapters, seed=seed)
        adapters.save(folder / name)
        adapters.detach()
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(place)
    before = set(place.iterdir())
    yield
    assert set(place.iterdir()) == before, "tests write elsewhere"


def test_weights_after_colons(graft: Callable[..., Any], tmp_path: Path) -> None:
    done = graft("combine", "a:0.7", "b:-3e-1", "--out", str(tmp_path / "sum"), "--json")
    assert done.code == 0, done.err
    assert done.json["weights"] == {"a": 0.7, "b": -0.3}
    assert (done.json["rank"], done.json["kept"], done.json["passed"]) == (4, 1.0, True)
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"] == 4


def test_a_weight_is_1_unless_given(graft: Callable[..., Any], tmp_path: Path) -> None:
    done = graft("combine", "a", "c:2", "--out", str(tmp_path / "sum"), "--json")
    assert done.code == 0, done.err
    assert done.json["weights"] == {"a": 1.0, "c:2": 1.0}, "a folder with a colon in its name"


def test_what_people_see(graft: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--how", "ties", "--density", "0.3", "--majority-sign", "frequency", "--rank", "3")
    done = graft("combine", "a", "b", "--out", str(tmp_path / "sum"), *options)
    assert done.code == 0, done.err
    assert "+1 a +1 b by ties, LORA, rank 3" in done.out
    assert "rank 3 keeps" in done.out and "least" in done.out


WRONG = [
    (["a:x", "b"], "'x' in 'a:x' is no weight"),
    (["a:0.5", "a:0.5"], "a is given twice"),
    (["a", "b", "--how", "tiies"], "Mixing has 1 problem"),
    (["a", "b", "--how", "dare", "--density", "1.5"], "Mixing has 1 problem"),
    (["a", "b", "--density", "0.5"], "Mixing has 1 problem"),
    (["a", "b", "--rank", "5"], "rank=5 is more than the sum of the ranks (4)"),
    (["a", "b", "--rank", "0"], "'--rank'"),
    ([], "Missing argument"),
]


@pytest.mark.parametrize(("words", "seen"), WRONG)
def test_wrong_usage_is_code_2_and_writes_nothing(
    words: list[str], seen: str, graft: Callable[..., Any], tmp_path: Path
) -> None:
    done = graft("combine", *words, "--out", str(tmp_path / "sum"), "--json")
    assert done.code == 2, done.err
    assert seen in done.json["seen"] and done.json["fix"]
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_combined_is_code_1(graft: Callable[..., Any], tmp_path: Path) -> None:
    done = graft("combine", "a", "./nowhere", "--out", str(tmp_path / "sum"), "--json")
    assert done.code == 1 and "nowhere" in done.json["seen"]
    done = graft("combine", "a", "b:nan", "--out", str(tmp_path / "sum"), "--json")
    assert done.code == 1 and done.json["problems"] == ["b: nan"]
    assert not list(tmp_path.iterdir())


def test_help_shows_how(graft: Callable[..., Any]) -> None:
    done = graft("combine", "--help")
    assert done.code == 0
    assert "graft combine runs/a:0.7 runs/b:0.3 --out ab" in done.out
