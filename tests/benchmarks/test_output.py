from __future__ import annotations

import csv
import dataclasses
import json

import pytest

from benchmarks.harness import output, rows


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_round_trip(tmp_path, results, environment, suffix):
    path = output.check_path(str(tmp_path / f"out{suffix}"))
    output.write(path, results, environment)
    read, provenance = output.read(path)
    assert provenance == environment.to_dict()
    assert read[0].name == "MQABenchmark/64/4/2/16"

    def one_line(row):
        return dataclasses.replace(row, reason=" ".join((row.reason or "").split()) or None)

    assert [one_line(row) for row in read] == [one_line(row) for row in results]
    if suffix == ".csv":
        lines = path.read_text().splitlines()
        assert len(lines) == 2 + len(results)
        assert lines[0].startswith("# {") and next(csv.reader(lines[1:]))[0] == "name"
    else:
        found = json.loads(path.read_text())["environment"]
        assert found["versions"]["jax"] == "0.10.2" and found["load"] == [0.25, 0.5, 1.0]


def test_header(environment):
    assert "2 cores, 16 GiB, load 0.25 0.50 1.00; Python" in environment.header()


def test_markdown(tmp_path, results, environment):
    path = tmp_path / "out.md"
    output.write(path, results, environment)
    text = path.read_text()
    assert environment.command in text and environment.date in text and "jax 0.10.2" in text
    here, target = text.split("Compiled for v5p")
    assert "Host memory" in here and "HBM" not in here
    assert "| HBM |" in target
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == len(results) + 4  # a header and a rule for either place
    (refused,) = [line for line in tables if "/256 | repeat_kv" in line]
    assert 'out of memory (hbm): 98 "GiB" requested' in refused
    (unsupported,) = [line for line in tables if "cudnn" in line]
    assert "unsupported: needs \\| bfloat16" in unsupported
    widths = {len(line.replace("\\|", "").split("|")) for line in here.splitlines() if "|" in line}
    assert len(widths) == 1


def test_markdown_has_the_published_figures(tmp_path, make_row, environment):
    path = tmp_path / "out.md"
    output.write(path, [make_row("4096/16/2/8192", where="v5p", memory_bytes=2**28)], environment)
    assert "869 -> 860 ms" in path.read_text()


def test_bad_paths():
    for path in ("out.xml", "out", "no/such/folder/out.json"):
        with pytest.raises(ValueError, match="--output"):
            output.check_path(path)


def test_columns_of_accelerators_show_both_memories(environment):
    tpu = dataclasses.replace(environment, platform="tpu")
    headers = [column.header for column in output.columns("here", tpu)]
    assert "HBM" in headers and "HBM peak" in headers
    headers = [column.header for column in output.columns("cpu", tpu)]
    assert not any("HBM" in header for header in headers)
    headers = [column.header for column in output.columns("here", environment)]
    assert not any("HBM" in header for header in headers)


def test_status_names():
    # Files name them; renaming one is a change of format.
    assert (rows.OK, rows.OUT_OF_MEMORY, rows.UNSUPPORTED, rows.FAILED) == (
        "ok",
        "out_of_memory",
        "unsupported",
        "failed",
    )
