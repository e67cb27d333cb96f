"""Roles of modules, read off the structure of any `transformers` model.

Architectures say what their layers are: attention lies below a component whose name contains `attn` or
`attention`, what computes queries, keys and values is named after them, and the rest of a numbered block is
its feed-forward part, which ends with the layer that leads back to the width of the block. That holds for
every decoder, encoder and encoder-decoder that the tests build, so there is no table to keep up with new
models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from graftlm.methods.site import Site, base_modules
from graftlm.quant.linear import QuantisedLinear

ROLES = (
    "all-linear",
    "attention",
    "mlp",
    *("queries", "keys", "values", "attention-output", "mlp-input", "mlp-output"),
)
"""A linear layer that computes several of queries, keys and values has each of these roles."""

Stack = Literal["encoder", "decoder"]

BLOCK = re.compile(r"^(?P<block>(?:.*?\.)?\d+)\.(?P<inside>.+)$")
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
"""Routers choose experts; adapting them unless asked unbalances the choice."""
INSIDE_ATTENTION = {
    "queries": re.compile(r"^(w?q(_|$)|query|c_attn|in_proj|w_?qkv|qkv)", re.IGNORECASE),
    "keys": re.compile(r"^(w?kv?(_|$)|key|c_attn|in_proj|w_?qkv|qkv|query_key)", re.IGNORECASE),
    "values": re.compile(r"^(w?k?v(_|$)|value|c_attn|in_proj|w_?qkv|qkv|(query_)?key_value)", re.IGNORECASE),
}
"""What a layer computes, by how its name begins: `k_proj`, `key`, `k_lin`; fused `qkv_proj`, `c_attn`."""


@dataclass(frozen=True)
class Attention:
    """Paths of the linear layers of one attention."""

    path: str
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    output: str | None
    """The layer that ends it."""
    is_cross: bool
    """It attends to the output of the encoder."""


@dataclass(frozen=True)
class FeedForward:
    """Paths of the linear layers that begin and that end one feed-forward part."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Block:
    """One numbered block of a model. Encoder blocks are counted first, decoder blocks go on from there."""

    path: str
    number: int
    stack: Stack | None
    """Which half of an encoder-decoder it belongs to; None elsewhere."""
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    """One; none where experts are no linear layers, several where each expert has linear layers."""
    mixture: str | None
    """The module that holds the experts and ends the feed-forward part, in a block that has experts."""


def roles_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Module paths by role, in model order.

    `all-linear` is every linear layer of the backbone: the output head and classification heads are not part
    of it, and neither are routers of experts.
    """
    found: dict[str, set[str]] = {role: set() for role in ROLES}
    modules = base_modules(model)
    paths = _linear_paths(model, modules)
    for path in paths:
        block = BLOCK.match(path)
        if block:
            found["attention" if ATTENTION.search(block["inside"]) else "mlp"].add(path)
    found["all-linear"] = set(paths)
    for part in _blocks(paths, modules):
        for attention in part.attentions:
            for role in INSIDE_ATTENTION:
                found[role].update(getattr(attention, role))
            found["attention-output"].update([attention.output] if attention.output else [])
        for feed_forward in part.feed_forwards:
            found["mlp-input"].update(feed_forward.inputs)
            found["mlp-output"].add(feed_forward.output)
    return {role: tuple(path for path in paths if path in members) for role, members in found.items()}


def blocks_of(model: nn.Module) -> tuple[Block, ...]:
    """The numbered blocks that have linear layers, and what those are for."""
    modules = base_modules(model)
    return _blocks(_linear_paths(model, modules), modules)


def is_linear(module: nn.Module) -> bool:
    """Linear layers that are called. `nn.MultiheadAttention` only reads the weight of the one it has."""
    is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
    return isinstance(module, nn.Linear | Conv1D | QuantisedLinear) and is_called


def _linear_paths(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Linear layers below the backbone, or below the model where it has no separate backbone."""
    backbone = getattr(model, "base_model_prefix", "")
    prefix = f"{backbone}." if backbone and isinstance(getattr(model, backbone, None), nn.Module) else ""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = head.base_layer if isinstance(head, Site) else head
    return [
        path
        for path, module in modules.items()
        if is_linear(module)
        and module is not head
        and path.startswith(prefix)
        and not ((block := BLOCK.match(path)) and ROUTER.search(block["inside"]))
    ]


def _blocks(paths: Iterable[str], modules: dict[str, nn.Module]) -> tuple[Block, ...]:
    by_block: dict[str, list[str]] = {}
    for path in paths:
        if block := BLOCK.match(path):
            by_block.setdefault(block["block"], []).append(path)
    mixtures = {
        block["block"]: path.rpartition(".")[0]
        for path in modules
        if path.endswith(".experts") and (block := BLOCK.match(path))
    }
    stacks = {path: _stack(path) for path in by_block}
    is_seq2seq = {"encoder", "decoder"} <= set(stacks.values())
    ordered = sorted(by_block, key=lambda path: stacks[path] == "decoder") if is_seq2seq else list(by_block)
    return tuple(
        _block(
            path,
            number,
            stacks[path] if is_seq2seq else None,
            {inner: modules[inner] for inner in by_block[path]},
            mixtures.get(path),
        )
        for number, path in enumerate(ordered)
    )


def _stack(path: str) -> Stack | None:
    names = path.split(".")
    return "decoder" if "decoder" in names else "encoder" if "encoder" in names else None


def _block(
    path: str, number: int, stack: Stack | None, linear: dict[str, nn.Module], mixture: str | None
) -> Block:
    attentions: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for inner in linear:
        inside = inner.removeprefix(f"{path}.")
        if ATTENTION.search(inside):
            attentions.setdefault(f"{path}.{_attention_path(inside)}", []).append(inner)
        else:
            expert = BLOCK.match(inside) if mixture else None
            others.setdefault(expert["block"] if expert else "", []).append(inner)
    found = (_attention(where, members) for where, members in attentions.items())
    parts = (_feed_forward(members, linear) for members in others.values())
    return Block(
        path=path,
        number=number,
        stack=stack,
        attentions=tuple(attention for attention in found if attention.keys),
        feed_forwards=tuple(part for part in parts if part),
        mixture=mixture,
    )


def _attention_path(inside: str) -> str:
    names = inside.split(".")
    first = next(i for i, name in enumerate(names) if ATTENTION.search(name))
    return ".".join(names[: max(1, min(first + 1, len(names) - 1))])


def _attention(path: str, members: list[str]) -> Attention:
    does = {
        role: tuple(inner for inner in members if expression.search(_leaf(inner)))
        for role, expression in INSIDE_ATTENTION.items()
    }
    does = {role: _last_of_factored(found) for role, found in does.items()}
    only_queries = tuple(inner for inner in does["queries"] if inner not in does["keys"])
    readers = {inner for inner in members if any(e.search(_leaf(inner)) for e in INSIDE_ATTENTION.values())}
    rest = [inner for inner in members if inner not in readers]
    return Attention(
        path=path,
        queries=only_queries or does["queries"],
        keys=does["keys"],
        values=does["values"],
        output=rest[-1] if rest else None,
        is_cross=bool(CROSS.search(path)),
    )


def _last_of_factored(found: tuple[str, ...]) -> tuple[str, ...]:
    """Of `kv_a_proj` and `kv_b_proj` (low rank, one after the other) it is the second that gives the keys."""
    factors = [inner for inner in found if re.search(r"_[ab](_|$)", _leaf(inner))]
    return tuple(inner for inner in found if inner not in factors[:-1])


def _feed_forward(members: list[str], linear: dict[str, nn.Module]) -> FeedForward | None:
    """The end leads back to the width of the block; where all widths are equal it is the last layer."""
    shapes = {inner: shape_of(linear[inner]) for inner in members}
    if len(members) < 2:
        return None
    width = shapes[members[0]][1]
    ends = [inner for inner in members[1:] if shapes[inner][0] == width]
    if not ends:
        return None
    narrowing = [inner for inner in ends if shapes[inner][1] != width]
    end = (narrowing or ends)[-1]
    begins = [inner for inner in members[: members.index(end)] if shapes[inner][1] == width]
    beside = [inner for inner in begins if inner.rpartition(".")[0] == end.rpartition(".")[0]]
    return FeedForward(inputs=tuple(beside or begins), output=end)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) by the layer's own word, which also holds where the weight is stored packed."""
    if isinstance(module, nn.Linear | QuantisedLinear):
        return module.out_features, module.in_features
    columns, rows = module.get_parameter("weight").shape
    return rows, columns


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
