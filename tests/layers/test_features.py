"""What axattn.linen and axattn.nnx add to Flax, against the layer written out in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask
from axattn.rotary import LinearScaling, RotaryEmbedding
from tests import reference
from tests.layers.apis import NNX, B, E, H, K, Linen, N, T, assert_close, each_api, inputs
from tests.reference import f64
from tests.tiers import ci

EVERYTHING = dict(
    rope=RotaryEmbedding(), qk_norm="rms", window=(4, 0), logits_soft_cap=5.0, scale=0.7, sinks=True
)
CLASSES = {1: "MultiQueryAttention", K: "GroupedQueryAttention", N: "MultiHeadAttention"}


def made(api, *like, num_kv_heads=K, **fields):
    return api(*like, cls=CLASSES[num_kv_heads], num_kv_heads=num_kv_heads, **fields)


# What the layers take, and what the function calls it.
OPTIONS = {name: name for name in ("scale", "logits_soft_cap", "is_causal", "prefix")}
OPTIONS["window"] = "local_window_size"
OPTIONS |= {"segment_ids": "query_segment_ids", "kv_segment_ids": "key_value_segment_ids"}


def by_hand(params, x, memory=None, **given):
    """Output and weights of a layer with these fields and arguments."""
    params = jax.tree.map(f64, params)

    def projected(name, x):
        p = params[name]
        return np.einsum("...te,enh->...tnh", x, p["kernel"]) + p.get("bias", 0)

    def normalized(x, scale):
        axes = -1 if given.get("qk_norm_per_head", True) else (-2, -1)
        if given["qk_norm"] == "layer":
            x = x - x.mean(axes, keepdims=True)
        square = (x**2).mean(axes, keepdims=True)
        return x / np.sqrt(square + given.get("qk_norm_epsilon", 1e-6)) * scale

    keys = x if memory is None else memory
    q, k, v = projected("query", x), projected("key", keys), projected("value", keys)
    if "qk_norm" in given:
        q, k = (normalized(y, params[f"{n}_ln"]["scale"]) for n, y in (("query", q), ("key", k)))
    if "rope" in given:
        at = given.get("positions", np.arange(q.shape[-3]))
        kv_at = given.get("kv_positions", at if memory is None else np.arange(k.shape[-3]))
        q, k = (given["rope"].apply(np.float32(y), p) for y, p in ((q, at), (k, kv_at)))
    options = {OPTIONS[name]: value for name, value in given.items() if name in OPTIONS}
    attended = reference.attend(q, k, v, sinks=params.get("sinks"), **options)
    out = np.einsum("...tnh,nhe->...te", attended.out, params["out"]["kernel"])
    return out + params["out"].get("bias", 0), attended.weights


def shapes(num_kv_heads=K, use_bias=True, out_use_bias=None, sinks=False, **fields):
    """Of the parameters."""
    heads = {"query": N, "key": num_kv_heads, "value": num_kv_heads}
    tree = {name: {"kernel": (E, n, H), "bias": (n, H)} for name, n in heads.items()}
    tree["out"] = {"kernel": (N, H, E), "bias": (E,)}
    for name in tree:
        if not (use_bias if name != "out" or out_use_bias is None else out_use_bias):
            del tree[name]["bias"]
    for name in ("query", "key") if "qk_norm" in fields else ():
        all_heads = () if fields.get("qk_norm_per_head", True) else (heads[name],)
        tree[f"{name}_ln"] = {"scale": (*all_heads, H)}
    return tree | ({"sinks": (N,)} if sinks else {})


ROPE = dict(rope=RotaryEmbedding())
SEGMENTS = np.array([[0] * 3 + [1] * 4, [2] * 4 + [0] * 3])
OTHER = dict(segment_ids=SEGMENTS, kv_segment_ids=np.array([[0, 1, 1, 0, 1], [2, 0, 2, 0, 2]]))
CASES = {  # fields of the layer, arguments of its call
    "multi-query": (dict(num_kv_heads=1), {}),
    "grouped": ({}, {}),
    "multi-head": (dict(num_kv_heads=N), {}),
    "rope": (ROPE, {}),
    "rope, positions per row": (ROPE, dict(positions=np.arange(T) * 2 + [[3], [40]])),
    "rope, interleaved": (
        dict(rope=RotaryEmbedding(500.0, interleaved=True, rotary_dim=2)),
        dict(positions=np.arange(T) + 11),
    ),
    "rope, scaled": (dict(rope=RotaryEmbedding(scaling=LinearScaling(2.0))), {}),
    "rope, other keys": (ROPE, dict(memory=5)),
    "rope, positions of other keys": (
        ROPE,
        dict(memory=5, positions=np.arange(T) + 4, kv_positions=np.arange(5) * 3),
    ),
    "layer norm": (dict(qk_norm="layer"), {}),
    "rms norm": (dict(qk_norm="rms"), {}),
    "epsilon": (dict(qk_norm="rms", qk_norm_epsilon=0.5), {}),
    "layer norm, epsilon": (dict(qk_norm="layer", qk_norm_epsilon=0.5), {}),
    "layer norm over all heads": (dict(qk_norm="layer", qk_norm_per_head=False), {}),
    "rms norm over all heads": (dict(qk_norm="rms", qk_norm_per_head=False), {}),
    "no bias of the output": (dict(out_use_bias=False, fused_qkv=True), {}),
    "no other bias": (dict(use_bias=False, out_use_bias=True, fused_qkv=True), {}),
    "no bias": (dict(use_bias=False, out_use_bias=None, fused_qkv=True), {}),
    "window": (dict(window=2), {}),
    "left window": (dict(window=(3, 0)), {}),
    "soft cap": (dict(logits_soft_cap=0.5), {}),
    "scale": (dict(scale=0.9), {}),
    "sinks": (dict(sinks=True), {}),
    "implementation": (dict(implementation=("xla_chunked", "xla")), {}),
    "segments": ({}, dict(segment_ids=SEGMENTS, is_causal=True)),
    "segments of other keys": ({}, dict(memory=5, **OTHER)),
    "fused": (dict(fused_qkv=True), {}),
    "fused, other keys": (dict(fused_qkv=True), dict(memory=5)),
    "everything": (
        dict(**EVERYTHING, fused_qkv=True),
        dict(is_causal=True, segment_ids=SEGMENTS, positions=np.arange(T) * 2),
    ),
}
SOWN = ("window", "left window", "soft cap", "scale", "sinks", "implementation", "everything")


@pytest.mark.parametrize("name", CASES)
@each_api
def test_equals_the_layer_by_hand(api, name):
    fields, kwargs = CASES[name]
    kwargs = dict(kwargs)
    args = [inputs()]
    if "memory" in kwargs:
        args.append(inputs(B, kwargs.pop("memory"), E, seed=2))
    layer = made(api, *args, **fields)
    assert jax.tree.map(np.shape, layer.params) == shapes(**fields)
    expected, weights = by_hand(layer.params, *args, **fields, **kwargs)
    assert_close(layer(*args, **kwargs), expected, rtol=1e-4, atol=1e-5)
    if name in SOWN:
        out, sown = layer.sown(*args, sow_weights=True, **kwargs)
        assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert_close(sown, weights, atol=1e-5)


@each_api
def test_epsilon_by_default(api):
    """Where vectors are short, it is what is left of their length."""
    x = 1e-3 * inputs()
    layer = made(api, inputs(), qk_norm="rms", use_bias=False)
    expected, _ = by_hand(layer.params, x, qk_norm="rms")
    assert_close(layer(x), expected, rtol=1e-4, atol=1e-8)


@each_api
def test_sinks_are_zeros_at_first(api):
    layer = api(inputs(), sinks=True, param_dtype=jnp.bfloat16)
    tree = layer.initial(jax.random.key(0))
    sinks = tree["sinks"][...] if api is NNX else tree["params"]["sinks"]
    assert sinks.shape == (N,) and sinks.dtype == jnp.bfloat16 and not sinks.any()


@pytest.mark.parametrize("which", ["self", "shared kv", "all different", "bfloat16"])
@each_api
def test_fused_qkv_is_one_product_per_input(api, which):
    x, y, z = (inputs(seed=i) for i in (1, 2, 3))
    args = {"shared kv": (x, y), "all different": (x, y, z)}.get(which, (x,))
    fields = dict(use_bias=False, dtype=jnp.bfloat16) if which == "bfloat16" else {}
    seen = []

    def dot_general(*args, **kwargs):
        seen.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    fused = made(api, *args, fused_qkv=True, qkv_dot_general=dot_general, **fields)
    seen.clear()
    out, expected = fused(*args), made(api, *args, **fields)(*args)
    assert len(seen) == len(args) and out.dtype == expected.dtype
    tolerance = 2e-2 if fields else 1e-5
    assert_close(out, expected, atol=tolerance, rtol=tolerance)


WINDOW = dict(window=3)
DECODED = [(Linen, ROPE, (2,)), (NNX, WINDOW, (2,)), (Linen, EVERYTHING, ()), (NNX, EVERYTHING, ())]
MORE = [(Linen, WINDOW, (2,)), (NNX, ROPE, (2,))]
MORE += [(api, EVERYTHING, (2, 3)) for api in (Linen, NNX)]
DECODED += ci(*MORE)


@pytest.mark.parametrize("api, fields, lead", DECODED)
def test_decoding_equals_the_causal_pass(api, fields, lead):
    x = inputs(*lead, T, E)
    layer = made(api, inputs(), decode=True, fused_qkv=True, **fields)
    # is_causal must not turn the one query into position 0.
    out, cache = layer.decode(x, is_causal=True)
    expected, _ = by_hand(layer.params, x, is_causal=True, **fields)
    assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert cache["cached_key"].shape == (*lead, T, K, H)


@pytest.mark.parametrize("api", [Linen, *ci(NNX)])
def test_gradients_reach_all_parameters(api):
    layer = made(api, inputs(), **EVERYTHING, fused_qkv=True)
    grads = layer.gradients(inputs(), is_causal=True)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) == 12
    for path, g in leaves:
        assert jnp.isfinite(g).all() and (g != 0).any(), path


@each_api
def test_mask_is_a_traced_argument(api):
    x, layer = inputs(), made(api, inputs())
    run = jax.jit(lambda n: layer(x, mask=Mask.prefix(n)))
    for n in (1, 5):
        assert_close(run(n), by_hand(layer.params, x, prefix=n)[0], rtol=1e-4, atol=1e-5)
