"""A latent attention layer between its projections: rotate, then attend, over a cache or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn import _jax_compat, latent
from axattn._typing import Array, ArrayLike, CacheType, Float, Integer
from axattn.attention import dot_product_attention
from axattn.cache.checks import is_concrete
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


# A projection's kernel, or what stands in its place and has to be called: [..., R] -> [..., N, D].
Up = Array | Callable[[Array], Array]

# By how much of a module's outputs (root mean square) those of a linear map may miss what its
# kernel says: sums in 16 bits, which TPUs take for float32 as well.
_LINEAR = 2.0**-5


@dataclasses.dataclass(frozen=True)
class Projected:
    """What a layer's projections made of its inputs, and the two that attention brings in.

    In the order of `axattn.latent.latent_attention`.
    """

    query: Float[Array, "*batch T N D+P"]
    latent: Float[Array, "*batch T R"]
    key_rope: Float[Array, "*batch T P"]
    key_up: Up
    value_up: Up

    @property
    def called(self) -> bool:
        """Whether one of the two has no kernel to read."""
        return callable(self.key_up) or callable(self.value_up)

    def promoted(self, promote: Callable[[tuple[Array, ...]], Sequence[Array]]) -> Projected:
        """The same in one dtype, as ``promote(arrays)`` brings them to it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = {name: x for name, x in fields.items() if not callable(x)}
        found = promote(tuple(arrays.values()))
        return dataclasses.replace(self, **dict(zip(arrays, found, strict=True)))

    def rotated(
        self, rope: RotaryEmbedding, positions: Integer[Array, "*leading T"] | None
    ) -> Projected:
        """The same, the last P features of queries and the shared keys turned by positions."""
        size = self.key_rope.shape[-1]
        plain, turned = jnp.split(self.query, [self.query.shape[-1] - size], axis=-1)
        turned, shared = rotate(rope, turned, self.key_rope[..., None, :], positions, None)
        query = jnp.concatenate([plain, turned], -1)
        return dataclasses.replace(self, query=query, key_rope=shared[..., 0, :])

    def with_kernels(self) -> tuple[Array, ...]:
        """All five as arrays: of what has to be called, the kernel that its outputs are made with.

        Raises:
          ValueError: one of the two is no linear map.
        """
        ups = (
            kernel_of(name, up, self.latent) if callable(up) else up
            for name, up in (("key_up", self.key_up), ("value_up", self.value_up))
        )
        return self.query, self.latent, self.key_rope, *ups

    def written_out(self, precision: Any) -> tuple[Array, Array, Array]:
        """Queries, keys and values of the naive form, the latter made by calling what there is."""

        def raised(up: Up) -> Array:
            if callable(up):
                return up(self.latent).astype(self.query.dtype)
            return jnp.einsum("...sr,rnd->...snd", self.latent, up, precision=precision)

        key, value = raised(self.key_up), raised(self.value_up)
        shared = self.key_rope[..., None, :].astype(key.dtype)
        shared = jnp.broadcast_to(shared, (*key.shape[:-1], shared.shape[-1]))
        return self.query, jnp.concatenate([key, shared], -1), value


def kernel_of(
    name: str, up: Callable[[Array], Array], latents: Float[Array, "*batch T R"]
) -> Array:
    """The kernel ``[R, N, D]`` of a linear map that can only be called, with its gradient.

    It is what comes out for the unit vectors, as tokens. Two more tokens tell whether that is all:
    zeros, of which a linear map makes zeros, and one of all features.

    Args:
      name: of the map, for errors.
      up: maps ``[..., T, R]`` to ``[..., T, N, D]``.
      latents: what it would be called with.

    Returns:
      ``[R, N, D]`` in the dtype of ``latents``; under jit NaN where the map is not linear.

    Raises:
      ValueError: the map is not linear.
    """
    rank = latents.shape[-1]
    mixed = np.random.default_rng(0).uniform(1, 4, rank) * np.where(np.arange(rank) % 2, 1, -1)
    tokens = np.concatenate([np.eye(rank), np.zeros((1, rank)), mixed[None]])
    lead = (1,) * (latents.ndim - 2)
    out = up(jnp.asarray(tokens, latents.dtype).reshape(*lead, *tokens.shape))
    out = out.reshape(rank + 2, *out.shape[-2:])
    kernel = out[:rank].astype(latents.dtype)

    wide = lax.stop_gradient(out).astype(jnp.float32)
    units, zero, found = wide[:rank], wide[rank], wide[rank + 1]
    weights = jnp.asarray(tokens[-1], latents.dtype).astype(jnp.float32)[:, None, None]
    size = ((weights * units) ** 2).sum()
    miss = ((found - (weights * units).sum(0)) ** 2).sum()
    is_linear = (zero == 0).all() & (miss <= _LINEAR**2 * size)
    takes = (
        f"{name} is {type(up).__name__}, whose outputs are not those of a linear map without an "
        "offset. form='absorbed' and caches need one: put it into the kernel, or use form='naive' "
        "without a cache"
    )
    if not is_concrete(is_linear):
        _jax_compat.debug_check(is_linear, takes)
    elif not is_linear:
        raise ValueError(takes)
    return jnp.where(is_linear, kernel, jnp.asarray(jnp.nan, kernel.dtype))


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
    is_causal: bool | None,
    cache: CacheType | None,
    lengths: ArrayLike | None,
    options: Mapping[str, Any],
    excluded: Mapping[str, bool],
) -> tuple[Float[Array, "*batch T N h"], CacheType | None]:
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
        projected = projected.rotated(rope, positions)
        options.update(mask=mask, is_causal=bool(is_causal))
        if projected.called and form != "absorbed":
            # Called with the latents themselves: right whatever stands there.
            attend_to = options.pop("attend", dot_product_attention)
            return attend_to(*projected.written_out(options.get("precision")), **options), None
        return latent.latent_attention(*projected.with_kernels(), form=form, **options), None
    not_causal = is_causal is not None and not is_causal
    excluded = {**excluded, "is_causal=False (over a cache tokens attend causally)": not_causal}
    check_step("inputs", cache, projected.query, excluded)
    if positions is None:
        positions = cache.next_positions(projected.query.shape[1])
    return latent.extend(
        cache,
        *projected.rotated(rope, positions).with_kernels(),
        lengths=lengths,
        form="absorbed" if form == "absorbed" else None,
        mask=mask,
        **options,
    )
