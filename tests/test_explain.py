"""explain_implementations and the choice among implementations."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import Mask, _attention
from axattn._implementations import flash, mosaic_tpu, preference, registry

Q = np.zeros((2, 5, 4, 8), np.float32)
KV = np.zeros((2, 7, 2, 8), np.float32)
NAMES = {"xla", "xla_chunked", "mosaic_gpu", "mosaic_tpu", "mosaic", "cudnn"}
PLATFORMS = {"cpu", "cuda", "rocm", "tpu"}


def explain(*args, **kwargs):
    return axattn.explain_implementations(*(args or (Q, KV, KV)), **kwargs)


def half(*arrays):
    return [x.astype(jnp.bfloat16) for x in arrays]


class TestExplanation:
    def test_every_name_has_an_answer(self):
        why = explain()
        assert set(why) == NAMES
        assert why["xla"] is None
        assert why["xla_chunked"] is None
        for name in NAMES - {"xla", "xla_chunked"}:
            assert isinstance(why[name], str) and why[name]

    def test_platform_map_and_choice(self):
        why = explain()
        assert set(why.by_platform) == PLATFORMS
        assert why[why.chosen] is None
        assert why.chosen == why.by_platform[jax.default_backend()]

    def test_chosen_is_what_none_runs(self, monkeypatch):
        calls = []
        entry = registry.IMPLEMENTATIONS["xla"]

        def attend(call):
            calls.append("xla")
            return entry.attend(call)

        monkeypatch.setitem(
            registry.IMPLEMENTATIONS, "xla", dataclasses.replace(entry, attend=attend)
        )
        flash_attend = flash.attend

        def attend_flash(call, backends):
            calls.extend(backend.name for _, backend in backends.per_platform)
            return flash_attend(call, backends)

        monkeypatch.setattr(flash, "attend", attend_flash)
        monkeypatch.setattr(
            _attention, "_run_compiled", lambda call, plan: registry.run_plan(call, plan)
        )
        long = jax.ShapeDtypeStruct((1, 4096, 16, 8), jnp.float32)
        for shapes in ((jnp.asarray(Q), jnp.asarray(KV)), (long, long)):
            calls.clear()
            q, kv = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes)
            jax.eval_shape(axattn.dot_product_attention, q, kv, kv)
            assert explain(q, kv, kv).chosen in calls

    def test_long_calls_do_not_hold_their_logits(self):
        long = jax.ShapeDtypeStruct((1, 8192, 16, 128), jnp.bfloat16)
        short = jax.ShapeDtypeStruct((1, 64, 16, 128), jnp.bfloat16)
        # Any TPU that the program may be lowered for takes its kernels; a GPU need not be a Hopper.
        for shape, name in ((long, "xla_chunked"), (short, "xla")):
            assert explain(shape, shape, shape).by_platform == {
                **dict.fromkeys(("cpu", "rocm", "cuda"), name),
                "tpu": "mosaic_tpu",
            }

    def chosen(self, B=1, T=1, S=1, N=1, K=1, **options):
        """For all platforms, where no kernel takes the call (here: the head size)."""
        q, kv = (jax.ShapeDtypeStruct((B, *x, 512), jnp.float32) for x in ((T, N), (S, K)))
        (name,) = set(explain(q, kv, kv, **options).by_platform.values())
        return name

    @pytest.mark.parametrize(
        "sizes, fewer",
        [
            (dict(T=512, S=512, N=4, K=2), dict(N=3, K=3)),  # 2^20 scores, 2^18 of a head
            (dict(B=8, T=64, S=512, N=16, K=2), dict(B=7)),  # 2^22 scores, fewer of a head
        ],
    )
    def test_chunked_from_where_it_is_faster(self, sizes, fewer):
        """B N T S and T S decide."""
        assert self.chosen(**sizes, is_causal=True) == "xla_chunked"
        for less in (fewer, dict(T=sizes["T"] - 1), dict(S=511)):
            assert self.chosen(**{**sizes, **less}, is_causal=True) == "xla"

    def test_steps_of_64_rows_may_hold_128_mib_of_logits(self):
        """More query rows are no decode step: the limit is that of other calls again."""
        assert 4 * 64 * 2**19 == 128 * 2**20
        assert self.chosen(T=2, N=32, S=2**19) == "xla"
        assert self.chosen(T=2, N=32, S=2**19 + 1) == "xla_chunked"
        assert self.chosen(N=65, S=2**16) == "xla_chunked"

    def test_lengths_of_1024_keys_are_worth_skipping(self):
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        for S, name in ((1023, "xla"), (1024, "xla_chunked")):
            assert self.chosen(T=80, S=S, key_value_seq_lengths=lengths) == name

    def test_text(self):
        text = str(explain())
        for name in NAMES:
            assert name in text
        assert "float32" in text  # cuDNN's reason
        assert "cpu" in text

    def test_takes_every_argument(self):
        rng = np.random.default_rng(0)
        why = explain(
            Q,
            KV,
            KV,
            rng.normal(size=(5, 7)).astype(np.float32),
            Mask.causal(),
            scale=0.3,
            is_causal=True,
            query_seq_lengths=np.array([3, 4]),
            key_value_seq_lengths=np.array([3, 4]),
            local_window_size=(2, 0),
            implementation="xla",
            return_residual=True,
            logits_soft_cap=3.0,
            sinks=np.zeros(4, np.float32),
            query_segment_ids=np.zeros((2, 5), int),
            key_value_segment_ids=np.zeros((2, 7), int),
            dropout_rate=0.1,
            dropout_rng=jax.random.key(0),
            broadcast_dropout=True,
            alibi_slopes=np.zeros(4, np.float32),
            q_offset=2,
            kv_positions=np.arange(7),
            precision="highest",
        )
        assert why["xla"] is None and why["xla_chunked"] is None

    def test_shapes_are_enough(self):
        q, kv = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (Q, KV))
        lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
        assert set(explain(q, kv, kv, key_value_seq_lengths=lengths)) == NAMES

    def test_inside_jit(self):
        seen = []

        @jax.jit
        def f(q, kv):
            seen.append(explain(q, kv, kv).chosen)
            return q

        f(Q, KV)
        assert seen == [explain().chosen]


class TestCudnn:
    """What cuDNN would ignore or answer differently is refused by name, on any machine."""

    @pytest.mark.parametrize(
        "kwargs, words",
        [
            (dict(logits_soft_cap=2.0), ["logits_soft_cap"]),
            (dict(sinks=np.zeros(4, np.float32)), ["sinks"]),
            (dict(alibi_slopes=np.zeros(4, np.float32)), ["alibi"]),
            (dict(dropout_rate=0.1, dropout_rng=jax.random.key(0)), ["dropout"]),
            (dict(q_offset=3), ["q_offset"]),
            (dict(kv_positions=np.arange(7)), ["positions"]),
            (dict(return_residual=True), ["return_residual"]),
            (dict(precision="highest"), ["precision"]),
            (dict(mask=Mask.prefix(2)), ["prefix"]),
            (dict(mask=Mask.causal(1)), ["causal", "offset"]),
            (dict(query_segment_ids=np.zeros(5, int), key_value_segment_ids=np.zeros(7, int)), ["segments"]),
            (dict(local_window_size=(2, 2)), ["window", "right"]),
            (dict(local_window_size=(None, 0)), ["window", "open"]),
            (dict(mask=np.ones((1, 1, 1, 7), bool)), ["mask", "broadcast"]),
            (dict(key_value_seq_lengths=np.array([1, 2]), local_window_size=(2, 0)), ["window", "lengths"]),
        ],
    )  # fmt: skip
    def test_refusals(self, kwargs, words):
        why = explain(*half(Q, KV, KV), **kwargs)
        for word in words:
            assert word in why["cudnn"]
        with pytest.raises(NotImplementedError) as caught:
            axattn.dot_product_attention(*half(Q, KV, KV), implementation="cudnn", **kwargs)
        assert why["cudnn"] in str(caught.value) and "cudnn" in str(caught.value)

    @pytest.mark.parametrize(
        "sizes, word", [((12, 12), "12"), ((264, 264), "264"), ((8, 16), "h=16")]
    )
    def test_head_sizes(self, sizes, word):
        H, h = sizes
        q, k, v = half(np.zeros((1, 5, 4, H)), np.zeros((1, 5, 4, H)), np.zeros((1, 5, 4, h)))
        assert word in explain(q, k, v)["cudnn"]

    @pytest.mark.parametrize("T, S", [(4, 6), (5, 6), (4, 7)])
    def test_mask_arrays_of_odd_lengths(self, T, S):
        q, kv = half(np.zeros((1, T, 4, 8)), np.zeros((1, S, 2, 8)))
        why = explain(q, kv, kv, mask=np.ones((T, S), bool))
        assert ("odd T or S" in str(why["cudnn"])) == bool(T % 2 or S % 2)

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="an attached GPU may take it")
    def test_needs_the_device(self):
        assert "NVIDIA GPU" in explain(*half(Q, KV, KV))["cudnn"]


class TestSequences:
    def test_first_that_takes_the_call(self):
        expected = axattn.dot_product_attention(Q + 1, KV, KV + 1, implementation="xla")
        for names in (("cudnn", "xla"), ["xla"], ("mosaic", "cudnn", "xla", "xla_chunked")):
            got = axattn.dot_product_attention(Q + 1, KV, KV + 1, implementation=names)
            np.testing.assert_array_equal(got, expected)

    def test_order_matters(self, monkeypatch):
        chosen = []
        monkeypatch.setattr(
            _attention,
            "_run_compiled",
            lambda call, plan: chosen.append(plan) or (call.query, None),
        )
        axattn.dot_product_attention(Q, KV, KV, implementation=("xla_chunked", "xla"))
        axattn.dot_product_attention(Q, KV, KV, implementation=("xla", "xla_chunked"))
        found = [{names for _, names in plan.names} for plan in chosen]
        assert found == [{("xla_chunked",)}, {("xla",)}]

    def test_reasons_of_all(self):
        with pytest.raises(NotImplementedError, match="cudnn.*float32.*mosaic_gpu"):
            axattn.dot_product_attention(Q, KV, KV, implementation=("cudnn", "mosaic_gpu"))


class TestPlatforms:
    """Kernels join per platform; a fake one stands for them here."""

    @pytest.fixture
    def fake_tpu_kernel(self, monkeypatch):
        def forward(call, *, interpret):
            return jnp.full_like(call.query, 7.0), jnp.zeros(call.query.shape[:3])

        monkeypatch.setattr(mosaic_tpu, "forward", forward)
        monkeypatch.setitem(
            registry.IMPLEMENTATIONS,
            "mosaic_tpu",
            registry.Implementation("mosaic_tpu", None, lambda call: None, ("tpu",)),
        )
        monkeypatch.setattr(
            _attention,
            "_run_compiled",
            jax.jit(lambda call, plan: registry.run_plan(call, plan), static_argnames="plan"),
        )

    def lowered(self, platform, **kwargs):
        def attend(q, k, v):
            return axattn.dot_product_attention(q, k, v, **kwargs)

        return jax.jit(attend).trace(Q, KV, KV).lower(lowering_platforms=(platform,)).as_text()

    def test_mosaic_is_what_fits(self, fake_tpu_kernel):
        assert explain()["mosaic"] is None
        assert "7.0" in self.lowered("tpu", implementation="mosaic")
        assert "7.0" in self.lowered("tpu", implementation=("mosaic", "xla"))

    def test_sequence_falls_back_by_platform(self, fake_tpu_kernel):
        out = axattn.dot_product_attention(Q, KV, KV + 1, implementation=("mosaic", "xla"))
        np.testing.assert_allclose(out, 1.0, rtol=1e-6)

    @pytest.mark.parametrize("name", ["mosaic", "mosaic_tpu"])
    def test_a_named_kernel_never_becomes_another(self, fake_tpu_kernel, name):
        with pytest.raises((NotImplementedError, ValueError)) as caught:
            axattn.dot_product_attention(Q, KV, KV, implementation=name)
        assert name in str(caught.value) or "platform" in str(caught.value)

    def test_none_by_platform(self, fake_tpu_kernel, monkeypatch):
        monkeypatch.setattr(
            preference,
            "choose_implementation",
            lambda call, platform, reasons: "mosaic_tpu" if platform == "tpu" else "xla",
        )
        why = explain()
        assert why.by_platform["tpu"] == "mosaic_tpu" and why.by_platform["cpu"] == "xla"
        assert "7.0" in self.lowered("tpu")
        assert "7.0" not in self.lowered("cpu")
        np.testing.assert_allclose(axattn.dot_product_attention(Q, KV, KV + 1), 1.0, rtol=1e-6)

    def test_none_may_differ_between_platforms_under_grad_and_vmap(self, monkeypatch):
        monkeypatch.setattr(
            preference,
            "choose_implementation",
            lambda call, platform, reasons: "xla_chunked" if platform == "tpu" else "xla",
        )

        def loss(q):
            return (axattn.dot_product_attention(q, KV + 0.1, KV + 1) ** 2).sum()

        def strict(q):
            return (
                axattn.dot_product_attention(q, KV + 0.1, KV + 1, implementation="xla") ** 2
            ).sum()

        np.testing.assert_allclose(jax.grad(loss)(Q), jax.grad(strict)(Q), atol=1e-6)
        twice = np.stack([Q, Q + 1])
        np.testing.assert_allclose(jax.vmap(loss)(twice), jax.vmap(strict)(twice), rtol=1e-5)
