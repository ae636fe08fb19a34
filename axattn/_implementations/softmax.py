"""The softmax of whole rows of scores, and the average of values that it weighs.

Scores are ``[B, K, G, T, S]``, in the accumulator's dtype, -inf where the mask forbids.
Compilers for TPUs and GPUs know ``exp(x - max(x)) / sum`` when nothing stands between its parts,
and then write the scores once. So the maximum starts at the least finite number, where others
replace a maximum of -inf afterwards, and the division is before the product with the values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("scores", "sinks", "factor"),
    meta_fields=("may_be_empty",),
)
@dataclasses.dataclass(frozen=True)
class MaskedScores:
    """Whole rows of scores, and what their softmax depends on besides."""

    scores: jax.Array  # [B, K, G, T, S], -inf where the mask forbids
    sinks: jax.Array | None  # [1, K, G, 1, 1], one more score of each head
    factor: jax.Array | None  # of the weights after the softmax: dropout, scales of values
    may_be_empty: bool  # whether a mask or a bias may forbid all of a row

    def scale(self, factor: jax.Array | None) -> MaskedScores:
        """Return these scores with weights that are multiplied by ``factor``, which is constant."""
        if factor is None:
            return self
        factor = factor.astype(self.scores.dtype)
        return dataclasses.replace(
            self, factor=factor if self.factor is None else self.factor * factor
        )

    def scale_weights(self, weights: jax.Array) -> jax.Array:
        return weights if self.factor is None else weights * self.factor


def compute_softmax(masked: MaskedScores) -> tuple[jax.Array, jax.Array]:
    """Return weights ``[B, K, G, T, S]``, without ``factor``, and the LSE ``[B, K, G, T]``.

    An empty row has weights 0 and an LSE of -inf.
    """
    powers, top = _exponentiate(masked)
    total, lse = _sum_powers(masked, powers, top)
    return powers / total, lse


def _exponentiate(masked: MaskedScores) -> tuple[jax.Array, jax.Array]:
    """Return ``exp(scores - top)`` and ``top [B, K, G, T, 1]``, the maximum or a sink."""
    scores = masked.scores
    least = jnp.finfo(scores.dtype).min
    # The maximum only shifts: it has no derivative. An empty row's is finite: exp(-inf) is 0.
    top = lax.reduce(lax.stop_gradient(scores), least, lax.max, (scores.ndim - 1,))[..., None]
    if masked.sinks is not None:
        top = jnp.maximum(top, lax.stop_gradient(masked.sinks))
    return jnp.exp(scores - top), top


def _sum_powers(
    masked: MaskedScores, powers: jax.Array, top: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return sums ``[B, K, G, T, 1]``, 1 of empty rows, and the LSE ``[B, K, G, T]``."""
    total = powers.sum(-1, keepdims=True)
    if masked.sinks is not None:
        total = total + jnp.exp(masked.sinks - top)
    if not masked.may_be_empty:
        return total, (jnp.log(total) + top)[..., 0]
    empty = total == 0
    total = jnp.where(empty, 1.0, total)  # before the logarithm, whose derivative would be NaN
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
    return total, lse[..., 0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def average_values(
    outputs: Callable[[jax.Array, jax.Array], jax.Array], masked: MaskedScores, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the values' averages by the softmax, and the LSE ``[B, K, G, T]``.

    ``outputs`` is the product of weights and values. It takes weights in the dtype of the values,
    but tangents of weights in the accumulator's: differentiated as written, the gradient of a
    16-bit weight is rounded to 16 bits (in float16 it may overflow), and where one weight is near
    1, what a row takes away from it no longer cancels.
    """
    weights, lse = compute_softmax(masked)
    return outputs(masked.scale_weights(weights).astype(value.dtype), value), lse


@functools.partial(average_values.defjvp, symbolic_zeros=True)
def _average_values_jvp(outputs, primals, tangents):
    """Return results and tangents; what a row takes away from its scores is found by its output.

    In reverse mode the gradient of the weights is then used in one place, and need not be in memory
    (Dao et al., arXiv 2205.14135, appendix B.2); the weights are, in the dtype of the values, and
    rounded they are used throughout, so that what they give to the output is what is taken away.
    Not so where the output has a factor that the softmax has not, and in float16, where small
    weights would vanish.
    """
    (masked, value), (dmasked, dvalue) = primals, tangents
    by_output = masked.factor is None and value.dtype != jnp.float16
    powers, top = _exponentiate(masked)
    total, lse = _sum_powers(masked, powers, top)
    weights = powers / total
    is_rounded = by_output and value.dtype != weights.dtype
    if is_rounded:
        # Behind the barrier the compiler cannot know more digits.
        weights = lax.optimization_barrier(weights.astype(value.dtype)).astype(weights.dtype)
    rounded = masked.scale_weights(weights).astype(value.dtype)
    out, dout = outputs(rounded, value), None
    weighted, dlse = _weigh_tangents(masked, dmasked, weights, top, total)
    if dlse is not None:
        if by_output:
            dout = -out * dlse[..., None]
            if is_rounded:
                dout = dout / _sum_shares(masked, weights, top, total)
        else:
            weighted = masked.scale_weights(_add(weighted, -weights * dlse[..., None]))
        if masked.may_be_empty:
            dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)  # whatever cotangent an LSE of -inf has
    if weighted is not None:
        dout = _add(dout, outputs(weighted, value.astype(weighted.dtype)))
    if not isinstance(dvalue, SymbolicZero):
        dout = _add(dout, outputs(rounded, dvalue))
    return (out, lse), (
        jnp.zeros_like(out) if dout is None else dout,
        jnp.zeros_like(lse) if dlse is None else dlse,
    )


def _sum_shares(masked, weights, top, total):
    """Sum rounded weights ``[B, K, G, T, 1]``, not quite 1, and the sink's share; 1 for empty rows.

    What a row takes away from its scores is divided by it: else a common offset of the values, or
    of the keys, would not cancel.
    """
    shares = weights.sum(-1, keepdims=True)
    if masked.sinks is not None:
        shares = shares + jnp.exp(masked.sinks - top) / total
    return jnp.where(shares == 0, 1.0, shares) if masked.may_be_empty else shares


def _weigh_tangents(masked, dmasked, weights, top, total):
    """Return the tangents of the scores times the weights, and those of the LSE; None for zeros."""
    weighted = dlse = None
    if not isinstance(dmasked.scores, SymbolicZero):
        weighted = weights * dmasked.scores
        dlse = weighted.sum(-1)
    if not (masked.sinks is None or isinstance(dmasked.sinks, SymbolicZero)):
        shares = jnp.exp(masked.sinks - top) / total
        dlse = _add(dlse, (shares * dmasked.sinks)[..., 0])
    return weighted, dlse


def _add(x: jax.Array | None, y: jax.Array) -> jax.Array:
    return y if x is None else x + y
