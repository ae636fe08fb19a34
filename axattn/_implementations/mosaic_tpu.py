"""``"mosaic_tpu"``: the Pallas kernels for TPUs, and the calls that they take."""

from __future__ import annotations

import functools

import jax

from axattn import _jax_compat
from axattn._call import AttentionCall
from axattn._implementations import mosaic
from axattn._implementations.chunked.backward import Gradients
from axattn._jax_compat import TpuChip, find_varying_axes, vary_over
from axattn.kernels import _backward_inputs
from axattn.kernels._batching import merge_vmapped_calls

MAX_HEAD_DIM = 256

# TPU v4 and later.
FIRST_GENERATION = 4


# The device that it needs, for errors.
NEEDS = "a TPU (v4 or later)"


def find_refusal(call: AttentionCall) -> str | None:
    """Say why this call cannot go to the kernels on any TPU that the program may be lowered for."""
    # VMEM is checked when the kind of TPU is known.
    return find_call_refusal(call) or (find_device_refusal(call) if is_device_known() else None)


def find_missing_device() -> str | None:
    """Say what is needed and not here, or None."""
    return None if is_device_known() else mosaic.describe_missing_device(NEEDS)


def find_call_refusal(call: AttentionCall) -> str | None:
    """Say why no device takes the call, or None."""
    return _find_array_refusal(call) or _find_cache_refusal(call)


def _find_array_refusal(call: AttentionCall) -> str | None:
    refusal = mosaic.find_refusal(call, ("bfloat16", "float32"))
    if refusal is not None:
        return refusal
    if call.stored is not None:
        return None
    for name, size in (("head", call.head_dim), ("value head", call.value_head_dim)):
        if size > MAX_HEAD_DIM:
            return f"needs a {name} size of at most {MAX_HEAD_DIM}, got {size}"
    return None


def _find_cache_refusal(call: AttentionCall) -> str | None:
    if call.stored is None:
        return None
    from axattn.kernels._tpu.cached import block_sizes

    return block_sizes.find_cache_refusal(call)


def is_device_known() -> bool:
    """Say whether code is traced for a TPU, whose kind may not be known."""
    return _jax_compat.find_traced_device("tpu") is not None


def find_device_refusal(call: AttentionCall, *, strict: bool = False) -> str | None:
    """Say why the TPU that is traced for refuses the call, or None; ``strict`` is for GPUs."""
    chip = _jax_compat.find_tpu_chip()
    if chip is None or chip.generation < FIRST_GENERATION:
        return f"needs a TPU v4 or later, got {_jax_compat.find_traced_device('tpu')}"
    return _find_memory_refusal(call)


def _find_memory_refusal(call: AttentionCall) -> str | None:
    """Say why VMEM does not hold the smallest blocks, which still have all heads of a group."""
    if call.stored is not None:
        return None
    from axattn.kernels._tpu.flash import block_sizes as flash_block_sizes

    chip = _require_chip()
    needed = flash_block_sizes.find_least_vmem_bytes(call)
    if needed <= chip.vmem_bytes:
        return None
    return f"needs {needed >> 20} MiB of VMEM for its smallest blocks, and {chip.kind} has less"


def _require_chip() -> TpuChip:
    chip = _jax_compat.find_tpu_chip()
    if chip is None:
        raise NotImplementedError(f'implementation "mosaic_tpu" needs {NEEDS}')
    return chip


def forward(call: AttentionCall, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return output ``[B, T, N, h]`` in the query's dtype and LSE ``[B, T, N]``, float32."""
    results = merge_vmapped_calls(functools.partial(_forward_batch, interpret=interpret))(call)
    return vary_over(results, find_varying_axes(*jax.tree.leaves(call)))


def _forward_batch(call: AttentionCall, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    chip = _require_chip()
    mode = _jax_compat.make_tpu_interpreter(chip.cores) if interpret else False
    if call.stored is None:
        from axattn.kernels._tpu.flash import block_sizes as flash_block_sizes
        from axattn.kernels._tpu.flash.forward import forward as kernel

        sizes = flash_block_sizes.choose_forward_block_sizes(call, chip)
        return kernel(call, sizes, interpret=mode)
    from axattn.kernels._tpu.cached import block_sizes
    from axattn.kernels._tpu.cached.kernel import attend_over_cache

    cached_sizes = block_sizes.choose_block_sizes(call, chip.vmem_bytes)
    return attend_over_cache(call, cached_sizes, cores=chip.cores, interpret=mode)


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
    given = (out, lse, dout, dlse)
    delta = _backward_inputs.compute_delta(out, dout, dlse)
    kernels = merge_vmapped_calls(functools.partial(_backward_batch, interpret=interpret))
    results = kernels(call, lse, dout, delta)
    axes = find_varying_axes(*jax.tree.leaves((call, given)))
    dquery, dkey, dvalue = vary_over(results, axes)
    dsinks = _backward_inputs.compute_sinks_gradient(call, lse, delta)
    dbias = mosaic.compute_bias_gradient(call, "tpu", given, whole)
    return Gradients(dquery, dkey, dvalue, dbias, dsinks, None)


def _backward_batch(call: AttentionCall, lse, dout, delta, *, interpret: bool):
    from axattn.kernels._tpu.flash import block_sizes as flash_block_sizes
    from axattn.kernels._tpu.flash.backward import backward as kernels

    chip = _require_chip()
    mode = _jax_compat.make_tpu_interpreter(chip.cores) if interpret else False
    given = _backward_inputs.make_backward_inputs(call, lse, dout, delta)
    sizes = flash_block_sizes.choose_backward_block_sizes(call, chip)
    return kernels(call, sizes, given, interpret=mode)
