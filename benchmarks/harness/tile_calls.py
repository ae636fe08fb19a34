"""The Hopper kernels as functions of arrays, with tiles of one's choice: to compile and to time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from axattn import dot_product_attention
from axattn.kernels._hopper.block_sizes import KINDS
from benchmarks.harness.calls import make_call
from benchmarks.harness.tile_candidates import Place

# What each kind is usually: one word more than the kind before it.
TYPICAL = {
    "full": (),
    "masked": ("causal",),
    "capped": ("causal", "soft_cap"),
    "general": ("causal", "dropout"),
    "biased": ("causal", "bias"),
}
# What each kind has to hold besides: everything that `block_sizes.classify_call` lets in.
_ADDED = {
    "full": (),
    "masked": ("causal", "window", "lengths", "segments", "sinks"),
    "capped": ("soft_cap",),
    "general": ("dropout", "slopes"),
    "biased": ("bias32", "mask"),
}
HEAVIEST = {
    kind: sum((_ADDED[one] for one in KINDS[: KINDS.index(kind) + 1]), ()) for kind in KINDS
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the call but for the heads', which the place says."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dtype: str = "bfloat16"


def inputs(
    place: Place, shape: Shape, features: tuple[str, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the place's kernel is given, by name."""

    def struct(*sizes, dtype=shape.dtype):
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))

    batch, length, heads = shape.batch, shape.length, shape.heads
    found = {
        "query": struct(batch, length, heads, place.head_dim),
        "key": struct(batch, length, shape.kv_heads, place.head_dim),
        "value": struct(batch, length, shape.kv_heads, place.value_head_dim),
    }
    if place.kernel != "forward":
        rows = struct(batch, length, heads, dtype="float32")
        out = struct(batch, length, heads, place.value_head_dim)
        found |= {"lse": rows, "dout": out, "delta": rows}
    scores = 1, heads, length, length
    optional = {
        "lengths": ("key_value_seq_lengths", struct(batch, dtype="int32")),
        "segments": ("query_segment_ids", struct(batch, length, dtype="int32")),
        "sinks": ("sinks", struct(heads, dtype="float32")),
        "slopes": ("alibi_slopes", struct(heads, dtype="float32")),
        "bias": ("bias", struct(*scores)),
        "bias32": ("bias", struct(*scores, dtype="float32")),
        "mask": ("mask", struct(*scores, dtype="bool")),
    }
    return found | dict(optional[name] for name in features if name in optional)


def options(features: tuple[str, ...]) -> dict[str, Any]:
    """The call's arguments that are no arrays."""
    values = {
        "causal": {"is_causal": True},
        "window": {"local_window_size": (1024, 0)},
        "soft_cap": {"logits_soft_cap": 50.0},
        "dropout": {"dropout_rate": 0.1},
    }
    found: dict[str, Any] = {}
    for name in features:
        found |= values.get(name, {})
    if "dropout_rate" in found:
        found["dropout_rng"] = jax.random.key(0)
    return found


def attend(arrays: Mapping[str, Any], features: tuple[str, ...], **more: Any) -> Any:
    """`axattn.dot_product_attention` on the same call, by another implementation."""
    given = {k: v for k, v in arrays.items() if k not in ("lse", "dout", "delta")}
    return dot_product_attention(**given, **options(features), **more)


def runner(place: Place, tiles: Any, features: tuple[str, ...]) -> Callable[..., Any]:
    """``fn(**inputs)`` that runs the place's kernel: its output alone, or its gradients."""
    # Imported here: these modules need jax >= 0.11.
    from axattn.kernels._hopper.flash.backward import gather_backward_operands
    from axattn.kernels._hopper.flash.forward import forward
    from axattn.kernels._hopper.flash.key_grad import key_grad
    from axattn.kernels._hopper.flash.query_grad import query_grad
    from axattn.kernels._hopper.operands import gather_operands
    from axattn.kernels._problem import Problem

    def run(lse=None, dout=None, delta=None, **arrays):
        call = make_call(**arrays, **options(features))
        problem = Problem.from_call(call)
        if place.kernel == "forward":
            return (forward(problem, gather_operands(call), tiles)[0],)
        given = gather_backward_operands(call, lse, dout, delta)
        if place.kernel == "query_grad":
            return (query_grad(problem, given, tiles),)
        return key_grad(problem, given, tiles)

    return run
