"""``"mosaic_gpu"``: the Pallas kernels for Hopper GPUs, and the calls that they take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from axattn import _jax_compat, _quantization
from axattn._call import AttentionCall
from axattn._implementations import mosaic
from axattn._implementations.chunked.backward import Gradients
from axattn._jax_compat import find_varying_axes, vary_over

MAX_HEAD_DIM = 256

# Latent attention: 512 features and 64 for positions.
MAX_LATENT_DIM = 576

# 16 tokens of 128 heads. All row tiles read all blocks, and partial results have all rows.
MAX_LATENT_ROWS = 2048

# Calls of up to this many query tokens go to the decode kernels.
DECODE_TOKENS = 16


# The device that it needs, for errors.
NEEDS = "a Hopper GPU (H100, H200)"


def find_refusal(call: AttentionCall) -> str | None:
    """Say why this call cannot go to the kernels on any GPU that the program may be lowered for."""
    return find_call_refusal(call) or find_device_refusal(call)


def find_missing_device() -> str | None:
    """Say what is needed and not here, or None."""
    return None if is_device_known() else mosaic.describe_missing_device(NEEDS)


def find_call_refusal(call: AttentionCall) -> str | None:
    """Say why no device takes the call, or None."""
    return (
        mosaic.find_refusal(call, ("float16", "bfloat16"))
        or _find_head_refusal(call)
        or _find_cache_refusal(call)
    )


def _find_head_refusal(call: AttentionCall) -> str | None:
    if _is_latent(call):
        if call.head_dim % 64 or call.head_dim > MAX_LATENT_DIM or call.value_head_dim % 128:
            return (
                "where keys hold the values needs a head size that is a multiple of 64 and at most "
                f"{MAX_LATENT_DIM}, and a value head size that is a multiple of 128, got "
                f"{call.head_dim} and {call.value_head_dim}"
            )
        rows = call.q_len * call.group
        if rows > MAX_LATENT_ROWS:
            return (
                f"where keys hold the values takes at most {MAX_LATENT_ROWS} query rows (tokens "
                f"times heads of a group), got {rows}"
            )
        return None
    for name, size in (("head", call.head_dim), ("value head", call.value_head_dim)):
        if size % 16 or size > MAX_HEAD_DIM:
            return f"needs a {name} size that is a multiple of 16 and at most 256, got {size}"
    return None


def _find_cache_refusal(call: AttentionCall) -> str | None:
    stored = call.stored
    if stored is None:
        return None
    if not _quantization.is_quantized(stored.dtype):
        if call.query.dtype != stored.dtype:
            return (
                f"needs a query in the dtype of the cache, {stored.dtype}, got {call.query.dtype}"
            )
    elif stored.dtype == "int4":
        return "does not support a cache of int4"
    elif call.query.dtype != jnp.bfloat16:
        return f"needs a bfloat16 query over a quantized cache, got {call.query.dtype}"
    elif call.head_dim % 32 or call.value_head_dim % 32:
        sizes = call.head_dim, call.value_head_dim
        return f"needs head sizes that are multiples of 32 in a quantized cache, got {sizes}"
    if stored.page_size % 8:
        where = "a row" if stored.block_table is None else "a page"
        return f"needs slots of {where} in a multiple of 8, got {stored.page_size}"
    if call.dropout_key is not None and (_is_latent(call) or call.q_len <= DECODE_TOKENS):
        return "does not support dropout over a cache"
    return None


def _is_latent(call: AttentionCall) -> bool:
    """Say whether the values are the first features of the keys."""
    return call.stored is not None and call.stored.arrays.values is None


def choose_kernel(call: AttentionCall) -> str:
    """Choose the forward kernel of the call: "latent", "decode" or "forward"."""
    if _is_latent(call):
        return "latent"
    few = call.q_len <= DECODE_TOKENS and call.dropout_key is None
    return "decode" if few else "forward"


def is_device_known() -> bool:
    """Say whether code is traced for a GPU whose compute capability is known."""
    return _jax_compat.find_gpu_capability() is not None


def find_device_refusal(call: AttentionCall, *, strict: bool = False) -> str | None:
    """Say why the GPU that is traced for does not take the kernels, or None.

    An unknown GPU counts as a Hopper, as in Mosaic GPU, unless ``strict``.
    """
    if jax.__version_info__ < (0, 11):
        return f"needs jax >= 0.11 (Python >= 3.12), got jax {jax.__version__}"
    capability = _jax_compat.find_gpu_capability()
    if capability is None and strict:
        return f"needs {NEEDS}, and the GPU is not known"
    if capability not in (None, "9.0"):
        return f"needs a Hopper GPU (compute capability 9.0), got {capability}"
    version = _jax_compat.read_cuda_runtime_version()
    if version is not None and 12080 <= version < 12091:
        return f"needs CUDA before 12.8 or from 12.9.1 (a ptxas miscompiles masks), got {version}"
    return None


def forward(call: AttentionCall, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    name = choose_kernel(call)
    if name == "forward":
        results = _forward_flash(call, interpret)
    else:
        results = _forward_split_kv(call, name, interpret)
    return vary_over(results, find_varying_axes(*jax.tree.leaves(call)))


def _forward_flash(call: AttentionCall, interpret: bool) -> tuple[jax.Array, jax.Array]:
    from axattn.kernels._hopper.fitting import choose_forward_block_sizes
    from axattn.kernels._hopper.flash.forward import forward as kernel
    from axattn.kernels._hopper.operands import gather_operands
    from axattn.kernels._problem import Problem

    problem = Problem.from_call(call, interpret=interpret)
    return kernel(problem, gather_operands(call), choose_forward_block_sizes(call))


def _forward_split_kv(
    call: AttentionCall, name: str, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    from axattn.kernels._hopper.fitting import choose_decode_block_sizes, choose_mla_block_sizes
    from axattn.kernels._hopper.split_kv.decode import decode
    from axattn.kernels._hopper.split_kv.mla import decode_mla

    options: dict[str, Any] = {"workers": _jax_compat.count_gpu_cores(), "interpret": interpret}
    if name == "latent":
        return decode_mla(call, choose_mla_block_sizes(call), **options)
    return decode(call, choose_decode_block_sizes(call), **options)


def backward(
    call: AttentionCall,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    interpret: bool = False,
    whole: bool = True,
) -> Gradients:
    """Compute gradients by kernels; that of a bias by the chunked sweep."""
    from axattn.kernels._hopper.fitting import choose_backward_block_sizes
    from axattn.kernels._hopper.flash.backward import backward as kernels

    given = (out, lse, dout, dlse)
    results = kernels(call, choose_backward_block_sizes(call), *given, interpret=interpret)
    axes = find_varying_axes(*jax.tree.leaves((call, given)))
    dquery, dkey, dvalue, dsinks = vary_over(results, axes)
    dbias = mosaic.compute_bias_gradient(call, "cuda", given, whole)
    return Gradients(dquery, dkey, dvalue, dbias, dsinks, None)
