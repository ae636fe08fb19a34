"""Latent attention of arrays and over caches. `axattn.latent` describes its two forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import lax

from axattn._attention import dot_product_attention
from axattn._typing import Array, ArrayLike, CacheType, Float, Precision
from axattn.cache import Cache, RingCache
from axattn.cache._checks import is_concrete

FORMS = ("naive", "absorbed")
Form = Literal["naive", "absorbed"]


def preferred_form(
    q_len: int, kv_len: int, *, rank: int, nope_dim: int, rope_dim: int, value_dim: int
) -> Form:
    """Choose the form with fewer FLOPs for T queries over S tokens.

    Multiply-adds of a head: to write out keys and values takes ``S R (D + h)``, to attend to them
    ``T S (D + P + h)``; to bring the projections to queries and outputs ``T R (D + h)``, to attend
    to latents ``T S (2 R + P)``. With T = S the first is the lesser one where D + h < 2 R;
    DeepSeek-V3's sizes have them meet at T of about 170 where S is long.

    Args:
      q_len: T, query slots.
      kv_len: S, key slots.
      rank: R, the size of a latent.
      nope_dim: D, features of a key without positions.
      rope_dim: P, those with positions.
      value_dim: h, the size of a value.

    Returns:
      ``"naive"`` or ``"absorbed"``.

    Example:
      >>> from axattn import latent
      >>> v3 = dict(rank=512, nope_dim=128, rope_dim=64, value_dim=128)
      >>> latent.preferred_form(4096, 4096, **v3), latent.preferred_form(1, 4096, **v3)
      ('naive', 'absorbed')
    """
    projections = rank * (nope_dim + value_dim)
    naive = kv_len * projections + q_len * kv_len * (nope_dim + rope_dim + value_dim)
    absorbed = q_len * projections + q_len * kv_len * (2 * rank + rope_dim)
    return "naive" if naive <= absorbed else "absorbed"


def latent_attention(
    query: Float[Array, "*batch T N D+P"],
    latent: Float[Array, "*batch S R"],
    key_rope: Float[Array, "*batch S P"],
    key_up: Float[Array, "R N D"],
    value_up: Float[Array, "R N h"],
    *,
    form: Form | None = None,
    scale: ArrayLike | None = None,
    precision: Precision | None = None,
    attend: Callable[..., Any] = dot_product_attention,
    **options: Any,
) -> Float[Array, "*batch T N h"]:
    """Compute latent attention over the tokens' latents.

    Args:
      query: ``[..., T, N, D + P]``, floating point; the last P features are rotated.
      latent: ``[..., S, R]``, the same dtype, after its norm.
      key_rope: ``[..., S, P]``, rotated as the queries are.
      key_up, value_up: ``[R, N, D]`` and ``[R, N, h]``.
      form: "naive" or "absorbed"; None: the one with fewer FLOPs, see `preferred_form`.
      scale: of the logits, a number or an array ``[]``; 1 / sqrt(D + P) by default. YaRN changes
        it: `axattn.rotary.yarn_softmax_scale`.
      precision: of the projections and of attention.
      attend: a function with the arguments of `axattn.dot_product_attention`, which gets those
        that are not at their defaults. Over a mesh:
        ``functools.partial(axattn.parallel.attention, axes=axes)``.
      **options: as in `axattn.dot_product_attention`.

    Returns:
      ``[..., T, N, h]`` in the query's dtype; with ``return_residual`` also the LSE, float32
      ``[..., T, N]``.

    Raises:
      ValueError: shapes that do not fit together, another form; and as
        `axattn.dot_product_attention`.
      TypeError: ``latent`` of another dtype than ``query``; and as there.
      NotImplementedError: the named implementation takes no keys of size R + P.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import latent
      >>> query = jnp.ones((1, 5, 4, 24))  # four heads, D = 16 and P = 8
      >>> c, key_rope = jnp.ones((1, 5, 32)), jnp.ones((1, 5, 8))  # R = 32
      >>> key_up, value_up = jnp.ones((32, 4, 16)), jnp.ones((32, 4, 16))
      >>> forms = [
      ...     latent.latent_attention(query, c, key_rope, key_up, value_up, form=form)
      ...     for form in ("naive", "absorbed")
      ... ]
      >>> forms[0].shape, bool(jnp.allclose(*forms))
      ((1, 5, 4, 16), True)
    """
    sizes = _check_sizes(query, latent, key_rope, key_up, value_up)
    if form is None:
        form = preferred_form(query.shape[-3], latent.shape[-2], **sizes)
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS} or None, got {form!r}")
    options.update(scale=_get_default_scale(query) if scale is None else scale, precision=precision)
    if form == "naive":
        written = write_out(latent, key_rope, key_up, value_up, precision=precision)
        key, value = (x.astype(query.dtype) for x in written)
        return attend(query, key, value, **options)
    query = absorb(query, key_up, precision=precision)
    key, value = _join_shared_key(latent, key_rope), latent[..., None, :]
    options["is_projected"] = True  # by these two products
    return _expand_output(attend(query, key, value, **options), value_up, precision)


def write_out(
    latent: Float[Array, "*batch S R"],
    key_rope: Float[Array, "*batch S P"],
    key_up: Float[Array, "R N D"],
    value_up: Float[Array, "R N h"],
    *,
    precision: Precision | None = None,
) -> tuple[Float[Array, "*batch S N D+P"], Float[Array, "*batch S N h"]]:
    """Compute the keys and values of all heads, as the naive form takes them.

    Args:
      latent: ``[..., S, R]``, after its norm.
      key_rope: ``[..., S, P]``, rotated.
      key_up: ``[R, N, D]``.
      value_up: ``[R, N, h]``.
      precision: of the projections.

    Returns:
      Keys ``[..., S, N, D + P]`` and values ``[..., S, N, h]``.

    Raises:
      ValueError: by JAX, for shapes that do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import latent
      >>> key_up, value_up = jnp.ones((32, 4, 16)), jnp.ones((32, 4, 16))
      >>> c, key_rope = jnp.ones((1, 5, 32)), jnp.ones((1, 5, 8))
      >>> key, value = latent.write_out(c, key_rope, key_up, value_up)
      >>> key.shape, value.shape
      ((1, 5, 4, 24), (1, 5, 4, 16))
    """
    key = jnp.einsum("...sr,rnd->...snd", latent, key_up, precision=precision)
    value = jnp.einsum("...sr,rnh->...snh", latent, value_up, precision=precision)
    shared = key_rope[..., None, :].astype(key.dtype)
    shared = jnp.broadcast_to(shared, (*key.shape[:-1], key_rope.shape[-1]))
    return jnp.concatenate([key, shared], -1), value


def absorb(
    query: Float[Array, "*batch T N D+P"],
    key_up: Float[Array, "R N D"],
    *,
    precision: Precision | None = None,
) -> Float[Array, "*batch T N R+P"]:
    """Map queries to the space of latents: project their first D features by ``key_up``.

    Args:
      query: ``[..., T, N, D + P]``, the last P features rotated.
      key_up: ``[R, N, D]``.
      precision: of the projection.

    Returns:
      ``[..., T, N, R + P]`` in the query's dtype.

    Raises:
      ValueError: by JAX, for shapes that do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import latent
      >>> latent.absorb(jnp.ones((1, 5, 4, 24)), jnp.ones((32, 4, 16))).shape
      (1, 5, 4, 40)
    """
    size = key_up.shape[-1]
    absorbed = jnp.einsum("...tnd,rnd->...tnr", query[..., :size], key_up, precision=precision)
    return jnp.concatenate([absorbed.astype(query.dtype), query[..., size:]], -1)


# ---- over caches ------------------------------------------------------------------------------

# A length at which only costs that grow with the number of keys count.
_LONG = 2**40

# Options that are about the cache's slots, or about positions in it: not of a prompt alone.
_CACHE_OPTIONS = ("mask", "bias", "q_positions", "query_segment_ids", "key_value_segment_ids")


def cache_sizes(kv_lora_rank: int, qk_rope_head_dim: int) -> dict[str, Any]:
    """Return what ``create`` of a cache takes to store R + P numbers per token, once.

    Args:
      kv_lora_rank: R, the size of a latent.
      qk_rope_head_dim: P, rotated features of a key.

    Returns:
      ``num_kv_heads``, ``head_dim``, ``value_head_dim`` and ``values_in_keys``, by name.

    Example:
      >>> from axattn import latent
      >>> from axattn.cache import DenseCache
      >>> cache = DenseCache.create(1, 64, **latent.cache_sizes(512, 64), dtype="bfloat16")
      >>> cache.head_dim, cache.value_head_dim, cache.bytes_per_token
      (576, 512, 1152)
    """
    return dict(
        num_kv_heads=1,
        head_dim=kv_lora_rank + qk_rope_head_dim,
        value_head_dim=kv_lora_rank,
        values_in_keys=True,
    )


def attend(
    cache: Cache,
    query: Float[Array, "B T N D+P"],
    key_up: Float[Array, "R N D"],
    value_up: Float[Array, "R N h"],
    *,
    scale: ArrayLike | None = None,
    precision: Precision | None = None,
    **options: Any,
) -> Float[Array, "B T N h"]:
    """Attend in the absorbed form from the newest tokens over all that ``cache`` holds.

    Args:
      cache: one made with `cache_sizes`.
      query: ``[B, T, N, D + P]``, of the T tokens appended last; the last P features are rotated.
      key_up: ``[R, N, D]``.
      value_up: ``[R, N, h]``.
      scale: of the logits, a number or an array ``[]``; 1 / sqrt(D + P) by default.
      precision: of the projections and of attention.
      **options: as in `axattn.cache.Cache.attend`.

    Returns:
      ``[B, T, N, h]`` in the query's dtype; with ``return_residual`` also the LSE.

    Raises:
      ValueError: shapes that do not fit together, a cache of other sizes; and as
        `axattn.cache.Cache.attend`.
      TypeError: ``cache`` is none; and as there.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import latent
      >>> from axattn.cache import DenseCache
      >>> cache = DenseCache.create(1, 16, **latent.cache_sizes(32, 8), dtype="float32")
      >>> cache = cache.append(jnp.ones((1, 5, 1, 40)))  # latents and rotated features of 5 tokens
      >>> key_up, value_up = jnp.ones((32, 4, 16)), jnp.ones((32, 4, 16))
      >>> latent.attend(cache, jnp.ones((1, 1, 4, 24)), key_up, value_up).shape
      (1, 1, 4, 16)
    """
    rank, rope = _check_cache(cache)
    _check_ups(query, rank, rope, key_up, value_up)
    scale = _get_default_scale(query) if scale is None else scale
    absorbed = absorb(query, key_up, precision=precision)
    found = cache.attend(absorbed, scale=scale, precision=precision, **options)
    return _expand_output(found, value_up, precision)


def extend(
    cache: CacheType,
    query: Float[Array, "B T N D+P"],
    latent: Float[Array, "B T R"],
    key_rope: Float[Array, "B T P"],
    key_up: Float[Array, "R N D"],
    value_up: Float[Array, "R N h"],
    *,
    lengths: ArrayLike | None = None,
    form: Literal["absorbed"] | None = None,
    scale: ArrayLike | None = None,
    precision: Precision | None = None,
    attend: Callable[..., Any] = dot_product_attention,
    **options: Any,
) -> tuple[Float[Array, "B T N h"], CacheType]:
    """Append tokens to a cache and attend from them over all that it holds: a layer's step.

    Args:
      cache: one made with `cache_sizes`.
      query: ``[B, T, N, D + P]`` of the new tokens, as in `latent_attention`.
      latent, key_rope: ``[B, T, R]`` and ``[B, T, P]`` of the same tokens. What is stored is cast
        to the dtype of a floating-point cache.
      key_up, value_up: ``[R, N, D]`` and ``[R, N, h]``.
      scale, precision: as in `latent_attention`; ``[]`` is the shape of a scale that is an array.
      lengths: int ``[B]`` or int: how many of the T tokens are real in each row.
      form: None: many tokens (in DeepSeek-V3 more than 170) that come into an empty cache attend
        to one another in the naive form, so that a prompt costs what it costs in training. The
        program has both forms, and looks whether the cache is empty when it runs. "absorbed":
        never the naive form. Rings, and steps with ``mask``, ``bias``, segment ids or
        ``q_positions``, are always absorbed.
      attend: as in `latent_attention`, of prompts in the naive form.
      **options: as in `axattn.cache.Cache.extend`.

    Returns:
      ``(output, cache)``; output ``[B, T, N, h]``.

    Raises:
      ValueError: as `latent_attention`, and as `axattn.cache.Cache.extend`; a cache of other sizes.
      TypeError: as these; ``cache`` is none, or lengths of another name than ``lengths``.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn import latent
      >>> from axattn.cache import DenseCache
      >>> key_up, value_up = jnp.ones((32, 4, 16)), jnp.ones((32, 4, 16))
      >>> cache = DenseCache.create(1, 16, **latent.cache_sizes(32, 8), dtype="float32")
      >>> prompt = jnp.ones((1, 5, 4, 24)), jnp.ones((1, 5, 32)), jnp.ones((1, 5, 8))
      >>> out, cache = latent.extend(cache, *prompt, key_up, value_up)
      >>> out.shape, cache.lengths.tolist()
      ((1, 5, 4, 16), [5])
    """
    sizes = _check_sizes(query, latent, key_rope, key_up, value_up)
    _check_cache(cache, sizes["rank"], sizes["rope_dim"])
    if form not in (None, "absorbed"):
        raise ValueError(f"form takes None or 'absorbed' over a cache, got {form!r}")
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if name in options:
            raise TypeError(f"extend takes no argument {name}: lengths and the cache say it")
    options.update(scale=_get_default_scale(query) if scale is None else scale, precision=precision)
    key = _join_shared_key(latent, key_rope)
    if cache.stores_floats:
        key = key.astype(cache.dtype)

    may_be_naive = form is None and not isinstance(cache, RingCache)
    may_be_naive = may_be_naive and all(options.get(name) is None for name in _CACHE_OPTIONS)
    may_be_naive = may_be_naive and preferred_form(query.shape[1], _LONG, **sizes) == "naive"
    was_empty = _is_empty(cache) if may_be_naive else False
    if was_empty is False:
        query = absorb(query, key_up, precision=precision)
        out, cache = cache.extend(query, key, lengths=lengths, **options)
        return _expand_output(out, value_up, precision), cache

    before, cache = cache.lengths, cast(CacheType, cache.append(key, lengths=lengths))
    written = cache.lengths - before

    def attend_naive():
        return latent_attention(
            query, latent, key_rope, key_up, value_up, form="naive", attend=attend,
            query_seq_lengths=written, key_value_seq_lengths=written,
            **{"is_causal": True, **options},
        )  # fmt: skip

    def absorb_query():
        return absorb(query, key_up, precision=precision)

    if was_empty is True:
        return attend_naive(), cache
    # The cache stays outside of the conditionals, at whose borders XLA on TPUs would change its
    # layout. Without queries, attention over it costs nothing.
    naive_out, absorbed = lax.cond(
        was_empty,
        lambda: (attend_naive(), _make_zeros(absorb_query)),
        lambda: (_make_zeros(attend_naive), absorb_query()),
    )
    count = jnp.where(was_empty, 0, written)
    found = cache.attend(absorbed, query_seq_lengths=count, **options)
    out = lax.cond(was_empty, lambda: naive_out, lambda: _expand_output(found, value_up, precision))
    return out, cache


def _is_empty(cache: CacheType) -> bool | Array:
    """Return whether no row holds a token: a bool where that is known, else an array."""
    empty = (cache.lengths == 0).all()
    return bool(empty) if is_concrete(empty) else empty


def _make_zeros(function: Any) -> Any:
    """Return zeros of the shapes and dtypes that a function would return, without a call."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function))


# ---- shared -----------------------------------------------------------------------------------


def _get_default_scale(query: Array) -> float:
    return query.shape[-1] ** -0.5


def _join_shared_key(latent: Array, key_rope: Array) -> Array:
    """Join latents and rotated features to the one key head ``[..., S, 1, R + P]``."""
    return jnp.concatenate([latent, key_rope.astype(latent.dtype)], -1)[..., None, :]


def _expand_output(found: Any, value_up: Array, precision: Any) -> Any:
    """Project an output over latents, ``[..., T, N, R]``, by ``value_up``; keep an LSE."""
    out, *rest = found if isinstance(found, tuple) else (found,)
    out = jnp.einsum("...tnr,rnh->...tnh", out, value_up, precision=precision).astype(out.dtype)
    return (out, *rest) if rest else out


def _check_sizes(query, latent, key_rope, key_up, value_up) -> dict[str, int]:
    """Check that arrays fit together and return R, D, P and h by name."""
    for name, x, axes in (
        ("query", query, "[..., T, N, D + P]"),
        ("latent", latent, "[..., S, R]"),
        ("key_rope", key_rope, "[..., S, P]"),
    ):
        if jnp.ndim(x) < axes.count(","):
            raise ValueError(f"{name} takes {axes}, got shape {jnp.shape(x)}")
    rank, rope = latent.shape[-1], key_rope.shape[-1]
    _check_ups(query, rank, rope, key_up, value_up)
    if latent.shape[:-1] != key_rope.shape[:-1] or query.shape[:-3] != latent.shape[:-2]:
        raise ValueError(
            "query, latent and key_rope take one batch, and the latter two one length, got shapes "
            f"{query.shape}, {latent.shape} and {key_rope.shape}"
        )
    if latent.dtype != query.dtype:
        raise TypeError(f"latent takes the dtype of query, {query.dtype}, got {latent.dtype}")
    return dict(rank=rank, nope_dim=key_up.shape[-1], rope_dim=rope, value_dim=value_up.shape[-1])


def _check_ups(query: Array, rank: int, rope: int, key_up: Array, value_up: Array) -> None:
    heads, size = query.shape[-2:]
    for name, x, features in (("key_up", key_up, size - rope), ("value_up", value_up, None)):
        shape = jnp.shape(x)
        fits = len(shape) == 3 and shape[:2] == (rank, heads) and features in (None, shape[2])
        if not fits or 0 in shape:
            takes = f"({rank}, {heads}, {'h' if features is None else features})"
            raise ValueError(
                f"{name} takes {takes} for a query of shape {query.shape}, latents of {rank} and "
                f"rotated keys of {rope} features, got {shape}"
            )


def _check_cache(cache: Any, rank: int | None = None, rope: int | None = None) -> tuple[int, int]:
    """Check that a cache is made for latents and return its R and P.

    ``rank`` and ``rope`` are what it must have; None: what its own sizes say.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache takes a cache of axattn.cache, got {type(cache).__name__}")
    rank = cache.value_head_dim if rank is None else rank
    rope = cache.head_dim - cache.value_head_dim if rope is None else rope
    takes = cache_sizes(rank, rope)
    got = {name: getattr(cache, name) for name in takes}
    if got != takes:
        raise ValueError(f"cache takes one made with {takes} (see cache_sizes), got {got}")
    return rank, rope
