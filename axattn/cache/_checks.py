"""Checks of the arguments of caches, also while tracing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from axattn import _jax_compat
from axattn._typing import Array

_jax_compat.make_debug_error()  # registers the error: exported programs may have one


def is_concrete(*arrays: Any) -> bool:
    """Return whether this process can read the numbers: not while tracing, nor on other hosts."""
    return not any(isinstance(x, jax.core.Tracer) or _lacks_values(x) for x in arrays)


def _lacks_values(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return isinstance(x, jax.ShapeDtypeStruct)
    return not (x.is_fully_addressable or x.is_fully_replicated)


def move_to_host(*arrays: Any) -> tuple[Any, ...]:
    """Convert the arrays to numpy if all are concrete."""
    return tuple(map(np.asarray, arrays)) if is_concrete(*arrays) else arrays


def convert_to_array(name: str, x: Any) -> Array:
    """Convert ``x`` to a JAX array; TypeError with its name if that fails."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} takes an array, got {type(x).__name__}") from error


def check_counts(name: str, counts: Any, batch: int, at_most: int | None = None) -> Array:
    """Return counts as int32 ``[B]``, 0 to ``at_most``; as numpy if concrete.

    Raises:
      TypeError: anything but integers.
      ValueError: another shape, or numbers out of range where this can be known.
    """
    takes = f"int or int [B] = [{batch}]" + ("" if at_most is None else f", 0 to {at_most}")
    if is_concrete(counts):
        counts = np.asarray(counts)
    if not np.issubdtype(counts.dtype, np.integer):
        raise TypeError(f"{name} takes {takes}, got dtype {counts.dtype}")
    if counts.shape not in ((), (batch,)):
        raise ValueError(f"{name} takes {takes}, got shape {counts.shape}")
    if not is_concrete(counts):
        clipped = jnp.clip(counts, 0, at_most)
        _jax_compat.check_in_debug((clipped == counts).all(), f"{name} takes {takes}")
        return jnp.broadcast_to(clipped.astype(jnp.int32), (batch,))
    if counts.size and (counts.min() < 0 or (at_most is not None and counts.max() > at_most)):
        raise ValueError(f"{name} takes {takes}, got {counts.tolist()}")
    xp = np if isinstance(batch, int) else jnp  # jnp takes symbolic sizes
    return xp.broadcast_to(counts.astype(np.int32), (batch,))


def check_positive(name: str, count: Any) -> None:
    """Raise ValueError for anything but an integer of at least 1."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise ValueError(f"{name} takes an int >= 1, got {count!r}")
