from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness import cache_steps
from benchmarks.harness.cache_sizes import CacheCase

pytestmark = pytest.mark.ci


def case(kind="dense", dtype="float32", **changes):
    values = dict(layers=1, heads=4, kv_heads=1, head_dim=64, batch=2, tokens=32, page_size=16)
    return CacheCase(kind, dtype, **{**values, **changes})


@pytest.mark.parametrize("kind, dtype", [("dense", "int8"), ("paged", "float32")])
def test_every_step_is_the_same(kind, dtype):
    step = cache_steps._Step(case(kind, dtype), 20)
    outs = []
    for _ in range(3):
        out, cache = step()
        assert cache.lengths.tolist() == [20, 20] and not cache.overflowed.any()
        outs.append(np.asarray(out))
    assert np.abs(outs[0]).max() > 0
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_rows():
    found = cache_steps.time_steps(case("paged", "int8"), [(8, 16), (8, 64), (40, 64)], 0.0)
    assert [(row.tokens, row.capacity) for row in found] == [(8, 16), (8, 64), (40, 64)]
    assert found[0].growth == 1
    assert all(row.seconds > 0 and row.rounds >= 3 for row in found)
    assert [row.bytes for row in found] == [2 * tokens * 2 * 68 for tokens in (8, 8, 40)]
