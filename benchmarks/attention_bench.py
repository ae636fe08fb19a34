"""The attention function alone against jax.nn's: the ratios that axattn sets out to reach on a CPU.

    python benchmarks/attention_bench.py
    python benchmarks/attention_bench.py --cases=decode,fwd/128 --dtypes=float32

Both run in this process in turn; a ratio is the median of the ratios of neighbouring runs.
"Wanted" holds for a CPU; on other devices the ratios are printed all the same. The floor of a
decoding step is the time to read the cache once at the rate that memory is read and written.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from rich.console import Console

from axattn import dot_product_attention, explain_implementations
from axattn._implementations import registry
from benchmarks.harness import (
    bandwidth,
    baselines,
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

_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of float32, bfloat16, float16")
_CASES = flags.DEFINE_list("cases", [], "parts of the cases' names, e.g. decode,fwd/128")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "time to measure each pair for", lower_bound=0)
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, registry.NAMES, "in place of axattn's own choice"
)
_HEADS = flags.DEFINE_list("heads", ["16", "2", "128"], "query heads, key/value heads, head size")


@dataclasses.dataclass(frozen=True)
class Question:
    """A shape, a direction, and the ratio jax.nn's time / ours that is wanted at least."""

    name: str
    batch: int
    q_len: int
    kv_len: int
    direction: str
    wanted: float


QUESTIONS = (
    Question("fwd/128", 1, 128, 128, "fwd", 1 / 1.1),
    Question("fwd/4096", 1, 4096, 4096, "fwd", 4.0),
    Question("fwd+bwd/2048", 1, 2048, 2048, "fwd+bwd", 2.0),
    Question("decode/8192", 8, 1, 8192, "fwd", 1.0),
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One line of the table; seconds."""

    question: Question
    dtype: str
    chosen: str
    theirs: float
    ours: float
    ratio: float
    ratio_is_noise: bool
    verdict_is_noise: bool
    rounds: int
    floor: float | None = None

    @property
    def verdict(self) -> str:
        text = "met" if self.ratio >= self.question.wanted else "not met"
        return f"{text} {noise.MARK}" if self.verdict_is_noise else text


COLUMNS = (
    tables.Column("Case", 13, lambda a: a.question.name, "left"),
    tables.Column("Batch", 5, lambda a: str(a.question.batch)),
    tables.Column("dtype", 8, lambda a: a.dtype, "left"),
    tables.Column("Implementation", 14, lambda a: a.chosen, "left"),
    tables.Column("jax.nn", 8, lambda a: units.seconds(a.theirs)),
    tables.Column("axattn", 8, lambda a: units.seconds(a.ours)),
    tables.Column("Rounds", 6, lambda a: str(a.rounds)),
    tables.Column("Wanted", 8, lambda a: f">= {units.ratio(a.question.wanted)}"),
    tables.Column("Got", 7, lambda a: units.ratio(a.ratio, a.ratio_is_noise)),
    tables.Column("", 9, lambda a: a.verdict, "left"),
    tables.Column("Floor", 8, lambda a: units.seconds(a.floor)),
    tables.Column("Of floor", 8, lambda a: units.percent(a.floor, a.ours)),
)


def ask(question: Question, dtype: str, rate: float | None) -> Answer:
    """Measures one line; ``rate`` is the memory's, in bytes per second."""
    heads, kv_heads, head_dim = command.numbers(_HEADS, count=3)
    args = inputs.attention_inputs(
        question.batch, question.q_len, question.kv_len, heads, kv_heads, head_dim, dtype
    )
    # The newest token sees the whole cache: no mask at all.
    causal = question.q_len > 1
    attend = functools.partial(
        dot_product_attention, is_causal=causal, implementation=_IMPLEMENTATION.value
    )
    theirs = functools.partial(baselines.jax_nn, is_causal=causal)
    result = paired.compare(
        {
            name: functools.partial(functions.in_direction(fn, question.direction), *args)
            for name, fn in (("jax.nn", theirs), ("axattn", attend))
        },
        seconds=_SECONDS.value,
    )
    ratios = result.ratios("jax.nn", "axattn")
    cache = 2 * args[1].nbytes
    return Answer(
        question,
        dtype,
        _IMPLEMENTATION.value or explain_implementations(*args, is_causal=causal).chosen,
        result.median("jax.nn"),
        result.median("axattn"),
        result.ratio("jax.nn", "axattn"),
        noise.of_ratios(ratios),
        noise.of_ratios(ratios, question.wanted),
        result.rounds,
        cache / rate if rate and not causal else None,
    )


def main(argv: Sequence[str]) -> None:
    try:
        dtypes = command.names(_DTYPES, cases.DTYPES)
        heads, kv_heads, head_dim = command.numbers(_HEADS, count=3)
        if heads % kv_heads:
            raise ValueError(f"--heads: takes key/value heads that divide {heads}, got {kv_heads}")
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    asked = [
        q for q in QUESTIONS if not _CASES.value or any(part in q.name for part in _CASES.value)
    ]
    if not asked:
        names = ", ".join(question.name for question in QUESTIONS)
        raise app.UsageError(f"--cases: {','.join(_CASES.value)!r} is in none of {names}")
    environment.choose_backend()
    where = dataclasses.replace(environment.describe(), command=environment.command_line(sys.argv))
    console = Console()
    console.print(where.header(), soft_wrap=True, highlight=False, markup=False)
    rate = None
    if any(question.q_len == 1 for question in asked):
        rate = bandwidth.bytes_per_second()
        console.print(f"memory: {units.amount(rate, 'B')}/s, read and written", highlight=False)
    console.print(f"\nN={heads} K={kv_heads} H={head_dim}, causal", highlight=False)
    stream = tables.Stream(console, COLUMNS)
    stream.header()
    answers = []
    for question in asked:
        for dtype in dtypes:
            answers.append(ask(question, dtype, rate))
            stream.row(answers[-1])
    if any(answer.ratio_is_noise or answer.verdict_is_noise for answer in answers):
        console.print(f"{noise.LEGEND} Behind a verdict: from what is wanted.", highlight=False)
    if jax.default_backend() != "cpu":
        console.print("What is wanted was set for a CPU; wall time, not device time.")


if __name__ == "__main__":
    command.run(main)
