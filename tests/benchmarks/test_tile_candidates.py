from __future__ import annotations

from axattn.kernels._hopper.block_sizes import (
    KINDS,
    ForwardBlockSizes,
    KeyGradBlockSizes,
    QueryGradBlockSizes,
)
from benchmarks.harness import tile_candidates
from benchmarks.harness.tile_candidates import Place

ALL = list(tile_candidates.places())


def test_every_row_has_candidates_that_fit():
    assert len(ALL) == 3 * len(KINDS) * len(tile_candidates.HEAD_SIZES)
    for place in ALL:
        found = tile_candidates.candidates(place)
        assert found, place
        assert len(set(found)) == len(found)
        for tiles in found:
            assert tile_candidates.shared_bytes(place, tiles) <= 227 * 1024, (place, tiles)


def test_shared_memory_by_hand():
    # Two warpgroups of 64 rows; two blocks of 128 keys and values; 128 elements of 16 bits each.
    place = Place("forward", "masked", 128, 128)
    query, blocks = 2 * 64 * 128 * 2, 2 * 2 * 128 * 128 * 2
    lse, reduction = 1024, 2048
    # A pair of barriers per stage of each of both rings, one per warpgroup, one for their turns.
    barriers = 8 * (2 * 2 * 2 + 2 + 1)
    expected = query + blocks + lse + reduction + barriers
    assert tile_candidates.shared_bytes(place, ForwardBlockSizes(128, 2)) == expected


def test_biased_calls_count_a_float32_bias_and_a_mask():
    tiles = QueryGradBlockSizes(64, 1, 1)
    masked, biased = (Place("query_grad", kind, 64, 64) for kind in ("masked", "biased"))
    more = tile_candidates.shared_bytes(biased, tiles) - tile_candidates.shared_bytes(masked, tiles)
    assert more == 128 * 64 * (4 + 1) + 2 * 2 * 8


def test_a_split_kernel_has_half_the_keys():
    place = Place("key_grad", "full", 256, 256)
    whole, split = (KeyGradBlockSizes(64, 1, 2, split) for split in (False, True))
    keys = 64 * (256 + 256) * 2
    assert (
        tile_candidates.shared_bytes(place, whole) - tile_candidates.shared_bytes(place, split)
        == keys
    )
    # Both gradients in one warpgroup: more registers than there are.
    found = tile_candidates.candidates(place)
    assert found and all(tiles.split for tiles in found)


def test_order_of_preference():
    place = Place("forward", "masked", 64, 64)
    found = tile_candidates.candidates(place)
    assert found[0].stages > 1 and found[0].block_kv % 64 == 0
    assert all(
        tile_candidates.preference(a) >= tile_candidates.preference(b)
        for a, b in zip(found, found[1:], strict=False)
    )


def test_deepest_keeps_one_of_each_code():
    tiles = [ForwardBlockSizes(64, 4), ForwardBlockSizes(64, 2), ForwardBlockSizes(64, 2, 3)]
    assert tile_candidates.deepest(tiles) == [tiles[0], tiles[2]]
