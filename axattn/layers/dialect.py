"""The common body of the two functions that speak Flax's ``attention_fn`` dialects."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from axattn._typing import Array, Float, present
from axattn.attention import dot_product_attention
from axattn.dtypes import accumulator
from axattn.layers.masking import as_given
from axattn.layers.weights import attention_weights, weighted_sum
from axattn.masks import Mask


def flax_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K h"],
    *,
    mask: Array | Mask | None,
    dropout_rate: float,
    deterministic: bool,
    implementation,
    attend: Callable[..., Array],
    sow: Callable[[Array], object] | None,
    qk_einsum: Callable[..., Array] | None = None,
    value_einsum: Callable[..., Array] | None = None,
    **options,
) -> Float[Array, "*batch T N h"]:
    """Attention on arrays of one dtype, with masks of any dtype and with Flax's hooks.

    Args:
      query, key, value: as for `axattn.dot_product_attention`.
      mask: an `axattn.Mask`, or an array that broadcasts to [..., N, T, S] in which everything but
        zero says "attend"; those that Flax's helpers make are float32.
      deterministic: no dropout, whatever ``dropout_rate`` is.
      attend: `axattn.dot_product_attention`, or what takes its arguments.
      sow: called with the weights [..., N, T, S] before dropout, in float32 or wider.
      qk_einsum, value_einsum: both or neither, in place of ``jnp.einsum``. With them all weights
        are written out, and no implementation but "xla" can be asked for.
      options: the other arguments of `axattn.dot_product_attention`.

    Returns:
      [..., T, N, h] in the query's dtype.
    """
    mask = as_given(mask)
    dropout_rate = 0.0 if deterministic else dropout_rate
    precision = options.pop("precision", None)
    plain_einsum = functools.partial(
        jnp.einsum,
        precision=precision,
        preferred_element_type=accumulator(query.dtype),
    )
    weights_of = functools.partial(
        attention_weights, query, key, value, mask=mask, einsum=qk_einsum or plain_einsum, **options
    )

    if sow is not None:
        sow(weights_of())
    if qk_einsum is None:
        return attend(
            query,
            key,
            value,
            mask=mask,
            dropout_rate=dropout_rate,
            implementation=implementation,
            precision=precision,
            **options,
        )

    if implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation={implementation!r} has no place for einsum hooks; leave it at None"
        )
    if attend is not dot_product_attention:
        raise NotImplementedError(f"attend={attend!r} has no place for einsum hooks")
    weights = weights_of(dropout_rate=dropout_rate)
    out = weighted_sum(weights.astype(query.dtype), value, einsum=present(value_einsum))
    return out.astype(query.dtype)
