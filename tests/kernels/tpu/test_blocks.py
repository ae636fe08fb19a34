"""Several blocks of queries and of keys, in one pass of gradients and in two."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn.kernels._tpu.flash import block_sizes, grid
from axattn.kernels._tpu.flash.grid import TpuBackwardBlockSizes, TpuBlockSizes
from tests import cases, precision
from tests.kernels.calls import make_call, with_layout
from tests.precision import Call

SMALL, OTHER = TpuBlockSizes(16, 128), TpuBlockSizes(48, 128)

WAYS = {"fused": TpuBackwardBlockSizes(SMALL), "split": TpuBackwardBlockSizes(OTHER, SMALL)}

# Ways, layouts and cores in pairs.
CALLS = [
    ("fused", "tokens", 1, "causal_offset"),
    ("split", "heads", 1, "packed"),
    ("fused", "heads", 2, "window_pair"),
    ("split", "tokens", 2, "offset_per_row"),
    ("fused", "heads", 1, "lengths_zero"),
    ("fused", "tokens", 1, "sinks_empty_rows"),
    ("split", "heads", 1, "positions"),
]


@pytest.fixture
def small_blocks(request, monkeypatch):
    way = WAYS[getattr(request, "param", "fused")]
    monkeypatch.setattr(block_sizes, "choose_forward_block_sizes", lambda *_: OTHER)
    monkeypatch.setattr(block_sizes, "choose_backward_block_sizes", lambda *_: way)


@pytest.mark.ci
@pytest.mark.parametrize(
    "small_blocks, layout, cores, name",
    CALLS,
    indirect=["small_blocks", "cores"],
)
def test_features(interpreted, small_blocks, layout, name):
    dtype = (jnp.bfloat16, jnp.float32)[len(name) % 2]
    precision.check(with_layout(cases.make(name, dtype), layout), ("mosaic_tpu",))


@pytest.mark.ci
@pytest.mark.parametrize(
    "small_blocks, layout",
    [("fused", "tokens"), ("split", "heads")],
    indirect=["small_blocks"],
)
def test_heads_of_several_groups(interpreted, small_blocks, layout):
    """Two groups of four make the eight heads of a step, and there are two steps."""
    shape = cases.Shape(B=1, T=70, S=140, N=16, K=4, H=32, h=16)
    inputs = cases.arrays(np.random.default_rng(3), shape, jnp.bfloat16)
    sinks = jnp.linspace(-2, 2, 16).astype(jnp.bfloat16)
    slopes = np.linspace(0.01, 0.3, 16).astype(np.float32)
    options = dict(alibi_slopes=slopes, local_window_size=(50, 0))
    call = with_layout(Call(inputs | {"sinks": sinks}, options), layout)
    precision.check(call, ("mosaic_tpu",))


@pytest.mark.ci
def test_lists_that_are_too_long_are_not_made(interpreted, small_blocks, monkeypatch):
    monkeypatch.setattr(grid, "MAX_LISTED", 4)
    precision.check(cases.make("packed", jnp.bfloat16), ("mosaic_tpu",))


@pytest.mark.parametrize(
    "heads, kv_heads, together",
    [(16, 2, 1), (32, 8, 2), (32, 32, 8), (28, 4, 4), (71, 1, 1), (10, 5, 5), (128, 8, 1)],
)
def test_heads_of_a_step_are_whole_tiles_of_memory(heads, kv_heads, together):
    call = make_call(1, 8, 8, heads, kv_heads, 64)
    assert grid.choose_kv_heads(call) == together
    own = together * heads // kv_heads
    assert own == heads or own % grid.HEAD_TILE == 0


@pytest.mark.parametrize(
    "length, heads, kv_heads, together",
    [(8192, 32, 32, 1), (8192, 71, 1, 1), (128, 32, 32, 4), (100, 24, 24, 6), (8, 16, 2, 2)],
)
def test_heads_of_a_step_where_heads_are_first(length, heads, kv_heads, together):
    """One, unless it has few rows."""
    call = make_call(1, length, 8, heads, kv_heads, 8, is_projected=True)
    assert grid.choose_kv_heads(call) == together


@pytest.mark.parametrize(
    "options, bound",
    [
        (dict(is_causal=True), 20),
        (dict(local_window_size=(40, 0)), 3),
        (dict(local_window_size=(40, None), is_causal=True), 3),
        (dict(local_window_size=(40, 9)), 4),
        (dict(local_window_size=(40, 0), q_offset=7), 20),
    ],
)
def test_a_window_bounds_the_steps(options, bound):
    """At least as many as any tile needs, and for windows not many more."""
    call = make_call(1, 640, 640, 4, 2, 64, **options)
    for major in ("q", "kv"):
        own, scalars = grid.plan_grid(call, TpuBlockSizes(32, 32), major)
        needed = np.asarray(scalars.spans).reshape(-1, 4)[:, 3]
        assert own.num_steps == bound >= needed.max()


@pytest.mark.ci
@pytest.mark.parametrize("cores", [2], indirect=True)
def test_the_same_bits(interpreted, small_blocks):
    """Always; and where queries lie is a matter of speed."""
    found = []
    for layout in ("tokens", "tokens", "heads"):
        call = with_layout(cases.make("causal", jnp.bfloat16), layout)
        found.append(precision.results(call, ("mosaic_tpu",))["mosaic_tpu"])
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
