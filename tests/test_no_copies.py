"""K and V are never copied per query head, and the chunked path never holds T x S of anything.

Read from the program itself: the jaxpr with all that is nested in it, and what XLA compiled.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import axattn
from axattn import Mask
from axattn._implementations.chunked import backward as chunked_backward
from axattn._implementations.chunked import forward as chunked_forward
from tests.tiers import ci

# K and V repeated to all heads are larger than anything else that a call may hold: T < h.
B, S, N, K, H, h = 2, 130, 12, 3, 40, 24
REPEATED = B * S * N * min(H, h)
SHORT, SHORTER = 7, 5  # T * N above and below the rows that are folded into one product


def repeat_kv(q, k, v, **kwargs):
    """What most code does, and the checks here must see."""
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    return axattn.dot_product_attention(q, k, v, implementation="xla", **kwargs)


def with_gradients(attend):
    def program(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    return program


def structs(T, dtype=jnp.float32, *, batch=B, S=S, N=N, K=K, H=H, h=h):
    shapes = (T, N, H), (S, K, H), (S, K, h), (T, N, h)
    return [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape in shapes]


def arrays_of(jaxpr):
    """Every array that a jaxpr computes, those of loops, branches and calls in it included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if hasattr(variable.aval, "shape"):
                yield str(equation.primitive), variable.aval
        if equation.primitive.name == "axattn_staged":  # traced when it is lowered
            shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
            yield from arrays_of(jax.make_jaxpr(dict(equation.params["branches"])["cpu"])(*shapes))
        for parameter in equation.params.values():
            for item in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                item = getattr(item, "jaxpr", item)
                if isinstance(item, core.Jaxpr):
                    yield from arrays_of(item)


def traced(function, shapes, at_least):
    """Arrays of at least so many elements in the jaxpr, and how many arrays were looked at."""
    found = list(arrays_of(jax.make_jaxpr(function)(*shapes).jaxpr))
    return [(p, a.shape) for p, a in found if math.prod(a.shape) >= at_least], len(found)


def compiled(function, shapes, at_least):
    """Likewise in the program that XLA made of it for this machine."""
    text = jax.jit(function).lower(*shapes).compile().as_text()
    found = set(re.findall(r"\b((?:pred|[a-z]+\d+)\[([\d,]+)\])", text))
    sizes = [(name, math.prod(map(int, dims.split(",")))) for name, dims in found]
    return [name for name, size in sizes if size >= at_least], len(found)


FEATURES = {
    "nothing": {},
    "causal_sinks": dict(is_causal=True, sinks=np.ones(N, np.float32)),
    "lengths": dict(key_value_seq_lengths=np.array([100, 3]), logits_soft_cap=2.0),
    "mask_bias": dict(mask=np.ones((B, 1, 1, S), bool), bias=np.zeros((1, N, 1, S), np.float32)),
    "dropout": dict(dropout_rate=0.1, dropout_rng=jax.random.key(0)),
}


@pytest.mark.parametrize("T", [SHORT, SHORTER])
@pytest.mark.parametrize("implementation", ["xla", "xla_chunked", None])
@pytest.mark.parametrize("features", FEATURES)
def test_jaxpr(force_blocks, features, implementation, T):
    force_blocks(4, 32)

    def attend(q, k, v):
        return axattn.dot_product_attention(
            q, k, v, implementation=implementation, **FEATURES[features]
        )

    for function, shapes in ((attend, structs(T)[:3]), (with_gradients(attend), structs(T))):
        copies, count = traced(function, shapes, REPEATED)
        assert count > 20
        assert not copies


@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, *ci(jnp.bfloat16)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("T", [SHORT, *ci(SHORTER), 1])
@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
def test_compiled(force_blocks, implementation, T, dtype):
    force_blocks(4, 32)

    def attend(q, k, v):
        return axattn.dot_product_attention(q, k, v, implementation=implementation, is_causal=True)

    copies, count = compiled(with_gradients(attend), structs(T, dtype), REPEATED)
    assert count > 10
    assert not copies


@pytest.mark.parametrize("check", [traced, compiled])
def test_the_checks_see_a_copy(check):
    for function, shapes in (
        (repeat_kv, structs(SHORT)[:3]),
        (with_gradients(repeat_kv), structs(SHORT)),
        # Hidden in a loop, a branch, a checkpoint, another order of heads.
        (lambda q, k, v: jax.lax.map(lambda _: repeat_kv(q, k, v), jnp.arange(2)), structs(SHORT)[:3]),
        (jax.checkpoint(repeat_kv), structs(SHORT)[:3]),
        (
            lambda q, k, v: jax.lax.cond(q.sum() > 0, repeat_kv, lambda q, k, v: q[..., :h], q, k, v),
            structs(SHORT)[:3],
        ),
        (lambda q, k, v: jnp.einsum("btnh,bsnh->bnts", q, jnp.tile(k, (1, 1, N // K, 1)) + q.sum()), structs(SHORT)[:3]),
    ):  # fmt: skip
        copies, _ = check(function, shapes, REPEATED)
        assert copies


LONG = dict(batch=1, N=2, K=1, H=4, h=4)
STRUCTURED = {
    "nothing": {},
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(100, 20)),
    "segments": dict(query_segment_ids=np.arange(4096) // 999),
    "lengths_alibi": dict(
        key_value_seq_lengths=np.array([3000]), alibi_slopes=np.ones(2, np.float32)
    ),
    "prefix_dropout": dict(
        mask=Mask.prefix(1000) & Mask.window(2000, None),
        dropout_rate=0.1,
        dropout_rng=jax.random.key(0),
    ),
    "everything": dict(
        is_causal=True,
        logits_soft_cap=2.0,
        sinks=np.ones(2, np.float32),
        q_offset=np.array([5]),
        kv_positions=np.arange(4096),
        bias=np.zeros((1, 2, 1, 4096), np.float32),
        mask=np.ones((1, 1, 4096, 1), bool),
        return_residual=True,
    ),
}


class TestMemory:
    """O(T + S) for "xla_chunked", with the block sizes that it takes by itself."""

    @pytest.mark.parametrize("features", STRUCTURED)
    def test_no_scores(self, features):
        size = 4096

        def attend(q, k, v):
            out = axattn.dot_product_attention(
                q, k, v, implementation="xla_chunked", **STRUCTURED[features]
            )
            return out[0] if isinstance(out, tuple) else out

        shapes = structs(size, S=size, **LONG)
        for function, arguments in ((attend, shapes[:3]), (with_gradients(attend), shapes)):
            held, _ = traced(function, arguments, size * size)
            assert not held

    def test_the_check_sees_scores(self):
        def attend(q, k, v):
            return axattn.dot_product_attention(q, k, v, implementation="xla")

        assert traced(attend, structs(4096, S=4096, **LONG)[:3], 4096 * 4096)[0]

    @pytest.mark.ci
    def test_temporaries_grow_with_length_only(self):
        def temporaries(size, implementation):
            def attend(q, k, v):
                return axattn.dot_product_attention(
                    q, k, v, is_causal=True, implementation=implementation
                )

            program = jax.jit(with_gradients(attend))
            shapes = structs(size, S=size, **LONG)
            return program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

        short, long = (temporaries(size, "xla_chunked") for size in (4096, 16384))
        assert long < 4.5 * short
        assert long < 0.02 * 4 * LONG["N"] * 16384**2
        assert temporaries(1024, "xla") > 10 * temporaries(256, "xla")


class TestSkipping:
    """Blocks that the mask empties are not computed."""

    @pytest.fixture
    def visited(self, monkeypatch, force_blocks):
        """Runs a call and its gradient in 16 x 16 blocks; the steps that were really taken."""
        force_blocks(16, 16)
        counts = {"forward": 0, "backward": 0}
        for name, module in (("forward", chunked_forward), ("backward", chunked_backward)):
            own = f"_add_{name}_chunk"
            step = getattr(module, own)

            def counted(*args, name=name, step=step, **kwargs):
                def count():
                    counts[name] += 1

                jax.debug.callback(count)
                return step(*args, **kwargs)

            monkeypatch.setattr(module, own, counted)

        def run(T, S, *, batch=1, **kwargs):
            shapes = structs(T, S=S, batch=batch, N=2, K=1, H=4, h=4)
            arrays = [jnp.ones(x.shape) for x in shapes]

            def attend(q, k, v):
                return axattn.dot_product_attention(q, k, v, implementation="xla_chunked", **kwargs)

            jax.block_until_ready(jax.jit(with_gradients(attend))(*arrays))
            jax.effects_barrier()
            return counts["forward"], counts["backward"]

        return run

    ids = np.repeat([0, 1, 2], [32, 48, 16])
    blocks = np.zeros((96, 96), bool)
    blocks[20, 90] = blocks[70, 3] = True

    # How a window, say, becomes block answers is in tests/test_masks.py.
    VISITED = {
        "nothing": ({}, 36),
        "offset": (dict(is_causal=True, q_offset=-48), 6),
        "window": (dict(local_window_size=(16, 0)), 11),
        "lengths": (dict(query_seq_lengths=[16], key_value_seq_lengths=[17]), 2),
        "no_length": (dict(query_seq_lengths=[96], key_value_seq_lengths=[0]), 0),
        "segments": (dict(query_segment_ids=ids), 4 + 9 + 1),
        "prefix": (dict(mask=Mask.prefix(32)), 12 + 10),
        "dense": (dict(mask=blocks), 2),
        "no_key": (dict(mask=np.zeros((1, 1, 1, 96), bool)), 0),
    }

    @pytest.mark.parametrize(
        "name",
        [
            *("offset", "lengths", "dense"),
            *ci("nothing", "window", "no_length", "segments", "prefix", "no_key"),
        ],
    )
    def test_blocks_visited(self, visited, name):
        kwargs, blocks = self.VISITED[name]
        assert visited(96, 96, **kwargs) == (blocks, blocks)

    def test_tails(self, visited):
        assert visited(90, 70, is_causal=True) == (1 + 2 + 3 + 4 + 5 + 5, 1 + 2 + 3 + 4 + 5 + 5)

    def test_rows_of_a_batch_skip_on_their_own(self, force_blocks, visited):
        force_blocks(16, 16, by_row=True)
        lengths = np.array([16, 96, 0])
        forward, backward = visited(96, 96, batch=3, key_value_seq_lengths=lengths)
        assert forward == backward == 6 * (1 + 6 + 0)

    def test_decode_skips(self, visited):
        assert visited(1, 96, key_value_seq_lengths=np.array([40])) == (3, 3)

    def test_empty_blocks_are_not_read(self, force_blocks):
        """NaN in keys and values that no query before them may see, and without lengths."""
        force_blocks(16, 16)
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.normal(size=(1, 64, 2, 8)).astype(jnp.float32)) for _ in range(3)
        )
        poisoned = [x.at[:, 48:].set(jnp.nan) for x in (k, v)]

        def loss(q, k, v):
            out = axattn.dot_product_attention(
                q, k, v, is_causal=True, implementation="xla_chunked"
            )
            return out[:, :48].sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, 0, has_aux=True))(q, *poisoned)
        (_, clean), clean_grads = jax.jit(jax.value_and_grad(loss, 0, has_aux=True))(q, k, v)
        np.testing.assert_array_equal(out[:, :48], clean[:, :48])
        np.testing.assert_array_equal(grads[:, :48], clean_grads[:, :48])
        assert np.isnan(out[:, 48:]).all()  # the poison is where it should be
