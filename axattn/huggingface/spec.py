"""What kind of layer a configuration describes: sizes, RoPE, windows, norms and scales."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from axattn.huggingface.rope import rotary_embedding

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """An attention layer of a checkpoint.

    Attributes:
      family: ``model_type``, without the suffix that multimodal configurations have.
      layer: its index.
      in_features: E, of its inputs and its output.
      latent: whether it is a ``MultiHeadLatentAttention``; else a ``GroupedQueryAttention``.
      fields: of that layer, by name; the same for Linen and NNX.
      is_causal: for the layer's calls.

    Example:
      >>> from axattn import huggingface
      >>> spec = huggingface.attention_spec({"model_type": "qwen3", "num_key_value_heads": 8})
      >>> spec.fields["num_heads"], spec.fields["num_kv_heads"], spec.head_dim
      (32, 8, 128)
      >>> layer = spec.linen(dtype="bfloat16")
      >>> type(layer).__name__, layer.qk_norm
      ('GroupedQueryAttention', 'rms')
    """

    family: str
    layer: int
    in_features: int
    latent: bool
    fields: Mapping[str, Any]
    is_causal: bool = True

    @property
    def head_dim(self) -> int:
        """H of a layer that is not latent."""
        return self.fields["qkv_features"] // self.fields["num_heads"]

    def linen(self, **more: Any) -> Any:
        """The Linen layer.

        Give it a ``dtype`` to compute in. Without one it is what inputs and parameters have in
        common, and Gemma 3's norms are float32.

        Args:
          **more: fields besides these, or in their place.

        Raises:
          TypeError: a field that the layer does not have.
        """
        from axattn import linen

        cls = linen.MultiHeadLatentAttention if self.latent else linen.GroupedQueryAttention
        return cls(**{**self.fields, **more})

    def nnx(self, *, rngs: Any, **more: Any) -> Any:
        """The NNX layer, as `linen`; give it its parameters with ``nnx.update(layer, params)``.

        Args:
          rngs: ``nnx.Rngs``, of the initial parameters.
          **more: arguments besides these, or in their place.

        Raises:
          TypeError: an argument that the layer does not have.
        """
        from axattn import nnx

        fields = {"in_features": self.in_features, **self.fields, **more}
        if self.latent:
            return nnx.MultiHeadLatentAttention(**fields, rngs=rngs)
        return nnx.GroupedQueryAttention(**{"decode": False, **fields}, rngs=rngs)


def attention_spec(config: Config, layer: int = 0) -> AttentionSpec:
    """The attention layer with this index.

    Args:
      config: what config.json holds; of a multimodal model the text model is meant.
      layer: 0 to ``num_hidden_layers`` - 1.

    Raises:
      NotImplementedError: a ``model_type``, or a feature of it, that is not read here.
      ValueError: no such layer; a rotary embedding whose numbers are not all there.
      TypeError: ``config`` is no mapping.

    Example:
      >>> from axattn import huggingface
      >>> config = {"model_type": "gemma2"}  # of all else what transformers takes it to be
      >>> local, everywhere = (huggingface.attention_spec(config, layer) for layer in (0, 1))
      >>> local.fields["window"], everywhere.fields["window"]
      ((4095, 0), None)
    """
    config = text_config(config)
    kind = config["model_type"]
    layer, count = operator.index(layer), config["num_hidden_layers"]
    if not 0 <= layer < count:
        raise ValueError(f"layer takes 0 to {count - 1} for this configuration, got {layer}")
    causal = not config.get("use_bidirectional_attention")
    fields = FAMILIES[kind](config, layer)
    latent = "kv_lora_rank" in fields
    return AttentionSpec(kind, layer, config["hidden_size"], latent, fields, causal)


def text_config(config: Config) -> Config:
    """The part of a configuration that speaks of the language model, with what it leaves out.

    Raises NotImplementedError for a ``model_type`` that is not read here, TypeError for no mapping.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config takes what config.json holds (config.to_dict()), got {type(config).__name__}"
        )
    config = config.get("text_config") or config
    kind = config.get("model_type", "")
    if kind not in FAMILIES:
        raise NotImplementedError(f"model_type takes one of {sorted(FAMILIES)}, got {kind!r}")
    return {**DEFAULTS[kind], **config}


# ---- families ---------------------------------------------------------------------------------

# What transformers takes a configuration to say where it says nothing. (Null is another thing.)
_LLAMA = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    attention_bias=False,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)
_QWEN = dict(
    _LLAMA,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    sliding_window=4096,
    use_sliding_window=False,
    max_window_layers=28,
)
_GEMMA = dict(
    _LLAMA,
    hidden_size=2304,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    use_bidirectional_attention=False,
)
_DEEPSEEK = dict(
    _LLAMA,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_interleave=True,
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": dict(
        _LLAMA, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096
    ),
    "gemma2": dict(_GEMMA, max_position_embeddings=8192, attn_logit_softcapping=50.0),
    "gemma3_text": dict(_GEMMA, max_position_embeddings=131072, sliding_window_pattern=6),
    "qwen2": _QWEN,
    "qwen3": dict(_QWEN, head_dim=128),
    "falcon": dict(
        hidden_size=4544,
        num_hidden_layers=32,
        num_attention_heads=71,
        num_kv_heads=None,
        multi_query=True,
        new_decoder_architecture=False,
        alibi=False,
        bias=False,
        max_position_embeddings=2048,
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": dict(
        _DEEPSEEK,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        max_position_embeddings=4096,
    ),
}


def _grouped(config: Config, **more: Any) -> dict[str, Any]:
    """What most families have in common."""
    heads = config["num_attention_heads"]
    head_dim = config["head_dim"] or config["hidden_size"] // heads
    return {
        "num_heads": heads,
        "num_kv_heads": config["num_key_value_heads"] or heads,
        "qkv_features": heads * head_dim,
        "use_bias": bool(config.get("attention_bias")),
        "rope": rotary_embedding(config, head_dim),
        **more,
    }


def _before(window: int | None) -> tuple[int, int] | None:
    """Hugging Face's window counts the token itself."""
    return None if window is None else (window - 1, 0)


def _llama(config: Config, layer: int) -> dict[str, Any]:
    return _grouped(config)


def _mistral(config: Config, layer: int) -> dict[str, Any]:
    return _grouped(config, use_bias=False, window=_before(config["sliding_window"]))


def _slides(config: Config, layer: int, otherwise: Callable[[int], bool]) -> bool:
    types = config.get("layer_types")
    return types[layer] == "sliding_attention" if types else otherwise(layer)


def _qwen2(config: Config, layer: int) -> dict[str, Any]:
    first = config["max_window_layers"]
    slides = config["use_sliding_window"] and _slides(config, layer, lambda i: i >= first)
    window = _before(config["sliding_window"]) if slides else None
    return _grouped(config, use_bias=True, out_use_bias=False, window=window)


def _qwen3(config: Config, layer: int) -> dict[str, Any]:
    bias = bool(config["attention_bias"])
    norm = dict(qk_norm="rms", qk_norm_epsilon=config["rms_norm_eps"])
    return {**_qwen2(config, layer), "use_bias": bias, "out_use_bias": bias, **norm}


def _gemma2(config: Config, layer: int) -> dict[str, Any]:
    if config["use_bidirectional_attention"]:
        raise NotImplementedError("use_bidirectional_attention takes False for gemma2")
    slides = _slides(config, layer, lambda i: i % 2 == 0)
    return _grouped(
        config,
        window=_before(config["sliding_window"]) if slides else None,
        scale=config["query_pre_attn_scalar"] ** -0.5,
        logits_soft_cap=config["attn_logit_softcapping"],
    )


def _gemma3(config: Config, layer: int) -> dict[str, Any]:
    pattern = config["sliding_window_pattern"]
    slides = _slides(config, layer, lambda i: bool((i + 1) % pattern))
    rope = rotary_embedding(
        config,
        config["head_dim"],
        layer_type="sliding_attention" if slides else "full_attention",
        default_base=1e4 if slides else 1e6,
    )
    window = config["sliding_window"] if slides else None
    around = _before(window)
    if window is not None and config["use_bidirectional_attention"]:
        around = (window // 2, window // 2)
    return _grouped(
        config,
        window=around,
        scale=config["query_pre_attn_scalar"] ** -0.5,
        rope=rope,
        qk_norm="rms",
        qk_norm_epsilon=config["rms_norm_eps"],
    )


def _falcon(config: Config, layer: int) -> dict[str, Any]:
    if config["alibi"]:
        raise NotImplementedError("alibi takes False: axattn's layers have rotary embeddings")
    older = [name for name in ("n_embed", "n_head", "n_head_kv", "n_layer") if name in config]
    if older:
        raise NotImplementedError(
            f"a falcon configuration takes hidden_size, num_attention_heads, num_kv_heads and "
            f"num_hidden_layers, got the names of before transformers had Falcon: {older}"
        )
    heads = config["num_attention_heads"]
    if config["new_decoder_architecture"]:
        kv_heads = config["num_kv_heads"] or heads
    else:
        kv_heads = 1 if config["multi_query"] else heads
    sizes = dict(num_key_value_heads=kv_heads, head_dim=None)
    return _grouped({**config, **sizes}, use_bias=bool(config["bias"]))


def _deepseek(config: Config, layer: int) -> dict[str, Any]:
    names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    halves = config["model_type"] == "deepseek_v3" and not config["rope_interleave"]
    return {
        "num_heads": config["num_attention_heads"],
        **{name: config[name] for name in names},
        "use_bias": bool(config["attention_bias"]),
        "rope": rotary_embedding(config, config["qk_rope_head_dim"], interleaved=not halves),
        # Its latents' norms do not take the model's epsilon.
        "norm_epsilon": 1e-6,
    }


FAMILIES: dict[str, Callable[[Config, int], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "falcon": _falcon,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
