"""Rotary position embeddings on BTNH arrays (RoPE, Su et al., 2021).

RoPE is https://arxiv.org/abs/2104.09864. Pair ``i`` of a head's features is a point in the plane
and is turned by the angle ``position * frequency[i]``, ``frequency[i] = base ** (-2 i / R)`` for
the ``R`` features that are rotated. A dot product of a rotated query and a rotated key then depends
on the difference of their positions only.

Which features form a pair is a convention of the checkpoint:

=================  ======================  =================================================
layout             pair ``i``              where
=================  ======================  =================================================
split-half         ``(i, i + R / 2)``      Llama, GPT-NeoX, Gemma, Qwen
``interleaved``    ``(2i, 2i + 1)``        RoFormer, GPT-J, Llama as published by Meta,
                                           DeepSeek
``output_halves``  in ``(2i, 2i + 1)``,    DeepSeek as transformers runs it
                   out ``(i, i + R / 2)``
=================  ======================  =================================================

``output_halves`` reads interleaved pairs and leaves the results as two halves, even features
then odd ones. Attention scores are those of ``interleaved``, if query and key are treated alike;
the arrays themselves (and so a KV cache filled by one and read by the other) are not.

Long contexts: `LinearScaling` (position interpolation, https://arxiv.org/abs/2306.15595),
`Llama3Scaling` (Llama 3.1) and `YarnScaling` (https://arxiv.org/abs/2309.00071) change the
frequencies; ``Scaling`` is the type of these three. YaRN also makes attention sharper, which models
write in one of two ways:

* Llama-style models multiply cosine and sine by `yarn_attention_factor`. `apply_rotary` does so.
* DeepSeek V2/V3 set ``mscale`` and ``mscale_all_dim`` to the same value. The factor on cosine and
  sine is then 1, and the softmax scale is to be replaced by `yarn_softmax_scale`, which reaches
  the features that are not rotated too. That is the caller's to pass as ``scale=``.
"""

from axattn._rotary import (
    LinearScaling,
    Llama3Scaling,
    RotaryEmbedding,
    Scaling,
    YarnScaling,
    apply_rotary,
    rotary_cos_sin,
    rotary_frequencies,
    yarn_attention_factor,
    yarn_softmax_scale,
)

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "RotaryEmbedding",
    "Scaling",
    "YarnScaling",
    "apply_rotary",
    "rotary_cos_sin",
    "rotary_frequencies",
    "yarn_attention_factor",
    "yarn_softmax_scale",
]
