"""The attention function alone against jax.nn's and torch's, with the ratios that are wanted.

    python benchmarks/attention_bench.py
    python benchmarks/attention_bench.py --cases=decode,fwd/128 --dtypes=float32
    python benchmarks/attention_bench.py --cases=4096 --bounds

Each peer is measured in turn with axattn; a ratio is the median of the ratios of neighbouring runs.
jax.nn is in this process; torch (CPU only, where it is installed: extra `peers`) has one of its
own, and computes the same numbers first: another result than axattn's is an error. "Wanted" holds
for a CPU; on other devices the ratios are printed all the same. The floor of a decoding step is the
time to read the cache once at the rate that memory is read and written. With --bounds a second
table has what XLA takes for the matrix products alone and for the exponentials alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

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
    torch_peer,
    units,
    xla_bounds,
)

_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of float32, bfloat16, float16")
_CASES = flags.DEFINE_list("cases", [], "parts of the cases' names, e.g. decode,fwd/128")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "time to measure each pair for", lower_bound=0)
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, registry.NAMES, "in place of axattn's own choice"
)
_HEADS = flags.DEFINE_list("heads", ["16", "2", "128"], "query heads, key/value heads, head size")
_BOUNDS = flags.DEFINE_bool("bounds", False, "also time the products and the exponentials alone")

JAX_NN, TORCH = "jax.nn", "torch"


@dataclasses.dataclass(frozen=True)
class Question:
    """A shape, a direction, and the ratios, a peer's time / ours, that are wanted at least.

    ``wanted`` is by peer and dtype; nothing is wanted of what is not there.
    """

    name: str
    batch: int
    q_len: int
    kv_len: int
    direction: str
    wanted: Mapping[tuple[str, str], float]

    @property
    def is_causal(self) -> bool:
        # The newest token sees the whole cache: no mask at all.
        return self.q_len > 1


def want(jax_nn: float, **torch: float) -> dict[tuple[str, str], float]:
    """The same ratio to jax.nn for every dtype; torch's by dtype."""
    return {
        **{(JAX_NN, dtype): jax_nn for dtype in cases.DTYPES},
        **{(TORCH, dtype): ratio for dtype, ratio in torch.items()},
    }


QUESTIONS = (
    Question("fwd/128", 1, 128, 128, "fwd", want(1 / 1.1, float32=0.9)),
    Question("fwd/4096", 1, 4096, 4096, "fwd", want(4.0, float32=0.85, bfloat16=0.5)),
    Question("fwd+bwd/2048", 1, 2048, 2048, "fwd+bwd", want(2.0, float32=0.85)),
    Question("decode/8192", 8, 1, 8192, "fwd", want(1.0, float32=1.0, bfloat16=1.0)),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """axattn and a peer, measured in turn."""

    peer: str
    measured: paired.Paired
    wanted: float | None

    @property
    def _ratios(self) -> list[float]:
        return self.measured.ratios(self.peer, "axattn")

    @property
    def ratio(self) -> str:
        return units.ratio(statistics.median(self._ratios), noise.of_ratios(self._ratios))

    @property
    def verdict(self) -> str:
        if self.wanted is None:
            return ""
        text = "met" if statistics.median(self._ratios) >= self.wanted else "not met"
        return f"{text} {noise.MARK}" if noise.of_ratios(self._ratios, self.wanted) else text


@dataclasses.dataclass(frozen=True)
class Answer:
    """One line of the tables; seconds. A peer that is not there has no comparison."""

    question: Question
    dtype: str
    chosen: str
    comparisons: Mapping[str, Comparison]
    floor: float | None
    bounds: xla_bounds.Bounds | None

    @property
    def ours(self) -> float:
        compared = self.comparisons.values()
        return statistics.median(t for c in compared for t in c.measured.seconds["axattn"])


def compare_columns(peer: str) -> list[tables.Column]:
    """What was found of a peer; its time says where it is absent."""

    def column(header: str, width: int, cell, justify: str = "right") -> tables.Column:
        def text(answer: Answer) -> str:
            found = answer.comparisons.get(peer)
            if found is None:
                return "absent" if header == peer else units.NOTHING
            return cell(found)

        return tables.Column(header, width, text, justify)

    return [
        column(peer, 8, lambda c: units.seconds(c.measured.median(peer))),
        column("Rounds", 6, lambda c: str(c.measured.rounds)),
        column("Wanted", 8, lambda c: f">= {units.ratio(c.wanted)}" if c.wanted else units.NOTHING),
        column("Got", 7, lambda c: c.ratio),
        column("", 9, lambda c: c.verdict, "left"),
    ]


CASE_COLUMNS = (
    tables.Column("Case", 13, lambda a: a.question.name, "left"),
    tables.Column("Batch", 5, lambda a: str(a.question.batch)),
    tables.Column("dtype", 8, lambda a: a.dtype, "left"),
    tables.Column("Implementation", 14, lambda a: a.chosen, "left"),
    tables.Column("axattn", 8, lambda a: units.seconds(a.ours)),
)
COLUMNS = (
    *CASE_COLUMNS,
    *compare_columns(JAX_NN),
    *compare_columns(TORCH),
    tables.Column("Floor", 8, lambda a: units.seconds(a.floor)),
    tables.Column("Of floor", 8, lambda a: units.percent(a.floor, a.ours)),
)
BOUND_COLUMNS = (
    *CASE_COLUMNS,
    tables.Column("Products", 8, lambda a: units.seconds(a.bounds.products)),
    tables.Column("Exponentials", 12, lambda a: units.seconds(a.bounds.exponentials)),
    tables.Column("Both", 8, lambda a: units.seconds(a.bounds.total)),
    tables.Column("Of axattn", 9, lambda a: units.percent(a.bounds.total, a.ours)),
)


def ask(
    question: Question, dtype: str, rate: float | None, torch: torch_peer.TorchPeer | None
) -> Answer:
    """Measures one line; ``rate`` is the memory's, in bytes per second."""
    heads, kv_heads, head_dim = command.numbers(_HEADS, count=3)
    args = inputs.attention_inputs(
        question.batch, question.q_len, question.kv_len, heads, kv_heads, head_dim, dtype
    )
    causal = {"is_causal": question.is_causal}

    def make_step(fn, **options):
        fn = functools.partial(fn, **causal, **options)
        return functools.partial(functions.in_direction(fn, question.direction), *args)

    ours = make_step(dot_product_attention, implementation=_IMPLEMENTATION.value)
    # Long enough for pools of threads that are asleep when their turn comes.
    compare = functools.partial(
        paired.compare, seconds=_SECONDS.value, least_of=3, min_sample=10e-3
    )
    measured = {JAX_NN: compare({JAX_NN: make_step(baselines.jax_nn), "axattn": ours})}
    if torch is not None:
        torch.prepare(
            torch_peer.Problem.from_result(args, ours(), direction=question.direction, **causal)
        )
        # More rounds than of jax.nn, which is far from what is wanted, and takes seconds.
        measured[TORCH] = compare({"axattn": ours}, elsewhere={TORCH: torch}, min_rounds=9)
    bounds = None
    if _BOUNDS.value and question.is_causal:
        gradients = question.direction == "fwd+bwd"
        bounds = xla_bounds.measure(args, gradients=gradients, seconds=_SECONDS.value, **causal)
    return Answer(
        question,
        dtype,
        _IMPLEMENTATION.value or explain_implementations(*args, **causal).chosen,
        {
            peer: Comparison(peer, found, question.wanted.get((peer, dtype)))
            for peer, found in measured.items()
        },
        2 * args[1].nbytes / rate if rate and not question.is_causal else None,
        bounds,
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
    why_not = torch_peer.find_refusal()
    about = why_not or f"{metadata.version('torch')}, in a process of its own"
    console.print(f"torch: {about}", highlight=False)
    console.print(f"\nN={heads} K={kv_heads} H={head_dim}, causal", highlight=False)
    stream = tables.Stream(console, COLUMNS)
    stream.header()
    answers = []
    with contextlib.ExitStack() as stack:
        torch = None
        if not why_not:
            torch = stack.enter_context(contextlib.closing(torch_peer.TorchPeer()))
        for question in asked:
            for dtype in dtypes:
                answers.append(ask(question, dtype, rate, torch))
                stream.row(answers[-1])
    console.print(f"{noise.LEGEND} Behind a verdict: from what is wanted.", soft_wrap=True)
    if jax.default_backend() != "cpu":
        console.print("What is wanted was set for a CPU; wall time, not device time.")
    bounded = [answer for answer in answers if answer.bounds is not None]
    if bounded:
        console.print("\nWhat XLA takes for all products, and all exponentials, in such blocks")
        stream = tables.Stream(console, BOUND_COLUMNS)
        stream.header()
        for answer in bounded:
            stream.row(answer)


if __name__ == "__main__":
    command.run(main)
