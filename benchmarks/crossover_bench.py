"""Does None take the right implementation for short calls, and is anything else faster?

    python benchmarks/crossover_bench.py                     # 57 rows: ten minutes on 2 cores
    python benchmarks/crossover_bench.py --lengths=64,128 --heads=16/2 --full
    python benchmarks/crossover_bench.py --rows=1/128/16/2/128/float32/fwd

Causal self-attention with axattn's own choice ("default"), each of its XLA paths by name, and the
two ways to do without axattn: the einsum over repeated keys and values, and jax.nn. The rows have
every two of the values (batch, length, heads, head size, dtype with direction) together at least
once; with --full they are the product. All five are run in turn; a round's time is the least of
three samples, and a ratio is the median of the rounds' ratios.

Below stand the rows in which the default takes more than 1.05 times as long as the better of the
other two (a sign test says whether by chance), and where "xla_chunked" overtakes "xla": the source
of the constants in axattn/_implementations/preference.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axattn import dot_product_attention, explain_implementations
from benchmarks.harness import (
    baselines,
    cases,
    command,
    environment,
    functions,
    inputs,
    noise,
    output,
    paired,
    pairwise,
    sections,
    tables,
    units,
)

_BATCHES = flags.DEFINE_list("batches", ["1", "2", "4", "8"], "batch rows")
_LENGTHS = flags.DEFINE_list("lengths", ["64", "128", "256", "512", "1024"], "T = S")
_HEADS = flags.DEFINE_list(
    "heads",
    ["4/1", "4/4", "8/1", "8/2", "8/8", "16/1", "16/2", "16/4", "16/16"],
    "query heads/key and value heads, ...",
)
_HEAD_DIMS = flags.DEFINE_list("head_dims", ["16", "32", "64", "128"], "head sizes")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of float32, bfloat16, float16")
_DIRECTIONS = flags.DEFINE_list("directions", list(functions.DIRECTIONS), "of fwd, fwd+bwd")
_FULL = flags.DEFINE_bool("full", False, "all rows, not only some that have all pairs of values")
_ROWS = flags.DEFINE_list("rows", [], "in place of all that: B/T/N/K/H/dtype/direction, ...")
_CAUSAL = flags.DEFINE_bool("causal", True, "causal attention")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "time to measure each row for", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "rounds at least, where it is close", lower_bound=1)
_OUTPUT = flags.DEFINE_list("output", [], "files to write: .json, .csv, .md")

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
        return "/".join(map(str, dataclasses.astuple(self)))

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.length**2

    @property
    def cost(self) -> float:
        """About how many seconds the row takes on two cores, compiling included."""
        work = self.scores * (self.head_dim + 32) * (3 if self.direction == "fwd+bwd" else 1)
        return 6 + work / 1.2e8


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a case; times in seconds, medians of rounds."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    direction: str
    scores: int  # B * N * T * S
    chosen: str  # by the default
    default: float
    xla: float
    xla_chunked: float
    repeat_kv: float
    jax_nn: float
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


def parse_row(text: str) -> Case:
    """The case that `Case.__str__` wrote."""
    *sizes, dtype, direction = text.split("/")
    if len(sizes) != 5 or dtype not in cases.DTYPES or direction not in functions.DIRECTIONS:
        raise ValueError(f"--rows: takes B/T/N/K/H/dtype/direction, got {text!r}")
    return Case(*command.numbers(_ROWS, "/".join(sizes), count=5, split="/"), dtype, direction)


def make_cases() -> list[Case]:
    """What the flags ask for, the cheapest first; ValueError for what cannot be."""
    heads = [
        tuple(command.numbers(_HEADS, text, count=2, split="/")) for text in _HEADS.value
    ]  # fmt: skip
    kinds = itertools.product(
        command.names(_DTYPES, cases.DTYPES), command.names(_DIRECTIONS, functions.DIRECTIONS)
    )
    numbers = (command.numbers(flag) for flag in (_BATCHES, _LENGTHS, _HEAD_DIMS))
    factors = [list(dict.fromkeys(values)) for values in (*numbers, heads, kinds)]

    def make(row):
        batch, length, head_dim, (query_heads, kv_heads), (dtype, direction) = row
        return Case(batch, length, query_heads, kv_heads, head_dim, dtype, direction)

    rows = (
        itertools.product(*factors)
        if _FULL.value
        else pairwise.choose(factors, lambda row: make(row).cost)
    )
    found = list(map(parse_row, _ROWS.value)) or list(map(make, rows))
    for case in found:
        if case.heads % case.kv_heads:
            flag = "rows" if _ROWS.value else "heads"
            given = f"{case.heads}/{case.kv_heads}"
            raise ValueError(f"--{flag}: takes key/value heads that divide the heads, got {given}")
    return sorted(found, key=lambda case: case.cost)


def is_clear(measured: paired.Paired) -> bool:
    """Whether nobody needs more rounds to say who is faster, the default or its peers."""
    best = find_best_peer(measured)
    ratios = measured.ratios("default", best)
    return measured.rounds >= CLEAR_ROUNDS and (
        max(ratios) < CLEARLY_FASTER or min(ratios) > CLEARLY_SLOWER
    )


def find_best_peer(measured: paired.Paired) -> str:
    return min(PEERS, key=measured.median)


def measure(case: Case) -> Row:
    """Times all implementations of a case, in turn."""
    sizes = (case.heads, case.kv_heads, case.head_dim, case.dtype)
    args = inputs.attention_inputs(case.batch, case.length, case.length, *sizes)
    causal = {"is_causal": _CAUSAL.value}
    attend = {
        "default": dot_product_attention,
        **{
            name: functools.partial(dot_product_attention, implementation=name)
            for name in ("xla", "xla_chunked")
        },
        **{name: baselines.BASELINES[name] for name in PEERS},
    }
    measured = paired.compare(
        {
            name: functools.partial(
                functions.in_direction(functools.partial(fn, **causal), case.direction), *args
            )
            for name, fn in attend.items()
        },
        seconds=_SECONDS.value,
        min_rounds=_ROUNDS.value,
        least_of=3,
        is_settled=is_clear,
    )
    best = find_best_peer(measured)
    ratios = measured.ratios("default", best)
    ratio = measured.ratio("default", best)
    crossover = "xla", "xla_chunked"
    return Row(
        **dataclasses.asdict(case),
        scores=case.scores,
        chosen=explain_implementations(*args, **causal).chosen,
        **{name: measured.median(name) for name in attend},
        crossover=measured.ratio(*crossover),
        crossover_is_noise=noise.of_ratios(measured.ratios(*crossover)),
        best=best,
        ratio=ratio,
        ratio_is_noise=noise.of_ratios(ratios),
        is_slower=ratio > WANTED,
        is_slower_beyond_noise=noise.is_above(ratios, WANTED),
        rounds=measured.rounds,
    )


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
    lines = [
        f"{len(rows)} rows; default / better of {' and '.join(PEERS)}: over {WANTED} in "
        f"{len(slower)}, in {len(certain)} of them beyond noise",
        f"worst: {units.ratio(worst.ratio)}, {name_case(worst)}",
    ]
    if slower:
        lines.append(f"again: --rows={','.join(map(name_case, slower))}")
    lines.append(
        "xla_chunked overtakes xla at B*N*T*S from (xla is still the faster) to (stays so):"
    )
    for kind in sorted({(row.dtype, row.direction) for row in rows}):
        crossing = find_crossing([row for row in rows if (row.dtype, row.direction) == kind])
        lines.append(f"{kind[0]:8}  {kind[1]:9}  {' to '.join(map(power, crossing))}")
    return lines


def name_case(row: Row) -> str:
    return str(Case(*(getattr(row, field.name) for field in dataclasses.fields(Case))))


def main(argv: Sequence[str]) -> int:
    try:
        files = [output.check_path(path) for path in _OUTPUT.value]
        asked = make_cases()
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    environment.choose_backend()
    where = dataclasses.replace(environment.describe(), command=environment.command_line(sys.argv))
    out = sections.Sections(where)
    out.begin("rows", "causal" if _CAUSAL.value else "no mask", COLUMNS)
    interrupted = False
    try:
        for case in asked:
            out.row(measure(case))
    except KeyboardInterrupt:
        interrupted = True
        out.print(f"\ninterrupted: {len(out.sections[-1].rows)} of {len(asked)} rows")
    rows = out.sections[-1].rows
    if rows:
        out.note(f'{noise.LEGEND} Behind "slower": a sign test does not tell it from {WANTED}.')
        for line in summarize(rows):
            out.note(line)
    for path in files:
        out.write(path)
    return 130 if interrupted else 0


if __name__ == "__main__":
    command.run(main)
