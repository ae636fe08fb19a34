"""Reads back what a figure shows."""

from __future__ import annotations

import itertools

import numpy as np


def rendered(figure) -> np.ndarray:
    """RGB in 0 to 1, ``[height, width, 3]``; row 0 is the top."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255


def pixels(ax, shape: tuple[int, int], image: np.ndarray) -> np.ndarray:
    """The colours in the middle of cells, ``[rows, columns, 3]``."""
    y, x = np.indices(shape).reshape(2, -1)
    across, up = ax.transData.transform(np.stack([x, y], -1)).astype(int).T
    return image[image.shape[0] - 1 - up, across].reshape(*shape, 3)


def words(figure) -> list:
    """All text that is drawn."""
    figure.canvas.draw()
    found = [*figure.texts]
    for legend in figure.legends:
        found += legend.get_texts()
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        found += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        found += ax.get_legend().get_texts() if ax.get_legend() else []
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high:
                    found += [tick.label1, tick.label2]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def check_legible(figure) -> None:
    """No text is cut off, and none lies over another."""
    found = words(figure)
    assert found
    width, height = figure.canvas.get_width_height()
    boxes = {text: text.get_window_extent() for text in found}
    for text, box in boxes.items():
        assert text.get_fontsize() >= 8, text
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{text.get_text()!r} is cut off: {box}, of {width} x {height}"
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        up = min(a.y1, b.y1) - max(a.y0, b.y0)
        # Boxes have a rim around the letters.
        assert across < 1 or up < 2, f"{one.get_text()!r} lies over {other.get_text()!r}"
