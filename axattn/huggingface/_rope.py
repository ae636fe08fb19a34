"""The rotary embedding that a configuration asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from axattn._rotary import LinearScaling, Llama3Scaling, RotaryEmbedding, Scaling, YarnScaling
from axattn.huggingface._json_fields import OBJECT, ROPE_KINDS, Config, check_fields

_LAYER_TYPES = ("full_attention", "sliding_attention")


def make_rotary_embedding(
    config: Config,
    head_dim: int,
    *,
    interleaved: bool = False,
    layer_type: str = "full_attention",
    partial: bool = False,
) -> RotaryEmbedding:
    """Make the rotary embedding of layers of a type.

    Args:
      config: of the language model, with what it leaves out.
      head_dim: features of a head that have positions.
      interleaved: as in `RotaryEmbedding`.
      layer_type: "full_attention" or "sliding_attention".
      partial: whether the model reads ``partial_rotary_factor``.

    Raises:
      NotImplementedError: a ``rope_type`` or a ``partial_rotary_factor`` that is not read here.
      ValueError: a number is missing that the ``rope_type`` needs, or does not fit another.
    """
    where, options = _read_options(config, layer_type)
    share = options.get("partial_rotary_factor") or config["partial_rotary_factor"] or 1.0
    if share != 1.0 and not partial:
        raise NotImplementedError(
            f"partial_rotary_factor takes 1 for {config['model_type']}, got {share}"
        )
    size = int(head_dim * share)
    if size % 2 or not size:
        raise ValueError(
            "head_dim (qk_rope_head_dim, or the share of it that partial_rotary_factor says) takes "
            f"an even number, for features are rotated in pairs: got {size}"
        )
    return RotaryEmbedding(
        base=float(options["rope_theta"]),
        interleaved=interleaved,
        scaling=_make_scaling(where, options, config),
        rotary_dim=None if share == 1.0 else size,
    )


def _read_options(config: Config, layer_type: str) -> tuple[str, dict[str, Any]]:
    """Read ``rope_parameters`` of a type of layer, as any version of transformers writes them.

    Returns:
      The name of the field that they stand in, and the parameters.
    """
    where = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    found = check_fields(config[where] or {}, ROPE_KINDS, where)
    local = layer_type == "sliding_attention"  # Gemma 3 gives these a base of their own
    base = config["rope_local_base_freq" if local else "rope_theta"]
    if any(name in found for name in _LAYER_TYPES):
        where = f"{where}.{layer_type}"
        found = OBJECT.allow_null().check(where, found.get(layer_type)) or {}
    elif local:  # parameters without types are for the other layers
        found = {}
    return where, {"rope_theta": base, **check_fields(found, ROPE_KINDS, where)}


def _make_scaling(where: str, options: Mapping[str, Any], config: Config) -> Scaling | None:
    """Make the scaling that a ``rope_type`` stands for."""
    kind = options.get("rope_type") or options.get("type") or "default"

    def get_number(name: str, default: float | None = None) -> float:
        value = default if options.get(name) is None else options[name]
        if value is None:
            raise ValueError(f"{where} takes {name} where rope_type is {kind!r}")
        return float(value)

    # Where both are given, transformers takes the outer one.
    written = config["original_max_position_embeddings"]
    written = written or options.get("original_max_position_embeddings")
    trained = int(written or config["max_position_embeddings"])
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(get_number("factor"))
    if kind == "llama3":
        low, high = get_number("low_freq_factor"), get_number("high_freq_factor")
        return Llama3Scaling(
            factor=get_number("factor"),
            low_freq_factor=low,
            # Llama 4 has one number for both: no pair is between slow and fast.
            high_freq_factor=math.nextafter(low, math.inf) if high == low else high,
            original_max_position=trained,
        )
    if kind == "yarn":
        if options["rope_theta"] <= 1:
            base = options["rope_theta"]
            raise ValueError(f"rope_theta takes more than 1 where rope_type is 'yarn', got {base}")
        return YarnScaling(
            factor=get_number("factor", config["max_position_embeddings"] / trained),
            original_max_position=trained,
            beta_fast=get_number("beta_fast", 32),
            beta_slow=get_number("beta_slow", 1),
            attention_factor=options.get("attention_factor"),
            mscale=options.get("mscale"),
            mscale_all_dim=options.get("mscale_all_dim"),
            truncate=bool(options.get("truncate", True)),
        )
    raise NotImplementedError(f"rope_type takes default, linear, llama3 or yarn here, got {kind!r}")
