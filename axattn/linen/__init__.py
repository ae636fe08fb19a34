"""Flax Linen layers over `axattn.dot_product_attention`.

Each layer is a drop-in for Flax's of the same name: the same fields, parameters, initial values,
cache and collections, with more fields after Flax's (keyword-only) and more arguments after those
of the call. Letters: B, T, S, N, K, H as everywhere, E features of the inputs, D of the output.
`dot_product_attention` fits ``attention_fn=`` of Flax's own classes, too.
`MultiHeadLatentAttention` is DeepSeek's, which Flax has not.
"""

from axattn._serialization import register_with_flax
from axattn.linen._attention import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    MultiQueryAttention,
    SelfAttention,
)
from axattn.linen._function import dot_product_attention
from axattn.linen._latent import MultiHeadLatentAttention

__all__ = [
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "MultiHeadLatentAttention",
    "MultiQueryAttention",
    "SelfAttention",
    "dot_product_attention",
]

register_with_flax()
