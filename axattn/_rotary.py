"""Rotary position embeddings. `axattn.rotary` describes their layouts and scalings."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from axattn._checks import check_count
from axattn._dtypes import choose_accumulator
from axattn._typing import Array, Float, Integer


def _check_real(name: str, value, *, zero: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is finite and positive, or 0 where allowed."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        takes = "at least 0" if zero else "greater than 0"
        raise ValueError(f"{name} must be finite and {takes}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: positions count as ``position / factor``.

    Chen et al., 2023, https://arxiv.org/abs/2306.15595.

    Attributes:
      factor: finite and positive.

    Raises:
      ValueError: ``factor`` is not.
      TypeError: ``factor`` is no Python number.

    Example:
      >>> from axattn.rotary import LinearScaling, rotary_frequencies
      >>> rotary_frequencies(4, scaling=LinearScaling(2.0)).tolist()
      [0.5, 0.005]
    """

    factor: float

    def __post_init__(self):
        _check_real("LinearScaling.factor", self.factor)

    def _scale(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rule: interpolate slow pairs, leave fast ones, blend those between.

    The model is that of https://arxiv.org/abs/2407.21783. A pair that turns fewer than
    ``low_freq_factor`` times in ``original_max_position`` tokens is slowed down by ``factor``; one
    that turns more than ``high_freq_factor`` times is left alone. The names are those of the
    ``rope_scaling`` entry of a Llama 3.1 configuration; its values there are 8, 1, 4 and 8192.

    Attributes:
      factor: how much slow pairs are slowed down.
      low_freq_factor: turns in the original context below which a pair is slow.
      high_freq_factor: turns above which it is fast; more than ``low_freq_factor``.
      original_max_position: tokens of the original context.

    Raises:
      ValueError: a number that is not finite and positive; ``low_freq_factor`` is not the lesser.
      TypeError: no Python numbers, or an ``original_max_position`` that is no integer.

    Example:
      >>> from axattn.rotary import Llama3Scaling, rotary_frequencies
      >>> llama = Llama3Scaling(8.0, 1.0, 4.0, original_max_position=8192)
      >>> plain = rotary_frequencies(128, base=500000.0)
      >>> (plain / rotary_frequencies(128, 500000.0, llama)).round(2)[[0, 32, 63]].tolist()
      [1.0, 2.69, 8.0]
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        _check_real("Llama3Scaling.factor", self.factor)
        _check_real("Llama3Scaling.low_freq_factor", self.low_freq_factor)
        _check_real("Llama3Scaling.high_freq_factor", self.high_freq_factor)
        check_count("Llama3Scaling.original_max_position", self.original_max_position)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "Llama3Scaling.low_freq_factor must be less than high_freq_factor, got "
                f"{self.low_freq_factor!r} and {self.high_freq_factor!r}"
            )

    def _scale(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        turns = self.original_max_position * frequencies / (2 * np.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN: interpolation by parts, and a factor on attention.

    Peng et al., 2023, https://arxiv.org/abs/2309.00071. A pair that turns more than ``beta_fast``
    times in ``original_max_position`` tokens is left alone, one that turns fewer than ``beta_slow``
    times is slowed down by ``factor``; between them, the share changes linearly with the pair's
    index. ``truncate`` rounds the two ends of that ramp outward to whole indices (YaRN's own code
    does; gpt-oss does not).

    ``attention_factor`` sets the factor on cosine and sine outright. Otherwise ``mscale`` and
    ``mscale_all_dim`` (DeepSeek) or, without both of them, the paper's rule give it: see
    `yarn_attention_factor`. ``mscale_all_dim`` also sets `yarn_softmax_scale`.

    Attributes:
      factor: how much slow pairs are slowed down.
      original_max_position: tokens of the original context.
      beta_fast: turns in the original context above which a pair is left alone.
      beta_slow: turns below which it is slowed down; less than ``beta_fast``.
      attention_factor: of cosine and sine; None: by the two that follow, or the paper's rule.
      mscale: DeepSeek's; None or 0: absent.
      mscale_all_dim: likewise.
      truncate: round the ends of the ramp outward to whole indices.

    Raises:
      ValueError: a number that is not finite and positive (the two mscales may be 0);
        ``beta_slow`` is not the lesser.
      TypeError: no Python numbers, or an ``original_max_position`` that is no integer.

    Example:
      >>> from axattn.rotary import RotaryEmbedding, YarnScaling, yarn_attention_factor
      >>> yarn = YarnScaling(4.0, original_max_position=4096)
      >>> round(yarn_attention_factor(yarn), 3)
      1.139
      >>> rope = RotaryEmbedding(base=10000.0, scaling=yarn)  # for a layer's rope=
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_real("YarnScaling.factor", self.factor)
        check_count("YarnScaling.original_max_position", self.original_max_position)
        _check_real("YarnScaling.beta_fast", self.beta_fast)
        _check_real("YarnScaling.beta_slow", self.beta_slow)
        if not self.beta_slow < self.beta_fast:
            raise ValueError(
                "YarnScaling.beta_slow must be less than beta_fast, got "
                f"{self.beta_slow!r} and {self.beta_fast!r}"
            )
        if self.attention_factor is not None:
            _check_real("YarnScaling.attention_factor", self.attention_factor)
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                _check_real(f"YarnScaling.{name}", getattr(self, name), zero=True)

    def _scale(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        if base <= 1.0:
            raise ValueError(f"base must be greater than 1 with YarnScaling, got {base!r}")
        half = len(frequencies)

        def find_index(times: float) -> float:
            """Return the index, a fraction, of the pair that turns so many times in the context."""
            slowest = self.original_max_position / (2 * math.pi * times)
            return half * math.log(slowest) / math.log(base)

        start, end = find_index(self.beta_fast), find_index(self.beta_slow)
        if self.truncate:
            start, end = math.floor(start), math.ceil(end)
        # The upper limit is the number of features, not of pairs: checkpoints were trained so.
        start, end = max(start, 0), min(end, 2 * half - 1)
        ramp = np.clip((np.arange(half) - start) / max(end - start, 1e-3), 0.0, 1.0)
        return frequencies * ((1.0 - ramp) + ramp / self.factor)


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def _check_scaling(scaling) -> None:
    if scaling is not None and not isinstance(scaling, Scaling):
        raise TypeError(
            "scaling must be None, LinearScaling, Llama3Scaling or YarnScaling, "
            f"got {type(scaling).__name__}"
        )


def rotary_frequencies(
    head_dim: int, base: float = 10000.0, scaling: Scaling | None = None
) -> np.ndarray:
    """Compute the angle per position, in radians, of each pair of features.

    Args:
      head_dim: the number of features that are rotated (``rotary_dim`` where that is less than
        the head size); even.
      base: the geometric base, "theta" in some configurations.
      scaling: how the frequencies are changed for contexts longer than those trained on.

    Returns:
      numpy float64 ``[head_dim / 2]``, fastest first; computed on the host.

    Raises:
      ValueError: ``head_dim`` odd or not positive, ``base`` not finite and positive (with
        `YarnScaling`, greater than 1).
      TypeError: ``head_dim``, ``base`` or ``scaling`` of another type.

    Example:
      >>> from axattn.rotary import rotary_frequencies
      >>> rotary_frequencies(8, base=10000.0).tolist()
      [1.0, 0.1, 0.01, 0.001]
    """
    head_dim = check_count("head_dim", head_dim)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, for features are rotated in pairs: {head_dim}")
    _check_real("base", base)
    _check_scaling(scaling)
    frequencies = float(base) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return frequencies if scaling is None else scaling._scale(frequencies, float(base))


def _compute_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's m: ``0.1 mscale ln(factor) + 1``, or 1 where ``factor`` is at most 1."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(scaling: Scaling | None) -> float:
    """Return the factor of cosine and sine: 1 for everything but YaRN.

    In order: ``scaling.attention_factor``; the ratio ``m(mscale) / m(mscale_all_dim)`` where both
    are given and not 0; the paper's ``m(1)``; with ``m(a) = 0.1 a ln(factor) + 1``, or 1 where
    factor <= 1. Query and key both carry it, so that logits grow by its square.

    Args:
      scaling: as for `rotary_frequencies`.

    Raises:
      TypeError: ``scaling`` of another type.

    Example:
      >>> from axattn.rotary import YarnScaling, yarn_attention_factor
      >>> round(yarn_attention_factor(YarnScaling(16.0, original_max_position=4096)), 4)
      1.2773
      >>> yarn_attention_factor(None)
      1.0
    """
    _check_scaling(scaling)
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return _compute_mscale(scaling.factor, scaling.mscale) / _compute_mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return _compute_mscale(scaling.factor, 1.0)


def yarn_softmax_scale(head_dim: int, scaling: Scaling | None) -> float:
    """Return the softmax scale of a DeepSeek-style model, to pass as ``scale=`` to attention.

    ``head_dim ** -0.5`` times ``m(mscale_all_dim) ** 2`` (`yarn_attention_factor` defines m); the
    plain ``head_dim ** -0.5`` where scaling is not YaRN or has no ``mscale_all_dim``.

    Args:
      head_dim: the whole size of a query head, features that are not rotated included (192 in
        DeepSeek V3: 128 + 64).
      scaling: as for `rotary_frequencies`.

    Raises:
      ValueError: ``head_dim`` is not positive.
      TypeError: ``head_dim`` or ``scaling`` of another type.

    Example:
      >>> from axattn.rotary import YarnScaling, yarn_softmax_scale
      >>> v3 = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
      >>> round(yarn_softmax_scale(192, v3) * 192**0.5, 4)  # times 1 / sqrt(192)
      1.8739
    """
    scale = check_count("head_dim", head_dim) ** -0.5
    _check_scaling(scaling)
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        scale *= _compute_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rotary_cos_sin(
    positions: Integer[Array, "*batch T"], frequencies: np.ndarray, dtype=jnp.float32
) -> tuple[Float[Array, "*batch T half"], Float[Array, "*batch T half"]]:
    """Compute cosine and sine of ``positions * frequencies``, right for every int32 position.

    A float32 product ``position * frequency`` is off by 0.03 radians at a position of a million.
    Here whole turns are dropped in integer arithmetic first, so the error stays at a few float32
    ulps (of 1) for any position, without float64.

    Args:
      positions: integers ``[..., T]``, any sign.
      frequencies: ``[half]``, radians per position, on the host: see `rotary_frequencies`.
      dtype: of the result: float32, or float64 where that is enabled.

    Returns:
      Cosine and sine, each ``[..., T, half]``.

    Raises:
      TypeError: ``positions`` are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn.rotary import rotary_cos_sin, rotary_frequencies
      >>> cos, sin = rotary_cos_sin(jnp.array([0, 1, 1_000_000]), rotary_frequencies(64))
      >>> cos.shape, bool(jnp.allclose(cos**2 + sin**2, 1.0))
      ((3, 32), True)
    """
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(
            f"positions must be integers, got dtype {positions.dtype} (for fractional positions "
            "use LinearScaling)"
        )
    frequencies = np.expand_dims(np.asarray(frequencies, np.float64), tuple(range(positions.ndim)))
    positions = positions[..., None]
    if jnp.dtype(dtype) == jnp.float64:
        angle = positions.astype(jnp.float64) * frequencies
        return jnp.cos(angle), jnp.sin(angle)
    # A turn is 2**32 steps. The product of whole steps wraps around modulo 2**32, that is, modulo
    # a turn, and is exact; what the rounding to whole steps left over is at most half a step.
    steps = frequencies / (2 * np.pi) * 2.0**32
    whole = np.rint(steps)
    left_over = ((steps - whole) * 2.0**-32).astype(np.float32)
    wrapped = positions.astype(jnp.uint32) * np.mod(whole, 2.0**32).astype(np.uint32)
    turns = jax.lax.bitcast_convert_type(wrapped, jnp.int32).astype(jnp.float32) * 2.0**-32
    turns = turns + positions.astype(jnp.float32) * left_over
    angle = turns * np.float32(2 * np.pi)
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def _check_arguments(x, positions, rotary_dim) -> int:
    """Check the arguments of a rotation and return the number of features that it rotates."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating-point, got dtype {x.dtype}")
    if x.ndim < 3:
        raise ValueError(f"x must be [..., T, N, H], got shape {x.shape}")
    *batch, length, _, head_dim = x.shape
    if rotary_dim is None:
        if head_dim % 2 or not head_dim:
            raise ValueError(
                f"x must have an even head size H, got {head_dim} (shape {x.shape}); rotary_dim "
                "rotates fewer features"
            )
        rotary_dim = head_dim
    elif rotary_dim > head_dim:
        raise ValueError(f"rotary_dim must be at most the head size {head_dim}, got {rotary_dim}")
    fits = positions.ndim >= 1 and positions.shape[-1] == length
    fits = fits and positions.ndim <= x.ndim - 2
    if fits:
        trailing = x.shape[:-3][x.ndim - 2 - positions.ndim :]
        fits = all(p in (1, b) for p, b in zip(positions.shape[:-1], trailing, strict=True))
    if not fits:
        raise ValueError(
            f"positions must be [T] or [..., T] that broadcasts to {tuple(batch) + (length,)}, "
            f"the shape of x {x.shape} without heads and features; got shape {positions.shape}"
        )
    return rotary_dim


def apply_rotary(
    x: Float[Array, "*batch T N H"],
    positions: Integer[Array, "*leading T"],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    rotary_dim: int | None = None,
    output_halves: bool = False,
) -> Float[Array, "*batch T N H"]:
    """Rotate queries or keys by their positions (RoPE, https://arxiv.org/abs/2104.09864).

    Args:
      x: ``[..., T, N, H]``, floating-point.
      positions: integers ``[T]``, or ``[..., T]`` that broadcast to x's leading dimensions.
      base: the geometric base of the frequencies.
      interleaved: pairs are neighbours ``(2i, 2i + 1)`` rather than ``(i, i + rotary_dim / 2)``.
      scaling: see `rotary_frequencies`; YaRN's `yarn_attention_factor` is multiplied in.
      rotary_dim: rotate only this many leading features, with the frequencies of a head of this
        size; the others pass through. None: all H.
      output_halves: with ``interleaved``, leave the result as two halves (see the module).

    Returns:
      ``[..., T, N, H]`` in x's dtype. Cosine, sine and the products are float32 (float64 for a
      float64 x).

    Raises:
      ValueError: H or ``rotary_dim`` odd, ``rotary_dim`` > H, positions of a shape that does not
        fit, ``base`` not finite and positive, ``output_halves`` without ``interleaved``.
      TypeError: ``x`` not floating-point, ``positions`` not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn.rotary import apply_rotary
      >>> query, key = jnp.ones((1, 3, 2, 8)), jnp.ones((1, 3, 2, 8))  # [B, T, N, H]
      >>> q, k = (apply_rotary(x, jnp.arange(3)) for x in (query, key))
      >>> scores = jnp.einsum("btnh,bsnh->bnts", q, k)[0, 0]
      >>> bool(jnp.allclose(scores[0, 1], scores[1, 2]))  # only differences of positions count
      True
    """
    return RotaryEmbedding(
        base=base,
        interleaved=interleaved,
        scaling=scaling,
        rotary_dim=rotary_dim,
        output_halves=output_halves,
    ).apply(x, positions)


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """The settings of `apply_rotary` as one hashable value, to hand to layers and to ``jit``.

    Attributes:
      base: the geometric base of the frequencies.
      interleaved: pairs are neighbours ``(2i, 2i + 1)`` rather than ``(i, i + rotary_dim / 2)``.
      scaling: None, `LinearScaling`, `Llama3Scaling` or `YarnScaling`.
      rotary_dim: rotate only this many leading features; None: all H.
      output_halves: with ``interleaved``, leave the result as two halves (see the module).

    Raises:
      ValueError: ``base`` not finite and positive (with `YarnScaling`, greater than 1),
        ``rotary_dim`` odd or not positive, ``output_halves`` without ``interleaved``.
      TypeError: a field of another type.

    Example:
      >>> import jax.numpy as jnp
      >>> from axattn.rotary import RotaryEmbedding
      >>> rope = RotaryEmbedding(base=500000.0, rotary_dim=32)
      >>> rope.apply(jnp.ones((2, 5, 4, 64)), jnp.arange(5)).shape
      (2, 5, 4, 64)
    """

    base: float = 10000.0
    interleaved: bool = False
    scaling: Scaling | None = None
    rotary_dim: int | None = None
    output_halves: bool = False

    def __post_init__(self):
        _check_real("base", self.base)
        _check_scaling(self.scaling)
        if isinstance(self.scaling, YarnScaling) and self.base <= 1.0:
            raise ValueError(f"base must be greater than 1 with YarnScaling, got {self.base!r}")
        if self.rotary_dim is not None and check_count("rotary_dim", self.rotary_dim) % 2:
            raise ValueError(f"rotary_dim must be even, got {self.rotary_dim}")
        if self.output_halves and not self.interleaved:
            raise ValueError("output_halves=True needs interleaved=True, got interleaved=False")

    def apply(
        self, x: Float[Array, "*batch T N H"], positions: Integer[Array, "*leading T"]
    ) -> Float[Array, "*batch T N H"]:
        """Call `apply_rotary` with these settings.

        Args:
          x: ``[..., T, N, H]``, floating-point.
          positions: integers ``[T]``, or ``[..., T]`` that broadcast to x's leading dimensions.

        Returns:
          ``[..., T, N, H]`` in x's dtype.

        Raises:
          ValueError: H odd or less than ``rotary_dim``, positions of a shape that does not fit.
          TypeError: ``x`` not floating-point, ``positions`` not integers.
        """
        x, positions = jnp.asarray(x), jnp.asarray(positions)
        return _rotate(x, positions, self)


# One program where nothing else is traced, instead of one for each operation.
@functools.partial(jax.jit, static_argnames="embedding", inline=True)
def _rotate(x: jax.Array, positions: jax.Array, embedding: RotaryEmbedding) -> jax.Array:
    rotary_dim = _check_arguments(x, positions, embedding.rotary_dim)
    dtype = choose_accumulator(x.dtype)
    cos, sin = rotary_cos_sin(
        positions, rotary_frequencies(rotary_dim, embedding.base, embedding.scaling), dtype
    )
    factor = yarn_attention_factor(embedding.scaling)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    # The same for every head, and along the leading dimensions that positions lack.
    axes = (*range(x.ndim - 2 - positions.ndim), -2)
    cos, sin = jnp.expand_dims(cos, axes), jnp.expand_dims(sin, axes)

    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    half = rotary_dim // 2
    if embedding.interleaved:
        pairs = rotated.reshape(*x.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    first, second = first.astype(dtype), second.astype(dtype)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if embedding.interleaved and not embedding.output_halves:
        result = jnp.stack(turned, axis=-1).reshape(rotated.shape)
    else:
        result = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([result.astype(x.dtype), rest], axis=-1)
