"""What the kernels are given: the call that arguments make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from axattn._arguments import normalize
from axattn._call import AttentionCall
from axattn._options import AttentionOptions


def make_call(
    query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, **options: Any
) -> AttentionCall:
    """The call that `axattn.dot_product_attention` makes of the same arguments."""
    return normalize(query, key, value, AttentionOptions(bias=bias, mask=mask, **options))[0]


def asked(question: Callable[[AttentionCall], Any], *shapes: Any, **options: Any) -> Any:
    """What ``question`` says of the call of arrays of these shapes; nothing is computed."""
    answers = []

    def ask(*arrays):
        answers.append(question(make_call(*arrays, **options)))
        return ()

    jax.eval_shape(ask, *shapes)
    return answers[0]
