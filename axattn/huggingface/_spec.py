"""Attention layers that configurations describe: sizes, RoPE, windows, norms and scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from axattn._layers.config import AttentionConfig, LatentConfig
from axattn._rotary import yarn_attention_factor
from axattn._typing import present
from axattn.huggingface._json_fields import (
    COUNT_OR_0,
    KINDS,
    OBJECT,
    TEXT,
    Config,
    check_fields,
    pick_layer,
)
from axattn.huggingface._rope import make_rotary_embedding


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """An attention layer of a checkpoint.

    Attributes:
      family: ``model_type``, without the suffix that multimodal configurations have.
      layer: its index.
      in_features: E, of its inputs and its output.
      layer_config: its fields as a value: an ``AttentionConfig`` or, of a
        ``MultiHeadLatentAttention``, a ``LatentConfig``.
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
    layer_config: AttentionConfig | LatentConfig
    is_causal: bool = True

    @property
    def latent(self) -> bool:
        """Whether it is a ``MultiHeadLatentAttention``; else a ``GroupedQueryAttention``."""
        return isinstance(self.layer_config, LatentConfig)

    @property
    def fields(self) -> Mapping[str, Any]:
        """All fields of that layer, by name; the same for Linen and NNX."""
        return self.layer_config.fields

    @property
    def head_dim(self) -> int:
        """H of a layer that is not latent."""
        return self.fields["qkv_features"] // self.fields["num_heads"]

    def linen(self, **more: Any) -> Any:
        """Make the Linen layer.

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
        """Make the NNX layer; give it its parameters with ``nnx.update(layer, params)``.

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
    """Describe the attention layer with this index.

    Args:
      config: what config.json holds; of a multimodal model the text model is meant.
      layer: 0 to ``num_hidden_layers`` - 1.

    Returns:
      The layer's sizes and options.

    Raises:
      NotImplementedError: a ``model_type``, or a feature of it, that is not read here.
      ValueError: no such layer; a field with a value that it does not take, or that does not fit
        another; a rotary embedding whose numbers are not all there.
      TypeError: ``config`` is no mapping; a field of another type.
      KeyError: no ``model_type``.

    Example:
      >>> from axattn import huggingface
      >>> config = {"model_type": "gemma2"}  # other fields have transformers' defaults
      >>> local, everywhere = (huggingface.attention_spec(config, layer) for layer in (0, 1))
      >>> local.fields["window"], everywhere.fields["window"]
      ((4095, 0), None)
    """
    config = read_text_config(config)
    kind = config["model_type"]
    layer, count = int(COUNT_OR_0.check("layer", layer)), config["num_hidden_layers"]
    if layer >= count:
        raise ValueError(
            f"layer takes 0 to {count - 1} where num_hidden_layers is {count}, got {layer}"
        )
    layer_config = FAMILIES[kind](config, layer)
    causal = config["is_causal"] and not config["use_bidirectional_attention"]
    if not config["is_causal"] and layer_config.window is not None:
        raise NotImplementedError("is_causal takes true where there is a sliding window, got false")
    return AttentionSpec(kind, layer, config["hidden_size"], layer_config, causal)


def read_text_config(config: Config) -> Config:
    """Return the part of a configuration about the language model, with transformers' defaults.

    Raises:
      NotImplementedError: a ``model_type`` that is not read here.
      KeyError: no ``model_type``.
      ValueError, TypeError: a field that is read does not take its value; ``config`` is no mapping.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config takes what config.json holds (config.to_dict()), got {type(config).__name__}"
        )
    nested = OBJECT.allow_null().check("text_config", config.get("text_config"))
    config = nested or config
    if "model_type" not in config:
        where = "text_config" if nested else "config"
        raise KeyError(f"{where} has no model_type, which takes one of {sorted(FAMILIES)}")
    kind = TEXT.check("model_type", config["model_type"])
    if kind not in FAMILIES:
        raise NotImplementedError(f"model_type takes one of {sorted(FAMILIES)}, got {kind!r}")
    whole = {**DEFAULTS[kind], **config}
    return check_fields(whole, {name: KINDS[name] for name in DEFAULTS[kind]})


# ---- families ---------------------------------------------------------------------------------

# The fields that are read, with transformers' defaults for those that are absent (null is present).
_ALL = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    rope_theta=1e4,
    rope_scaling=None,
    rope_parameters=None,
    partial_rotary_factor=None,
    original_max_position_embeddings=None,
    is_causal=True,
    use_bidirectional_attention=False,
)
_LLAMA = dict(
    _ALL,
    num_key_value_heads=None,
    head_dim=None,
    attention_bias=False,
    rms_norm_eps=1e-6,
)
_MISTRAL = dict(_LLAMA, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
_QWEN = dict(
    _LLAMA,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    sliding_window=4096,
    use_sliding_window=False,
)
_LAYERED_QWEN = dict(_QWEN, max_window_layers=28, layer_types=None)
_GEMMA = dict(
    _LLAMA,
    hidden_size=2304,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    layer_types=None,
)
_DEEPSEEK = dict(
    _ALL,
    attention_bias=False,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_interleave=True,
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama4_text": dict(
        _LLAMA,
        hidden_size=5120,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        use_qk_norm=True,
        no_rope_layers=None,
        no_rope_layer_interval=4,
        layer_types=None,
        attention_chunk_size=8192,
        attn_temperature_tuning=True,
        floor_scale=8192,
        attn_scale=0.1,
    ),
    "mistral": _MISTRAL,
    "mixtral": dict(_MISTRAL, sliding_window=None, rope_theta=1e6),
    "gemma": dict(
        _LLAMA,
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        max_position_embeddings=8192,
    ),
    "gemma2": dict(_GEMMA, max_position_embeddings=8192, attn_logit_softcapping=50.0),
    "gemma3_text": dict(
        _GEMMA,
        max_position_embeddings=131072,
        sliding_window_pattern=6,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
    ),
    "qwen2": _LAYERED_QWEN,
    "qwen2_moe": dict(
        _LAYERED_QWEN,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        qkv_bias=True,
    ),
    "qwen3": dict(_LAYERED_QWEN, head_dim=128),
    "qwen3_moe": dict(_QWEN, hidden_size=2048, num_hidden_layers=24, num_key_value_heads=4),
    "phi3": dict(_LLAMA, hidden_size=3072, max_position_embeddings=4096, sliding_window=None),
    "gpt_oss": dict(
        _LLAMA,
        hidden_size=2880,
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        attention_bias=True,
        sliding_window=128,
        layer_types=None,
        max_position_embeddings=131072,
        rope_theta=1.5e5,
        rope_parameters=dict(
            rope_type="yarn",
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=4096,
        ),
    ),
    "granite": dict(_LLAMA, attention_multiplier=1.0),
    "olmo2": dict(_LLAMA, rms_norm_eps=1e-5),
    "smollm3": dict(
        _LLAMA,
        hidden_size=2048,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=2e6,
        use_sliding_window=False,
        sliding_window=None,
        no_rope_layers=None,
        no_rope_layer_interval=4,
        layer_types=None,
    ),
    "glm4": dict(
        _LLAMA,
        num_hidden_layers=40,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        max_position_embeddings=131072,
        partial_rotary_factor=0.5,
    ),
    "falcon": dict(
        _ALL,
        hidden_size=4544,
        num_attention_heads=71,
        num_kv_heads=None,
        multi_query=True,
        new_decoder_architecture=False,
        alibi=False,
        bias=False,
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


def _read_grouped(
    config: Config, *, rope: Mapping[str, Any] | None = None, **more: Any
) -> AttentionConfig:
    """Read what most families share; ``rope`` are arguments of `make_rotary_embedding`."""
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    kv_heads = config["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise ValueError(
            "num_attention_heads takes a multiple of num_key_value_heads (Falcon: num_kv_heads), "
            f"got {heads} and {kv_heads}"
        )
    if head_dim is None:
        if config["hidden_size"] % heads:
            raise ValueError(
                "hidden_size takes a multiple of num_attention_heads where there is no head_dim, "
                f"got {config['hidden_size']} and {heads}"
            )
        head_dim = config["hidden_size"] // heads
    fields: dict[str, Any] = dict(
        num_heads=heads,
        num_kv_heads=kv_heads,
        qkv_features=heads * head_dim,
        use_bias=bool(config.get("attention_bias")),
        rope=make_rotary_embedding(config, head_dim, **(rope or {})),
    )
    return AttentionConfig(**{**fields, **more})


def _convert_window(window: int | None) -> tuple[int, int] | None:
    """Return (left, right) of Hugging Face's window, which counts the token itself."""
    if window == 0:
        raise ValueError("sliding_window takes an integer of at least 1, or null, got 0")
    return None if window is None else (window - 1, 0)


def _is_local(
    config: Config,
    layer: int,
    default: Callable[[int], bool],
    local: str = "sliding_attention",
) -> bool:
    """Return whether a layer is local, by ``layer_types`` or, without these, by ``default``."""
    types, takes = config["layer_types"], ("full_attention", "attention", local)
    if types is None:
        return default(layer)
    return pick_layer("layer_types", types, layer, config["num_hidden_layers"], takes) == local


def _has_rope(config: Config, layer: int) -> bool:
    """Return whether a layer has a rotary embedding."""
    listed = config["no_rope_layers"]
    if listed is None:
        return bool((layer + 1) % config["no_rope_layer_interval"])
    return bool(pick_layer("no_rope_layers", listed, layer, config["num_hidden_layers"], (0, 1)))


def _refuse_both_directions(config: Config) -> None:
    if config["use_bidirectional_attention"]:
        raise NotImplementedError(
            f"use_bidirectional_attention takes False for {config['model_type']}"
        )


def _read_llama(config: Config, layer: int) -> AttentionConfig:
    return _read_grouped(config)


def _read_mistral(config: Config, layer: int) -> AttentionConfig:
    return _read_grouped(config, use_bias=False, window=_convert_window(config["sliding_window"]))


def _read_qwen_window(config: Config, layer: int, default: Callable[[int], bool]) -> Any:
    slides = _is_local(config, layer, default) and config["use_sliding_window"]
    return _convert_window(config["sliding_window"]) if slides else None


def _read_qwen2(config: Config, layer: int) -> AttentionConfig:
    window = _read_qwen_window(config, layer, lambda i: i >= config["max_window_layers"])
    return _read_grouped(config, use_bias=True, out_use_bias=False, window=window)


def _read_qwen2_moe(config: Config, layer: int) -> AttentionConfig:
    # Windows are in every other one of the first layers; the dense model has them in the last.
    window = _read_qwen_window(
        config, layer, lambda i: i % 2 == 0 and i < config["max_window_layers"]
    )
    bias = bool(config["qkv_bias"])
    return _read_grouped(config, use_bias=bias, out_use_bias=False, window=window)


def _read_qwen3(config: Config, layer: int) -> AttentionConfig:
    bias = bool(config["attention_bias"])
    norm = dict(qk_norm="rms", qk_norm_epsilon=config["rms_norm_eps"])
    return dataclasses.replace(_read_qwen2(config, layer), use_bias=bias, out_use_bias=bias, **norm)


def _read_qwen3_moe(config: Config, layer: int) -> AttentionConfig:
    window = _convert_window(config["sliding_window"]) if config["use_sliding_window"] else None
    return _read_grouped(
        config, window=window, qk_norm="rms", qk_norm_epsilon=config["rms_norm_eps"]
    )


def _read_gemma(config: Config, layer: int) -> AttentionConfig:
    _refuse_both_directions(config)
    return _read_grouped(config)


def _read_gemma2(config: Config, layer: int) -> AttentionConfig:
    _refuse_both_directions(config)
    slides = _is_local(config, layer, lambda i: i % 2 == 0)
    return _read_grouped(
        config,
        window=_convert_window(config["sliding_window"]) if slides else None,
        scale=config["query_pre_attn_scalar"] ** -0.5,
        logits_soft_cap=config["attn_logit_softcapping"],
    )


def _read_gemma3(config: Config, layer: int) -> AttentionConfig:
    slides = _is_local(config, layer, lambda i: bool((i + 1) % config["sliding_window_pattern"]))
    window = config["sliding_window"] if slides else None
    around = _convert_window(window)
    if window is not None and config["use_bidirectional_attention"]:
        around = (window // 2, window // 2)
    return _read_grouped(
        config,
        window=around,
        scale=config["query_pre_attn_scalar"] ** -0.5,
        rope=dict(layer_type="sliding_attention" if slides else "full_attention"),
        qk_norm="rms",
        qk_norm_epsilon=config["rms_norm_eps"],
    )


def _read_phi3(config: Config, layer: int) -> AttentionConfig:
    window = _convert_window(config["sliding_window"])
    fields = _read_grouped(config, use_bias=False, window=window, rope=dict(partial=True))
    if present(fields.rope).scaling is not None:
        raise NotImplementedError("rope_type takes default for phi3: longrope is not read here")
    return fields


def _read_gpt_oss(config: Config, layer: int) -> AttentionConfig:
    if config["rope_parameters"] is None:  # in this family null is the default
        config = {**config, "rope_parameters": DEFAULTS["gpt_oss"]["rope_parameters"]}
    slides = _is_local(config, layer, lambda i: i % 2 == 0)
    window = _convert_window(config["sliding_window"]) if slides else None
    return _read_grouped(config, window=window, sinks=True)


def _read_granite(config: Config, layer: int) -> AttentionConfig:
    return _read_grouped(config, scale=float(config["attention_multiplier"]))


def _read_olmo2(config: Config, layer: int) -> AttentionConfig:
    norm = dict(qk_norm="rms", qk_norm_epsilon=config["rms_norm_eps"], qk_norm_per_head=False)
    return _read_grouped(config, **norm)


def _read_smollm3(config: Config, layer: int) -> AttentionConfig:
    rotates, window = _has_rope(config, layer), config["sliding_window"]
    slides = _is_local(config, layer, lambda _: not rotates) and config["use_sliding_window"]
    fields = _read_grouped(config, window=_convert_window(window) if slides else None)
    return fields if rotates else dataclasses.replace(fields, rope=None)


def _read_glm4(config: Config, layer: int) -> AttentionConfig:
    return _read_grouped(config, out_use_bias=False, rope=dict(interleaved=True, partial=True))


def _read_llama4(config: Config, layer: int) -> AttentionConfig:
    longest = config["max_position_embeddings"]
    chunk, floor = config["attention_chunk_size"], config["floor_scale"]
    listed = config["no_rope_layers"] or None  # in this family an empty list is null
    rotates = _has_rope({**config, "no_rope_layers": listed}, layer)
    if _is_local(config, layer, lambda _: rotates, local="chunked_attention"):
        if chunk is None:
            raise ValueError("attention_chunk_size takes an integer of at least 1, got None")
        if chunk < longest:
            raise NotImplementedError(
                f"attention_chunk_size takes at least max_position_embeddings={longest}, got "
                f"{chunk}: there is no chunked attention here. For sequences of at most {chunk} "
                "tokens, which are one chunk, set max_position_embeddings to that"
            )
    fields = _read_grouped(config, rope=dict(interleaved=True))
    if rotates:
        if not config["use_qk_norm"]:
            return fields
        # The model normalizes after the rotation, which does not change lengths.
        if yarn_attention_factor(present(fields.rope).scaling) != 1.0:
            raise NotImplementedError("use_qk_norm takes false where rope_type is 'yarn', got true")
        return dataclasses.replace(fields, qk_norm="rms", qk_norm_epsilon=config["rms_norm_eps"])
    if config["attn_temperature_tuning"] and config["attn_scale"] and floor <= longest:
        raise NotImplementedError(
            f"attn_temperature_tuning takes false, or a floor_scale of more than "
            f"max_position_embeddings={longest}, got {floor}: logits have one scale for all "
            f"positions here. For sequences of less than {floor} tokens, where it is 1, set "
            "max_position_embeddings to their length"
        )
    return dataclasses.replace(fields, rope=None)


def _read_falcon(config: Config, layer: int) -> AttentionConfig:
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
    return _read_grouped({**config, **sizes}, use_bias=bool(config["bias"]))


def _read_deepseek(config: Config, layer: int) -> LatentConfig:
    names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    halves = config["model_type"] == "deepseek_v3" and not config["rope_interleave"]
    return LatentConfig(
        num_heads=config["num_attention_heads"],
        **{name: config[name] for name in names},
        use_bias=bool(config["attention_bias"]),
        rope=make_rotary_embedding(config, config["qk_rope_head_dim"], interleaved=not halves),
        # The norms of latents do not use the model's epsilon.
        norm_epsilon=1e-6,
    )


FAMILIES: dict[str, Callable[[Config, int], AttentionConfig | LatentConfig]] = {
    "llama": _read_llama,
    "llama4_text": _read_llama4,
    "mistral": _read_mistral,
    "mixtral": _read_mistral,
    "gemma": _read_gemma,
    "gemma2": _read_gemma2,
    "gemma3_text": _read_gemma3,
    "qwen2": _read_qwen2,
    "qwen2_moe": _read_qwen2_moe,
    "qwen3": _read_qwen3,
    "qwen3_moe": _read_qwen3_moe,
    "phi3": _read_phi3,
    "gpt_oss": _read_gpt_oss,
    "granite": _read_granite,
    "olmo2": _read_olmo2,
    "smollm3": _read_smollm3,
    "glm4": _read_glm4,
    "falcon": _read_falcon,
    "deepseek_v2": _read_deepseek,
    "deepseek_v3": _read_deepseek,
}
