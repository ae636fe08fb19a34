"""``"mosaic_gpu"``: the Pallas kernels for Hopper GPUs, and the calls that they take."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp

from axattn import _jax_compat
from axattn._jax_compat import vary_over, varying_axes
from axattn.call import AttentionCall
from axattn.implementations import blocks, chunked_backward
from axattn.implementations.chunked_backward import Gradients
from axattn.mask_parts import Dense, Segments

MAX_HEAD_DIM = 256


def refuses(call: AttentionCall) -> str | None:
    """Why this call cannot go to the kernels, or None."""
    return call_refusal(call) or _device_refusal()


def call_refusal(call: AttentionCall) -> str | None:
    """The same on any device."""
    if call.query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"needs float16 or bfloat16, got {call.query.dtype}"
    for name, size in (("head", call.head_dim), ("value head", call.value_head_dim)):
        if size % 16 or size > MAX_HEAD_DIM:
            return f"needs a {name} size that is a multiple of 16 and at most 256, got {size}"
    if call.stored is not None:
        return "does not support a cache"
    if 0 in (call.batch, call.q_len, call.kv_len):
        return "does not support arrays of no elements"
    if call.traced_scale is not None:
        return "does not support a traced scale"
    kinds = collections.Counter(type(part) for part in call.mask.parts)
    if kinds[Segments] > 1:
        return "does not support two pairs of segment ids"
    for part in call.mask.parts:
        whole = (call.q_len, call.kv_len)
        if isinstance(part, Dense) and part.array.shape[1] > 1 and part.array.shape[2:] != whole:
            return "does not support a mask array per head that broadcasts along T or S"
    return None


def _device_refusal() -> str | None:
    if jax.__version_info__ < (0, 11):
        return f"needs jax >= 0.11 (Python >= 3.12), got jax {jax.__version__}"
    capability = _jax_compat.gpu_capability()
    if capability is None:
        return "needs a Hopper GPU (H100, H200), and none is attached"
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), got {capability}"
    version = _jax_compat.cuda_runtime_version()
    if version is not None and 12080 <= version < 12091:
        return f"needs CUDA before 12.8 or from 12.9.1 (a ptxas miscompiles masks), got {version}"
    return None


def forward(call: AttentionCall, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, N, h]`` in the query's dtype, LSE ``[B, T, N]`` float32."""
    from axattn.kernels.hopper import operands, tiles
    from axattn.kernels.hopper.forward import forward as kernel
    from axattn.kernels.hopper.problem import Problem

    problem = Problem.of(call, interpret=interpret)
    results = kernel(problem, operands.of(call), tiles.forward_tiles(call))
    return vary_over(results, varying_axes(*jax.tree.leaves(call)))


def backward(
    call: AttentionCall,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    interpret: bool = False,
) -> Gradients:
    """Gradients from kernels; that of a bias from the chunked sweep, which XLA drops if unused."""
    from axattn.kernels.hopper import tiles
    from axattn.kernels.hopper.backward import backward as kernels

    given = (out, lse, dout, dlse)
    results = kernels(call, tiles.backward_tiles(call), *given, interpret=interpret)
    axes = varying_axes(*jax.tree.leaves((call, given)))
    dquery, dkey, dvalue, dsinks = vary_over(results, axes)
    dbias = None
    if call.bias is not None:
        cut = blocks.choose(call, "cuda")
        dbias = chunked_backward.backward(call, cut, *given).bias
    return Gradients(dquery, dkey, dvalue, dbias, dsinks, None)
