"""One step of a layer, the same in Linen and NNX: inputs, rotation, a cache, attention.

Linen and NNX add what differs between them: parameters, projections and norms, the key of dropout,
and the variables of Flax's cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from axattn._layers.attention_fn import call_attention
from axattn._layers.config import AttentionConfig, drop_unset
from axattn._layers.flax_cache import FlaxCache, check_token, write_token
from axattn._layers.masking import cast_mask
from axattn._layers.rope import rotate_query_key
from axattn._masks import Mask
from axattn._typing import Array, ArrayLike, Float, Integer
from axattn.cache import Cache

Inputs = tuple[Float[Array, "*batch T E"], Float[Array, "*batch S E"], Float[Array, "*batch S E"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCall:
    """Arguments of a layer's call that both dialects have; None: not given.

    Attributes:
      inputs: ``[..., T, E]`` of queries and ``[..., S, E]`` of keys and values, or one for all.
      cache: one of `axattn.cache`.
      deterministic: nothing is dropped, whatever the layer's rate is.
    """

    inputs: tuple[Float[Array, "*batch T E"], ...]
    mask: Array | Mask | None = None
    is_causal: bool | None = None
    positions: Integer[Array, "..."] | None = None
    kv_positions: Integer[Array, "..."] | None = None
    segment_ids: Integer[Array, "..."] | None = None
    kv_segment_ids: Integer[Array, "..."] | None = None
    sow_weights: bool = False
    cache: Any = None
    lengths: ArrayLike | None = None
    deterministic: bool = True
    dropout_rng: Array | None = None

    def __post_init__(self):
        if self.lengths is not None and self.cache is None:
            raise ValueError("lengths takes None without a cache: use a mask")


def fill_inputs(
    inputs_q: Float[Array, "*batch T E"],
    inputs_k: Float[Array, "*batch S E"] | None,
    inputs_v: Float[Array, "*batch S E"] | None,
) -> Inputs:
    """Return the inputs of queries, keys and values; one that is None is the one before it."""
    if inputs_k is None:
        if inputs_v is not None:
            raise ValueError(
                "`inputs_k` cannot be None if `inputs_v` is not None. Pass one array for both "
                "as `inputs_k`"
            )
        inputs_k = inputs_q
    return inputs_q, inputs_k, inputs_k if inputs_v is None else inputs_v


def apply_norm(
    norm: Callable[[Array], Array], x: Float[Array, "*batch H"]
) -> Float[Array, "*batch H"]:
    """Call a norm of Flax, which mixes 16-bit numbers with float32.

    Under jax_numpy_dtype_promotion="strict" Flax's own layers cannot normalize in 16 bits.
    """
    with jax.numpy_dtype_promotion("standard"):
        return norm(x)


def apply_attention(
    layer: Any,
    config: AttentionConfig,
    call: LayerCall,
    projected: Sequence[Array],
    *,
    flax_cache: FlaxCache | None,
    own_fn: Callable[..., Array],
    flax_kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    excluded: Mapping[str, bool],
    only_known: bool = False,
) -> tuple[Float[Array, "*batch T N H"], Any]:
    """Rotate, append to a cache, and attend over it or over the keys and values themselves.

    Args:
      layer: of either dialect, for its ``attention_fn`` and the options that Flax passes to it.
      config: of the layer.
      call: its arguments. Keys and values are cast to the dtype of a cache.
      projected: queries ``[..., T, N, H]``, keys and values ``[..., S, K, H]``, normalized.
      flax_cache: Flax's own cache, where this call is a step over it.
      own_fn: the dialect's ``dot_product_attention``, the one function that ``cache`` replaces.
      flax_kwargs: further arguments that Flax's layer of this dialect passes to ``attention_fn``.
      options: more for ``attention_fn`` or a cache; None and False: not asked for.
      excluded: what this dialect refuses with a cache, by name: whether the call asks for it.
      only_known: as in `call_attention`.

    Returns:
      ``[..., T, N, H]``, which ``out`` projects, and the cache or None.

    Raises:
      ValueError: arguments that do not fit together, or with the cache.
      TypeError: ``cache`` is no cache.
    """
    query, key, value = projected
    options = {
        **config.options,
        **drop_unset(
            query_segment_ids=call.segment_ids,
            key_value_segment_ids=call.kv_segment_ids,
            **options,
        ),
    }
    if call.cache is not None:
        # A partial of our function is ours: it binds the implementation, or a mesh.
        own = getattr(layer.attention_fn, "func", layer.attention_fn) is own_fn
        excluded = {**excluded, "an attention_fn of your own": not own}
        cache = check_cache("inputs_q", call, query, excluded)
        positions = call.positions
        if positions is None and config.rope is not None:
            positions = cache.next_positions(query.shape[1])
        query, key = rotate_query_key(config.rope, query, key, positions, None)
        if cache.stores_floats:
            key, value = key.astype(cache.dtype), value.astype(cache.dtype)
        options.update(drop_unset(precision=layer.precision))
        mask = cast_mask(call.mask)
        return cache.extend(query, key, value, lengths=call.lengths, mask=mask, **options)

    index = None
    if flax_cache is not None:
        index = flax_cache.index
        check_token(query.shape, key.shape, flax_cache.key.shape)
    first = 0 if index is None else index
    query, key = rotate_query_key(config.rope, query, key, call.positions, call.kv_positions, first)
    if flax_cache is not None:
        key = write_token(flax_cache.key, flax_cache.index, key)
        value = write_token(flax_cache.value, flax_cache.index, value)
        flax_cache.write(key, value, flax_cache.index + 1)
    out = call_attention(
        layer.attention_fn,
        query,
        key,
        value,
        dict(
            flax_kwargs,
            mask=call.mask,
            dropout_rng=call.dropout_rng,
            dropout_rate=layer.dropout_rate,
            broadcast_dropout=layer.broadcast_dropout,
            deterministic=call.deterministic,
            dtype=layer.dtype,
            precision=layer.precision,
        ),
        options,
        is_causal=bool(call.is_causal),
        decode_index=index,
        only_known=only_known,
    )
    return out, None


def check_cache(
    inputs: str, call: LayerCall, query: Float[Array, "..."], excluded: Mapping[str, bool]
) -> Cache:
    """Check the cache of a call, and that no argument contradicts it; return it.

    Args:
      inputs: the name of the layer's argument from which ``query`` is projected.
      call, query, excluded: as for `apply_attention`.
    """
    cache = call.cache
    if not isinstance(cache, Cache):
        raise TypeError(f"cache takes a cache of axattn.cache, got {type(cache).__name__}")
    not_causal = call.is_causal is not None and not call.is_causal
    excluded = {
        **excluded,
        "is_causal=False (over a cache tokens attend causally)": not_causal,
        "inputs_k or inputs_v": any(x is not call.inputs[0] for x in call.inputs),
        "kv_positions": call.kv_positions is not None,
        "segment_ids": call.segment_ids is not None or call.kv_segment_ids is not None,
        "sow_weights": call.sow_weights,
        "dropout": not call.deterministic,
    }
    for name, asked in excluded.items():
        if asked:
            raise ValueError(f"{name} does not go with cache")
    if query.ndim != 4 or query.shape[0] != cache.batch:
        raise ValueError(
            f"{inputs} takes [B, T, E] with B = {cache.batch} for this cache, got batch dimensions "
            f"{query.shape[:-3]}"
        )
    return cache
