"""What the TPU kernels read and compute, and the time that it takes by their own model."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from axattn.kernels._block_bounds import bound_blocks
from axattn.kernels._tpu.flash import block_sizes
from benchmarks.harness.calls import asked

# What the devices call themselves, and their cores.
DEVICES = {
    "v4": ("TPU v4", 2),
    "v5e": ("TPU v5 lite", 1),
    "v5p": ("TPU v5", 2),
    "v6e": ("TPU v6 lite", 1),
    "tpu7x": ("TPU7x", 1),
}

SPLASH_BLOCK = 512
DIRECTIONS = ("fwd", "bwd")
COLUMNS = ("Chip", "Heads", "T", "", "Blocks", "GFLOP", "Reads", "splash", "Floor", "Model", "MXU")


def rows(name: str, chip, length: int, heads: int, kv_heads: int, size: int) -> Iterator[tuple]:
    call = _call(length, heads, kv_heads, size)
    splash_blocks = int(bound_blocks(call, SPLASH_BLOCK, SPLASH_BLOCK, "q").sum())
    for direction in DIRECTIONS:
        passes = _passes(call, chip, direction)
        seconds, flops, moved = 0.0, 0.0, 0.0
        for kernel, blocks in passes:
            found = block_sizes.estimate_time(call, chip, kernel, *blocks)
            seconds += found.total / chip.cores
            moved += found.memory * chip.hbm_bandwidth
            products = kernel.work.key_products + kernel.work.value_products
            flops += length**2 / 2 * heads * 2 * size * products
        useful = length**2 / 2 * heads * 2 * size * (2 if direction == "fwd" else 5)
        peak, bandwidth = chip.bf16_flops * chip.cores, chip.hbm_bandwidth * chip.cores
        arrays = 2 if direction == "fwd" else 4
        once = 2 * length * size * (arrays * heads + arrays * kv_heads)
        # Forward: K and V for each head and block of queries. Backward: those again, and Q and dO
        # for each head and block of keys.
        tile = 2 * 2 * SPLASH_BLOCK * size * heads * splash_blocks
        splash = 2 * length * size * arrays * heads + tile * (1 if direction == "fwd" else 2)
        yield (
            name,
            f"{heads}/{kv_heads}/{size}",
            str(length),
            direction,
            " ".join(f"{q}x{kv}" for _, (q, kv) in passes),
            f"{flops / 1e9:.0f}",
            f"{moved / 1e6:.0f} MB",
            f"{splash / 1e6:.0f} MB",
            f"{max(useful / peak, once / bandwidth) * 1e3:.2f} ms",
            f"{seconds * 1e3:.2f} ms",
            f"{useful / peak / seconds:.0%}",
        )


def _passes(call, chip, direction: str) -> list:
    """(kernel, blocks) of each pass."""
    if direction == "fwd":
        found = block_sizes.choose_forward_block_sizes(call, chip)
        return [(block_sizes.FORWARD, (found.block_q, found.block_kv))]
    found = block_sizes.choose_backward_block_sizes(call, chip)
    first = (found.query.block_q, found.query.block_kv)
    if found.key is None:
        return [(block_sizes.FUSED, first)]
    return [
        (block_sizes.QUERY_GRAD, first),
        (block_sizes.KEY_GRAD, (found.key.block_q, found.key.block_kv)),
    ]


def _call(length: int, heads: int, kv_heads: int, size: int):
    shapes = (jax.ShapeDtypeStruct((1, length, n, size), jnp.bfloat16) for n in (heads, kv_heads))
    query, key = shapes
    return asked(lambda call: call, query, key, key, is_causal=True)
