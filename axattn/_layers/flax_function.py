"""The common body of both functions that have the signature of Flax's ``attention_fn``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp

from axattn._attention import dot_product_attention
from axattn._dtypes import choose_accumulator
from axattn._layers.masking import cast_mask
from axattn._layers.weights import compute_attention_weights, sum_values
from axattn._options import AttentionOptions
from axattn._typing import Array, Float, present


def attend_with_flax_hooks(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K h"],
    options: AttentionOptions,
    *,
    deterministic: bool,
    attend: Callable[..., Array],
    sow: Callable[[Array], object] | None,
    qk_einsum: Callable[..., Array] | None = None,
    value_einsum: Callable[..., Array] | None = None,
) -> Float[Array, "*batch T N h"]:
    """Attend on arrays of one dtype, with masks of any dtype and with Flax's hooks.

    Args:
      query, key, value: as for `axattn.dot_product_attention`.
      options: as there, but for the mask: an `axattn.Mask`, or an array of any dtype (Flax's
        helpers make float32) that broadcasts to ``[..., N, T, S]``; nonzero: attend.
        ``is_projected`` is set, since layers project the query and the output.
      deterministic: no dropout, whatever the rate is.
      attend: `axattn.dot_product_attention`, or a function with its arguments.
      sow: called with the weights ``[..., N, T, S]`` before dropout, in float32 or wider.
      qk_einsum, value_einsum: both or neither, in place of ``jnp.einsum``. With them all weights
        are written out, and no implementation but "xla" can be asked for.

    Returns:
      ``[..., T, N, h]`` in the query's dtype.

    Raises:
      NotImplementedError: einsums with another implementation, or with another ``attend``.
    """
    rate = 0.0 if deterministic else options.dropout_rate
    options = dataclasses.replace(
        options, mask=cast_mask(cast(Any, options.mask)), dropout_rate=rate, is_projected=True
    )
    if sow is None and qk_einsum is None:
        return attend(query, key, value, **options.as_keywords())

    plain_einsum = functools.partial(
        jnp.einsum,
        precision=options.precision,
        preferred_element_type=choose_accumulator(query.dtype),
    )
    compute_weights = functools.partial(
        compute_attention_weights, query, key, value, einsum=qk_einsum or plain_einsum
    )
    if sow is not None:
        sow(compute_weights(dataclasses.replace(options, dropout_rate=0.0)))
    if qk_einsum is None:
        return attend(query, key, value, **options.as_keywords())

    if options.implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation={options.implementation!r} has no place for einsum hooks; leave it at "
            "None"
        )
    if attend is not dot_product_attention:
        raise NotImplementedError(f"attend={attend!r} has no place for einsum hooks")
    weights = compute_weights(options).astype(query.dtype)
    return sum_values(weights, value, einsum=present(value_einsum)).astype(query.dtype)
