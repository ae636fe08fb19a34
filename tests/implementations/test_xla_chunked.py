"""xla_chunked in every way that it can cut a call; the features are in tests/test_attention.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn._implementations.chunked import block_sizes
from axattn._mask_parts import EMPTY, FULL, PARTIAL
from axattn.cache import PagedCache
from tests import cases, precision
from tests.kernels.calls import call_of_cache
from tests.tiers import ci


@pytest.mark.parametrize(
    "name",
    [
        "lengths",
        *ci(
            "everything",
            "offset_per_row",
            "packed",
            "bias_B11S",
            "bias_NTS",
            "dropout",
            "alibi_causal_rows",
        ),
    ],
)
def test_batch_rows_together(force_blocks, name):
    """These sizes would take the rows one at a time by themselves."""
    force_blocks(32, 48, by_row=False)
    precision.check(cases.make(name, jnp.float32), ("xla_chunked",))


@pytest.mark.parametrize(
    "name, options",
    [
        ("everything", {}),
        ("dropout", {}),
        *ci(("bias_NTS", {}), ("alibi_causal_rows", {}), ("sinks", {})),
        *ci(("dropout", {"by_row": False}), ("mask_NTS", {"wide_results": True})),
    ],
)
def test_heads_in_turn(force_blocks, name, options):
    """These calls would take all heads at a time by themselves."""
    force_blocks(32, 48, heads=1, **options)
    precision.check(cases.make(name, jnp.float32), ("xla_chunked",))


def test_three_groups_of_heads_and_a_negative_scale(force_blocks):
    """The least product has the largest score: exp of the others less it would overflow."""
    force_blocks(16, 16, heads=1)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 40, heads, 16)), jnp.float32) for heads in (6, 3, 3))

    def run(implementation):
        def loss(*arrays):
            out = axattn.dot_product_attention(
                *arrays, scale=-4.0, is_causal=True, implementation=implementation
            )
            return jnp.sum(jnp.sin(3 * out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for got, want in zip(*map(jax.tree.leaves, map(run, ("xla_chunked", "xla"))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("N, K", [(16, 2), (16, 16), (8, 1), (96, 8), (128, 1)])
def test_tiles_fit_the_cores(monkeypatch, N, K):
    """On a CPU a tile has as many rows as its cores' caches hold, if the call has them."""
    for cores in (1, 2, 8):
        monkeypatch.setattr(block_sizes, "_find_tile_scores", lambda cores=cores: cores * 2**18)
        for backward in (False, True):
            chosen = block_sizes.choose_chunk_sizes(
                _call(1, 4096, 4096, N, K), "cpu", backward=backward
            )
            assert K % chosen.heads == 0 and 16 <= chosen.q <= (most := 128 if backward else 256)
            rows = chosen.heads * (N // K) * chosen.q
            assert rows <= cores * 1024 or chosen.q == 16
            assert 2 * rows > cores * 1024 or chosen.heads == K and chosen.q == most


@pytest.mark.ci
@pytest.mark.parametrize("q, kv", [(112, 200), (113, 203), (32, 203), (57, 102)])
def test_block_sizes(force_blocks, q, kv):
    """Blocks that share all but one slot, one block, a column of blocks, and tails of one."""
    force_blocks(q, kv)
    precision.check(cases.make("everything", jnp.float32), ("xla_chunked",))


@pytest.mark.parametrize(
    "name, folded",
    [
        *(("decode_three", False), ("causal_offset", True)),
        *ci(("decode_three", True), ("causal_offset", False)),
    ],
)
def test_forms_of_the_products(force_blocks, name, folded):
    force_blocks(32, 48, folded=folded)
    precision.check(cases.make(name, jnp.float32), ("xla_chunked",))


@pytest.mark.ci
def test_own_block_sizes_are_used():
    """Long enough to be cut by the sizes that are chosen by themselves, tails included."""
    shape = cases.Shape(2, 300, 700, 4, 1, 8, 8)
    arrays = cases.arrays(np.random.default_rng(0), shape, jnp.float32)
    call = precision.Call(arrays, dict(is_causal=True, local_window_size=(300, None), q_offset=400))
    chosen = block_sizes.choose_chunk_sizes(_call(2, 300, 700, 4, 1), "cpu")
    assert 300 > chosen.q and 700 > chosen.kv and 300 % chosen.q and 700 % chosen.kv
    precision.check(call, ("xla_chunked",))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (8, 1, 8192, 32, 4), (1, 8192, 8192, 32, 2), (64, 512, 512, 128, 128), (2, 3, 7, 16, 1)],
    ids=str,
)  # fmt: skip
def test_choice_fits(platform, shape):
    B, T, S, N, K = shape
    call = _call(B, T, S, N, K)
    chosen = block_sizes.choose_chunk_sizes(call, platform)
    assert 1 <= chosen.q <= T and 1 <= chosen.kv <= S
    # The float32 tile of scores is bounded: 32 MiB, or 64 x 128 per row and head.
    rows = (1 if chosen.by_row else B) * N
    assert 4 * rows * chosen.q * chosen.kv <= max(2**25, 4 * rows * 64 * 128)
    assert chosen == block_sizes.choose_chunk_sizes(call, platform)


def test_choice_for_steps_of_a_batch():
    step, prompt = (_call(8, T, 8192, 32, 4) for T in (1, 512))
    on = {name: block_sizes.choose_chunk_sizes(step, name) for name in ("cpu", "cuda", "tpu")}
    # On a CPU they read longer runs of keys, and together: one row's step is a poor product.
    alone = block_sizes.choose_chunk_sizes(prompt, "cpu")
    assert alone.by_row and not on["cpu"].by_row and alone.kv < on["cpu"].kv
    # Where XLA would copy the keys head by head: on CPU and GPU, and not a cache, which lies so.
    assert [on[name].folded for name in on] == [True, True, False]
    query = jnp.zeros((2, 1, 4, 64), jnp.bfloat16)
    cached = call_of_cache(PagedCache.create(2, 4, 1024, 2, 2, 64), query)
    found = block_sizes.choose_chunk_sizes(cached, "cpu")
    assert not found.folded and not alone.folded
    # A block has whole pages, and one where that is longer than blocks are.
    assert found.kv == 1024 > on["cpu"].kv


def _call(B, T, S, N, K):
    from axattn._call import AttentionCall

    query, kv = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, T, N, 64), (B, S, K, 64)))
    return AttentionCall(query, kv, kv)


def test_visits():
    row = np.array(
        [[FULL, EMPTY, PARTIAL, FULL, EMPTY, FULL], [FULL, EMPTY, EMPTY, PARTIAL, EMPTY, FULL]]
    )
    full, partial = block_sizes.list_chunks(jnp.asarray(row, jnp.int8), 6, False)
    assert full.order[: full.count].tolist() == [0, 5]
    assert partial.order[: partial.count].tolist() == [2, 3]
    # A last block that overlaps its neighbour is never full.
    full, partial = block_sizes.list_chunks(jnp.asarray(row, jnp.int8), 6, True)
    assert full.order[: full.count].tolist() == [0]
    assert partial.order[: partial.count].tolist() == [2, 3, 5]


def test_choice_is_hashable_and_replaceable():
    chosen = block_sizes.choose_chunk_sizes(_call(1, 100, 100, 2, 1), "cpu")
    assert {chosen: 1}[dataclasses.replace(chosen)] == 1
