"""Decode attention of JAX's own, over what an axattn cache stores.

Each maker takes a case and a name, and returns a layout of the inputs and a function of it.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from axattn import _quantization
from axattn.cache import Cache, PagedCache
from benchmarks.harness.decode_cases import Case
from benchmarks.harness.decode_inputs import Inputs

Maker = tuple[Callable[[Inputs], Any], Callable[[Any], jax.Array]]

# Of `pallas_triton`: parts that the keys are split into, as many as these kernels take by default,
# and tokens that fit into shared memory.
_SPLITS = 16
_PAGED_TOKENS = 256


def refuse(**features: bool) -> None:
    """NotImplementedError for the first feature that the case has."""
    for name, present in features.items():
        if present:
            raise NotImplementedError(f"does not take {name.replace('_', ' ')}")


# ---- jax.nn ---------------------------------------------------------------------------------


def jax_nn(case: Case, name: str) -> Maker:
    """``jax.nn.dot_product_attention`` over BSKH arrays, masked by lengths, or by an array.

    It takes no values of another size than keys: of latent keys, it is given the whole as values.
    """
    refuse(
        quantized_caches=case.dtype != "bfloat16",
        pages=case.kind == "paged",
        rings=case.kind == "ring",
        soft_cap=case.soft_cap is not None,
    )
    implementation = name.removeprefix("jax_nn_")

    def attend(given):
        query, key, *value, lengths, mask = given
        out = jax.nn.dot_product_attention(
            query,
            key,
            *(value or [key]),
            mask=mask,
            key_value_seq_lengths=lengths if mask is None else None,
            implementation=implementation,
        )
        return out[..., : case.value_size]

    return _token_major(case), attend


@functools.cache  # one function, and one layout, for all that take it
def _token_major(case: Case) -> Callable[[Inputs], Any]:
    return jax.jit(functools.partial(_by_token, case))


def _by_token(case: Case, given: Inputs) -> tuple:
    """Query, key, value ``[B, S, K, size]``, lengths, and what several queries or a window see."""
    key, *value = (x.swapaxes(1, 2) for x in _numbers(given.cache))
    lengths, mask = given.cache.lengths, given.mask
    if mask is None and (case.tokens > 1 or case.window is not None):
        # Its own causal mask begins at the first key, not at the newest ones.
        slots = jnp.arange(case.length)[None, None]
        last = (lengths[:, None] - case.tokens + jnp.arange(case.tokens))[..., None]
        mask = slots <= last
        if case.window is not None:
            mask &= slots >= last - case.window
        mask = mask[:, None]
    return given.query, key, *value, lengths, mask


def _numbers(cache: Cache) -> list[jax.Array]:
    """Keys and, where there are any, values in the cache's dtype, head-major as stored."""
    arrays = [x for x in (cache.arrays.keys, cache.arrays.values) if x is not None]
    return [_quantization.cast_codes(x, cache.dtype, cache.dtype) for x in arrays]


# ---- jax.experimental.pallas.ops.gpu ----------------------------------------------------------


def pallas_triton(case: Case, name: str) -> Maker:
    """Pallas's Triton kernels ``decode_attention`` and ``paged_attention``, deprecated upstream."""
    refuse(
        several_query_tokens=case.tokens > 1,
        latent_caches=case.latent,
        rings=case.kind == "ring",
        windows=case.window is not None,
        float8=case.dtype.startswith("float8"),
    )
    if case.kind == "paged":
        return _paged(case)
    refuse(quantized_dense_caches=case.dtype != "bfloat16", soft_cap=case.soft_cap is not None)
    kernel = functools.partial(
        _imported("decode_attention", "decode_attn_unbatched"),
        start_idx=None,
        sm_scale=case.head_dim**-0.5,
        block_h=16,
        block_k=128,
        k_splits=_SPLITS,
        num_warps=None,
        num_stages=2,
        grid=None,
        interpret=False,
        debug=False,
        return_residuals=False,
        normalize_output=True,
    )

    def one(query, key, value, length):  # [G, H], [S, H], [S, H], []
        return kernel(query, key, value, kv_seq_len=length)

    # What its `gqa` does but for the transposes: it takes BSKH, and turns it head-major first.
    heads = jax.vmap(jax.vmap(one, (0, 0, 0, None)))

    def attend(given):
        query, key, value, lengths = given
        grouped = query.reshape(case.batch, case.kv_heads, -1, case.head_dim)
        return heads(grouped, key, value, lengths).reshape(query.shape)

    return _head_major, attend


def _head_major(given: Inputs) -> tuple:
    """As it is stored: not jitted, which would copy it."""
    return given.query, *_numbers(given.cache), given.cache.lengths


def _paged(case: Case) -> Maker:
    attention = _imported("paged_attention", "paged_attention")
    block = max(1, min(8, _PAGED_TOKENS // case.page))

    def attend(given):
        query, table, lengths, *arrays = given
        # It does not scale; it splits the table, whose length it must divide.
        scaled = (query[:, 0] * case.head_dim**-0.5).astype(query.dtype)
        splits = math.gcd(table.shape[1], _SPLITS)
        out = attention(
            scaled,
            arrays[0],
            arrays[1],
            table,
            lengths,
            *arrays[2:],
            k_splits=splits,
            pages_per_compute_block=math.gcd(table.shape[1] // splits, block),
            attn_logits_soft_cap=case.soft_cap,
        )
        return out[:, None]

    return _pages_by_head, attend


@jax.jit
def _pages_by_head(given: Inputs) -> tuple:
    """Query, table, lengths, and keys, values (and scales) ``[K, pages, page, ...]``."""
    cache = given.cache
    assert isinstance(cache, PagedCache)
    scales = (cache.arrays.key_scales, cache.arrays.value_scales)
    arrays = (*_numbers(cache), *(() if scales[0] is None else scales))
    # An entry that names no page must not be one to the kernel.
    table = jnp.maximum(cache.block_table, 0)
    return given.query, table, cache.lengths, *(x.swapaxes(0, 1) for x in arrays)


def _imported(module: str, function: str) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found = importlib.import_module(f"jax.experimental.pallas.ops.gpu.{module}")
            return getattr(found, function)
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"is not in jax {jax.__version__} ({error})") from None
