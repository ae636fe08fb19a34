"""Multi-head latent attention as an NNX layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast, overload

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from axattn import _latent
from axattn._attention import dot_product_attention
from axattn._layers.config import LatentConfig, make_hashable
from axattn._layers.latent import (
    BIASED,
    LatentOperands,
    UpProjection,
    apply_latent_attention,
    project_latents,
)
from axattn._layers.step import LayerCall
from axattn._masks import Mask
from axattn._rotary import RotaryEmbedding
from axattn._typing import Array, CacheType, Float, Implementation, Integer, Precision
from axattn.nnx._parameters import is_plain, name_axes
from axattn.nnx._randomness import resolve_dropout


class MultiHeadLatentAttention(nnx.Module):
    """Attention whose keys and values come from one latent per token (DeepSeek-V2).

    Section 2.1 of https://arxiv.org/abs/2405.04434; letters as in `axattn.latent`. Parameters,
    those of the Linen layer: ``query_down`` (kernel ``[E, q_lora_rank]``), ``query_norm`` and
    ``query_up`` (kernel ``[q_lora_rank, N, D + P]``), or ``query`` (kernel ``[E, N, D + P]``) where
    ``q_lora_rank`` is None; ``kv_down`` (kernel ``[E, R + P]``), ``kv_norm``, ``key_up`` (kernel
    ``[R, N, D]``), ``value_up`` (kernel ``[R, N, h]``) and ``out`` (kernel ``[N, h, features]``).

    Args:
      num_heads: N, query heads.
      in_features: E, features of the inputs.
      kv_lora_rank: R, the size of the latent.
      q_lora_rank: the size of the queries' own latent; None: queries are projected at once.
      qk_nope_head_dim, qk_rope_head_dim: D and P, a head's features without and with positions.
      v_head_dim: h, the size of a value.
      out_features: of the result; E by default.
      rope: rotates the P features. DeepSeek's checkpoints have ``interleaved`` pairs.
      scale: of the logits; by default 1 / sqrt(D + P), times what YaRN in ``rope`` asks for:
        `axattn.rotary.yarn_softmax_scale`.
      window, logits_soft_cap, implementation: as in `MultiHeadAttention`.
      form: "naive", "absorbed", or None: the one with fewer FLOPs (`axattn.latent`). Over a cache
        tokens are absorbed, but for prompts into an empty one; "absorbed" excepts none.
        A ``key_up`` or ``value_up`` that is not the layer's own (an adapter, a subclass) is
        called. None is then the naive form; "absorbed" and caches recover the kernels from the
        outputs for the R unit vectors, and refuse a map that is not linear (under jit: NaN). To
        generate much, merge adapters.
      use_bias: of ``query_down``, ``kv_down`` and ``out``.
      norm_epsilon: of both RMS norms.
      dropout_rate, broadcast_dropout, deterministic, rngs, keep_rngs: as in Flax's layers.
      dtype, param_dtype, precision, kernel_init, bias_init: likewise.
      logical_axes: as in `MultiHeadAttention`; besides, q_lora and kv_lora.
      attend: as in `axattn.latent.latent_attention`.

    Raises:
      ValueError, TypeError: sizes that are no positive integers, an odd ``qk_rope_head_dim``, no
        ``rope``, another ``form``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from axattn.nnx import MultiHeadLatentAttention
      >>> layer = MultiHeadLatentAttention(
      ...     4, 32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> layer(jnp.ones((1, 6, 32)), is_causal=True).shape
      (1, 6, 32)
      >>> layer.cache_sizes["head_dim"]  # numbers per token of a cache
      20
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        kv_lora_rank: int = 512,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        out_features: int | None = None,
        rope: RotaryEmbedding = RotaryEmbedding(),  # noqa: B008 (frozen)
        scale: float | None = None,
        window: int | tuple[int, int] | None = None,
        logits_soft_cap: float | None = None,
        form: _latent.Form | None = None,
        implementation: Implementation | Sequence[Implementation] | None = None,
        use_bias: bool = False,
        norm_epsilon: float = 1e-6,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Precision | None = None,
        kernel_init: Callable[..., Array] = nnx.nn.linear.default_kernel_init,
        bias_init: Callable[..., Array] = nnx.initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        logical_axes: bool = False,
        attend: Callable[..., Any] = dot_product_attention,
    ):
        self.num_heads = num_heads
        self.in_features = in_features
        self.kv_lora_rank = kv_lora_rank
        self.q_lora_rank = q_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.rope = rope
        self.scale = scale
        self.window = make_hashable(window)
        self.logits_soft_cap = logits_soft_cap
        self.form = form
        self.implementation = make_hashable(implementation)
        self.use_bias = use_bias
        self.norm_epsilon = norm_epsilon
        self.logical_axes = logical_axes
        self.dropout_rate = dropout_rate
        self.broadcast_dropout = broadcast_dropout
        self.deterministic = deterministic
        self.attend = attend
        self.dtype = dtype
        self.precision = precision
        config = LatentConfig.from_layer(self)

        def make_dense(name, inputs, features=None, axis=-1):
            return nnx.LinearGeneral(
                inputs,
                features or config.get_features(name),
                axis=axis,
                use_bias=use_bias and name in BIASED,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=cast(Any, precision),  # Flax's type of it is narrower than what it takes
                kernel_init=kernel_init,
                bias_init=bias_init,
                rngs=rngs,
            )

        def make_norm(features):
            return nnx.RMSNorm(
                features, epsilon=norm_epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        if q_lora_rank is None:
            self.query = make_dense("query", in_features)
        else:
            self.query_down = make_dense("query_down", in_features)
            self.query_norm = make_norm(q_lora_rank)
            self.query_up = make_dense("query_up", q_lora_rank)
        self.kv_down = make_dense("kv_down", in_features)
        self.kv_norm = make_norm(kv_lora_rank)
        self.key_up = make_dense("key_up", kv_lora_rank)
        self.value_up = make_dense("value_up", kv_lora_rank)
        heads = (num_heads, v_head_dim)
        self.out = make_dense("out", heads, out_features or in_features, axis=(-2, -1))
        self.rngs = rngs.dropout.fork() if keep_rngs and dropout_rate > 0 else nnx.data(None)
        if logical_axes:
            name_axes(self)

    @property
    def cache_sizes(self) -> dict[str, Any]:
        """What ``create`` of a cache takes, by name; it then stores R + P numbers per token."""
        return _latent.cache_sizes(self.kv_lora_rank, self.qk_rope_head_dim)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set what ``nnx.view`` may change.

        Args:
          deterministic: no dropout from now on; None leaves it as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    @overload
    def __call__(
        self,
        inputs: Float[Array, "*batch T E"],
        mask: Array | Mask | None = ...,
        *,
        deterministic: bool | None = ...,
        rngs: nnx.Rngs | nnx.RngStream | None = ...,
        is_causal: bool | None = ...,
        positions: Integer[Array, "*leading T"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        cache: None = ...,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> Float[Array, "*batch T features"]: ...

    @overload
    def __call__(
        self,
        inputs: Float[Array, "*batch T E"],
        mask: Array | Mask | None = ...,
        *,
        deterministic: bool | None = ...,
        rngs: nnx.Rngs | nnx.RngStream | None = ...,
        is_causal: bool | None = ...,
        positions: Integer[Array, "*leading T"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        cache: CacheType,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> tuple[Float[Array, "B T features"], CacheType]: ...

    def __call__(
        self,
        inputs: Float[Array, "*batch T E"],
        mask: Array | Mask | None = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        is_causal: bool | None = None,
        positions: Integer[Array, "*leading T"] | None = None,
        segment_ids: Integer[Array, "*batch T"] | None = None,
        cache: CacheType | None = None,
        lengths: Integer[Array, " B"] | None = None,
    ) -> Float[Array, "*batch T features"] | tuple[Float[Array, "B T features"], CacheType]:
        """Attend from ``inputs`` to itself, or to all that ``cache`` holds.

        Args:
          inputs: ``[..., T, E]``.
          mask: an `axattn.Mask` or an array broadcastable to ``[..., N, T, S]``; nonzero: attend.
            One of other numbers than 0 and 1 is a bias, and refused where its numbers are known:
            not under jit.
          deterministic, rngs: as in `MultiHeadAttention`.
          is_causal: no query sees a later token; False by default. Over a cache none ever does,
            and False is refused.
          positions: of the tokens, integers ``[T]`` or ``[..., T]``; counted from 0 by default, or
            from where each row of the cache ends. They do not move masks.
          segment_ids: int ``[..., T]``: tokens attend to those of the same segment only.
          cache: one of `axattn.cache`, made with `cache_sizes`, to which the tokens are appended
            and which they then attend over, causally. The result is then ``(output, cache)``.
          lengths: with a cache, int ``[B]``: how many of the T tokens are real in each row.

        Returns:
          ``[..., T, features]``; with ``cache`` also the cache.

        Raises:
          ValueError: arguments that do not fit together or with the cache.
          TypeError: a ``cache`` that is none.
          NotImplementedError: the named implementation cannot take the call.
        """
        if inputs.shape[-1] != self.in_features:
            raise ValueError(
                f"inputs takes {self.in_features} features, got shape {tuple(inputs.shape)}"
            )
        config = LatentConfig.from_layer(self)
        deterministic, dropout_rng = resolve_dropout(self, deterministic, rngs)
        call = LayerCall(
            inputs=(inputs,),
            mask=mask,
            is_causal=is_causal,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            lengths=lengths,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
        )
        x, cache = apply_latent_attention(self, config, call, self._project_inputs(config, inputs))
        return self.out(x) if cache is None else (self.out(x), cache)

    def _project_inputs(
        self, config: LatentConfig, inputs: Float[Array, "*batch T E"]
    ) -> LatentOperands:
        """Apply the layer's projections and norms to its inputs."""

        def find_up(name: str, latents: Array) -> UpProjection:
            up = getattr(self, name)
            plain = is_plain(
                up,
                use_bias=False,
                dtype=self.dtype,
                precision=self.precision,
                promote_dtype=promote_dtype,
            )
            return up.kernel[...] if plain else up

        return project_latents(
            inputs,
            config,
            find=lambda name: getattr(self, name),
            find_up=find_up,
            promote=lambda arrays: promote_dtype(arrays, dtype=self.dtype),
        )
