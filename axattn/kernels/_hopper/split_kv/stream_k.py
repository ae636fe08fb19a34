"""Which blocks of keys each worker attends to, where query rows are few.

A *sequence* is the keys of one batch row and key/value head, and a *split* a run of its blocks that
one worker does. By default every worker gets the same number of blocks, whatever the lengths: the
sequences are laid end to end and divided evenly ("stream-K", Osama et al., arXiv 2301.03598). With
a fixed split size, the splits of a sequence depend on nothing but itself, so its result has the
same bits in any batch.

Splits are numbered so that those of one sequence lie together. There are as many numbers as workers
and sequences together, since from one split to the next either of the two changes.

Before the kernels only the place is computed where each batch row begins; each worker finds its own
share. (Arrays of shares would cost several launches of some microseconds.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from axattn._typing import present
from axattn.kernels._problem import cdiv

# A worker with fewer blocks than this waits for memory more than it reads.
MIN_BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class SplitKVPlan:
    """Static sizes: what is divided, and among how many."""

    batch: int
    heads: int  # key/value heads
    workers: int
    split: int | None  # blocks per split, or None for an even load
    blocks: int  # most blocks of a sequence

    @property
    def sequences(self) -> int:
        return self.batch * self.heads

    @property
    def most_splits(self) -> int:
        """Splits of a sequence at most, where their size is fixed."""
        return cdiv(self.blocks, present(self.split))

    @property
    def used_workers(self) -> int:
        if self.split is not None:
            return self.sequences * self.most_splits
        return max(1, min(self.workers, cdiv(self.sequences * self.blocks, MIN_BLOCKS)))

    @property
    def split_numbers(self) -> int:
        if self.split is not None:
            return self.used_workers
        return self.used_workers + self.sequences


def find_row_starts(blocks: jax.Array, plan: SplitKVPlan) -> jax.Array:
    """Return where batch rows start on the line, int32 ``[B + 1]``, from their blocks ``[B]``.

    An empty sequence counts as one block: its result has to be written, too.
    """
    cost = plan.heads * jnp.maximum(blocks.astype(jnp.int32), 1)
    row = jnp.arange(plan.batch)[None]
    # A sum over those before, and not a scan: it becomes one small program.
    before = jnp.arange(plan.batch + 1)[:, None] > row
    return jnp.where(before, cost[None], 0).sum(1, dtype=jnp.int32)


class WorkerShare(NamedTuple):
    """What a worker does: ``splits`` splits, of consecutive sequences.

    The first one begins at block ``first`` of its sequence and has the number ``number``. All
    together have ``load`` blocks, where an empty one counts as one.
    """

    sequence: jax.Array
    first: jax.Array
    load: jax.Array
    number: jax.Array
    splits: jax.Array


class StreamK(NamedTuple):
    """All sequences, end to end; ``starts`` is an array or, in a kernel, a reference to one."""

    starts: Any
    plan: SplitKVPlan

    def find_share(self, worker: jax.Array) -> WorkerShare:
        plan = self.plan
        if plan.split is not None:
            sequence, index = _divmod(worker, plan.most_splits)
            first = index * plan.split
            load = jnp.clip(
                self._count_blocks(lax.div(sequence, _int32(plan.heads))) - first, 0, plan.split
            )
            return WorkerShare(sequence, first, load, worker, (load > 0).astype(jnp.int32))
        each, total = self._divide_evenly()
        start = jnp.minimum(worker * each, total)
        stop = jnp.minimum(start + each, total)
        sequence, first = self._search(jnp.minimum(start, total - 1))
        last, _ = self._search(jnp.maximum(stop - 1, 0))
        splits = jnp.where(stop > start, last - sequence + 1, 0)
        return WorkerShare(sequence, first, stop - start, worker + sequence, splits)

    def find_splits(self, sequence: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the number of a sequence's first split, and how many it has."""
        row, head = _divmod(sequence, self.plan.heads)
        cost = self._count_blocks(row)
        if self.plan.split is not None:
            count = lax.div(cost + (self.plan.split - 1), _int32(self.plan.split))
            return sequence * self.plan.most_splits, count
        each, _ = self._divide_evenly()
        begin = self.starts[row] + head * cost
        first, last = lax.div(begin, each), lax.div(begin + cost - 1, each)
        return first + sequence, last - first + 1

    def _divide_evenly(self) -> tuple[jax.Array, jax.Array]:
        """Return the blocks of a worker, and of all."""
        total, workers = self.starts[_int32(self.plan.batch)], self.plan.used_workers
        return jnp.maximum(lax.div(total + (workers - 1), _int32(workers)), MIN_BLOCKS), total

    def _count_blocks(self, row: jax.Array) -> jax.Array:
        """Return the blocks of each sequence of a batch row."""
        return lax.div(self.starts[row + 1] - self.starts[row], _int32(self.plan.heads))

    def _search(self, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the sequence of a place on the line, and which of its blocks that is."""

        def halve(_, bounds):
            low, high = bounds
            middle = lax.div(low + high + 1, _int32(2))
            before = self.starts[middle] <= place
            return jnp.where(before, middle, low), jnp.where(before, high, middle - 1)

        steps = (self.plan.batch - 1).bit_length()
        row, _ = lax.fori_loop(0, steps, halve, (_int32(0), _int32(self.plan.batch - 1)))
        head, block = _divmod(place - self.starts[row], self._count_blocks(row))
        return row * self.plan.heads + head, block


def _divmod(a: jax.Array, b: Any) -> tuple[jax.Array, jax.Array]:
    b = _int32(b)
    return lax.div(a, b), lax.rem(a, b)


def _int32(number: Any) -> jax.Array:
    return jnp.asarray(number, jnp.int32)


@dataclasses.dataclass(frozen=True)
class KVSplit:
    """One split of a worker's share, inside a kernel."""

    batch: jax.Array
    kv_head: jax.Array
    index: jax.Array  # among this worker's
    number: jax.Array
    block_map: Any  # of the sequence
    first: jax.Array  # step of the block map
    count: jax.Array  # steps
    base: jax.Array  # this worker's steps before


def for_each_split(
    share: WorkerShare,
    heads: int,
    load_block_map: Callable[[jax.Array], Any],
    body: Callable[[KVSplit], None],
) -> jax.Array:
    """Call ``body(split)`` for the splits of a share in order; return how many steps they had.

    ``load_block_map(batch)`` returns the blocks of the sequences of a batch row.
    """

    def step(i, carry):
        left, base = carry
        batch, head = _divmod(share.sequence + i, heads)
        block_map = load_block_map(batch)
        start = jnp.where(i == 0, share.first, 0)
        taken = jnp.minimum(jnp.maximum(block_map.total, 1) - start, left)
        count = jnp.minimum(taken, block_map.total - start)
        body(KVSplit(batch, head, i, share.number + i, block_map, start, count, base))
        return left - taken, base + count

    return lax.fori_loop(0, share.splits, step, (share.load, _int32(0)))[1]
