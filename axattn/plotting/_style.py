"""Colours, markers and dashes of all pictures.

The colours are those of Okabe and Ito, "Color Universal Design" (2008),
https://jfly.uni-koeln.de/color/, which people with any colour vision tell apart. Their yellow is
too pale for lines on white and is left out; a grey is put in. Lines differ in markers and dashes as
well, for those who print in grey.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#666666"
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)

TEXT, RULES = "#444444", "#DDDDDD"  # captions; grids

# A map of numbers to colours whose lightness rises evenly, made for colour-blind readers:
# Nunez, Anderton, Renslow 2018, https://doi.org/10.1371/journal.pone.0199239
SEQUENTIAL = "cividis"

# Masks: blocks, and the elements of partial blocks.
EMPTY, FULL = "#F2F2F2", BLUE
PARTIAL_MASKED, PARTIAL_ATTENDED = "#F5CF9A", VERMILLION


class Style(NamedTuple):
    """The look of a line, in matplotlib's words."""

    color: str
    marker: str
    dash: str


_STYLES = {
    # Implementations. Those with one colour are seldom in one picture.
    "repeat_kv": Style(VERMILLION, "s", "--"),
    "einsum": Style(VERMILLION, "s", "--"),
    "xla": Style(BLUE, "o", "-"),
    "xla_chunked": Style(GREEN, "^", "-"),
    "default": Style(BLACK, "D", ":"),
    "cudnn": Style(ORANGE, "v", "-."),
    "mosaic_gpu": Style(PURPLE, "P", "-"),
    "mosaic_tpu": Style(PURPLE, "X", "-"),
    "mosaic": Style(PURPLE, "P", "-"),
    "jax_nn": Style(SKY, "d", "-."),
    "splash": Style(GREY, "*", ":"),
    # Strategies over several devices.
    "ring": Style(BLUE, "o", "-"),
    "gather": Style(VERMILLION, "s", "--"),
    "ulysses": Style(GREEN, "^", "-."),
    "dealt": Style(PURPLE, "X", "-"),
}
_OTHER_MARKERS = ("<", ">", "p", "*", "d", "h", "8")
_OTHER_DASHES = ("-", "--", ":", "-.")


def choose_styles(names: Iterable[str]) -> dict[str, Style]:
    """Choose a style for each name, all different.

    A name such as ``"xla, naive"`` has the colour of ``"xla"``, and another marker than ``"xla"``.
    Names that are not known take the colours that are left.

    Args:
      names: what the lines of one picture are called.
    """
    names = list(dict.fromkeys(names))
    found: dict[str, Style] = {}
    # Known names first: their look depends on no other name.
    for name in sorted(names, key=lambda name: _find_style(name) is None):
        style = _find_style(name)
        taken = [taken.color for taken in found.values()]
        color = style.color if style else min(COLORS, key=taken.count)
        taken = [taken.marker for taken in found.values()]
        markers = sorted(_OTHER_MARKERS, key=taken.count)
        others = (Style(color, marker, dash) for dash in _OTHER_DASHES for marker in markers)
        if style is None or style in found.values():
            style = next(other for other in others if other not in found.values())
        found[name] = style
    return {name: found[name] for name in names}


def _find_style(name: str) -> Style | None:
    """Return the style of a known implementation or strategy."""
    return _STYLES.get(name.partition(",")[0])
