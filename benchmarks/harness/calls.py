"""What the kernels are given: the call that arguments make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from axattn import dot_product_attention
from axattn.arguments import normalize
from axattn.call import AttentionCall


def make_call(*args: Any, **kwargs: Any) -> AttentionCall:
    """The call that `axattn.dot_product_attention` makes of the same arguments."""
    bound = inspect.signature(dot_product_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    del arguments["implementation"]
    return normalize(**arguments)[0]


def asked(question: Callable[[AttentionCall], Any], *shapes: Any, **options: Any) -> Any:
    """What ``question`` says of the call of arrays of these shapes; nothing is computed."""
    answers = []

    def ask(*arrays):
        answers.append(question(make_call(*arrays, **options)))
        return ()

    jax.eval_shape(ask, *shapes)
    return answers[0]
