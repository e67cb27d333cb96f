"""Several adapters behind one server (D10)."""

from __future__ import annotations

from pathlib import Path

from adapter_server import Engine, KeptUnder, serve
from case import Case, Diagnosed, tuned

from cases.behaviour import SMALL, messages, sums


def _two(folder: Path) -> tuple[Path, Path]:
    settings = (*SMALL, "train.max_steps=8")
    one = tuned(folder / "one", messages(folder), *settings)
    return one, tuned(folder / "two", sums(folder), *settings)


def _served(folder: Path, kept_under: KeptUnder) -> Diagnosed:
    for name in ("one", "two"):
        (folder / name).mkdir()
    one, two = _two(folder)
    engine = Engine("sprout", {"run": one / "adapter", "run-2": two / "adapter"}, kept_under)
    return Diagnosed(one, beside=(two,), served=serve(engine))


def cached_by_prompt(folder: Path) -> Diagnosed:
    return _served(folder, "prompt")


def cached_by_digest(folder: Path) -> Diagnosed:
    return _served(folder, "digest")


CASES = (Case("D10", "cached-by-prompt", cached_by_prompt, cached_by_digest, deep=True),)
