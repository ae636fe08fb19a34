from __future__ import annotations

import numpy as np
import pytest

from axattn import aot
from axattn.plotting import RooflinePoint, plot_roofline
from tests.plotting.pictures import check_legible

V5P = aot.TARGETS["v5p"]


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_points_stand_on_the_roof_or_where_they_were_measured():
    points = [
        RooflinePoint("prefill", 4e12, 8e9),
        RooflinePoint("decode", 1e9, 5e8, is_lower_bound=True),
        RooflinePoint("xla", 1e12, 1e10, seconds=0.01),
    ]
    ax = plot_roofline(points, target="v5p")
    found = lines(ax)
    assert found["prefill"].get_xydata().tolist() == [[500.0, V5P.peak_bf16_flops]]
    assert found["decode"].get_xydata().tolist() == [[2.0, 2 * V5P.hbm_bandwidth]]
    assert found["xla"].get_xydata().tolist() == [[100.0, 1e14]]
    assert found["prefill"].get_markerfacecolor() == "none"
    assert found["xla"].get_markerfacecolor() == found["xla"].get_color()
    share = 100 * 1e14 / (100 * V5P.hbm_bandwidth)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "459 TFLOP/s (bfloat16), 2.77 TB/s (HBM)",
        "prefill",
        "decode: lower bounds",
        f"xla: {share:.3g} % of the roof",
        "hollow: not measured",
    ]
    check_legible(ax.figure)


def test_the_roof_has_a_ridge_where_both_peaks_meet():
    ax = plot_roofline([], target=V5P, title="A chip")
    x, y = ax.get_lines()[0].get_data()
    ridge = V5P.peak_bf16_flops / V5P.hbm_bandwidth
    np.testing.assert_allclose(y, np.minimum(V5P.peak_bf16_flops, np.array(x) * V5P.hbm_bandwidth))
    assert x[0] < x[1] == ridge < x[2]
    assert ax.get_title() == "A chip"
    check_legible(ax.figure)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["v5e", "v5p", "b200"])
def test_chips_and_many_programs(name):
    points = [
        RooflinePoint(f"{name}, GroupedQueryAttention {i}", 10.0**i * 1e6, 1e9, None, i % 2 > 0)
        for i in range(8)
        for name in ("xla", "xla_chunked")
    ]
    ax = plot_roofline(points, target=name)
    check_legible(ax.figure)
    looks = {
        (line.get_color(), line.get_marker())
        for label, line in lines(ax).items()
        if label.startswith("xla")
    }
    assert len(looks) > 8
    low, high = ax.get_xlim()
    assert all(low < point.intensity < high for point in points)


def test_of_a_report():
    report = aot.Report(
        "v5p", "TPU v5", "f", flops=1e12, bytes_accessed=1e9, cost_is_lower_bound=True
    )
    assert RooflinePoint.from_report("f", report) == RooflinePoint("f", 1e12, 1e9, None, True)
    assert RooflinePoint.from_report("f", report, seconds=2.0).seconds == 2.0


def test_the_former_name_warns():
    report = aot.Report("v5p", "TPU v5", "f", flops=1e12, bytes_accessed=1e9)
    with pytest.warns(DeprecationWarning, match="call RooflinePoint.from_report"):
        point = RooflinePoint.of("f", report, 2.0)
    assert point == RooflinePoint("f", 1e12, 1e9, 2.0)


def test_of_a_compiled_program():
    import jax.numpy as jnp

    x = jnp.ones((64, 64))
    point = RooflinePoint.from_report("product", aot.analyze(jnp.matmul, x, x, target="cpu"))
    assert point.intensity > 0
    check_legible(plot_roofline([point], target="h100").figure)


def test_of_a_refusal():
    refusal = aot.Refusal("out_of_memory", "too much", "hbm", 200 << 30, 95 << 30)
    report = aot.Report("v5p", "TPU v5", "f", refusal=refusal)
    with pytest.raises(ValueError, match="report of 'f' takes a compiled program, got out of mem"):
        RooflinePoint.from_report("f", report)
    with pytest.raises(ValueError, match="flops of 'f' takes a number > 0, got None"):
        RooflinePoint.from_report("f", aot.Report("v5p", "TPU v5", "f"))


@pytest.mark.parametrize(
    "values, name",
    [
        ((0, 1.0), "flops"),
        ((1.0, float("inf")), "bytes_accessed"),
        ((1.0, 1.0, -1.0), "seconds"),
        ((float("nan"), 1.0), "flops"),
    ],
)
def test_bad_numbers(values, name):
    with pytest.raises(ValueError, match=f"{name} of 'p' takes a number > 0, got"):
        RooflinePoint("p", *values)


def test_errors():
    with pytest.raises(ValueError, match="target takes a chip with published peaks .*got 'cpu'"):
        plot_roofline([], target="cpu")
    with pytest.raises(ValueError, match="target='v9' is unknown"):
        plot_roofline([], target="v9")
    with pytest.raises(TypeError, match="points takes RooflinePoint, got float"):
        plot_roofline([1.0], target="v5p")
