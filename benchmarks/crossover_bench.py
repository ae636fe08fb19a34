"""Where "xla_chunked" overtakes "xla" on this machine: causal, forward, and forward + backward.

    python benchmarks/crossover_bench.py
    python benchmarks/crossover_bench.py --directions=fwd --shapes=1/16/2/128,8/8/8/64

Its result is the source of the constant in axattn/_implementations/preference.py. A ratio is the
median of the ratios of neighbouring runs; above 1, "xla_chunked" is the faster one.
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

from rich.console import Console

from axattn import dot_product_attention
from benchmarks.harness import (
    cases,
    command,
    environment,
    functions,
    inputs,
    noise,
    paired,
    tables,
    units,
)

_SHAPES = flags.DEFINE_list(
    "shapes", ["1/16/2/128", "1/8/8/64", "8/16/2/128"], "batch/heads/kv_heads/head_dim, ..."
)
_LENGTHS = flags.DEFINE_list("lengths", ["32", "64", "128", "256", "512", "1024", "2048"], "T = S")
_DIRECTIONS = flags.DEFINE_list("directions", list(functions.DIRECTIONS), "of fwd, fwd+bwd")
_DTYPES = flags.DEFINE_list("dtypes", ["float32"], "of float32, bfloat16, float16")
_CAUSAL = flags.DEFINE_bool("causal", True, "causal attention")
_SECONDS = flags.DEFINE_float("seconds", 0.3, "time to measure each pair for", lower_bound=0)
_STOP = flags.DEFINE_float("stop", 3.0, "leave out greater lengths after a ratio of this")

_NAMES = ("xla", "xla_chunked")


def measure(shape: Sequence[int], length: int, dtype: str, direction: str) -> paired.Paired:
    """Both implementations at T = S = ``length``."""
    batch, heads, kv_heads, head_dim = shape
    args = inputs.attention_inputs(batch, length, length, heads, kv_heads, head_dim, dtype)
    attend = functools.partial(dot_product_attention, is_causal=_CAUSAL.value)
    fns = {}
    for name in _NAMES:
        fn = functions.in_direction(functools.partial(attend, implementation=name), direction)
        fns[name] = functools.partial(fn, *args)
    return paired.compare(fns, seconds=_SECONDS.value)


@dataclasses.dataclass(frozen=True)
class Point:
    """One line of the table; seconds."""

    shape: str
    dtype: str
    direction: str
    length: int
    scores: int  # B * N * T * S
    xla: float
    chunked: float
    ratio: float
    ratio_is_noise: bool


COLUMNS = (
    tables.Column("B/N/K/H", 12, lambda p: p.shape, "left"),
    tables.Column("dtype", 8, lambda p: p.dtype, "left"),
    tables.Column("Direction", 9, lambda p: p.direction, "left"),
    tables.Column("T", 5, lambda p: str(p.length)),
    tables.Column("B*N*T*S", 7, lambda p: f"2**{math.log2(p.scores):g}"),
    tables.Column("xla", 8, lambda p: units.seconds(p.xla)),
    tables.Column("chunked", 8, lambda p: units.seconds(p.chunked)),
    tables.Column("xla/chunked", 6, lambda p: units.ratio(p.ratio, p.ratio_is_noise)),
)


def crossing(points: Sequence[Point]) -> tuple[int | None, int | None]:
    """(last score count at which xla is faster, first from which on xla_chunked stays faster)."""
    last = max((p.scores for p in points if p.ratio < 1), default=None)
    above = [p.scores for p in points if last is None or p.scores > last]
    return last, min(above, default=None)


def main(argv: Sequence[str]) -> None:
    try:
        shapes = {
            text: command.numbers(_SHAPES, text, count=4, split="/") for text in _SHAPES.value
        }
        for text, (_, heads, kv_heads, _) in shapes.items():
            if heads % kv_heads:
                raise ValueError(f"--shapes: {text!r} takes kv_heads that divide its heads")
        lengths = command.numbers(_LENGTHS)
        dtypes = command.names(_DTYPES, cases.DTYPES)
        directions = command.names(_DIRECTIONS, functions.DIRECTIONS)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    environment.choose_backend()
    where = dataclasses.replace(environment.describe(), command=environment.command_line(sys.argv))
    console = Console()
    console.print(f"{where.header()}\n", soft_wrap=True, highlight=False, markup=False)
    stream = tables.Stream(console, COLUMNS)
    stream.header()
    lines, marked = [], False
    for text, shape in shapes.items():
        for dtype, direction in itertools.product(dtypes, directions):
            points = []
            for length in lengths:
                result = measure(shape, length, dtype, direction)
                scores = shape[0] * shape[1] * length * length
                seconds = (result.median(name) for name in _NAMES)
                ratio = result.ratio(*_NAMES)
                noisy = noise.of_ratios(result.ratios(*_NAMES))
                points.append(Point(text, dtype, direction, length, scores, *seconds, ratio, noisy))
                stream.row(points[-1])
                marked |= noisy
                if ratio > _STOP.value:
                    break
            bounds = (f"2**{math.log2(n):g}" if n else units.NOTHING for n in crossing(points))
            lines.append(f"{text:12}  {dtype:8}  {direction:9}  {' to '.join(bounds)}")
    if marked:
        console.print(noise.LEGEND, highlight=False)
    console.print("\nxla_chunked overtakes xla at B*N*T*S from", highlight=False)
    for line in lines:
        console.print(line, highlight=False)


if __name__ == "__main__":
    command.run(main)
