"""Which blocks of which sequences each block of threads works on, for few query rows.

A *part* is a run of a sequence's visits (one batch row and key/value head) that one worker does.
By default every worker gets the same number of blocks, whatever the lengths: the sequences are laid
end to end and cut into equal stretches ("stream-K", Osama et al., arXiv 2301.03598). With a split
size, the cuts of a sequence depend on nothing but itself, so its result has the same bits in any
batch.

Parts are numbered so that those of one sequence lie together. There are as many numbers as workers
and sequences together, since between one part and the next either of the two changes.

All that is computed before the kernels is where the rows of the batch begin on that line; each
worker finds its own share. (As arrays, shares would cost several launches of some microseconds.)
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
class Shape:
    """Static sizes of a schedule."""

    batch: int
    heads: int  # key/value heads
    workers: int
    split: int | None  # blocks per part, or None for an even load
    blocks: int  # most blocks of a sequence

    @property
    def sequences(self) -> int:
        return self.batch * self.heads

    @property
    def most_parts(self) -> int:
        """Of a sequence, under a fixed split."""
        return cdiv(self.blocks, present(self.split))

    @property
    def grid(self) -> int:
        """Workers that there really are."""
        if self.split is not None:
            return self.sequences * self.most_parts
        return max(1, min(self.workers, cdiv(self.sequences * self.blocks, MIN_BLOCKS)))

    @property
    def parts(self) -> int:
        """Numbers of parts."""
        return self.grid if self.split is not None else self.grid + self.sequences


def begin_of_rows(visits: jax.Array, shape: Shape) -> jax.Array:
    """From the visits per batch row, int32 ``[B]``, to where rows begin on the line, ``[B + 1]``.

    An empty sequence counts as one block: its result has to be written, too.
    """
    cost = shape.heads * jnp.maximum(visits.astype(jnp.int32), 1)
    row = jnp.arange(shape.batch)[None]
    # A sum over those before, and not a scan: it becomes one small program.
    before = jnp.arange(shape.batch + 1)[:, None] > row
    return jnp.where(before, cost[None], 0).sum(1, dtype=jnp.int32)


class Share(NamedTuple):
    """What a worker does: ``parts`` parts, of consecutive sequences.

    The first begins at visit ``first`` of its sequence and has the number ``number``; all together
    have ``load`` visits, where an empty one counts as one.
    """

    sequence: jax.Array
    first: jax.Array
    load: jax.Array
    number: jax.Array
    parts: jax.Array


class Line(NamedTuple):
    """All sequences, end to end; ``begin`` is an array or, in a kernel, a reference to one."""

    begin: Any
    shape: Shape

    def share(self, worker: jax.Array) -> Share:
        shape = self.shape
        if shape.split is not None:
            sequence, part = _divided(worker, shape.most_parts)
            first = part * shape.split
            load = jnp.clip(
                self._cost(lax.div(sequence, _int(shape.heads))) - first, 0, shape.split
            )
            return Share(sequence, first, load, worker, (load > 0).astype(jnp.int32))
        each, total = self._each()
        start = jnp.minimum(worker * each, total)
        stop = jnp.minimum(start + each, total)
        sequence, first = self._find(jnp.minimum(start, total - 1))
        last, _ = self._find(jnp.maximum(stop - 1, 0))
        parts = jnp.where(stop > start, last - sequence + 1, 0)
        return Share(sequence, first, stop - start, worker + sequence, parts)

    def parts_of(self, sequence: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The number of a sequence's first part, and how many it has."""
        row, head = _divided(sequence, self.shape.heads)
        cost = self._cost(row)
        if self.shape.split is not None:
            count = lax.div(cost + (self.shape.split - 1), _int(self.shape.split))
            return sequence * self.shape.most_parts, count
        each, _ = self._each()
        begin = self.begin[row] + head * cost
        first, last = lax.div(begin, each), lax.div(begin + cost - 1, each)
        return first + sequence, last - first + 1

    def _each(self) -> tuple[jax.Array, jax.Array]:
        """Blocks of a worker, and of all."""
        total, grid = self.begin[_int(self.shape.batch)], self.shape.grid
        return jnp.maximum(lax.div(total + (grid - 1), _int(grid)), MIN_BLOCKS), total

    def _cost(self, row: jax.Array) -> jax.Array:
        return lax.div(self.begin[row + 1] - self.begin[row], _int(self.shape.heads))

    def _find(self, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sequence of a place on the line, and which of its visits that is."""

        def halve(_, bounds):
            low, high = bounds
            middle = lax.div(low + high + 1, _int(2))
            before = self.begin[middle] <= place
            return jnp.where(before, middle, low), jnp.where(before, high, middle - 1)

        steps = (self.shape.batch - 1).bit_length()
        row, _ = lax.fori_loop(0, steps, halve, (_int(0), _int(self.shape.batch - 1)))
        head, visit = _divided(place - self.begin[row], self._cost(row))
        return row * self.shape.heads + head, visit


def _divided(a: jax.Array, b: Any) -> tuple[jax.Array, jax.Array]:
    b = _int(b)
    return lax.div(a, b), lax.rem(a, b)


def _int(number: Any) -> jax.Array:
    return jnp.asarray(number, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a worker's share, inside a kernel."""

    batch: jax.Array
    kv_head: jax.Array
    index: jax.Array  # among this worker's
    number: jax.Array
    visits: Any  # of the sequence
    first: jax.Array  # visit
    count: jax.Array  # visits
    base: jax.Array  # this worker's visits before


def each_part(
    share: Share, heads: int, visits_of: Callable[[jax.Array], Any], body: Callable[[Part], None]
) -> jax.Array:
    """Calls ``body(part)`` for the parts of a share in order; how many visits they had in all.

    ``visits_of(batch)`` is what the sequences of a batch row visit.
    """

    def step(i, carry):
        left, base = carry
        batch, head = _divided(share.sequence + i, heads)
        visits = visits_of(batch)
        start = jnp.where(i == 0, share.first, 0)
        taken = jnp.minimum(jnp.maximum(visits.total, 1) - start, left)
        count = jnp.minimum(taken, visits.total - start)
        body(Part(batch, head, i, share.number + i, visits, start, count, base))
        return left - taken, base + count

    return lax.fori_loop(0, share.parts, step, (share.load, _int(0)))[1]
