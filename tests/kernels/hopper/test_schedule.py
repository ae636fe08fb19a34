"""Every visit of every sequence is done once, by whoever does it, and its parts lie together."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("axattn.kernels.hopper.schedule", exc_type=ImportError)

from axattn.kernels.hopper.schedule import MIN_BLOCKS, Line, Shape, begin_of_rows


@functools.partial(jax.jit, static_argnums=1)
def found(visits, shape):
    """The share of each worker, and the parts of each sequence."""
    line = Line(begin_of_rows(visits, shape), shape)
    workers, sequences = (jnp.arange(n, dtype=jnp.int32) for n in (shape.grid, shape.sequences))
    shares, parts = jax.vmap(line.share)(workers), jax.vmap(line.parts_of)(sequences)
    return jnp.stack(shares, 1), jnp.stack(parts, 1)


def schedule(visits, heads, workers, split):
    shape = Shape(len(visits), heads, workers, split, 512)
    return shape, *map(np.asarray, found(np.array(visits), shape))


def walk(shape, shares, visits):
    """What the kernel's walk makes of the shares: (part number, sequence, first visit, count)."""
    for sequence, first, load, number, parts in shares.tolist():
        for i in range(parts):
            total = int(visits[(sequence + i) // shape.heads])
            start = first if i == 0 else 0
            taken = min(max(total, 1) - start, load)
            yield number + i, sequence + i, start, min(taken, total - start)
            load -= taken
        assert load == 0


def check(visits, *sizes):
    shape, shares, parts_of = schedule(visits, *sizes)
    parts = {}
    for number, sequence, start, count in walk(shape, shares, visits):
        assert number not in parts and 0 <= number < shape.parts
        parts[number] = (sequence, start, count)
    for sequence, (first, count) in enumerate(parts_of.tolist()):
        own = [parts.pop(number) for number in range(first, first + count)]
        assert own and all(part[0] == sequence for part in own)
        done = 0
        for _, start, length in own:
            assert start == done
            done += length
        assert done == visits[sequence // shape.heads]
    assert not parts
    return shares


# Rows, heads, workers, blocks of a split: each is a program.
SIZES = [
    *((1, 1, 1, None), (9, 1, 12, None), (5, 3, 7, None), (2, 2, 12, None), (3, 3, 4, None)),
    *((4, 2, 12, 3), (9, 3, 5, 1), (3, 1, 2, 50)),
]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(SIZES).flatmap(
        lambda sizes: st.tuples(
            st.lists(st.integers(0, 40), min_size=sizes[0], max_size=sizes[0]), st.just(sizes[1:])
        )
    )
)
def test_all_is_done_once(drawn):
    visits, sizes = drawn
    check(visits, *sizes)


def test_the_load_is_even():
    visits = [512, 1, 0, 300, 7]
    loads = check(visits, 2, 132, None)[:, 2]
    assert loads.max() <= -(-sum(max(n, 1) for n in visits) * 2 // 132)
    assert (loads > 0).sum() > 120


def test_little_work_has_few_workers():
    shares = check([6], 1, 132, None)
    assert (shares[:, 4] > 0).sum() == 2
    assert shares[:, 2].max() == MIN_BLOCKS


def test_fixed_splits_depend_on_the_sequence_alone():
    def parts(visits, row):
        shape, shares, _ = schedule(visits, 1, 7, 4)
        all_parts = walk(shape, shares, visits)
        return [(start, count) for _, own, start, count in all_parts if own == row and count]

    assert parts([3, 30, 64], 1) == parts([30], 0) == [(n, min(4, 30 - n)) for n in range(0, 30, 4)]
