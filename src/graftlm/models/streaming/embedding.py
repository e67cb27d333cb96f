"""Input embeddings that stay in the machine's memory: of their many rows, a pass reads a few.

The table of Llama-3.1-8B takes 1.05 GB in 16 bits, as much as a third of its layers in 4 bits. The ids go to
the host, the rows that they name come back. Not measured: written without a GPU at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, ModelError
from graftlm.core.notices import notice
from graftlm.models.streaming.streamed import HOST, RESIDENT

EMBEDDINGS = (RESIDENT, HOST)
"""Where the input embeddings of a base may lie."""


def check_embeddings(embeddings: str, device: torch.device) -> None:
    """Refuse what cannot be, before anything is loaded.

    Raises:
        ConfigError: an unknown place, or one that the device has no use for.
    """
    if embeddings not in EMBEDDINGS:
        raise ConfigError(
            f"embeddings={embeddings!r} is no place for them{suggest(embeddings, EMBEDDINGS) or '.'}",
            fix=f"Use one of {', '.join(EMBEDDINGS)}.",
        )
    if embeddings == HOST and device.type == "cpu":
        raise ConfigError(
            "embeddings='host' keeps them in the machine's memory for a GPU, and the device is the CPU.",
            fix="Leave it out: they are there already.",
        )


def keep_embeddings_on_host(model: Any, device: torch.device) -> None:
    """Put the input embeddings of a model that computes on `device` back into the machine's memory.

    Raises:
        ModelError: the output head computes with the same table, so that it has to be on the device.
    """
    table: nn.Module = model.get_input_embeddings()
    if _is_tied(model, table):
        raise ModelError(
            f"The input embeddings of {type(model).__name__} are its output head, too.",
            meaning="The head multiplies by the whole table in every pass, so it has to lie on the device.",
            fix="Leave model.embeddings out.",
        )
    table.to("cpu")
    if device.type == "cuda":
        for tensor in (*table.parameters(), *table.buffers()):
            tensor.data = tensor.data.pin_memory()
    vars(table)["computes_on"] = device  # where its rows arrive, and where adapters of it have to be
    table.register_forward_pre_hook(_to_host)
    table.register_forward_hook(_to_device)
    freed = sum(tensor.nbytes for tensor in (*table.parameters(), *table.buffers()))
    notice(f"The input embeddings ({freed / 1e9:.2f} GB) lie in the machine's memory.")


def _to_host(table: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    ids, *rest = args
    return (ids if ids.is_meta else ids.to("cpu"), *rest)  # without data: only counted


def _to_device(table: nn.Module, args: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    device: torch.device = vars(table)["computes_on"]
    if rows.is_meta:
        return rows
    source = rows.pin_memory() if device.type == "cuda" else rows
    return source.to(device, non_blocking=True)


def _is_tied(model: Any, table: nn.Module) -> bool:
    """Whether another module holds a tensor of the table; a head that takes it without holding it says so."""
    own = {id(tensor) for tensor in (*table.parameters(), *table.buffers())}
    taken = getattr(model.get_output_embeddings(), "embedding", None) is table
    return taken or any(
        id(tensor) in own
        for module in model.modules()
        if module is not table
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
