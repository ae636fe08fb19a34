"""What a key/value cache takes, worked out by hand: nothing here asks the caches themselves."""

from __future__ import annotations

import dataclasses

# Bits per element; and the quantized ones have a float32 scale per vector besides.
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, "int4": 4}
QUANTIZED = ("int8", "float8_e4m3fn", "int4")
SCALE_BYTES = 4

KINDS = ("dense", "paged")


@dataclasses.dataclass(frozen=True)
class CacheCase:
    """A kind of cache at a model's shape.

    Attributes:
      kind: ``"dense"`` or ``"paged"``.
      dtype: of the cache.
      layers, heads, kv_heads, head_dim: of the model.
      batch, tokens: rows, and tokens per row.
      page_size: tokens per page of a paged cache.
    """

    kind: str
    dtype: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    page_size: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; it takes {', '.join(KINDS)}")
        if self.dtype not in BITS:
            raise ValueError(f"dtype {self.dtype!r} is unknown; it takes {', '.join(BITS)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, {self.heads}, got {self.kv_heads}")
        if self.dtype == "int4" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for int4, got {self.head_dim}")

    @property
    def name(self) -> str:
        return f"{self.kind} {self.dtype}, K={self.kv_heads}"

    @property
    def pages_per_row(self) -> int:
        return -(-self.tokens // self.page_size)

    @property
    def slots(self) -> int:
        """Tokens that there is room for, in all rows: whole pages."""
        row = self.tokens if self.kind == "dense" else self.pages_per_row * self.page_size
        return self.batch * row


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Scales included; nothing else is counted (a block table takes 4 bytes per page).

    Attributes:
      token_head: keys and values of one token, one head, one layer.
      token: of one token, all K heads, one layer.
      keys, values: of all rows, one layer.
      layer: both.
      total: of all layers.
    """

    token_head: int
    token: int
    keys: int
    values: int
    layer: int
    total: int


def vector_bytes(dtype: str, head_dim: int) -> int:
    """The key, or the value, of one token and head."""
    return BITS[dtype] * head_dim // 8 + (SCALE_BYTES if dtype in QUANTIZED else 0)


def analytical(case: CacheCase) -> Bytes:
    """What the case takes."""
    vector = vector_bytes(case.dtype, case.head_dim)
    one = case.slots * case.kv_heads * vector
    return Bytes(
        token_head=2 * vector,
        token=2 * vector * case.kv_heads,
        keys=one,
        values=one,
        layer=2 * one,
        total=2 * one * case.layers,
    )


def heads_name(heads: int, kv_heads: int) -> str:
    """MHA, GQA or MQA."""
    return "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"
