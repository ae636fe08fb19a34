from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from axattn.plotting import _style, plot_curves
from axattn.plotting._curves import QUANTITIES
from tests.plotting.pictures import check_legible, words

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"


def rows_of(file):
    document = json.loads((RESULTS / file).read_text("utf-8"))
    tables = document.get("tables", {"": document.get("rows")})
    return [row for rows in tables.values() for row in rows]


def visible(figure):
    return [ax for ax in figure.axes if ax.get_visible()]


def drawn(ax):
    """Data of lines by name; of bars of errors their line."""
    handles, labels = ax.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle.lines[0] if hasattr(handle, "lines") else handle
        found[label] = {tuple(point) for point in line.get_xydata().tolist()}
    return found


def made(**changes):
    return [
        {
            "implementation": name,
            "seq_len": length,
            "where": "here",
            "time": factor * length,
            "memory_bytes": int(1e6 * factor * length),
            "memory_kind": "host",
        }
        | changes
        for name, factor in (("xla", 2e-6), ("xla_chunked", 1e-6))
        for length in (256, 512, 1024)
    ]


@pytest.mark.parametrize(
    "file, field, only",
    [
        ("default-cpu.json", "time", dict(direction="fwd", dtype="float32")),
        ("axlearn-v5p-aot.json", "memory_bytes", dict(direction="fwd+bwd", model_dim=4096)),
        ("layers.json", "roofline", dict(model="length sweep", where="h200")),
    ],
)
def test_lines_are_the_rows_of_the_file(file, field, only):
    figure = plot_curves(RESULTS / file, **only)
    want = {}
    for row in rows_of(file):
        if all(row.get(name) == value for name, value in only.items()) and row.get(field):
            want.setdefault(row["implementation"], set()).add((row["seq_len"], row[field]))
    assert len(want) >= 3
    assert drawn(visible(figure)[0]) == want
    check_legible(figure)


@pytest.mark.ci
@pytest.mark.parametrize(
    "file, options",
    [
        ("default-cpu.json", {}),
        ("axlearn-v5p-aot.json", {}),
        ("layers.json", {}),
        ("layers.json", dict(x="hidden")),
        ("layers.json", dict(table="models", where="v5p", model="llama-3-70b")),
        ("scale.json", dict(x="chips")),
        ("scale-v6e.json", dict(x="chips", title="A million tokens")),
        ("default-cpu.json", dict(quantities=["time", "temp_bytes", "compile_seconds"])),
    ],
)
def test_all_results_are_legible(file, options):
    figure = plot_curves(RESULTS / file, **options)
    assert figure.get_figwidth() <= 9
    check_legible(figure)


def test_time_above_memory():
    figure = plot_curves(made() + made(where="v5p", time=None, memory_kind="HBM"))
    time_here, time_v5p, memory_here, memory_v5p = visible(figure)
    assert [ax.get_title() for ax in (time_here, time_v5p)] == ["run here", "v5p"]
    assert [ax.get_ylabel() for ax in (memory_here, memory_v5p)] == ["host memory", "HBM"]
    assert drawn(time_here)["xla"] == {(n, 2e-6 * n) for n in (256, 512, 1024)}
    # Nothing was run, and no roofline is known.
    assert not drawn(time_v5p) and time_v5p.texts[0].get_text() == "not known"
    looks = _style.choose_styles(["xla", "xla_chunked"])
    lines = memory_here.get_legend_handles_labels()[0]
    assert [(line.get_color(), line.get_marker()) for line in lines] == [
        (look.color, look.marker) for look in looks.values()
    ]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["xla", "xla_chunked"]


def test_the_roofline_stands_for_times_that_were_not_measured():
    rows = made() + made(where="v5p", time=None, roofline=1e-3, cost_is_lower_bound=True)
    measured, bound, *_ = visible(plot_curves(rows))
    assert (measured.get_ylabel(), bound.get_ylabel()) == ("time", "roofline\n(not measured)")
    assert drawn(bound)["xla"] == {(n, 1e-3) for n in (256, 512, 1024)}
    faces = {line.get_markerfacecolor() for line in bound.get_lines()}
    assert "white" in faces
    # Times that are asked for are times.
    strict = visible(plot_curves(rows, quantities=["time"]))
    assert strict[1].texts[0].get_text() == "not measured"


def test_numbers_of_numpy():
    rows = [row | {"seq_len": np.int64(row["seq_len"])} for row in made()]
    (ax,) = visible(plot_curves(rows, quantities="time"))
    assert drawn(ax)["xla"] == {(n, 2e-6 * n) for n in (256, 512, 1024)}


def test_what_is_no_number_is_not_drawn():
    rows = made(time=float("nan"))
    (ax,) = visible(plot_curves(rows, quantities="time"))
    assert not drawn(ax) and ax.texts[0].get_text() == "not measured"
    rows[0]["time"] = 1e-3
    (ax,) = visible(plot_curves(rows, quantities="time"))
    assert drawn(ax) == {"xla": {(256, 1e-3)}}


def test_standard_deviations_are_drawn():
    (bars,) = visible(plot_curves(made(time_stddev=1e-5), quantities=["time"]))[0].containers[:1]
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2e-5)


def test_refusals_are_hollow():
    rows = made() + [
        {"implementation": "xla", "seq_len": 2048, "where": "here", "status": "out_of_memory",
         "requested_bytes": 98 << 30, "available_bytes": 95 << 30},
        {"implementation": "cudnn", "seq_len": 256, "where": "here", "status": "unsupported"},
    ]  # fmt: skip
    figure = plot_curves(rows)
    hollow = [
        line for line in visible(figure)[1].get_lines() if line.get_markerfacecolor() == "none"
    ]
    assert [line.get_xydata()[0].tolist() for line in hollow][0] == [2048, 98 << 30]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["xla", "xla_chunked", "cudnn: refused", "hollow: refused", "memory there is"]
    check_legible(figure)


def test_refusals_without_a_number_are_outside_of_the_axes():
    """Inside they would look like numbers."""
    rows = made() + [
        {"implementation": name, "seq_len": length, "where": "here", "status": "unsupported"}
        for name, lengths in (("cudnn", (128, 256)), ("splash", (512, 2048)))
        for length in lengths
    ]
    figure = plot_curves(rows)
    above, ax = visible(figure)
    figure.canvas.draw()
    hollow = [line for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
    boxes = [line.get_window_extent() for line in hollow]
    frame = ax.get_window_extent()
    # Under the frame, at their size, and over no other and no text.
    assert len(boxes) == 4 and all(box.y1 < frame.y0 for box in boxes)
    centers = [(box.x0 + box.x1) / 2 for box in boxes]
    want = ax.transData.transform([(x, 1) for x in (128, 256, 512, 2048)])[:, 0]
    np.testing.assert_allclose(centers, want, atol=1)
    assert frame.x0 < min(centers) and max(centers) < frame.x1
    texts = [text.get_window_extent() for text in words(figure)]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :] + texts)
    assert above.get_xlim() == ax.get_xlim()
    check_legible(figure)


def test_memory_ran_out_everywhere():
    rows = [
        {
            "implementation": "xla",
            "seq_len": n,
            "status": "out_of_memory",
            "requested_bytes": n << 30,
        }
        for n in (128, 256)
    ]
    figure = plot_curves(rows)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["xla: out of memory", "hollow: refused"]
    check_legible(figure)


def test_refusals_alone():
    rows = [{"implementation": "cudnn", "seq_len": n, "status": "failed"} for n in (16, 32)]
    figure = plot_curves(rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "cudnn: failed",
        "hollow: refused",
    ]
    check_legible(figure)


def test_another_x():
    rows = [row | {"kv_heads": row["seq_len"] // 256} for row in made()]
    rows = [{name: v for name, v in row.items() if name != "seq_len"} for row in rows]
    ax = visible(plot_curves(rows, x="kv_heads"))[1]
    assert ax.get_xlabel() == "key/value heads"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4"]


def test_titles_say_what_differs():
    rows = [
        row | {"kv_heads": heads, "batch": 2, "dtype": "bfloat16"}
        for heads in (1, 8)
        for row in made()
    ]
    figure = plot_curves(rows, title="Heads")
    assert [ax.get_title() for ax in visible(figure)[:2]] == ["KV heads 1", "KV heads 8"]
    assert figure.get_suptitle() == "Heads\nrun here, bfloat16, batch 2"


@pytest.mark.ci
def test_crowded():
    """All there is in one picture: nothing overlaps."""
    names = ["repeat_kv", "einsum", "xla", "xla_chunked", "default", "mosaic_gpu", "mosaic_tpu"]
    rows = [
        {"implementation": name, "seq_len": 2**n, "time": 1e-9 * 4**n, "memory_bytes": 3**n}
        for name in [*names, "jax_nn", "splash", "tokamax", "another implementation"]
        for n in range(6, 21)
    ]
    check_legible(plot_curves(rows, title="A title that is longer than the picture is wide " * 2))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(quantities=["speed"]), "quantities takes time, roofline.* got 'speed'"),
        (dict(x="chips"), "x takes a field with numbers: .* got 'chips'"),
        (dict(where="v4"), "where='v4' leaves no row"),
        (dict(colour="red"), "colour is no field"),
        (dict(results=[]), "results takes rows of implementations, got none"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        plot_curves(**{"results": made()} | options)


def test_quantities_are_documented():
    for name in QUANTITIES:
        assert f'``"{name}"``' in plot_curves.__doc__
