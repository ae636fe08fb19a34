"""Multi-head latent attention: one latent vector per token in place of its keys and values.

DeepSeek-V2 (https://arxiv.org/abs/2405.04434, section 2.1). A token is its latent ``c``, R numbers
that all heads share, and P rotated features of a key, which all heads share too. The key of head n
is ``[c @ key_up[:, n], key_rope]``, its value ``c @ value_up[:, n]``. Two forms give one result:

naive
    Keys and values of all N heads are written out: attention with N key/value heads of size D + P
    and h. Fewer FLOPs where queries are many: training, prompts.
absorbed
    Since ``(c @ key_up) . q = c . (key_up @ q)``, queries take key_up in: multi-query attention, N
    heads of size R + P over the one head ``[c, key_rope]`` whose first R features are the values.
    Nothing is written out: a cache has R + P numbers per token.

Letters besides those of `axattn.dot_product_attention`, with their names in configurations:
R ``kv_lora_rank``, D ``qk_nope_head_dim``, P ``qk_rope_head_dim``, h ``v_head_dim``. In DeepSeek-V3
N = 128, R = 512, D = 128, P = 64, h = 128. Over a cache::

    cache = DenseCache.create(batch, capacity, **latent.cache_sizes(512, 64), dtype="bfloat16")
    out, cache = latent.extend(cache, query, c, key_rope, key_up, value_up)
"""

from axattn._latent import (
    absorb,
    attend,
    cache_sizes,
    extend,
    latent_attention,
    preferred_form,
    write_out,
)

__all__ = [
    "absorb",
    "attend",
    "cache_sizes",
    "extend",
    "latent_attention",
    "preferred_form",
    "write_out",
]
