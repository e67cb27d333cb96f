"""A new method is one file and one line: the example of CONTRIBUTING.md, taken from the page and run."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.core.errors import ConfigError
from graftlm.methods import table
from graftlm.methods.table import method
from graftlm.testing.properties import PROPERTIES
from graftlm.testing.suite import check_method
from graftlm.training.method_section import Method

from .methods.tiny import batch, graft, logits, tiny

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
TYPE = "EXAMPLE_VERA"


def block(language: str, start: str) -> str:
    """The code block of the page that begins with `start`."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```"
    found = re.findall(pattern, PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (code,) = [text for _, code in found if (text := textwrap.dedent(code)).startswith(start)]
    return str(code)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The method as an installed package: its file, its test, and the metadata that an installer writes."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name in ("vera.py", "test_vera.py"):
        (folder / name).write_text(block("python", f"# {name}\n"), encoding="utf-8")
    project = tomllib.loads(block("toml", "[project.entry-points"))["project"]
    metadata = folder / "vera-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vera\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in project["entry-points"]["graftlm.methods"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[graftlm.methods]", *lines]) + "\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in ("vera", "test_vera"):
        sys.modules.pop(name, None)


def config(**fields: Any) -> Any:
    return method(TYPE)(**fields)


def test_the_line_is_enough_to_find_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert method(TYPE) is importlib.import_module("vera").VeraConfig
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(package)])
    with pytest.raises(ConfigError, match=TYPE):
        method(TYPE)


def test_the_line_of_the_table_is_enough_too(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_class = importlib.import_module("vera").VeraConfig
    assert f'"{TYPE}": {config_class.__name__},' in PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(package)])
    monkeypatch.setattr(table, "METHODS", {**table.METHODS, TYPE: config_class})
    assert method(TYPE) is config_class


def test_recipes_name_it_by_its_type(package: Path) -> None:
    parsed = Method.parse({"type": TYPE, "r": 64})
    assert parsed.config == config(r=64)
    assert Method.parse(parsed.as_dict()) == parsed


def test_it_is_the_definition(package: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5)).double()
    part: Any = graft(model, config(r=3, target_modules=("0",)), dtype="base").parts("default")["0"]
    x = torch.randn(4, 6, dtype=torch.float64)
    y = model(x)
    torch.nn.init.normal_(part.vera_b)
    expected = y + torch.einsum("o,or,r,ri,ti->to", part.vera_b, part.b, part.vera_d, part.a, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_its_whole_life(kind: str, package: Path, tmp_path: Path) -> None:
    model, inputs = tiny(kind), batch(kind)
    before = logits(model, inputs)
    adapters = graft(model, config(r=8))
    assert torch.equal(logits(model, inputs), before), "identity at the start"
    optimizer = torch.optim.AdamW(adapters.parameters("default"), lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = logits(model, inputs)
    assert not torch.allclose(trained, before, atol=1e-3)
    with adapters.disabled():
        assert torch.equal(logits(model, inputs), before)

    adapters.save(tmp_path)
    fresh = tiny(kind)
    others = graft(fresh)
    others.load(tmp_path, "vera")
    with others.activated("vera"):
        assert torch.equal(logits(fresh, inputs), trained)
        others.merge()
        torch.testing.assert_close(logits(fresh, inputs), trained, rtol=0, atol=1e-5)
        others.unmerge()
    with others.routed(["vera", None, "default"]):
        rows = logits(fresh, inputs)
    torch.testing.assert_close(rows[:2], torch.stack([trained[0], before[1]]), rtol=0, atol=1e-5)
    assert torch.equal(logits(others.detach(), inputs), before)


def test_layers_of_one_shape_share_their_matrices(package: Path) -> None:
    parts = graft(tiny("llama"), config(r=8)).parts("default").values()
    matrices = {(part.a.data_ptr(), part.b.data_ptr()) for part in parts if hasattr(part, "a")}
    shapes = {(part.vera_b.shape, part.a.shape) for part in parts if hasattr(part, "a")}
    assert len(matrices) == len(shapes) == 4


def test_everything_that_a_method_must_do(package: Path) -> None:
    """The page's own test on one kind of model, without what takes seconds for each compilation."""
    quick = [name for name in PROPERTIES if "compile" not in name]
    assert check_method(config(r=8), kinds=["bert"], properties=quick).count("holds") > 15


@pytest.mark.slow
def test_the_test_of_the_page(package: Path) -> None:
    importlib.import_module("test_vera").test_vera()
