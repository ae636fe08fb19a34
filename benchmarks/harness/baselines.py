"""What axattn is measured against, as ``attention_fn`` of its Flax layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def repeat_kv(
    query,
    key,
    value,
    mask=None,
    *,
    is_causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
):
    """Copies every key/value head for each of its query heads, then plain multi-head attention.

    What most code does. Query [B, T, N, H], key and value [B, S, K, H]; softmax in float32.
    Dropout is Flax's: bits of their own for every weight, drawn by `jax.random.bernoulli`.
    """
    group = query.shape[-2] // key.shape[-2]
    key = jnp.repeat(key, group, axis=-2)
    value = jnp.repeat(value, group, axis=-2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if is_causal:
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if dropout_rate > 0.0 and dropout_rng is not None:
        kept = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, weights.shape)
        weights = (
            weights * kept.astype(weights.dtype) / jnp.asarray(1 - dropout_rate, weights.dtype)
        )
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def jax_nn(query, key, value, mask=None, *, is_causal: bool = False):
    """``jax.nn.dot_product_attention`` as it comes."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)


def splash(query, key, value, mask=None, *, is_causal: bool = False):
    """jax's splash attention, for TPUs: causal or whole, one batch row at a time under vmap."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    q_len, heads, size = query.shape[-3:]
    if mask is not None or q_len % 128 or key.shape[-3] != q_len:
        raise NotImplementedError("splash is called here for causal or no mask, T = S, T % 128 = 0")
    make = library.CausalMask if is_causal else library.FullMask
    masks = library.MultiHeadMask([make((q_len, q_len)) for _ in range(heads)])
    block = next(n for n in (512, 256, 128) if q_len % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = library.BlockSizes(**{f"block_{name}": block for name in names})
    kernel = library.make_splash_mha(masks, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    by_head = [x.swapaxes(-3, -2) for x in (query * size**-0.5, key, value)]
    return jax.vmap(kernel)(*by_head).swapaxes(-3, -2)


BASELINES = {"repeat_kv": repeat_kv, "jax_nn": jax_nn, "splash": splash}
