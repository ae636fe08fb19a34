"""A part of the library under both of JAX's strict flags, which change no program and no number.

``jax_numpy_rank_promotion="raise"`` refuses broadcasting between ranks, and
``jax_numpy_dtype_promotion="strict"`` arithmetic between dtypes. Programs are compared as they are
traced, for any machine: nothing is compiled.
"""

from __future__ import annotations

import contextlib
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import axattn
import axattn.linen
import axattn.nnx
from axattn import Mask, _jax_compat, checkpoints, latent, parallel, quantization
from axattn.cache import DenseCache, RingCache, prefill
from axattn.rotary import LinearScaling, Llama3Scaling, RotaryEmbedding, YarnScaling
from tests import caches, cases
from tests.parallel import sharded_caches


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def traced(function, *arguments):
    # A function of its own, lest JAX remember what it traced without the flags.
    program = str(jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments))
    # Addresses, and the numbers of debug checks, are others each time.
    return re.sub(r" at 0x[0-9a-f]+|check\[debug=True\] .*", "", program)


def check(function, *arguments):
    """The program of ``function`` is the same under the flags."""
    plain = traced(function, *arguments)
    with strict():
        assert traced(function, *arguments) == plain


def with_gradients(function):
    """``function`` with the gradients of all that it is given; arrays or pairs come back."""

    def both(inputs, *rest):
        found, pull = jax.vjp(lambda inputs: function(inputs, *rest), inputs)
        return found, pull(found)

    return both


def test_the_flags_are_on():
    with strict():
        with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
            jnp.ones(3) + jnp.ones((2, 3))
        with pytest.raises(ValueError, match="jax_numpy_dtype_promotion"):
            jnp.ones(3, jnp.bfloat16) + jnp.ones(3)


# ---- the function and its kernels -------------------------------------------------------------

CALLS = ("everything", "positions", "decode", "dropout_broadcast")


def check_call(name, dtype, implementation):
    call = cases.make(name, dtype)
    arrays = {k: v for k, v in call.options.items() if isinstance(v, (np.ndarray, jax.Array, Mask))}
    static = {k: v for k, v in call.options.items() if k not in arrays}

    def attend(inputs, arrays):
        return axattn.dot_product_attention(
            **inputs, **arrays, **static, return_residual=True, implementation=implementation
        )

    check(with_gradients(attend), call.inputs, arrays)


@pytest.mark.parametrize("name", CALLS)
def test_xla(name):
    check_call(name, jnp.float16 if name == "everything" else jnp.bfloat16, "xla")


@pytest.mark.parametrize("name", CALLS)
def test_xla_chunked(small_blocks, name):
    check_call(name, jnp.bfloat16, "xla_chunked")


def test_with_x64(small_blocks):
    """What counts is int32, whatever JAX's own integers are."""
    with jax.enable_x64(True):
        check_call("lengths", jnp.float64, "xla_chunked")
        cache = caches.make("paged", dtype="bfloat16")
        step = lambda cache, tokens, lengths: cache.extend(*tokens, lengths=lengths)  # noqa: E731
        check(step, cache, caches.tokens(5, dtype="bfloat16"), jnp.array([5, 1, 0]))
        check(quantization.key_center, jnp.ones((2, 5, 1, 4)), jnp.array([5, 1]))


@pytest.fixture(params=["mosaic_tpu", "mosaic_gpu"])
def kernels(request):
    """The kernels of an absent machine: they are traced, and not lowered."""
    if request.param == "mosaic_gpu" and jax.__version_info__ < (0, 11):
        pytest.skip("the GPU kernels need jax >= 0.11")
    chips = {"mosaic_tpu": ("TPU v5", 1, "tpu"), "mosaic_gpu": ("NVIDIA H200", 3, "gpu")}
    with _jax_compat.use_abstract_device(*chips[request.param], None):
        yield request.param


def test_kernels(kernels):
    check_call("everything", jnp.bfloat16, kernels)


FEATURES = {
    "dense": dict(
        sinks=np.ones(6, np.float32),
        alibi_slopes=np.ones(6, np.float32),
        bias=np.ones((1, 6, 1, 208), np.float32),
        mask=np.ones((3, 1, 5, 208), bool),
    ),
    "ring": dict(alibi_slopes=np.ones(6, np.float32)),
    "paged": dict(
        query_segment_ids=np.ones((3, 5), np.int32),
        key_value_segment_ids=np.ones((3, 208), np.int32),
    ),
}


@pytest.mark.parametrize(
    "kind, dtype", [*zip(caches.KINDS, ("bfloat16", "int8", "float8_e4m3fn"), strict=True)]
)
def test_kernels_over_caches(kernels, kind, dtype):
    center = jnp.ones((2, 128)) if dtype == "int8" else None
    cache = caches.make(
        kind, capacity=208, dtype=dtype, head_dim=128, value_head_dim=128, key_center=center
    )

    def attend(cache, query, features):
        return cache.attend(
            query, implementation=kernels, return_residual=True, query_seq_lengths=4, **features
        )

    check(attend, cache, jnp.ones((3, 5, 6, 128), jnp.bfloat16), FEATURES[kind])
    step = functools.partial(DenseCache.attend, implementation=kernels)
    sizes = dict(values_in_keys=True, dtype=dtype)
    absorbed = DenseCache.create(2, 128, 1, 192, value_head_dim=128, **sizes)
    check(step, absorbed, jnp.ones((2, 1, 16, 192), jnp.bfloat16))


# ---- caches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("dense", "int4"),
        ("ring", "int8"),
        ("paged", "float8_e4m3fn"),
        ("paged", "bfloat16"),
    ],
)
def test_caches(kind, dtype):
    center = jnp.ones((caches.K, caches.H))
    cache = caches.make(kind, dtype=dtype, key_center=center)
    tokens = caches.tokens(20, dtype="bfloat16" if dtype in caches.QUANTIZED else dtype)

    def step(cache, tokens, lengths):
        positions = cache.next_positions(20)
        options = {} if kind == "ring" else dict(dropout_rate=0.1, dropout_rng=jax.random.key(0))
        out, cache = cache.extend(*tokens, lengths=lengths, implementation="xla", **options)
        last, cache = prefill(
            lambda cache, x, n: cache.extend(x, *(y[:, :4] for y in tokens[1:]), lengths=n),
            cache, tokens[0][:, :6], lengths[0], chunk_size=4,
        )  # fmt: skip
        if kind == "paged":
            cache = cache.with_table(cache.block_table, lengths).copy_pages(lengths, lengths)
        cache = cache.truncate(lengths).fork(lengths).reset(lengths > 0)
        return positions, out, last, cache, quantization.key_center(tokens[1], lengths)

    check(step, cache, tokens, jnp.array([20, 7, 0]))


# ---- positions, layers ------------------------------------------------------------------------

ROPES = {
    "halves": RotaryEmbedding(),
    "neighbours": RotaryEmbedding(interleaved=True, rotary_dim=8, scaling=LinearScaling(2.0)),
    "yarn": RotaryEmbedding(scaling=YarnScaling(4.0, 64)),
    "llama3": RotaryEmbedding(base=500000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
}


@pytest.mark.parametrize("rope", ROPES)
def test_rope(rope):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.ones((2, 3, 5, 4, 16), dtype)
        for positions in (np.arange(5), np.ones((3, 5), int)):
            check(with_gradients(ROPES[rope].apply), x, positions)


E, T = 32, 6
FIELDS = dict(
    rope=RotaryEmbedding(), qk_norm="rms", window=(4, 0), logits_soft_cap=5.0, sinks=True,
    dropout_rate=0.1, dtype=jnp.bfloat16,
)  # fmt: skip
LATENT = dict(
    num_heads=4, kv_lora_rank=12, q_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4,
    v_head_dim=5, dtype=jnp.bfloat16,
)  # fmt: skip
X = np.ones((2, T, E), np.float32)
IDS = jnp.array([0, 0, 0, 1, 1, 1])


def check_linen(layer, cache, **options):
    """Training, and a cache that is filled."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.eval_shape(functools.partial(layer.init, deterministic=True), rngs, X)
    train = functools.partial(layer.apply, deterministic=False, **options)
    check(with_gradients(lambda v, x, rngs: train(v, x, rngs=rngs)), variables, X, rngs)
    check(lambda v, x, c: layer.apply(v, x, cache=c, deterministic=True), variables, X, cache)
    return variables


def check_nnx(make, cache, **options):
    graph, state = nnx.split(nnx.eval_shape(make))

    def train(x, state):
        layer = nnx.merge(graph, state)
        return layer(x, rngs=nnx.Rngs(1), deterministic=False, **options)

    check(with_gradients(train), X, state)
    check(lambda s, x, c: nnx.merge(graph, s)(x, cache=c, deterministic=True), state, X, cache)


@pytest.mark.ci
def test_linen():
    layer = axattn.linen.GroupedQueryAttention(4, num_kv_heads=2, **FIELDS)
    cache = RingCache.create(2, 4, 2, 8, dtype="bfloat16", max_append=8)
    variables = check_linen(layer, cache, segment_ids=IDS, is_causal=True)
    check(functools.partial(checkpoints.mha_to_gqa, num_kv_heads=1), variables)


@pytest.mark.ci
def test_nnx():
    fields = dict(FIELDS, num_kv_heads=2, fused_qkv=True, decode=False)
    make = functools.partial(axattn.nnx.GroupedQueryAttention, 4, E, **fields)
    cache = RingCache.create(2, 4, 2, 8, dtype="bfloat16", max_append=8)
    check_nnx(lambda: make(rngs=nnx.Rngs(0)), cache, segment_ids=IDS, is_causal=True)


@pytest.mark.ci
def test_latent_layers():
    make = functools.partial(axattn.nnx.MultiHeadLatentAttention, in_features=E, **LATENT)
    cache = DenseCache.create(2, 16, **latent.cache_sizes(12, 4), dtype="bfloat16")
    check_nnx(lambda: make(rngs=nnx.Rngs(0)), cache, is_causal=True)
    layer = axattn.linen.MultiHeadLatentAttention(**LATENT)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    check(lambda variables, x: layer.apply(variables, x, is_causal=True), variables, X)


@pytest.mark.ci
def test_caches_of_flax():
    """One token at a time into Flax's own collection, and into NNX's variables."""
    fields = dict(rope=RotaryEmbedding(), dtype=jnp.bfloat16)
    layer = axattn.linen.MultiHeadAttention(4, decode=True, **fields)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    check(lambda v, x: layer.apply(v, x, mutable=["cache"]), variables, X[:, :1])
    layer = axattn.linen.MultiHeadAttention(4, dtype=jnp.bfloat16)
    sown = functools.partial(layer.apply, sow_weights=True, mutable=["intermediates"])
    with_mask = lambda v, x: sown(v, x, mask=nn.make_causal_mask(x[..., 0]))  # noqa: E731
    check(with_mask, {"params": variables["params"]}, X)

    # Another function gets the structure of the mask as an array, and Flax's mask is float32.
    layer = axattn.linen.MultiHeadAttention(4, decode=True, attention_fn=nn.dot_product_attention)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    masked = functools.partial(layer.apply, mutable=["cache"], mask=jnp.ones((1, 1, 1, T)))
    check(masked, variables, X[:, :1])

    def make():
        layer = axattn.nnx.MultiHeadAttention(4, E, decode=True, **fields, rngs=nnx.Rngs(0))
        layer.init_cache(X.shape)
        return layer

    graph, state = nnx.split(nnx.eval_shape(make))
    check(lambda state, x: nnx.merge(graph, state)(x), state, X[:, :1])


@pytest.mark.ci
@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_latent_attention(form):
    shapes = (2, T, 4, 10), (2, T, 12), (2, T, 4), (12, 4, 6), (12, 4, 5)
    arrays = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    attend = functools.partial(latent.latent_attention, form=form, is_causal=True)
    check(with_gradients(lambda arrays: attend(*arrays)), arrays)
    cache = DenseCache.create(2, 1024, **latent.cache_sizes(12, 4), dtype="int8")
    arrays[:3] = [jnp.ones((2, 512, *shape[2:]), jnp.bfloat16) for shape in shapes[:3]]
    form = None if form == "naive" else form
    check(lambda cache, arrays: latent.extend(cache, *arrays, form=form), cache, arrays)


# ---- several devices --------------------------------------------------------------------------

AXES = parallel.Axes(batch="data", heads="model", sequence="context")


@pytest.mark.ci
@pytest.mark.parametrize(
    "strategy, layout",
    [
        ("ring", "contiguous"),
        ("ring", "zigzag"),
        ("gather", "zigzag"),
        ("ulysses", "contiguous"),
    ],
)
def test_strategies(mesh_of, strategy, layout):
    zigzag = layout == "zigzag"
    arrays = [jnp.ones((2, 48, heads, 16), jnp.bfloat16) for heads in (8, 2, 2)]
    options = dict(
        sinks=jnp.ones(8), alibi_slopes=jnp.ones(8), q_offset=np.array([1, 0]),
        bias=None if zigzag else jnp.ones((1, 8, 48, 48), jnp.bfloat16),
        query_segment_ids=np.ones((2, 48), int), key_value_seq_lengths=np.array([40, 48]),
    )  # fmt: skip
    mesh = mesh_of(context=4) if zigzag else mesh_of(data=2, model=2, context=2)

    def attend(inputs, options):
        return parallel.attention(
            *inputs, axes=AXES, mesh=mesh, strategy=strategy, layout=layout, is_causal=True,
            dropout_rate=0.1, dropout_rng=jax.random.key(0), return_residual=True, **options,
        )  # fmt: skip

    check(with_gradients(attend), arrays, options)


@pytest.mark.ci
@pytest.mark.parametrize("kind, dtype", [("dense", "bfloat16"), ("paged", "int8")])
def test_caches_of_several_devices(mesh_of, kind, dtype):
    mesh = mesh_of(data=2, model=2, context=2)
    cache = sharded_caches.make(kind, mesh, dtype=dtype)
    tokens = caches.tokens(5, batch=4, group=2, dtype="bfloat16")

    def step(cache, tokens):
        return cache.extend(*tokens, lengths=3, sinks=jnp.ones(4), alibi_slopes=jnp.ones(4))

    check(step, cache, tokens)

    def of_shard(tokens):
        part = parallel.StripedCache(caches.make(kind, batch=4, dtype=dtype), "context")
        return part.extend(*tokens, sinks=jnp.ones(4))[0]

    whole = PartitionSpec()
    check(jax.shard_map(of_shard, mesh=mesh, in_specs=whole, out_specs=whole), tokens)
