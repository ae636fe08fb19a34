"""`axattn.dot_product_attention` as an ``attention_fn`` of Linen's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.attention import dot_product_attention as flax_dot_product_attention
from flax.linen.dtypes import promote_dtype

from axattn import _attention
from axattn._jax_compat import compute_einsum
from axattn._layers.flax_function import attend_with_flax_hooks
from axattn._masks import Mask
from axattn._options import AttentionOptions
from axattn._typing import Array, ArrayLike, Float, Implementation, Integer, Precision, present

# The options that Flax's own function has.
_FLAX_OPTIONS = ("bias", "mask", "broadcast_dropout", "dropout_rng", "dropout_rate", "precision")


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
    module: nn.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    *,
    is_causal: bool = False,
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
    """Call `axattn.dot_product_attention` by the signature of ``flax.linen``'s ``attention_fn``.

    The positional arguments are those of ``flax.linen.dot_product_attention``, the others those of
    `axattn.dot_product_attention`. It differs from Flax's function in what it can do faster or
    better: K may divide N, the softmax is always float32, rows with nothing to attend to are zeros
    (Flax: the mean of all values), the result has the dtype of the query, and dropout draws other
    bits from the same key.

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
      dtype: to which the three are promoted; without it, to one common dtype.
      precision: of the matrix products.
      module: sows the weights ``[..., N, T, S]`` as ``attention_weights`` in ``intermediates``:
        float32 with ``force_fp32_for_softmax``, else in the dtype of the query. This writes them
        out, but does not change the result.
      force_fp32_for_softmax: of what is sown; the softmax always is float32.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: Flax's hooks for
        quantized training. With one of them all weights are written out.
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
      ValueError: one of the two einsums without the other, or with ``precision`` or
        ``einsum_dot_general``; and as `axattn.dot_product_attention`.
      TypeError: as `axattn.dot_product_attention`.
      NotImplementedError: what Flax's hooks and complex numbers do not go with; and as
        `axattn.dot_product_attention`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from axattn import linen
      >>> x = jnp.ones((1, 8, 32))
      >>> layer = nn.MultiHeadAttention(num_heads=4, attention_fn=linen.dot_product_attention)
      >>> out, params = layer.init_with_output(jax.random.key(0), x)  # Flax's class, axattn inside
      >>> out.shape
      (1, 8, 32)
    """
    if (qk_attn_weights_einsum is None) != (attn_weights_value_einsum is None):
        raise ValueError(
            "qk_attn_weights_einsum and attn_weights_value_einsum must be given together, got "
            f"{qk_attn_weights_einsum} and {attn_weights_value_einsum}"
        )
    if qk_attn_weights_einsum is not None and (precision or einsum_dot_general):
        raise ValueError(
            "qk_attn_weights_einsum and attn_weights_value_einsum exclude precision and "
            f"einsum_dot_general, got {precision} and {einsum_dot_general}"
        )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
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
    if jnp.iscomplexobj(query):
        # Flax's layers take complex numbers; ours leave them to Flax's function.
        asked = [name for name in options.as_keywords() if name not in _FLAX_OPTIONS]
        if asked:
            raise NotImplementedError(f"complex query, key and value do not go with {asked}")
        return flax_dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            broadcast_dropout,
            dropout_rng,
            dropout_rate,
            deterministic,
            dtype,
            cast(Any, precision),  # Flax's type of it is narrower than what it takes
            module,
            force_fp32_for_softmax,
            einsum_dot_general,
            qk_attn_weights_einsum,
            attn_weights_value_einsum,
        )
    if einsum_dot_general is not None:
        einsum = compute_einsum(einsum_dot_general, precision=precision)
        qk_attn_weights_einsum = attn_weights_value_einsum = einsum

    def sow(weights):
        weights = weights if force_fp32_for_softmax else weights.astype(query.dtype)
        present(module).sow("intermediates", "attention_weights", weights)

    return attend_with_flax_hooks(
        query,
        key,
        value,
        options,
        deterministic=deterministic,
        attend=attend,
        sow=None if module is None else sow,
        qk_einsum=qk_attn_weights_einsum,
        value_einsum=attn_weights_value_einsum,
    )
