from __future__ import annotations

import json

import pytest

from axattn.kernels._hopper.block_sizes import ForwardBlockSizes, KeyGradBlockSizes
from benchmarks.harness import tile_table
from benchmarks.harness.tile_candidates import Place

FORWARD = Place("forward", "masked", 128, 128)
KEY_GRAD = Place("key_grad", "full", 64, 64)


def table():
    rows = [
        tile_table.row(FORWARD, ForwardBlockSizes(64, 2), how="compiled"),
        tile_table.row(KEY_GRAD, KeyGradBlockSizes(64, 2, split=True), how="compiled"),
    ]
    empty = {"provenance": {}, "rows": []}
    return tile_table.merged(empty, rows, "monday", {"device": None})


def test_rows_hold_what_is_not_the_default():
    forward, key_grad = table()["rows"]
    assert forward["block_sizes"] == {"block_kv": 64, "stages": 2}
    assert key_grad["block_sizes"] == {"block_q": 64, "stages": 2, "split": True}
    assert forward["run"] == "monday" and forward["how"] == "compiled"


def test_a_partial_run_leaves_the_others_alone():
    new = tile_table.row(FORWARD, ForwardBlockSizes(128, 2), how="measured", microseconds=9.5)
    merged = tile_table.merged(table(), [new], "tuesday", {"device": "a GPU"})
    forward, key_grad = merged["rows"]
    assert forward["block_sizes"]["block_kv"] == 128 and forward["microseconds"] == 9.5
    assert (forward["run"], key_grad["run"]) == ("tuesday", "monday")
    assert merged["provenance"] == {"monday": {"device": None}, "tuesday": {"device": "a GPU"}}


def test_a_run_without_rows_is_forgotten():
    rows = [{**row, "how": "measured"} for row in table()["rows"]]
    merged = tile_table.merged(table(), rows, "tuesday", {})
    assert list(merged["provenance"]) == ["tuesday"]


def test_provenance_from_before_runs_had_names_stays_with_its_rows():
    old = table()
    for row in old["rows"]:
        del row["run"]
    old["provenance"] = {"how": "provisional"}
    new = tile_table.row(FORWARD, ForwardBlockSizes(128, 2), how="compiled")
    assert tile_table.merged(old, [new], "tuesday", {})["provenance"]["how"] == "provisional"


def test_rows_are_in_order_and_unknown_kinds_are_dropped():
    old = table()
    old["rows"].append({**old["rows"][0], "kind": "a kind of yesterday"})
    wide = tile_table.row(Place("forward", "full", 256, 256), ForwardBlockSizes(64, 2))
    merged = tile_table.merged(old, [wide], "tuesday", {})
    kinds = [(row["kernel"], row["kind"]) for row in merged["rows"]]
    assert kinds == [("forward", "full"), ("forward", "masked"), ("key_grad", "full")]


def test_written_is_read(tmp_path):
    path = tmp_path / "block_sizes.json"
    tile_table.write(table(), path)
    assert tile_table.read(path) == table()
    # A line for each row.
    assert sum('"kernel"' in line for line in path.read_text().splitlines()) == 2


def test_the_librarys_table_is_read():
    rows = tile_table.read()["rows"]
    assert rows and json.dumps(rows)
    assert {"kernel", "kind", "head_dim", "value_head_dim", "block_sizes"} <= set(rows[0])


def test_the_tiles_of_the_library():
    assert isinstance(tile_table.tiles_of(FORWARD), ForwardBlockSizes)
    with pytest.raises(ValueError, match="got forward masked 100"):
        tile_table.tiles_of(Place("forward", "masked", 100, 100))
