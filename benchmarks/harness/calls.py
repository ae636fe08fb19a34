"""What the kernels are given: the call that arguments make."""

from __future__ import annotations

import inspect
from typing import Any

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
