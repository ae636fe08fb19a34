"""Attention layers of Hugging Face checkpoints: what transformers' own models did, by ours.

Goldens: tests/goldens/make_huggingface.py.
"""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from axattn import huggingface
from axattn._layers.config import AttentionConfig, LatentConfig
from axattn.cache import DenseCache, PagedCache, RingCache
from axattn.rotary import LinearScaling, Llama3Scaling, RotaryEmbedding, YarnScaling
from tests.huggingface import GOLDENS, golden, save
from tests.tiers import ci, exhaustive

MODELS = (
    "llama",
    "llama_bias",
    "mistral",
    "gemma2",
    "gemma3",
    "qwen2",
    "qwen3",
    "falcon_mqa",
    "falcon_gqa",
    "falcon_mha",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v3_halves",
)
LAYERS = [(model, layer) for model in MODELS for layer in ((0,) if "falcon" in model else (0, 1))]


# Small ones: of each model a layer with what is new in it, then the rest.
NEW = [
    *(
        ("mixtral", 0),
        ("qwen2_moe", 0),
        ("qwen3_moe", 0),
        ("gemma", 0),
        ("phi3", 0),
        ("gpt_oss", 0),
    ),
    *(("granite", 0), ("olmo2", 0), ("smollm3", 1), ("glm4", 0), ("llama4", 0), ("llama4", 1)),
]
SMALL = [*NEW, ("qwen2_moe", 1), ("gpt_oss", 1), ("smollm3", 0)]


def layer_of(model, layer):
    config, tensors, passed = golden(model)
    spec = huggingface.attention_spec(config, layer)
    params = huggingface.attention_params(tensors, config, layer)
    return spec, params, *passed[layer]


def passes():
    """Every layer once everyday, small ones in turn in each dialect; the others in CI."""
    for i, (model, layer) in enumerate([*LAYERS, *NEW, *SMALL[len(NEW) :]]):
        everyday = "linen" if i < len(LAYERS) or i % 2 else "nnx"
        for dialect in ("linen", "nnx"):
            marks = () if dialect == everyday else pytest.mark.ci
            if i >= len(LAYERS) + len(NEW):
                marks = pytest.mark.exhaustive
            elif model in ("mistral", "llama_bias", "falcon_mha", "deepseek_v2") and marks:
                marks = pytest.mark.exhaustive  # others have all that their layers are made of
            yield pytest.param(dialect, model, layer, marks=marks)


@pytest.mark.parametrize("dialect, model, layer", list(passes()))
def test_full_pass(dialect, model, layer):
    spec, params, x, want = layer_of(model, layer)
    if dialect == "linen":
        apply = jax.jit(lambda p, x: spec.linen().apply({"params": p}, x, is_causal=spec.is_causal))
        got = apply(params, x)
    else:
        ours = spec.nnx(rngs=nnx.Rngs(0))
        nnx.update(ours, params)
        got = nnx.jit(lambda layer, x: layer(x, is_causal=spec.is_causal))(ours, x)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def cache_for(spec, x, kind):
    """An empty float32 cache for the layer."""
    batch, length, _ = x.shape
    if spec.latent:
        sizes = spec.linen().cache_sizes
    else:
        sizes = dict(num_kv_heads=spec.fields["num_kv_heads"], head_dim=spec.head_dim)
    if kind == "ring":
        window = spec.fields["window"][0]
        return RingCache.create(batch, window, max_append=4, dtype="float32", **sizes)
    if kind == "dense":
        return DenseCache.create(batch, length, dtype="float32", **sizes)
    cache = PagedCache.create(batch, 2 * batch * 3, 8, 3, dtype="float32", **sizes)
    return cache.with_table(np.arange(2 * batch * 3)[::-1][: batch * 3].reshape(batch, 3))


# What a layer does to a cache: windows, norms of keys, sinks, rotated parts, latents; every kind of cache.
STEPPED = [
    *(("ring", "gemma3", 0), ("paged", "deepseek_v3", 0), ("dense", "falcon_gqa", 0)),
    ("ring", "gpt_oss", 0),
]
STEPPED_IN_CI = [
    *(
        ("paged", "llama", 0),
        ("ring", "mistral", 0),
        ("dense", "olmo2", 0),
        ("dense", "smollm3", 1),
    ),
    *(("dense", model, layer) for model, layer in LAYERS if model in ("gemma2", "qwen3")),
    *(("dense", "deepseek_v2", 1), ("dense", "deepseek_v3_halves", 0), ("dense", "falcon_mqa", 0)),
]
REST = [("dense", *one) for one in [*LAYERS, *SMALL]]
STEPPED += ci(*STEPPED_IN_CI)
STEPPED += exhaustive(*(x for x in REST if x not in STEPPED and x not in STEPPED_IN_CI))


@pytest.mark.parametrize("kind, model, layer", STEPPED)
def test_token_by_token(kind, model, layer):
    """A prompt of five tokens, then one after another."""
    spec, params, x, want = layer_of(model, layer)
    step = jax.jit(lambda p, x, cache: spec.linen().apply({"params": p}, x, cache=cache))
    cache, outs = cache_for(spec, x, kind), []
    prompt = 5 if kind != "ring" else 4
    for first in (0, *range(prompt, x.shape[1])):
        here = x[:, first : first + 1] if first else x[:, :prompt]
        out, cache = step(params, here, cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gemma3", "deepseek_v3", "qwen3", "olmo2"])
def test_parameters_have_the_layers_shapes(model):
    spec, params, x, _ = layer_of(model, 0)
    made = jax.eval_shape(spec.linen().init, jax.random.key(0), x)["params"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )
    state = nnx.to_pure_dict(nnx.state(spec.nnx(rngs=nnx.Rngs(0)), nnx.Param))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, params)


# ---- configurations -----------------------------------------------------------------------------


def older(config):
    """The same configuration as transformers before 5 wrote it."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return config


@pytest.mark.parametrize("model, layer", LAYERS + SMALL)
def test_older_configurations_say_the_same(model, layer):
    config = golden(model)[0]
    spec = huggingface.attention_spec(config, layer)
    assert huggingface.attention_spec(older(config), layer) == spec
    nested = {"model_type": "gemma3", "text_config": config, "vision_config": {}}
    assert huggingface.attention_spec(nested, layer) == spec


DEFAULTS = json.loads(GOLDENS.with_name("huggingface_defaults.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_configuration_leaves_out(kind):
    """Published ones leave much out: Gemma 3's has no numbers of heads."""
    # What Llama 4 does after these many tokens is not read.
    longest = {"max_position_embeddings": 4096} if kind == "llama4_text" else {}
    for layer in (0, 1, 3, DEFAULTS[kind]["num_hidden_layers"] - 1):
        spec = huggingface.attention_spec({"model_type": kind, **longest}, layer)
        assert spec == huggingface.attention_spec({**DEFAULTS[kind], **longest}, layer)


# What matters of configurations as they were published, with much left out, and what they say.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16},
}
GEMMA3_FIELDS = dict(
    num_heads=8, num_kv_heads=4, qkv_features=2048, use_bias=False, scale=1 / 16,
    qk_norm="rms", qk_norm_epsilon=1e-6,
)  # fmt: skip
LLAMA31_8B = {
    "attention_bias": False,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
}
DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "v_head_dim": 128,
}
FALCON_7B = {
    "alibi": False,
    "bias": False,
    "hidden_size": 4544,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
}
GPT_OSS_20B = {
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "quantization_config": {"quant_method": "mxfp4"},
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
}
GPT_OSS_FIELDS = dict(
    num_heads=64, num_kv_heads=8, qkv_features=4096, use_bias=True, sinks=True,
    rope=RotaryEmbedding(150000.0, scaling=YarnScaling(32.0, 4096, truncate=False)),
)  # fmt: skip
SCOUT = {  # for sequences of less than a chunk
    "model_type": "llama4",
    "text_config": {
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": 4,
        "floor_scale": 8192,
        "head_dim": 128,
        "hidden_size": 5120,
        "max_position_embeddings": 8191,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "use_qk_norm": True,
    },
}
PUBLISHED = {
    "gpt-oss 20B, sliding": (GPT_OSS_20B, 0, GPT_OSS_FIELDS | dict(window=(127, 0))),
    "gpt-oss 20B, full": (GPT_OSS_20B, 23, GPT_OSS_FIELDS | dict(window=None)),
    "Llama 4 Scout, no rope": (
        SCOUT, 47,
        dict(num_heads=40, num_kv_heads=8, qkv_features=5120, use_bias=False, rope=None),
    ),
    "Gemma 3 4B, sliding": (
        GEMMA3_4B, 0, GEMMA3_FIELDS | dict(rope=RotaryEmbedding(1e4), window=(1023, 0)),
    ),
    "Gemma 3 4B, full": (
        GEMMA3_4B, 5,
        GEMMA3_FIELDS | dict(rope=RotaryEmbedding(1e6, scaling=LinearScaling(8.0)), window=None),
    ),
    "Llama 3.1 8B": (
        LLAMA31_8B, 31,
        dict(
            num_heads=32, num_kv_heads=8, qkv_features=4096, use_bias=False,
            rope=RotaryEmbedding(5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ),
    ),
    "DeepSeek-V3": (
        DEEPSEEK_V3, 60,
        dict(
            num_heads=128, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, use_bias=False, norm_epsilon=1e-6,
            rope=RotaryEmbedding(
                1e4, interleaved=True,
                scaling=YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
            ),
        ),
    ),
    "Falcon 7B": (
        FALCON_7B, 0,
        dict(
            num_heads=71, num_kv_heads=1, qkv_features=4544, use_bias=False, rope=RotaryEmbedding()
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config, layer, fields = PUBLISHED[name]
    spec = huggingface.attention_spec(config, layer)
    kind = LatentConfig if "kv_lora_rank" in fields else AttentionConfig
    assert spec.layer_config == kind(**fields)  # what is not named here is the layer's default
    assert spec.fields == {**spec.layer_config.fields, **fields}


@pytest.mark.parametrize(
    "written",
    [
        dict(rope_theta=5e5, rope_parameters=dict(rope_type="linear", factor=2.0)),
        dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=5e5)),
        dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict()),
        dict(
            rope_theta=5e5,
            rope_scaling=dict(type="linear", factor=2.0),
            rope_parameters=dict(rope_type="default", rope_theta=1.0),
        ),
    ],
)
def test_ways_of_writing_a_rotary_embedding(written):
    spec = huggingface.attention_spec({"model_type": "llama", **written})
    assert spec.fields["rope"] == RotaryEmbedding(5e5, scaling=LinearScaling(2.0))


PATTERNS = {
    "gemma2": [True, False, True, False, True, False],
    "gemma3_text": [True, True, True, True, True, False],
    "gpt_oss": [True, False, True, False, True, False],
    "smollm3": [False, False, False, True, False, False],
    "qwen2": [False, False, False, False, True, True],
    "qwen2_moe": [True, False, True, False, False, False],
    "qwen3_moe": [True] * 6,
    "mistral": [True] * 6,
    "llama": [False] * 6,
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_windows_where_the_configuration_has_no_layer_types(kind):
    config = dict(
        model_type=kind,
        num_hidden_layers=6,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        max_window_layers=4,
        sliding_window=9,
    )
    windows = [huggingface.attention_spec(config, i).fields.get("window") for i in range(6)]
    assert windows == [(8, 0) if slides else None for slides in PATTERNS[kind]]


def test_windows_on_both_sides():
    config = dict(golden("gemma3")[0], use_bidirectional_attention=True, sliding_window=8)
    spec = huggingface.attention_spec(config)
    assert not spec.is_causal and spec.fields["window"] == (4, 4)


@pytest.mark.parametrize(
    "error, match, changes, layer",
    [
        (NotImplementedError, "model_type takes one of .*'bert'", dict(model_type="bert"), 0),
        (NotImplementedError, "rope_type takes .*'longrope'",
         dict(rope_parameters=dict(rope_type="longrope")), 0),
        (NotImplementedError, "alibi takes False", dict(model_type="falcon", alibi=True), 0),
        (NotImplementedError, r"names of .*\['n_head'\]", dict(model_type="falcon", n_head=8), 0),
        (NotImplementedError, "use_bidirectional_attention takes False for gemma2",
         dict(model_type="gemma2", use_bidirectional_attention=True), 0),
        (NotImplementedError, "use_bidirectional_attention takes False for gemma$",
         dict(model_type="gemma", use_bidirectional_attention=True), 0),
        (NotImplementedError, "is_causal takes true where there is a sliding window",
         dict(model_type="mistral", is_causal=False), 0),
        (NotImplementedError, "partial_rotary_factor takes 1 for llama, got 0.5",
         dict(partial_rotary_factor=0.5), 0),
        (NotImplementedError, "rope_type takes default, .*, got 'su'",
         dict(model_type="phi3", rope_scaling=dict(type="su", short_factor=[1.0], long_factor=[2.0])), 0),
        (NotImplementedError, "rope_type takes default for phi3",
         dict(model_type="phi3", rope_scaling=dict(type="yarn", factor=2.0)), 0),
        (NotImplementedError, "attention_chunk_size takes at least max_position_embeddings=128, got 64",
         dict(model_type="llama4_text", attention_chunk_size=64), 0),
        (NotImplementedError, "attn_temperature_tuning takes false, .*=128, got 128",
         dict(model_type="llama4_text", no_rope_layers=[0, 1], floor_scale=128), 0),
        (NotImplementedError, "use_qk_norm takes false where rope_type is 'yarn'",
         dict(model_type="llama4_text", rope_parameters=dict(rope_type="yarn", factor=2.0)), 0),
        (ValueError, "rope_parameters takes factor where rope_type is 'linear'",
         dict(rope_parameters=dict(rope_type="linear")), 0),
        (ValueError, "layer takes 0 to 1 .*, got 2", {}, 2),
    ],
)  # fmt: skip
def test_what_is_not_read(error, match, changes, layer):
    with pytest.raises(error, match=match):
        huggingface.attention_spec({**golden("llama")[0], **changes}, layer)


def test_what_is_no_configuration():
    with pytest.raises(TypeError, match=r"config takes what config.json holds .*, got Config"):
        huggingface.attention_spec(type("Config", (), {})())


@pytest.mark.parametrize(
    "match, changes",
    [
        ("rope_scaling takes an object, or null, got 'linear'", dict(rope_scaling="linear")),
        ("rope_theta takes a finite number greater than 0, got 'big'", dict(rope_theta="big")),
        ("rope_theta takes .*, got inf", dict(rope_theta=float("inf"))),
        (r"rope_scaling.factor takes .*, got '8'", dict(rope_scaling=dict(type="linear", factor="8"))),
        ("rope_parameters.full_attention takes an object, or null, got 1.0",
         dict(rope_parameters=dict(full_attention=1.0))),
        ("num_attention_heads takes a 64-bit integer of at least 1, got 0", dict(num_attention_heads=0)),
        ("num_attention_heads takes .*, got -4", dict(num_attention_heads=-4)),
        ("num_attention_heads takes .*, got True", dict(num_attention_heads=True)),
        ("num_attention_heads takes .*, got '4'", dict(num_attention_heads="4")),
        ("num_attention_heads takes .*, got None", dict(num_attention_heads=None)),
        ("num_attention_heads takes a multiple of num_key_value_heads .*, got 4 and 3",
         dict(num_key_value_heads=3)),
        ("hidden_size takes a multiple of num_attention_heads .*, got 25 and 4",
         dict(hidden_size=25, head_dim=None)),
        ("an even number, .*: got 7", dict(head_dim=7)),
        ("attention_bias takes true or false, got 'false'", dict(attention_bias="false")),
        ("layer_types takes an entry for each of num_hidden_layers=2, got 1",
         dict(model_type="gemma2", layer_types=["full_attention"])),
        ("layer_types takes 'full_attention' or .*, got 'mamba' for layer 1",
         dict(model_type="gemma2", layer_types=["full_attention", "mamba"])),
        ("no_rope_layers takes 0 or 1, got 'no' for layer 0",
         dict(model_type="smollm3", no_rope_layers=["no", 1])),
        ("sliding_window takes an integer of at least 1, or null, got 0",
         dict(model_type="mistral", sliding_window=0)),
        ("text_config takes an object, or null, got 'llama'", dict(text_config="llama")),
        ("model_type takes a string, got 3", dict(model_type=3)),
    ],
)  # fmt: skip
def test_malformed_configurations(match, changes):
    with pytest.raises((TypeError, ValueError), match=match):
        huggingface.attention_spec({**golden("llama")[0], **changes})


STRANGE = (
    *(None, True, -1, 0, 1, 3, 2.5, 1e-320, 1e400, float("nan"), 10**400),
    *("8", "", [], [1], ["x"] * 99, {}, {"a": 1}),
)
WRITTEN_ELSEWHERE = (  # than in what transformers 5 writes
    "layer_types", "no_rope_layers", "original_max_position_embeddings", "partial_rotary_factor",
    "quantization_config", "rope_local_base_freq", "rope_scaling", "rope_theta",
    "sliding_window_pattern", "text_config",
)  # fmt: skip
REFUSED = "rope_type takes default for phi3|use_qk_norm takes false where rope_type is 'yarn'"


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_is_strange_is_named(kind):
    """Each field of a configuration, and each one of its rotary embedding: what is not taken is
    refused with its name."""
    config = {**DEFAULTS[kind], "num_hidden_layers": 2, "max_position_embeddings": 4096}
    config["layer_types"] = (config.get("layer_types") or [])[:2] or None
    rope = dict(rope_type="yarn", factor=2.0, beta_fast=32, beta_slow=1, rope_theta=1e4)
    rope |= dict(truncate=True, low_freq_factor=1.0, high_freq_factor=4.0)
    rope["original_max_position_embeddings"] = 64
    names = {*config, *WRITTEN_ELSEWHERE}
    written = [(name, {name: value}) for name in names for value in STRANGE]
    for name in rope:
        for value in STRANGE:
            for other in ("yarn", "llama3", "linear") if name != "rope_type" else (None,):
                changed = {**rope, "rope_type": other, name: value}
                written.append((name, {"rope_scaling": changed}))
    seen = set()
    for name, changes in written:
        try:
            huggingface.attention_params({}, {**config, **changes}, 1)
        except (TypeError, ValueError, NotImplementedError) as error:
            assert name in str(error) or re.match(REFUSED, str(error)), (name, changes, error)
            seen.add(name)
        except KeyError as error:  # it was taken: the tensors are not there
            assert re.search("no tensor|text_config has no model_type", str(error))
    assert {"hidden_size", "num_attention_heads", "rope_theta", "factor", "text_config"} <= seen


def test_a_configuration_without_a_model_type():
    with pytest.raises(KeyError, match="config has no model_type, which takes one of .*'llama'"):
        huggingface.attention_spec({"hidden_size": 8})


@pytest.mark.parametrize("layer", ["0", -1, True, 0.0, None])
def test_a_layer_is_an_index(layer):
    with pytest.raises((TypeError, ValueError), match=f"layer takes .*, got {layer!r}"):
        huggingface.attention_spec(golden("llama")[0], layer)


# ---- files --------------------------------------------------------------------------------------


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("shards", [1, 3])
def test_load(tmp_path, shards):
    config, tensors, _ = golden("qwen3")
    path = save(tmp_path, "qwen3", tensors, shards)
    assert huggingface.read_config(path) == config
    found = huggingface.load(path)
    assert list(found) == [0, 1]
    for layer, params in found.items():
        assert_same(params, huggingface.attention_params(tensors, config, layer))
    assert_same(huggingface.load(path, layers=[1]), {1: found[1]})


def test_prefixes(tmp_path):
    """The language model of a multimodal one: its vision tower has layers, too."""
    config, tensors, _ = golden("gemma3")
    prefixes = ("language_model.model.", "model.language_model.", "")
    prefixes += ("language_model.", "model.language_model.model.", "model.text_model.")
    for prefix in prefixes:
        named = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
        named["vision_tower.layers.0.self_attn.o_proj.weight"] = np.zeros((1, 1))
        assert_same(
            huggingface.attention_params(named, config, 1),
            huggingface.attention_params(tensors, config, 1),
        )


def test_bfloat16_stays_and_dtype_casts(tmp_path):
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in golden("llama")[1].items()}
    path = save(tmp_path, "llama", tensors)
    (params,) = huggingface.load(path, layers=[0]).values()
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    (cast,) = huggingface.load(path, layers=[0], dtype=np.float32).values()
    assert_same(cast, jax.tree.map(lambda x: x.astype(np.float32), params))


def test_gemmas_norms_keep_their_digits():
    """1 + 1/1000 is 1 in bfloat16."""
    config, tensors, _ = golden("gemma3")
    name = "model.layers.0.self_attn.q_norm.weight"
    small = np.full_like(tensors[name], 1e-3).astype(ml_dtypes.bfloat16)
    params = huggingface.attention_params({**tensors, name: small}, config)
    exact = 1 + small.astype(np.float32)
    np.testing.assert_array_equal(params["query_ln"]["scale"], exact, strict=True)
    cast = huggingface.attention_params({**tensors, name: small}, config, dtype=np.float16)
    np.testing.assert_array_equal(cast["query_ln"]["scale"], exact.astype(np.float16), strict=True)


UP = "model.layers.0.self_attn.kv_b_proj.weight"


def quantized(block):
    """A configuration and tensors with one matrix in float8, and what it holds. Blocks at the edges
    are smaller."""
    config, tensors, _ = golden("deepseek_v3")
    weight, rng = tensors[UP], np.random.default_rng(0)
    scales = rng.uniform(0.5, 2, [-(-n // b) for n, b in zip(weight.shape, block, strict=True)])
    scales = scales.astype(np.float32)
    spread = scales.repeat(block[0], 0).repeat(block[1], 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
    return config, {**tensors, UP: codes, f"{UP}_scale_inv": scales}, codes.astype(float) * spread


def assert_up_is(params, exact):
    up = np.concatenate([params["key_up"]["kernel"], params["value_up"]["kernel"]], -1)
    assert up.dtype == np.float32
    np.testing.assert_allclose(up.transpose(1, 2, 0).reshape(exact.shape), exact, rtol=1e-6)


def test_float8_with_scales_of_blocks(tmp_path):
    """As DeepSeek-V3 is published."""
    from safetensors.numpy import save_file

    block = (16, 5)
    config, tensors, exact = quantized(block)
    quantization = {"quant_method": "fp8", "weight_block_size": block}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization})
    )
    save_file(tensors, tmp_path / "model.safetensors")
    (params,) = huggingface.load(tmp_path, layers=[0]).values()
    assert_up_is(params, exact)
    whole = {"text_config": config, "quantization_config": quantization}
    assert_up_is(huggingface.attention_params(tensors, whole), exact)


def test_float8_with_one_scale():
    config, tensors, exact = quantized((1000, 1000))
    scale = tensors[f"{UP}_scale_inv"]
    for scales in (scale, scale.reshape(()), scale.reshape(1)):
        given = {**tensors, f"{UP}_scale_inv": scales}
        assert_up_is(huggingface.attention_params(given, config), exact)


def test_codes_that_are_not_read():
    config, tensors, _ = quantized((16, 5))
    with pytest.raises(
        ValueError, match=rf"{UP}_scale_inv takes the shape .* blocks of \(128, 128"
    ):
        huggingface.attention_params(tensors, config)
    bare = {name: x for name, x in tensors.items() if not name.endswith("scale_inv")}
    with pytest.raises(NotImplementedError, match=f"{UP} is float8_e4m3fn, quant_method is 'unkn"):
        huggingface.attention_params(bare, config, dtype=np.float32)
    packed = {name.replace(".weight", ".qweight"): x for name, x in golden("llama")[1].items()}
    with pytest.raises(NotImplementedError, match="o_proj.weight is not there, .* is 'gptq'"):
        config = {**golden("llama")[0], "quantization_config": {"quant_method": "gptq"}}
        huggingface.attention_params(packed, config)


def test_errors_of_files(tmp_path):
    config, tensors, _ = golden("llama")
    with pytest.raises(FileNotFoundError, match="config.json"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="has no .safetensors"):
        huggingface.load(tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(KeyError, match=name):
        huggingface.attention_params({n: x for n, x in tensors.items() if n != name}, config)
    with pytest.raises(KeyError, match="self_attn.o_proj.weight"):
        huggingface.attention_params({}, config)
    with pytest.raises(ValueError, match=rf"{name} takes the shape \(12, 24\), got \(6, 24\)"):
        huggingface.attention_params({**tensors, name: tensors[name][:6]}, config)


def test_load_with_a_configuration_from_elsewhere(tmp_path):
    config, tensors, _ = golden("llama")
    path = save(tmp_path, "llama", tensors)
    found = huggingface.load(path, layers=[1])
    elsewhere = tmp_path / "other.json"
    (path / "config.json").rename(elsewhere)
    assert huggingface.read_config(elsewhere) == config
    for given in (config, elsewhere, str(elsewhere)):
        assert_same(huggingface.load(path, [1], config=given), found)
    with pytest.raises(TypeError, match=r"config takes what config.json holds .*, got list"):
        huggingface.load(path, config=[])
    with pytest.raises(FileNotFoundError, match="snapshot_download.'org/name'"):
        huggingface.load(path, config="org/name")


def damaged(data):
    """A file in ways that downloads leave it."""
    yield "is a git-lfs pointer .* `git lfs pull`", b"version https://git-lfs.github.com/spec/v1\n"
    for end in (0, 5, 20, len(data) - 1):
        yield f"is cut off after {end} bytes", data[:end]
    yield "is no safetensors file", b"<html>" * 20


@pytest.mark.parametrize("shards", [1, 3])
def test_damaged_files_are_named(tmp_path, shards):
    path = save(tmp_path, "llama", golden("llama")[1], shards)
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        for match, left in damaged(data):
            file.write_bytes(left)
            with pytest.raises(ValueError, match=f"{file.name} .*{match}|{file.name} {match}"):
                huggingface.load(path)
        file.write_bytes(data)
    huggingface.load(path)


def test_an_index_that_does_not_fit_its_files(tmp_path):
    path = save(tmp_path, "llama", golden("llama")[1], 2)
    index, first, second = sorted(path.glob("model*"), key=lambda file: file.suffix)
    written = index.read_text()
    name = "model.layers.0.self_attn.q_proj.weight"  # the first one that is asked for
    index.write_text(written.replace(first.name, second.name))
    with pytest.raises(KeyError, match=f"no tensor {name} in .*{second.name}, where .*index.json"):
        huggingface.load(path)
    index.write_text(written)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no .*{second.name}, .*index.json names"):
        huggingface.load(path)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json takes a weight_map of names to files"):
            huggingface.load(path)
    index.write_text(written[:40])
    with pytest.raises(ValueError, match="index.json is no JSON, or is cut off after 40 bytes"):
        huggingface.load(path)


def test_what_is_no_folder_or_no_config(tmp_path):
    for read in (huggingface.read_config, huggingface.load):
        with pytest.raises(
            FileNotFoundError, match="no folder 'org/name'.*snapshot_download.'org/na"
        ):
            read("org/name")
        with pytest.raises(TypeError, match="path takes a folder's path, got 3"):
            read(3)
    file = tmp_path / "config.json"
    file.write_text("[]")
    for read in (huggingface.read_config, huggingface.load):
        with pytest.raises(ValueError, match=r"config.json takes a JSON object, got \[\]"):
            read(tmp_path)
    file.write_text("{'model_type': 'llama'}")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        huggingface.load(tmp_path)
    with pytest.raises(NotADirectoryError, match="path takes a folder, got the file .*config.json"):
        huggingface.load(file)
    for layers in (1, "01"):
        with pytest.raises(TypeError, match="layers takes an iterable of integers, got"):
            huggingface.load(tmp_path, layers, config=golden("llama")[0])
    with pytest.raises(TypeError, match="layers takes a 64-bit integer of at least 0, got '1'"):
        huggingface.load(tmp_path, ["1"], config=golden("llama")[0])
    with pytest.raises(TypeError, match="tensors takes a mapping of names to arrays, got list"):
        huggingface.attention_params([], golden("llama")[0])
    blocks = {"quantization_config": {"weight_block_size": [128]}}
    with pytest.raises(ValueError, match=r"weight_block_size takes two integers, got \[128\]"):
        huggingface.attention_params({}, {**golden("llama")[0], **blocks})
