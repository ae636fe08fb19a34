"""Which arguments reach an ``attention_fn`` and which are refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import axattn.linen
import axattn.nnx
from axattn import Mask
from axattn._implementations import registry
from axattn._layers.attention_fn import call_attention

Q, KV = (np.ones(size, np.float32) for size in ((2, 1, 4, 8), (2, 6, 2, 8)))


def called(fn, flax_kwargs=None, options=None, **kwargs):
    kwargs = {"is_causal": False, **kwargs}
    return call_attention(fn, Q, KV, KV, flax_kwargs or {}, options or {}, **kwargs)


def names(query, key, value, *, mask=None, scale=None):
    return mask, scale


def ours(query, key, value, *, mask=None, q_offset=None, is_causal=False, local_window_size=None):
    return dict(
        mask=mask, q_offset=q_offset, is_causal=is_causal, local_window_size=local_window_size
    )


def anything(query, key, value, **kwargs):
    return kwargs


def test_options_reach_the_function():
    assert called(names, {"mask": None}, {"scale": 2.0}) == (None, 2.0)
    assert called(anything, {}, {"scale": 2.0})["scale"] == 2.0
    assert called(functools.partial(names, scale=3.0)) == (None, 3.0)


@pytest.mark.parametrize(
    "option, layer_name",
    [
        ("sinks", "sinks"),
        ("local_window_size", "window"),
        ("query_segment_ids", "segment_ids"),
    ],
)
def test_refused_options_are_named_as_in_the_layer(option, layer_name):
    match = rf"{layer_name} was asked for, but attention_fn=names takes no argument '{option}'"
    with pytest.raises(ValueError, match=match):
        called(names, {}, {option: 1})
    with pytest.raises(ValueError, match=match):
        called(functools.partial(names, scale=1.0), {}, {option: 1})


def test_is_causal_is_an_option_like_others():
    with pytest.raises(ValueError, match="is_causal was asked for"):
        called(names, is_causal=True)
    assert called(ours, is_causal=True)["is_causal"] is True
    assert called(anything, {"is_causal": False}, is_causal=True)["is_causal"] is True


def test_unknown_flax_arguments_are_dropped_only_where_flax_does():
    assert called(names, {"mask": None, "dtype": None}, only_known=True) == (None, None)
    with pytest.raises(TypeError, match="dtype"):
        called(names, {"mask": None, "dtype": None})


def test_decoding_is_structure_where_it_is_understood():
    index = jnp.array(3)
    out = called(ours, {"mask": None}, {"local_window_size": (1, 0)}, decode_index=index)
    assert out == dict(mask=None, q_offset=index, is_causal=True, local_window_size=(1, 0))


@pytest.mark.parametrize(
    "window, slots",
    [
        (None, [1, 1, 1, 1, 0, 0]),
        (1, [0, 0, 1, 1, 0, 0]),
        ((2, 0), [0, 1, 1, 1, 0, 0]),
        ((None, 0), [1, 1, 1, 1, 0, 0]),
    ],
)
def test_decoding_is_a_mask_array_elsewhere(window, slots):
    options = {} if window is None else {"local_window_size": window}
    kwargs = dict(decode_index=jnp.array(3), is_causal=True)
    mask, _ = called(names, {"mask": None}, options, **kwargs)
    np.testing.assert_array_equal(mask, np.broadcast_to(slots, (2, 1, 1, 6)))
    first = jnp.ones((2, 4, 1, 6)).at[0, ..., 3].set(0)
    mask, _ = called(names, {"mask": first}, options, **kwargs)
    expected = np.broadcast_to(slots, (2, 4, 1, 6)).copy()
    expected[0, ..., 3] = 0
    np.testing.assert_array_equal(mask, expected)
    # A window inside the mask is seen from the token's place, too.
    mask, _ = called(names, {"mask": Mask.window(1, 0)}, options, **kwargs)
    np.testing.assert_array_equal(mask[0, 0, 0], np.array(slots) & [0, 0, 1, 1, 0, 0])


class _PlannedError(Exception):
    pass


def layers():
    """Layers of both dialects as functions that make them and call them, under a name."""
    x, sizes = jnp.ones((1, 4, 16)), dict(num_heads=2)
    ranks = dict(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
    own = dict(attention_fn=axattn.dot_product_attention)

    def linen(cls, **fields):
        return lambda: cls(**sizes, **fields).init(jax.random.key(0), x)

    def on_nnx(cls, **fields):
        return lambda: cls(**sizes, in_features=16, rngs=nnx.Rngs(0), **fields)(x)

    return {
        "linen": linen(axattn.linen.MultiHeadAttention),
        "linen, the door": linen(axattn.linen.MultiHeadAttention, **own),
        "linen, latent": linen(axattn.linen.MultiHeadLatentAttention, **ranks),
        "linen, absorbed": linen(axattn.linen.MultiHeadLatentAttention, form="absorbed", **ranks),
        "nnx": on_nnx(axattn.nnx.MultiHeadAttention, decode=False),
        "nnx, latent": on_nnx(axattn.nnx.MultiHeadLatentAttention, **ranks),
    }


@pytest.mark.parametrize("name", layers())
def test_layers_say_that_they_project(name, monkeypatch):
    """Of the call that implementations get."""
    found = []

    def plan(call, _):
        found.append(call.heads_first)
        raise _PlannedError

    monkeypatch.setattr(registry, "make_plan", plan)
    with pytest.raises(_PlannedError):
        layers()[name]()
    assert found == [True]
