"""What ``kernel_bench.py`` compares a kernel with before it times it, on the very same call.

One batch row and one key/value head with its query heads stand for all: a kernel answers the whole
call, and the reference this part of it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.harness import accuracy, kernel_programs
from benchmarks.harness.kernel_cases import Case
from benchmarks.harness.kernel_programs import RESULTS, Programs


@dataclasses.dataclass(frozen=True)
class Checked:
    """The result with the largest error for what is allowed; errors as in `accuracy`."""

    result: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


class Reference:
    """Outputs and gradients of part of a call, in float32, and the errors of plain attention.

    Plain attention has full logits in the call's precision; where these are too large, the chunked
    path in that precision stands for it. ``against`` says which.
    """

    def __init__(self, case: Case, arrays: tuple[jax.Array, ...]):
        group = case.heads // case.kv_heads
        self._group = group
        part = dataclasses.replace(case, batch=1, heads=group, kv_heads=1)
        arrays = tuple(map(self._part, ("query", "dkey", "dvalue", "out"), arrays))
        extras = case.extras(group)
        wide = tuple(array.astype(jnp.float32) for array in arrays)
        self.dtype = case.dtype
        self.exact = self._solve(kernel_programs.reference(part), wide, extras)
        try:
            plain, self.against = kernel_programs.plain(part), "plain"
        except NotImplementedError:
            plain, self.against = kernel_programs.attention(part, "xla_chunked"), "xla_chunked"
        results = self._solve(plain, arrays, extras)
        self.plain = {
            name: float(accuracy.error(results[name], exact)) for name, exact in self.exact.items()
        }

    def check(self, direction: str, results: tuple[jax.Array, ...]) -> Checked:
        """The worst of a direction's results."""
        found = []
        for name, result in zip(RESULTS[direction], results, strict=True):
            error = float(accuracy.error(self._part(name, result), self.exact[name]))
            found.append(Checked(name, error, accuracy.limit(self.plain[name], self.dtype)))
        return max(found, key=lambda one: one.error / one.allowed)

    def _part(self, name: str, array: jax.Array) -> jax.Array:
        """The first batch row, and the first key/value head or the query heads that read it."""
        heads = 1 if name in ("dkey", "dvalue") else self._group
        return array[:1, :, :heads]

    def _solve(self, attend, arrays, extras) -> dict[str, jax.Array]:
        results = Programs(attend).both(*arrays, extras)
        return dict(zip(RESULTS["fwd+bwd"], jax.block_until_ready(results), strict=True))
