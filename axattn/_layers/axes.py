"""Logical names of the axes of the layers' parameters: what rules map to axes of a mesh.

    embed       features of inputs and outputs        heads       query heads, N
    kv_heads    key/value heads, K                    head_dim    features of a head
    q_lora, kv_lora   features of latent attention's latents (of tokens, not of heads)

For tensor parallelism ``heads`` goes to the axis of the model, and ``kv_heads`` as well where its
size divides K; else to None: each device then has all K heads' projections, and reads its own.
"""

from __future__ import annotations

_HEADS = {
    "query": ("embed", "heads", "head_dim"),
    "key": ("embed", "kv_heads", "head_dim"),
    "value": ("embed", "kv_heads", "head_dim"),
    "query_down": ("embed", "q_lora"),
    "query_up": ("q_lora", "heads", "head_dim"),
    "kv_down": ("embed", "kv_lora"),
    "key_up": ("kv_lora", "heads", "head_dim"),
    "value_up": ("kv_lora", "heads", "head_dim"),
}

LOGICAL_AXES: dict[tuple[str, ...], tuple[str, ...]] = {
    **{(name, "kernel"): axes for name, axes in _HEADS.items()},
    **{(name, "bias"): axes[1:] for name, axes in _HEADS.items()},
    ("out", "kernel"): ("heads", "head_dim", "embed"),
    ("out", "bias"): ("embed",),
    ("query_ln", "scale"): ("head_dim",),
    ("query_ln", "bias"): ("head_dim",),
    ("key_ln", "scale"): ("head_dim",),
    ("key_ln", "bias"): ("head_dim",),
    ("query_norm", "scale"): ("q_lora",),
    ("kv_norm", "scale"): ("kv_lora",),
    ("sinks",): ("heads",),
}

# Of norms over all heads' features together, in place of those above.
ALL_HEADS_NORM_AXES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("query_ln", "scale"): ("heads", "head_dim"),
    ("key_ln", "scale"): ("kv_heads", "head_dim"),
}
