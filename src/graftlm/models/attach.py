"""Attaching an adapter that starts from the weights which a quantised base was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from graftlm.core.notices import notice
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet, ParameterType
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.starts.initialise import LoftQConfig
from graftlm.methods.starts.loftq import correct_quantisation
from graftlm.models.originals import originals_of


def attach_from_base(
    model: nn.Module, config: MethodConfig, name: str, *, dtype: ParameterType = "float32"
) -> AdapterSet:
    """The adapter of `config`, at a start that needs no data. That of `loftq` reads the weights before
    quantising from where the base came from.

    Raises:
        ModelError: they are not there. ConfigError: the base is not quantised, or was made from others.
    """
    plain, loftq = without_loftq(config)
    adapters = attach(model, plain, name, storage=FOLDER, dtype=dtype)
    if loftq is not None:
        with taken_off_on_error(adapters, name):
            start_from_originals(adapters, name, loftq)
    return adapters


@contextmanager
def taken_off_on_error(adapters: AdapterSet, name: str) -> Iterator[None]:
    """An adapter that could not be started is no use; the model is then as it was before."""
    with ExitStack() as undo:
        undo.callback(adapters.detach) if adapters.names == (name,) else undo.callback(adapters.delete, name)
        yield
        undo.pop_all()


def without_loftq(config: MethodConfig) -> tuple[MethodConfig, LoftQConfig | None]:
    """The plain LoRA that an adapter with LoftQ's start is, and the fields of that start if it is wanted."""
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "loftq":
        return config, None
    plain = config.replace(init_lora_weights=True, loftq_config=None)
    return plain, config.loftq_config or LoftQConfig()


def start_from_originals(
    adapters: AdapterSet,
    name: str,
    config: LoftQConfig,
    *,
    source: str | Path | None = None,
    accepts: Callable[[str], bool] | None = None,
) -> None:
    """Give an adapter that is not trained yet the start of LoftQ.

    Args:
        source: folder, file or hub id of the weights before quantising; by default what the config names.
        accepts: asked with the path of every layer that was started; False takes its start back.

    Raises:
        ModelError, ConfigError: they are not there, or do not fit.
    """
    original = originals_of(adapters.model, source)
    found = correct_quantisation(adapters, name, original, config, accepts=accepts)
    share = sum(1 - one.after / one.before for one in found if one.before) / max(1, len(found))
    notice(f"LoftQ: the adapter starts by taking {share:.1%} off the error of {len(found)} quantised layers.")
