from __future__ import annotations

import sys

import pytest

from benchmarks.harness import plotting


def figure_of(monkeypatch, tmp_path, results, environment):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    path = tmp_path / "plot.png"
    plotting.plot(path, results, environment)
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return figure


def test_time_and_memory_by_length(monkeypatch, tmp_path, results, environment):
    figure = figure_of(monkeypatch, tmp_path, results, environment)
    time_here, _, memory_here, memory_v5p = figure.axes
    assert time_here.get_ylabel() == "time"
    assert memory_here.get_ylabel() == "host memory"
    assert memory_v5p.get_ylabel() == "HBM"
    lines = {line.get_label(): line for line in memory_here.get_lines()}
    assert lines["xla"].get_xdata().tolist() == [16, 64]
    assert lines["xla"].get_ydata().tolist() == [16 * 2**20, 64 * 2**20]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["repeat_kv", "xla"]
    # The refusal for want of memory is there.
    assert [256.0, 98 * 2**30] in [line.get_xydata()[0].tolist() for line in memory_v5p.get_lines()]
    assert "run on Some CPU; compiled for v5p, not run" in figure.get_suptitle()


def test_without_times_there_is_no_time(monkeypatch, tmp_path, results, environment):
    compiled = [row for row in results if row.where == "v5p"]
    figure = figure_of(monkeypatch, tmp_path, compiled, environment)
    assert [axis.get_ylabel() for axis in figure.axes] == ["HBM"]


def test_refusals_alone(monkeypatch, tmp_path, results, environment):
    figure_of(monkeypatch, tmp_path, results[-2:], environment)


@pytest.mark.parametrize("path", ["plot.jpg", "no/such/folder/plot.png"])
def test_bad_paths(path):
    with pytest.raises(ValueError, match="--plot"):
        plotting.check_path(path)


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"--plot: .*pip install -e '\.\[plot\]'"):
        plotting.check_path(str(tmp_path / "plot.png"))
