"""Caches on meshes of absent chips: what a step sends, updates in place, and kernels that run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axattn import aot
from axattn.cache import DenseCache, PagedCache
from axattn.parallel import Axes
from axattn.parallel._sharded_cache import ShardedCache
from tests.aot.compilers import need, releases_have_all

pytestmark = pytest.mark.aot

B, N, K, H, S = 4, 16, 2, 128, 65536
AXES = Axes(heads="model", sequence="context")
SIZES = {DenseCache: (B, S), PagedCache: (B, B * S // 512, 512, S // 512)}


def setting(kind, dtype):
    """An abstract cache on 2 x 4 chips, and a function that makes shapes of tokens."""
    mesh = aot.mesh(need("v5p"), {"model": 2, "context": 4})
    sizes = dict(axes=AXES, mesh=mesh, abstract=True, dtype=dtype)
    cache = ShardedCache.create(kind, *SIZES[kind], K, H, **sizes)
    spec = NamedSharding(mesh, PartitionSpec(None, None, "model"))

    def tokens(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=spec)

    return cache, tokens


def kernels(report):
    return report.compiled.as_text().count("tpu_custom_call")


@releases_have_all(
    "kind, dtype, window",
    [(DenseCache, "bfloat16", 4095), (PagedCache, "int8", None)],
    SIZES,
    ("bfloat16", "int8"),
    (None, 4095),
)
def test_a_step_sends_outputs_alone(kind, dtype, window):
    cache, tokens = setting(kind, dtype)
    query, key = (tokens(B, 1, n, H) for n in (N, K))

    def step(cache, query, key):
        return cache.extend(query, key, key, local_window_size=window and (window, 0))

    r = aot.analyze(step, cache, query, key, target="v5p", donate_argnums=0)
    assert r.ok, r
    # The maximum, then outputs and weights together.
    assert [(found.kind, found.count) for found in r.collectives] == [("all-reduce", 2)]
    assert r.sent_bytes <= 2 * 4 * B * N // 2 * (H + 2)
    assert cache.nbytes / 8 <= r.alias_bytes <= 1.01 * cache.nbytes / 8 + 2**16
    assert r.temp_bytes < 2**20 + (window is not None) * 4 * B * S
    assert kernels(r) == 1


def test_a_loop_of_steps_keeps_its_caches_in_place():
    """Two layers in a while loop, as in generation."""
    cache, tokens = setting(DenseCache, "int8")

    def generate(caches, x):
        def step(state):
            count, caches, x = state
            grown = []
            for cache in caches:
                x, cache = cache.extend(x, x[:, :, :K], x[:, :, -K:])
                grown.append(cache)
            return count + 1, tuple(grown), x

        return jax.lax.while_loop(lambda s: (s[0] < 99) & (s[2] != 7).any(), step, (0, caches, x))

    x = tokens(B, 1, N, H)
    r = aot.analyze(generate, (cache, cache), x, target="v5p", donate_argnums=0)
    assert r.ok, r
    assert r.alias_bytes >= 2 * cache.nbytes / 8
    assert r.temp_bytes < cache.nbytes / 8 / 10
    assert kernels(r) == 2
