"""The mesh axes that shard batch, heads and sequence of an attention call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

AxisNames = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes that shard a call; None or () where nothing is sharded.

    Attributes:
      batch: axes of the batch rows: a name, or a tuple of names.
      heads: likewise axes of the query heads. They shard the key/value heads, too, as far as they
        divide them.
      sequence: the axis of the tokens of queries and keys (context parallelism). One name.

    Raises:
      TypeError: anything but names, or more than one for ``sequence``.
      ValueError: an axis is named twice.

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

    batch: AxisNames = None
    heads: AxisNames = None
    sequence: str | None = None

    def __post_init__(self):
        if not isinstance(self.sequence, str | None):
            raise TypeError(f"sequence takes the name of one mesh axis, got {self.sequence!r}")
        for what in ("batch", "heads"):  # hashable
            if isinstance(getattr(self, what), list):
                object.__setattr__(self, what, tuple(getattr(self, what)))
        used = [*list_axis_names("batch", self.batch), *list_axis_names("heads", self.heads)]
        used += list_axis_names("sequence", self.sequence)
        twice = sorted({name for name in used if used.count(name) > 1})
        if twice:
            raise ValueError(f"an axis shares out one thing; used more than once: {twice}")

    def size(self, mesh: Any, what: str) -> int:
        """Return the number of shards of the batch, the heads or the sequence.

        Args:
          mesh: a ``jax.sharding.Mesh`` or ``AbstractMesh``.
          what: "batch", "heads" or "sequence".

        Raises:
          KeyError: an axis that the mesh does not have; see `check`.
        """
        return math.prod(mesh.shape[name] for name in list_axis_names(what, getattr(self, what)))

    def check(self, mesh: Any) -> None:
        """Check that the mesh has all these axes.

        Args:
          mesh: a ``jax.sharding.Mesh`` or ``AbstractMesh``.

        Raises:
          ValueError: an axis that it does not have.
        """
        for what in ("batch", "heads", "sequence"):
            for name in list_axis_names(what, getattr(self, what)):
                if name not in mesh.shape:
                    raise ValueError(
                        f"{what} takes axes of the mesh, {tuple(mesh.shape)}, got {name!r}"
                    )


def list_axis_names(what: str, names: AxisNames) -> tuple[str, ...]:
    """Return the names as a tuple; TypeError for anything but names."""
    names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} takes names of mesh axes, got {names!r}")
    return names


def find_mesh(mesh: Any) -> Any:
    """Return ``mesh``, or by default that of the context; ValueError where there is none."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if not mesh.axis_names:
        raise ValueError("mesh takes a Mesh where none is set (jax.set_mesh), got None")
    return mesh
