"""How long a decoding step takes: by tokens in the cache, and by the room in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.harness import inputs, noise, paired
from benchmarks.harness.cache_compile import create
from benchmarks.harness.cache_sizes import QUANTIZED, CacheCase, analytical


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A step of one layer's cache: one token per row appended, and attention over all of them.

    Attributes:
      tokens: in each row, the new one included.
      capacity: tokens that a row has room for.
      seconds: median per step.
      growth: median ratio of this time to that of the first row of its kind and dtype, measured
        in turn.
      growth_is_noise: whether these ratios spread by more than that differs from 1.
      bytes: of the tokens in the cache, which a step has to read.
    """

    kind: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    capacity: int
    seconds: float
    growth: float
    growth_is_noise: bool
    rounds: int
    bytes: int


class _Step:
    """Decodes the last of ``tokens`` again and again; the cache is donated and comes back."""

    def __init__(self, case: CacheCase, tokens: int):
        cache = create(case)
        if case.kind == "paged":
            pages = np.arange(case.batch * case.pages_per_row).reshape(case.batch, -1)
            # As a pool in use would have them: in no order.
            cache = cache.with_table(
                np.random.default_rng(0).permutation(pages.ravel()).reshape(pages.shape)
            )
        dtype = "float32" if case.dtype in QUANTIZED else case.dtype
        query, new, *old = inputs.random_like(
            [
                jax.ShapeDtypeStruct((case.batch, length, heads, case.head_dim), dtype)
                for length, heads in (
                    (1, case.heads),
                    (1, case.kv_heads),
                    (tokens, case.kv_heads),
                    (tokens, case.kv_heads),
                )
            ]
        )

        def step(cache, query, new):
            return cache.truncate(tokens - 1).extend(query, new, new)

        fill = jax.jit(lambda cache, key, value: cache.append(key, value), donate_argnums=0)
        self._step = jax.jit(step, donate_argnums=0)
        self._cache, self._args = fill(cache, *old), (query, new)

    def __call__(self):
        out, self._cache = self._step(self._cache, *self._args)
        return out, self._cache


def time_steps(
    case: CacheCase, points: Sequence[tuple[int, int]], seconds: float
) -> list[StepTime]:
    """Times steps at ``points``, each (tokens, capacity), in turn; ``case.tokens`` is ignored."""
    cases = {f"{t}/{c}": (t, c, dataclasses.replace(case, tokens=c)) for t, c in points}
    steps = {name: _Step(one, tokens) for name, (tokens, _, one) in cases.items()}
    result = paired.compare(steps, seconds=seconds)
    first = next(iter(steps))
    return [
        StepTime(
            case.kind,
            case.dtype,
            case.heads,
            case.kv_heads,
            case.head_dim,
            case.batch,
            tokens,
            capacity,
            seconds=result.median(name),
            growth=result.ratio(name, first),
            growth_is_noise=noise.of_ratios(result.ratios(name, first)),
            rounds=result.rounds,
            bytes=case.batch * tokens * analytical(case).token,
        )
        for name, (tokens, capacity, _) in cases.items()
    ]
