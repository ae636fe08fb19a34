"""The attention call: one value that travels from the public function to an implementation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax

from axattn import _quantization
from axattn._dtypes import choose_accumulator
from axattn._jax_compat import is_known
from axattn._mask_parts import BlockLayout, Span
from axattn._masks import Mask, fill_positions, take_mask_heads, take_mask_row
from axattn._stored import KVView
from axattn._typing import present

# Up to this many query rows (T * N) a call is a decode step.
DECODE_ROWS = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "query",
        "key",
        "value",
        "stored",
        "bias",
        "mask",
        "sinks",
        "traced_scale",
        "alibi_slopes",
        "q_positions",
        "kv_positions",
        "dropout_key",
        "first_row",
        "first_head",
    ),
    meta_fields=(
        "scale",
        "logits_soft_cap",
        "dropout_rate",
        "broadcast_dropout",
        "dropout_heads",
        "precision",
        "return_residual",
        "kv_split_size",
        "heads_first",
    ),
)
@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A validated call in canonical shapes; a pytree, so that it passes through jit, vmap and VJPs.

    Letters: B batch, T query length, S key/value length, N query heads, K key/value
    heads, G = N // K, H key head size, h value head size.
    """

    query: jax.Array  # [B, T, N, H]
    key: jax.Array | None  # [B, S, K, H]
    value: jax.Array | None  # [B, S, K, h]
    stored: KVView | None = None  # a cache, instead of key and value
    bias: jax.Array | None = None  # [B or 1, N or 1, T or 1, S or 1]
    mask: Mask = Mask()  # normalized
    sinks: jax.Array | None = None  # float32 [N]
    traced_scale: jax.Array | None = None  # float32 [], a factor besides ``scale``
    alibi_slopes: jax.Array | None = None  # float32 [B or 1, N]
    q_positions: jax.Array | None = None  # int32 [B or 1, T]
    kv_positions: jax.Array | None = None  # int32 [B or 1, S]
    dropout_key: jax.Array | None = None  # uint32 [2]
    # The index of row 0 and of query head 0 in the whole call, and the query heads that it has:
    # a slice of the batch or of the heads draws the same dropout bits.
    first_row: Any = 0
    first_head: Any = 0
    scale: float = 1.0
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False
    dropout_heads: int | None = None  # None: those of this call
    precision: Any = None
    return_residual: bool = False
    kv_split_size: int | None = None  # keys per part of a decode step; None: as fits the batch
    # The query comes from a projection and the output goes into one. These can write and read
    # [B, N, T, H] at no cost, which TPU kernels prefer. Other arrays lie as [B, T, N, H].
    heads_first: bool = False

    @property
    def is_decode_step(self) -> bool:
        """Whether the query has few rows, so that the call is a read of its keys and values."""
        return is_known(lambda: self.q_len * self.num_heads <= DECODE_ROWS, otherwise=False)

    @property
    def is_empty(self) -> bool:
        """Whether there is no row of the batch, no query or no key."""
        return 0 in (self.batch, self.q_len, self.kv_len)

    @property
    def may_be_empty(self) -> bool:
        """Whether a size is 0, or may be when a symbolic size is known."""

        def is_positive(size: int) -> bool:
            return is_known(lambda: size >= 1, otherwise=False)

        return not all(map(is_positive, (self.batch, self.q_len, self.kv_len)))

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def q_len(self) -> int:
        return self.query.shape[1]

    @property
    def kv_len(self) -> int:
        return present(self.key).shape[1] if self.stored is None else self.stored.kv_len

    @property
    def num_heads(self) -> int:
        return self.query.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return present(self.key).shape[2] if self.stored is None else self.stored.num_kv_heads

    @property
    def group(self) -> int:
        """Query heads per key/value head, G."""
        return self.num_heads // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def value_head_dim(self) -> int:
        if self.stored is None:
            return present(self.value).shape[3]
        return self.stored.value_head_dim

    @property
    def product_dtype(self) -> Any:
        """The dtype in which keys and values enter the matrix products."""
        if self.stored is None:
            return self.query.dtype
        return _quantization.get_product_dtype(self.stored.dtype, self.query.dtype)

    @property
    def accumulator_dtype(self) -> Any:
        """float32 for every input; float64 only for float64 inputs."""
        return choose_accumulator(self.query.dtype)

    def spans(self) -> tuple[Span, Span]:
        """Return all query slots and all key slots, with their positions."""
        layout = self.layout(self.q_len, self.kv_len)
        return (
            Span(0, self.q_len, layout.q_positions),
            Span(0, self.kv_len, layout.kv_positions),
        )

    def layout(self, block_q: int, block_kv: int) -> BlockLayout:
        return BlockLayout(
            self.q_len,
            self.kv_len,
            block_q,
            block_kv,
            fill_positions(self.q_positions, self.q_len),
            fill_positions(self.kv_positions, self.kv_len),
        )

    def row(self, b: int | jax.Array) -> AttentionCall:
        """Return batch row ``b`` as a call with a batch of one."""

        def take(array):
            if array is None or array.shape[0] == 1:
                return array
            return lax.dynamic_slice_in_dim(array, b, 1, 0)

        return dataclasses.replace(
            self,
            query=take(self.query),
            key=take(self.key),
            value=take(self.value),
            stored=None if self.stored is None else self.stored.row(b),
            bias=take(self.bias),
            mask=take_mask_row(self.mask, b),
            alibi_slopes=take(self.alibi_slopes),
            q_positions=take(self.q_positions),
            kv_positions=take(self.kv_positions),
            first_row=self.first_row + b,
        )

    def heads(self, first: int | jax.Array, count: int) -> AttentionCall:
        """Return the call of ``count`` key/value heads from ``first`` on; arrays only, no cache."""
        start, size = first * self.group, count * self.group

        def take(array, axis, start=start, size=size):
            if array is None or array.shape[axis] == 1:
                return array
            return lax.dynamic_slice_in_dim(array, start, size, axis)

        return dataclasses.replace(
            self,
            query=take(self.query, 2),
            key=take(self.key, 2, first, count),
            value=take(self.value, 2, first, count),
            bias=take(self.bias, 1),
            mask=take_mask_heads(self.mask, start, size),
            sinks=take(self.sinks, 0),
            alibi_slopes=take(self.alibi_slopes, 1),
            first_head=self.first_head + start,
            dropout_heads=self.dropout_heads or self.num_heads,
        )
