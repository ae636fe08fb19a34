"""Which rows crossover_bench measures, and what they say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from benchmarks.harness import crossover, paired


def make_row(length, ratio, paths=1.0, beyond_noise=True, direction="fwd"):
    case = crossover.Case(1, length, 4, 2, 8, "float32", direction)
    return crossover.Row(
        **dataclasses.asdict(case), chosen="xla", default=1.0, xla=1.0,
        xla_chunked=1.0, repeat_kv=1.0, jax_nn=1.0, crossover=paths, crossover_is_noise=False,
        best="jax_nn", ratio=ratio, ratio_is_noise=False, is_slower=ratio > 1.05,
        is_slower_beyond_noise=beyond_noise, rounds=9,
    )  # fmt: skip


def test_a_grid_has_all_pairs_of_values():
    factors = [1, 8], [64, 1024], [(4, 1), (16, 2), (16, 16)], [16, 128]
    kinds = [("float32", "fwd"), ("bfloat16", "fwd+bwd")]
    few = crossover.choose_cases(*factors, kinds, full=False)
    assert 6 <= len(few) < 16
    rows = [
        (case.batch, case.length, (case.heads, case.kv_heads), case.head_dim,
         (case.dtype, case.direction))
        for case in few
    ]  # fmt: skip
    for first, second in itertools.combinations(range(5), 2):
        found = {(row[first], row[second]) for row in rows}
        assert found == set(itertools.product((*factors, kinds)[first], (*factors, kinds)[second]))
    full = crossover.choose_cases(*factors, kinds, full=True)
    assert len(full) == 48 and set(few) < set(full)


def test_a_case_is_parsed_as_it_is_written():
    case = crossover.Case(8, 64, 16, 2, 128, "bfloat16", "fwd+bwd")
    assert crossover.parse_case(str(case)) == case
    for wrong in ("8/64/16/2/128/bfloat16", "8/0/16/2/128/bfloat16/fwd", "8/64/16/2/128/int8/fwd"):
        with pytest.raises(ValueError, match="B/T/N/K/H/dtype/direction"):
            crossover.parse_case(wrong)


def test_summary():
    rows = [make_row(8, 1.04), make_row(16, 1.2), make_row(32, 1.3, beyond_noise=False)]
    lines = crossover.summarize(rows)
    assert "3 rows; " in lines[0] and "over 1.05 in 2, in 1 of them beyond noise" in lines[0]
    assert lines[1] == "worst: 1.30x, 1/32/4/2/8/float32/fwd"
    assert lines[2] == "again: --rows=1/16/4/2/8/float32/fwd,1/32/4/2/8/float32/fwd"
    assert [row.mark for row in rows] == ["", "slower", "slower ~"]
    assert not any(line.startswith("again") for line in crossover.summarize(rows[:1]))


def test_crossing_is_where_chunked_stays_faster():
    rows = [make_row(8, 1, 0.5), make_row(16, 1, 1.5), make_row(32, 1, 0.9), make_row(64, 1, 2.0)]
    assert crossover.find_crossing(rows) == (4 * 32**2, 4 * 64**2)
    assert crossover.find_crossing(rows[:3]) == (4 * 32**2, None)
    assert crossover.find_crossing(rows[1:2]) == (None, 4 * 16**2)


def test_what_is_clear_needs_no_more_rounds():
    def measured(default, rounds=5):
        return paired.Paired(
            {
                "default": (default,) * rounds,
                "repeat_kv": (9.0,) * rounds,
                "jax_nn": (1.0,) * rounds,
            }
        )

    assert crossover.is_clear(measured(0.5)) and crossover.is_clear(measured(2.0))
    assert not crossover.is_clear(measured(1.05))
    assert not crossover.is_clear(measured(0.5, rounds=4))
