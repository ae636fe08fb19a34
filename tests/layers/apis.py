"""One way to make and call a layer of either of Flax's packages, Flax's own or axattn's.

``Linen(x, cls="GroupedQueryAttention", num_kv_heads=K)(x)`` and ``NNX`` with the same arguments: the
inputs give the sizes. Both keep their parameters as plain dicts of the same names. Layers are called
operation by operation, which compiles little where shapes are those below; what has other shapes,
or is differentiated, is compiled as a whole.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import axattn.linen
import axattn.nnx

B, T, N, K, E = 2, 7, 4, 2, 16
H = E // N


def inputs(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape or (B, T, E)).astype(np.float32)


def randomized(tree, seed=7):
    """Zeros and ones of the beginning would hide what is dropped."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        numbers = 0.3 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        return numbers.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def assert_close(a, b, **tolerances):
    """Arrays, or trees of them."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), **tolerances)


class Layer:
    """``layer(x, ...)`` is a call with ``layer.params``; ``dropout=`` is the seed of its stream."""

    def __call__(self, *args, **kwargs):
        return self.apply(self.params, *args, **kwargs)

    def gradients(self, *args, **kwargs):
        """Of the sum of the output's squares, by the parameters and by the first input."""

        def loss(params, x):
            return (self.apply(params, x, *args[1:], **kwargs) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(self.params, args[0])

    def decode(self, x, **kwargs):
        """Token by token over Flax's cache: the outputs ``[..., T, D]`` and the cache after them."""
        shape = x.shape

        def step(cache, token):
            return self.step(cache, token, shape, **kwargs)

        tokens = np.moveaxis(x[..., None, :], -3, 0)
        cache, out = jax.jit(lambda x: jax.lax.scan(step, self.empty_cache(shape), x))(tokens)
        return np.moveaxis(out[..., 0, :], 0, -2), cache


class Linen(Layer):
    package, flax = axattn.linen, nn
    grouped = {}  # Flax's class has no shared heads

    def __init__(self, *like, cls="MultiHeadAttention", num_heads=N, package=package, **fields):
        self.module, self.like = getattr(package, cls)(num_heads, **fields), like
        shapes = jax.eval_shape(self.initial, jax.random.key(0))
        self.params = randomized(shapes["params"])

    def initial(self, key):
        return self.module.init({"params": key, "dropout": key}, *self.like)

    def apply(self, params, *args, variables=(), dropout=None, **kwargs):
        if dropout is not None:
            kwargs["rngs"] = {"dropout": jax.random.key(dropout)}
        return self.module.apply({"params": params, **dict(variables)}, *args, **kwargs)

    def sown(self, *args, **kwargs):
        """The output, and the weights or None."""
        out, state = self(*args, mutable=["intermediates"], **kwargs)
        return out, state.get("intermediates", {}).get("attention_weights", [None])[0]

    def empty_cache(self, shape):
        return self.module.init(jax.random.key(0), jnp.zeros(shape))["cache"]

    def step(self, cache, token, shape, **kwargs):
        out, state = self(token, variables={"cache": cache}, mutable=["cache"], **kwargs)
        return state["cache"], out


class NNX(Layer):
    package, flax = axattn.nnx, nnx
    grouped = dict(num_kv_heads=K)

    def __init__(self, x, *kv, cls="MultiHeadAttention", num_heads=N, package=package, **fields):
        fields = {"in_kv_features": (kv or [x])[0].shape[-1], "decode": False, **fields}
        self.make = lambda key: getattr(package, cls)(
            num_heads, x.shape[-1], rngs=nnx.Rngs(key, dropout=1), **fields
        )
        self.graphdef, self.state, self.rest = nnx.split(self.make(0), nnx.Param, ...)
        self.params = randomized(nnx.to_pure_dict(self.state))

    def initial(self, key):
        return nnx.state(self.make(key))

    def module(self, params):
        """One of its own for each call, which may change it."""
        state = jax.tree.unflatten(jax.tree.structure(self.state), jax.tree.leaves(params))
        return nnx.merge(self.graphdef, state, self.rest)

    def apply(self, params, *args, dropout=None, call=lambda module: module, **kwargs):
        if dropout is not None:
            kwargs["rngs"] = nnx.Rngs(dropout=dropout)
        return call(self.module(params))(*args, **kwargs)

    def sown(self, *args, **kwargs):
        """The output, and the weights or None."""
        out, state = self(*args, call=lambda m: nnx.capture(m, nnx.Intermediate), **kwargs)
        return out, next(iter(jax.tree.leaves(state)), None)

    def with_cache(self, shape):
        module = self.module(self.params)
        module.init_cache(shape)
        return module

    def empty_cache(self, shape):
        return nnx.to_pure_dict(nnx.state(self.with_cache(shape), nnx.Cache))

    def step(self, cache, token, shape, **kwargs):
        module = self.with_cache(shape)
        for name, array in cache.items():
            getattr(module, name)[...] = array
        out = module(token, **kwargs)
        return nnx.to_pure_dict(nnx.state(module, nnx.Cache)), out


each_api = pytest.mark.parametrize("api", [Linen, NNX])
