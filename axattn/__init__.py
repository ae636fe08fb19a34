"""axattn: efficient multi-query attention for JAX.

One function computes attention (MHA, GQA, MQA) and never copies a key/value head per query head:
`dot_product_attention`. What queries attend to is an array or a `Mask`, which is data. Flax layers
are in `axattn.linen` and `axattn.nnx`, caches in `axattn.cache`, several devices in
`axattn.parallel`, compilation for devices that are not here in `axattn.aot`; ``import axattn``
itself needs jax and numpy only. ``__version__`` is the version of the library.
"""

from typing import TYPE_CHECKING

from axattn._attention import dot_product_attention, explain_implementations
from axattn._masks import Mask
from axattn._submodules import import_submodule as _import_submodule
from axattn._version import __version__

__all__ = ["Mask", "__version__", "dot_product_attention", "explain_implementations"]

if not TYPE_CHECKING:  # checkers would take any name of this module
    __getattr__ = _import_submodule
