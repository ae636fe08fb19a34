"""A Linen layer's parameters: read without their product, and with names for their axes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax.linen import module as flax_module

from axattn._layers.axes import LOGICAL_AXES
from axattn._typing import Array, Float, QkNorm

_NORMS: dict[str, Callable[..., nn.LayerNorm | nn.RMSNorm]] = {
    "layer": functools.partial(nn.LayerNorm, use_bias=False),
    "rms": nn.RMSNorm,
}
_DENSE, _CALL = nn.DenseGeneral, nn.DenseGeneral.__call__


def may_read_kernels() -> bool:
    """Return whether a call of ``nn.DenseGeneral`` is Flax's product with its kernel and no more.

    It is more under ``nn.intercept_methods``, since an interceptor may change inputs and outputs
    (adapters do), and where ``capture_intermediates`` asks for outputs. Flax has no public function
    for either. If its private stack of interceptors moves, all projections are called, which is
    slower and never wrong.
    """
    intercepted = getattr(flax_module, "_global_interceptor_stack", True)
    captures = getattr(getattr(flax_module, "_context", None), "capture_stack", ())
    watched = bool(intercepted) or any(captures[-1:])
    return nn.DenseGeneral is _DENSE and _DENSE.__call__ is _CALL and not watched


def get_parameters(
    layer: nn.DenseGeneral, inputs: Float[Array, "*batch T E"]
) -> tuple[Array, Array | None]:
    """Return kernel and bias of a projection, initialized by its own rules for ``inputs``.

    To be called where `may_read_kernels` says so.
    """
    layer(inputs[..., :0, :])  # no tokens, no work
    params = nn.meta.unbox(layer.variables["params"])
    return params["kernel"], params.get("bias")


def name_axes(
    layer: nn.Module,
    init: Callable[..., Array],
    *path: str,
    axes: Mapping[tuple[str, ...], tuple[str, ...]] = LOGICAL_AXES,
) -> Callable[..., Any]:
    """Box ``init`` of the parameter at ``path`` with its axes, where the layer names them."""
    return nn.with_logical_partitioning(init, axes[path]) if layer.logical_axes else init


def make_dense(
    layer: Any,
    name: str,
    features: int | tuple[int, int],
    *,
    use_bias: bool,
    kernel_init: Callable[..., Any] | None = None,
    bias_init: Callable[..., Any] | None = None,
    **options: Any,
) -> nn.DenseGeneral:
    """Return a projection of the layer being called, by default with its initializers."""
    return nn.DenseGeneral(
        features,
        name=name,
        use_bias=use_bias,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        precision=layer.precision,
        kernel_init=name_axes(layer, kernel_init or layer.kernel_init, name, "kernel"),
        bias_init=name_axes(layer, bias_init or layer.bias_init, name, "bias"),
        **options,
    )


def make_norm(
    layer: Any,
    name: str,
    epsilon: float,
    kind: QkNorm = "rms",
    axes: Mapping[tuple[str, ...], tuple[str, ...]] = LOGICAL_AXES,
    **options: Any,
) -> nn.LayerNorm | nn.RMSNorm:
    """Return a norm of the layer that is being called."""
    return _NORMS[kind](
        name=name,
        epsilon=epsilon,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        scale_init=name_axes(layer, nn.initializers.ones_init(), name, "scale", axes=axes),
        **options,
    )
