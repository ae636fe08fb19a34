"""Attention as a function, without a layer around it, as rows for tables and pictures.

A row is a dict with the fields of its `Case`, where it was compiled or ran, and what was found.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

import axattn
from axattn import _quantization, aot
from axattn.cache import DenseCache
from benchmarks.harness import functions, inputs, plans, refusals, rounds, rows
from benchmarks.harness.baselines import BASELINES
from benchmarks.harness.layer_jobs import roofline

DECODE = "decode"
DIRECTIONS = (*functions.DIRECTIONS, DECODE)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row's question.

    Attributes:
      implementation: of axattn, ``"default"`` (its own choice), or one of
        ``benchmarks.harness.baselines``.
      seq_len: T = S, causal; in a decoding step S, with T = 1.
      dtype: of the arrays; in a decoding step, of the cache.
      direction: ``"fwd"``, ``"fwd+bwd"``, or ``"decode"``: one token per row over a full
        `axattn.cache.DenseCache` (over arrays, for a baseline).
    """

    implementation: str
    seq_len: int
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"
    direction: str = "fwd"

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            known = ", ".join(DIRECTIONS)
            raise ValueError(f"direction takes one of {known}, got {self.direction!r}")

    @property
    def flops(self) -> float:
        """By arithmetic: two per multiply-add, with gradients thrice as many."""
        pairs = self.batch * self.seq_len
        if self.direction != DECODE:
            pairs *= (self.seq_len + 1) / 2
        return 4 * pairs * self.heads * self.head_dim * (3 if self.direction == "fwd+bwd" else 1)


def build(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function, and the shapes of its arguments."""
    name, decode = case.implementation, case.direction == DECODE
    chosen = None if name == "default" else name
    float_dtype = "bfloat16" if _quantization.is_quantized(case.dtype) else case.dtype

    def struct(length: int, heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.batch, length, heads, case.head_dim), float_dtype)

    query = struct(1 if decode else case.seq_len, case.heads)
    kv = struct(case.seq_len, case.kv_heads)
    if decode and name not in BASELINES:
        sizes = (case.batch, case.seq_len, case.kv_heads, case.head_dim)
        cache = jax.eval_shape(functools.partial(DenseCache.create, *sizes, dtype=case.dtype))
        return lambda cache, query: cache.attend(query, implementation=chosen), (cache, query)
    if name in BASELINES:
        attend = functools.partial(BASELINES[name], is_causal=not decode)
    else:
        attend = functools.partial(
            axattn.dot_product_attention, is_causal=True, implementation=chosen
        )
    return functions.in_direction(attend, "fwd" if decode else case.direction), (query, kv, kv)


def compiled(case: Case, where: str) -> dict[str, Any]:
    """The row of a case that is compiled for a chip that need not be here; nothing is run.

    ``roofline`` is the longer of its FLOPs and of its bytes at the chip's published rates, in
    seconds: no run can be faster. Where the compiler cannot count all of them, they are at least
    those by arithmetic, and all arguments and results once; ``cost_is_lower_bound`` says so.
    """
    chip = aot.target(where)
    aot.device(chip)  # first of all: it prepares the environment that JAX starts in
    fn, shapes = build(case)
    report = aot.analyze(fn, *shapes, target=chip)
    plan = plans.of_report(report, chip.platform)
    if report.ok and report.cost_is_lower_bound:
        once = report.argument_bytes + report.output_bytes
        plan["flops"] = max(plan["flops"] or 0, case.flops)
        plan["bytes_accessed"] = max(plan["bytes_accessed"] or 0, once)
    found = roofline(chip, plan["flops"], plan["bytes_accessed"])
    return {
        **dataclasses.asdict(case),
        "where": where,
        "status": rows.OK,
        **plan,
        "roofline": found,
    }


def measured(cases: Sequence[Case], *, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Rows of cases that run here, in turn; each for about so many seconds.

    ``time`` is the median of ``runs``, ``time_std`` their standard deviation.

    Raises:
      ValueError: a decoding step, whose cache would be empty.
    """
    device = jax.devices()[0]
    found: list[dict[str, Any]] = []
    timers: dict[int, rounds.Timer] = {}
    for number, case in enumerate(cases):
        if case.direction == DECODE:
            raise ValueError(f"cases takes directions {functions.DIRECTIONS}, got {DECODE!r}")
        row = {**dataclasses.asdict(case), "where": "here", "device": device.device_kind}
        found.append(row)
        try:
            step, plan = _step(case, device)
            row |= plan
            if step is not None:
                step()  # first touch of memory, and the first that asks for all of it
                timers[number], row["notes"] = rounds.timer(step, device.platform)
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            row |= refusals.of_error(error)
    samples: dict[int, list[float]] = {number: [] for number in timers}
    for number, time in rounds.samples(timers, seconds=seconds):
        samples[number].append(time)
    for number, times in samples.items():
        found[number] |= {
            "time": statistics.median(times),
            "time_std": statistics.stdev(times),
            "runs": len(times),
        }
    return found


def _step(case: Case, device: Any) -> tuple[Callable[[], Any] | None, dict[str, Any]]:
    """The compiled call on random arrays (None: too large to run), and its plan."""
    fn, shapes = build(case)
    program, plan = plans.compiled(fn, shapes, device)
    refusal = plans.too_large(plan["memory_bytes"], device)
    if refusal:
        return None, {**plan, **refusal}
    given = inputs.random_like(shapes)
    return lambda: jax.block_until_ready(program(*given)), {**plan, "status": rows.OK}
