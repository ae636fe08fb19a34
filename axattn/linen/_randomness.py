"""Whether a Linen layer drops weights, and which random key it uses."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from axattn._typing import Array


def resolve_dropout(
    layer: Any, deterministic: bool | None, rng: Array | None
) -> tuple[bool, Array | None]:
    """Return whether a call drops nothing, and its key: its own or the stream ``dropout``'s next.

    Raises:
      ValueError: neither the layer nor the call says whether it drops, or both do.
    """
    stays = layer.dropout_rate <= 0.0 or nn.merge_param(
        "deterministic", layer.deterministic, deterministic
    )
    if not stays and rng is None:
        rng = layer.make_rng("dropout")
    return stays, rng
