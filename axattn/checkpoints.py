"""Turning the parameters of one model into those of another.

`mha_to_gqa` and `mha_to_mqa` make grouped- or multi-query attention of multi-head attention. The
recipe is that of the GQA paper (Ainslie et al., 2023, https://arxiv.org/abs/2305.13245): each key
and value head of the new model is the mean of the heads it replaces; then training goes on for a
few percent of the original steps. `unstack_layers` and `stack_layers` turn a model whose layers
are scanned into one whose layers are apart, as generation wants them, and back.
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
