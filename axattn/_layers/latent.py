"""One step of a latent attention layer, the same in Linen and NNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from axattn import _jax_compat, _latent
from axattn._layers.config import LatentConfig, drop_unset
from axattn._layers.masking import cast_mask
from axattn._layers.rope import rotate_query_key
from axattn._layers.step import LayerCall, apply_norm, check_cache
from axattn._rotary import RotaryEmbedding, yarn_softmax_scale
from axattn._typing import Array, Float, Integer
from axattn.cache._checks import is_concrete

# A projection's kernel, or a module in its place that has to be called: [..., R] -> [..., N, D].
UpProjection = Array | Callable[[Array], Array]

# Projections that have a bias where ``use_bias`` is set.
BIASED = ("query_down", "kv_down", "out")

# The relative error (root mean square) up to which a module counts as a linear map: that of
# products of 16-bit numbers, by which TPUs multiply float32 as well.
_LINEAR = 2.0**-5


@dataclasses.dataclass(frozen=True)
class LatentOperands:
    """What latent attention takes, in the order of `axattn.latent.latent_attention`.

    ``key_up`` and ``value_up`` are kernels, or modules that have to be called.
    """

    query: Float[Array, "*batch T N D+P"]
    latent: Float[Array, "*batch T R"]
    key_rope: Float[Array, "*batch T P"]
    key_up: UpProjection
    value_up: UpProjection

    @property
    def has_modules(self) -> bool:
        """Whether ``key_up`` or ``value_up`` is a module whose kernel cannot be read."""
        return callable(self.key_up) or callable(self.value_up)

    def cast(self, promote: Callable[[tuple[Array, ...]], Sequence[Array]]) -> LatentOperands:
        """Bring all arrays to one dtype by ``promote(arrays)``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = {name: x for name, x in fields.items() if not callable(x)}
        found = promote(tuple(arrays.values()))
        return dataclasses.replace(self, **dict(zip(arrays, found, strict=True)))

    def rotate(
        self, rope: RotaryEmbedding, positions: Integer[Array, "*leading T"] | None
    ) -> LatentOperands:
        """Rotate the last P features of queries, and the shared keys, by their positions."""
        size = self.key_rope.shape[-1]
        plain, turned = jnp.split(self.query, [self.query.shape[-1] - size], axis=-1)
        key = self.key_rope[..., None, :]
        turned, key = rotate_query_key(rope, turned, key, positions, None)
        query = jnp.concatenate([plain, turned], -1)
        return dataclasses.replace(self, query=query, key_rope=key[..., 0, :])

    def resolve_kernels(self) -> tuple[Array, ...]:
        """Return all five as arrays: kernels of modules are recovered from their outputs.

        Raises:
          ValueError: one of the two is no linear map.
        """
        ups = (
            recover_kernel(name, up, self.latent) if callable(up) else up
            for name, up in (("key_up", self.key_up), ("value_up", self.value_up))
        )
        return self.query, self.latent, self.key_rope, *ups

    def write_out(self, precision: Any) -> tuple[Array, Array, Array]:
        """Return queries, keys and values of the naive form; modules are called."""

        def project_up(up: UpProjection) -> Array:
            if callable(up):
                return up(self.latent).astype(self.query.dtype)
            return jnp.einsum("...sr,rnd->...snd", self.latent, up, precision=precision)

        key, value = project_up(self.key_up), project_up(self.value_up)
        shared = self.key_rope[..., None, :].astype(key.dtype)
        shared = jnp.broadcast_to(shared, (*key.shape[:-1], shared.shape[-1]))
        return self.query, jnp.concatenate([key, shared], -1), value


def recover_kernel(
    name: str, up: Callable[[Array], Array], latents: Float[Array, "*batch T R"]
) -> Array:
    """Recover the kernel ``[R, N, D]`` of a linear map that can only be called.

    The kernel's rows are the map's outputs for the R unit vectors, as tokens, and gradients pass
    through them. Two more tokens tell whether the map is linear: zeros, which it must map to zeros,
    and one with all features.

    Args:
      name: of the map, for errors.
      up: maps ``[..., T, R]`` to ``[..., T, N, D]``.
      latents: ``[..., T, R]``, what it would be called with.

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
        _jax_compat.check_in_debug(is_linear, takes)
    elif not is_linear:
        raise ValueError(takes)
    return jnp.where(is_linear, kernel, jnp.asarray(jnp.nan, kernel.dtype))


def project_latents(
    inputs: Float[Array, "*batch T E"],
    config: LatentConfig,
    *,
    find: Callable[[str], Callable[[Array], Array]],
    find_up: Callable[[str, Array], UpProjection],
    promote: Callable[[tuple[Array, ...]], Sequence[Array]],
) -> LatentOperands:
    """Apply a layer's projections and norms to its inputs.

    Args:
      inputs: ``[..., T, E]``.
      config: of the layer.
      find: returns the projection or norm of this name.
      find_up: returns ``key_up`` or ``value_up``, by its name and the latents that it takes.
      promote: brings arrays to one dtype.
    """
    if config.q_lora_rank is None:
        query = find("query")(inputs)
    else:
        query = find("query_up")(apply_norm(find("query_norm"), find("query_down")(inputs)))
    down, key_rope = jnp.split(find("kv_down")(inputs), [config.kv_lora_rank], axis=-1)
    down = apply_norm(find("kv_norm"), down)
    ups = find_up("key_up", down), find_up("value_up", down)
    return LatentOperands(query, down, key_rope, *ups).cast(promote)


def apply_latent_attention(
    layer: Any, config: LatentConfig, call: LayerCall, projected: LatentOperands
) -> tuple[Float[Array, "*batch T N h"], Any]:
    """Rotate, append to a cache, and attend over it or over the tokens themselves.

    Args:
      layer: of either dialect, for its ``attend``, ``precision`` and dropout.
      config: of the layer.
      call: its arguments, of one input.
      projected: of the inputs.

    Returns:
      What ``out`` projects, and the cache or None.
    """
    dropout = {}
    if not call.deterministic:
        dropout = dict(
            dropout_rate=layer.dropout_rate,
            dropout_rng=call.dropout_rng,
            broadcast_dropout=layer.broadcast_dropout,
        )
    scale, mask = config.scale, cast_mask(call.mask)
    if scale is None:  # the model's convention: 1 / sqrt(D + P), which YaRN changes
        scale = yarn_softmax_scale(projected.query.shape[-1], config.rope.scaling)
    options = {
        **config.options,
        **drop_unset(
            query_segment_ids=call.segment_ids,
            precision=layer.precision,
            is_projected=True,
            **dropout,
        ),
        "scale": scale,
        "mask": mask,
    }
    if call.cache is not None:
        cache = check_cache("inputs", call, projected.query, {})
        positions = call.positions
        if positions is None:
            positions = cache.next_positions(projected.query.shape[1])
        return _latent.extend(
            cache,
            *projected.rotate(config.rope, positions).resolve_kernels(),
            lengths=call.lengths,
            form="absorbed" if config.form == "absorbed" else None,
            attend=layer.attend,
            **options,
        )
    projected = projected.rotate(config.rope, call.positions)
    options["is_causal"] = bool(call.is_causal)
    if projected.has_modules and config.form != "absorbed":
        # A call with the latents themselves is right for any module.
        return layer.attend(*projected.write_out(layer.precision), **options), None
    arrays = projected.resolve_kernels()
    return _latent.latent_attention(*arrays, form=config.form, attend=layer.attend, **options), None
