"""The rules of the house, checked on the sources themselves (see CONTRIBUTING)."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src"

RANKS = {
    "core": 0,
    "kernels": 1,
    "data": 1,
    "diagnosis": 1,
    "search": 1,
    "quant": 2,
    "methods": 3,
    "formats": 4,
    "models": 5,
    "objectives": 6,
    "training": 7,
    "evaluation": 7,
    "integrations": 8,
    "tasks": 8,
    "planning": 8,
    "verbs": 9,
    "api": 10,
    "cli": 11,
    "testing": 12,
    "__init__": 12,
    "__main__": 12,
}
"""A module imports only from lower ranks, or from its own folder.

`methods/families.py` (which modules of an architecture play which role) would belong to `models`; it
lies in `methods` because resolving targets needs it.
"""

ONLY = {"data": {"core"}, "diagnosis": {"core"}, "search": {"core"}, "cli": {"api", "core"}}
"""Folders that may use less than everything below them (imports for annotations aside)."""

FILE_LINES = 300
FUNCTION_LINES = 60
LONGER: dict[str, str] = {}
"""Exceptions from both lengths: `file` or `file:function` -> the reason."""

SPELLS_LORA = {"graftlm/formats/peft_keys.py", "graftlm/methods/lora.py"}
"""The only files that may look for "lora" inside a name: elsewhere, sites know their adapters."""

BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load"}
BANNED_ARGUMENTS = {"shell": True, "trust_remote_code": True, "allow_pickle": True}
SUBSTRING_METHODS = {
    *("startswith", "endswith", "find", "index", "count", "replace"),
    *("split", "partition", "match", "search", "fullmatch"),
}

IMPORT_NAMES = {
    "pyyaml": "yaml",
    "liger-kernel": "liger_kernel",
    "prometheus-client": "prometheus_client",
    "rouge-score": "rouge_score",
    "pillow": "PIL",
}


@dataclass(frozen=True)
class Import:
    """One imported module of ours or somebody else's."""

    module: str
    line: int
    for_annotations: bool


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(SOURCE).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @property
    def module(self) -> str:
        return ".".join(self.path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")

    @property
    def group(self) -> str:
        """The folder below `graftlm`, or the module's own name at the top."""
        return self.path.relative_to(SOURCE).with_suffix("").parts[1]

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.tree, for_annotations=False))


def _imports(node: ast.AST, *, for_annotations: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, for_annotations)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(whole if whole in MODULES else str(child.module), child.lineno, for_annotations)
        else:
            guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(child, for_annotations=for_annotations or guard)


SOURCES = [Source(path) for path in sorted((SOURCE / "graftlm").rglob("*.py"))]
MODULES = {source.module: source for source in SOURCES}
every_source = pytest.mark.parametrize("source", SOURCES, ids=[source.name for source in SOURCES])


@every_source
def test_imports_only_from_lower_ranks(source: Source) -> None:
    assert source.group in RANKS, f"{source.group}/ has no rank"
    wrong = []
    for item in _ours(source):
        other = MODULES[item.module].group
        allowed = ONLY.get(source.group)
        narrow = allowed is not None and not item.for_annotations and other not in allowed
        if other != source.group and (RANKS[other] >= RANKS[source.group] or narrow):
            wrong.append(f"{source.name}:{item.line} imports {item.module}")
    assert not wrong, wrong


def _ours(source: Source) -> list[Import]:
    """Imports of modules in the package that exist as files."""
    return [item for item in source.imports if item.module in MODULES and item.module != "graftlm"]


@every_source
def test_imports_from_the_defining_module(source: Source) -> None:
    packages = {"graftlm"} | {f"graftlm.{group}" for group in RANKS if (SOURCE / "graftlm" / group).is_dir()}
    wrong = [f"{source.name}:{item.line} {item.module}" for item in source.imports if item.module in packages]
    assert not wrong, f"import from the module that defines the name: {wrong}"


@every_source
def test_imports_exist(source: Source) -> None:
    inside = [item for item in source.imports if item.module.split(".")[0] == "graftlm"]
    wrong = [f"{source.name}:{item.line} {item.module}" for item in inside if item.module not in MODULES]
    assert not wrong, wrong


def test_no_import_cycles() -> None:
    graph = {
        source.module: sorted({item.module for item in _ours(source) if not item.for_annotations})
        for source in SOURCES
    }
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for other in graph[module]:
                visit(other, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


@every_source
def test_lengths(source: Source) -> None:
    wrong = []
    lines = source.text.count("\n")
    if lines > FILE_LINES and source.name not in LONGER:
        wrong.append(f"{source.name}: {lines} lines, at most {FILE_LINES}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES and f"{source.name}:{node.name}" not in LONGER:
                wrong.append(f"{source.name}:{node.lineno} {node.name}: {length} lines")
    assert not wrong, wrong


def test_no_module_without_a_concept() -> None:
    wrong = [source.name for source in SOURCES if source.path.stem in ("utils", "util", "helpers", "misc")]
    assert not wrong, wrong


@every_source
def test_nothing_dangerous(source: Source) -> None:
    wrong = [f"line {item.line}: {item.module}" for item in source.imports if item.module in BANNED_MODULES]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = {word.arg: word.value for word in node.keywords if word.arg}
            flags = [
                key
                for key, banned in BANNED_ARGUMENTS.items()
                if isinstance(value := arguments.get(key), ast.Constant) and value.value is banned
            ]
            if name in BANNED_CALLS or flags:
                wrong.append(f"line {node.lineno}: {name}({', '.join(flags)})")
    assert not wrong, f"{source.name}: {wrong}"


@every_source
def test_nobody_recognises_adapters_by_a_substring(source: Source) -> None:
    wrong = [
        node.lineno for node in ast.walk(source.tree) if isinstance(node, ast.expr) and _looks_for_lora(node)
    ]
    assert not wrong or source.name in SPELLS_LORA, f"{source.name}: lines {wrong}"


def _looks_for_lora(node: ast.expr) -> bool:
    """`"lora" in name`, `name.startswith("lora_")` and their like; `kind == "lora"` is an exact word."""
    if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
        return _spells_lora(node.left)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in SUBSTRING_METHODS and any(map(_spells_lora, node.args))
    return False


def _spells_lora(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and "lora" in node.value.lower()


def test_every_todo_names_an_issue() -> None:
    open_end = re.compile(r"\b(?:TO" r"DO|FIX" r"ME)\b(?!\(#\d+\))")
    folders = [SOURCE, *(REPOSITORY / name for name in ("tests", "examples", "benchmarks"))]
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if open_end.search(line)
    ]
    assert not wrong, wrong


def test_third_parties_are_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"]]
    declared += [name for extra in extras if extra not in ("test", "dev") for name in extras[extra]]
    names = {re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in declared}
    known = {IMPORT_NAMES.get(name, name) for name in names} | {"graftlm"} | sys.stdlib_module_names
    wrong = sorted(
        f"{source.name}:{item.line} {item.module}"
        for source in SOURCES
        for item in source.imports
        if item.module.split(".")[0] not in known
    )
    assert not wrong, wrong


def test_exceptions_are_still_needed() -> None:
    names = {source.name for source in SOURCES}
    assert all(key.split(":")[0] in names for key in LONGER)
