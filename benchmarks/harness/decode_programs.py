"""Decode attention of several libraries as compiled programs.

A program is a layout of the inputs, made before the clock runs, and a function of it. What cannot
take a case raises NotImplementedError with the reason; what a library raises by itself is a reason,
too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness import decode_peers
from benchmarks.harness.decode_cases import Case
from benchmarks.harness.decode_inputs import Inputs
from benchmarks.harness.kernel_programs import LOGITS_BYTES


class Program(NamedTuple):
    """``attend(convert(inputs))`` is the output ``[B, T, N, h]``; `attend` is what is timed."""

    convert: Callable[[Inputs], Any]
    attend: Callable[[Any], jax.Array]


def _axattn(case: Case, name: str, **more: Any) -> Program:
    def attend(given: Inputs) -> jax.Array:
        return given.cache.attend(
            given.query, mask=given.mask, implementation=name, **case.options(), **more
        )

    return Program(as_it_is, attend)


def _xla(case: Case, name: str) -> Program:
    needed = 4 * case.batch * case.heads * case.tokens * case.length
    if needed > LOGITS_BYTES:
        raise NotImplementedError(f"its logits take {needed / 2**30:.0f} GiB")
    return _axattn(case, name)


def as_it_is(given: Inputs) -> Inputs:
    return given


def _peer(maker) -> Callable[[Case, str], Program]:
    return lambda case, name: Program(*maker(case, name))


_MAKERS: dict[str, Callable[[Case, str], Program]] = {
    "mosaic_gpu": _axattn,
    "xla_chunked": _axattn,
    "xla": _xla,
    "jax_nn_xla": _peer(decode_peers.jax_nn),
    "jax_nn_cudnn": _peer(decode_peers.jax_nn),
    "pallas_triton": _peer(decode_peers.pallas_triton),
}
IMPLEMENTATIONS = tuple(_MAKERS)


def program(case: Case, implementation: str) -> Program:
    return _MAKERS[implementation](case, implementation)


def reference(case: Case, given: Inputs) -> jax.Array:
    """Plain XLA with the query, and with it all products, in float32."""
    attend = _axattn(case, "xla", precision="highest").attend
    return jax.jit(attend)(given._replace(query=given.query.astype(jnp.float32)))


def plain(case: Case, given: Inputs) -> jax.Array:
    """The same in the precision of the call."""
    return jax.jit(_axattn(case, "xla").attend)(given)
