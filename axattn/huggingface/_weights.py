"""Checkpoint tensors as the parameters of axattn's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from axattn._layers.config import AttentionConfig, LatentConfig
from axattn.huggingface._json_fields import COUNT, OBJECT, QUANTIZATION_KINDS, Config, check_fields
from axattn.huggingface._spec import AttentionSpec, attention_spec, read_text_config

Tensors = Mapping[str, np.ndarray]

# The block of codes that shares a scale, by default.
BLOCK = (128, 128)

# What precedes the layers of a language model in names of tensors: nothing, its head's model, or
# the parts of a multimodal model, which differ between versions of transformers.
_PREFIXES = tuple(
    f"{whole}{part}{trunk}"
    for whole in ("", "model.")
    for part in ("", "language_model.", "text_model.")
    for trunk in ("model.", "", "transformer.")
)


def attention_params(
    tensors: Tensors, config: Config, layer: int = 0, *, dtype: Any = None
) -> dict[str, Any]:
    """Convert the parameters of one attention layer.

    Args:
      tensors: by their names in the checkpoint; it is asked for those of this layer only.
      config: what config.json holds.
      layer: its index.
      dtype: of the result; by default that of the checkpoint, but float32 for weights in float8
        with one scale per block (as DeepSeek-V3 publishes them) and for Gemma's norms, whose
        weights are stored as their differences from one.

    Returns:
      The tree of the layer that `attention_spec` describes, numpy arrays by the names of its
      parameters, ``{"query": {"kernel": ...}, ...}``.

    Raises:
      KeyError: a tensor is not there; the message has its name.
      ValueError: a tensor's shape is not what the configuration says, or its scales' shape; and as
        `attention_spec`.
      TypeError: ``tensors`` is no mapping; and as `attention_spec`.
      NotImplementedError: as `attention_spec`; and weights in codes other than those above.

    Example:
      >>> import numpy as np
      >>> from axattn import huggingface
      >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
      >>> config = dict(model_type="llama", num_hidden_layers=1, **sizes)
      >>> tensors = {  # of a checkpoint: [features out, features in]
      ...     "model.layers.0.self_attn.q_proj.weight": np.zeros((32, 32), np.float32),
      ...     "model.layers.0.self_attn.k_proj.weight": np.zeros((16, 32), np.float32),
      ...     "model.layers.0.self_attn.v_proj.weight": np.zeros((16, 32), np.float32),
      ...     "model.layers.0.self_attn.o_proj.weight": np.zeros((32, 32), np.float32),
      ... }
      >>> params = huggingface.attention_params(tensors, config, layer=0)
      >>> params["key"]["kernel"].shape  # [E, K, H]
      (32, 2, 8)
      >>> layer = huggingface.attention_spec(config).linen()  # layer.apply({"params": params}, x)
    """
    spec = attention_spec(config, layer)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors takes a mapping of names to arrays, got {type(tensors).__name__}")
    stored = _LayerTensors(tensors, spec, config, dtype)
    if isinstance(spec.layer_config, LatentConfig):
        return _read_latent(stored, spec, spec.layer_config)
    return _read_grouped_query(stored, spec, spec.layer_config)


def _read_quantization(config: Config) -> Config:
    """Return what a configuration, its text part or the whole, says of quantized weights."""
    name = "quantization_config"
    written = config.get(name) or read_text_config(config).get(name)
    written = check_fields(OBJECT.allow_null().check(name, written) or {}, QUANTIZATION_KINDS, name)
    block = written.get("weight_block_size")
    if block is not None:
        if len(block) != 2:
            raise ValueError(f"{name}.weight_block_size takes two integers, got {block!r}")
        for size in block:
            COUNT.check(f"{name}.weight_block_size", size)
    return written


class _LayerTensors:
    """The tensors of one layer, by the last parts of their names."""

    def __init__(self, tensors: Tensors, spec: AttentionSpec, config: Config, dtype: Any):
        self.tensors, self.dtype = tensors, dtype
        self.quantization = _read_quantization(config)
        part, first = "layers.{}.self_attn.", "o_proj"
        if spec.family == "falcon":
            part, first = "h.{}.self_attention.", "dense"
        part = part.format(spec.layer)
        wanted = [f"{prefix}{part}" for prefix in _PREFIXES]
        prefix = next((p for p in wanted if f"{p}{first}.weight" in tensors), None)
        if prefix is None:
            self.refuse_codes(f"{wanted[0]}{first}.weight is not there")
            raise KeyError(
                f"no tensor {wanted[0]}{first}.weight (nor with another prefix: "
                f"{', '.join(map(repr, _PREFIXES[1:]))})"
            )
        self.prefix = prefix

    def read(self, name: str, *shape: int) -> np.ndarray:
        """Read a tensor, which must have this shape."""
        array = self._read_stored(name, *shape)
        return array if self.dtype is None else array.astype(self.dtype)

    def read_norm(self, name: str, size: int, from_one: bool) -> np.ndarray:
        """Read a norm's scales, stored as they are or as differences from one."""
        if not from_one:
            return self.read(name, size)
        return (1 + self._read_stored(name, size).astype(np.float32)).astype(
            self.dtype or np.float32
        )

    def _read_stored(self, name: str, *shape: int) -> np.ndarray:
        name = self.prefix + name
        if name not in self.tensors:
            self.refuse_codes(f"{name} is not there")
            raise KeyError(f"no tensor {name}")
        array = np.asarray(self.tensors[name])
        if array.dtype.itemsize == 1 and f"{name}_scale_inv" not in self.tensors:
            self.refuse_codes(f"{name} is {array.dtype}", always=True)
        if array.shape != shape:
            raise ValueError(f"{name} takes the shape {shape}, got {array.shape}")
        if array.dtype.itemsize > 1:
            return array
        scales = np.asarray(self.tensors[f"{name}_scale_inv"])
        block = self.quantization.get("weight_block_size") or (shape if scales.size == 1 else BLOCK)
        return _dequantize_blocks(name, array, scales, block)

    def refuse_codes(self, why: str, always: bool = False) -> None:
        """Raise NotImplementedError if this is a checkpoint quantized in another way."""
        method = self.quantization.get("quant_method") or "unknown"
        if always or method not in ("fp8", "unknown"):
            raise NotImplementedError(
                "of quantized weights those are read that have a tensor of scales, named as they "
                f"are with _scale_inv (quant_method fp8): {why}, quant_method is {method!r}"
            )

    def read_input_projection(
        self, name: str, inputs: int, heads: int, size: int, bias: bool
    ) -> dict:
        """Read a projection to heads: PyTorch has its weight as ``[heads * size, inputs]``."""
        kernel = self.read(f"{name}.weight", heads * size, inputs)
        found: dict[str, np.ndarray] = {
            "kernel": kernel.reshape(heads, size, inputs).transpose(2, 0, 1)
        }
        if bias:
            found["bias"] = self.read(f"{name}.bias", heads * size).reshape(heads, size)
        return found

    def read_dense(self, name: str, inputs: int, outputs: int, bias: bool) -> dict:
        """Read a projection without heads: PyTorch has its weight as ``[outputs, inputs]``."""
        found = {"kernel": self.read(f"{name}.weight", outputs, inputs).T}
        if bias:
            found["bias"] = self.read(f"{name}.bias", outputs)
        return found

    def read_output_projection(
        self, name: str, heads: int, size: int, outputs: int, bias: bool
    ) -> dict:
        """Read a projection from heads: PyTorch has its weight as ``[outputs, heads * size]``."""
        found = self.read_dense(name, heads * size, outputs, bias)
        return {**found, "kernel": found["kernel"].reshape(heads, size, outputs)}


def _read_grouped_query(
    tensors: _LayerTensors, spec: AttentionSpec, config: AttentionConfig
) -> dict[str, Any]:
    features, heads, kv_heads = spec.in_features, config.num_heads, config.kv_heads
    size, bias, out = config.head_dim, config.use_bias, "o_proj"
    if spec.family == "falcon":  # groups of query heads, each followed by its key and value head
        fused = tensors.read_input_projection(
            "query_key_value", features, heads + 2 * kv_heads, size, bias
        )
        params, out = _split_heads(fused, heads, kv_heads, groups=kv_heads), "dense"
    elif spec.family == "phi3":  # all queries, then all keys, then all values
        fused = tensors.read_input_projection(
            "qkv_proj", features, heads + 2 * kv_heads, size, bias
        )
        params = _split_heads(fused, heads, kv_heads, groups=1)
    else:
        params = {
            "query": tensors.read_input_projection("q_proj", features, heads, size, bias),
            "key": tensors.read_input_projection("k_proj", features, kv_heads, size, bias),
            "value": tensors.read_input_projection("v_proj", features, kv_heads, size, bias),
        }
    params["out"] = tensors.read_output_projection(out, heads, size, features, config.out_has_bias)
    if config.sinks:
        params["sinks"] = tensors.read("sinks", heads)
    if config.qk_norm:
        for name, theirs, count in (("query_ln", "q_norm", heads), ("key_ln", "k_norm", kv_heads)):
            if spec.family == "llama4_text":  # its norms have no scales
                scale = np.ones(size, params["query"]["kernel"].dtype)
            elif config.qk_norm_per_head:
                scale = tensors.read_norm(f"{theirs}.weight", size, spec.family.startswith("gemma"))
            else:
                scale = tensors.read(f"{theirs}.weight", count * size).reshape(count, size)
            params[name] = {"scale": scale}
    return params


def _split_heads(fused: Mapping, heads: int, kv_heads: int, groups: int) -> dict[str, Any]:
    """Split a fused projection, whose groups each have query, key and value heads in this order."""
    ends = (heads // groups, (heads + kv_heads) // groups)
    params: dict[str, dict] = {"query": {}, "key": {}, "value": {}}
    for name, array in fused.items():
        *lead, _, size = array.shape
        parts = np.split(array.reshape(*lead, groups, -1, size), ends, axis=-2)
        for projection, part in zip(params, parts, strict=True):
            params[projection][name] = part.reshape(*lead, -1, size)
    return params


def _read_latent(
    tensors: _LayerTensors, spec: AttentionSpec, config: LatentConfig
) -> dict[str, Any]:
    features, heads, bias = spec.in_features, config.num_heads, config.use_bias
    rank, q_rank = config.kv_lora_rank, config.q_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    up = tensors.read("kv_b_proj.weight", heads * (nope + value), rank)
    up = up.reshape(heads, nope + value, rank).transpose(2, 0, 1)
    params = {
        "kv_down": tensors.read_dense("kv_a_proj_with_mqa", features, rank + rope, bias),
        "kv_norm": {"scale": tensors.read("kv_a_layernorm.weight", rank)},
        "key_up": {"kernel": up[..., :nope]},
        "value_up": {"kernel": up[..., nope:]},
        "out": tensors.read_output_projection("o_proj", heads, value, features, bias),
    }
    if q_rank is None:
        params["query"] = tensors.read_input_projection(
            "q_proj", features, heads, nope + rope, False
        )
    else:
        params["query_down"] = tensors.read_dense("q_a_proj", features, q_rank, bias)
        params["query_norm"] = {"scale": tensors.read("q_a_layernorm.weight", q_rank)}
        params["query_up"] = tensors.read_input_projection(
            "q_b_proj", q_rank, heads, nope + rope, False
        )
    return params


def _dequantize_blocks(
    name: str, codes: np.ndarray, scales: np.ndarray, block: Sequence[int]
) -> np.ndarray:
    """Multiply codes by the scale of their block; the result is float32."""
    takes = tuple(-(-n // b) for n, b in zip(codes.shape, block, strict=True))
    if scales.size == 1:
        scales = scales.reshape(1, 1)
    if scales.shape != takes:
        raise ValueError(
            f"{name}_scale_inv takes the shape {takes} for blocks of {tuple(block)}, got "
            f"{scales.shape}"
        )
    scales = scales.astype(np.float32).repeat(block[0], 0).repeat(block[1], 1)
    return codes.astype(np.float32) * scales[: codes.shape[0], : codes.shape[1]]
