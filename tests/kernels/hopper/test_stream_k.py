"""Every visit of every sequence is done once, by whoever does it, and its parts lie together."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("axattn.kernels._hopper.split_kv.stream_k", exc_type=ImportError)

from axattn.kernels._hopper.split_kv.stream_k import (
    MIN_BLOCKS,
    Line,
    Shape,
    Share,
    begin_of_rows,
    each_part,
)


@functools.partial(jax.jit, static_argnums=1)
def found(visits, shape):
    """The share of each worker, and the parts of each sequence."""
    line = Line(begin_of_rows(visits, shape), shape)
    workers, sequences = (jnp.arange(n, dtype=jnp.int32) for n in (shape.grid, shape.sequences))
    shares, parts = jax.vmap(line.share)(workers), jax.vmap(line.parts_of)(sequences)
    return jnp.stack(shares, 1), jnp.stack(parts, 1)


@jax.jit
def walk(visits, heads, workers, shares):
    """What the kernels' walk does: of each part how often, sequence, first visit, visits; and all.

    Its arrays are as large as those of any size, so that it is one program for all of them.
    """
    done = jax.new_ref(jnp.zeros((len(shares), 4), jnp.int32))

    def body(part):
        sequence = part.batch * heads + part.kv_head
        done[part.number] += jnp.stack([jnp.int32(1), sequence, part.first, part.count])

    def work(worker, total):
        def visits_of(batch):
            return SimpleNamespace(total=visits[batch])

        return total + each_part(Share(*shares[worker]), heads, visits_of, body)

    total = jax.lax.fori_loop(0, workers, work, jnp.int32(0))
    return done[...], total


def schedule(visits, heads, workers, split):
    shape = Shape(len(visits), heads, workers, split, 512)
    visits = np.array(visits, np.int32)
    shares, parts_of = map(np.asarray, found(visits, shape))
    rows, padded = np.zeros(9, np.int32), np.zeros((9 * 3 * 512, 5), np.int32)
    rows[: len(visits)], padded[: shape.grid] = visits, shares
    done, total = walk(rows, np.int32(heads), np.int32(shape.grid), padded)
    assert total == visits.sum() * heads
    return shape, shares, parts_of, np.asarray(done)


def check(visits, *sizes):
    shape, shares, parts_of, done = schedule(visits, *sizes)
    assert done[:, 0].max() == 1 and not done[shape.parts :].any()
    parts = {number: part for number, (times, *part) in enumerate(done.tolist()) if times}
    for sequence, (first, count) in enumerate(parts_of.tolist()):
        own = [parts.pop(number) for number in range(first, first + count)]
        assert own and all(part[0] == sequence for part in own)
        behind = 0
        for _, start, length in own:
            assert start == behind
            behind += length
        assert behind == visits[sequence // shape.heads]
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
        done = schedule(visits, 1, 7, 4)[3].tolist()
        return [(start, count) for _, own, start, count in done if own == row and count]

    assert parts([3, 30, 64], 1) == parts([30], 0) == [(n, min(4, 30 - n)) for n in range(0, 30, 4)]
