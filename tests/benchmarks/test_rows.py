from __future__ import annotations

from benchmarks.harness import rows


def test_ratios(make_row):
    base = make_row(implementation="repeat_kv", time=3.0, memory_bytes=400)
    mine = make_row(time=1.5, memory_bytes=100)
    row = rows.with_ratios(mine, [base])
    assert (row.speedup, row.memory_ratio) == (2.0, 0.25)
    itself = rows.with_ratios(base, [base])
    assert (itself.speedup, itself.memory_ratio) == (1.0, 1.0)


def test_no_ratio_to_another_question(make_row):
    base = make_row(implementation="repeat_kv", time=3.0, memory_bytes=400)
    for other in (
        make_row(direction="decode", time=1.0, memory_bytes=1),
        make_row("64/4/2/32", time=1.0, memory_bytes=1),
        make_row(where="v5p", time=1.0, memory_bytes=1),
    ):
        row = rows.with_ratios(other, [base])
        assert row.speedup is None and row.memory_ratio is None


def test_no_ratio_without_figures(make_row):
    base = make_row(implementation="repeat_kv", status=rows.OUT_OF_MEMORY)
    row = rows.with_ratios(make_row(time=1.0, memory_bytes=1), [base])
    assert row.speedup is None and row.memory_ratio is None
