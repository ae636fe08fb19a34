"""Refusals and gradients that the kernels of both machine families share."""

from __future__ import annotations

import collections

import jax

from axattn import _jax_compat
from axattn._call import AttentionCall
from axattn._implementations.chunked import backward, block_sizes
from axattn._jax_compat import find_auto_axes
from axattn._mask_parts import Dense, Segments


def find_refusal(call: AttentionCall, dtypes: tuple[str, ...]) -> str | None:
    """Say why no kernel takes the call, whatever its sizes; queries are of ``dtypes``."""
    if call.query.dtype.name not in dtypes:
        return f"needs {' or '.join(dtypes)}, got {call.query.dtype}"
    sizes = (call.batch, call.q_len, call.kv_len)
    if not all(isinstance(size, int) for size in sizes):
        return f"needs sizes that are known, got {', '.join(map(str, sizes))}"
    if 0 in sizes:
        return "does not support arrays of no elements"
    if call.traced_scale is not None:
        return "does not support a traced scale"
    auto = find_auto_axes(call.query)
    if auto:
        return (
            f"cannot be cut by XLA's partitioner, which has the mesh axes {', '.join(auto)}: name "
            "them to axattn.parallel.attention, or use jax.shard_map or Explicit axes"
        )
    kinds = collections.Counter(type(part) for part in call.mask.parts)
    if kinds[Segments] > 1:
        return "does not support two pairs of segment ids"
    whole = (call.q_len, call.kv_len)
    for part in call.mask.parts:
        if isinstance(part, Dense) and part.array.shape[1] > 1 and part.array.shape[2:] != whole:
            return "does not support a mask array per head that broadcasts along T or S"
    return None


def describe_missing_device(needed: str) -> str:
    """Say why a call cannot run where the device is another one, or none is known."""
    there = _jax_compat.find_traced_device()
    return f"needs {needed}, " + ("and none is attached" if there is None else f"got {there}")


def compute_bias_gradient(
    call: AttentionCall, platform: str, given: tuple, whole: bool
) -> jax.Array | None:
    """Compute a bias's gradient by the chunked sweep; ``given`` is out, lse, dout, dlse."""
    if call.bias is None:
        return None
    sizes = block_sizes.choose_chunk_sizes(call, platform, backward=True)
    return backward.backward(call, sizes, *given, whole=whole).bias
