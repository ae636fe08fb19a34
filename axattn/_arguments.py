"""Make an :class:`AttentionCall` from what a user passes: checks by name, canonical shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn._call import AttentionCall
from axattn._dropout import make_dropout_key
from axattn._dtypes import choose_accumulator
from axattn._masks import Mask, check_int32, flatten_lead, normalize_mask
from axattn._options import AttentionOptions
from axattn._stored import KVView


def normalize(
    query: Any, key: Any, value: Any, options: AttentionOptions
) -> tuple[AttentionCall, tuple[int, ...]]:
    """Return the call of arrays, and its leading dimensions ``(...)`` as the user gave them."""
    query, key, value = _check_arrays(query, key, value)
    lead, kv_len = query.shape[:-3], key.shape[-3]
    query, key, value = (x.reshape(math.prod(lead), *x.shape[-3:]) for x in (query, key, value))
    return _make_call(query, key, value, None, options, lead, kv_len), lead


def normalize_over_cache(query: Any, stored: KVView, options: AttentionOptions) -> AttentionCall:
    """Return the call of a query over what a cache stores."""
    query = _check_cache_query(query, stored)
    return _make_call(query, None, None, stored, options, query.shape[:1], stored.kv_len)


def trace_shapes(function: Callable[..., None], arguments: Mapping[str, Any]) -> None:
    """Call ``function(**arguments)``, where shapes may stand for arrays; nothing is computed.

    Arguments with a ``jax.ShapeDtypeStruct`` in them are traced; others are passed as they are.
    """
    structs = {
        name: value
        for name, value in arguments.items()
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))
    }
    jax.eval_shape(lambda structs: function(**{**arguments, **structs}), structs)


def _make_call(
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array | None,
    stored: KVView | None,
    options: AttentionOptions,
    lead: tuple[int, ...],
    kv_len: int,
) -> AttentionCall:
    batch, q_len, heads, head_dim = query.shape
    scale, traced_scale = _split_scale(options.scale, head_dim)
    rate, drop_key = _check_dropout(options.dropout_rate, options.dropout_rng)
    q_positions, kv_positions = _make_positions(options, lead, q_len, kv_len)
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        stored=stored,
        bias=_check_bias(options.bias, lead, heads, q_len, kv_len),
        mask=_make_mask(options, lead, (batch, heads, q_len, kv_len)),
        sinks=_check_per_head("sinks", options.sinks, heads),
        traced_scale=traced_scale,
        alibi_slopes=_check_slopes(options.alibi_slopes, lead, heads),
        q_positions=q_positions,
        kv_positions=kv_positions,
        dropout_key=drop_key,
        scale=scale,
        logits_soft_cap=_check_soft_cap(options.logits_soft_cap),
        dropout_rate=rate,
        broadcast_dropout=_check_flag("broadcast_dropout", options.broadcast_dropout),
        precision=_check_precision(options.precision),
        return_residual=_check_flag("return_residual", options.return_residual),
        kv_split_size=_check_split_size(options.kv_split_size),
        heads_first=_check_flag("is_projected", options.is_projected),
    )


def _check_split_size(size: Any) -> int | None:
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"kv_split_size takes None or an int >= 1, got {size!r}")
    return int(size)


def _check_arrays(query: Any, key: Any, value: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays = []
    for name, x, letters in (
        ("query", query, "[..., T, N, H]"),
        ("key", key, "[..., S, K, H]"),
        ("value", value, "[..., S, K, h]"),
    ):
        x = _check_array(name, x, letters)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} takes a floating-point array {letters}, got dtype {x.dtype}")
        if x.ndim < 3:
            raise ValueError(f"{name} takes {letters}, got shape {x.shape}")
        for letter, size in zip(letters.strip("[]").split(", ")[2:], x.shape[-2:], strict=True):
            if size == 0:
                raise ValueError(f"{name} takes {letters} with {letter} >= 1, got shape {x.shape}")
        arrays.append(x)
    query, key, value = arrays
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} takes the dtype of query, {query.dtype}, got {x.dtype}")
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} takes the leading (batch) dimensions of query, {query.shape[:-3]}, "
                f"got shape {x.shape}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key takes the head size of query, H = {query.shape[-1]}, got shape {key.shape}"
        )
    if value.shape[-3:-1] != key.shape[-3:-1]:
        raise ValueError(
            f"value takes the length and heads of key, S = {key.shape[-3]} and "
            f"K = {key.shape[-2]}, got shape {value.shape}"
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query takes a multiple of the {key.shape[-2]} key/value heads, "
            f"got {query.shape[-2]} heads (shape {query.shape})"
        )
    return query, key, value


def _check_cache_query(query: Any, stored: KVView) -> jax.Array:
    query = _check_array("query", query, "[B, T, N, H]")
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query takes a floating-point array [B, T, N, H], got dtype {query.dtype}")
    batch, head_dim, kv_heads = stored.batch, stored.head_dim, stored.num_kv_heads
    if query.ndim != 4 or query.shape[0] != batch or query.shape[3] != head_dim:
        raise ValueError(
            f"query takes [B, T, N, H] = [{batch}, T, N, {head_dim}] for this cache, got shape "
            f"{query.shape}"
        )
    if query.shape[2] % kv_heads or query.shape[2] == 0:
        raise ValueError(
            f"query takes a multiple of the cache's {kv_heads} key/value heads, got "
            f"{query.shape[2]} heads (shape {query.shape})"
        )
    return query


def _check_array(name: str, x: Any, takes: str) -> jax.Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} takes an array {takes}, got {type(x).__name__}") from error


def _split_scale(scale: Any, head_dim: int) -> tuple[float, jax.Array | None]:
    """Split the scale into a number known while tracing and a traced one, which has a gradient."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim), None
    if isinstance(scale, jax.Array):
        # An array, traced or not, is data: another value needs no new compilation.
        if scale.ndim or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise TypeError(f"scale takes a floating-point scalar, got {scale.dtype} {scale.shape}")
        if not isinstance(scale, jax.core.Tracer) and not math.isfinite(scale):
            raise ValueError(f"scale takes a finite number, got {scale!r}")
        return 1.0, scale.astype(jnp.float32)
    number = _check_number("scale", scale)
    if not math.isfinite(number):
        raise ValueError(f"scale takes a finite number, got {scale!r}")
    return number, None


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} takes a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} takes a number, got {value!r}") from error


def _check_static_number(name: str, value: Any) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} takes a number known while tracing, got a traced array {value}")
    return _check_number(name, value)


def _check_soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    number = _check_static_number("logits_soft_cap", cap)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"logits_soft_cap takes a finite number > 0 or None, got {cap!r}")
    return number


def _check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} takes True or False, got {value!r}")
    return bool(value)


def _check_precision(precision: Any) -> Any:
    if precision is None or isinstance(
        precision, (lax.Precision, lax.DotAlgorithm, lax.DotAlgorithmPreset)
    ):
        return precision
    if isinstance(precision, (tuple, list)) and len(precision) == 2:
        return tuple(_check_precision(side) for side in precision)
    try:
        return lax.Precision(precision)
    except (ValueError, TypeError) as error:
        names = ", ".join(repr(p.name.lower()) for p in lax.Precision)
        raise ValueError(
            f"precision takes None, a jax.lax.Precision or its name ({names}), a pair of them or "
            f"a jax.lax.DotAlgorithm, got {precision!r}"
        ) from error


def _check_dropout(rate: Any, rng: Any) -> tuple[float, jax.Array | None]:
    number = _check_static_number("dropout_rate", rate)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"dropout_rate takes a number in [0, 1), got {rate!r}")
    if number == 0.0:
        return 0.0, None
    if rng is None:
        raise ValueError(
            f"dropout_rng takes a JAX random key when dropout_rate is {rate}, got None"
        )
    try:
        return number, make_dropout_key(rng)
    except (TypeError, ValueError) as error:
        raise TypeError(f"dropout_rng takes one JAX random key, got {rng!r}") from error


def _check_per_head(name: str, values: Any, heads: int) -> jax.Array | None:
    if values is None:
        return None
    values = _widen_floats(name, values, "[N]")
    if values.shape != (heads,):
        raise ValueError(f"{name} takes [N] = [{heads}], got shape {values.shape}")
    return values


def _check_slopes(values: Any, lead: tuple[int, ...], heads: int) -> jax.Array | None:
    if values is None:
        return None
    values = _widen_floats("alibi_slopes", values, "[N] or [..., N]")
    if values.ndim < 1 or values.shape[-1] != heads:
        raise ValueError(
            f"alibi_slopes takes [N] = [{heads}] or [..., N], got shape {values.shape}"
        )
    return lax.stop_gradient(flatten_lead("alibi_slopes", values, lead, 1, (heads,)))


def _widen_floats(name: str, values: Any, takes: str) -> jax.Array:
    values = _check_array(name, values, takes)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name} takes floating-point values {takes}, got dtype {values.dtype}")
    return values.astype(choose_accumulator(values.dtype))


def _check_bias(bias: Any, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> Any:
    if bias is None:
        return None
    bias = _check_array("bias", bias, "that broadcasts to [..., N, T, S]")
    if jnp.issubdtype(bias.dtype, jnp.integer):
        bias = bias.astype(jnp.float32)  # as jax.nn does
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(
            f"bias takes floating-point values, got dtype {bias.dtype}; a boolean array is a mask"
        )
    return _check_scores_shape("bias", bias, lead, heads, q_len, kv_len)


def _check_scores_shape(
    name: str, array: jax.Array, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int
) -> jax.Array:
    given = array.shape
    if array.ndim < 3:
        array = array.reshape((1,) * (3 - array.ndim) + array.shape)
    full = (heads, q_len, kv_len)
    if any(n not in (1, m) for n, m in zip(array.shape[-3:], full, strict=True)):
        raise ValueError(
            f"{name} takes an array that broadcasts to [..., N, T, S] = [..., "
            f"{heads}, {q_len}, {kv_len}], got shape {given}"
        )
    return flatten_lead(name, array, lead, 3, (None, None, None))


def _make_positions(
    options: AttentionOptions, lead: tuple[int, ...], q_len: int, kv_len: int
) -> tuple[jax.Array | None, jax.Array | None]:
    if options.q_offset is None:
        queries = _check_positions("q_positions", options.q_positions, lead, q_len)
    elif options.q_positions is not None:
        raise ValueError("q_offset and q_positions say the same thing: give one of them, got both")
    else:
        offset = check_int32("q_offset", options.q_offset, "an int or an int array [...]")
        offset = flatten_lead("q_offset", offset, lead, 0, ())
        queries = offset[:, None] + jnp.arange(q_len, dtype=jnp.int32)[None]
    return queries, _check_positions("kv_positions", options.kv_positions, lead, kv_len)


def _check_positions(
    name: str, positions: Any, lead: tuple[int, ...], length: int
) -> jax.Array | None:
    if positions is None:
        return None
    positions = check_int32(name, positions, f"int [..., {length}]")
    if positions.ndim < 1:
        raise ValueError(f"{name} takes int [..., {length}], got shape {positions.shape}")
    return flatten_lead(name, positions, lead, 1, (length,))


def _make_mask(
    options: AttentionOptions, lead: tuple[int, ...], shape: tuple[int, int, int, int]
) -> Mask:
    _, heads, q_len, kv_len = shape
    total, mask = Mask(), options.mask
    if isinstance(mask, Mask):
        total = mask
    elif mask is not None:
        mask = _check_array("mask", mask, "that broadcasts to [..., N, T, S]")
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"mask takes a boolean array (True = attend) or an axattn.Mask, got dtype "
                f"{mask.dtype}; an additive mask is a bias"
            )
        _check_scores_shape("mask", mask, lead, heads, q_len, kv_len)  # only for its check
        total = Mask.dense(mask)
    if _check_flag("is_causal", options.is_causal):
        total = total & Mask.causal()
    if options.local_window_size is not None:
        total = total & Mask.window(*_check_window(options.local_window_size))
    if options.query_seq_lengths is not None or options.key_value_seq_lengths is not None:
        total = total & Mask.lengths(
            _check_lengths("query_seq_lengths", options.query_seq_lengths, lead),
            _check_lengths("key_value_seq_lengths", options.key_value_seq_lengths, lead),
        )
    if options.query_segment_ids is not None or options.key_value_segment_ids is not None:
        total = total & _make_segments(
            options.query_segment_ids, options.key_value_segment_ids, q_len, kv_len
        )
    # A [T, S] mask inside Mask.dense has no lead; only the head dimension is left to check.
    total = normalize_mask(total, lead, q_len, kv_len)
    for part in total.parts:
        array = getattr(part, "array", None)
        if array is not None and array.shape[1] not in (1, heads):
            raise ValueError(
                f"mask takes an array that broadcasts to [..., N, T, S] = [..., {heads}, {q_len}, "
                f"{kv_len}], got shape {array.shape}"
            )
    return total


def _check_window(window: Any) -> tuple[int | None, int | None]:
    pair = (window, window) if not isinstance(window, (tuple, list)) else tuple(window)
    sides = [side for side in pair if side is not None]
    if len(pair) != 2 or any(
        isinstance(side, bool) or not isinstance(side, (int, np.integer)) or side < 0
        for side in sides
    ):
        error = TypeError if any(isinstance(s, (float, str, bool)) for s in sides) else ValueError
        raise error(
            "local_window_size takes an int >= 0 or a pair (left, right) of them (None: no bound "
            f"on that side), got {window!r}"
        )
    return pair


def _check_lengths(name: str, lengths: Any, lead: tuple[int, ...]) -> Any:
    if lengths is None:
        return None
    lengths = check_int32(name, lengths, "int32 lengths, one per batch row")
    if lengths.ndim == 0:
        return lengths
    if lengths.shape != lead and lengths.size != 1:
        raise ValueError(
            f"{name} takes one length per batch row, shape {lead}, got shape {lengths.shape}"
        )
    return lengths


def _make_segments(q_ids: Any, kv_ids: Any, q_len: int, kv_len: int) -> Mask:
    if q_ids is None:
        raise ValueError("query_segment_ids takes int [..., T] when key_value_segment_ids is given")
    q_ids = check_int32("query_segment_ids", q_ids, f"int [..., {q_len}]")
    if kv_ids is None:
        if q_len != kv_len:
            raise ValueError(
                f"key_value_segment_ids takes int [..., {kv_len}] when T = {q_len} differs from "
                f"S = {kv_len}, got None"
            )
        kv_ids = q_ids
    kv_ids = check_int32("key_value_segment_ids", kv_ids, f"int [..., {kv_len}]")
    for name, ids, length in (
        ("query_segment_ids", q_ids, q_len),
        ("key_value_segment_ids", kv_ids, kv_len),
    ):
        if ids.ndim < 1 or ids.shape[-1] != length:
            raise ValueError(f"{name} takes int [..., {length}], got shape {ids.shape}")
    return Mask.segments(q_ids, kv_ids)
