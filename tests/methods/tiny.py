"""What tests of adapters need: the tiny models of `graftlm.testing`, with adapters on them."""

from __future__ import annotations

from typing import Any

from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.testing.case import stir as stir
from graftlm.testing.models import DECODER as DECODER
from graftlm.testing.models import ENCODER as ENCODER
from graftlm.testing.models import ENCODER_DECODERS as ENCODER_DECODERS
from graftlm.testing.models import KINDS as KINDS
from graftlm.testing.models import SEQ2SEQ as SEQ2SEQ
from graftlm.testing.models import VOCABULARY as VOCABULARY
from graftlm.testing.models import batch as batch
from graftlm.testing.models import logits as logits
from graftlm.testing.models import tiny as tiny
from graftlm.testing.snapshot import snapshot as snapshot


def graft(
    model: Any, config: MethodConfig | None = None, name: str = "default", **options: Any
) -> AdapterSet:
    """`attach` with folders as storage; by default a LoRA on all linear layers that changes the output."""
    config = config or LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    return attach(model, config, name, storage=FOLDER, **options)
