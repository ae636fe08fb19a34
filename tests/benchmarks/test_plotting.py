from __future__ import annotations

import sys

import pytest

from benchmarks.harness import plotting


def test_time_and_memory_by_length(monkeypatch, tmp_path, results, environment):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    path = tmp_path / "plot.png"
    plotting.plot(path, results, environment)
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_visible()]
    assert (labels[0], labels[-2:]) == ("time", ["host memory", "HBM"])
    lines = {line.get_label(): line for line in figure.axes[2].get_lines()}
    assert lines["xla"].get_xydata().tolist() == [[16, 16 * 2**20], [64, 64 * 2**20]]
    assert "run on Some CPU; compiled for v5p, not run" in figure.get_suptitle()


def test_bad_paths(monkeypatch, tmp_path):
    for path in ("plot.jpg", "no/such/folder/plot.png"):
        with pytest.raises(ValueError, match="--plot"):
            plotting.check_path(path)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"--plot: .*pip install -e '\.\[plot\]'"):
        plotting.check_path(str(tmp_path / "plot.png"))
