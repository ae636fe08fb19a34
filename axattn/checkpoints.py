"""Conversion of one model's parameters to another's.

`mha_to_gqa` and `mha_to_mqa` make grouped- or multi-query attention of multi-head attention. The
recipe is that of the GQA paper (Ainslie et al., 2023, https://arxiv.org/abs/2305.13245): each key
and value head of the new model is the mean of the heads it replaces; then training goes on for a
few percent of the original steps. `unstack_layers` takes the layers of a scan apart, as generation
needs them, and `stack_layers` stacks them again.
"""

from axattn._checkpoints import (
    mha_to_gqa,
    mha_to_mqa,
    stack_layers,
    unstack_layers,
)

__all__ = [
    "mha_to_gqa",
    "mha_to_mqa",
    "stack_layers",
    "unstack_layers",
]
