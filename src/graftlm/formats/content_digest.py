"""What an adapter is, whatever it is called and wherever it lies: a digest over config and tensors.

Caches of a server belong under this digest: a name can be given to another adapter, a folder can be written
anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.formats.layout import read_folder
from graftlm.formats.peft_config import INERT


def content_digest(folder: Path) -> str:
    """SHA-256 (hex) over the fields of the config that decide what the tensors mean, and over all tensors.

    Raises:
        FormatError: a file is missing or damaged.
    """
    return digest_of(*read_folder(folder))


def digest_of(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The same of what was read.

    >>> one = digest_of({"r": 4, "revision": "a"}, {"w": torch.zeros(2)})
    >>> one == digest_of({"r": 4, "revision": "b"}, {"w": torch.zeros(2)})
    True
    >>> one == digest_of({"r": 4}, {"w": torch.ones(2)})
    False
    """
    fields = {key: value for key, value in content.items() if key not in INERT or key == "peft_type"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
