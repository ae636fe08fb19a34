"""A cache on a mesh is the cache on one device: prompts, steps, ragged rows, precisions, features."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import axattn.linen
import axattn.nnx
from axattn import Mask, latent
from axattn.cache import Cache, DenseCache, PagedCache, PagePool, RingCache, prefill
from axattn.parallel import Axes
from axattn.parallel._sharded_cache import ShardedCache
from axattn.rotary import RotaryEmbedding
from tests import caches, reference
from tests.caches import PAGE, QUANTIZED, G, H, K, N, h
from tests.parallel import sharded_caches
from tests.parallel.sharded_caches import AXES, B, gathered, poisoned
from tests.parallel.test_attention import moved
from tests.precision import ULPS

LENGTHS = np.array([22, 9, 0, 18])
MESHES = {
    "sequence": dict(context=4),
    "rows and sequence": dict(data=2, context=2),
    "all": dict(data=2, model=2, context=2),
    "heads on several devices": dict(model=6, context=1),
    "such heads, and sequence": dict(model=2, context=4),  # with K = 1
}


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("options",))
def extend(cache, query, key, value, lengths, options=()):
    return cache.extend(query, key, value, lengths=lengths, **dict(options))


def filled(cache, tokens, steps, lengths=LENGTHS, poison=False):
    """Outputs of all tokens, given in steps of so many, and the cache."""
    outs, done = [], 0
    for step in steps:
        here = [x[:, done : done + step] for x in tokens]
        cache = poisoned(cache) if poison else cache
        out, cache = extend(cache, *here, np.clip(lengths - done, 0, step).astype(np.int32))
        outs.append(np.asarray(out))
        done += step
    return np.concatenate(outs, 1), cache


def assert_alike(out, baseline, exact):
    """No worse than twice the cache on one device, against float64."""
    out, baseline = (np.asarray(x, np.float64) for x in (out, baseline))
    few = ULPS * float(jnp.finfo(jnp.float32).eps) * np.abs(exact).max()
    assert np.isfinite(out).all()
    assert np.abs(out - exact).max() <= 2 * np.abs(baseline - exact).max() + few


DTYPES = ("float32", "bfloat16", *QUANTIZED)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        pytest.param(*x, marks=() if x == ("paged", "int8") else pytest.mark.ci)
        for x in itertools.product(("dense", "paged"), DTYPES)
    ],
)
def test_prompts_and_tokens(mesh_of, kind, dtype):
    """Kinds of meshes take turns; unused slots hold NaN."""
    turn = (DTYPES.index(dtype) + 2 * (kind == "paged")) % len(MESHES)
    heads = 1 if list(MESHES)[turn] == "such heads, and sequence" else K
    group = 3 * G if list(MESHES)[turn] == "heads on several devices" else 2 * G
    mesh = mesh_of(**list(MESHES.values())[turn])
    tokens = caches.tokens(
        22, batch=B, kv_heads=heads, group=group, dtype=caches.float_dtype(dtype)
    )
    options = dict(dtype=dtype, kv_heads=heads)
    steps = (10, 1, 1, 10)
    plain, one = filled(caches.make(kind, batch=B, **options), tokens, steps)
    sharded = sharded_caches.make(kind, mesh, **options)
    out, cache = filled(sharded, tokens, steps, poison=True)

    assert cache.lengths.tolist() == one.lengths.tolist() == LENGTHS.tolist()
    stored = caches.contents(gathered(cache))
    for got, want in zip(stored, caches.contents(one), strict=True):
        np.testing.assert_array_equal(got, want)
    exact = reference.attend(
        tokens[0], *stored, is_causal=True, query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS
    )
    assert_alike(out, plain, exact.out)
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), cache, cache.shardings)
    assert all(jax.tree.leaves(kept))


FEATURES = {
    "window": dict(local_window_size=(5, 0)),
    "wide window, not causal": dict(local_window_size=(7, 3), is_causal=False),
    "soft cap": dict(logits_soft_cap=2.0),
    "sinks": dict(sinks=np.linspace(-1, 2, N).astype(np.float32)),
    "alibi": dict(alibi_slopes=np.linspace(0.1, 1, N).astype(np.float32)),
    "alibi of rows": dict(alibi_slopes=np.linspace(0.1, 1, B * N, dtype=np.float32).reshape(B, N)),
    "scale": dict(scale=np.float32(0.7)),
    "array scale": dict(scale=jnp.float32(0.7)),
    "mask": dict(mask=np.random.default_rng(1).random((B, N, 4, 48)) < 0.7),
    "mask of slots": dict(mask=np.random.default_rng(1).random((1, 48)) < 0.7),
    "bias": dict(bias=np.random.default_rng(2).normal(size=(1, N, 4, 48)).astype(np.float32)),
    "segments": dict(
        query_segment_ids=np.full((B, 4), 1),
        key_value_segment_ids=np.arange(48)[None] // 12 * [[1]] * B,
    ),
    "prefix": dict(mask=Mask.prefix(9), is_causal=False),
    "causal masks": dict(mask=Mask.causal(jnp.arange(-3, 1)) & Mask.causal(-1)),
    "lengths": dict(mask=Mask.lengths(3, np.array([20, 3, 4, 9])), is_causal=False),
    "positions": dict(q_positions=np.array([3, 17, 0, 8])),
    "everything": dict(is_causal=False),
}


@pytest.mark.ci
def test_features(mesh_of):
    """Outputs and LSE of all of them, from one program for the mesh and one for one device."""
    tokens = caches.tokens(22, batch=B)
    _, one = filled(caches.make("paged", batch=B), tokens, (22,))
    _, cache = filled(
        sharded_caches.make("paged", mesh_of(data=2, model=2, context=2)), tokens, (22,)
    )

    @jax.jit
    def attend(cache, query):
        return {
            name: cache.attend(query, return_residual=True, **options)
            for name, options in FEATURES.items()
        }

    query = caches.tokens(4, batch=B, seed=3)[0]
    found, want = attend(poisoned(cache), query), attend(one, query)
    for name in FEATURES:
        for got, expected in zip(found[name], want[name], strict=True):
            np.testing.assert_allclose(got, expected, atol=3e-6, err_msg=name)


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_rows_that_overflow(mesh_of, kind):
    """Are left alone, all other rows are not."""
    tokens = caches.tokens(24, batch=B)
    lengths = np.array([24, 10, 17, 0])
    make = functools.partial(sharded_caches.make, kind, mesh_of(data=2, context=4), capacity=32)
    before, cache = filled(make(), tokens, (24,), lengths)
    was = caches.contents(gathered(cache))
    with pytest.raises(ValueError, match="32 tokens"):
        cache.append(*(x[:, :12] for x in tokens[1:]))
    out, cache = extend(cache, *(x[:, :12] for x in tokens), np.array([12, 12, 5, 12]))
    assert cache.overflowed.tolist() == [True, False, False, False]
    assert cache.lengths.tolist() == [24, 22, 22, 12]
    assert not np.asarray(out[0]).any() and np.asarray(out[1]).all()
    now = caches.contents(gathered(cache))
    np.testing.assert_array_equal(now[0][0, :24], was[0][0, :24])
    with pytest.raises(ValueError, match=r"rows \[0\] have overflowed"):
        cache.append(*(x[:, :1] for x in tokens[1:]))

    cache = cache.reset(np.arange(B) == 0).truncate(np.array([9, 24, 10, 0]))
    assert cache.lengths.tolist() == [0, 22, 10, 0] and not cache.overflowed.any()
    again, _ = extend(cache, *(x[:, :12] for x in tokens), np.array([12, 0, 7, 0]))
    np.testing.assert_allclose(again[0], before[0, :12], atol=2e-6)


@pytest.mark.ci
def test_rings(mesh_of):
    mesh = mesh_of(data=2, model=2)
    tokens = caches.tokens(22, batch=B)
    steps = (20, 1, 1)
    options = dict(max_append=10, value_head_dim=h, dtype="float32")
    plain, _ = filled(RingCache.create(B, 7, K, H, **options), tokens, steps)
    axes = Axes(batch="data", heads="model")
    ring = ShardedCache.create(RingCache, B, 7, K, H, axes=axes, mesh=mesh, **options)
    out, ring = filled(ring, tokens, steps)
    np.testing.assert_allclose(out, plain, atol=2e-6)
    with pytest.raises(ValueError, match="at most max_append = 17 tokens .* got 22"):
        ring.append(*tokens[1:])


@pytest.mark.ci
def test_latents(mesh_of):
    """Values in the keys, by the naive form for a prompt and the absorbed one after it."""
    R, D, P, heads = 32, 8, 8, 4
    rng = np.random.default_rng(1)
    shapes = (B, 200, heads, D + P), (B, 200, R), (B, 200, P), (R, heads, D), (R, heads, h)
    query, latents, rope, *ups = (
        jnp.asarray(rng.normal(size=s).astype(jnp.float32)) for s in shapes
    )
    sizes = {**latent.cache_sizes(R, P), "dtype": "int8"}
    axes = Axes(heads="model", sequence="context")
    mesh = mesh_of(model=2, context=4)

    @jax.jit
    def run(cache):
        outs = []
        for first, last in ((0, 199), (199, 200)):
            here = (x[:, first:last] for x in (query, latents, rope))
            out, cache = latent.extend(cache, *here, *ups)
            outs.append(out)
        return jnp.concatenate(outs, 1)

    cache = ShardedCache.create(DenseCache, B, 256, **sizes, axes=axes, mesh=mesh)
    want = run(DenseCache.create(B, 256, **sizes))
    np.testing.assert_allclose(run(cache), want, atol=1e-4)


LAYER = dict(num_heads=8, num_kv_heads=2, qkv_features=64, rope=RotaryEmbedding(), window=9)


def linen_layer():
    layer = axattn.linen.MultiHeadAttention(**LAYER, implementation="xla")
    params = layer.init(jax.random.key(0), jnp.ones((1, 1, 16)))
    return functools.partial(layer.apply, params)


def nnx_layer():
    layer = axattn.nnx.MultiHeadAttention(
        **LAYER, in_features=16, implementation="xla", rngs=nnx.Rngs(0)
    )
    return lambda x, **kwargs: layer(x, **kwargs)


@pytest.mark.ci
@pytest.mark.parametrize("make_layer", [linen_layer, nnx_layer])
def test_layers_and_prefill(mesh_of, make_layer):
    layer = make_layer()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 22, 16)).astype(jnp.float32))
    lengths = np.array([21, 8, 1, 17])
    axes = Axes(batch="data", heads="model", sequence="context")
    sizes = dict(num_kv_heads=2, head_dim=8, dtype="float32")

    @jax.jit
    def run(cache, lengths):
        last, cache = prefill(
            lambda cache, x, lengths: layer(x, cache=cache, lengths=lengths),
            cache, x[:, :21], lengths, chunk_size=6,
        )  # fmt: skip
        token, cache = layer(x[:, 21:], cache=cache)
        return last, token, cache.lengths, cache.overflowed

    mesh = mesh_of(model=4, context=2)
    cache = ShardedCache.create(DenseCache, B, 24, **sizes, axes=axes, mesh=mesh)
    found, want = (run(c, lengths) for c in (cache, DenseCache.create(B, 24, **sizes)))
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)
    small = ShardedCache.create(DenseCache, B, 14, **sizes, axes=axes, mesh=mesh)
    assert run(small, lengths)[3].tolist() == [True, False, False, True]


# ---- pages -------------------------------------------------------------------------------------


@pytest.mark.ci
def test_one_pool_on_the_host_serves_all_shards(mesh_of):
    """Prefixes found again, pages shared and copied: the tables are those of one device."""
    query, key, value = caches.tokens(24, batch=2)
    pool, ids = PagePool(8, PAGE), list(range(20))

    def step(cache, table, firsts, counts, copies):
        cache = cache.copy_pages(*copies).with_table(table, np.array(firsts))
        width = max(counts)
        taken = np.array(firsts)[:, None] + np.arange(width)
        tokens = (np.take_along_axis(x, taken[..., None, None], 1) for x in (query, key, value))
        return extend(cache, *tokens, np.array(counts))

    sizes = dict(value_head_dim=h, dtype="float32")
    plain = PagedCache.create(2, 8, PAGE, 3, K, H, **sizes)
    cache = ShardedCache.create(
        PagedCache, 2, 8, PAGE, 3, K, H, axes=AXES, mesh=mesh_of(model=2, context=4), **sizes
    )
    first, second = pool.allocate(ids), pool.allocate(0)
    outs, found = [], [cache, plain]
    plans = [(pool.block_table([first, second], 3), [0, 0], [20, 0], ([], []))]
    pool.publish(first)
    pool.append(first, [20])
    second = pool.allocate([*ids[:13], 77, 78])
    assert pool.cached(second) == 13
    copies = pool.take_copies()
    plans.append((pool.block_table([first, second], 3), [20, 13], [1, 2], copies))
    assert len(copies[0]) == 1
    for plan in plans:
        found = [step(cache, *plan) for cache in found]
        outs.append([out for out, _ in found])
        found = [cache for _, cache in found]
    for got, want in outs:
        assert np.asarray(want).any()
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.ci
def test_pages_are_copied_in_each_pool(mesh_of):
    tokens = caches.tokens(PAGE, batch=B)
    cache = sharded_caches.make("paged", mesh_of(data=2, context=2))
    _, cache = filled(cache, tokens, (PAGE,), np.full(B, PAGE))
    was = caches.contents(gathered(cache))
    old = np.array(cache.block_table[:, 0])
    spare = [sorted(set(range(14)) - set(table.ravel().tolist()))[0]
             for table in np.array(cache.block_table).reshape(2, 2, -1)]  # fmt: skip
    cache = cache.copy_pages([[old[0], -1], [old[2], -1]], [[spare[0], 3], [spare[1], -1]])
    table = np.array(cache.block_table)
    table[0, 0], table[2, 0] = spare
    cache = cache.with_table(table, PAGE)
    for got, want in zip(caches.contents(gathered(cache)), was, strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match=r"sources takes int \[2, n\] .* got shape \(1,\)"):
        cache.copy_pages([1], [2])
    with pytest.raises(ValueError, match="rows \\[3\\] .* do not have them"):
        table[3, 1] = 14  # a page of the other pool
        cache.with_table(table).append(*tokens[1:])


@pytest.mark.ci
def test_forks(mesh_of):
    tokens = caches.tokens(5, batch=B)
    _, cache = filled(sharded_caches.make("dense", mesh_of(context=2)), tokens, (5,), np.arange(B))
    forked = cache.fork([3, 3, 1])
    got, was = (caches.contents(gathered(c))[0] for c in (forked, cache))
    np.testing.assert_array_equal(got, was[[3, 3, 1]])
    with pytest.raises(NotImplementedError, match="fork takes a cache whose rows"):
        sharded_caches.make("dense", mesh_of(data=2)).fork([0, 1])


# ---- where things are --------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("kind, dtype", [("dense", "int8"), ("paged", "float32")])
def test_a_step_moves_outputs_alone_and_writes_in_place(mesh_of, kind, dtype):
    """Compiled from shapes: 4 rows, 12 query and 4 key/value heads on 2, 2 and 2 ways."""
    mesh = mesh_of(data=2, model=2, context=2)
    sizes = (4, 64) if kind == "dense" else (4, 16, 16, 4)
    cache = ShardedCache.create(
        DenseCache if kind == "dense" else PagedCache,
        *sizes, 4, 20, value_head_dim=28, dtype=dtype, axes=AXES, mesh=mesh, abstract=True,
    )  # fmt: skip
    spec = jax.NamedSharding(mesh, jax.P("data", None, "model", None))
    shapes = (4, 1, 12, 20), (4, 1, 4, 20), (4, 1, 4, 28)
    tokens = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=spec) for s in shapes]
    step = jax.jit(lambda cache, *tokens: cache.extend(*tokens), donate_argnums=0)
    program = step.lower(cache, *tokens).compile()
    text = program.as_text()
    for kind in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert not moved(text, kind), kind
    assert set(moved(text, "all-reduce")) == {"f32[2,1,6]", "f32[2,1,6,28]"}
    assert program.memory_analysis().alias_size_in_bytes >= cache.nbytes / 8


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_every_part_is_made_where_it_belongs(mesh_of, kind):
    mesh = mesh_of(data=2, model=2, context=2)
    center = np.arange(H, dtype=np.float32)[None]
    options = dict(kv_heads=1, key_center=center, dtype="int8")
    cache = sharded_caches.make(kind, mesh, **options)
    keys = cache.cache.arrays.keys
    rows, slots = (B, 48) if kind == "dense" else (B * 6 + 4, PAGE)
    assert {shard.data.shape for shard in keys.addressable_shards} == {
        (rows // 2, 1, slots // 2, H)
    }
    np.testing.assert_array_equal(cache.cache.key_center, np.repeat(center, 2, 0))
    assert isinstance(cache, Cache)
    facts = cache.batch, cache.num_kv_heads, cache.capacity, cache.dtype, cache.stores_floats
    assert facts == (B, 1, 48, "int8", False)
    assert cache.nbytes == 2 * rows * slots * cache.bytes_per_token

    create = functools.partial(ShardedCache.create, mesh=mesh, axes=AXES)
    sizes = (B, 48) if kind == "dense" else (B, B * 6 + 4, PAGE, 6)
    there = create(type(cache.cache), *sizes, 1, H, value_head_dim=h, dtype="int8", abstract=True,
                   key_center=center)  # fmt: skip
    for found, want in zip(*map(jax.tree.leaves, (there, cache)), strict=True):
        assert (found.shape, found.dtype, found.sharding) == (want.shape, want.dtype, want.sharding)


@pytest.mark.ci
def test_the_mesh_of_the_context_and_explicit_axes():
    """As `jax.make_mesh` makes them: queries that say how they are sharded, and others."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "context"))
    tokens = caches.tokens(12, batch=B)
    want, _ = filled(caches.make("dense", batch=B), tokens, (12,))
    with jax.set_mesh(mesh):
        cache = sharded_caches.make("dense", None)
        out, cache = filled(cache, tokens, (12,))
        np.testing.assert_allclose(out, want, atol=2e-6)
        spec = jax.P("data", None, "model")
        query = jax.device_put(tokens[0][:, 8:], jax.NamedSharding(mesh, spec))
        out = jax.jit(lambda cache, query: cache.attend(query))(cache, query)
        assert jax.typeof(out).sharding.spec == jax.P("data", None, "model", None)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(np.asarray(out)[0], want[0, 8:], atol=2e-6)


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (ValueError, "heads takes axes of the mesh, .* got 'tensor'", dict(axes=Axes(heads="tensor"))),
        (ValueError, "batch takes a multiple of 2, the size of the axes 'data' of batch, got 3",
         dict(sizes=(3, 48, 2, 16))),
        (ValueError, "length takes a multiple of 2, .* 'context' of sequence, got 47",
         dict(sizes=(4, 47, 2, 16))),
        (ValueError, "num_pages takes a multiple of 2, .* got 9",
         dict(kind=PagedCache, sizes=(4, 9, 8, 2, 2, 16))),
        (ValueError, "page_size takes a multiple of 2, .* got 7",
         dict(kind=PagedCache, sizes=(4, 8, 7, 2, 2, 16))),
        (ValueError, "heads takes axes whose size divides the 3 key/value heads .* got 2",
         dict(sizes=(4, 48, 3, 16))),
        (ValueError, "axes takes sequence=None for a RingCache", dict(kind=RingCache)),
        (TypeError, "kind takes one of .* got <class 'dict'>", dict(kind=dict)),
        (ValueError, r"key_center takes \[K, H\] = \[2, 16\], got \(4, 16\)",
         dict(key_center=np.ones((4, 16)))),
    ],
)  # fmt: skip
def test_errors_of_create(mesh_of, error, match, changes):
    changes = {"kind": DenseCache, "sizes": (4, 48, 2, 16), "axes": AXES, **changes}
    mesh = mesh_of(data=2, model=2, context=2)
    with pytest.raises(error, match=match):
        ShardedCache.create(changes.pop("kind"), *changes.pop("sizes"), mesh=mesh, **changes)


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (ValueError, r"key takes \[B, T, K, size\] = \[4, T, 2, 16\]", dict(key=(4, 1, 1, 16))),
        (ValueError, "heads takes axes whose size divides the 2 query heads, got 4",
         dict(query=(4, 1, 2, 16))),
        (ValueError, r"query takes \[B, T, N, H\] = \[4, T, N, 16\]", dict(query=(4, 1, 8, 8))),
        (NotImplementedError, "dropout_rate takes 0",
         dict(dropout_rate=0.5, dropout_rng=np.zeros(2, np.uint32))),
        (TypeError, "attend takes no argument kv_positions", dict(kv_positions=np.arange(48))),
        (TypeError, "attend takes no argument sink", dict(sink=1)),
    ],
)  # fmt: skip
def test_errors_of_steps(mesh_of, error, match, changes):
    cache = sharded_caches.make("dense", mesh_of(model=4, context=2), value_head_dim=16)
    shapes = {"query": (4, 1, 8, 16), "key": (4, 1, 2, 16)}
    arrays = {name: jnp.zeros(changes.get(name, shape)) for name, shape in shapes.items()}
    options = {name: x for name, x in changes.items() if name not in shapes}
    with pytest.raises(error, match=match):
        cache.extend(**arrays, value=jnp.zeros(shapes["key"]), **options)
