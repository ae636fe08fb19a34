"""Kinds of values that fields of a configuration take, and errors for other values."""

from __future__ import annotations

import dataclasses
import numbers
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class FieldKind:
    """A kind of values: of some types, and for which ``fits`` returns True."""

    words: str
    types: tuple[type, ...]
    fits: Callable[[Any], bool] = lambda value: True

    def check(self, name: str, value: Any) -> Any:
        """Return ``value``; TypeError or ValueError with the field's name if it does not fit."""
        is_type = isinstance(value, self.types)
        if isinstance(value, bool) and bool not in self.types:  # to Python bools are integers
            is_type = False
        if is_type and (value is None or self.fits(value)):
            return value
        error = ValueError if is_type else TypeError
        raise error(f"{name} takes {self.words}, got {reprlib.repr(value)}")

    def allow_null(self) -> FieldKind:
        """Return the kind that takes null besides."""
        return FieldKind(f"{self.words}, or null", (*self.types, NoneType), self.fits)


# Numbers are at most what float64 can hold; comparisons with NaN are False.
_MOST = sys.float_info.max

COUNT = FieldKind("a 64-bit integer of at least 1", (numbers.Integral,), lambda n: 1 <= n < 2**63)
COUNT_OR_0 = FieldKind(
    "a 64-bit integer of at least 0", (numbers.Integral,), lambda n: 0 <= n < 2**63
)
POSITIVE = FieldKind("a finite number greater than 0", (numbers.Real,), lambda x: 0 < x <= _MOST)
NOT_NEGATIVE = FieldKind(
    "a finite number of at least 0", (numbers.Real,), lambda x: 0 <= x <= _MOST
)
SHARE = FieldKind("a number greater than 0 and at most 1", (numbers.Real,), lambda x: 0 < x <= 1)
FLAG = FieldKind("true or false", (bool, NoneType))  # null: false, as in transformers
TEXT = FieldKind("a string", (str,))
OBJECT = FieldKind("an object", (Mapping,))
LIST = FieldKind("a list", (list, tuple))

KINDS: dict[str, FieldKind] = {
    "alibi": FLAG,
    "attention_bias": FLAG,
    "attention_chunk_size": COUNT.allow_null(),
    "attention_multiplier": POSITIVE,
    "attn_logit_softcapping": POSITIVE.allow_null(),
    "attn_scale": NOT_NEGATIVE,
    "attn_temperature_tuning": FieldKind("true, false or a number", (bool, numbers.Real, NoneType)),
    "bias": FLAG,
    "floor_scale": COUNT,
    "head_dim": COUNT.allow_null(),
    "hidden_size": COUNT,
    "is_causal": FieldKind("true or false", (bool,)),
    "kv_lora_rank": COUNT,
    "layer_types": LIST.allow_null(),
    "max_position_embeddings": COUNT,
    "max_window_layers": COUNT_OR_0,
    "multi_query": FLAG,
    "new_decoder_architecture": FLAG,
    "no_rope_layer_interval": COUNT,
    "no_rope_layers": LIST.allow_null(),
    "num_attention_heads": COUNT,
    "num_hidden_layers": COUNT,
    "num_key_value_heads": COUNT.allow_null(),
    "num_kv_heads": COUNT.allow_null(),
    "original_max_position_embeddings": COUNT.allow_null(),
    "partial_rotary_factor": SHARE.allow_null(),
    "q_lora_rank": COUNT.allow_null(),
    "qk_nope_head_dim": COUNT,
    "qk_rope_head_dim": COUNT,
    "qkv_bias": FLAG,
    "query_pre_attn_scalar": POSITIVE,
    "rms_norm_eps": NOT_NEGATIVE,
    "rope_interleave": FLAG,
    "rope_local_base_freq": POSITIVE,
    "rope_parameters": OBJECT.allow_null(),
    "rope_scaling": OBJECT.allow_null(),
    "rope_theta": POSITIVE,
    "sliding_window": COUNT_OR_0.allow_null(),
    "sliding_window_pattern": COUNT,
    "use_bidirectional_attention": FLAG,
    "use_qk_norm": FLAG,
    "use_sliding_window": FLAG,
    "v_head_dim": COUNT,
}

# Fields of rope_parameters and rope_scaling. The rope_type decides which of them are needed.
ROPE_KINDS: dict[str, FieldKind] = {
    "attention_factor": POSITIVE.allow_null(),
    "beta_fast": POSITIVE.allow_null(),
    "beta_slow": POSITIVE.allow_null(),
    "factor": POSITIVE.allow_null(),
    "high_freq_factor": POSITIVE.allow_null(),
    "low_freq_factor": POSITIVE.allow_null(),
    "mscale": NOT_NEGATIVE.allow_null(),
    "mscale_all_dim": NOT_NEGATIVE.allow_null(),
    "original_max_position_embeddings": COUNT.allow_null(),
    "partial_rotary_factor": SHARE.allow_null(),
    "rope_theta": POSITIVE,
    "rope_type": TEXT.allow_null(),
    "truncate": FLAG,
    "type": TEXT.allow_null(),
}

QUANTIZATION_KINDS: dict[str, FieldKind] = {
    "quant_method": TEXT.allow_null(),
    "weight_block_size": LIST.allow_null(),
}


def check_fields(values: Any, kinds: Mapping[str, FieldKind], where: str = "") -> Config:
    """Check the fields that have a kind, and return ``values``.

    ``where`` is the name of the field that holds them, if there is one.
    """
    for name, kind in kinds.items():
        if name in values:
            kind.check(f"{where}.{name}" if where else name, values[name])
    return values


def pick_layer(
    name: str, values: Sequence[Any], layer: int, count: int, takes: Sequence[Any]
) -> Any:
    """Return a layer's entry of a list with one of ``takes`` for each of ``count`` layers."""
    if len(values) < count:
        raise ValueError(
            f"{name} takes an entry for each of num_hidden_layers={count}, got {len(values)}"
        )
    for i, value in enumerate(values[:count]):
        if value not in takes:
            raise ValueError(
                f"{name} takes {' or '.join(map(repr, takes))}, got {reprlib.repr(value)} for "
                f"layer {i}"
            )
    return values[layer]
