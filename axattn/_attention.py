"""The one door, `dot_product_attention`, and what it would do with a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax

from axattn import _jax_compat
from axattn._arguments import normalize, normalize_over_cache, trace_shapes
from axattn._call import AttentionCall
from axattn._implementations import registry
from axattn._jax_compat import find_explicit_sharding
from axattn._masks import Mask
from axattn._options import AttentionOptions
from axattn._sharded import explicit
from axattn._stored import KVView
from axattn._typing import Array, ArrayLike, Implementation, Precision, present
from axattn.aot import _targets


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | Mask | None = ...,
    *,
    scale: ArrayLike | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int | None, int | None] | None = ...,
    implementation: Implementation | Sequence[Implementation] | None = ...,
    return_residual: Literal[False] = ...,
    logits_soft_cap: float | None = ...,
    sinks: ArrayLike | None = ...,
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    dropout_rate: float = ...,
    dropout_rng: ArrayLike | None = ...,
    broadcast_dropout: bool = ...,
    alibi_slopes: ArrayLike | None = ...,
    q_offset: int | ArrayLike | None = ...,
    q_positions: ArrayLike | None = ...,
    kv_positions: ArrayLike | None = ...,
    precision: Precision | None = ...,
    kv_split_size: int | None = ...,
    is_projected: bool = ...,
) -> Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | Mask | None = ...,
    *,
    scale: ArrayLike | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int | None, int | None] | None = ...,
    implementation: Implementation | Sequence[Implementation] | None = ...,
    return_residual: Literal[True],
    logits_soft_cap: float | None = ...,
    sinks: ArrayLike | None = ...,
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    dropout_rate: float = ...,
    dropout_rng: ArrayLike | None = ...,
    broadcast_dropout: bool = ...,
    alibi_slopes: ArrayLike | None = ...,
    q_offset: int | ArrayLike | None = ...,
    q_positions: ArrayLike | None = ...,
    kv_positions: ArrayLike | None = ...,
    precision: Precision | None = ...,
    kv_split_size: int | None = ...,
    is_projected: bool = ...,
) -> tuple[Array, Array]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | Mask | None = ...,
    *,
    scale: ArrayLike | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int | None, int | None] | None = ...,
    implementation: Implementation | Sequence[Implementation] | None = ...,
    return_residual: bool,
    logits_soft_cap: float | None = ...,
    sinks: ArrayLike | None = ...,
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    dropout_rate: float = ...,
    dropout_rng: ArrayLike | None = ...,
    broadcast_dropout: bool = ...,
    alibi_slopes: ArrayLike | None = ...,
    q_offset: int | ArrayLike | None = ...,
    q_positions: ArrayLike | None = ...,
    kv_positions: ArrayLike | None = ...,
    precision: Precision | None = ...,
    kv_split_size: int | None = ...,
    is_projected: bool = ...,
) -> Array | tuple[Array, Array]: ...


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | Mask | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    alibi_slopes: ArrayLike | None = None,
    q_offset: int | ArrayLike | None = None,
    q_positions: ArrayLike | None = None,
    kv_positions: ArrayLike | None = None,
    precision: Precision | None = None,
    kv_split_size: int | None = None,
    is_projected: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Compute attention whose query heads share key/value heads: MHA, GQA and MQA.

    Computes, per query head n with its key/value head n // G::

        softmax(soft_cap(scale * q k^T) + bias + alibi, masked) v

    with the softmax and its sums in float32 (float64 for float64 inputs). It takes what
    ``jax.nn.dot_product_attention`` takes, with the same meanings and defaults, and more,
    keyword-only. K and V are never copied per query head, forward or backward. Differentiable
    in query, key, value, bias, sinks and an array ``scale``, and in the LSE, in forward mode,
    reverse mode and forward mode over either (``jax.hessian``); a gradient of gradients needs
    ``implementation="xla"``. On CPU and GPU a decode step (T * N <= 64)
    multiplies all key/value heads at once: an infinity or NaN in one head (in a slot that is in
    use) reaches the others.

    Letters: B batch, T query length, S key/value length, N query heads, K key/value heads,
    G = N // K, H key head size, h value head size; ``...`` any number of batch dimensions.

    Args:
      query: ``[..., T, N, H]``, floating point.
      key: ``[..., S, K, H]``, the same dtype; N must be a multiple of K (K = N is MHA
        https://arxiv.org/abs/1706.03762, K = 1 is MQA https://arxiv.org/abs/1911.02150, between
        them GQA https://arxiv.org/abs/2305.13245). Caches have their own
        `axattn.cache.Cache.attend`.
      value: ``[..., S, K, h]``; h may differ from H.
      bias: floating point, broadcastable to ``[..., N, T, S]``; added to the scaled, capped scores.
      mask: boolean (True = attend), broadcastable to ``[..., N, T, S]``, or an
        :class:`axattn.Mask`, whose structure lets implementations skip blocks.
      scale: factor on the dot products, a number or an array ``[]``, which then has a gradient;
        1 / sqrt(H) by default.
      is_causal: key position <= query position; top-left aligned (see ``q_offset``).
      query_seq_lengths, key_value_seq_lengths: int ``[...]``, one per batch row: the leading slots
        that are real. Query rows behind the length give zeros; key/value slots behind it may hold
        NaN.
      local_window_size: (left, right), inclusive, or one int for both; None on a side is no bound.
        The token itself is always inside; (L, 0) never sees the future.
      implementation: None picks by platform and shape; a name is strict; a sequence of names is an
        order of preference. See `axattn.explain_implementations`.
      return_residual: also return the log-sum-exp of the scores.
      logits_soft_cap: cap * tanh(scores / cap), as in Gemma 2 (https://arxiv.org/abs/2408.00118).
      sinks: ``[N]`` floating point, one extra logit per head in the softmax's denominator
        (https://arxiv.org/abs/2309.17453; learned, as in gpt-oss). It counts in the LSE.
      query_segment_ids, key_value_segment_ids: int ``[..., T]`` and ``[..., S]``: tokens attend
        within their own segment (packing). The keys' default to the queries' when T == S.
      dropout_rate: drop that share of the softmax weights, in [0, 1).
      dropout_rng: a JAX key, ``[]`` or the older uint32 ``[2]``; needed where something is dropped.
        The pattern depends on the key and the indices alone, not on the implementation; in
        ``shard_map`` or ``vmap`` fold the index of the shard into the key.
      broadcast_dropout: one ``[T, S]`` pattern for all batch rows and heads (Flax's default).
      alibi_slopes: ``[N]``, or ``[..., N]`` where batch rows have their own: adds -slope *
        abs(query position - key position) (https://arxiv.org/abs/2108.12409). Taken as constants:
        no gradient.
      q_offset: int, or int ``[...]``, one per batch row: position of the first query. It moves
        causal masks, windows, prefixes and ALiBi.
      q_positions, kv_positions: int ``[T]`` or ``[..., T]`` (``[S]``, ``[..., S]``): positions of
        all tokens, instead of ``q_offset`` and of 0, 1, 2...
      precision: ``jax.lax.Precision`` or its names, for the matrix products.
      kv_split_size: keys per part, for kernels that split the keys of few queries among processors
        (rounded up to whole blocks): a row's result then has the same bits whatever else is in the
        batch. None splits so that all processors have as much to do. Others split nothing, and
        take no notice.
      is_projected: the query comes from a matrix product in the same program and the output goes
        into one, as in a layer. TPUs write and read such arrays with heads before tokens at no
        cost, and their kernels then take them so. No result changes.

    Returns:
      Output ``[..., T, N, h]`` in the query's dtype; with ``return_residual`` also the LSE
      ``[..., T, N]``, float32, natural log. A row with nothing to attend to gives zeros (LSE
      -inf, or the sink) and zero gradients.

    Raises:
      ValueError, TypeError: an argument that cannot be, with its name, what it got and what it
        takes.
      NotImplementedError: the named implementation cannot take the call; the message says why.
        What the call is enough to refuse is refused at once, what the device is asked for when the
        program is lowered: a kernel that is named lowers for its platform, and for no other.

    Example:
      >>> import axattn
      >>> import jax.numpy as jnp
      >>> query = jnp.ones((2, 8, 4, 16))  # [B, T, N, H]
      >>> key = value = jnp.ones((2, 8, 1, 16))  # one key/value head: multi-query attention
      >>> out = axattn.dot_product_attention(query, key, value, is_causal=True)
      >>> out.shape, out.dtype
      ((2, 8, 4, 16), dtype('float32'))
      >>> _, lse = axattn.dot_product_attention(
      ...     query, key, value, scale=0.0, is_causal=True, return_residual=True
      ... )
      >>> jnp.exp(lse)[0, :, 0].round().astype(int).tolist()  # keys that a query sees
      [1, 2, 3, 4, 5, 6, 7, 8]
    """
    options = AttentionOptions(
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=return_residual,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        alibi_slopes=alibi_slopes,
        q_offset=q_offset,
        q_positions=q_positions,
        kv_positions=kv_positions,
        precision=precision,
        kv_split_size=kv_split_size,
        is_projected=is_projected,
    )
    call, lead = normalize(query, key, value, options)
    out, lse = _dispatch(call, options.implementation)
    out = out.reshape(*lead, *out.shape[1:])
    return (out, lse.reshape(*lead, *lse.shape[1:])) if options.return_residual else out


def attend_stored(
    query: ArrayLike, stored: KVView, options: AttentionOptions
) -> Array | tuple[Array, Array]:
    """Compute attention over what a cache stores: the entry for caches.

    Args:
      query: ``[B, T, N, H]``, floating point.
      stored: what the cache's ``stored()`` returns.
      options: as in `dot_product_attention`; the cache has put its masks and positions there.

    Returns:
      As `dot_product_attention`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `dot_product_attention`.
    """
    call = normalize_over_cache(query, stored, options)
    out, lse = _dispatch(call, options.implementation)
    return (out, present(lse)) if options.return_residual else out


def _dispatch(
    call: AttentionCall, implementation: Implementation | Sequence[Implementation] | None
) -> tuple[Array, Any]:
    if find_explicit_sharding(call.query) is None:
        return _run_compiled(call, plan=registry.make_plan(call, implementation))
    return explicit.attend_explicit(call, registry.check_names(implementation))


@functools.partial(jax.jit, static_argnames="plan")
def _run_compiled(
    call: AttentionCall, plan: registry.ImplementationPlan
) -> tuple[Array, Array | None]:
    # Compiled as one unit even when called eagerly: its loops would compile at each call else.
    return registry.run_plan(call, plan)


class Explanation(dict[str, "str | None"]):
    """Name of every implementation -> None where it takes the call, else the reason why not.

    Printed, it is a table.

    Attributes:
      by_platform: platform -> the implementation that the call would take there. Of an NVIDIA GPU
        that is not known it is what every GPU takes; a program that is lowered for the devices of a
        Hopper GPU's topology takes the kernels all the same.
      platform: that of the target, or of this process's default backend.
    """

    by_platform: dict[str, str]
    platform: str

    @property
    def chosen(self) -> str:
        """The implementation that the call would take on the target, or else here."""
        return self.by_platform[self.platform]

    def __str__(self) -> str:
        taken: dict[str, list[str]] = {}
        for platform, name in self.by_platform.items():
            taken.setdefault(name, []).append(platform)
        lines = []
        for name, reason in self.items():
            chosen = f"; None takes it on {', '.join(taken[name])}" if name in taken else ""
            lines.append(f"{name:12} {'supported' if reason is None else reason}{chosen}")
        return "\n".join(lines)


def explain_implementations(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    target: str | None = None,
    **options: Any,
) -> Explanation:
    """Say which implementations take a call, why others do not, and which one ``None`` takes.

    Nothing is computed.

    Args:
      query, key, value, bias, mask: as in `dot_product_attention`: arrays, or
        ``jax.ShapeDtypeStruct`` in their place.
      target: the chip that is asked about, a name in ``axattn.aot.TARGETS`` (its compiler need not
        be installed); None for this process's devices.
      **options: as in `dot_product_attention`.

    Returns:
      A dict, name of every implementation -> None where it takes the call, else the reason why not.
      Its ``chosen`` is the one that ``implementation=None`` takes on the target or here,
      ``by_platform`` says it of every platform that the program may be lowered for, and printed it
      is a table.

    Raises:
      ValueError, TypeError: what the call itself would raise for these arguments; an unknown
        target.

    Example:
      >>> import axattn, jax
      >>> q = jax.ShapeDtypeStruct((1, 1024, 4, 64), "float32")
      >>> kv = jax.ShapeDtypeStruct((1, 1024, 2, 64), "float32")
      >>> why = axattn.explain_implementations(q, kv, kv, is_causal=True)
      >>> why["xla"] is None, why["cudnn"]
      (True, 'needs float16 or bfloat16, got float32')
      >>> why.by_platform["cpu"]
      'xla_chunked'
      >>> axattn.explain_implementations(q, kv, kv, is_causal=True, target="v5p").chosen
      'mosaic_tpu'
    """

    def make_call(query, key, value, **options):
        given = AttentionOptions.parse("explain_implementations", **options)
        return normalize(query, key, value, given)[0]

    given = dict(query=query, key=key, value=value, bias=bias, mask=mask, **options)
    return explain_call(make_call, given, target)


def explain_call(
    make_call: Callable[..., AttentionCall], arguments: dict[str, Any], target: str | None
) -> Explanation:
    """Explain the call that ``make_call(**arguments)`` returns; see `explain_implementations`."""
    registry.check_names(arguments.get("implementation"))
    explanation = Explanation()

    def explain(**arguments):
        call = make_call(**arguments)
        explanation.update(registry.find_refusals(call))
        explanation.by_platform = registry.choose_per_platform(registry.make_plan(call, None))

    explanation.platform = _jax_compat.name_lowering_platform(jax.default_backend())
    if target is None:
        trace_shapes(explain, arguments)
        return explanation
    chip = _targets.target(target)
    explanation.platform = chip.platform
    with _jax_compat.use_abstract_device(*_targets.describe_device(chip)):
        trace_shapes(explain, arguments)
    return explanation
