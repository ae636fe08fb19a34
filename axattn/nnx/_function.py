"""`axattn.dot_product_attention` as an ``attention_fn`` of NNX's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype

from axattn import _attention
from axattn._layers.flax_function import attend_with_flax_hooks
from axattn._masks import Mask
from axattn._options import AttentionOptions
from axattn._typing import Array, ArrayLike, Float, Implementation, Integer, Precision, present


def dot_product_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K h"],
    bias: Float[Array, "..."] | None = None,
    mask: Array | Mask | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Precision | None = None,
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = flax_promote_dtype,
    is_causal: bool = False,
    *,
    scale: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    query_segment_ids: Integer[Array, "*batch T"] | None = None,
    key_value_segment_ids: Integer[Array, "*batch S"] | None = None,
    q_offset: Integer[Array, "..."] | int | None = None,
    q_positions: Integer[Array, "..."] | None = None,
    kv_positions: Integer[Array, "..."] | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    attend: Callable[..., Array] = _attention.dot_product_attention,
) -> Float[Array, "*batch T N h"]:
    """Call `axattn.dot_product_attention` by the signature of ``flax.nnx``'s ``attention_fn``.

    The positional arguments are those of ``flax.nnx.dot_product_attention``, the others those of
    `axattn.dot_product_attention`. It differs from Flax's function in that dropout and
    ``precision`` do not write out the weights, that the softmax is always float32, that rows with
    nothing to attend to are zeros, and that dropout draws other bits from the same key.

    Args:
      query, key, value: ``[..., T, N, H]``, ``[..., S, K, H]`` and ``[..., S, K, h]``.
      bias: added to the logits, broadcastable to ``[..., N, T, S]``.
      mask: an `axattn.Mask`, or an array of any dtype (nonzero: attend) broadcastable to
        ``[..., N, T, S]``. One of other numbers than 0 and 1 is a bias, and refused where its
        numbers are known: not under jit.
      broadcast_dropout: one T x S dropout pattern for all batches and heads.
      dropout_rng: a JAX key, ``[]`` or uint32 ``[2]``; needed where something is dropped.
      dropout_rate: share of the weights that is dropped, in [0, 1).
      deterministic: no dropout.
      precision: of the matrix products.
      dtype, promote_dtype: ``promote_dtype((query, key, value), dtype=dtype)`` brings the three to
        one dtype.
      module: sows the weights ``[..., N, T, S]`` as ``attention_weights`` (``nnx.Intermediate``) in
        the dtype of the query. This writes them out, but does not change the result.
      is_causal: no query sees a later key.
      scale: of the logits, a number or an array ``[]``; 1 / sqrt(H) by default.
      local_window_size: (left, right), inclusive, or one int for both.
      logits_soft_cap: logits become cap * tanh(logits / cap).
      sinks: ``[N]``, one extra logit per head in the softmax's denominator.
      query_segment_ids, key_value_segment_ids: int ``[..., T]`` and ``[..., S]``: tokens attend to
        those of the same segment only.
      q_offset: int, or int ``[...]``: position of the first query, which moves causal masks and
        windows.
      q_positions, kv_positions: int ``[T]`` or ``[..., T]``, and ``[S]`` or ``[..., S]``.
      implementation: as in `axattn.dot_product_attention`.
      attend: a function with the arguments of `axattn.dot_product_attention`, which gets those
        that are not at their defaults. Over a mesh:
        ``functools.partial(axattn.parallel.attention, axes=axes)``.

    Returns:
      ``[..., T, N, h]`` in the query's dtype.

    Raises:
      ValueError, TypeError, NotImplementedError: as `axattn.dot_product_attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import axattn.nnx
      >>> layer = nnx.MultiHeadAttention(  # Flax's class, axattn inside
      ...     4, 32, num_kv_heads=2, attention_fn=axattn.nnx.dot_product_attention,
      ...     decode=False, rngs=nnx.Rngs(0),
      ... )
      >>> layer(jnp.ones((1, 8, 32))).shape
      (1, 8, 32)
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)

    def sow(weights):
        present(module).sow(nnx.Intermediate, "attention_weights", weights.astype(query.dtype))

    options = AttentionOptions(
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        implementation=implementation,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        q_offset=q_offset,
        q_positions=q_positions,
        kv_positions=kv_positions,
        precision=precision,
    )
    return attend_with_flax_hooks(
        query,
        key,
        value,
        options,
        deterministic=deterministic,
        attend=attend,
        sow=None if module is None else sow,
    )
