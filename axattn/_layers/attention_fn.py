"""Calls of whatever function a user gave as ``attention_fn``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from axattn._layers.masking import cast_mask, materialize_mask
from axattn._masks import Mask
from axattn._typing import Array, Float, Integer

# Names of arguments that are options of the layers under another name.
_LAYER_NAMES = {
    "local_window_size": "window",
    "query_segment_ids": "segment_ids",
    "key_value_segment_ids": "kv_segment_ids",
}


def _describe_function(fn: Callable) -> str:
    """Return a function's name for error messages."""
    fn = getattr(fn, "func", fn)  # functools.partial
    return getattr(fn, "__qualname__", None) or repr(fn)


def call_attention(
    attention_fn: Callable[..., Array],
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K h"],
    flax_kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    is_causal: bool,
    decode_index: Integer[Array, ""] | None = None,
    only_known: bool = False,
) -> Float[Array, "*batch T N h"]:
    """Call ``attention_fn`` with Flax's arguments and with the options that are asked for.

    Args:
      attention_fn: Flax's, ours or the user's.
      query, key, value: as the function takes them.
      flax_kwargs: the arguments that Flax's own layer would pass.
      options: more, by the names of `axattn.dot_product_attention`. Each must be honoured.
      is_causal: whether to ask for a causal mask.
      decode_index: int ``[]``, where ``key`` and ``value`` are a cache that is filled up to the
        one query token, which is at this index. A function without ``q_offset`` gets a mask array.
      only_known: drop those of ``flax_kwargs`` that the function does not name (Linen does).

    Returns:
      ``[..., T, N, h]``.

    Raises:
      ValueError: the function takes no argument for one of ``options``.
    """
    parameters = inspect.signature(attention_fn).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    flax_kwargs, options = dict(flax_kwargs), dict(options)

    if "q_offset" in parameters:
        if decode_index is not None:
            options["q_offset"], is_causal = decode_index, True
    else:
        mask, positions = flax_kwargs.get("mask"), None
        structure = mask if isinstance(mask, Mask) else None
        if decode_index is not None:
            # The query is the newest token: slots after it are not filled yet.
            positions, is_causal = decode_index[None], False
            structure = (structure or Mask()) & Mask.causal()
            window = options.pop("local_window_size", None)
            if window is not None:
                structure &= Mask.window(
                    window[0] if isinstance(window, (tuple, list)) else window, 0
                )
        if structure is not None:
            array = materialize_mask(
                structure,
                query.shape[:-3],
                query.shape[-3],
                key.shape[-3],
                q_positions=positions,
            )
            if not (mask is None or isinstance(mask, Mask)):
                own: Any = cast_mask(mask)
                missing = tuple(range(array.ndim - own.ndim))
                array &= jnp.expand_dims(own, missing)
            flax_kwargs["mask"] = array
    if is_causal:
        options["is_causal"] = True

    if "is_projected" in parameters:
        options["is_projected"] = True

    for name in options:
        if name not in parameters and not takes_any:
            layer_name = _LAYER_NAMES.get(name, name)
            raise ValueError(
                f"{layer_name} was asked for, but attention_fn={_describe_function(attention_fn)} "
                f"takes no argument {name!r}; use axattn's dot_product_attention, or a function "
                "that does"
            )
    if flax_kwargs.get("deterministic") and "deterministic" not in parameters and not takes_any:
        flax_kwargs["dropout_rate"] = 0.0  # the same, for a function that has no `deterministic`
    if only_known:
        flax_kwargs = {name: v for name, v in flax_kwargs.items() if name in parameters}
    return attention_fn(query, key, value, **{**flax_kwargs, **options})
