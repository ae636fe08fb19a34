from __future__ import annotations

import io

from rich.console import Console

from benchmarks.harness import rows, tables


def printed(columns, results, width=40):
    console = Console(file=io.StringIO(), width=width)
    stream = tables.Stream(console, columns)
    stream.header()
    for row in results:
        stream.row(row)
    return console.file.getvalue().splitlines()


def test_nothing_is_cut_off_in_a_narrow_terminal(results):
    header, rule, *lines = printed(tables.columns_here("cpu"), results[:4])
    assert header.split() == (
        "Benchmark Implementation Batch dtype Direction Time +- CPU Iterations Host memory Temp "
        "Compile Speed-up".split()
    )
    assert len(rule) >= len(header)
    assert lines[1].split() == (
        "MQABenchmark/64/4/2/16 xla * 1 float32 fwd 16.0 ms 1% 2.00 ms 5x7 16.00 MiB 1.00 MiB "
        "500 ms 2.00x".split()
    )
    assert len(lines) == 4


def test_target(results):
    header, _, *lines = printed(tables.columns_target(), [r for r in results if r.where == "v5p"])
    assert "HBM ratio" in header
    assert lines[1].split()[6:] == "16.00 MiB 1.00 MiB 0.50x >1.00 G >2.50 MB 500 ms".split()


def test_reason(make_row):
    row = make_row(status=rows.OUT_OF_MEMORY, reason="out of memory (hbm): 3 of 2\nand so on")
    assert tables.reason(row) == "out of memory (hbm): 3 of 2"
    assert tables.reason(make_row(status=rows.FAILED, reason="")) == "failed: no reason given"
    assert len(tables.reason(make_row(status=rows.FAILED, reason="x" * 1000))) == 240
