"""Several blocks of queries and of keys, in one pass of gradients and in two."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import _jax_compat
from axattn.kernels.problem import Problem
from axattn.kernels.tpu import cut as cuts
from axattn.kernels.tpu import tiles
from axattn.kernels.tpu.tiles import BackwardTiles, Tiles
from tests import cases, precision
from tests.kernels.calls import make_call
from tests.precision import Call

SMALL, OTHER = Tiles(16, 128), Tiles(48, 128)

WAYS = {"fused": BackwardTiles(SMALL), "split": BackwardTiles(OTHER, SMALL)}

NAMES = (
    "causal_offset",
    "everything",
    "lengths_zero",
    "offset_per_row",
    "packed",
    "positions",
    "sinks_empty_rows",
    "window_pair",
)

PARTED = {"causal_offset", "packed", "window_pair"}  # among two cores


@pytest.fixture(params=["fused", pytest.param("split", marks=pytest.mark.ci)])
def small_blocks(request, monkeypatch):
    monkeypatch.setattr(tiles, "forward_tiles", lambda *_: OTHER)
    monkeypatch.setattr(tiles, "backward_tiles", lambda *_: WAYS[request.param])


@pytest.mark.parametrize(
    "layout, cores, name",
    [(("tokens", "heads")[i % 2], 1 + (name in PARTED), name) for i, name in enumerate(NAMES)],
    indirect=["layout", "cores"],
)
def test_features(interpreted, small_blocks, layout, name):
    dtype = (jnp.bfloat16, jnp.float32)[len(name) % 2]
    precision.check(cases.make(name, dtype), ("mosaic_tpu",))


@pytest.mark.parametrize("layout", ["tokens", "heads"], indirect=True)
def test_heads_of_several_groups(interpreted, small_blocks, layout):
    """Two groups of four make the eight heads of a step, and there are two steps."""
    shape = cases.Shape(B=1, T=70, S=140, N=16, K=4, H=32, h=16)
    inputs = cases.arrays(np.random.default_rng(3), shape, jnp.bfloat16)
    sinks = jnp.linspace(-2, 2, 16).astype(jnp.bfloat16)
    slopes = np.linspace(0.01, 0.3, 16).astype(np.float32)
    options = dict(alibi_slopes=slopes, local_window_size=(50, 0))
    precision.check(Call(inputs | {"sinks": sinks}, options), ("mosaic_tpu",))


def test_lists_that_are_too_long_are_not_made(interpreted, small_blocks, monkeypatch):
    monkeypatch.setattr(cuts, "MAX_LISTED", 4)
    precision.check(cases.make("packed", jnp.bfloat16), ("mosaic_tpu",))


@pytest.mark.parametrize(
    "heads, kv_heads, together",
    [(16, 2, 1), (32, 8, 2), (32, 32, 8), (28, 4, 4), (71, 1, 1), (10, 5, 5), (128, 8, 1)],
)
def test_heads_of_a_step_are_whole_tiles_of_memory(heads, kv_heads, together):
    call = make_call(1, 8, 8, heads, kv_heads, 64)
    assert cuts.heads_together(call) == together
    own = together * heads // kv_heads
    assert own == heads or own % cuts.HEAD_TILE == 0


@pytest.mark.parametrize(
    "length, heads, kv_heads, together",
    [(8192, 32, 32, 1), (8192, 71, 1, 1), (128, 32, 32, 4), (100, 24, 24, 6), (8, 16, 2, 2)],
)
def test_heads_of_a_step_where_heads_are_first(length, heads, kv_heads, together):
    """One, unless it has few rows."""
    call = dataclasses.replace(make_call(1, length, 8, heads, kv_heads, 8), heads_first=True)
    assert cuts.heads_together(call) == together


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
    """At least as many as any tile visits, and for windows not many more."""
    call = make_call(1, 640, 640, 4, 2, 64, **options)
    for major in ("q", "kv"):
        cut, scalars = cuts.of_call(call, Problem.of(call), 32, 32, major)
        visited = np.asarray(scalars.spans).reshape(-1, 4)[:, 3]
        assert cut.steps == bound >= visited.max()


def test_both_layouts_give_the_same_bits(interpreted, small_blocks, monkeypatch):
    """Where queries lie is a matter of speed."""
    found = []
    for argument in (True, False):
        monkeypatch.setattr(_jax_compat, "is_argument", lambda _, argument=argument: argument)
        call = cases.make("causal_offset", jnp.bfloat16)
        found.append(precision.results(call, ("mosaic_tpu",))["mosaic_tpu"])
    assert jax.tree.all(jax.tree.map(np.array_equal, *found))


@pytest.mark.parametrize(
    "small_blocks, cores",
    [("fused", 2), pytest.param("split", 1, marks=pytest.mark.ci)],
    indirect=True,
)
def test_deterministic(interpreted, small_blocks):
    call = cases.make("causal", jnp.bfloat16)
    first, second = (precision.results(call, ("mosaic_tpu",))["mosaic_tpu"] for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
