"""Every visit of every sequence is done once, by whoever does it, and its parts lie together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("axattn.kernels.hopper.schedule", exc_type=ImportError)

from axattn.kernels.hopper.schedule import MIN_BLOCKS, Line, Shape, begin_of_rows


def line_of(visits, heads, workers, split):
    shape = Shape(len(visits), heads, workers, split, 512)
    return Line(begin_of_rows(jnp.array(visits), shape), shape)


def shares(line):
    workers = jnp.arange(line.shape.grid, dtype=jnp.int32)
    return np.stack(jax.vmap(line.share)(workers), 1)


def walk(line, visits):
    """What the kernel's walk makes of the shares: (part number, sequence, first visit, count)."""
    for sequence, first, load, number, parts in shares(line).tolist():
        for i in range(parts):
            total = int(visits[(sequence + i) // line.shape.heads])
            start = first if i == 0 else 0
            taken = min(max(total, 1) - start, load)
            yield number + i, sequence + i, start, min(taken, total - start)
            load -= taken
        assert load == 0


def check(line, visits):
    parts, shape = {}, line.shape
    for number, sequence, start, count in walk(line, visits):
        assert number not in parts and 0 <= number < shape.parts
        parts[number] = (sequence, start, count)
    of = jax.vmap(line.parts_of)(jnp.arange(shape.sequences, dtype=jnp.int32))
    for sequence, (first, count) in enumerate(np.stack(of, 1).tolist()):
        own = [parts.pop(number) for number in range(first, first + count)]
        assert own and all(part[0] == sequence for part in own)
        done = 0
        for _, start, length in own:
            assert start == done
            done += length
        assert done == visits[sequence // shape.heads]
    assert not parts


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([None, 1, 3, 50]),
)
def test_all_is_done_once(visits, heads, workers, split):
    check(line_of(visits, heads, workers, split), visits)


def test_the_load_is_even():
    visits = [512, 1, 0, 300, 7]
    line = line_of(visits, 2, 132, None)
    check(line, visits)
    loads = shares(line)[:, 2]
    assert loads.max() <= -(-sum(max(n, 1) for n in visits) * 2 // 132)
    assert (loads > 0).sum() > 120


def test_little_work_has_few_workers():
    found = shares(line_of([6], 1, 132, None))
    assert (found[:, 4] > 0).sum() == 2
    assert found[:, 2].max() == MIN_BLOCKS


def test_fixed_splits_depend_on_the_sequence_alone():
    def parts(visits, row):
        found = walk(line_of(visits, 1, 7, 4), visits)
        return [(start, count) for _, own, start, count in found if own == row and count]

    assert parts([3, 30, 64], 1) == parts([30], 0) == [(n, min(4, 30 - n)) for n in range(0, 30, 4)]
