"""Multi-head, grouped-query and multi-query attention as NNX layers."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from

from axattn._layers.config import (
    AttentionConfig,
    check_one_kv_head,
    drop_unset,
    make_hashable,
    merge_qk_norm,
)
from axattn._layers.flax_cache import FlaxCache
from axattn._layers.fused_projections import project_fused
from axattn._layers.step import Inputs, LayerCall, apply_attention, apply_norm, fill_inputs
from axattn._masks import Mask
from axattn._rotary import RotaryEmbedding
from axattn._typing import Array, CacheType, Float, Implementation, Integer, QkNorm, present
from axattn.nnx._function import dot_product_attention
from axattn.nnx._parameters import NORMS, is_plain, name_axes
from axattn.nnx._randomness import resolve_dropout


class _UnsetFlag(int):
    """Flax's default, False, as an object of its own that no caller passes."""

    def __repr__(self) -> str:
        return "False"


_UNSET: Any = _UnsetFlag(0)


def _extend_signature(base: Callable[..., None]):
    """Give ``__init__(..., **kwargs)`` the signature of ``base``, then its own parameters."""

    def decorate(init):
        own = inspect.signature(init).parameters
        inherited = inspect.signature(base).parameters
        parameters = [
            p.replace(default=own[name].default) if name in own else p
            for name, p in inherited.items()
        ]
        parameters += [
            p
            for name, p in own.items()
            if name not in inherited and p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        init.__signature__ = inspect.Signature(parameters)
        return init

    return decorate


class MultiHeadAttention(nnx.MultiHeadAttention):
    """Attention with shared key/value heads; a drop-in for Flax's class of this name.

    Flax's arguments come first and mean what they mean there, ``num_kv_heads`` among them.
    Parameters are ``query``, ``key``, ``value`` (kernel ``[E, N or K, H]``, bias ``[N or K, H]``)
    and ``out`` (kernel ``[N, H, D]``, bias ``[D]``), so that a checkpoint of Flax's layer loads
    unchanged. Query head n reads key/value head n // (N / K).

    Args:
      num_heads: N, query heads.
      in_features: E, of the queries' inputs.
      num_kv_heads: K; None means N, that is, multi-head attention. `axattn.checkpoints` turns the
        parameters of one into those of the other.
      in_kv_features: of the keys' and values' inputs; by default E.
      qkv_features: N * H, of all query heads together; by default E of the queries' inputs.
      out_features: D, of the output; by default E.
      dtype, param_dtype: of the computation (by default what inputs and parameters have in common)
        and of the parameters.
      dropout_rate, broadcast_dropout, deterministic: share of the weights that is dropped, whether
        all rows and heads share one pattern, and whether nothing is dropped whatever the rate is.
      precision: of the matrix products.
      kernel_init, out_kernel_init, bias_init, out_bias_init, use_bias: of the projections.
      attention_fn: computes attention from the projections. A function that is not axattn's gets
        the arguments that it takes; an option that it does not take is an error.
      decode: Flax's own cache, one token at a time; ``cache=`` of a call does more.
      normalize_qk: Flax's name for ``qk_norm="layer"``.
      qkv_promote_dtype, out_promote_dtype, ln_promote_dtype: Flax's functions that bring arrays to
        ``dtype``.
      qkv_dot_general, out_dot_general, qkv_dot_general_cls, out_dot_general_cls: Flax's hooks for
        quantized training.
      rngs, keep_rngs: of parameters and dropout, and whether the layer keeps a stream for dropout.
      kernel_metadata, out_kernel_metadata, bias_metadata, out_bias_metadata: of the projections.
      query_ln_scale_metadata, key_ln_scale_metadata: of the norms.
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
        over devices this can cost a reshard. Where one of the three is no longer what the layer put
        there (an adapter, a subclass, another ``dot_general``) each is called by itself.
      implementation: of `axattn.dot_product_attention`.
      logical_axes: name the parameters' axes in their metadata (``out_sharding``), by the names
        embed, heads, kv_heads and head_dim. Arrays are not moved; where they
        belong ``nnx.get_named_sharding`` says, under ``nnx.logical_axis_rules``.

    Raises:
      ValueError: arguments that do not fit together: ``num_heads`` no multiple of
        ``num_kv_heads``, for instance.
      TypeError: numbers of heads that are no integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from axattn.nnx import MultiHeadAttention
      >>> layer = MultiHeadAttention(
      ...     4, 32, num_kv_heads=2, qk_norm="rms", decode=False, rngs=nnx.Rngs(0)
      ... )
      >>> layer.key.kernel.shape  # [E, K, H]
      (32, 2, 8)
      >>> layer(jnp.ones((2, 6, 32)), is_causal=True).shape
      (2, 6, 32)
    """

    @_extend_signature(nnx.MultiHeadAttention.__init__)
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        attention_fn: Callable[..., Array] = dot_product_attention,
        normalize_qk: bool = False,
        rngs: nnx.Rngs,
        rope: RotaryEmbedding | None = None,
        qk_norm: QkNorm | None = None,
        qk_norm_epsilon: float = 1e-6,
        qk_norm_per_head: bool = True,
        window: int | tuple[int, int] | None = None,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        out_use_bias: bool | None = None,
        sinks: bool = False,
        fused_qkv: bool = False,
        implementation: Implementation | Sequence[Implementation] | None = None,
        logical_axes: bool = False,
        **flax_kwargs,
    ):
        self.rope = rope
        self.qk_norm = merge_qk_norm(normalize_qk, qk_norm)
        self.qk_norm_epsilon = qk_norm_epsilon
        self.qk_norm_per_head = qk_norm_per_head
        self.window = make_hashable(window)
        self.scale = scale
        self.logits_soft_cap = logits_soft_cap
        self.out_use_bias = out_use_bias
        self.fused_qkv = fused_qkv
        self.implementation = make_hashable(implementation)
        self.logical_axes = logical_axes
        config = AttentionConfig.from_layer(
            self,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            qkv_features=in_features if qkv_features is None else qkv_features,
            use_bias=use_bias,
            sinks=sinks,
        )
        config.check_products(flax_kwargs.get("qkv_dot_general_cls"))
        flax_norms = config.qk_norm == "layer" and qk_norm_per_head
        super().__init__(
            num_heads,
            in_features,
            qkv_features,
            out_features,
            num_kv_heads,
            in_kv_features,
            param_dtype=param_dtype,
            use_bias=use_bias,
            attention_fn=attention_fn,
            normalize_qk=flax_norms,
            rngs=rngs,
            **flax_kwargs,
        )
        self.normalize_qk = config.qk_norm is not None
        if self.normalize_qk and not flax_norms:
            for name, count in (("query_ln", num_heads), ("key_ln", config.kv_heads)):
                metadata = flax_kwargs.get(f"{name}_scale_metadata", {})
                setattr(self, name, self._make_norm(config, count, rngs, metadata))
        if self.normalize_qk:
            for norm in (self.query_ln, self.key_ln):
                present(norm).epsilon = qk_norm_epsilon
        if config.out_has_bias != use_bias:
            self.out.use_bias = config.out_has_bias
            self.out.bias = (
                self._make_out_bias(rngs, flax_kwargs) if config.out_has_bias else nnx.data(None)
            )
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype)) if sinks else nnx.data(None)
        if logical_axes:
            name_axes(self, config.parameter_axes)

    def _make_norm(
        self, config: AttentionConfig, count: int, rngs: nnx.Rngs, metadata: Mapping[str, Any]
    ) -> nnx.LayerNorm | nnx.RMSNorm:
        """Return a norm over the features of each head, or of all ``count`` heads together."""
        shape = (count, self.head_dim)[-len(config.norm_axes) :]
        return NORMS[present(config.qk_norm)](
            math.prod(shape),
            reduction_axes=config.norm_axes,
            feature_axes=config.norm_axes,
            dtype=self.dtype,
            param_dtype=self.query.param_dtype,
            promote_dtype=self.ln_promote_dtype,
            scale_init=lambda key, _, dtype: jnp.ones(shape, dtype),
            rngs=rngs,
            scale_metadata=metadata,
        )

    def _make_out_bias(self, rngs: nnx.Rngs, flax_kwargs: Mapping[str, Any]) -> nnx.Param:
        """Return the bias of ``out``, initialized by the arguments that Flax has for it."""
        init = (
            flax_kwargs.get("out_bias_init")
            or flax_kwargs.get("bias_init")
            or nnx.initializers.zeros_init()
        )
        metadata = flax_kwargs.get("out_bias_metadata") or flax_kwargs.get("bias_metadata") or {}
        bias = init(rngs.params(), (self.out_features,), self.out.param_dtype)
        return nnx.Param(bias, **metadata)

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        inputs_k: Float[Array, "*batch S F"] | None = ...,
        inputs_v: Float[Array, "*batch S F"] | None = ...,
        *,
        mask: Array | Mask | None = ...,
        deterministic: bool | None = ...,
        rngs: nnx.Rngs | nnx.RngStream | None = ...,
        sow_weights: bool = ...,
        decode: bool | None = ...,
        is_causal: bool = ...,
        out_sharding: Any = ...,
        qkv_sharding: Any = ...,
        input_positions: Integer[Array, "*batch T"] | None = ...,
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
        inputs_k: Float[Array, "*batch S F"] | None = ...,
        inputs_v: Float[Array, "*batch S F"] | None = ...,
        *,
        mask: Array | Mask | None = ...,
        deterministic: bool | None = ...,
        rngs: nnx.Rngs | nnx.RngStream | None = ...,
        sow_weights: bool = ...,
        decode: bool | None = ...,
        is_causal: bool = ...,
        out_sharding: Any = ...,
        qkv_sharding: Any = ...,
        input_positions: Integer[Array, "*batch T"] | None = ...,
        positions: Integer[Array, "*batch T"] | None = ...,
        kv_positions: Integer[Array, "*batch S"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        kv_segment_ids: Integer[Array, "*batch S"] | None = ...,
        cache: CacheType,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> tuple[Float[Array, "B T D"], CacheType]: ...

    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        inputs_k: Float[Array, "*batch S F"] | None = None,
        inputs_v: Float[Array, "*batch S F"] | None = None,
        *,
        mask: Array | Mask | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = _UNSET,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: Integer[Array, "*batch T"] | None = None,
        positions: Integer[Array, "*batch T"] | None = None,
        kv_positions: Integer[Array, "*batch S"] | None = None,
        segment_ids: Integer[Array, "*batch T"] | None = None,
        kv_segment_ids: Integer[Array, "*batch S"] | None = None,
        cache: CacheType | None = None,
        lengths: Integer[Array, " B"] | None = None,
    ) -> Float[Array, "*batch T D"] | tuple[Float[Array, "B T D"], CacheType]:
        """Attend from ``inputs_q`` to ``inputs_k`` and ``inputs_v``, by default to itself.

        Args:
          inputs_q, inputs_k, inputs_v: ``[..., T, E]`` and twice ``[..., S, F]``, F being
            ``in_kv_features``; what is left out is the one before it.
          mask: an `axattn.Mask` or an array broadcastable to ``[..., N, T, S]``; nonzero: attend.
            One of other numbers than 0 and 1 is a bias, and refused where its numbers are known:
            not under jit.
          deterministic: no dropout; to be given here or before if ``dropout_rate`` > 0.
          rngs: for dropout, in place of those of the constructor.
          sow_weights: sow the weights ``[..., N, T, S]`` as ``nnx.Intermediate``.
          decode: one token at a time, with the cache of ``init_cache``; to be given here or before.
          is_causal: no query sees a later key; False by default. Over a cache none ever does, and
            False is refused; without effect on a step of ``decode``, whose one query is the last.
          out_sharding, qkv_sharding: of the results of the projections.
          input_positions: ``[..., T]``, Flax's name (since 0.12.9) for ``positions``; without a
            ``rope`` they are handed to ``attention_fn``.
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
          ``[..., T, D]``, where D is ``out_features``; with ``cache`` also the cache.

        Raises:
          ValueError: arguments that do not fit together or with the cache.
          TypeError: arguments of another type; a ``cache`` that is none.
          NotImplementedError: the named implementation cannot take the call.
        """
        if input_positions is not None and self.rope is not None:
            if positions is not None:
                raise ValueError("input_positions is another name of positions: give one of them")
            positions, input_positions = input_positions, None
        inputs = fill_inputs(inputs_q, inputs_k, inputs_v)
        self._check_features(inputs)
        query, key, value = self._project_inputs(inputs, qkv_sharding)
        if self.normalize_qk:
            query = apply_norm(present(self.query_ln), query)
            key = apply_norm(present(self.key_ln), key)
        deterministic, dropout_rng = resolve_dropout(self, deterministic, rngs)
        config = AttentionConfig.from_layer(self, sinks=self.sinks is not None)
        call = LayerCall(
            inputs=inputs,
            mask=mask,
            is_causal=None if is_causal is _UNSET else is_causal,
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
            flax_cache=self._find_cache(decode) if cache is None else None,
            own_fn=dot_product_attention,
            flax_kwargs=dict(module=self if sow_weights else None, is_causal=False),
            options=dict(
                sinks=None if self.sinks is None else self.sinks[...],
                input_positions=input_positions,
            ),
            excluded={"decode=True": bool(self.decode if decode is None else decode)},
        )
        y = self.out(x, **drop_unset(out_sharding=out_sharding))
        return y if cache is None else (y, cache)

    def _check_features(self, inputs: Inputs) -> None:
        """Raise ValueError where an input has another number of features than the layer takes."""
        takes = (self.in_features, self.in_kv_features, self.in_kv_features)
        names = ("inputs_q", "inputs_k", "inputs_v")
        for name, x, features in zip(names, inputs, takes, strict=True):
            if x.shape[-1] != features:
                raise ValueError(
                    f"Incompatible input dimension, got {x.shape[-1]} but module expects "
                    f"{features}, for {name} of shape {x.shape}."
                )

    def _find_cache(self, decode: bool | None) -> FlaxCache | None:
        """Return Flax's cache where this call is a step over it."""
        message = (
            "No `decode` argument was provided to MultiHeadAttention, neither to its constructor "
            "nor to its call nor as an attribute."
        )
        if not first_from(decode, self.decode, error_msg=message):
            return None
        keys, values, index = self.cached_key, self.cached_value, self.cache_index
        if keys is None or values is None or index is None:
            raise ValueError("Autoregressive cache not initialized, call ``init_cache`` first.")

        def write(*arrays):
            keys[...], values[...], index[...] = arrays

        return FlaxCache(keys[...], values[...], index[...], write)

    def _project_inputs(self, inputs: Inputs, sharding: Any) -> tuple[Array, ...]:
        """Project the inputs to queries, keys and values, fused where the layer says so."""
        layers = (self.query, self.key, self.value)
        are_plain = functools.partial(
            is_plain,
            use_bias=self.use_bias,
            dtype=self.dtype,
            precision=self.precision,
            promote_dtype=self.qkv_promote_dtype,
            dot_general=self.qkv_dot_general,
        )
        options = drop_unset(out_sharding=sharding)
        if not (self.fused_qkv and all(map(are_plain, layers))):
            return tuple(f(x, **options) for f, x in zip(layers, inputs, strict=True))
        return project_fused(
            inputs,
            [f.kernel[...] for f in layers],
            [present(f.bias)[...] for f in layers] if self.use_bias else None,
            promote=lambda *arrays: self.qkv_promote_dtype(arrays, dtype=self.dtype),
            dot_general=self.qkv_dot_general,
            precision=self.precision,
            **options,
        )


class SelfAttention(MultiHeadAttention):
    """`MultiHeadAttention` of one input.

    Raises:
      ValueError, TypeError: as `MultiHeadAttention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from axattn import Mask
      >>> from axattn.nnx import SelfAttention
      >>> layer = SelfAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 6, 32)), mask=Mask.causal()).shape
      (1, 6, 32)
    """

    @overload  # type: ignore[override]  # of one input, as Flax's own
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        *,
        mask: Array | Mask | None = ...,
        deterministic: bool | None = ...,
        rngs: nnx.Rngs | nnx.RngStream | None = ...,
        sow_weights: bool = ...,
        decode: bool | None = ...,
        is_causal: bool = ...,
        out_sharding: Any = ...,
        qkv_sharding: Any = ...,
        positions: Integer[Array, "*batch T"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        cache: None = ...,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> Float[Array, "*batch T D"]: ...

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        *,
        mask: Array | Mask | None = ...,
        deterministic: bool | None = ...,
        rngs: nnx.Rngs | nnx.RngStream | None = ...,
        sow_weights: bool = ...,
        decode: bool | None = ...,
        is_causal: bool = ...,
        out_sharding: Any = ...,
        qkv_sharding: Any = ...,
        positions: Integer[Array, "*batch T"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        cache: CacheType,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> tuple[Float[Array, "B T D"], CacheType]: ...

    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        *,
        mask: Array | Mask | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = _UNSET,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        positions: Integer[Array, "*batch T"] | None = None,
        segment_ids: Integer[Array, "*batch T"] | None = None,
        cache: CacheType | None = None,
        lengths: Integer[Array, " B"] | None = None,
    ) -> Float[Array, "*batch T D"] | tuple[Float[Array, "B T D"], CacheType]:
        """Attend from ``inputs_q`` to itself; arguments as in `MultiHeadAttention`.

        Args:
          inputs_q: ``[..., T, E]``.
          mask: an `axattn.Mask` or an array broadcastable to ``[..., N, T, T]``; nonzero: attend.
          deterministic, rngs: no dropout, or where its random numbers come from.
          sow_weights: sow the weights ``[..., N, T, T]`` as ``nnx.Intermediate``.
          decode: one token at a time, with the cache of ``init_cache``.
          is_causal: no token sees a later one; False by default. Over a cache none ever does, and
            False is refused.
          out_sharding, qkv_sharding: of the results of the projections.
          positions: for ``rope``: integers ``[T]`` or ``[..., T]``.
          segment_ids: int ``[..., T]``.
          cache: one of `axattn.cache`.
          lengths: with a cache, int ``[B]``: how many of the T tokens are real in each row.

        Returns:
          ``[..., T, D]``; with ``cache`` also the cache.

        Raises:
          ValueError, TypeError, NotImplementedError: as `MultiHeadAttention`.
        """
        any_cache: Any = cache  # for either overload
        return super().__call__(
            inputs_q,
            mask=mask,
            deterministic=deterministic,
            rngs=rngs,
            sow_weights=sow_weights,
            decode=decode,
            is_causal=is_causal,
            out_sharding=out_sharding,
            qkv_sharding=qkv_sharding,
            positions=positions,
            segment_ids=segment_ids,
            cache=any_cache,
            lengths=lengths,
        )


class GroupedQueryAttention(MultiHeadAttention):
    """Each key/value head serves ``num_heads / num_kv_heads`` query heads.

    Grouped-query attention, https://arxiv.org/abs/2305.13245: `MultiHeadAttention` with
    ``num_kv_heads`` required.

    Raises:
      TypeError: ``num_kv_heads`` is not given; and as `MultiHeadAttention`.
      ValueError: as `MultiHeadAttention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from axattn.cache import DenseCache
      >>> from axattn.nnx import GroupedQueryAttention
      >>> layer = GroupedQueryAttention(4, 32, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
      >>> cache = DenseCache.create(1, 16, num_kv_heads=2, head_dim=8, dtype="float32")
      >>> y, cache = layer(jnp.ones((1, 6, 32)), cache=cache)
      >>> y.shape, cache.lengths.tolist()
      ((1, 6, 32), [6])
    """

    @_extend_signature(MultiHeadAttention.__init__)
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        *args,
        **kwargs,
    ):
        if num_kv_heads is None:
            raise TypeError("num_kv_heads is required in GroupedQueryAttention, got None")
        super().__init__(
            num_heads, in_features, qkv_features, out_features, num_kv_heads, *args, **kwargs
        )


class MultiQueryAttention(MultiHeadAttention):
    """One key/value head serves all query heads.

    Multi-query attention, https://arxiv.org/abs/1911.02150: `MultiHeadAttention` with
    ``num_kv_heads=1``.

    Raises:
      ValueError: another ``num_kv_heads``; and as `MultiHeadAttention`.
      TypeError: as `MultiHeadAttention`.

    Example:
      >>> from flax import nnx
      >>> from axattn.nnx import MultiQueryAttention
      >>> layer = MultiQueryAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
      >>> layer.key.kernel.shape  # [E, 1, H]
      (32, 1, 8)
    """

    @_extend_signature(MultiHeadAttention.__init__)
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int = 1,
        *args,
        **kwargs,
    ):
        check_one_kv_head(num_kv_heads)
        super().__init__(num_heads, in_features, qkv_features, out_features, 1, *args, **kwargs)
