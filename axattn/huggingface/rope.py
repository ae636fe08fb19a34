"""The rotary embedding that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axattn.rotary import LinearScaling, Llama3Scaling, RotaryEmbedding, Scaling, YarnScaling

_LAYER_TYPES = ("full_attention", "sliding_attention")


def rotary_embedding(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    interleaved: bool = False,
    layer_type: str = "full_attention",
    default_base: float = 10000.0,
) -> RotaryEmbedding:
    """Of layers of a type, with ``head_dim`` features that have positions.

    Raises NotImplementedError for a ``rope_type`` that axattn does not have, ValueError for one
    whose numbers are not all there.
    """
    options = _options(config, layer_type)
    base = options.get("rope_theta")
    share = options.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return RotaryEmbedding(
        base=float(default_base if base is None else base),
        interleaved=interleaved,
        scaling=_scaling(options, config.get("max_position_embeddings")),
        rotary_dim=None if share == 1.0 else int(head_dim * share),
    )


def _options(config: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """``rope_parameters`` of this type of layer, also out of the older ways of writing them."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(name in found for name in _LAYER_TYPES):
        return dict(found.get(layer_type) or {})
    if layer_type == "sliding_attention":  # of Gemma 3, whose scaling is for the other layers
        return {"rope_theta": config.get("rope_local_base_freq")}
    return {"rope_theta": config.get("rope_theta"), **found}


def _scaling(options: Mapping[str, Any], max_positions: int | None) -> Scaling | None:
    kind = options.get("rope_type") or options.get("type") or "default"

    def number(name: str, otherwise: float | None = None) -> float:
        value = otherwise if options.get(name) is None else options[name]
        if value is None:
            raise ValueError(f"rope_parameters takes {name} where rope_type is {kind!r}")
        return float(value)

    trained = options.get("original_max_position_embeddings") or max_positions
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(number("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_position=int(trained),
        )
    if kind == "yarn":
        return YarnScaling(
            factor=number("factor", max_positions / trained),
            original_max_position=int(trained),
            beta_fast=number("beta_fast", 32),
            beta_slow=number("beta_slow", 1),
            attention_factor=options.get("attention_factor"),
            mscale=options.get("mscale"),
            mscale_all_dim=options.get("mscale_all_dim"),
            truncate=options.get("truncate", True),
        )
    raise NotImplementedError(f"rope_type takes default, linear, llama3 or yarn here, got {kind!r}")
