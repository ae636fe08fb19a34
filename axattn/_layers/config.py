"""Fields that Linen and NNX layers have in common, as one checked value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from axattn import _latent
from axattn._checks import check_count
from axattn._layers.axes import ALL_HEADS_NORM_AXES, LOGICAL_AXES
from axattn._rotary import RotaryEmbedding
from axattn._typing import Implementation, QkNorm

QK_NORMS = (None, "layer", "rms")


def make_hashable(value):
    """Return a field as something hashable: a sequence of numbers or names as a tuple."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def drop_unset(**options) -> dict[str, Any]:
    """Return the options that are set: all but those that are None or False."""
    return {
        name: value for name, value in options.items() if value is not None and value is not False
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Fields of every layer, with the names and meanings of its constructor.

    Raises:
      ValueError, TypeError: ``num_heads`` is no positive integer.
    """

    num_heads: int
    scale: float | None = None
    window: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    implementation: Implementation | Sequence[Implementation] | None = None
    logical_axes: bool = False

    def __post_init__(self):
        check_count("num_heads", self.num_heads)

    @classmethod
    def from_layer(cls, layer: Any, **others: Any) -> Self:
        """Read the fields of a layer from its attributes, except those given as ``others``."""
        names = [f.name for f in dataclasses.fields(cls) if f.name not in others]
        return cls(**{name: getattr(layer, name) for name in names}, **others)

    @property
    def fields(self) -> dict[str, Any]:
        """All fields by name, as constructors take them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def options(self) -> dict[str, Any]:
        """The fields that `axattn.dot_product_attention` takes, by its names, where set."""
        return drop_unset(
            scale=self.scale,
            local_window_size=self.window,
            logits_soft_cap=self.logits_soft_cap,
            implementation=self.implementation,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(LayerConfig):
    """Fields of a layer of multi-head, grouped-query or multi-query attention.

    Raises:
      ValueError: a count is not positive, ``num_heads`` is not a multiple of ``num_kv_heads``, or
        ``qkv_features`` (the size of all query heads together) is not one of ``num_heads``; an
        unknown ``qk_norm``, or ``qk_norm_per_head=False`` without one.
      TypeError: a count is not an integer, ``rope`` is no rotary embedding.
    """

    qkv_features: int
    num_kv_heads: int | None = None
    use_bias: bool = True
    out_use_bias: bool | None = None
    rope: RotaryEmbedding | None = None
    qk_norm: QkNorm | None = None
    qk_norm_epsilon: float = 1e-6
    qk_norm_per_head: bool = True
    sinks: bool = False
    fused_qkv: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.num_kv_heads is not None:
            check_count("num_kv_heads", self.num_kv_heads)
        if self.num_heads % self.kv_heads:
            raise ValueError(
                "num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )
        check_count("qkv_features", self.qkv_features)
        if self.qkv_features % self.num_heads:
            raise ValueError(
                "qkv_features must be a multiple of num_heads, got "
                f"{self.qkv_features} and {self.num_heads}"
            )
        if self.rope is not None and not isinstance(self.rope, RotaryEmbedding):
            raise TypeError(
                "rope must be None or an axattn.rotary.RotaryEmbedding, got "
                f"{type(self.rope).__name__}"
            )
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {QK_NORMS}, got {self.qk_norm!r}")
        if self.qk_norm is None and not self.qk_norm_per_head:
            raise ValueError("qk_norm_per_head=False takes a qk_norm, 'layer' or 'rms', got None")

    @property
    def kv_heads(self) -> int:
        """K, key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """H, features of a head."""
        return self.qkv_features // self.num_heads

    @property
    def out_has_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.use_bias if self.out_use_bias is None else self.out_use_bias

    @property
    def norm_axes(self) -> tuple[int, ...]:
        """Axes of ``[..., heads, H]`` over which queries or keys are normalized."""
        return (-1,) if self.qk_norm_per_head else (-2, -1)

    @property
    def parameter_axes(self) -> Mapping[tuple[str, ...], tuple[str, ...]]:
        """Logical names of the parameters' axes, by path."""
        return LOGICAL_AXES if self.qk_norm_per_head else LOGICAL_AXES | ALL_HEADS_NORM_AXES

    def check_products(self, qkv_dot_general_cls: Any) -> None:
        """Raise ValueError where ``fused_qkv`` meets a class with a product per projection."""
        if self.fused_qkv and qkv_dot_general_cls is not None:
            raise ValueError(
                "fused_qkv=True has one product and cannot make one per projection with "
                f"qkv_dot_general_cls={qkv_dot_general_cls}; use qkv_dot_general"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(LayerConfig):
    """Fields of a layer of latent attention; sizes have their names in DeepSeek's configurations.

    Raises:
      ValueError: a size is not positive, or ``qk_rope_head_dim`` is odd; an unknown ``form``.
      TypeError: a size is not an integer, ``rope`` is no rotary embedding.
    """

    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope: RotaryEmbedding = RotaryEmbedding()
    form: _latent.Form | None = None
    use_bias: bool = False
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rope, RotaryEmbedding):
            raise TypeError(f"rope takes a RotaryEmbedding, got {self.rope!r}")
        if self.form not in (None, *_latent.FORMS):
            raise ValueError(f"form must be one of {_latent.FORMS} or None, got {self.form!r}")
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        for name in names if self.q_lora_rank is None else (*names, "q_lora_rank"):
            check_count(name, getattr(self, name))
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                "qk_rope_head_dim must be even, for features are rotated in pairs, got "
                f"{self.qk_rope_head_dim}"
            )

    def get_features(self, projection: str) -> int | tuple[int, int]:
        """Return the output features of a projection, ``out`` apart."""
        query = (self.num_heads, self.qk_nope_head_dim + self.qk_rope_head_dim)
        features: dict[str, int | tuple[int, int]] = {
            "query": query,
            "query_down": self.q_lora_rank or 0,
            "query_up": query,
            "kv_down": self.kv_lora_rank + self.qk_rope_head_dim,
            "key_up": (self.num_heads, self.qk_nope_head_dim),
            "value_up": (self.num_heads, self.v_head_dim),
        }
        return features[projection]


def merge_qk_norm(normalize_qk: bool, qk_norm: QkNorm | None) -> QkNorm | None:
    """Return the norm of queries and keys, where Flax's ``normalize_qk=True`` means "layer"."""
    if normalize_qk and qk_norm == "rms":
        raise ValueError(
            "normalize_qk=True is a layer norm and contradicts qk_norm='rms'; leave normalize_qk "
            "at False to have qk_norm='rms'"
        )
    return "layer" if normalize_qk and qk_norm is None else qk_norm


def check_one_kv_head(num_kv_heads: int | None) -> None:
    """Raise ValueError unless ``num_kv_heads`` is 1, as ``MultiQueryAttention`` has it."""
    if num_kv_heads != 1:
        raise ValueError(
            f"num_kv_heads must be 1 in MultiQueryAttention, got {num_kv_heads}; "
            "GroupedQueryAttention takes others"
        )
