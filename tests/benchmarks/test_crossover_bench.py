"""What rows of crossover_bench say, without measuring any."""

from __future__ import annotations

import dataclasses

import pytest
from absl.testing import flagsaver

from benchmarks import crossover_bench
from benchmarks.harness import paired


@pytest.fixture
def wanted():
    """The cases of a command line's flags."""
    if not crossover_bench.flags.FLAGS.is_parsed():
        crossover_bench.flags.FLAGS.mark_as_parsed()

    def make(**flags):
        with flagsaver.flagsaver(**flags):
            return crossover_bench.make_cases()

    return make


def make_row(length, ratio, crossover=1.0, beyond_noise=True, direction="fwd"):
    case = crossover_bench.Case(1, length, 4, 2, 8, "float32", direction)
    return crossover_bench.Row(
        **dataclasses.asdict(case), scores=case.scores, chosen="xla", default=1.0, xla=1.0,
        xla_chunked=1.0, repeat_kv=1.0, jax_nn=1.0, crossover=crossover, crossover_is_noise=False,
        best="jax_nn", ratio=ratio, ratio_is_noise=False, is_slower=ratio > 1.05,
        is_slower_beyond_noise=beyond_noise, rounds=9,
    )  # fmt: skip


def test_the_grid_is_short_and_whole(wanted):
    few = wanted()
    assert 40 <= len(few) <= 60
    for field, values in {
        "batch": {1, 2, 4, 8},
        "length": {64, 128, 256, 512, 1024},
        "head_dim": {16, 32, 64, 128},
        "dtype": {"float32", "bfloat16"},
        "direction": {"fwd", "fwd+bwd"},
    }.items():
        assert {getattr(case, field) for case in few} == values
    assert {(case.heads, case.kv_heads) for case in few} >= {(4, 1), (16, 2), (16, 16)}


def test_rows_are_picked_by_flags(wanted):
    picked = dict(batches=["1"], lengths=["8", "16"], heads=["4/2"], head_dims=["8"])
    made = wanted(**picked, dtypes=["float32"], full=True)
    assert [str(case) for case in made] == [
        "1/8/4/2/8/float32/fwd",
        "1/8/4/2/8/float32/fwd+bwd",
        "1/16/4/2/8/float32/fwd",
        "1/16/4/2/8/float32/fwd+bwd",
    ]
    names = ["8/64/16/2/128/bfloat16/fwd+bwd", "1/8/4/2/8/float32/fwd"]
    assert [str(case) for case in wanted(rows=names)] == names[::-1]


def test_summary():
    rows = [make_row(8, 1.04), make_row(16, 1.2), make_row(32, 1.3, beyond_noise=False)]
    lines = crossover_bench.summarize(rows)
    assert "3 rows; " in lines[0] and "over 1.05 in 2, in 1 of them beyond noise" in lines[0]
    assert lines[1] == "worst: 1.30x, 1/32/4/2/8/float32/fwd"
    assert lines[2] == "again: --rows=1/16/4/2/8/float32/fwd,1/32/4/2/8/float32/fwd"
    assert [row.mark for row in rows] == ["", "slower", "slower ~"]
    assert not any(line.startswith("again") for line in crossover_bench.summarize(rows[:1]))


def test_crossing_is_where_chunked_stays_faster():
    rows = [make_row(8, 1, 0.5), make_row(16, 1, 1.5), make_row(32, 1, 0.9), make_row(64, 1, 2.0)]
    assert crossover_bench.find_crossing(rows) == (4 * 32**2, 4 * 64**2)
    assert crossover_bench.find_crossing(rows[:3]) == (4 * 32**2, None)
    assert crossover_bench.find_crossing(rows[1:2]) == (None, 4 * 16**2)


def test_what_is_clear_needs_no_more_rounds():
    def measured(default, rounds=5):
        return paired.Paired(
            {
                "default": (default,) * rounds,
                "repeat_kv": (9.0,) * rounds,
                "jax_nn": (1.0,) * rounds,
            }
        )

    assert crossover_bench.is_clear(measured(0.5)) and crossover_bench.is_clear(measured(2.0))
    assert not crossover_bench.is_clear(measured(1.05))
    assert not crossover_bench.is_clear(measured(0.5, rounds=4))
