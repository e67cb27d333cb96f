"""Shapes of the models that benchmarks write: the widths of known models, random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Shape:
    """A decoder of `transformers`: how many layers, how wide."""

    hidden: int
    layers: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int = 32000
    head_dim: int = 64
    tied: bool = False
    """Whether the output head is the embedding."""
    family: Literal["llama", "qwen3"] = "llama"

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer: [out, in]."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def linear(self) -> int:
        """Parameters of all linear layers, without the output head."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices().values())

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All but the norms.

        >>> round(SHAPES["8b"].parameters / 1e9, 2)
        8.03
        """
        return self.linear + self.head * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer."""
        return self.layers * rank * sum(rows + columns for rows, columns in self.matrices().values())

    def config(self, length: int) -> Any:
        """The `transformers` configuration, for rows of up to `length` tokens."""
        from transformers import LlamaConfig, Qwen3Config

        kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[self.family]
        return kind(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=length,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            dtype="bfloat16",
        )


def llama(hidden: int, layers: int, inner: int, vocabulary: int = 32000) -> Shape:
    """A Llama whose heads are 64 wide and have keys of their own."""
    return Shape(hidden, layers, inner, hidden // 64, hidden // 64, vocabulary)


SHAPES = {
    "tiny": llama(128, 2, 384, 4096),
    "0.02b": llama(384, 4, 1056, 8192),
    "0.05b": llama(512, 8, 1408, 16000),
    "0.13b": llama(768, 12, 2048),
    "0.17b": llama(1024, 8, 2816),
    "0.5b": llama(1280, 20, 3456),
    "qwen3-0.6b": Shape(1024, 28, 3072, 16, 8, 151936, 128, tied=True, family="qwen3"),
    "qwen3-1.7b": Shape(2048, 28, 6144, 16, 8, 151936, 128, tied=True, family="qwen3"),
    "8b": Shape(4096, 32, 14336, 32, 8, 128256, 128),
    "70b": Shape(8192, 80, 28672, 64, 8, 128256, 128),
}
"""By name; the numbers of the first six say their parameters, the last four are the published models."""


def shape_of(name: str) -> Shape:
    """A shape by its name, or a Llama as hidden x layers x feed-forward x vocabulary.

    >>> shape_of("1024x8x2816x32000") == SHAPES["0.17b"]
    True

    Raises:
        SystemExit: it is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    sizes = name.split("x")
    if len(sizes) != 4 or not all(size.isdigit() for size in sizes):
        raise SystemExit(f"No shape {name}: choose one of {', '.join(SHAPES)}, or write 1024x8x2816x32000")
    return llama(*map(int, sizes))
