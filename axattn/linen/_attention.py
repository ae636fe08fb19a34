"""Multi-head, grouped-query and multi-query attention as Linen layers."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from axattn._layers.config import AttentionConfig, check_one_kv_head, merge_qk_norm
from axattn._layers.flax_cache import FlaxCache
from axattn._layers.fused_projections import project_fused
from axattn._layers.step import Inputs, LayerCall, apply_attention, apply_norm, fill_inputs
from axattn._masks import Mask
from axattn._rotary import RotaryEmbedding
from axattn._typing import Array, CacheType, Float, Implementation, Integer, QkNorm
from axattn.linen._function import dot_product_attention
from axattn.linen._parameters import (
    get_parameters,
    make_dense,
    make_norm,
    may_read_kernels,
    name_axes,
)
from axattn.linen._randomness import resolve_dropout


def _make_field(default):
    """Return a keyword-only field, which stands after all of Flax's, now and later."""
    return dataclasses.field(default=default, kw_only=True)


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """Attention with shared key/value heads; a drop-in for Flax's class of this name.

    Flax's fields come first and mean what they mean there. Parameters are ``query``, ``key``,
    ``value`` (kernel ``[E, N or K, H]``, bias ``[N or K, H]``) and ``out`` (kernel ``[N, H, D]``,
    bias ``[D]``), so that a checkpoint of Flax's layer loads unchanged. Query head n reads
    key/value head n // (N / K).

    Attributes:
      num_heads: N, query heads.
      qkv_features: N * H, of all query heads together; by default E of the queries' inputs.
      out_features: D, of the output; by default E.
      dtype: of the computation; by default what inputs and parameters have in common.
      param_dtype: of the parameters.
      dropout_rate: share of the weights that is dropped.
      broadcast_dropout: one pattern of dropout for all rows and heads.
      deterministic: no dropout, whatever the rate is; here or in the call.
      precision: of the matrix products.
      kernel_init: initial kernels of the projections.
      out_kernel_init: that of ``out``; None: as ``kernel_init``.
      bias_init: initial biases of the projections.
      out_bias_init: that of ``out``; None: as ``bias_init``.
      use_bias: whether projections have biases.
      attention_fn: computes attention from the projections. A function that is not axattn's gets
        the arguments that it takes; an option that it does not take is an error.
      decode: Flax's own cache, one token at a time; ``cache=`` of a call does more.
      normalize_qk: Flax's name for ``qk_norm="layer"``.
      force_fp32_for_softmax: sow weights in float32; the softmax always is.
      qkv_dot_general: Flax's hook for quantized training, of the projections to heads.
      out_dot_general: likewise, of ``out``.
      qkv_dot_general_cls: likewise, a class that makes it.
      out_dot_general_cls: likewise, of ``out``.
      qk_attn_weights_einsum_cls: likewise, of the scores. With it all weights are written out.
      attn_weights_value_einsum_cls: likewise, of the output; both or neither.
      num_kv_heads: K; None means N, that is, multi-head attention. `axattn.checkpoints` turns the
        parameters of one into those of the other.
      rope: rotates queries and keys by their positions: an `axattn.rotary.RotaryEmbedding`.
      qk_norm: "layer" (Flax's ``normalize_qk=True``) or "rms", over each head's features, before
        ``rope``; parameters ``query_ln`` and ``key_ln``, each with a scale ``[H]``.
      qk_norm_epsilon: of both.
      qk_norm_per_head: False: one norm over the features of all heads together (OLMo 2), with
        scales ``[N, H]`` and ``[K, H]``.
      window: attend to at most this many tokens to the left and right, or (left, right); (L, 0)
        for causal models.
      scale: of the logits; default 1 / sqrt(H).
      logits_soft_cap: logits become cap * tanh(logits / cap).
      out_use_bias: of ``out``; None: as ``use_bias``.
      sinks: learn one logit per query head that takes part in the softmax's denominator;
        parameter ``sinks`` ``[N]``, zeros at first.
      fused_qkv: one matrix product for those of query, key and value that project the same array.
        Their kernels are joined at each call and stay separate parameters. Where heads are sharded
        over devices this can cost a reshard. Inside ``nn.intercept_methods``, and for
        ``capture_intermediates``, each projection is called by itself.
      implementation: of `axattn.dot_product_attention`.
      logical_axes: box the parameters with names of their axes (``nn.with_logical_partitioning``),
        embed, heads, kv_heads and head_dim.

    Raises:
      ValueError: by its call, for fields that do not fit together: ``num_heads`` no multiple of
        ``num_kv_heads``, for instance.
      TypeError: by its call, for numbers of heads that are no integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import linen
      >>> from axattn.rotary import RotaryEmbedding
      >>> layer = linen.MultiHeadDotProductAttention(
      ...     num_heads=4, num_kv_heads=2, rope=RotaryEmbedding(), window=(3, 0)
      ... )
      >>> x = jnp.ones((1, 8, 32))  # [B, T, E]
      >>> params = jax.jit(layer.init)(jax.random.key(0), x)
      >>> params["params"]["key"]["kernel"].shape  # [E, K, H]
      (32, 2, 8)
      >>> layer.apply(params, x, is_causal=True).shape
      (1, 8, 32)
    """

    attention_fn: Callable[..., Array] = dot_product_attention
    num_kv_heads: int | None = _make_field(None)
    rope: RotaryEmbedding | None = _make_field(None)
    qk_norm: QkNorm | None = _make_field(None)
    qk_norm_epsilon: float = _make_field(1e-6)
    qk_norm_per_head: bool = _make_field(True)
    window: int | tuple[int, int] | None = _make_field(None)
    scale: float | None = _make_field(None)
    logits_soft_cap: float | None = _make_field(None)
    out_use_bias: bool | None = _make_field(None)
    sinks: bool = _make_field(False)
    fused_qkv: bool = _make_field(False)
    implementation: Implementation | Sequence[Implementation] | None = _make_field(None)
    logical_axes: bool = _make_field(False)

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        inputs_k: Float[Array, "*batch S E"] | None = ...,
        inputs_v: Float[Array, "*batch S E"] | None = ...,
        *,
        inputs_kv: Float[Array, "*batch S E"] | None = ...,
        mask: Array | Mask | None = ...,
        deterministic: bool | None = ...,
        dropout_rng: Array | None = ...,
        sow_weights: bool = ...,
        is_causal: bool | None = ...,
        positions: Integer[Array, "*batch T"] | None = ...,
        kv_positions: Integer[Array, "*batch S"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        kv_segment_ids: Integer[Array, "*batch S"] | None = ...,
        cache: None = ...,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> Float[Array, "*batch T D"]: ...

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        inputs_k: Float[Array, "*batch S E"] | None = ...,
        inputs_v: Float[Array, "*batch S E"] | None = ...,
        *,
        inputs_kv: Float[Array, "*batch S E"] | None = ...,
        mask: Array | Mask | None = ...,
        deterministic: bool | None = ...,
        dropout_rng: Array | None = ...,
        sow_weights: bool = ...,
        is_causal: bool | None = ...,
        positions: Integer[Array, "*batch T"] | None = ...,
        kv_positions: Integer[Array, "*batch S"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        kv_segment_ids: Integer[Array, "*batch S"] | None = ...,
        cache: CacheType,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> tuple[Float[Array, "B T D"], CacheType]: ...

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        inputs_k: Float[Array, "*batch S E"] | None = None,
        inputs_v: Float[Array, "*batch S E"] | None = None,
        *,
        inputs_kv: Float[Array, "*batch S E"] | None = None,
        mask: Array | Mask | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        is_causal: bool | None = None,
        positions: Integer[Array, "*batch T"] | None = None,
        kv_positions: Integer[Array, "*batch S"] | None = None,
        segment_ids: Integer[Array, "*batch T"] | None = None,
        kv_segment_ids: Integer[Array, "*batch S"] | None = None,
        cache: CacheType | None = None,
        lengths: Integer[Array, " B"] | None = None,
    ) -> Float[Array, "*batch T D"] | tuple[Float[Array, "B T D"], CacheType]:
        """Attend from ``inputs_q`` to ``inputs_k`` and ``inputs_v``, by default to itself.

        Args:
          inputs_q, inputs_k, inputs_v: ``[..., T, E]`` and twice ``[..., S, E]``; what is left out
            is the one before it.
          inputs_kv: ``[..., S, E]``, Flax's former name for both of the latter.
          mask: an `axattn.Mask` or an array broadcastable to ``[..., N, T, S]``; nonzero: attend.
            One of other numbers than 0 and 1 is a bias, and refused where its numbers are known:
            not under jit.
          deterministic: no dropout; to be given here or as a field if ``dropout_rate`` > 0.
          dropout_rng: a JAX key, ``[]`` or uint32 ``[2]``, in place of the stream ``dropout``.
          sow_weights: sow the weights ``[..., N, T, S]`` in ``intermediates``.
          is_causal: no query sees a later key; False by default. Over a cache none ever does, and
            False is refused; without effect on a step of ``decode``, whose one query is the last.
          positions, kv_positions: for ``rope``: integers ``[T]`` or ``[..., T]`` and ``[S]`` or
            ``[..., S]``. By default tokens are counted from 0, or from the cache's index. The keys'
            are the queries' where T == S. They do not move masks.
          segment_ids, kv_segment_ids: int ``[..., T]`` and ``[..., S]``: tokens attend to those of
            the same segment only. The keys' are the queries' where T == S.
          cache: one of `axattn.cache`, to which the tokens of ``inputs_q`` are appended and which
            they then attend over, causally: prefill, decoding and anything between. Positions for
            ``rope`` are the cache's next ones. The result is then ``(output, cache)``.
          lengths: with a cache, int ``[B]``: how many of the T tokens are real in each row.

        Returns:
          ``[..., T, D]``, where D is ``out_features`` or E; with ``cache`` also the cache.

        Raises:
          ValueError: fields or arguments that do not fit together.
          TypeError: arguments of another type; a ``cache`` that is none.
          NotImplementedError: the named implementation cannot take the call.
        """
        inputs = _fill_inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
        config = AttentionConfig.from_layer(
            self,
            qkv_features=self.qkv_features or inputs_q.shape[-1],
            qk_norm=merge_qk_norm(self.normalize_qk, self.qk_norm),
        )
        query, key, value = _project_inputs(self, config, inputs)
        query, key = _normalize(self, config, query, key)
        einsums = (self.qk_attn_weights_einsum_cls, self.attn_weights_value_einsum_cls)
        qk_einsum, value_einsum = (None if cls is None else cls() for cls in einsums)
        deterministic, dropout_rng = resolve_dropout(self, deterministic, dropout_rng)
        call = LayerCall(
            inputs=inputs,
            mask=mask,
            is_causal=is_causal,
            positions=positions,
            kv_positions=kv_positions,
            segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids,
            sow_weights=sow_weights,
            cache=cache,
            lengths=lengths,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
        )
        x, cache = apply_attention(
            self,
            config,
            call,
            (query, key, value),
            flax_cache=_find_cache(self, key, value) if cache is None else None,
            own_fn=dot_product_attention,
            flax_kwargs=dict(
                force_fp32_for_softmax=self.force_fp32_for_softmax,
                qk_attn_weights_einsum=qk_einsum,
                attn_weights_value_einsum=value_einsum,
            ),
            options=dict(sinks=_make_sinks(self), module=self if sow_weights else None),
            excluded={"decode=True": self.decode, "an einsum of your own": any(einsums)},
            only_known=True,
        )
        out = _make_out(self, config, self.out_features or inputs_q.shape[-1])
        return out(x) if cache is None else (out(x), cache)


class MultiHeadAttention(MultiHeadDotProductAttention, nn.MultiHeadAttention):
    """`MultiHeadDotProductAttention` by another name, which also names its parameters' scope.

    Multi-head attention (https://arxiv.org/abs/1706.03762) where ``num_kv_heads`` is None.

    Raises:
      ValueError, TypeError: as `MultiHeadDotProductAttention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import linen
      >>> layer, x = linen.MultiHeadAttention(num_heads=4), jnp.ones((1, 8, 32))
      >>> jax.eval_shape(layer.init, jax.random.key(0), x)["params"]["key"]["kernel"].shape
      (32, 4, 8)
    """


class SelfAttention(MultiHeadDotProductAttention, nn.SelfAttention):
    """`MultiHeadDotProductAttention` of one input, with Flax's order of arguments.

    Raises:
      ValueError, TypeError: as `MultiHeadDotProductAttention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import Mask, linen
      >>> layer, x = linen.SelfAttention(num_heads=4), jnp.ones((1, 8, 32))
      >>> init = jax.jit(layer.init_with_output)
      >>> out, params = init(jax.random.key(0), x, Mask.causal())
      >>> out.shape
      (1, 8, 32)
    """

    @overload  # type: ignore[override]  # of one input, as Flax's own
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        mask: Array | Mask | None = ...,
        deterministic: bool | None = ...,
        dropout_rng: Array | None = ...,
        sow_weights: bool = ...,
        *,
        is_causal: bool | None = ...,
        positions: Integer[Array, "*batch T"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        cache: None = ...,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> Float[Array, "*batch T D"]: ...

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        mask: Array | Mask | None = ...,
        deterministic: bool | None = ...,
        dropout_rng: Array | None = ...,
        sow_weights: bool = ...,
        *,
        is_causal: bool | None = ...,
        positions: Integer[Array, "*batch T"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        cache: CacheType,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> tuple[Float[Array, "B T D"], CacheType]: ...

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        mask: Array | Mask | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        *,
        is_causal: bool | None = None,
        positions: Integer[Array, "*batch T"] | None = None,
        segment_ids: Integer[Array, "*batch T"] | None = None,
        cache: CacheType | None = None,
        lengths: Integer[Array, " B"] | None = None,
    ) -> Float[Array, "*batch T D"] | tuple[Float[Array, "B T D"], CacheType]:
        """Attend from ``inputs_q`` to itself; arguments as in `MultiHeadDotProductAttention`.

        Args:
          inputs_q: ``[..., T, E]``.
          mask: an `axattn.Mask` or an array broadcastable to ``[..., N, T, T]``; nonzero: attend.
          deterministic: no dropout.
          dropout_rng: a JAX key, ``[]`` or uint32 ``[2]``, in place of the stream ``dropout``.
          sow_weights: sow the weights ``[..., N, T, T]`` in ``intermediates``.
          is_causal: no token sees a later one; False by default. Over a cache none ever does, and
            False is refused.
          positions: for ``rope``: integers ``[T]`` or ``[..., T]``.
          segment_ids: int ``[..., T]``.
          cache: one of `axattn.cache`.
          lengths: with a cache, int ``[B]``: how many of the T tokens are real in each row.

        Returns:
          ``[..., T, D]``; with ``cache`` also the cache.

        Raises:
          ValueError, TypeError, NotImplementedError: as `MultiHeadDotProductAttention`.
        """
        any_cache: Any = cache  # for either overload
        return MultiHeadDotProductAttention.__call__(
            self,
            inputs_q,
            mask=mask,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
            is_causal=is_causal,
            positions=positions,
            segment_ids=segment_ids,
            cache=any_cache,
            lengths=lengths,
        )


class GroupedQueryAttention(MultiHeadDotProductAttention):
    """Each key/value head serves ``num_heads / num_kv_heads`` query heads.

    Grouped-query attention, https://arxiv.org/abs/2305.13245: `MultiHeadDotProductAttention` with
    ``num_kv_heads`` required.

    Raises:
      TypeError: ``num_kv_heads`` is not given; and as `MultiHeadDotProductAttention`.
      ValueError: as `MultiHeadDotProductAttention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import linen
      >>> from axattn.cache import DenseCache
      >>> layer, x = linen.GroupedQueryAttention(num_heads=4, num_kv_heads=2), jnp.ones((1, 8, 32))
      >>> params = jax.jit(layer.init)(jax.random.key(0), x)
      >>> cache = DenseCache.create(1, 16, num_kv_heads=2, head_dim=8, dtype="int8")
      >>> y, cache = jax.jit(layer.apply)(params, x, cache=cache)  # a prompt; then x[:, :1]...
      >>> y.shape, cache.lengths.tolist()
      ((1, 8, 32), [8])
    """

    num_kv_heads: int = dataclasses.field(kw_only=True)


class MultiQueryAttention(MultiHeadDotProductAttention):
    """One key/value head serves all query heads.

    Multi-query attention, https://arxiv.org/abs/1911.02150: `MultiHeadDotProductAttention` with
    ``num_kv_heads=1``.

    Raises:
      ValueError: another ``num_kv_heads``; and as `MultiHeadDotProductAttention`.
      TypeError: as `MultiHeadDotProductAttention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import linen
      >>> layer, x = linen.MultiQueryAttention(num_heads=4), jnp.ones((1, 8, 32))
      >>> jax.eval_shape(layer.init, jax.random.key(0), x)["params"]["key"]["kernel"].shape
      (32, 1, 8)
    """

    num_kv_heads: int = _make_field(1)

    def __post_init__(self):
        check_one_kv_head(self.num_kv_heads)
        super().__post_init__()


# Functions, since interceptors and ``capture_intermediates`` would see methods and their results.


def _fill_inputs(inputs_q, inputs_k, inputs_v, inputs_kv) -> Inputs:
    """Return the inputs of queries, keys and values; warn of Flax's former arguments."""
    if inputs_kv is not None:
        if inputs_k is not None or inputs_v is not None:
            raise ValueError(
                "If either `inputs_k` or `inputs_v` is not None, `inputs_kv` must be None. It "
                "is their former name: pass `inputs_k` and `inputs_v` only"
            )
        warnings.warn(
            "The inputs_kv arg will be deprecated soon. Pass it as inputs_k.",
            DeprecationWarning,
            stacklevel=3,
        )
        inputs_k = inputs_kv
    elif inputs_v is not None and inputs_v.shape[-1] == inputs_v.shape[-2]:
        warnings.warn(
            f"inputs_v has the shape {inputs_v.shape}; was it meant as the mask? In Flax 0.7.4 "
            "the function signature of MultiHeadDotProductAttention's `__call__` method has "
            "changed: the mask is the keyword argument `mask`.",
            DeprecationWarning,
            stacklevel=3,
        )
    return fill_inputs(inputs_q, inputs_k, inputs_v)


def _project_inputs(
    layer: MultiHeadDotProductAttention, config: AttentionConfig, inputs: Inputs
) -> tuple[Array, ...]:
    """Project the inputs to queries, keys and values, fused where the layer says so."""
    config.check_products(layer.qkv_dot_general_cls)
    fused = layer.fused_qkv and may_read_kernels()
    heads = {"query": layer.num_heads, "key": config.kv_heads, "value": config.kv_heads}
    denses = [
        make_dense(
            layer,
            name,
            (count, config.head_dim),
            use_bias=layer.use_bias,
            dot_general=None if fused else layer.qkv_dot_general,
            dot_general_cls=layer.qkv_dot_general_cls,
        )
        for name, count in heads.items()
    ]
    if not fused:
        return tuple(dense(x) for dense, x in zip(denses, inputs, strict=True))
    kernels, biases = zip(*map(get_parameters, denses, inputs), strict=True)
    return project_fused(
        inputs,
        kernels,
        biases if layer.use_bias else None,
        promote=functools.partial(promote_dtype, dtype=layer.dtype),
        dot_general=layer.qkv_dot_general,
        precision=layer.precision,
    )


def _normalize(
    layer: MultiHeadDotProductAttention, config: AttentionConfig, query: Array, key: Array
) -> tuple[Array, Array]:
    """Apply the layer's norms to queries and keys."""
    if config.qk_norm is None:
        return query, key
    make = functools.partial(
        make_norm,
        layer,
        kind=config.qk_norm,
        epsilon=config.qk_norm_epsilon,
        axes=config.parameter_axes,
        reduction_axes=config.norm_axes,
        feature_axes=config.norm_axes,
    )
    return apply_norm(make("query_ln"), query), apply_norm(make("key_ln"), key)


def _find_cache(layer: MultiHeadDotProductAttention, key: Array, value: Array) -> FlaxCache | None:
    """Return Flax's cache where this call is a step over it."""
    if not layer.decode:
        return None
    # The first call makes the cache, as long as its inputs, and does not use it.
    filled = layer.has_variable("cache", "cached_key")
    keys = layer.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
    values = layer.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
    index = layer.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))

    def write(*arrays):
        keys.value, values.value, index.value = arrays

    return FlaxCache(keys.value, values.value, index.value, write) if filled else None


def _make_sinks(layer: MultiHeadDotProductAttention) -> Array | None:
    if not layer.sinks:
        return None
    zeros = name_axes(layer, nn.initializers.zeros_init(), "sinks")
    return layer.param("sinks", zeros, (layer.num_heads,), layer.param_dtype)


def _make_out(
    layer: MultiHeadDotProductAttention, config: AttentionConfig, features: int
) -> nn.DenseGeneral:
    """Return the output projection."""
    return make_dense(
        layer,
        "out",
        features,
        axis=(-2, -1),
        use_bias=config.out_has_bias,
        kernel_init=layer.out_kernel_init,
        bias_init=layer.out_bias_init,
        dot_general=layer.out_dot_general,
        dot_general_cls=layer.out_dot_general_cls,
    )
