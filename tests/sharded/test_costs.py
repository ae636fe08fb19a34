"""What strategies cost, by arithmetic: bytes, FLOPs, balance, refusals, the printed table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask, parallel
from axattn._sharded import costs, layouts
from axattn._sharded.costs import Links, ShardSizes

LINKS = Links(flops=1e12, bytes=1e9)
ALL_PAIRS, CAUSAL = Mask(), Mask.causal()
SIZES = ShardSizes(
    batch=2, q_len=4096, kv_len=4096, num_heads=32, num_kv_heads=4, head_dim=128,
    value_head_dim=64, itemsize=2,
)  # fmt: skip
KEYS = 2 * 4096 * 4 * (128 + 64) * 2  # bytes of all keys and values
ALL = 2.0 * 2 * 32 * 4096 * 4096 * (128 + 64)  # FLOPs of all pairs


def by_name(mask=ALL_PAIRS, layout="contiguous", shards=8, links=LINKS, **changes):
    found = costs.estimate_costs(dataclasses.replace(SIZES, **changes), mask, layout, shards, links)
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    return {cost.strategy: cost for cost in found}


def test_the_deprecated_name():
    with pytest.warns(DeprecationWarning, match=r"use axattn\.parallel\.Links\.from_target"):
        assert Links.of("v5p") == Links.from_target("v5p") == Links()


def test_bytes_and_flops_of_all_pairs():
    found = by_name(num_heads=64)
    rows = 2 * 4096 / 8 * 64 * (128 + 64) * 2
    assert found["ring"].sent == found["gather"].sent == KEYS * 7 / 8
    assert found["ring"].held == KEYS / 8 * 2 and found["gather"].held == KEYS * 7 / 8
    # 4 heads on 8 shards: two shards get the same head.
    assert found["ulysses"].sent == (rows + 2 * KEYS / 8) * 7 / 8
    assert {cost.flops for cost in found.values()} == {2 * ALL / 8}


def test_seconds():
    """Of the ring the longer of computing and sending at every step, of the others both."""
    found = by_name()
    block, work = KEYS / 8 / LINKS.bytes, ALL / 64 / LINKS.flops
    assert found["ring"].seconds == pytest.approx(7 * max(work, block) + work)
    assert found["gather"].seconds == pytest.approx(7 * block / 2 + 8 * work)


@pytest.mark.parametrize("layout, share", [("contiguous", 15 / 64), ("zigzag", 1 / 8)])
def test_balance_of_causal_masks(layout, share):
    """The last of 8 shards has 15 of 64 half squares; in zigzag order all have the same."""
    found = by_name(CAUSAL, layout)
    for strategy in ("ring", "gather"):
        assert found[strategy].flops == pytest.approx(ALL / 2 * share, rel=0.06)
    assert found["ulysses"].flops == pytest.approx(ALL / 2 / 8, rel=0.06)


def test_a_window_makes_the_ring_cheap():
    found = by_name(Mask.window(256, 0), q_len=65536, kv_len=65536)
    assert found["ring"].sent * 7 == pytest.approx(found["gather"].sent)
    assert next(iter(found)) == "ring"


def test_positions_that_are_not_known_cost_all_pairs():
    assert by_name(CAUSAL, None)["ring"].flops == by_name()["ring"].flops


def test_pairs_of_a_narrow_window_are_counted_not_guessed():
    found = by_name(Mask.window(256, 0), q_len=2**20, kv_len=2**20, shards=64)
    each = 2.0 * 2 * 32 * 257 * (128 + 64)  # FLOPs of a query
    assert found["ring"].flops == pytest.approx(each * 2**20 / 64, rel=1e-3)


def test_refusals_come_last_and_say_why():
    found = by_name(num_heads=12, num_kv_heads=4)
    assert [*found][-1] == "ulysses" and "multiples of 8, got 12" in str(found["ulysses"])


def test_explain(mesh_of):
    """What `attention` takes is the first line; nothing is computed."""
    axes = parallel.Axes(batch="data", heads="model", sequence="context")
    q, kv = (jax.ShapeDtypeStruct((2, 64, n, 16), jnp.float32) for n in (8, 2))
    mesh = mesh_of(model=2, context=4)
    found = parallel.explain(q, kv, kv, axes=axes, mesh=mesh, is_causal=True, layout="zigzag")
    assert {cost.strategy for cost in found} == set(costs.STRATEGIES)
    for cost in found:
        assert f"{cost.sent / 2**20:.1f} MiB" in str(cost) and " ms " in str(cost)
    ring = parallel.explain(q, kv, kv, axes=axes, mesh=mesh, implementation="xla")[-1]
    assert ring.strategy == "ring" and "got ('xla',)" in ring.refusal
    with pytest.raises(ValueError, match="heads takes axes of the mesh"):
        parallel.explain(q, kv, kv, axes=parallel.Axes(heads="tensor"), mesh=mesh)


class TestLayouts:
    def test_positions_are_a_permutation(self):
        for layout in layouts.LAYOUTS:
            found = parallel.positions(layout, 4, 48)
            assert sorted(found) == list(range(48))
            assert (layouts.compute_positions(layout, jnp.arange(48), 4, 48) == found).all()
        assert parallel.positions("zigzag", 2, 8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]

    @pytest.mark.parametrize(
        "mask, layout, distances",
        [
            (CAUSAL, "contiguous", (0, 1, 2, 3)),
            (Mask.window(16, 0), "contiguous", (0, 1)),
            (Mask.window(17, 0), "contiguous", (0, 1, 2)),
            (Mask.window(3, 3), "contiguous", (0, 1, 3)),
            (Mask.window(0, 1), "contiguous", (0, 3)),
            (CAUSAL & Mask.window(3, 3), "contiguous", (0, 1)),
            (Mask.prefix(20) & Mask.window(0, None), "contiguous", (0, 3)),
            (Mask.causal(jnp.int32(4)), "contiguous", (0, 1, 2, 3)),
            (Mask.window(3, 0), None, (0, 1, 2, 3)),
        ],
    )  # fmt: skip
    def test_ring_distances(self, mask, layout, distances):
        """16 tokens on each of 4 shards; what is traced or not known leaves no ring step out."""
        assert layouts.list_ring_distances(mask, layout, 4, 64, 64) == distances

    @pytest.mark.parametrize("layout", layouts.LAYOUTS)
    @pytest.mark.parametrize("mask", [CAUSAL, Mask.window(9, 4), CAUSAL & Mask.window(20, None),
                                      Mask.prefix(11)])  # fmt: skip
    def test_no_pair_is_left_out(self, mask, layout):
        """Every pair that attends has its ring step, and `compute_key_range` is the mask itself."""
        at = parallel.positions(layout, 4, 48)
        array = np.asarray(mask.materialize(48, 48))[0, 0][at][:, at]
        first, last = layouts.compute_key_range(mask, at)
        assert (((at >= first[:, None]) & (at <= last[:, None])) == array).all()
        distances = layouts.list_ring_distances(mask, layout, 4, 48, 48)
        for r in range(4):
            for s in range(4):
                if array[r * 12 : r * 12 + 12, s * 12 : s * 12 + 12].any():
                    assert (r - s) % 4 in distances
