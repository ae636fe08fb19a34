"""What crossover_bench measures, and what its rows say together."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from benchmarks.harness import cases, functions, noise, paired, pairwise, tables, units

PEERS = ("repeat_kv", "jax_nn")
WANTED = 1.05  # the default's time / the better peer's, at most
# After five rounds on one side of this, more of them change nothing.
CLEAR_ROUNDS, CLEARLY_FASTER, CLEARLY_SLOWER = 5, 0.8, 1.35


@dataclasses.dataclass(frozen=True)
class Case:
    """A row's question; T = S."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    direction: str

    def __str__(self) -> str:
        return "/".join(str(getattr(self, field.name)) for field in dataclasses.fields(Case))

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.length**2

    @property
    def cost(self) -> float:
        """About how many seconds the row takes on two cores, compiling included."""
        work = self.scores * (self.head_dim + 32) * (3 if self.direction == "fwd+bwd" else 1)
        return 6 + work / 1.2e8


@dataclasses.dataclass(frozen=True)
class Row(Case):
    """What was measured of a case; times in seconds, medians of rounds."""

    chosen: str  # by the default
    default: float
    xla: float
    xla_chunked: float
    repeat_kv: float
    jax_nn: float | None  # which has no dropout
    crossover: float  # time of "xla" / that of "xla_chunked"
    crossover_is_noise: bool
    best: str  # of the peers
    ratio: float  # the default's time / the best peer's
    ratio_is_noise: bool  # from 1
    is_slower: bool  # than WANTED
    is_slower_beyond_noise: bool
    rounds: int

    @property
    def mark(self) -> str:
        if not self.is_slower:
            return ""
        return "slower" if self.is_slower_beyond_noise else f"slower {noise.MARK}"


COLUMNS = (
    tables.Column("B", 2, lambda r: str(r.batch)),
    tables.Column("T", 4, lambda r: str(r.length)),
    tables.Column("N/K", 5, lambda r: f"{r.heads}/{r.kv_heads}", "left"),
    tables.Column("H", 3, lambda r: str(r.head_dim)),
    tables.Column("dtype", 8, lambda r: r.dtype, "left"),
    tables.Column("Direction", 9, lambda r: r.direction, "left"),
    tables.Column("B*N*T*S", 7, lambda r: power(r.scores)),
    tables.Column("Default", 11, lambda r: r.chosen, "left"),
    tables.Column("default", 8, lambda r: units.seconds(r.default)),
    tables.Column("xla", 8, lambda r: units.seconds(r.xla)),
    tables.Column("chunked", 8, lambda r: units.seconds(r.xla_chunked)),
    tables.Column("xla/chunked", 7, lambda r: units.ratio(r.crossover, r.crossover_is_noise)),
    tables.Column("repeat_kv", 8, lambda r: units.seconds(r.repeat_kv)),
    tables.Column("jax_nn", 8, lambda r: units.seconds(r.jax_nn)),
    tables.Column("Rounds", 6, lambda r: str(r.rounds)),
    tables.Column("default/best", 7, lambda r: units.ratio(r.ratio, r.ratio_is_noise)),
    tables.Column("", 8, lambda r: r.mark, "left"),
)


def power(scores: int | None) -> str:
    """``2**20``, ``2**20.5``."""
    return f"2**{round(math.log2(scores), 1):g}" if scores else units.NOTHING


def parse_case(text: str) -> Case:
    """Returns the case that `Case.__str__` wrote; ValueError for other text."""
    *sizes, dtype, direction = text.split("/")
    known = dtype in cases.DTYPES and direction in functions.DIRECTIONS
    if len(sizes) != 5 or not known or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"takes B/T/N/K/H/dtype/direction, got {text!r}")
    return Case(*map(int, sizes), dtype, direction)


def choose_cases(
    batches: Sequence[int],
    lengths: Sequence[int],
    heads: Sequence[tuple[int, int]],
    head_dims: Sequence[int],
    kinds: Sequence[tuple[str, str]],
    *,
    full: bool,
) -> list[Case]:
    """Returns cases that have all pairs of values, or with ``full`` the product of all values.

    ``heads`` are query heads with key/value heads, ``kinds`` dtypes with directions.
    """

    def make(row):
        batch, length, (query_heads, kv_heads), head_dim, (dtype, direction) = row
        return Case(batch, length, query_heads, kv_heads, head_dim, dtype, direction)

    factors = [
        list(dict.fromkeys(values)) for values in (batches, lengths, heads, head_dims, kinds)
    ]
    if full:
        rows: Iterable = itertools.product(*factors)
    else:
        rows = pairwise.choose(factors, lambda row: make(row).cost)
    return list(map(make, rows))


def is_clear(measured: paired.Paired) -> bool:
    """Whether nobody needs more rounds to say who is faster, the default or its peers."""
    best = find_best_peer(measured)
    ratios = measured.ratios("default", best)
    return measured.rounds >= CLEAR_ROUNDS and (
        max(ratios) < CLEARLY_FASTER or min(ratios) > CLEARLY_SLOWER
    )


def find_best_peer(measured: paired.Paired) -> str:
    return min((peer for peer in PEERS if peer in measured.seconds), key=measured.median)


def find_crossing(rows: Sequence[Row]) -> tuple[int | None, int | None]:
    """(last score count at which xla is faster, first from which on xla_chunked stays faster)."""
    last = max((r.scores for r in rows if r.crossover < 1), default=None)
    above = [r.scores for r in rows if last is None or r.scores > last]
    return last, min(above, default=None)


def summarize(rows: Sequence[Row]) -> list[str]:
    """What the rows say together."""
    slower = [row for row in rows if row.is_slower]
    certain = [row for row in slower if row.is_slower_beyond_noise]
    worst = max(rows, key=lambda row: row.ratio)
    peers = [peer for peer in PEERS if getattr(worst, peer) is not None]
    lines = [
        f"{len(rows)} rows; default / better of {' and '.join(peers)}: over {WANTED} in "
        f"{len(slower)}, in {len(certain)} of them beyond noise",
        f"worst: {units.ratio(worst.ratio)}, {worst}",
    ]
    if slower:
        lines.append(f"again: --rows={','.join(map(str, slower))}")
    lines.append(
        "xla_chunked overtakes xla at B*N*T*S from (xla is still the faster) to (stays so):"
    )
    for kind in sorted({(row.dtype, row.direction) for row in rows}):
        crossing = find_crossing([row for row in rows if (row.dtype, row.direction) == kind])
        lines.append(f"{kind[0]:8}  {kind[1]:9}  {' to '.join(map(power, crossing))}")
    return lines
