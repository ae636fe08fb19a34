from __future__ import annotations

import itertools

import numpy as np
import pytest

from axattn.plotting import _axes, _style

# Linear RGB as people see it who lack one kind of cone (severity 1.0): Machado, Oliveira and
# Fernandes 2009, https://doi.org/10.1109/TVCG.2009.113, table 1.
VISION = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
# sRGB to XYZ, and the white of D65: IEC 61966-2-1.
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def lab(color, vision):
    """CIELAB of what a viewer sees; distances of 2.3 are just noticeable."""
    rgb = _axes.parse_color(color) if isinstance(color, str) else np.asarray(color)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(VISION[vision] @ linear, 0, 1) / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a, b, vision):
    return np.linalg.norm(lab(a, vision) - lab(b, vision))


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_lines_are_told_apart(vision):
    for a, b in itertools.combinations([*_style.COLORS, "#FFFFFF"], 2):
        assert distance(a, b, vision) > 15, (a, b)


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_masks_are_told_apart(vision):
    colors = [_style.EMPTY, _style.FULL, _style.PARTIAL_MASKED, _style.PARTIAL_ATTENDED]
    for a, b in itertools.combinations(colors, 2):
        assert distance(a, b, vision) > 20, (a, b)


@pytest.mark.parametrize("vision", VISION)
def test_greater_weights_are_lighter(vision):
    import matplotlib

    colors = matplotlib.colormaps[_style.SEQUENTIAL](np.linspace(0, 1, 11))[:, :3]
    lightness = [lab(color, vision)[0] for color in colors]
    assert np.all(np.diff(lightness) > 3)


def test_the_measure_tells():
    """Red and green of equal lightness, which deuteranopes mix up."""
    red, green = "#B36B00", "#8A8A00"
    assert distance(red, green, "all cones") > 20 > 15 > distance(red, green, "deuteranopia")


def test_names_have_styles_of_their_own():
    names = [
        "xla",
        "repeat_kv",
        "einsum",
        "ring",
        "tokamax",
        "other",
        "xla, naive",
        "xla, absorbed",
    ]
    names += [f"unknown {i}" for i in range(40)]
    found = _style.choose_styles(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert found["xla, naive"].color == found["xla"].color
    assert found["tokamax"].color not in {found[name].color for name in ("xla", "repeat_kv")}


def test_a_style_does_not_depend_on_unknown_names():
    alone = _style.choose_styles(["mosaic_tpu"])["mosaic_tpu"]
    assert _style.choose_styles(["a", "b", "c", "d", "mosaic_tpu"])["mosaic_tpu"] == alone
