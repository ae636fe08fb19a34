"""Which axes of a mesh share out what of an attention call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

Names = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of mesh axes; None or () where nothing is shared out.

    Attributes:
      batch: of the rows of the batch: a name, or a tuple of them.
      heads: of the query heads, and of the key/value heads as far as these go; likewise.
      sequence: of the tokens, of queries and of keys: context parallelism. One axis.

    Raises:
      TypeError: anything but names, more than one for ``sequence``.
      ValueError: one axis for two things.

    Example:
      >>> import jax
      >>> from axattn import parallel
      >>> axes = parallel.Axes(batch=("data", "fsdp"), heads="model", sequence="context")
      >>> sizes = dict(data=2, fsdp=4, model=8, context=16)
      >>> mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
      >>> axes.check(mesh)
      >>> axes.size(mesh, "batch"), axes.size(mesh, "sequence")
      (8, 16)
    """

    batch: Names = None
    heads: Names = None
    sequence: str | None = None

    def __post_init__(self):
        if not isinstance(self.sequence, str | None):
            raise TypeError(f"sequence takes the name of one mesh axis, got {self.sequence!r}")
        for what in ("batch", "heads"):  # hashable
            if isinstance(getattr(self, what), list):
                object.__setattr__(self, what, tuple(getattr(self, what)))
        used = [*names_of("batch", self.batch), *names_of("heads", self.heads)]
        used += names_of("sequence", self.sequence)
        twice = sorted({name for name in used if used.count(name) > 1})
        if twice:
            raise ValueError(f"an axis shares out one thing; used more than once: {twice}")

    def size(self, mesh: Any, what: str) -> int:
        """Into how many parts something is cut.

        Args:
          mesh: a ``jax.sharding.Mesh`` or ``AbstractMesh``.
          what: "batch", "heads" or "sequence".

        Raises:
          KeyError: an axis that the mesh does not have; `check` says it by name.
        """
        return math.prod(mesh.shape[name] for name in names_of(what, getattr(self, what)))

    def check(self, mesh: Any) -> None:
        """Checks that the mesh has all these axes.

        Args:
          mesh: a ``jax.sharding.Mesh`` or ``AbstractMesh``.

        Raises:
          ValueError: an axis that it does not have.
        """
        for what in ("batch", "heads", "sequence"):
            for name in names_of(what, getattr(self, what)):
                if name not in mesh.shape:
                    raise ValueError(
                        f"{what} takes axes of the mesh, {tuple(mesh.shape)}, got {name!r}"
                    )


def names_of(what: str, names: Names) -> tuple[str, ...]:
    """As a tuple."""
    names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} takes names of mesh axes, got {names!r}")
    return names


def mesh_or_current(mesh: Any) -> Any:
    """``mesh``, or that of the context; ValueError where there is none."""
    found = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if not found.axis_names:
        raise ValueError("mesh takes a Mesh where none is set (jax.set_mesh), got None")
    return found
