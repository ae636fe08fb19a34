"""dot_product_attention against float64: every feature, implementation and precision."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
import axattn.linen
import axattn.nnx
from axattn import Mask, _attention
from axattn._layers import flax_function
from axattn._options import AttentionOptions
from tests import cases, precision, reference
from tests.cases import Shape
from tests.tiers import ci

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# In the dtype that finds most: float32, or a short type where that rounds what is particular of it.
SHORT = {
    **dict.fromkeys(("causal", "lengths", "mask_BNTS", "mqa_16", "bias_NTS"), "bfloat16"),
    **dict.fromkeys(("bias_infinite", "head_192_128", "alibi_causal_rows"), "float16"),
}
# Structures that are a part of an everyday one, with something of their own.
IN_CI = {
    *("nothing", "mask_object", "one_query_one_key", "window_open_left", "decode_three", "prefix"),
    *("mask_of_keys", "bias_BNT1", "bias_infinite", "three_batch_dimensions", "causal_offset"),
    *("alibi_causal_rows", "head_192_128", "head_256", "small_head", "two_batch_dimensions"),
    *("packed", "mask_NTS", "mask_of_rows", "bias_BNTS", "dropout_broadcast", "window_open_right"),
}
# What differs from one of these by a number, or by how it broadcasts, and all other dtypes.
FOR_RELEASES = {
    *("window", "window_left_only", "window_self", "window_pair", "scale", "precision", "mha"),
    *("no_batch", "causal_offset_number", "soft_cap", "prefix_number", "mask_TS", "mask_B1TS"),
    *("alibi", "bias_TS", "bias_N1", "one_key"),
}


def tier(group, dtype):
    if dtype != SHORT.get(group, "float32") or group in FOR_RELEASES:
        return pytest.mark.exhaustive
    return pytest.mark.ci if group in IN_CI else ()


def table():
    assert set(cases.GROUPS) > IN_CI | FOR_RELEASES | set(SHORT)
    return [
        pytest.param(group, dtype, marks=tier(group, dtype))
        for group in cases.GROUPS
        for dtype in DTYPES
    ]


@pytest.mark.parametrize("group, dtype", table())
def test_features(small_blocks, group, dtype):
    precision.check([cases.make(name, DTYPES[dtype]) for name in cases.GROUPS[group]])


@pytest.mark.ci
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers(dtype):
    # As users run it: fully optimized, with the block sizes and the choice that come by default.
    call = cases.make("causal_offset", DTYPES[dtype], outliers=True)
    precision.check(call, ("xla", "xla_chunked", None), jit=precision.optimized_jit)


@pytest.mark.ci
@pytest.mark.parametrize("group", ["causal", "causal_window", "bias_NTS"])
def test_optimized(small_blocks, group):
    calls = [cases.make(name, jnp.float32) for name in cases.GROUPS[group]]
    precision.check(calls, jit=precision.optimized_jit)


@pytest.mark.ci
@pytest.mark.parametrize(
    "shape, dtype",
    [((1023, 1024), "bfloat16"), ((799, 3), "float16"), ((64, 2048), "float32")],
    ids=str,
)
def test_long(shape, dtype):
    T, S = shape
    rng = np.random.default_rng(T)
    arrays = cases.arrays(rng, Shape(1, T, S, 8, 2, 64, 64), DTYPES[dtype], outliers=True)
    call = precision.Call(arrays, dict(is_causal=True, q_offset=S - min(S, T)))
    precision.check(call, ("xla", "xla_chunked", None), jit=precision.optimized_jit)


@pytest.mark.ci
@pytest.mark.parametrize("G, H", [(1, 256), (2, 80), (8, 64), (16, 128)])
def test_groups_and_head_sizes(small_blocks, G, H):
    rng = np.random.default_rng(G * H)
    arrays = cases.arrays(rng, Shape(2, 113, 203, 16, 16 // G, H, H), jnp.bfloat16)
    precision.check(precision.Call(arrays, dict(is_causal=True, q_offset=90)))


@pytest.mark.ci
def test_plain_is_jax_nn():
    # The yardstick is not made long by us: jax.nn errs as plain attention does.
    call = cases.make("causal", jnp.bfloat16)
    inputs = [np.asarray(x[..., :48]) for x in call.inputs.values()]
    call = precision.Call(
        dict(zip(call.inputs, map(jnp.asarray, inputs), strict=True)), call.options
    )
    exact = call.exact.out
    theirs = jax.nn.dot_product_attention(**call.inputs, is_causal=True)
    error = np.abs(np.asarray(theirs, np.float64) - exact).max()
    plain = np.abs(np.asarray(precision.plain_results(call)["out"], np.float64) - exact).max()
    assert plain < 1.5 * error


class TestDropIn:
    """The import is all that changes from jax.nn.dot_product_attention."""

    B, T, S, N, K, H = 2, 20, 28, 4, 2, 16

    CALLS = {
        "nothing": {},
        "causal": dict(is_causal=True),
        "scale": dict(scale=0.5),
        "scale_zero": dict(scale=0.0),
        "window": dict(local_window_size=3),
        "window_pair": dict(local_window_size=(4, 2)),
        "causal_window": dict(local_window_size=(4, 0), is_causal=True),
        "query_lengths": dict(query_seq_lengths=np.array([20, 7])),
        "kv_lengths": dict(key_value_seq_lengths=np.array([28, 9])),
        "both_lengths": dict(
            query_seq_lengths=np.array([20, 7]), key_value_seq_lengths=np.array([5, 28])
        ),
        "mask": dict(mask="mask"),
        "bias": dict(bias="bias"),
        "mask_of_heads": dict(mask="mask_of_heads", bias="bias_of_rows", is_causal=True),
        "one_batch_row": dict(mask="one_batch_row", bias="bias_of_heads"),
        "all": dict(
            mask="mask",
            bias="bias",
            scale=0.7,
            is_causal=True,
            local_window_size=(9, 9),
            query_seq_lengths=np.array([20, 7]),
            key_value_seq_lengths=np.array([17, 28]),
        ),
    }

    def arrays(self, dtype=jnp.float32):
        B, T, S, N, K, H = self.B, self.T, self.S, self.N, self.K, self.H
        rng = np.random.default_rng(0)
        q, k, v = cases.arrays(rng, Shape(B, T, S, N, K, H, H), dtype).values()
        named = {
            "mask": (B, 1, T, S),
            "mask_of_heads": (1, N, T, S),
            "one_batch_row": (1, 1, T, S),
            "bias": (B, N, T, S),
            "bias_of_rows": (B, 1, 1, S),
            "bias_of_heads": (1, N, T, S),
        }
        extra = {}
        for name, size in named.items():
            extra[name] = rng.normal(size=size).astype(dtype)
            if not name.startswith("bias"):
                extra[name] = rng.random(size) < 0.8
                extra[name][..., 0] = True  # jax.nn gives a mean of values for a row without keys
        return q, k, v, extra

    def test_signature(self):
        theirs = inspect.signature(jax.nn.dot_product_attention).parameters
        ours = inspect.signature(axattn.dot_product_attention).parameters
        for name, parameter in theirs.items():
            assert name in ours, name
            assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), (
                name
            )
        assert list(ours)[:5] == list(theirs)[:5]

    def test_options_are_those_of_the_signature(self):
        _, _, _, *ours = inspect.signature(axattn.dot_product_attention).parameters.values()
        assert [(p.name, p.default) for p in ours] == [
            (field.name, field.default) for field in dataclasses.fields(AttentionOptions)
        ]
        given = {p.name: object() for p in ours}
        assert AttentionOptions(**given).as_keywords() == given
        assert AttentionOptions().as_keywords() == {}

    def test_names_that_are_no_options(self):
        with pytest.raises(TypeError, match=r"f takes no argument sink; did you mean sinks\?"):
            AttentionOptions.parse("f", sink=1)
        with pytest.raises(TypeError, match=r"explain_implementations takes no argument zzz(\n|$)"):
            axattn.explain_implementations(*(jnp.ones((1, 2, 2, 4)),) * 3, zzz=1)

    @pytest.mark.parametrize(
        "module, function, callee",
        [
            (_attention, axattn.dot_product_attention, "normalize"),
            (axattn.linen._function, axattn.linen.dot_product_attention, "attend_with_flax_hooks"),
            (axattn.nnx._function, axattn.nnx.dot_product_attention, "attend_with_flax_hooks"),
        ],
    )
    def test_each_option_goes_where_it_belongs(self, module, function, callee, monkeypatch):
        """Under its own name: what is given as the window arrives as the window."""
        names = {field.name for field in dataclasses.fields(AttentionOptions)}
        given = {name: object() for name in names & {*inspect.signature(function).parameters}}
        found = []

        def look(query, key, value, options, **_):
            found.append(options.as_keywords())
            raise StopIteration

        monkeypatch.setattr(module, callee, look)
        with pytest.raises(StopIteration):
            function(*(np.ones((1, 2, 2, 4), np.float32),) * 3, **given)
        assert found == [given] and len(given) >= 17

    def test_flax_dialects_say_that_layers_project(self):
        def attend(*_, **options):
            return options

        q = np.ones((1, 2, 2, 4), np.float32)
        given = AttentionOptions(dropout_rate=0.5, is_causal=True)
        found = flax_function.attend_with_flax_hooks(
            q, q, q, given, deterministic=True, attend=attend, sow=None
        )
        assert found == dict(is_causal=True, is_projected=True)

    @pytest.mark.parametrize(
        "name",
        [
            *("nothing", "causal", "scale_zero", "window", "both_lengths", "mask_of_heads", "all"),
            *ci("scale", "window_pair", "causal_window", "query_lengths", "kv_lengths", "mask"),
            *ci("bias", "one_batch_row"),
        ],
    )
    def test_same_numbers(self, name):
        q, k, v, extra = self.arrays()
        options = {
            n: extra.get(x, x) if isinstance(x, str) else x for n, x in self.CALLS[name].items()
        }
        arrays = {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
        static = {n: x for n, x in options.items() if n not in arrays}

        def program(q, k, v, arrays):
            theirs = jax.nn.dot_product_attention(q, k, v, **arrays, **static, return_residual=True)
            return theirs, [
                axattn.dot_product_attention(
                    q, k, v, **arrays, **static, implementation=i, return_residual=True
                )
                for i in (None, "xla", "xla_chunked")
            ]

        (out, lse), all_ours = jax.jit(program)(q, k, v, arrays)
        rows = np.ones((self.B, self.T), bool)
        if "query_seq_lengths" in options:
            rows &= np.arange(self.T) < options["query_seq_lengths"][:, None]
        if "key_value_seq_lengths" in options and "all" == name:
            # Windows and lengths can leave rows of jax.nn's with nothing to attend to.
            seen = reference.visible(
                self.T, self.S, **{n: x for n, x in options.items() if n not in ("bias", "scale")}
            )
            rows &= seen.any(-1)[:, 0]
            assert rows.sum() > 20
        for ours, ours_lse in all_ours:
            np.testing.assert_allclose(ours[rows], out[rows], rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(ours_lse[rows], lse[rows], rtol=2e-5, atol=2e-6)
            assert np.all(ours[~rows] == 0)

    def test_three_dimensions_and_short_types(self):
        q, k, v, _ = self.arrays(jnp.bfloat16)
        theirs = jax.nn.dot_product_attention(q[0], k[0], v[0])
        ours = axattn.dot_product_attention(q[0], k[0], v[0])
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=0.02
        )

    def test_positional(self):
        q, k, v, extra = self.arrays()
        bias, mask = extra["bias"], extra["mask"]
        theirs = jax.nn.dot_product_attention(q, k, v, bias, mask)
        np.testing.assert_allclose(
            axattn.dot_product_attention(q, k, v, bias, mask), theirs, rtol=2e-5, atol=2e-6
        )

    def test_documented_difference_window_never_sees_the_future(self):
        # jax-ml/jax#39576: theirs by cuDNN with (L, 0) and without is_causal attends to later keys.
        q, k, v, _ = self.arrays()
        ours = axattn.dot_product_attention(q, k, v, local_window_size=(4, 0))
        causal = axattn.dot_product_attention(q, k, v, local_window_size=(4, 0), is_causal=True)
        np.testing.assert_array_equal(ours, causal)
        theirs = jax.nn.dot_product_attention(q, k, v, local_window_size=(4, 0))
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)

    def test_documented_difference_rows_without_keys(self):
        q, k, v, _ = self.arrays()
        mask = np.ones((1, 1, self.T, self.S), bool)
        mask[:, :, 3] = False
        out, lse = axattn.dot_product_attention(q, k, v, mask=mask, return_residual=True)
        assert np.all(out[:, 3] == 0)
        assert np.all(np.isneginf(lse[:, 3]))
        assert np.all(np.isfinite(np.delete(lse, 3, axis=1)))


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
def test_float16_gradients_that_are_representable(implementation):
    """Those of weights and scores, up to 4.8e5 here, are not, and small keys bring them down."""
    q = k = jnp.full((1, 2, 1, 64), 0.01, jnp.float16)
    v = jnp.array([60.0, -60.0], jnp.float16)[None, :, None, None] * jnp.ones_like(q)

    def attend(*inputs):
        return axattn.dot_product_attention(*inputs, implementation=implementation)

    dquery, dkey, dvalue = jax.vjp(attend, q, k, v)[1](jnp.full_like(q, 1000.0))
    assert not dquery.any()
    np.testing.assert_allclose(dkey[0, :, 0, 0].astype(float), [4800, -4800], rtol=1e-3)
    np.testing.assert_allclose(dvalue.astype(float), 1000.0, rtol=1e-3)


@pytest.mark.ci
@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
def test_deterministic(small_blocks, implementation):
    call = cases.make("everything", jnp.bfloat16)
    first, second = (precision.results(call, (implementation,))[implementation] for _ in range(2))
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


class TestScale:
    Q, K, V = cases.arrays(
        np.random.default_rng(1), Shape(2, 24, 30, 4, 2, 16, 16), jnp.float32
    ).values()

    @pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
    def test_traced_scale_has_a_gradient(self, small_blocks, implementation):
        def loss(scale, q):
            out = axattn.dot_product_attention(
                q, self.K, self.V, scale=scale, logits_soft_cap=3.0, implementation=implementation
            )
            return (out**2).sum() / 2

        value, (dscale, dq) = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.float32(0.4), self.Q)
        exact = reference.attend(self.Q, self.K, self.V, scale=0.4, logits_soft_cap=3.0)
        gradients = exact.gradients(exact.out)
        np.testing.assert_allclose(value, (exact.out**2).sum() / 2, rtol=1e-5)
        np.testing.assert_allclose(dscale, gradients["scale"], rtol=1e-5)
        np.testing.assert_allclose(dq, gradients["query"], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("scale", [0.25, np.float32(0.25), np.array(0.25), jnp.array(0.25)])
    def test_kinds_of_numbers(self, scale):
        out = axattn.dot_product_attention(self.Q, self.K, self.V, scale=scale)
        np.testing.assert_array_equal(out, axattn.dot_product_attention(self.Q, self.K, self.V))

    def test_traced_scale_in_a_short_type_is_no_worse(self):
        call = precision.Call(
            {
                n: x.astype(jnp.bfloat16)
                for n, x in zip(("query", "key", "value"), (self.Q, self.K, self.V), strict=True)
            },
            dict(scale=jnp.float32(0.31)),
        )
        plain = precision.plain_results(call)
        # The options are arguments of the jitted program, so this scale is traced.
        found = precision.results(call, ("xla", "xla_chunked"))
        for name, result in found.items():
            precision.assert_right(call, result, plain, name)


class TestTypes:
    def test_float64(self):
        with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
            call = cases.make("causal", jnp.float64)
            for name, found in precision.results(call, ("xla", "xla_chunked")).items():
                assert found["out"].dtype == np.float64
                assert found["lse"].dtype == np.float32
                for part in ("out", "query", "key", "value"):
                    np.testing.assert_allclose(
                        found[part], call.exact_results[part], rtol=1e-6, atol=1e-6, err_msg=name
                    )

    def test_numpy_and_lists(self):
        q, k, v = (np.asarray(x) for x in (TestScale.Q, TestScale.K, TestScale.V))
        expected = axattn.dot_product_attention(*map(jnp.asarray, (q, k, v)))
        np.testing.assert_array_equal(axattn.dot_product_attention(q, k, v), expected)
        out = axattn.dot_product_attention(q, k, v, key_value_seq_lengths=[30, 30])
        np.testing.assert_array_equal(out, expected)

    def test_residual_is_float32_natural_log(self):
        q, k, v = (x.astype(jnp.bfloat16) for x in (TestScale.Q, TestScale.K, TestScale.V))
        out, lse = axattn.dot_product_attention(q, 0 * k, v, return_residual=True)
        assert (out.dtype, lse.dtype, lse.shape) == (jnp.bfloat16, jnp.float32, q.shape[:-1])
        np.testing.assert_allclose(lse, np.log(30), rtol=1e-6)


def test_scalar_lengths_serve_every_row():
    q, k, v = TestScale.Q, TestScale.K, TestScale.V
    one = axattn.dot_product_attention(q, k, v, mask=Mask.lengths(kv=11))
    per_row = axattn.dot_product_attention(q, k, v, key_value_seq_lengths=np.array([11, 11]))
    np.testing.assert_array_equal(one, per_row)
    np.testing.assert_allclose(
        one, axattn.dot_product_attention(q, k[:, :11], v[:, :11]), atol=1e-6
    )


def test_integer_bias_counts_as_floating_point():
    """As in jax.nn."""
    q, k = np.ones((1, 3, 2, 8), np.float32), np.eye(5, 8, dtype=np.float32).reshape(1, 5, 1, 8)
    bias = np.arange(15).reshape(3, 5)
    np.testing.assert_allclose(
        axattn.dot_product_attention(q, k, k, bias),
        axattn.dot_product_attention(q, k, k, bias.astype(np.float32)),
    )
