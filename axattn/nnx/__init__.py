"""Flax NNX layers over `axattn.dot_product_attention`.

`MultiHeadAttention` is a drop-in for ``flax.nnx.MultiHeadAttention``: the same arguments,
parameters, initial values, cache and views, with more keyword arguments after Flax's. Letters: B,
T, S, N, K, H as everywhere, E features of the inputs, D of the output. `dot_product_attention` fits
``attention_fn=`` of Flax's own class, too. `MultiHeadLatentAttention` is DeepSeek's, which Flax has
not.
"""

from axattn._serialization import register_with_flax
from axattn.nnx._attention import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    SelfAttention,
)
from axattn.nnx._function import dot_product_attention
from axattn.nnx._latent import MultiHeadLatentAttention

__all__ = [
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "MultiQueryAttention",
    "SelfAttention",
    "dot_product_attention",
]

register_with_flax()
