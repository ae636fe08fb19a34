"""Pictures of masks, attention maps, benchmark results and rooflines, with matplotlib.

Matplotlib comes with the extra ``plot`` (in a checkout, ``pip install -e '.[plot]'``) and is
imported when a function is called, not before. The colors are told apart with any color
vision. Figures are made by ``matplotlib.pyplot``: ``savefig``, ``show`` and
notebooks work as ever. A notebook shows a ``Figure`` that ends a cell twice; give it a name,
``figure = plot_curves(...)``.
"""

from axattn.plotting._attention import plot_attention, sown_weights
from axattn.plotting._curves import plot_curves
from axattn.plotting._masks import plot_mask
from axattn.plotting._roofline import RooflinePoint, plot_roofline

__all__ = [
    "RooflinePoint",
    "plot_attention",
    "plot_curves",
    "plot_mask",
    "plot_roofline",
    "sown_weights",
]
