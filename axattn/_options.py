"""The options of an attention call, as one value."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from axattn._masks import Mask
from axattn._typing import ArrayLike, Implementation, Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What `axattn.dot_product_attention` takes besides query, key and value.

    Names, order and defaults are those of that function, which documents each; a test compares
    them. Values are checked in `axattn._arguments`, where the shapes of the call are known.
    """

    bias: ArrayLike | None = None  # added to the scores, broadcastable to [..., N, T, S]
    mask: ArrayLike | Mask | None = None  # bool, True = attend, broadcastable likewise; or a Mask
    scale: ArrayLike | None = None  # of the dot products; 1 / sqrt(H) by default
    is_causal: bool = False  # key position <= query position
    query_seq_lengths: ArrayLike | None = None  # int [...], real query slots of each batch row
    key_value_seq_lengths: ArrayLike | None = None  # likewise of keys and values
    local_window_size: int | tuple[int | None, int | None] | None = None  # (left, right), inclusive
    implementation: Implementation | Sequence[Implementation] | None = None  # None: the fastest
    return_residual: bool = False  # also return the log-sum-exp
    logits_soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    sinks: ArrayLike | None = None  # [N], one extra logit per head
    query_segment_ids: ArrayLike | None = None  # int [..., T]
    key_value_segment_ids: ArrayLike | None = None  # int [..., S]
    dropout_rate: float = 0.0  # share of the weights that is dropped, in [0, 1)
    dropout_rng: ArrayLike | None = None  # a JAX key
    broadcast_dropout: bool = False  # one pattern for all batch rows and heads
    alibi_slopes: ArrayLike | None = None  # [N] or [..., N]
    q_offset: int | ArrayLike | None = None  # position of the first query, int or int [...]
    q_positions: ArrayLike | None = None  # int [..., T], instead of q_offset
    kv_positions: ArrayLike | None = None  # int [..., S]
    precision: Precision | None = None  # of the matrix products
    kv_split_size: int | None = None  # keys per part of a decode step
    is_projected: bool = False  # the query comes from a projection, the output goes into one

    @classmethod
    def parse(cls, function: str, **options: Any) -> AttentionOptions:
        """Return the options that a user gave to ``function`` by name.

        Raises:
          TypeError: there is no option of such a name.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(options.keys() - names)
        if unknown:
            close = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{function} takes no argument {unknown[0]}{hint}")
        return cls(**options)

    def as_keywords(self) -> dict[str, Any]:
        """Return the options that are not at their defaults, by name, for a user's own function."""
        given = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is field.default or (isinstance(value, float) and value == field.default):
                continue
            given[field.name] = value
        return given
