"""A kernel where there is no chip for it: in Pallas' interpreter, on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

import axattn
from axattn import _jax_compat
from axattn._implementations import mosaic_tpu
from benchmarks.harness.calls import make_call
from benchmarks.harness.kernel_blocks import traced_on


class Result(NamedTuple):
    """Output ``[B, T, N, h]``, LSE ``[B, T, N]``; where the kernel ran; whether races were seen."""

    out: jax.Array
    lse: jax.Array
    where: str
    races: bool | None


def attend(query: Any, key: Any, value: Any, **options: Any) -> Result:
    """`axattn.dot_product_attention` by a kernel: on the device if it takes the call, else the TPU
    kernel in the interpreter, as on a v5p, with race detection.

    Raises:
      NotImplementedError: the TPU kernel does not take the call either.
    """
    device = jax.devices()[0]
    if axattn.explain_implementations(query, key, value, **options)["mosaic"] is None:
        out, lse = axattn.dot_product_attention(
            query, key, value, implementation="mosaic", return_residual=True, **options
        )
        return Result(out, lse, device.device_kind, None)
    cpu = jax.devices("cpu")[0]
    arrays = jax.device_put((query, key, value), cpu)
    with jax.default_device(cpu), traced_on("v5p"):
        call = make_call(*arrays, **options)
        refusal = mosaic_tpu.find_call_refusal(call)
        if refusal is not None:
            raise NotImplementedError(f'implementation "mosaic_tpu" {refusal}')
        out, lse = jax.jit(lambda call: mosaic_tpu.forward(call, interpret=True))(call)
        jax.block_until_ready((out, lse))
    return Result(out, lse, "the TPU interpreter, on the CPU", _jax_compat.has_tpu_races())
