"""A dense model on disk: what transformers reads back, and what happens when the disk refuses."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from graftlm.core.errors import StorageError
from graftlm.models.load import load_model
from graftlm.models.save import save_model


def test_transformers_reads_the_same_back(tmp_path: Path) -> None:
    model, tokenizer = load_model("sprout", dtype="float32")
    bars = logging.is_progress_bar_enabled()
    save_model(model, tokenizer, tmp_path)
    assert logging.is_progress_bar_enabled() == bars
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


@pytest.fixture
def small_files() -> Iterator[None]:
    """This process may write no file beyond 1 MiB, as under a quota."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_refuses(small_files: None, tmp_path: Path) -> None:
    model, tokenizer = load_model("sprout", dtype="float32")
    with pytest.raises(StorageError) as refused:
        save_model(model, tokenizer, tmp_path)
    assert str(tmp_path) in refused.value.seen
    assert refused.value.fix
