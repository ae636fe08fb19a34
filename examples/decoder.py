"""A decoder-only transformer with layers of axattn: local layers with RoPE, global ones without.

    model = Decoder(Config(vocabulary=137), rngs=nnx.Rngs(0))
    logits = model(tokens)                          # [B, T, V]; all of a text at once
    caches = make_caches(model.config, "dense", batch=2, length=1024)  # examples.caches
    logits, caches = model(tokens, caches=caches)   # the next T tokens of each row

Local layers see a window to their left and tell positions apart; global layers see everything and
find things by what they are. So nothing depends on how long the training texts were, and a ring
cache holds all that a local layer will ever read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import axattn.nnx
from axattn._typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes of a `Decoder`.

    Attributes:
      vocabulary: number of tokens.
      features: of the residual stream.
      heads, kv_heads, head_dim: of each attention layer; kv_heads=1 is multi-query attention.
      windows: for each layer, how many tokens to the left it sees besides the token itself, or
        None for all of them.
      rope_base: of the local layers' positions; as many as their window has need not turn slowly.
      hidden: features between the two matrices of an MLP.
      dtype: of activations.
    """

    vocabulary: int
    features: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    windows: tuple[int | None, ...] = (7, None, 7, None)
    hidden: int = 256
    rope_base: float = 100.0
    dtype: jax.typing.DTypeLike = jnp.float32


class Block(nnx.Module):
    """Attention and an MLP, each added to its input."""

    def __init__(
        self,
        config: Config,
        window: int | None,
        *,
        attention_fn: Callable[..., Array],
        rngs: nnx.Rngs,
    ):
        c = config
        self.attention_norm = nnx.RMSNorm(c.features, dtype=c.dtype, rngs=rngs)
        self.attention = axattn.nnx.GroupedQueryAttention(
            c.heads,
            c.features,
            c.heads * c.head_dim,
            num_kv_heads=c.kv_heads,
            dtype=c.dtype,
            use_bias=False,
            decode=False,
            attention_fn=attention_fn,
            rope=None if window is None else axattn.rotary.RotaryEmbedding(c.rope_base),
            window=None if window is None else (window, 0),
            rngs=rngs,
        )
        self.mlp_norm = nnx.RMSNorm(c.features, dtype=c.dtype, rngs=rngs)
        self.up = nnx.Linear(c.features, c.hidden, use_bias=False, dtype=c.dtype, rngs=rngs)
        self.down = nnx.Linear(c.hidden, c.features, use_bias=False, dtype=c.dtype, rngs=rngs)

    def __call__(self, x, cache=None, lengths=None, positions=None, sow_weights=False):
        y = self.attention_norm(x)
        positions = None if self.attention.rope is None else positions
        if cache is None:
            y = self.attention(y, is_causal=True, positions=positions, sow_weights=sow_weights)
        else:
            y, cache = self.attention(
                y, is_causal=True, cache=cache, lengths=lengths, positions=positions
            )
        x = x + y
        x = x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))
        return x, cache


class Decoder(nnx.Module):
    """Tokens to logits. Input and output share one embedding.

    ``attention_fn`` is what all layers attend with, where no cache does it.
    """

    def __init__(
        self,
        config: Config,
        *,
        attention_fn: Callable[..., Array] = axattn.nnx.dot_product_attention,
        rngs: nnx.Rngs,
    ):
        c = self.config = config
        self.embedding = nnx.Embed(c.vocabulary, c.features, dtype=c.dtype, rngs=rngs)
        self.blocks = nnx.List(
            [Block(c, window, attention_fn=attention_fn, rngs=rngs) for window in c.windows]
        )
        self.norm = nnx.RMSNorm(c.features, dtype=c.dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        caches: tuple | None = None,
        lengths: Int[Array, " B"] | None = None,
        positions: Int[Array, "*B T"] | None = None,
        sow_weights: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], tuple]:
        """Float32 logits of the token after each one.

        Args:
          tokens: [B, T]; whole texts, or with caches the next tokens of each row.
          caches: one for each layer, as of `make_caches`.
          lengths: how many of a row's T tokens are real, at its front; the rest is padding, whose
            logits mean nothing. By default all are.
          positions: [T] or [B, T], for RoPE, where the tokens are not in order. ``attention_fn``
            has to know it, too.
          sow_weights: without caches, sow the attention weights of every layer, [B, N, T, T], as
            ``nnx.Intermediate``.

        Returns:
          logits [B, T, V]; with caches, (logits, caches with these tokens in them).
        """
        x = self.embedding(tokens)
        after = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, cache = block(x, cache, lengths, positions, sow_weights)
            after.append(cache)
        logits = self.embedding.attend(self.norm(x)).astype(jnp.float32)
        return logits if caches is None else (logits, tuple(after))
