from __future__ import annotations

from benchmarks.harness import published, rows
from benchmarks.harness.cases import AXLEARN


def test_figures():
    assert tuple(figure.config for figure in published.FIGURES) == AXLEARN
    lines = published.beside_ours([])
    assert [line[0] for line in lines] == list(AXLEARN)
    assert all(line[3] == "not measured" for line in lines)


def test_ours_state_their_conditions(make_row):
    config = "4096/16/2/8192"
    ours = [
        make_row(config, "repeat_kv", where="v5p", memory_bytes=8 * 2**30),
        make_row(config, "xla", where="v5p", status=rows.OUT_OF_MEMORY, requested_bytes=99 * 2**30),
        make_row(config, "xla_chunked", where="v5p", memory_bytes=300 * 2**20),
        make_row(config, "xla", device="cpu", memory_kind="host", memory_bytes=2**20, time=2.0),
        make_row(config, "xla", direction="decode", where="v5p", memory_bytes=1),
    ]
    last = [line for line in published.beside_ours(ours) if line[3] != "not measured"]
    assert last[0][3:] == (
        "compiled for v5p, batch 1, float32, fwd",
        "repeat_kv 8.00 GiB -> xla 99.00 GiB (refused), xla_chunked 300 MiB",
        "not run",
    )
    assert last[1] == (
        *("", "", ""),
        "run on cpu, batch 1, float32, fwd",
        "xla 1.00 MiB (host)",
        "xla 2.00 s",
    )
    assert all(len(line) == len(published.HEADERS) for line in last)
