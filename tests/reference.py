"""Attention and its gradients in float64 on the host: what every result is measured against.

Written from the definitions with numpy alone: whole T x S arrays, repeated key/value heads, no
line of the library. It takes the arguments of ``axattn.dot_product_attention``, except that masks
are arrays or the options below, and that dropout is given as the pattern of scores that are kept.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


def f64(x):
    return None if x is None else np.asarray(x).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Everything about one call, float64; scores and weights are ``[..., N, T, S]``."""

    out: np.ndarray
    lse: np.ndarray
    weights: np.ndarray
    allowed: np.ndarray
    inputs: dict

    def gradients(self, dout, dlse=None, *, of_magnitudes: bool = False) -> dict[str, np.ndarray]:
        """Gradients of ``sum(dout * out) + sum(dlse * lse)`` by name of the argument.

        ``of_magnitudes``: with every term of every sum positive instead. That is what rounding is
        relative to where terms cancel.
        """
        i = self.inputs
        query, key, value = i["query"], i["key"], i["value"]
        heads, kv_heads = query.shape[-2], key.shape[-2]
        group = heads // kv_heads
        keys, values = (np.repeat(x, group, axis=-2) for x in (key, value))
        dout = f64(dout)
        dlse = np.zeros(self.lse.shape) if dlse is None else f64(dlse)
        dlse = np.where(np.isfinite(self.lse), dlse, 0.0).swapaxes(-1, -2)[..., None]

        size = np.abs if of_magnitudes else np.asarray
        query, keys, values, dout, dlse = map(size, (query, keys, values, dout, dlse))
        p, kept = self.weights, i["kept"]
        dp = _einsum("...tnh,...snh->...nts", dout, values) * kept
        mean = (p * dp).sum(-1, keepdims=True)
        shared = dlse + mean if of_magnitudes else dlse - mean
        dscores = p * (dp + shared)
        draw = dscores
        if i["cap"] is not None:
            draw = dscores * (1 - np.tanh(i["dots"] * i["scale"] / i["cap"]) ** 2)
        ddots = draw * size(i["scale"])
        grads = {
            "query": _einsum("...nts,...snh->...tnh", ddots, keys),
            "key": _group_sum(_einsum("...nts,...tnh->...snh", ddots, query), group),
            "value": _group_sum(_einsum("...nts,...tnh->...snh", p * kept, dout), group),
            "scale": (draw * size(i["dots"])).sum(),
        }
        if i["bias"] is not None:
            grads["bias"] = _sum_to(dscores, i["bias"].shape)
        if i["sinks"] is not None:
            lse = self.lse.swapaxes(-1, -2)[..., None]
            sink = i["sinks"][:, None, None]
            share = np.exp(sink - np.where(np.isneginf(lse), np.inf, lse))
            grads["sinks"] = _sum_to(share * shared, (heads, 1, 1))[:, 0, 0]
        return grads

    def scores_in_out(self) -> np.ndarray:
        """What one unit of relative rounding of every score may change of each output, at most.

        d out / d score = p (kept v - out). A score is rounded relative to the larger of Q K^T and
        of what is added to it.
        """
        i = self.inputs
        group = i["query"].shape[-2] // i["key"].shape[-2]
        values = np.abs(np.repeat(i["value"], group, axis=-2))
        lse = self.lse.swapaxes(-1, -2)[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(self.weights > 0, np.abs(np.log(self.weights) + lse), 0.0)
        moved = self.weights * np.maximum(score, np.abs(i["scale"] * i["dots"]))
        through_values = _einsum("...nts,...snh->...tnh", moved * i["kept"], values)
        return through_values + moved.sum(-1).swapaxes(-1, -2)[..., None] * np.abs(self.out)


# By BLAS, which is many times as fast.
_einsum = functools.partial(np.einsum, optimize=True)


def _group_sum(x, group):
    """``[..., S, N, size]`` to ``[..., S, K, size]``: query head n belongs to head n // G."""
    *rest, heads, size = x.shape
    return x.reshape(*rest, heads // group, group, size).sum(-2)


def _sum_to(x, shape):
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1), keepdims=True)


def attend(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    logits_soft_cap=None,
    sinks=None,
    alibi_slopes=None,
    q_offset=None,
    q_positions=None,
    kv_positions=None,
    dropout_rate=0.0,
    kept=None,
    **visibility,
) -> Reference:
    query, key, value, bias = f64(query), f64(key), f64(value), f64(bias)
    *lead, q_len, heads, size = query.shape
    kv_len, kv_heads = key.shape[-3:-1]
    scale = 1 / np.sqrt(size) if scale is None else float(scale)
    keys, values = (np.repeat(x, heads // kv_heads, axis=-2) for x in (key, value))
    positions = _positions(q_len, kv_len, q_offset, q_positions, kv_positions)

    dots = _einsum("...tnh,...snh->...nts", query, keys)
    scores = scale * dots
    if logits_soft_cap is not None:
        scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        distance = np.abs(positions[0][..., :, None] - positions[1][..., None, :])
        scores = scores - f64(alibi_slopes)[..., None, None] * distance[..., None, :, :]
    allowed = np.broadcast_to(
        visible(q_len, kv_len, positions=positions, mask=mask, **visibility), scores.shape
    )
    scores = np.where(allowed, scores, -np.inf)

    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = f64(sinks)
        top = np.maximum(top, sinks[:, None, None])
    top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0].swapaxes(-1, -2)
    weights = weights / np.where(total == 0, 1.0, total)
    kept = np.ones(1) if kept is None else f64(kept) / (1 - dropout_rate)
    out = _einsum("...nts,...snh->...tnh", weights * kept, values)
    inputs = dict(query=query, key=key, value=value, bias=bias, sinks=sinks)
    inputs.update(scale=scale, cap=logits_soft_cap, dots=dots, kept=kept)
    return Reference(out, lse, weights, allowed, inputs)


def _positions(q_len, kv_len, q_offset, q_positions, kv_positions):
    if q_positions is None:
        q_positions = np.arange(q_len)
        if q_offset is not None:
            q_positions = q_positions + np.asarray(q_offset)[..., None]
    kv_positions = np.arange(kv_len) if kv_positions is None else kv_positions
    return np.asarray(q_positions), np.asarray(kv_positions)


def visible(
    q_len,
    kv_len,
    *,
    positions=None,
    mask=None,
    is_causal=False,
    causal_offset=None,
    prefix=None,
    local_window_size=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
):
    """Who sees whom: boolean, broadcastable to ``[..., N, T, S]``.

    ``causal_offset`` and ``prefix`` (ints, or one per batch row) are ``Mask.causal(offset)`` and
    ``Mask.prefix(n)``.
    """
    qp, kp = positions or (np.arange(q_len), np.arange(kv_len))
    i, j = qp[..., None, :, None], kp[..., None, None, :]  # positions
    t, s = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]  # slots

    def per_row(numbers):
        return np.asarray(numbers)[..., None, None, None]

    seen = np.ones((1, q_len, kv_len), bool)
    if mask is not None:
        seen = seen & np.asarray(mask)
    if is_causal:
        seen = seen & (j <= i)
    if causal_offset is not None:
        seen = seen & (j <= i + per_row(causal_offset))
    if prefix is not None:
        seen = seen & ((j <= i) | (j < per_row(prefix)))
    if local_window_size is not None:
        pair = local_window_size
        left, right = pair if isinstance(pair, tuple) else (pair, pair)
        seen = seen & (True if left is None else i - j <= left)
        seen = seen & (True if right is None else j - i <= right)
    if query_seq_lengths is not None:
        seen = seen & (t < per_row(query_seq_lengths))
    if key_value_seq_lengths is not None:
        seen = seen & (s < per_row(key_value_seq_lengths))
    if query_segment_ids is not None:
        q_ids = np.asarray(query_segment_ids)
        kv_ids = q_ids if key_value_segment_ids is None else np.asarray(key_value_segment_ids)
        seen = seen & (q_ids[..., None, :, None] == kv_ids[..., None, None, :])
    return seen


def kept(key_words, lead, heads, q_len, kv_len, rate, *, broadcast=False):
    """Dropout's pattern ``[..., N, T, S]``, True where a weight is kept.

    ``key_words`` are two uint32. A score is kept where the first word of Threefry-2x32-20 at
    counter ((row of the batch * N + head) * T + query slot, key slot) is at least rate * 2^32;
    ``broadcast``: (query slot, key slot) for every row and head.
    """
    rows = np.arange(q_len)
    if not broadcast:
        batch = int(np.prod(lead, dtype=int))
        rows = np.arange(batch * heads * q_len).reshape(*lead, heads, q_len)
    bits = threefry_2x32(key_words, rows[..., None], np.arange(kv_len))
    return bits >= round(rate * 2**32)


def threefry_2x32(key_words, high, low):
    """First word of Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), in 64-bit integers."""
    word = 0xFFFFFFFF
    ks = [int(key_words[0]), int(key_words[1])]
    ks.append(ks[0] ^ ks[1] ^ 0x1BD11BDA)
    x, y = np.broadcast_arrays(np.asarray(high, np.int64), np.asarray(low, np.int64))
    x, y = (x + ks[0]) & word, (y + ks[1]) & word
    for r in range(20):
        turn = ((13, 15, 26, 6), (17, 29, 16, 24))[r // 4 % 2][r % 4]
        x = (x + y) & word
        y = ((y << turn | y >> (32 - turn)) & word) ^ x
        if r % 4 == 3:
            n = r // 4 + 1
            x, y = (x + ks[n % 3]) & word, (y + ks[(n + 1) % 3] + n) & word
    return x
