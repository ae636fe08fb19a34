"""Checks of what caches are given, and what can be known while tracing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from axattn import _jax_compat
from axattn._typing import Array

_jax_compat.debug_error()  # which exported programs may have, that are read before one is made


def is_concrete(*arrays: Any) -> bool:
    """Whether this process can look at the numbers now: not while tracing, nor on other hosts."""
    return not any(isinstance(x, jax.core.Tracer) or _is_elsewhere(x) for x in arrays)


def _is_elsewhere(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return isinstance(x, jax.ShapeDtypeStruct)
    return not (x.is_fully_addressable or x.is_fully_replicated)


def host(*arrays: Any) -> tuple[Any, ...]:
    """The arrays as numpy where all are concrete, else as they are."""
    return tuple(map(np.asarray, arrays)) if is_concrete(*arrays) else arrays


def as_array(name: str, x: Any) -> Array:
    """``x`` as a JAX array; TypeError by name where it is none."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} takes an array, got {type(x).__name__}") from error


def counts_of(name: str, counts: Any, batch: int, at_most: int | None = None) -> Array:
    """int32 ``[B]`` of at least 0 (and at most ``at_most``), numpy where concrete."""
    takes = f"int or int [B] = [{batch}]" + ("" if at_most is None else f", 0 to {at_most}")
    if is_concrete(counts):
        counts = np.asarray(counts)
    if not np.issubdtype(counts.dtype, np.integer):
        raise TypeError(f"{name} takes {takes}, got dtype {counts.dtype}")
    if counts.shape not in ((), (batch,)):
        raise ValueError(f"{name} takes {takes}, got shape {counts.shape}")
    if not is_concrete(counts):
        kept = jnp.clip(counts, 0, at_most)
        _jax_compat.debug_check((kept == counts).all(), f"{name} takes {takes}")
        return jnp.broadcast_to(kept.astype(jnp.int32), (batch,))
    if counts.size and (counts.min() < 0 or (at_most is not None and counts.max() > at_most)):
        raise ValueError(f"{name} takes {takes}, got {counts.tolist()}")
    xp = np if isinstance(batch, int) else jnp  # which takes a symbolic size
    return xp.broadcast_to(counts.astype(np.int32), (batch,))


def positive(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise ValueError(f"{name} takes an int >= 1, got {count!r}")
