"""A latent attention layer between its projections: rotate, then attend, over a cache or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from axattn import latent
from axattn._typing import Array, ArrayLike, Float, Integer
from axattn.cache import Cache
from axattn.layers.caching import check_step
from axattn.layers.masking import as_given
from axattn.layers.options import count
from axattn.layers.positions import rotate
from axattn.masks import Mask
from axattn.rotary import RotaryEmbedding, yarn_softmax_scale


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """The sizes of a layer, by their names in DeepSeek's configurations.

    Raises:
      ValueError, TypeError: one is not a positive integer, or ``qk_rope_head_dim`` is odd.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if name != "q_lora_rank" or value is not None:
                count(name, value)
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                "qk_rope_head_dim must be even, for features are rotated in pairs, got "
                f"{self.qk_rope_head_dim}"
            )

    @staticmethod
    def of(layer: Any) -> LatentSizes:
        """Those of a layer that has them as attributes."""
        names = [field.name for field in dataclasses.fields(LatentSizes)]
        return LatentSizes(**{name: getattr(layer, name) for name in names})

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class Projected:
    """What a layer's projections made of its inputs, and the two that attention brings in.

    In the order of `axattn.latent.latent_attention`.
    """

    query: Float[Array, "*batch T N D+P"]
    latent: Float[Array, "*batch T R"]
    key_rope: Float[Array, "*batch T P"]
    key_up: Float[Array, "R N D"]
    value_up: Float[Array, "R N h"]

    def rotated(
        self, rope: RotaryEmbedding, positions: Integer[Array, "*leading T"] | None
    ) -> tuple[Array, ...]:
        """All five, the last P features of queries and the shared keys turned by positions."""
        size = self.key_rope.shape[-1]
        plain, turned = jnp.split(self.query, [self.query.shape[-1] - size], axis=-1)
        turned, shared = rotate(rope, turned, self.key_rope[..., None, :], positions, None)
        query = jnp.concatenate([plain, turned], -1)
        return query, self.latent, shared[..., 0, :], self.key_up, self.value_up


def check_fields(rope: RotaryEmbedding, form: latent.Form | None) -> None:
    """TypeError for a ``rope`` that is none, ValueError for a ``form`` that there is not."""
    if not isinstance(rope, RotaryEmbedding):
        raise TypeError(f"rope takes a RotaryEmbedding, got {rope!r}")
    if form not in (None, *latent.FORMS):
        raise ValueError(f"form must be one of {latent.FORMS} or None, got {form!r}")


def attend(
    projected: Projected,
    *,
    rope: RotaryEmbedding,
    scale: float | None,
    positions: Integer[Array, "*leading T"] | None,
    form: latent.Form | None,
    mask: Array | Mask | None,
    is_causal: bool,
    cache: Cache | None,
    lengths: ArrayLike | None,
    options: Mapping[str, Any],
    excluded: Mapping[str, bool],
) -> tuple[Float[Array, "*batch T N h"], Cache | None]:
    """Attention of a layer, and its cache with the new tokens.

    Args:
      projected: of the inputs.
      rope, scale, positions, form, mask, is_causal, cache, lengths: as in the layer.
      options: more for `axattn.latent.latent_attention`, or for ``extend``.
      excluded: what a layer cannot do over a cache, by name, and whether it was asked for.
    """
    check_fields(rope, form)
    mask = as_given(mask)
    if scale is None:  # the model's convention: 1 / sqrt(D + P), which YaRN changes
        scale = yarn_softmax_scale(projected.query.shape[-1], rope.scaling)
    options = {**options, "scale": scale}
    if cache is None:
        if lengths is not None:
            raise ValueError("lengths takes None without a cache: use a mask")
        arrays = projected.rotated(rope, positions)
        options = dict(options, form=form, mask=mask, is_causal=is_causal)
        return latent.latent_attention(*arrays, **options), None
    check_step("inputs", cache, projected.query, excluded)
    if positions is None:
        positions = cache.next_positions(projected.query.shape[1])
    return latent.extend(
        cache,
        *projected.rotated(rope, positions),
        lengths=lengths,
        form="absorbed" if form == "absorbed" else None,
        mask=mask,
        **options,
    )
