"""axattn.rotary: against float64 on the host, against transformers, and by its properties."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axattn.rotary import (
    LinearScaling,
    Llama3Scaling,
    RotaryEmbedding,
    YarnScaling,
    apply_rotary,
    rotary_cos_sin,
    rotary_frequencies,
    yarn_attention_factor,
    yarn_softmax_scale,
)

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "rotary.npz"

SCALINGS = {
    "none": None,
    "linear": LinearScaling(4.0),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, 8192),
    "yarn": YarnScaling(40.0, 4096),
}

# The settings under which tests/goldens/make_rotary.py made each case.
CASES = {
    "llama": RotaryEmbedding(500000.0),
    "linear": RotaryEmbedding(scaling=LinearScaling(4.0)),
    "llama3": RotaryEmbedding(500000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "yarn": RotaryEmbedding(scaling=YarnScaling(16.0, 4096)),
    "yarn_gpt_oss": RotaryEmbedding(150000.0, scaling=YarnScaling(32.0, 4096, truncate=False)),
    "yarn_given_factor": RotaryEmbedding(scaling=YarnScaling(4.0, 4096, attention_factor=1.25)),
    "neox": RotaryEmbedding(rotary_dim=16),
    "gptj": RotaryEmbedding(rotary_dim=12, interleaved=True),
    "deepseek_v3": RotaryEmbedding(
        interleaved=True,
        output_halves=True,
        scaling=YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
    ),
    "deepseek_mscales": RotaryEmbedding(
        interleaved=True,
        output_halves=True,
        scaling=YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=0.707),
    ),
}


def reference(x, positions, frequencies, *, interleaved=False, factor=1.0):
    """float64 on the host, one complex product per pair; frequencies as given."""
    x = np.asarray(x, np.float64)
    half = len(frequencies)
    angle = np.asarray(positions, np.float64)[..., None, None] * np.asarray(frequencies, np.float64)
    turn = factor * np.exp(1j * angle)
    out = x.copy()
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    turned = (x[..., first] + 1j * x[..., second]) * turn
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def random(shape, dtype=np.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    settings_ = CASES[case]
    with np.load(GOLDENS) as file:
        golden = {k.split("/")[1]: file[k] for k in file if k.startswith(f"{case}/")}
    frequencies = rotary_frequencies(
        2 * len(golden["frequencies"]), settings_.base, settings_.scaling
    )
    np.testing.assert_allclose(frequencies, golden["frequencies"], rtol=2e-6)
    assert yarn_attention_factor(settings_.scaling) == pytest.approx(golden["factor"], rel=1e-6)
    out = settings_.apply(golden["x"], golden["positions"])
    # Their angle is a float32 product: position * 2**-24 radians off, on values of up to 4.
    np.testing.assert_allclose(out, golden["out"], atol=4 * 4096 * 2.0**-23, rtol=0)
    near = golden["positions"] < 100
    np.testing.assert_allclose(np.asarray(out)[near], golden["out"][near], atol=2e-5, rtol=0)
    if "softmax_scale_192" in golden:
        scale = yarn_softmax_scale(192, settings_.scaling)
        assert scale == pytest.approx(golden["softmax_scale_192"], rel=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rotary_dim", [None, 6])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equals_float64_reference(dtype, interleaved, rotary_dim, scaling):
    scaling = SCALINGS[scaling]
    x = random((2, 5, 3, 16), dtype)
    positions = np.array([[0, 1, 2, 3, 4], [9, 100, 4096, 131072, 1_000_000]], np.int32)
    out = apply_rotary(
        x, positions, interleaved=interleaved, rotary_dim=rotary_dim, scaling=scaling
    )
    assert out.shape == x.shape and out.dtype == x.dtype
    expected = reference(
        x,
        positions,
        rotary_frequencies(rotary_dim or 16, scaling=scaling),
        interleaved=interleaved,
        factor=yarn_attention_factor(scaling),
    )
    error = np.abs(np.asarray(out, np.float64) - expected)
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    assert np.all(error <= half_ulp * np.abs(expected) * 1.01 + 4e-6)


@pytest.mark.parametrize("base", [2.0, 10000.0, 1e7])
@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.uint8])
def test_cos_sin_is_accurate_at_any_position(dtype, base):
    frequencies = rotary_frequencies(64, base)
    info = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    positions = rng.integers(max(info.min, -(2**24)), min(info.max, 2**24), 500).astype(dtype)
    positions = np.concatenate([positions, np.array([0, 1, info.min, info.max], dtype)])
    cos, sin = jax.jit(lambda p: rotary_cos_sin(p, frequencies))(positions)
    angle = positions.astype(np.float64)[:, None] * frequencies
    # float64 itself is off by 2**31 * 2**-53 = 2.4e-7 at the far end.
    np.testing.assert_allclose(cos, np.cos(angle), atol=1.2e-6, rtol=0)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1.2e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    shift=st.integers(-1_000_000, 1_000_000),
    distance=st.integers(-2000, 2000),
    interleaved=st.booleans(),
    scaling=st.sampled_from(sorted(SCALINGS)),
)
def test_scores_depend_on_the_distance_only(shift, distance, interleaved, scaling):
    rope = RotaryEmbedding(interleaved=interleaved, scaling=SCALINGS[scaling])
    q, k = random((1, 2, 32), seed=1), random((1, 2, 32), seed=2)

    def scores(at_q, at_k):
        rotated_q = rope.apply(q, np.array([at_q], np.int32))
        rotated_k = rope.apply(k, np.array([at_k], np.int32))
        return jnp.einsum("TNH,TNH->TN", rotated_q, rotated_k)

    np.testing.assert_allclose(
        scores(shift + distance, shift), scores(distance, 0), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_are_kept(interleaved):
    x = random((3, 7, 2, 24))
    out = apply_rotary(x, np.arange(7) * 12345, interleaved=interleaved)
    norms = [np.linalg.norm(np.asarray(a, np.float64), axis=-1) for a in (out, x)]
    np.testing.assert_allclose(*norms, rtol=1e-6)


def test_position_zero_and_the_features_beyond_rotary_dim_are_untouched():
    x = random((4, 2, 16), jnp.bfloat16)
    positions = np.array([0, 5, 50, 500])
    out = apply_rotary(x, positions, rotary_dim=6)
    np.testing.assert_array_equal(out[0], x[0])
    np.testing.assert_array_equal(out[..., 6:], x[..., 6:])
    assert np.all(np.asarray(out[1:, :, :6]) != np.asarray(x[1:, :, :6]))


def test_layouts_are_permutations_of_one_another():
    x = random((2, 5, 3, 16))
    positions = np.arange(5) + 3
    even_then_odd = np.r_[0:16:2, 1:16:2]
    halves = apply_rotary(x, positions, interleaved=True, output_halves=True)
    whole = apply_rotary(x, positions, interleaved=True)
    np.testing.assert_array_equal(halves, whole[..., even_then_odd])
    np.testing.assert_array_equal(halves, apply_rotary(x[..., even_then_odd], positions))


@pytest.mark.ci
def test_positions_per_row_and_their_broadcasting():
    x = random((2, 3, 4, 2, 8))
    positions = np.arange(24).reshape(2, 3, 4)
    out = apply_rotary(x, positions)
    for i in range(2):
        for j in range(3):
            row = apply_rotary(x[i, j], positions[i, j])
            np.testing.assert_allclose(out[i, j], row, atol=1e-6)
    same = apply_rotary(x, positions[0, 0])
    for shape in ((1, 4), (3, 4), (1, 1, 4), (2, 1, 4), (2, 3, 4)):
        broadcast = np.broadcast_to(positions[0, 0], shape)
        np.testing.assert_array_equal(apply_rotary(x, broadcast), same)


def test_jit_vmap_and_a_static_config():
    x, positions = random((3, 5, 2, 8)), np.arange(15).reshape(3, 5)
    rope = RotaryEmbedding(scaling=YarnScaling(4.0, 128), rotary_dim=4)
    expected = rope.apply(x, positions)
    jitted = jax.jit(lambda r, x, p: r.apply(x, p), static_argnums=0)
    np.testing.assert_allclose(jitted(rope, x, positions), expected, atol=1e-6)
    equal = dataclasses.replace(rope, scaling=YarnScaling(4.0, 128))
    assert equal == rope and hash(equal) == hash(rope)
    jitted(equal, x, positions)
    assert jitted._cache_size() == 1
    np.testing.assert_allclose(jax.vmap(rope.apply)(x, positions), expected, atol=1e-6)
    shared = jax.vmap(rope.apply, in_axes=(0, None))(x, positions[0])
    np.testing.assert_allclose(shared, rope.apply(x, positions[0]), atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_is_the_rotation_back(interleaved):
    x, cotangent = random((2, 5, 2, 8)), random((2, 5, 2, 8), seed=1)
    positions = np.arange(5) * 1000

    def rotate(sign):
        return lambda a: apply_rotary(a, sign * positions, interleaved=interleaved)

    _, pullback = jax.vjp(rotate(1), x)
    np.testing.assert_allclose(pullback(cotangent)[0], rotate(-1)(cotangent), atol=1e-6)
    _, tangent = jax.jvp(rotate(1), (x,), (cotangent,))
    np.testing.assert_allclose(tangent, rotate(1)(cotangent), atol=1e-6)


def test_float64_inputs_are_rotated_in_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 16)))
        positions = jnp.asarray([0, 1, 77, 2**20, 2**33])
        out = apply_rotary(x, positions)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(
            out, reference(x, positions, rotary_frequencies(16)), rtol=1e-12, atol=1e-12
        )
        low = apply_rotary(x.astype(jnp.float32), positions)
        np.testing.assert_allclose(low, out, atol=4e-6)


def test_no_heads_or_no_tokens_is_fine():
    assert apply_rotary(jnp.zeros((2, 0, 3, 8)), np.arange(0)).shape == (2, 0, 3, 8)
    assert apply_rotary(jnp.zeros((0, 4, 3, 8)), np.arange(4)).shape == (0, 4, 3, 8)


def test_frequencies_by_hand():
    np.testing.assert_allclose(rotary_frequencies(4), [1.0, 0.01])
    np.testing.assert_allclose(rotary_frequencies(4, 100.0), [1.0, 0.1])
    np.testing.assert_allclose(rotary_frequencies(4, 100.0, LinearScaling(2)), [0.5, 0.05])
    # Turns in 63 tokens: 10, 1, 0.1: kept, half way between 0.5 and 1.5 turns, slowed down.
    frequencies = rotary_frequencies(6, 1000.0, Llama3Scaling(4.0, 0.5, 1.5, 63))
    blend = (63 / (2 * math.pi) * 0.1 - 0.5) / 1.0
    np.testing.assert_allclose(frequencies, [1.0, 0.1 * (blend + (1 - blend) / 4), 0.01 / 4])
    assert rotary_frequencies(128).dtype == np.float64


def test_yarn_factors_by_hand():
    assert yarn_attention_factor(None) == yarn_attention_factor(LinearScaling(8.0)) == 1.0
    assert yarn_attention_factor(YarnScaling(math.e, 64)) == pytest.approx(1.1)
    assert yarn_attention_factor(YarnScaling(0.5, 64)) == 1.0
    assert yarn_attention_factor(YarnScaling(4.0, 64, attention_factor=0.75)) == 0.75
    both = YarnScaling(math.e, 64, mscale=2.0, mscale_all_dim=1.0)
    assert yarn_attention_factor(both) == pytest.approx(1.2 / 1.1)
    # One of the two alone, or a zero, is as if neither were there.
    assert yarn_attention_factor(YarnScaling(math.e, 64, mscale=2.0)) == pytest.approx(1.1)
    zero = YarnScaling(math.e, 64, mscale=2.0, mscale_all_dim=0)
    assert yarn_attention_factor(zero) == pytest.approx(1.1)
    assert yarn_softmax_scale(64, None) == 0.125
    assert yarn_softmax_scale(64, zero) == 0.125
    assert yarn_softmax_scale(64, both) == pytest.approx(0.125 * 1.1**2)


def test_yarn_leaves_fast_pairs_and_slows_slow_ones():
    plain = rotary_frequencies(128)
    scaled = rotary_frequencies(128, scaling=YarnScaling(16.0, 4096))
    turns = 4096 * plain / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(scaled[turns < 0.8], plain[turns < 0.8] / 16)
    assert np.all(np.diff(scaled) < 0)
    # Here even the last pair turns often. The ramp, from pair 8 on, would end at 31: checkpoints
    # were trained with a limit that counts features, of which there are twice as many as pairs.
    scaling = YarnScaling(4.0, 65536, beta_fast=1024.0)
    slowed = rotary_frequencies(32, 100.0, scaling) / rotary_frequencies(32, 100.0)
    np.testing.assert_allclose(slowed[[8, 15]], [1, 1 - 3 / 4 * 7 / 23])


X = jnp.zeros((2, 5, 3, 8))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: apply_rotary(jnp.zeros((5, 3, 7)), np.arange(5)), ValueError, r"even.*got 7"),
        (lambda: apply_rotary(jnp.zeros((5, 3, 0)), np.arange(5)), ValueError, r"even.*got 0"),
        (lambda: apply_rotary(jnp.zeros((5, 8)), np.arange(5)), ValueError, r"\(5, 8\)"),
        (lambda: apply_rotary(X.astype(int), np.arange(5)), TypeError, r"x must be floating.*int"),
        (lambda: apply_rotary(X, np.arange(5.0)), TypeError, r"positions must be integers.*float"),
        (lambda: apply_rotary(X, np.ones(5, bool)), TypeError, r"positions.*bool"),
        (lambda: apply_rotary(X, np.arange(4)), ValueError, r"positions.*\(2, 5\).*got.*\(4,\)"),
        (lambda: apply_rotary(X, np.arange(1)), ValueError, r"positions"),
        (lambda: apply_rotary(X, np.array(3)), ValueError, r"positions.*\(\)"),
        (lambda: apply_rotary(X, np.zeros((3, 5), int)), ValueError, r"positions.*\(3, 5\)"),
        (lambda: apply_rotary(X, np.zeros((1, 1, 5), int)), ValueError, r"positions"),
        (lambda: apply_rotary(X, np.arange(5), rotary_dim=10), ValueError, r"rotary_dim.*8.*10"),
        (lambda: RotaryEmbedding(rotary_dim=3), ValueError, r"rotary_dim must be even, got 3"),
        (lambda: RotaryEmbedding(rotary_dim=0), ValueError, r"rotary_dim.*got 0"),
        (lambda: RotaryEmbedding(rotary_dim=4.0), TypeError, r"rotary_dim.*got 4\.0"),
        (lambda: RotaryEmbedding(base=-1.0), ValueError, r"base.*got -1\.0"),
        (lambda: RotaryEmbedding(base=NAN), ValueError, r"base.*got nan"),
        (lambda: RotaryEmbedding(base=INF), ValueError, r"base.*got inf"),
        (lambda: RotaryEmbedding(base="1e4"), TypeError, r"base.*'1e4'"),
        (lambda: RotaryEmbedding(scaling=4.0), TypeError, r"scaling.*float"),
        (lambda: RotaryEmbedding(output_halves=True), ValueError, r"output_halves.*interleaved"),
        (lambda: RotaryEmbedding(base=1.0, scaling=YarnScaling(2, 64)), ValueError, r"base.*1\.0"),
        (lambda: rotary_frequencies(7), ValueError, r"head_dim.*7"),
        (lambda: rotary_frequencies(-2), ValueError, r"head_dim.*-2"),
        (lambda: rotary_frequencies(8, 0.0), ValueError, r"base.*0\.0"),
        (lambda: rotary_frequencies(8, 1.0, YarnScaling(2, 64)), ValueError, r"base.*1\.0"),
        (lambda: yarn_attention_factor("yarn"), TypeError, r"scaling.*str"),
        (lambda: yarn_softmax_scale(0, None), ValueError, r"head_dim.*0"),
        (lambda: LinearScaling(0.0), ValueError, r"LinearScaling\.factor.*0\.0"),
        (lambda: LinearScaling(NAN), ValueError, r"factor.*nan"),
        (lambda: LinearScaling(True), TypeError, r"factor.*True"),
        (lambda: Llama3Scaling(-8, 1, 4, 8192), ValueError, r"factor.*-8"),
        (lambda: Llama3Scaling(8, 4, 4, 8192), ValueError, r"low_freq_factor.*4 and 4"),
        (lambda: Llama3Scaling(8, 1, 4, 8192.0), TypeError, r"original_max_position.*8192\.0"),
        (lambda: YarnScaling(NAN, 64), ValueError, r"YarnScaling\.factor.*nan"),
        (lambda: YarnScaling(4.0, 0), ValueError, r"original_max_position.*0"),
        (lambda: YarnScaling(4.0, 64, 1, 32), ValueError, r"beta_slow.*32 and 1"),
        (lambda: YarnScaling(4.0, 64, attention_factor=0.0), ValueError, r"attention_factor.*0\.0"),
        (lambda: YarnScaling(4.0, 64, mscale=-1.0), ValueError, r"mscale.*at least 0.*-1\.0"),
    ],
)
def test_bad_arguments_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_signatures_hold_under_jaxtyping():
    jaxtyping = pytest.importorskip("jaxtyping")
    beartype = pytest.importorskip("beartype")
    checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)
    x = random((2, 5, 3, 8), jnp.bfloat16)
    checked(apply_rotary)(x, jnp.arange(5))
    checked(apply_rotary)(x, jnp.zeros((2, 5), jnp.int32), rotary_dim=4)
    checked(rotary_cos_sin)(jnp.zeros((2, 5), jnp.int32), rotary_frequencies(8))
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(apply_rotary)(x, jnp.arange(6))
