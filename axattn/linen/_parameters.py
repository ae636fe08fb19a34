"""A layer's parameters: without its product, and with names for their axes."""

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
    """Whether a call of ``nn.DenseGeneral`` is Flax's product with its kernel, and nothing more.

    It is more where ``nn.intercept_methods`` is in force: an interceptor may change what goes in
    and what comes out (adapters do); and where ``capture_intermediates`` asks for what comes out.
    Flax has no public word for either; were its private stack of interceptors to move, all
    projections would be called, which is slower and never wrong.
    """
    intercepted = getattr(flax_module, "_global_interceptor_stack", True)
    captures = getattr(getattr(flax_module, "_context", None), "capture_stack", ())
    watched = bool(intercepted) or any(captures[-1:])
    return nn.DenseGeneral is _DENSE and _DENSE.__call__ is _CALL and not watched


def get_parameters(
    layer: nn.DenseGeneral, inputs: Float[Array, "*batch T E"]
) -> tuple[Array, Array | None]:
    """Kernel and bias of a layer that would be called with ``inputs``, made by its own rules.

    Only where one `may_read_kernels`.
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
    """``init`` of the parameter at ``path``, boxed with its axes where the layer's are named."""
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
    """A projection of a layer that is being called; initializers are the layer's by default."""
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
    """A norm of a layer that is being called."""
    return _NORMS[kind](
        name=name,
        epsilon=epsilon,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        scale_init=name_axes(layer, nn.initializers.ones_init(), name, "scale", axes=axes),
        **options,
    )
