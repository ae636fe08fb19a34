"""Multi-head latent attention as a Linen layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from axattn import _latent
from axattn._attention import dot_product_attention
from axattn._layers.config import LatentConfig
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
from axattn.linen._parameters import get_parameters, make_dense, make_norm, may_read_kernels
from axattn.linen._randomness import resolve_dropout


class MultiHeadLatentAttention(nn.Module):
    """Attention whose keys and values come from one latent per token (DeepSeek-V2).

    Section 2.1 of https://arxiv.org/abs/2405.04434; letters as in `axattn.latent`. Parameters:
    ``query_down`` (kernel ``[E, q_lora_rank]``), ``query_norm`` and ``query_up`` (kernel
    ``[q_lora_rank, N, D + P]``), or ``query`` (kernel ``[E, N, D + P]``) where ``q_lora_rank`` is
    None; ``kv_down`` (kernel ``[E, R + P]``), ``kv_norm``, ``key_up`` (kernel ``[R, N, D]``),
    ``value_up`` (kernel ``[R, N, h]``) and ``out`` (kernel ``[N, h, features]``).

    Attributes:
      num_heads: N, query heads.
      kv_lora_rank: R, the size of the latent.
      q_lora_rank: the size of the queries' own latent; None: queries are projected at once.
      qk_nope_head_dim: D, a head's features without positions.
      qk_rope_head_dim: P, those with positions; even.
      v_head_dim: h, the size of a value.
      out_features: of the result; E by default.
      rope: rotates the P features. DeepSeek's checkpoints have ``interleaved`` pairs.
      scale: of the logits; by default 1 / sqrt(D + P), times what YaRN in ``rope`` asks for:
        `axattn.rotary.yarn_softmax_scale`.
      window: as in `MultiHeadDotProductAttention`.
      logits_soft_cap: logits become cap * tanh(logits / cap).
      implementation: of `axattn.dot_product_attention`.
      form: "naive", "absorbed", or None: the one with fewer FLOPs (`axattn.latent`). Over a cache
        tokens are absorbed, but for prompts into an empty one; "absorbed" excepts none.
        Inside ``nn.intercept_methods`` ``key_up`` and ``value_up`` are called. None is then the
        naive form; "absorbed" and caches recover the kernels from the outputs for the R unit
        vectors, and refuse a map that is not linear (under jit: NaN). To generate much, merge
        adapters.
      use_bias: of ``query_down``, ``kv_down`` and ``out``.
      norm_epsilon: of both RMS norms.
      dropout_rate: share of the weights that is dropped.
      broadcast_dropout: one pattern of dropout for all rows and heads.
      deterministic: no dropout, whatever the rate is; here or in the call.
      dtype: of the computation; by default what inputs and parameters have in common.
      param_dtype: of the parameters.
      precision: of the matrix products.
      kernel_init: initial kernels.
      bias_init: initial biases.
      logical_axes: as in `MultiHeadDotProductAttention`; besides, q_lora and kv_lora.
      attend: as in `axattn.latent.latent_attention`.

    Raises:
      ValueError: by its call, for sizes that are not positive, an odd ``qk_rope_head_dim``, another
        ``form``.
      TypeError: by its call, for sizes that are no integers, and a ``rope`` that is none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import linen
      >>> from axattn.cache import DenseCache
      >>> layer = linen.MultiHeadLatentAttention(
      ...     num_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
      ... )
      >>> x = jnp.ones((1, 6, 32))
      >>> params = jax.jit(layer.init)(jax.random.key(0), x)
      >>> cache = DenseCache.create(1, 16, **layer.cache_sizes, dtype="float32")
      >>> y, cache = jax.jit(layer.apply)(params, x, cache=cache)
      >>> y.shape, cache.bytes_per_token  # 16 + 4 numbers
      ((1, 6, 32), 80)
    """

    num_heads: int
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    out_features: int | None = None
    rope: RotaryEmbedding = RotaryEmbedding()
    scale: float | None = None
    window: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    form: _latent.Form | None = None
    implementation: Implementation | Sequence[Implementation] | None = None
    use_bias: bool = False
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Precision | None = None
    kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., Array] = nn.initializers.zeros_init()
    logical_axes: bool = False
    attend: Callable[..., Any] = dot_product_attention

    @property
    def cache_sizes(self) -> dict[str, Any]:
        """What ``create`` of a cache takes, by name; it then stores R + P numbers per token."""
        return _latent.cache_sizes(self.kv_lora_rank, self.qk_rope_head_dim)

    @overload
    def __call__(
        self,
        inputs: Float[Array, "*batch T E"],
        mask: Array | Mask | None = ...,
        *,
        deterministic: bool | None = ...,
        dropout_rng: Array | None = ...,
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
        dropout_rng: Array | None = ...,
        is_causal: bool | None = ...,
        positions: Integer[Array, "*leading T"] | None = ...,
        segment_ids: Integer[Array, "*batch T"] | None = ...,
        cache: CacheType,
        lengths: Integer[Array, " B"] | None = ...,
    ) -> tuple[Float[Array, "B T features"], CacheType]: ...

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*batch T E"],
        mask: Array | Mask | None = None,
        *,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
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
          deterministic: no dropout; to be given here or as a field if ``dropout_rate`` > 0.
          dropout_rng: a JAX key, ``[]`` or uint32 ``[2]``, in place of the stream ``dropout``.
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
          ValueError: fields or arguments that do not fit together or with the cache.
          TypeError: as the layer; a ``cache`` that is none.
          NotImplementedError: the named implementation cannot take the call.
        """
        config = LatentConfig.from_layer(self)
        deterministic, dropout_rng = resolve_dropout(self, deterministic, dropout_rng)
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
        x, cache = apply_latent_attention(self, config, call, _project_inputs(self, config, inputs))
        features = self.out_features or inputs.shape[-1]
        out = make_dense(self, "out", features, axis=(-2, -1), use_bias=self.use_bias)
        return out(x) if cache is None else (out(x), cache)


# A function, since interceptors and ``capture_intermediates`` would see a method and its result.
def _project_inputs(
    layer: MultiHeadLatentAttention, config: LatentConfig, inputs: Float[Array, "*batch T E"]
) -> LatentOperands:
    """Apply the layer's projections and norms to its inputs."""

    def find(name: str) -> nn.Module:
        if name.endswith("norm"):
            return make_norm(layer, name, config.norm_epsilon)
        bias = config.use_bias and name in BIASED
        return make_dense(layer, name, config.get_features(name), use_bias=bias)

    def find_up(name: str, latents: Array) -> UpProjection:
        up = make_dense(layer, name, config.get_features(name), use_bias=False)
        return get_parameters(up, latents)[0] if may_read_kernels() else up

    return project_latents(
        inputs,
        config,
        find=find,
        find_up=find_up,
        promote=lambda arrays: promote_dtype(*arrays, dtype=layer.dtype),
    )
