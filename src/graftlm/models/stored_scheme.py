"""How a checkpoint says it is quantised: `quantization_config` in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, ModelError
from graftlm.kernels.decoding import TILE
from graftlm.quant.scheme import KINDS, Scheme

METHOD = "graft"
"""`quant_method` of what only Graft reads (fp8); everything else is written as others have it."""

SIXTEEN_BIT = "16bit"
HEADS = (SIXTEEN_BIT, "int8", "fp8")
"""What the embeddings and the head of a quantised base may be stored in."""

_READ_ELSEWHERE = "Name the 16-bit model that it was made from, and load that with quantization='nf4'."


def stored_kind(config: Any, name: str) -> str | None:
    """The kind of packed weights that a model's config names in `quantization_config`; None: it has none.

    Raises:
        ModelError: another method than bitsandbytes or ours, or fields that contradict each other.
    """
    places = (config, config.get_text_config())
    content = next((found for part in places if (found := getattr(part, "quantization_config", None))), None)
    if content is None:
        return None
    fields: Mapping[str, Any] = content if isinstance(content, Mapping) else content.to_dict()
    method = fields.get("quant_method")
    method = getattr(method, "value", method)
    if method == METHOD and fields.get("kind") in KINDS:
        return str(fields["kind"])
    if method == "fp8" and list(fields.get("weight_block_size") or ()) == [TILE, TILE]:
        return "fp8_block"
    four, eight = (bool(fields.get(key)) for key in ("load_in_4bit", "load_in_8bit"))
    if method not in (None, "bitsandbytes") or four == eight:
        raise ModelError(
            f"{name} is stored quantised by {method or 'an unnamed method'}, which Graft cannot read.",
            meaning="It reads what bitsandbytes writes (nf4, fp4, int8), FP8 with a scale for 128 x 128 "
            "values (DeepSeek), and what save_base writes.",
            fix=_READ_ELSEWHERE,
        )
    kind = "int8" if eight else str(fields.get("bnb_4bit_quant_type", "fp4"))
    if kind not in KINDS:
        raise ModelError(f"{name} names the 4-bit type {kind!r}, which does not exist.", fix=_READ_ELSEWHERE)
    return kind


def check_head(head: str) -> None:
    """Refuse a kind that embeddings cannot be stored in, before anything is loaded.

    Raises:
        ConfigError: it is none of `HEADS`.
    """
    if head not in HEADS:
        raise ConfigError(
            f"head={head!r} is no way to store embeddings{suggest(head, HEADS) or '.'}",
            fix=f"Use one of {', '.join(HEADS)}.",
        )


def require_equal(stored: str, wanted: Scheme | None, name: str) -> None:
    """A checkpoint that is quantised stays what it is.

    Raises:
        ConfigError: another kind is wanted.
    """
    if wanted is not None and wanted.kind != stored:
        raise ConfigError(
            f"{name} is stored as {stored}; quantization={wanted.kind!r} asks for another kind.",
            meaning="Quantising rounded weights once more adds a second error to the first.",
            fix=f"Leave quantization out to use it as {stored}, or name its 16-bit original.",
        )


def quantization_config(scheme: Scheme, dtype: str, kept: list[str]) -> dict[str, Any]:
    """What config.json says of a model saved in `scheme`; `kept` are the linear layers that stay dense."""
    if scheme.kind == "fp8":
        return {"quant_method": METHOD, "kind": "fp8", "modules_to_not_convert": kept}
    if scheme.kind == "fp8_block":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [TILE, TILE],
            "modules_to_not_convert": kept,
        }
    common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": kept}
    if scheme.kind == "int8":
        return {**common, "load_in_8bit": True, "load_in_4bit": False}
    return {
        **common,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": scheme.kind,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }
