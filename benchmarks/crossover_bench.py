"""Does None take the right implementation for short calls, and is anything else faster?

    python benchmarks/crossover_bench.py                     # 57 rows: ten minutes on 2 cores
    python benchmarks/crossover_bench.py --lengths=64,128 --heads=16/2 --full
    python benchmarks/crossover_bench.py --rows=1/128/16/2/128/float32/fwd
    python benchmarks/crossover_bench.py --rows=8/128/8/8/64/float32/fwd+bwd --dropout_rate=0.1

Causal self-attention with axattn's own choice ("default"), each of its XLA paths by name, and the
two ways to do without axattn: the einsum over repeated keys and values, and jax.nn. The rows have
every two of the values (batch, length, heads, head size, dtype with direction) together at least
once; with --full they are the product. All five are run in turn; a round's time is the least of
three samples, and a ratio is the median of the rounds' ratios.

Below stand the rows in which the default takes more than 1.05 times as long as the better of the
other two (a sign test says whether by chance), and where "xla_chunked" overtakes "xla": the source
of the constants in axattn/_implementations/preference.py.

With --dropout_rate the einsum over repeated keys and values has Flax's dropout; jax.nn has none.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axattn import dot_product_attention, explain_implementations
from benchmarks.harness import (
    baselines,
    cases,
    command,
    crossover,
    environment,
    functions,
    inputs,
    noise,
    output,
    paired,
    sections,
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
_DROPOUT_RATE = flags.DEFINE_float(
    "dropout_rate", 0.0, "bits for every weight; jax.nn has none", lower_bound=0, upper_bound=0.99
)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "time to measure each row for", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "rounds at least, where it is close", lower_bound=1)
_OUTPUT = flags.DEFINE_list("output", [], "files to write: .json, .csv, .md")


def make_cases() -> list[crossover.Case]:
    """What the flags ask for, the cheapest first; ValueError for what cannot be."""
    heads = [tuple(command.numbers(_HEADS, text, count=2, split="/")) for text in _HEADS.value]
    kinds = itertools.product(
        command.names(_DTYPES, cases.DTYPES), command.names(_DIRECTIONS, functions.DIRECTIONS)
    )
    if _ROWS.value:
        try:
            found = list(map(crossover.parse_case, _ROWS.value))
        except ValueError as error:
            raise ValueError(f"--rows: {error}") from None
    else:
        batches, lengths, head_dims = map(command.numbers, (_BATCHES, _LENGTHS, _HEAD_DIMS))
        found = crossover.choose_cases(
            batches, lengths, heads, head_dims, list(kinds), full=_FULL.value
        )
    for case in found:
        if case.heads % case.kv_heads:
            flag = "rows" if _ROWS.value else "heads"
            given = f"{case.heads}/{case.kv_heads}"
            raise ValueError(f"--{flag}: takes key/value heads that divide the heads, got {given}")
    return sorted(found, key=lambda case: case.cost)


def measure(case: crossover.Case) -> crossover.Row:
    """Times all implementations of a case, in turn."""
    sizes = (case.heads, case.kv_heads, case.head_dim, case.dtype)
    args = inputs.attention_inputs(case.batch, case.length, case.length, *sizes)
    options: dict[str, Any] = {"is_causal": _CAUSAL.value}
    peers = crossover.PEERS
    if _DROPOUT_RATE.value:
        options["dropout_rate"], peers = _DROPOUT_RATE.value, ("repeat_kv",)
    attend = {
        "default": dot_product_attention,
        **{
            name: functools.partial(dot_product_attention, implementation=name)
            for name in ("xla", "xla_chunked")
        },
        **{name: baselines.BASELINES[name] for name in peers},
    }

    def prepare(fn):
        """The call of ``fn`` in the case's direction; dropout's key is an argument, too."""
        if not _DROPOUT_RATE.value:
            run = functions.in_direction(functools.partial(fn, **options), case.direction)
            return functools.partial(run, *args)

        def drop(query, key, value, rng):
            return fn(query, key, value, dropout_rng=rng, **options)

        run = functions.in_direction(drop, case.direction, arrays=len(args))
        return functools.partial(run, *args, jax.random.key(0))

    measured = paired.compare(
        {name: prepare(fn) for name, fn in attend.items()},
        seconds=_SECONDS.value,
        min_rounds=_ROUNDS.value,
        least_of=3,
        is_settled=crossover.is_clear,
    )
    best = crossover.find_best_peer(measured)
    ratios = measured.ratios("default", best)
    ratio = measured.ratio("default", best)
    paths = "xla", "xla_chunked"
    return crossover.Row(
        **dataclasses.asdict(case),
        chosen=explain_implementations(
            *args, **options, dropout_rng=jax.random.key(0) if _DROPOUT_RATE.value else None
        ).chosen,
        **(dict.fromkeys(crossover.PEERS) | {name: measured.median(name) for name in attend}),
        crossover=measured.ratio(*paths),
        crossover_is_noise=noise.of_ratios(measured.ratios(*paths)),
        best=best,
        ratio=ratio,
        ratio_is_noise=noise.of_ratios(ratios),
        is_slower=ratio > crossover.WANTED,
        is_slower_beyond_noise=noise.is_above(ratios, crossover.WANTED),
        rounds=measured.rounds,
    )


def main(argv: Sequence[str]) -> int:
    try:
        files = [output.check_path(path) for path in _OUTPUT.value]
        asked = make_cases()
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    environment.choose_backend()
    where = dataclasses.replace(environment.describe(), command=environment.command_line(sys.argv))
    out = sections.Sections(where)
    title = "causal" if _CAUSAL.value else "no mask"
    if _DROPOUT_RATE.value:
        title += f", dropout of {_DROPOUT_RATE.value:g}"
    out.begin("rows", title, crossover.COLUMNS)
    interrupted = False
    try:
        for case in asked:
            out.row(measure(case))
    except KeyboardInterrupt:
        interrupted = True
        out.print(f"\ninterrupted: {len(out.sections[-1].rows)} of {len(asked)} rows")
    rows = out.sections[-1].rows
    if rows:
        out.note(
            f'{noise.LEGEND} Behind "slower": a sign test does not tell it from {crossover.WANTED}.'
        )
        for line in crossover.summarize(rows):
            out.note(line)
    for path in files:
        out.write(path)
    return 130 if interrupted else 0


if __name__ == "__main__":
    command.run(main)
