"""Block sizes that fit shared memory, which is counted from what the kernels declare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn.kernels._hopper.block_sizes import (
    BackwardBlockSizes,
    DecodeBlockSizes,
    ForwardBlockSizes,
    MLABlockSizes,
    classify_call,
    find_row,
)
from axattn.kernels._hopper.flash.forward import declare_forward_scratch
from axattn.kernels._hopper.flash.key_grad import declare_key_grad_scratch
from axattn.kernels._hopper.flash.query_grad import declare_query_grad_scratch
from axattn.kernels._hopper.kv_loader import KVLoader
from axattn.kernels._hopper.primitives import (
    REDUCTION_BYTES,
    ROWS,
    SHARED_BYTES,
    count_shared_bytes,
)
from axattn.kernels._hopper.split_kv.decode import declare_decode_scratch
from axattn.kernels._hopper.split_kv.mla import declare_mla_scratch
from axattn.kernels._masks import list_dense_masks

# Rows that a warpgroup cleans or converts at a time, and a score tile's columns.
_BLOCK_KV = 64

# More in flight than this hides no more latency.
_MOST_STAGES = 8

# Queries, and operands that are converted: float16 takes as much.
_DTYPE = jnp.bfloat16

# A row of the table holds for all calls of its kind: with a bias, it has a mask array, too.
_LARGEST_SCORE_TILES = {"bias": jnp.float32, "allowed": jnp.int8}

_ARRAYS = KVLoader(
    kind="arrays",
    dtype="bfloat16",
    num_kv_heads=1,
    page_size=ROWS,
    num_pages=1,
    pages_per_row=1,
    values_in_keys=False,
    has_unused_slots=False,
)

_Sizes = TypeVar("_Sizes")


def choose_forward_block_sizes(call: AttentionCall) -> ForwardBlockSizes:
    """Return the sizes of the table, or smaller ones that fit."""
    sizes = _shrink_row("forward", call)
    return sizes if call.stored is None else _fit_cache(sizes, call)


def choose_backward_block_sizes(call: AttentionCall) -> BackwardBlockSizes:
    """Return the sizes of the table, or smaller ones that fit."""
    return BackwardBlockSizes(_shrink_row("query_grad", call), _shrink_row("key_grad", call))


def choose_decode_block_sizes(call: AttentionCall) -> DecodeBlockSizes:
    """Return the most blocks in flight; one warpgroup where two leave no room."""
    choices = [DecodeBlockSizes(_BLOCK_KV, stages, 2) for stages in range(_MOST_STAGES, 0, -2)]
    choices += [DecodeBlockSizes(_BLOCK_KV, stages, 1) for stages in (3, 2, 1)]
    return _find_first_that_fits(choices, lambda one: _count_split_kv_bytes(one, call))


def choose_mla_block_sizes(call: AttentionCall) -> MLABlockSizes:
    """Return the most blocks in flight."""
    choices = [MLABlockSizes(_BLOCK_KV, stages) for stages in range(_MOST_STAGES // 2, 0, -1)]
    return _find_first_that_fits(choices, lambda one: _count_split_kv_bytes(one, call))


def _shrink_row(kernel: str, call: AttentionCall) -> Any:
    """Return the sizes of the table, or smaller ones where they do not fit.

    They fit the head sizes of their row. Where H and h are not those, the forward kernel has a
    buffer more.
    """
    sizes, score_tiles = find_row(kernel, call), classify_call(call) == "biased"
    heads = (call.head_dim, call.value_head_dim)
    while count_flash_bytes(kernel, sizes, *heads, score_tiles=score_tiles) > SHARED_BYTES:
        values = dataclasses.asdict(sizes)
        stages = {k: v for k, v in values.items() if k.endswith("stages") and v > 1}
        if stages:
            name = max(stages, key=stages.__getitem__)
            sizes = dataclasses.replace(sizes, **{name: stages[name] - 1})
        else:
            (name,) = (name for name in values if name.startswith("block"))
            sizes = dataclasses.replace(sizes, **{name: values[name] // 2})
    return sizes


def _fit_cache(sizes: ForwardBlockSizes, call: AttentionCall) -> ForwardBlockSizes:
    """Return sizes for a cache, whose blocks are cleaned and converted 64 rows at a time."""
    kv, score_tiles = KVLoader.from_call(call), classify_call(call) == "biased"
    heads = (call.head_dim, call.value_head_dim)
    # Converting 128 keys at a time takes more registers than there are.
    blocks = [
        n for n in (sizes.block_kv, ROWS) if n % ROWS == 0 and not (kv.is_quantized and n > ROWS)
    ]
    choices = [
        dataclasses.replace(sizes, block_kv=block, stages=stages)
        for block in dict.fromkeys(blocks)
        for stages in range(max(sizes.stages, 2), 0, -1)
    ]
    return _find_first_that_fits(
        choices,
        lambda one: count_flash_bytes("forward", one, *heads, score_tiles=score_tiles, kv=kv),
    )


def _find_first_that_fits(choices: list[_Sizes], count: Callable[[_Sizes], int]) -> _Sizes:
    """Return the first choice that shared memory holds, or else the last one."""
    return next((one for one in choices if count(one) <= SHARED_BYTES), choices[-1])


def count_flash_bytes(
    kernel: str,
    sizes: Any,
    head_dim: int,
    value_head_dim: int,
    *,
    score_tiles: bool,
    kv: KVLoader = _ARRAYS,
) -> int:
    """Return the shared memory of a program.

    Args:
      kernel: ``"forward"``, ``"query_grad"`` or ``"key_grad"``.
      sizes: its block sizes.
      head_dim, value_head_dim: H and h.
      score_tiles: count tiles of a bias and a mask over queries and keys, at their largest.
      kv: where keys and values are.
    """
    heads = (head_dim, value_head_dim)
    options: dict[str, Any] = {
        "dtype": _DTYPE,
        "score_dtypes": _LARGEST_SCORE_TILES if score_tiles else {},
    }
    if kernel == "forward":
        scratch = declare_forward_scratch(sizes, kv, *heads, **options)
        return count_shared_bytes(scratch, reduction_bytes=REDUCTION_BYTES)
    if kernel == "query_grad":
        return count_shared_bytes(declare_query_grad_scratch(sizes, kv, *heads, **options))
    return count_shared_bytes(declare_key_grad_scratch(sizes, *heads, **options))


def _count_split_kv_bytes(sizes: DecodeBlockSizes | MLABlockSizes, call: AttentionCall) -> int:
    """Return the shared memory of a program of `decode`, or of `decode_mla` for its sizes."""
    score_dtypes: dict[str, Any] = {}
    if call.bias is not None:
        # In 4 bytes, also where a bias per head and key becomes one over rows and keys.
        score_dtypes["bias"] = jnp.float32
    if list_dense_masks(call):
        score_dtypes["allowed"] = jnp.int8
    declare: Callable[..., Mapping[str, Any]] = declare_decode_scratch
    if isinstance(sizes, MLABlockSizes):
        declare = declare_mla_scratch
    return count_shared_bytes(
        declare(
            sizes,
            KVLoader.from_call(call),
            call.head_dim,
            call.value_head_dim,
            dtype=_DTYPE,
            score_dtypes=score_dtypes,
        )
    )
