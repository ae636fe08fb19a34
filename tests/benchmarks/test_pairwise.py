from __future__ import annotations

import itertools
import math

import pytest

from benchmarks.harness import pairwise


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 4, 1, 3), (5,)])
def test_every_two_values_meet(sizes):
    factors = [list(range(1, size + 1)) for size in sizes]
    rows = pairwise.choose(factors, math.prod)
    assert len(set(rows)) == len(rows)
    for (i, one), (j, other) in itertools.combinations(enumerate(factors), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(one, other))
    if len(sizes) > 2:
        assert len(rows) < math.prod(sizes)


def test_cheap_rows_do_where_they_can():
    # Three pairs are left in the end: in one row of 64, or in three of 16.
    rows = pairwise.choose([[2, 1], [2, 1], [2, 1]], lambda row: math.prod(row) ** 2)
    assert (2, 2, 2) not in rows and (1, 1, 1) in rows


def test_one_factor_has_all_its_values():
    assert set(pairwise.choose([["a", "b"]], lambda row: 1)) == {("a",), ("b",)}
