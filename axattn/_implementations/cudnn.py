"""``"cudnn"``: jax.nn's cuDNN flash attention, for the calls that its rules allow.

Read from ``jax.nn.dot_product_attention`` and jax's cuDNN wrapper: fp16 or bf16, head size a
multiple of 8 and at most 128 (256 on Hopper and later), one head size for keys and values, left
windows under causal only. Everything it would ignore or answer differently is refused by name.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from axattn._call import AttentionCall
from axattn._mask_parts import Causal, Dense, Lengths, Window
from axattn._masks import compute_mask_tile
from axattn._typing import present


def find_refusal(call: AttentionCall) -> str | None:
    """Say why this call cannot go to cuDNN, or None."""
    for what, asked in (
        ("a cache", call.stored is not None),
        ("logits_soft_cap", call.logits_soft_cap is not None),
        ("sinks", call.sinks is not None),
        ("alibi_slopes", call.alibi_slopes is not None),
        ("dropout_rate", call.dropout_key is not None),
        ("q_offset or positions", call.q_positions is not None or call.kv_positions is not None),
        ("return_residual (jax.nn rounds the LSE to the input dtype)", call.return_residual),
        ("precision", call.precision is not None),
        ("a traced scale", call.traced_scale is not None),
    ):
        if asked:
            return f"does not support {what}"
    sizes = (call.batch, call.q_len, call.kv_len)
    if not all(isinstance(size, int) for size in sizes):
        return f"needs sizes that are known, got {', '.join(map(str, sizes))}"
    if call.query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"needs float16 or bfloat16, got {call.query.dtype}"
    if call.head_dim != call.value_head_dim:
        return f"needs h == H, got H={call.head_dim} and h={call.value_head_dim}"
    if call.head_dim % 8 or call.head_dim > 256:
        return f"needs a head size that is a multiple of 8 and at most 256, got {call.head_dim}"
    return _find_mask_refusal(call) or _find_device_refusal(call)


def _find_mask_refusal(call: AttentionCall) -> str | None:
    kinds = [type(part) for part in call.mask.parts]
    arrays = [("mask", part.array) for part in call.mask.parts if isinstance(part, Dense)]
    if call.bias is not None:
        arrays.append(("bias", call.bias))
    for name, array in arrays:
        if array.shape[2:] != (call.q_len, call.kv_len):
            return f"does not support a {name} array that broadcasts along T or S"
        if call.q_len % 2 or call.kv_len % 2:
            return f"does not support a {name} array with odd T or S (training refuses it)"
    for part in call.mask.parts:
        if type(part) not in (Causal, Window, Lengths, Dense):
            return f"does not support a {type(part).__name__.lower()} mask"
        if isinstance(part, Causal) and (jnp.ndim(part.offset) or part.offset != 0):
            return "does not support a causal mask with an offset"
        if isinstance(part, Window) and (part.left is None or part.right is None):
            return "does not support a window open to one side"
        if isinstance(part, Window) and part.right != 0 and Causal not in kinds:
            return "does not support a window to the right without causal"
        if isinstance(part, Window) and call.q_len > call.kv_len + present(part.left):
            return "does not support a window that leaves rows without keys"
    if len(set(kinds)) != len(kinds):
        return "does not support two masks of one kind"
    if Window in kinds and (Lengths in kinds or Dense in kinds):
        return "does not support a window together with lengths or a mask array"
    if Lengths in kinds and Dense in kinds:
        return "does not support lengths together with a mask array"
    return None


def _find_device_refusal(call: AttentionCall) -> str | None:
    if jax.default_backend() != "gpu":
        return "needs an attached NVIDIA GPU: jax.nn reads its compute capability while tracing"
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None:
        return "needs an NVIDIA GPU"
    if float(capability) < 8.0:
        return f"needs compute capability 8.0 or later, got {capability}"
    if call.head_dim > 128 and float(capability) < 9.0:
        return f"needs Hopper or later for head sizes above 128, got {call.head_dim}"
    return None


def attend(call: AttentionCall) -> tuple[jax.Array, None]:
    options: dict = {}
    mask = None
    for part in call.mask.parts:
        if isinstance(part, Causal):
            options["is_causal"] = True
        elif isinstance(part, Window):
            # (L, 0) means causal here; jax.nn without is_causal would look at the future.
            options["is_causal"] = True
            options["local_window_size"] = (int(present(part.left)), 0)
        elif isinstance(part, Lengths):
            options["query_seq_lengths"] = _broadcast_lengths(part.q, call.q_len, call)
            options["key_value_seq_lengths"] = _broadcast_lengths(part.kv, call.kv_len, call)
        elif isinstance(part, Dense):
            mask = part.array
    try:
        out = jax.nn.dot_product_attention(
            call.query,
            present(call.key),
            present(call.value),
            call.bias,
            mask,
            scale=call.scale,
            implementation="cudnn",
            **options,
        )
    except RuntimeError as error:
        # No cuDNN, or one too old: jax.nn finds out while tracing.
        raise NotImplementedError(f'implementation "cudnn": jax.nn refuses: {error}') from error
    filled = _find_rows_with_keys(call, options, mask)
    return out if filled is None else jnp.where(filled, out, 0), None


def _broadcast_lengths(length, default: int, call: AttentionCall) -> jax.Array:
    length = default if length is None else jnp.clip(jnp.asarray(length, jnp.int32), 0, default)
    return jnp.broadcast_to(jnp.asarray(length, jnp.int32), (call.batch,))


def _find_rows_with_keys(call: AttentionCall, options: dict, mask) -> jax.Array | None:
    """Find the rows ``[B, T, N or 1, 1]`` with keys; cuDNN leaves the others undefined."""
    if mask is not None:
        q, kv = call.spans()
        tile = present(compute_mask_tile(call.mask, q, kv))
        rows = jnp.broadcast_to(tile, (*mask.shape[:2], call.q_len, call.kv_len)).any(-1)
        return rows.transpose(0, 2, 1)[..., None]
    if "query_seq_lengths" in options:
        slots = jnp.arange(call.q_len)[None]
        filled = slots < options["query_seq_lengths"][:, None]
        filled &= options["key_value_seq_lengths"][:, None] > 0
        return filled[..., None, None]
    return None
