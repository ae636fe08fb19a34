"""What layers are made of: sizes of heads, kinds of norms, what counts as asked for."""

from __future__ import annotations

import dataclasses
import inspect
import types

import numpy as np
import pytest

import axattn.linen
import axattn.nnx
from axattn._layers.config import AttentionConfig, LatentConfig, drop_unset, merge_qk_norm
from axattn.rotary import RotaryEmbedding


@pytest.mark.parametrize(
    "heads, kv_heads, features, expected",
    [(8, None, 64, (8, 8)), (8, 2, 64, (2, 8)), (np.int64(8), np.int32(1), 64, (1, 8))],
)
def test_sizes_of_heads(heads, kv_heads, features, expected):
    config = AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, qkv_features=features)
    assert (config.kv_heads, config.head_dim) == expected


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((8, 3, 64), ValueError, "num_heads must be a multiple of num_kv_heads, got 8 and 3"),
        ((2, 4, 64), ValueError, "num_heads must be a multiple of num_kv_heads, got 2 and 4"),
        ((8, 2, 60), ValueError, "qkv_features must be a multiple of num_heads, got 60 and 8"),
        ((0, None, 64), ValueError, "num_heads must be a positive integer, got 0"),
        ((8, -1, 64), ValueError, "num_kv_heads must be a positive integer, got -1"),
        ((8.0, None, 64), TypeError, "num_heads must be an integer, got 8.0"),
        ((True, None, 64), ValueError, "num_heads must be a positive integer, got True"),
    ],
)
def test_errors_of_sizes(arguments, error, match):
    fields = dict(zip(("num_heads", "num_kv_heads", "qkv_features"), arguments, strict=True))
    with pytest.raises(error, match=match):
        AttentionConfig(**fields)


def test_other_errors():
    sizes = dict(num_heads=4, qkv_features=16)
    with pytest.raises(ValueError, match="got 'group'"):
        AttentionConfig(**sizes, qk_norm="group")
    with pytest.raises(ValueError, match="qk_norm_per_head=False takes a qk_norm"):
        AttentionConfig(**sizes, qk_norm_per_head=False)
    with pytest.raises(TypeError, match=r"rope must be .* got float"):
        AttentionConfig(**sizes, rope=10000.0)
    with pytest.raises(ValueError, match="q_lora_rank must be a positive integer, got 0"):
        LatentConfig(num_heads=4, q_lora_rank=0)


def test_bias_of_out():
    sizes = dict(num_heads=4, qkv_features=16)
    for use_bias in (True, False):
        for out_use_bias in (None, True, False):
            config = AttentionConfig(**sizes, use_bias=use_bias, out_use_bias=out_use_bias)
            assert config.out_has_bias is (use_bias if out_use_bias is None else out_use_bias)


def test_from_a_layer_and_back():
    """Fields are read by name, and constructors take them by name."""
    config = AttentionConfig(num_heads=4, qkv_features=16, rope=RotaryEmbedding(), window=(3, 0))
    layer = types.SimpleNamespace(**config.fields, more=1)
    assert AttentionConfig.from_layer(layer) == config == AttentionConfig(**config.fields)
    del layer.sinks
    assert AttentionConfig.from_layer(layer, sinks=True).sinks is True
    assert config.options == {"local_window_size": (3, 0)}


@pytest.mark.parametrize("package", [axattn.linen, axattn.nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize(
    "config_cls, name",
    [(AttentionConfig, "MultiHeadAttention"), (LatentConfig, "MultiHeadLatentAttention")],
)
def test_constructors_have_the_same_defaults(package, config_cls, name):
    parameters = inspect.signature(getattr(package, name).__init__).parameters
    for field in dataclasses.fields(config_cls):
        if field.default is not dataclasses.MISSING:
            assert parameters[field.name].default == field.default, field.name
    assert "num_heads" in parameters


def test_merge_qk_norm():
    assert merge_qk_norm(False, None) is None
    assert merge_qk_norm(True, None) == "layer" == merge_qk_norm(True, "layer")
    assert merge_qk_norm(False, "rms") == "rms"
    with pytest.raises(ValueError, match="contradicts"):
        merge_qk_norm(True, "rms")


def test_requested():
    zero = np.zeros(2)
    assert drop_unset(a=None, b=False, c=0, d=zero) == {"c": 0, "d": zero}
