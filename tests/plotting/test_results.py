from __future__ import annotations

import json

import pytest

from axattn.plotting import _results


def row(implementation="xla", **fields):
    return {"implementation": implementation, "seq_len": 16} | fields


def test_what_can_be_read(tmp_path):
    rows = [row(), row("cudnn", seq_len=32)]
    document = {"environment": {"date": "2026"}, "rows": rows}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document), "utf-8")
    assert _results.read_rows(path) == _results.read_rows(str(path)) == _results.read_rows(document)
    assert _results.read_rows(document) == (rows, {"date": "2026"})
    assert _results.read_rows(rows) == (rows, None)


def test_tables_and_their_summaries():
    tables = {"models": [row()], "best": [{"best": "xla"}], "layer": [{"strategy": "ring"}]}
    found, _ = _results.read_rows({"tables": tables, "environment": {}})
    assert found == [row(table="models"), {"strategy": "ring", "table": "layer"}]


@pytest.mark.parametrize("given", [3, [1], "rows"])
def test_what_cannot_be_read(given):
    with pytest.raises((TypeError, FileNotFoundError)):
        _results.read_rows(given)


def test_another_document():
    with pytest.raises(ValueError, match="results takes the path .* got a document with a, b"):
        _results.read_rows({"a": 1, "b": 2})


def test_names_of_lines():
    assert _results.name_line(row("xla", form="absorbed")) == "xla, absorbed"
    assert _results.name_line(row(heads_at_once=False, fused_qkv=True)) == (
        "xla, head by head, one QKV product"
    )
    assert _results.name_line({"strategy": "ring"}) == "ring"
    assert _results.name_line({"best": "xla"}) is None


def test_only():
    rows = [row(where="here"), row(where="v5p"), row(where="h200")]
    assert _results.filter_rows(rows, {"where": "v5p"}) == rows[1:2]
    assert _results.filter_rows(rows, {"where": ["v5p", "h200"], "seq_len": 16}) == rows[1:]
    with pytest.raises(ValueError, match="where='v4' leaves no row; it is 'here', 'v5p', 'h200'"):
        _results.filter_rows(rows, {"where": "v4"})
    with pytest.raises(ValueError, match="place is no field of the rows; they have implementation"):
        _results.filter_rows(rows, {"place": "here"})


def test_panels_have_one_case_each():
    rows = [
        row(implementation, seq_len=length, where=where, heads=8)
        for where in ("here", "v5p")
        for implementation in ("xla", "cudnn")
        for length in (16, 32)
    ]
    groups = _results.group_panels(rows, "seq_len")
    assert list(groups.values()) == [rows[:4], rows[4:]]
    assert _results.make_titles(list(groups)) == (
        ["run\N{NO-BREAK SPACE}here", "v5p"],
        "heads\N{NO-BREAK SPACE}8",
    )


def test_single_sizes_give_way():
    rows = [row(seq_len=16, batch=1), row(seq_len=32, batch=1), row(seq_len=16, batch=8)]
    assert list(_results.group_panels(rows, "seq_len").values()) == [rows[:2]]
    assert list(_results.group_panels(rows[2:], "seq_len").values()) == [rows[2:]]


def test_heads_grow_with_the_hidden_size():
    rows = [row(hidden=128 * n, heads=n, kv_heads=n) for n in (4, 8, 16)]
    assert list(_results.group_panels(rows, "hidden").values()) == [rows]


@pytest.mark.parametrize("x", ["implementation", "nothing", "flag", "zero"])
def test_x_is_a_number(x):
    with pytest.raises(ValueError, match=f"x takes a field with numbers: seq_len.*; got '{x}'"):
        _results.group_panels([row(flag=True, zero=0)], x)


def test_wrapped_lines_break_between_items():
    (_, _), common = _results.make_titles([(("kv_heads", 2), ("batch", 8))] * 2)
    assert _results.wrap_text(common, 14) == ["batch 8,", "KV heads 2"]


def test_caption():
    environment = {
        "platform": "cpu", "cpu": "A CPU", "device": "cpu", "date": "2026-01-02T03:04",
        "versions": {"jax": "0.10.2"},
    }  # fmt: skip
    rows = [row(where="here"), row(where="v5p"), row(where="h200")]
    tail = "jax 0.10.2; 2026-01-02"
    assert _results.make_caption(rows, environment) == (
        f"run on A CPU; compiled for v5p, h200, not run; {tail}"
    )
    tpu = environment | {"platform": "tpu", "device": "TPU v5p"}
    assert _results.make_caption(rows[:1], tpu) == f"run on TPU v5p; {tail}"
    assert _results.make_caption(rows, None) == ""
