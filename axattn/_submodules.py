"""The public modules as attributes of `axattn`, each imported when it is first used."""

from __future__ import annotations

import importlib
import types

NAMES = (
    "aot",
    "cache",
    "checkpoints",
    "huggingface",
    "latent",
    "linen",
    "nnx",
    "parallel",
    "plotting",
    "quantization",
    "rotary",
)


def import_submodule(name: str) -> types.ModuleType:
    """Import ``axattn.name``, for ``__getattr__`` of the package.

    Raises:
      AttributeError: there is no public module of this name, or it needs a package that is not
        installed.
    """
    if name not in NAMES:
        raise AttributeError(f"module 'axattn' has no attribute {name!r}")
    try:
        return importlib.import_module(f"axattn.{name}")
    except ImportError as error:  # so that hasattr() says no where a package is not installed
        raise AttributeError(f"module 'axattn' has no attribute {name!r}: {error}") from error
