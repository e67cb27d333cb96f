"""What every test may ask for, and the conditions under which a test skips itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Set before any test imports transformers: tests never reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Measured rates and the history of runs are those of tests alone; kept, so that they are measured once.
os.environ.setdefault("GRAFT_CACHE", str(Path(tempfile.gettempdir()) / f"graft-test-cache-{os.getuid()}"))
# Models of tests are too small for two threads, which on a busy machine wait for each other most of the time.
# Set before torch is imported, so that processes which tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and data sets: `$GRAFT_SHARED`, or the folder `shared` beside this checkout."""
    folder = Path(os.environ.get("GRAFT_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared models and data: {folder} (set GRAFT_SHARED)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
