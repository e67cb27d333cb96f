"""A function in a Python file that a recipe names: found, loaded, and asked what it takes."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError


def load_function(path: Path, name: str) -> Callable[..., Any]:
    """The function `name` of the file at `path`, whose code is run for that.

    Raises:
        ConfigError: no such file or function, the file does not run, or the function is no plain one.
    """
    if not path.is_file():
        near = suggest(path.name, [entry.name for entry in path.parent.glob("*.py")]) if path.name else ""
        raise ConfigError(
            f"No file {path}{near}",
            meaning="A reward is named FILE.py:FUNCTION, from the folder in which graft is started.",
            fix="Correct task.rewards, or start graft in the folder of that file.",
        )
    found = getattr(_module(path), name, None)
    if not callable(found):
        functions = [key for key, value in vars(_module(path)).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"{path} has no function {name!r}{suggest(name, functions)}",
            meaning=f"It has {', '.join(functions) or 'none'}.",
            fix=f"Write task.rewards={path}:{functions[0] if functions else 'FUNCTION'}",
        )
    if inspect.iscoroutinefunction(found):
        raise ConfigError(
            f"{path}:{name} is asynchronous.",
            fix="Write it as a plain function; it gets all completions of a step at once.",
        )
    function: Callable[..., Any] = found
    return function


def required_names(function: Callable[..., Any]) -> tuple[frozenset[str], frozenset[str] | None]:
    """The parameters without a default, and all that it takes by name (None: any).

    >>> needed, takes = required_names(lambda completions, answer, tolerance=0.1: [])
    >>> sorted(needed), takes is not None and "tolerance" in takes
    (['answer', 'completions'], True)
    """
    parameters = inspect.signature(function).parameters.values()
    named = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    needed = frozenset(each.name for each in named if each.default is each.empty)
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters)
    return needed, None if takes_any else frozenset(each.name for each in named)


def _module(path: Path) -> ModuleType:
    """The file as a module; what it holds is run once in a process."""
    content = str(path.resolve()).encode() + path.read_bytes()
    name = f"graft_reward_{hashlib.sha256(content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file.", fix="Give it the ending .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as imports do: dataclasses and the like look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody else's code
        del sys.modules[name]
        raise ConfigError(
            f"{path} does not run: {type(error).__name__}: {error}",
            meaning="The file of a reward is imported before the run starts.",
            fix="Correct it; `python FILE.py` shows where it fails.",
        ) from error
    return module
