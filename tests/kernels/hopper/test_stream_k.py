"""Every block of every sequence is done once, and the splits of a sequence lie together."""

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
    SplitKVPlan,
    StreamK,
    WorkerShare,
    find_row_starts,
    for_each_split,
)


@functools.partial(jax.jit, static_argnums=1)
def find_all(blocks, plan):
    """The share of each worker, and the splits of each sequence."""
    stream = StreamK(find_row_starts(blocks, plan), plan)
    workers, sequences = (
        jnp.arange(n, dtype=jnp.int32) for n in (plan.used_workers, plan.sequences)
    )
    shares = jax.vmap(stream.find_share)(workers)
    splits = jax.vmap(stream.find_splits)(sequences)
    return jnp.stack(shares, 1), jnp.stack(splits, 1)


@jax.jit
def walk(blocks, heads, workers, shares):
    """What the kernels do: for each split how often, sequence, first block, blocks; and all.

    Its arrays are as large as those of any size, so that it is one program for all of them.
    """
    done = jax.new_ref(jnp.zeros((len(shares), 4), jnp.int32))

    def body(split):
        sequence = split.batch * heads + split.kv_head
        done[split.number] += jnp.stack([jnp.int32(1), sequence, split.first, split.count])

    def work(worker, total):
        def load_block_map(batch):
            return SimpleNamespace(total=blocks[batch])

        return total + for_each_split(WorkerShare(*shares[worker]), heads, load_block_map, body)

    total = jax.lax.fori_loop(0, workers, work, jnp.int32(0))
    return done[...], total


def schedule(blocks, heads, workers, split):
    plan = SplitKVPlan(len(blocks), heads, workers, split, 512)
    blocks = np.array(blocks, np.int32)
    shares, splits = map(np.asarray, find_all(blocks, plan))
    rows, padded = np.zeros(9, np.int32), np.zeros((9 * 3 * 512, 5), np.int32)
    rows[: len(blocks)], padded[: plan.used_workers] = blocks, shares
    done, total = walk(rows, np.int32(heads), np.int32(plan.used_workers), padded)
    assert total == blocks.sum() * heads
    return plan, shares, splits, np.asarray(done)


def check(blocks, *sizes):
    plan, shares, splits, done = schedule(blocks, *sizes)
    assert done[:, 0].max() == 1 and not done[plan.split_numbers :].any()
    left = {number: split for number, (times, *split) in enumerate(done.tolist()) if times}
    for sequence, (first, count) in enumerate(splits.tolist()):
        own = [left.pop(number) for number in range(first, first + count)]
        assert own and all(split[0] == sequence for split in own)
        behind = 0
        for _, start, length in own:
            assert start == behind
            behind += length
        assert behind == blocks[sequence // plan.heads]
    assert not left
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
    blocks, sizes = drawn
    check(blocks, *sizes)


def test_the_load_is_even():
    blocks = [512, 1, 0, 300, 7]
    loads = check(blocks, 2, 132, None)[:, 2]
    assert loads.max() <= -(-sum(max(n, 1) for n in blocks) * 2 // 132)
    assert (loads > 0).sum() > 120


def test_little_work_has_few_workers():
    shares = check([6], 1, 132, None)
    assert (shares[:, 4] > 0).sum() == 2
    assert shares[:, 2].max() == MIN_BLOCKS


def test_fixed_splits_depend_on_the_sequence_alone():
    def splits(blocks, row):
        done = schedule(blocks, 1, 7, 4)[3].tolist()
        return [(start, count) for _, own, start, count in done if own == row and count]

    assert (
        splits([3, 30, 64], 1) == splits([30], 0) == [(n, min(4, 30 - n)) for n in range(0, 30, 4)]
    )
