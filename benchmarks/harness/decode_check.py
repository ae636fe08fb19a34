"""What ``decode_bench.py`` compares an output with before it times it, on the very same call.

All heads of all batch rows or, where those do not fit in float32, of some of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import accuracy, decode_programs
from benchmarks.harness.decode_cases import Case
from benchmarks.harness.decode_inputs import Inputs
from benchmarks.harness.kernel_check import Checked
from benchmarks.harness.kernel_rows import OURS

# Keys, values, logits and weights in float32.
_REFERENCE_BYTES = 4 << 30

# These round partial sums, and scaled queries, to bfloat16, which plain attention does not.
_ROUGH = {"pallas_triton": 4.0}


def sampled(case: Case) -> np.ndarray:
    """int [rows]: batch rows to compare; the shortest and the longest are among them."""
    keys = case.length * case.kv_heads * (case.head_dim + case.value_size)
    logits = 2 * case.length * case.heads * case.tokens
    rows = max(2, _REFERENCE_BYTES // (4 * (keys + logits)))
    if rows >= case.batch:
        return np.arange(case.batch)
    lengths = case.lengths()
    first = (lengths.argmin(), lengths.argmax(), case.batch - 1)
    others = np.random.default_rng(0).permutation(case.batch)
    return np.sort(list(dict.fromkeys(int(row) for row in (*first, *others)))[:rows])


class Reference:
    """The output in float32, and the error of plain attention in the call's precision."""

    against = "xla"

    def __init__(self, case: Case, given: Inputs):
        self.rows = sampled(case)
        part = given if len(self.rows) == case.batch else _rows(given, self.rows)
        self.exact = jax.block_until_ready(decode_programs.reference(case, part))
        self.plain = float(accuracy.error(decode_programs.plain(case, part), self.exact))
        self._used = np.flatnonzero(case.lengths()[self.rows] > 0)

    def check(self, implementation: str, out: jax.Array) -> Checked:
        """An output of the whole call."""
        out, exact = out[self.rows], self.exact
        if implementation not in OURS:
            # What attention over nothing gives is our convention.
            out, exact = out[self._used], exact[self._used]
        limit = accuracy.limit(self.plain, jnp.bfloat16) * _ROUGH.get(implementation, 1.0)
        return Checked("out", float(accuracy.error(out, exact)), limit)


def _rows(given: Inputs, rows: np.ndarray) -> Inputs:
    mask = None if given.mask is None else given.mask[rows]
    return Inputs(given.query[rows], given.cache.fork(rows), mask)
