"""Put a loaded model where it is to be: on its device, its layers and embeddings where they are to lie."""

from __future__ import annotations

from typing import Any

import torch

from graftlm.core.notices import notice
from graftlm.models.streaming.embedding import keep_embeddings_on_host
from graftlm.models.streaming.host import stream_from_host
from graftlm.models.streaming.streamed import HOST, RESIDENT, placement_of


def placed(model: Any, device: torch.device, placement: str, embeddings: str, name: str) -> Any:
    """The model on its device, its layers where they are to lie."""
    if placement == HOST:
        stream_from_host(model, device, name)
    else:
        model = model.to(device)
    if placement != RESIDENT:
        notice(f"{placement_of(model)[1]}.")
    if embeddings == HOST:
        keep_embeddings_on_host(model, device)
    return model
