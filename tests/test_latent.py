"""Latent attention: both forms against float64, over arrays and over caches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import Mask, _latent, latent
from axattn.cache import DenseCache, PagedCache, RingCache
from tests import reference
from tests.precision import ULPS
from tests.tiers import ci

B, T, N, R, D, P, h = 2, 19, 4, 24, 10, 6, 8
FORMS = ("naive", "absorbed")
IMPLEMENTATIONS = ("xla", "xla_chunked")


def arrays(seed=0, dtype=jnp.float32, length=T):
    rng = np.random.default_rng(seed)
    shapes = dict(
        query=(B, length, N, D + P),
        latent=(B, length, R),
        key_rope=(B, length, P),
        key_up=(R, N, D),
        value_up=(R, N, h),
    )
    found = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    found["key_up"] *= R**-0.5
    found["value_up"] *= R**-0.5
    return {name: jnp.asarray(x.astype(dtype)) for name, x in found.items()}


def exact(query, latent, key_rope, key_up, value_up, **options):
    """The definition, in float64 on the host."""
    query, latent, key_rope, key_up, value_up = map(
        reference.f64, (query, latent, key_rope, key_up, value_up)
    )
    key = np.einsum("bsr,rnd->bsnd", latent, key_up)
    shared = np.broadcast_to(key_rope[:, :, None], (*key.shape[:3], key_rope.shape[-1]))
    value = np.einsum("bsr,rnh->bsnh", latent, value_up)
    return reference.attend(query, np.concatenate([key, shared], -1), value, **options)


SEGMENTS = np.repeat([[0, 1, 2]], B, 0).repeat([4, 6, 9], 1)
FEATURES = {
    "structure": dict(is_causal=True, local_window_size=(5, 0), logits_soft_cap=2.0, scale=0.4),
    "arrays": dict(
        query_segment_ids=SEGMENTS,
        key_value_segment_ids=SEGMENTS,
        key_value_seq_lengths=np.array([T, 3]),
        query_seq_lengths=np.array([7, T]),
        sinks=np.linspace(-1, 2, N).astype(np.float32),
        mask=np.random.default_rng(3).random((B, 1, T, T)) < 0.6,
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, feature):
    options, given = FEATURES[feature], arrays()
    want = exact(**given, **options)
    attend = functools.partial(latent.latent_attention, form=form, return_residual=True, **options)
    for out, lse in jax.jit(lambda x: [attend(**x, implementation=i) for i in IMPLEMENTATIONS])(
        given
    ):
        np.testing.assert_allclose(out, want.out, atol=2e-5)
        np.testing.assert_allclose(lse, want.lse, atol=2e-5)


@pytest.mark.parametrize(
    "form, dtype",
    [("absorbed", "bfloat16"), ("naive", "float16")]
    + ci(("absorbed", "float16"), ("naive", "bfloat16")),
)
def test_short_dtypes(form, dtype):
    """No more than twice the error of the naive form with whole matrices."""
    given = arrays(dtype=dtype)
    want = exact(**given, is_causal=True).out
    key, value = latent.write_out(*(given[n] for n in ("latent", "key_rope", "key_up", "value_up")))
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, D + P - h)))
    plain = jax.nn.dot_product_attention(given["query"], key, value, is_causal=True)[..., :h]
    out = latent.latent_attention(**given, form=form, is_causal=True)
    assert out.dtype == dtype
    few = ULPS * float(jnp.finfo(dtype).eps) * np.abs(want).max()
    error, baseline = (np.abs(np.float64(x) - want).max() for x in (out, plain))
    assert error <= 2 * baseline + few


def test_gradients_of_both_forms_agree():
    given = arrays()

    def loss(given, form):
        out = latent.latent_attention(**given, form=form, is_causal=True)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

    naive, absorbed = (jax.jit(jax.grad(loss), static_argnums=1)(given, form) for form in FORMS)
    for name, gradient in naive.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(absorbed[name], gradient, atol=2e-5, err_msg=name)


def test_batch_dimensions_and_vmap():
    given = arrays()
    attend = jax.jit(lambda x: latent.latent_attention(**x, is_causal=True))
    want = exact(**given, is_causal=True).out
    more = {n: x if n.endswith("up") else x.reshape(1, B, *x.shape[1:]) for n, x in given.items()}
    np.testing.assert_allclose(attend(more)[0], want, atol=2e-5)
    axes = {n: None if n.endswith("up") else 0 for n in given}
    np.testing.assert_allclose(jax.jit(jax.vmap(attend, (axes,)))(given), want, atol=2e-5)


def test_form_with_fewer_flops():
    deepseek = dict(rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert latent.preferred_form(1, 4096, **deepseek) == "absorbed"
    assert latent.preferred_form(4096, 4096, **deepseek) == "naive"
    assert latent.preferred_form(16, 16, **deepseek) == "naive"
    # A long cache: where the two meet, T R (D + h) / S is nothing.
    assert latent.preferred_form(170, 10**6, **deepseek) == "absorbed"
    assert latent.preferred_form(172, 10**6, **deepseek) == "naive"
    for q_len, kv_len in ((1, 64), (64, 64)):
        counts = {}
        structs = {
            "query": (1, q_len, N, 192),
            "latent": (1, kv_len, 512),
            "key_rope": (1, kv_len, 64),
            "key_up": (512, N, 128),
            "value_up": (512, N, 128),
        }
        structs = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in structs.items()}
        for form in FORMS:
            attend = functools.partial(latent.latent_attention, form=form, implementation="xla")
            lowered = jax.jit(lambda x, attend=attend: attend(**x)).lower(structs)
            counts[form] = lowered.cost_analysis()["flops"]
        assert min(counts, key=counts.get) == latent.preferred_form(q_len, kv_len, **deepseek)


# ---- caches -------------------------------------------------------------------------------------


def cache_of(kind, dtype="float32", capacity=24):
    sizes = dict(latent.cache_sizes(R, P), dtype=dtype)
    if kind == "dense":
        return DenseCache.create(B, capacity, **sizes)
    if kind == "ring":
        return RingCache.create(B, capacity - 1, max_append=8, **sizes)
    cache = PagedCache.create(B, B * capacity // 8, 8, capacity // 8, **sizes)
    return cache.with_table(np.arange(B * capacity // 8)[::-1].reshape(B, -1))


def tokens(given, first, last):
    return {n: x if n.endswith("up") else np.asarray(x)[:, first:last] for n, x in given.items()}


@pytest.mark.parametrize("kind", ["dense", "ring", *ci(("paged",))])
def test_caches(kind):
    """Any way of filling one is the full pass; a first step of 15 is naive, a later one is not."""
    given = arrays()
    want = exact(**given, is_causal=True).out
    extend = jax.jit(lambda cache, x: latent.extend(cache, **x))
    for steps in ((15, 4), (4, 15), (1,) * T):
        cache, outs, done = cache_of(kind), [], 0
        for step in steps:
            out, cache = extend(cache, tokens(given, done, done + step))
            outs.append(out)
            done += step
        np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=2e-5)
        np.testing.assert_array_equal(cache.lengths, T)


@pytest.mark.parametrize("form", [None, *ci(("absorbed",))])
def test_ragged_prompts(form):
    """Rows of a prompt end apart, one has no token; then all go on."""
    given, real = arrays(), np.array([4, 0])
    extend = jax.jit(functools.partial(latent.extend, form=form))
    out, cache = extend(cache_of("dense"), **tokens(given, 0, 15), lengths=real)
    row = {n: x if n.endswith("up") else x[:1] for n, x in given.items()}
    want = exact(**row, is_causal=True).out
    np.testing.assert_allclose(out[:1, :4], want[:, :4], atol=2e-5)
    assert (np.asarray(out[0, 4:]) == 0).all() and (np.asarray(out[1]) == 0).all()
    out, cache = extend(cache, **tokens(given, 4, 19), lengths=np.array([15, 15]))
    np.testing.assert_array_equal(cache.lengths, [19, 15])
    np.testing.assert_allclose(out[:1], want[:, 4:], atol=2e-5)
    row = {n: x if n.endswith("up") else x[1:, 4:] for n, x in given.items()}
    np.testing.assert_allclose(out[1:], exact(**row, is_causal=True).out, atol=2e-5)


def test_a_prompt_into_an_empty_cache_is_naive():
    """Where tokens are many. Both forms are in the program; which one runs is asked there."""

    def branches(kind, length, **options):
        step = functools.partial(latent.extend, **options)
        given = tokens(arrays(), 0, length)
        return str(jax.make_jaxpr(lambda c, x: step(c, **x))(cache_of(kind), given)).count("cond[")

    plain = branches("dense", T, form="absorbed")
    # What is given to the cache, what is taken, and of that what is for which platform.
    assert branches("dense", T) == plain + 3
    assert branches("dense", T, mask=np.ones((1, 1, T, 24), bool)) == plain
    assert branches("dense", 1) == plain
    assert branches("ring", 8) == branches("ring", 8, form="absorbed")


@pytest.mark.parametrize("dtype", ["int8", *ci(("float8_e4m3fn",))])
def test_quantized_caches(dtype):
    given = arrays()
    want = exact(**given, is_causal=True).out
    cache, outs = cache_of("dense", dtype), []
    extend = jax.jit(latent.extend)
    for i in range(T):
        out, cache = extend(cache, **tokens(given, i, i + 1))
        outs.append(out)
    error = np.linalg.norm(np.concatenate(outs, 1) - want) / np.linalg.norm(want)
    assert error < {"int8": 0.02, "float8_e4m3fn": 0.08}[dtype]


def test_a_token_is_stored_once():
    cache = DenseCache.create(1, 64, **latent.cache_sizes(512, 64), dtype="bfloat16")
    assert cache.bytes_per_token == 1152 and cache.nbytes == 64 * 1152
    whole = DenseCache.create(1, 64, 128, 192, value_head_dim=128, dtype="bfloat16")
    assert whole.bytes_per_token == 81920


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "match, changes",
    [
        (r"form must be one of \('naive', 'absorbed'\) or None, got 'fast'", dict(form="fast")),
        (r"query takes \[..., T, N, D \+ P\], got shape \(4, 16\)", dict(query=np.ones((4, 16)))),
        (r"key_up takes \(24, 4, 10\) .*, got \(24, 4, 9\)", dict(key_up=np.ones((24, 4, 9)))),
        (r"value_up takes \(24, 4, h\) .*, got \(23, 4, 8\)", dict(value_up=np.ones((23, 4, 8)))),
        ("take one batch, and the latter two one length", dict(key_rope=np.ones((B, T + 1, P)))),
    ],
)
def test_errors(match, changes):
    with pytest.raises(ValueError, match=match):
        latent.latent_attention(**{**arrays(), **changes})


def test_dtypes():
    """The weights' dtype may be another one; latents are what queries are."""
    given = arrays()
    for form in _latent.FORMS:
        attend = jax.jit(functools.partial(latent.latent_attention, form=form, is_causal=True))
        half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in given.items()}
        mixed = half | {name: given[name] for name in ("key_up", "value_up")}
        out, want = attend(**mixed), attend(**half)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), atol=0.1)
    with pytest.raises(TypeError, match="latent takes the dtype of query, bfloat16, got float32"):
        latent.latent_attention(**(half | {"latent": given["latent"]}))


def test_errors_of_caches():
    given = arrays()
    with pytest.raises(TypeError, match="cache takes a cache of axattn.cache, got dict"):
        latent.extend({}, **given)
    whole = DenseCache.create(B, 24, 1, 30, dtype="float32")
    with pytest.raises(
        ValueError, match="cache takes one made with .*'values_in_keys': True.* got"
    ):
        latent.extend(whole, **given)
    with pytest.raises(ValueError, match="cache takes one made with"):
        latent.attend(whole, *(given[name] for name in ("query", "key_up", "value_up")))
    wrong = given["query"], given["key_up"], np.ones((24, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"value_up takes \(24, 4, h\) .* got \(24, 1, 8\)"):
        latent.attend(cache_of("dense"), *wrong)
    for form in (None, "absorbed"):
        for name in ("query_seq_lengths", "key_value_seq_lengths"):
            with pytest.raises(TypeError, match=f"extend takes no argument {name}"):
                latent.extend(cache_of("dense"), **given, form=form, **{name: 3})
    with pytest.raises(ValueError, match="form takes None or 'absorbed' over a cache"):
        latent.extend(cache_of("dense"), **given, form="naive")


def test_implementations_say_what_they_lack():
    given = arrays(dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match='"cudnn"'):
        latent.latent_attention(**given, implementation="cudnn")
    structs = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16)
        for s in ((1, 8, 128, 576), (1, 8, 1, 576), (1, 8, 1, 512))
    ]
    why = axattn.explain_implementations(*structs, mask=Mask.causal())
    assert why["xla"] is None and why["xla_chunked"] is None
    assert all(why[name] for name in ("cudnn", "mosaic_gpu", "mosaic_tpu"))
