"""Attention of several libraries as compiled programs: forward, backward, and both.

An implementation is a function of (query, key, value, extras) for a case. What cannot take the case
raises NotImplementedError with the reason; what a library raises by itself is a reason, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import axattn
from benchmarks.harness.kernel_cases import Case

# Full logits beyond this are not worth waiting for: float32, one of the several copies there are.
LOGITS_BYTES = 4 << 30

Attend = Callable[..., jax.Array]


def _axattn(case: Case, name: str, **more: Any) -> Attend:
    def attend(query, key, value, extras):
        given = dict(case.options())
        if "segments" in extras:
            ids = jnp.broadcast_to(extras["segments"], query.shape[:2])
            given |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
        if "sinks" in extras:
            given["sinks"] = extras["sinks"]
        return axattn.dot_product_attention(query, key, value, implementation=name, **given, **more)

    return attend


def _xla(case: Case, name: str) -> Attend:
    _refuse_long(case)
    return _axattn(case, name)


def _refuse_long(case: Case) -> None:
    needed = 4 * case.batch * case.heads * case.length**2
    if needed > LOGITS_BYTES:
        raise NotImplementedError(f"its logits take {needed / 2**30:.0f} GiB")


def _cudnn(case: Case, name: str) -> Attend:
    """``jax.nn.dot_product_attention``; documents as an array, with which it is causal besides."""
    _refuse(case, soft_cap=case.soft_cap is not None, sinks=case.sinks)

    def attend(query, key, value, extras):
        return jax.nn.dot_product_attention(
            query, key, value, mask=_same_document(extras), implementation=name, **case.options()
        )

    return attend


def _tokamax(case: Case, name: str) -> Attend:
    _refuse(case, sinks=case.sinks)
    try:
        import tokamax
    except ImportError as error:
        raise NotImplementedError(f"is not installed ({error}); it is in the extra peers") from None

    def attend(query, key, value, extras):
        options = case.options()
        mask = _same_document(extras)
        if mask is not None:
            options["mask"] = mask
        return tokamax.dot_product_attention(query, key, value, implementation="mosaic", **options)

    return attend


def _refuse(case: Case, **features: bool) -> None:
    for name, present in features.items():
        if present:
            raise NotImplementedError(f"has no {name.replace('_', ' ')}")


def _same_document(extras: dict[str, jax.Array]) -> jax.Array | None:
    """bool [1, 1, T, S], or None without documents."""
    if "segments" not in extras:
        return None
    ids = extras["segments"]
    return (ids[:, :, None] == ids[:, None, :])[:, None]


_MAKERS = {
    "mosaic_gpu": _axattn,
    "cudnn": _cudnn,
    "xla_chunked": _axattn,
    "xla": _xla,
    "tokamax": _tokamax,
}
IMPLEMENTATIONS = tuple(_MAKERS)


def attention(case: Case, implementation: str) -> Attend:
    return _MAKERS[implementation](case, implementation)


def reference(case: Case) -> Attend:
    """The chunked XLA path with all products in float32."""
    return _axattn(case, "xla_chunked", precision="highest")


def plain(case: Case) -> Attend:
    """Attention as one writes it without a library: what errors are measured by.

    K and V repeated, full logits in float32, weights that meet the values in the dtype of the
    inputs, derivatives by JAX. The sum divides the output, as in flash attention: so its gradient
    meets numbers that were rounded, as that of every flash kernel does.
    """
    _refuse_long(case)

    def attend(query, key, value, extras):
        key, value = (jnp.repeat(x, case.heads // case.kv_heads, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
        scores = scores * query.shape[-1] ** -0.5
        if case.soft_cap is not None:
            scores = case.soft_cap * jnp.tanh(scores / case.soft_cap)
        scores = jnp.where(_allowed(case, extras), scores, -jnp.inf)
        if "sinks" in extras:
            sinks = extras["sinks"].astype(jnp.float32)[None, :, None, None]
            sinks = jnp.broadcast_to(sinks, (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, sinks], axis=-1)
        top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - top)
        total = weights.sum(-1).swapaxes(1, 2)[..., None]
        weights = weights[..., : case.length].astype(value.dtype)
        out = jnp.einsum("bnts,bsnh->btnh", weights, value, preferred_element_type=jnp.float32)
        return (out / total).astype(query.dtype)

    return attend


def _allowed(case: Case, extras: dict[str, jax.Array]) -> jax.Array:
    """bool, broadcastable to [B, N, T, S]."""
    options, distance = case.options(), jnp.arange(case.length)
    distance = distance[:, None] - distance[None, :]
    allowed = jnp.ones((1, 1, case.length, case.length), bool)
    if options.get("is_causal"):
        allowed &= distance >= 0
    if options.get("local_window_size") is not None:
        left, right = options["local_window_size"]
        allowed &= (distance <= left) & (distance >= -right)
    same = _same_document(extras)
    return allowed if same is None else allowed & same


class Programs:
    """One implementation's jitted programs for a case, compiled when first called.

    Both directions are the backward program behind the one that keeps its residuals: what is saved
    by compiling them as one is nothing to a kernel, and minutes to whoever waits for compilers.
    """

    def __init__(self, attend: Attend):
        self._forward = jax.jit(attend)
        # Under jit, a VJP comes out as its residuals and is called on another day.
        self._linear = jax.jit(lambda q, k, v, x: jax.vjp(lambda *a: attend(*a, x), q, k, v))
        self._transposed = jax.jit(lambda vjp, dout: vjp(dout))

    def both(self, query, key, value, dout, extras) -> tuple[jax.Array, ...]:
        """The output and the gradients."""
        out, vjp = self._linear(query, key, value, extras)
        return out, *self._transposed(vjp, dout)

    def step(
        self, direction: str, arrays: tuple[jax.Array, ...], extras: dict[str, jax.Array]
    ) -> Callable[[], tuple[jax.Array, ...]]:
        """A step that returns what `RESULTS` says; of the backward pass, residuals are held."""
        *inputs, dout = arrays
        if direction == "fwd":
            return lambda: (self._forward(*inputs, extras),)
        if direction == "bwd":
            _, vjp = self._linear(*inputs, extras)
            return functools.partial(self._transposed, vjp, dout)
        return functools.partial(self.both, *inputs, dout, extras)


RESULTS = {
    "fwd": ("out",),
    "bwd": ("dquery", "dkey", "dvalue"),
    "fwd+bwd": ("out", "dquery", "dkey", "dvalue"),
}
