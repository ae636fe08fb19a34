"""Attention over a mesh is attention on one device: strategies, masks, heads, gradients."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask, parallel
from axattn._sharded import costs
from tests import cases, precision
from tests.cases import Shape
from tests.precision import Call
from tests.tiers import ci

AXES = parallel.Axes(batch="data", heads="model", sequence="context")
T = 48
HEADS = {"MHA": (8, 8), "GQA": (8, 2), "MQA": (8, 1)}


def segments(rng):
    ids = np.sort(rng.integers(0, 4, (2, T)), -1)
    return dict(query_segment_ids=ids, is_causal=True)


MASKS = {
    "nothing": lambda rng: {},
    "causal": lambda rng: dict(is_causal=True),
    "window": lambda rng: dict(local_window_size=(9, 0)),
    "two-sided window": lambda rng: dict(local_window_size=(5, 11), logits_soft_cap=3.0),
    "prefix": lambda rng: dict(mask=Mask.prefix(13)),
    "segments": segments,
    "lengths": lambda rng: dict(
        query_seq_lengths=np.array([T, 21]), key_value_seq_lengths=np.array([17, 40])
    ),
    "dense, bias, sinks": lambda rng: dict(
        mask=rng.random((2, 8, T, T)) < 0.5,
        bias=rng.normal(size=(1, 8, T, T)),
        sinks=rng.normal(size=8),
        alibi_slopes=np.linspace(0.01, 0.3, 16, dtype=np.float32).reshape(2, 8),
    ),
}


def call_of(mask, heads, dtype=jnp.float32):
    rng = np.random.default_rng(5)
    N, K = HEADS[heads]
    shape = Shape(B=2, T=T, S=T, N=N, K=K, H=16, h=8)
    call = Call(cases.arrays(rng, shape, dtype), MASKS[mask](rng))
    for extra in ("bias", "sinks"):
        if extra in call.options:
            call.inputs[extra] = jnp.asarray(call.options.pop(extra).astype(dtype))
    if isinstance(call.options.get("mask"), Mask):
        array = np.asarray(call.options["mask"].materialize(T, T))
        call.reference_options = call.options | {"mask": array}
    if mask == "lengths":
        behind = {
            name: cases.behind(T, call.options[f"{long}_seq_lengths"])
            for name, long in (("query", "query"), ("key", "key_value"), ("value", "key_value"))
        }
        call.poison = behind
    return call


MESHES = [dict(context=8), dict(data=2, model=2, context=2), dict(model=2, context=4)]


def data(**changes):
    """A call whose masks are all there, as arrays: which, is a matter of their values."""
    rng = np.random.default_rng(5)
    inputs = cases.arrays(rng, Shape(B=2, T=T, S=T, N=8, K=2, H=16, h=8), jnp.float32)
    given = {
        "bias": np.zeros((1, 8, T, T)),
        "sinks": np.full(8, -np.inf),
        "mask": np.ones((2, 8, T, T), bool),
        "alibi_slopes": np.zeros((2, 8), np.float32),
        "query_segment_ids": np.zeros((2, T), int),
        "query_seq_lengths": np.full(2, T),
        "key_value_seq_lengths": np.full(2, T),
        "q_offset": np.full(2, T),  # what is causal sees everything
    } | changes
    extra = {name: jnp.asarray(given.pop(name), jnp.float32) for name in ("bias", "sinks")}
    call = Call(inputs | extra, given | {"is_causal": True})
    for name, lengths in (("query", "query"), ("key", "key_value"), ("value", "key_value")):
        call.poison[name] = cases.behind(T, given[f"{lengths}_seq_lengths"])
    return call


DATA = {
    "nothing": {},
    "causal": dict(q_offset=np.array([0, -5])),
    "lengths": dict(query_seq_lengths=np.array([T, 21]), key_value_seq_lengths=np.array([17, 40])),
    "segments": dict(
        query_segment_ids=segments(np.random.default_rng(5))["query_segment_ids"],
        q_offset=np.zeros(2, int),
    ),
    "arrays": MASKS["dense, bias, sinks"](np.random.default_rng(5)),
}


# The two key/value heads are those of a device, of two, and sent to two.
DATA_MESHES = {
    "ring": dict(model=2, context=4),
    "gather": dict(model=4, context=2),
    "ulysses": dict(data=2, context=4),
}


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=() if s == "ring" else pytest.mark.ci) for s in costs.STRATEGIES],
)
def test_masks_that_are_data(mesh_of, strategy):
    """One program for all of them."""
    mesh = mesh_of(**DATA_MESHES[strategy])
    attend = functools.partial(parallel.attention, axes=AXES, mesh=mesh, strategy=strategy)
    precision.check([data(**changes) for changes in DATA.values()], (attend,))


# What a mask of structure leaves out is a matter of the ring: the others have all keys together.
STRUCTURED = {
    "ring": ("nothing", "causal", "window", "two-sided window", "prefix"),
    "gather": ("window", "prefix"),
    "ulysses": ("causal", "two-sided window"),
}


def strategies():
    """Heads take turns; the rest of the product is exhaustive."""
    for strategy, mask, heads in itertools.product(costs.STRATEGIES, MASKS, HEADS):
        masks = STRUCTURED[strategy]
        turn = mask in masks and list(HEADS)[masks.index(mask) % 3] == heads
        mark = pytest.mark.ci if turn else pytest.mark.exhaustive
        everyday = turn and (strategy, mask) == ("ring", "two-sided window")
        yield pytest.param(strategy, mask, heads, marks=() if everyday else mark)


@pytest.mark.parametrize("strategy, mask, heads", list(strategies()))
def test_strategies(mesh_of, strategy, mask, heads):
    """Kinds of meshes take turns."""
    turn = list(MASKS).index(mask) + costs.STRATEGIES.index(strategy) + list(HEADS).index(heads)
    mesh = mesh_of(**MESHES[turn % 3])
    attend = functools.partial(parallel.attention, axes=AXES, mesh=mesh, strategy=strategy)
    precision.check(call_of(mask, heads), (attend,))


@pytest.mark.ci
@pytest.mark.parametrize(
    "strategy, mask",
    [("ring", "window"), ("ring", "prefix"), ("gather", "window"), ("ulysses", "causal")],
)
def test_zigzag(mesh_of, strategy, mask):
    """Tokens in another order, which masks know by their positions."""
    order = parallel.positions("zigzag", 4, T)
    back = np.argsort(order)

    def attend(query, key, value, **options):
        out, lse = parallel.attention(
            *(x[:, order] for x in (query, key, value)), axes=AXES, mesh=mesh_of(model=2, context=4),
            strategy=strategy, layout="zigzag", **options,
        )  # fmt: skip
        return out[:, back], lse[:, back]

    precision.check(call_of(mask, "GQA"), (attend,))


@pytest.mark.ci
@pytest.mark.parametrize("strategy", costs.STRATEGIES)
def test_low_precision(mesh_of, strategy):
    attend = functools.partial(
        parallel.attention, axes=AXES, mesh=mesh_of(model=2, context=4), strategy=strategy
    )
    precision.check(call_of("causal", "GQA", jnp.bfloat16), (attend,))


@pytest.mark.parametrize(
    "strategy",
    ["ring", *ci(*(n for n in costs.STRATEGIES if n != "ring"))],
)
def test_softmax_does_not_see_a_bias_of_queries(mesh_of, strategy):
    """Its gradient is zero, and rounding is all there can be."""
    attend = functools.partial(
        parallel.attention, axes=AXES, mesh=mesh_of(model=2, context=4), strategy=strategy
    )
    call = call_of("causal", "GQA", jnp.bfloat16)

    @jax.jit
    def gradient(bias):
        out, pull = jax.vjp(lambda bias: attend(**call.inputs, bias=bias, is_causal=True), bias)
        return pull(out)[0]

    bias = jnp.linspace(-1, 1, T, dtype=jnp.bfloat16)[None, None, :, None]
    assert np.abs(gradient(bias).astype(float)).max() < 1e-3


@pytest.mark.ci
@pytest.mark.parametrize(
    "model, implementation", [(1, "xla"), (2, "xla_chunked"), (4, "xla"), (8, "xla_chunked")]
)
def test_heads_and_batches_alone(mesh_of, model, implementation):
    """More ways than key/value heads, too."""
    axes = parallel.Axes(batch="data", heads="model")
    mesh = mesh_of(data=min(2, 8 // model), model=model)
    attend = functools.partial(
        parallel.attention, axes=axes, mesh=mesh, implementation=implementation
    )
    precision.check(call_of("dense, bias, sinks", "GQA"), (attend,))


@pytest.mark.ci
@pytest.mark.parametrize("strategy", costs.STRATEGIES)
def test_one_token_on_each_shard(mesh_of, strategy):
    """What is one token of a shard is not what all tokens share."""
    rng = np.random.default_rng(1)
    shape = Shape(B=2, T=8, S=8, N=8, K=8, H=8, h=8)
    call = Call(cases.arrays(rng, shape, jnp.float32), dict(mask=rng.random((2, 8, 1, 8)) < 0.7))
    call.inputs["bias"] = jnp.asarray(rng.normal(size=(2, 1, 8, 8)).astype(jnp.float32))
    call.options |= dict(is_causal=True, query_segment_ids=np.sort(rng.integers(0, 2, (2, 8)), -1))
    attend = functools.partial(
        parallel.attention, axes=AXES, mesh=mesh_of(context=8), strategy=strategy
    )
    precision.check(call, (attend,))


@pytest.mark.ci
@pytest.mark.parametrize(
    "strategy, layout",
    [("ring", "contiguous"), ("ring", "zigzag"), ("gather", "zigzag"), ("ulysses", "contiguous")],
)
def test_an_offset_counts_from_where_tokens_are(mesh_of, strategy, layout):
    attend = functools.partial(
        parallel.attention, axes=AXES, mesh=mesh_of(context=4), strategy=strategy, layout=layout
    )
    q, k, v = (call_of("causal", "MHA").inputs[name] for name in ("query", "key", "value"))
    np.testing.assert_array_equal(
        attend(q, k, v, is_causal=True, q_offset=np.array([0, 0])), attend(q, k, v, is_causal=True)
    )
    inside = functools.partial(local(mesh_of(context=4), strategy, layout), is_causal=True)
    offset = jax.jit(functools.partial(inside, q_offset=0))  # op by op it takes minutes
    np.testing.assert_allclose(offset(q, k, v), jax.jit(inside)(q, k, v), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", costs.STRATEGIES)
def test_one_pattern_of_dropout(mesh_of, strategy):
    """``broadcast_dropout``: the same for all rows and heads, another for every token."""
    q = jnp.zeros((2, 16, 4, 4))
    v = jnp.broadcast_to(jnp.eye(16)[None, :, None], (2, 16, 4, 16))
    attend = functools.partial(
        parallel.attention, axes=AXES, mesh=mesh_of(context=4), strategy=strategy,
        dropout_rate=0.5, broadcast_dropout=True,
    )  # fmt: skip
    out = jax.jit(attend)(q, q, v, dropout_rng=jax.random.key(0))
    kept = np.asarray(out) > 0
    assert (kept == kept[:1, :, :1]).all()
    assert len(np.unique(kept[0, :, 0], axis=0)) == 16


@pytest.mark.ci
def test_named_implementations_take_what_they_take(mesh_of):
    """A sequence of names is an order of preference within a strategy that one of them takes."""
    call = call_of("window", "GQA")
    attend = functools.partial(
        parallel.attention, **{n: call.inputs[n] for n in ("query", "key", "value")},
        axes=AXES, mesh=mesh_of(context=4), local_window_size=(2, 0),
    )  # fmt: skip
    want = attend(implementation="xla_chunked", strategy="ring")
    np.testing.assert_allclose(attend(implementation=("mosaic_tpu", "xla")), want, atol=1e-5)
    with pytest.raises(NotImplementedError, match='"ring" merges in float32, got float64'):
        with jax.enable_x64(True):
            q = jnp.ones((1, 16, 2, 4), jnp.float64)
            parallel.attention(q, q, q, axes=AXES, mesh=mesh_of(context=4), strategy="ring")


def test_arrays_of_another_device_are_brought(mesh_of):
    q = jax.device_put(jnp.ones((2, 16, 4, 4)), jax.devices()[7])
    out = parallel.attention(q, q, q, axes=AXES, mesh=mesh_of(data=2, context=2))
    assert len(out.sharding.device_set) == 4 and (out == 1).all()


def test_a_list_of_axes_and_structs(mesh_of):
    axes = parallel.Axes(batch=["data"], sequence="context")
    assert axes == parallel.Axes(batch=("data",), sequence="context")
    q, bias = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 16, 4, 4), (1, 4, 16, 16)))
    found = parallel.explain(q, q, q, bias, axes=axes, mesh=mesh_of(data=2, context=4))
    assert len(found) == 3


# ---- what moves --------------------------------------------------------------------------------


def program(mesh, strategy, backward=False, **options):
    """Optimized HLO of attention whose arrays are shared out; no dimension is like another."""
    shapes = (2, 64, 12, 20), (2, 64, 4, 20), (2, 64, 4, 28)
    spec = jax.sharding.NamedSharding(mesh, jax.P("data", "context", "model", None))
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=spec) for s in shapes]

    def attend(q, k, v):
        return parallel.attention(q, k, v, axes=AXES, mesh=mesh, strategy=strategy, **options)

    def gradients(q, k, v):
        return jax.vjp(attend, q, k, v)[1](jnp.ones((2, 64, 12, 28)))

    return jax.jit(gradients if backward else attend).lower(*arrays).compile().as_text()


def moved(text, kind):
    """Shapes that collectives of a kind give."""
    found = re.findall(rf"= \(?([^=]*?) {kind}(?:-start)?\(", text)
    return [shape for line in found for shape in re.findall(r"\w+\[[\d,]*\]", line)]


@pytest.mark.ci
@pytest.mark.parametrize("backward", [False, True])
def test_a_ring_moves_keys_and_values_of_their_own_heads(mesh_of, backward):
    """Of 4 key/value heads on 2 ways: 2; and never a query."""
    text = program(mesh_of(model=2, context=4), "ring", backward, is_causal=True)
    for kind in ("all-gather", "all-to-all", "reduce-scatter"):
        assert not moved(text, kind), kind
    sizes = {int(np.prod([int(n) for n in shape.split("[")[1][:-1].split(",")]))
             for shape in moved(text, "collective-permute")}  # fmt: skip
    tokens = 2 * 16
    assert sizes <= {tokens * 2 * 20, tokens * 2 * 28, 16}  # keys, values, positions


@pytest.mark.ci
def test_gathering_gathers_no_query(mesh_of):
    text = program(mesh_of(model=2, context=4), "gather", is_causal=True)
    sizes = [shape for shape in moved(text, "all-gather") if shape.startswith("f32")]
    assert sizes and all(shape.endswith(("2,20]", "2,28]")) for shape in sizes), sizes
    assert not moved(text, "collective-permute")


@pytest.mark.ci
@pytest.mark.parametrize("window, steps", [((9, 0), 1), ((16, 0), 1), ((17, 0), 2), ((3, 3), 2)])
def test_windows_leave_steps_out(mesh_of, window, steps):
    """Shards of 16 tokens: how far a window reaches is how often keys travel."""
    text = program(mesh_of(context=4), "ring", local_window_size=window)
    keys = [s for s in moved(text, "collective-permute") if s.endswith(",4,20]")]
    assert len(keys) == steps


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (ValueError, "heads takes axes of the mesh, .* got 'tensor'",
         dict(axes=parallel.Axes(heads="tensor"))),
        (ValueError, "used more than once: \\['data'\\]",
         dict(axes=lambda: parallel.Axes(batch="data", heads="data"))),
        (ValueError, "strategy takes one of .* got 'star'", dict(strategy="star")),
        (ValueError, "layout takes one of .* got 'striped'", dict(layout="striped")),
        (ValueError, "layout 'contiguous' takes lengths that are a multiple of 4 on 4 shards, got 50",
         dict(length=50)),
        (ValueError, "batch takes axes whose size divides 3 rows, got 2", dict(batch=3)),
        (ValueError, "heads takes axes whose size divides 5 heads, got 2", dict(heads=(5, 1))),
        (NotImplementedError, 'strategy "ulysses" needs query heads in multiples of 4, got 3',
         dict(strategy="ulysses", heads=(3, 3), axes=parallel.Axes(sequence="context"))),
        (NotImplementedError, 'strategy "ring" merges .*, got \\(\'xla\',\\)',
         dict(strategy="ring", implementation="xla")),
    ],
)  # fmt: skip
def test_errors(mesh_of, error, match, changes):
    """Before anything is compiled."""
    changes = dict(changes)
    N, K = changes.pop("heads", (8, 2))
    batch, length = changes.pop("batch", 2), changes.pop("length", 48)
    q, kv = (jax.ShapeDtypeStruct((batch, length, n, 16), jnp.float32) for n in (N, K))
    given = dict(axes=AXES, mesh=mesh_of(data=2, context=4)) | changes
    if N == 5:
        given["mesh"] = mesh_of(model=2, context=4)
    with pytest.raises(error, match=match):
        axes = given.pop("axes")
        axes = axes() if callable(axes) else axes
        jax.eval_shape(functools.partial(parallel.attention, axes=axes, **given), q, kv, kv)


def test_no_mesh():
    q = jnp.ones((1, 8, 2, 4))
    with pytest.raises(ValueError, match="mesh takes a Mesh where none is set"):
        parallel.attention(q, q, q, axes=AXES)


# ---- inside of shard_map -----------------------------------------------------------------------


def local(mesh, strategy, layout="contiguous"):
    """`local_attention` in the place of the door: a shard_map of one's own."""
    P = jax.sharding.PartitionSpec

    def attend(query, key, value, query_segment_ids=None, **options):
        def run(query, key, value, ids):
            ids = {} if ids is None else dict(query_segment_ids=ids)
            return parallel.local_attention(
                query,
                key,
                value,
                axis="context",
                strategy=strategy,
                layout=layout,
                **ids,
                **options,
            )

        tokens = P(None, "context")
        specs = (tokens, tokens, tokens, None if query_segment_ids is None else tokens)
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=tokens)(
            query, key, value, query_segment_ids
        )

    return attend


@pytest.mark.ci
@pytest.mark.parametrize(
    "strategy, mask",
    [
        *(("ring", mask) for mask in ("causal", "two-sided window", "segments")),
        ("gather", "segments"),
        ("ulysses", "two-sided window"),
    ],
)
def test_local_attention(mesh_of, strategy, mask):
    heads = "MHA" if strategy == "ulysses" else "MQA"
    precision.check(call_of(mask, heads), (local(mesh_of(context=4), strategy),))


@pytest.mark.parametrize(
    "error, match, strategy, options",
    [
        (NotImplementedError, "bias and dense masks are for", "ring", dict(bias=np.zeros((1, 1, 1, 12)))),
        (NotImplementedError, "bias and dense masks are for", "ring", dict(mask=np.ones((12, 12), bool))),
        (ValueError, "strategy takes one of .* got None", None, {}),
        (NotImplementedError, 'strategy "ulysses" needs query heads in multiples of 4, got 2', "ulysses", {}),
        (NotImplementedError, 'strategy "ring" merges .*, got \\(\'xla\',\\)', "ring", dict(implementation="xla")),
    ],
)  # fmt: skip
def test_local_errors(mesh_of, error, match, strategy, options):
    q = jnp.ones((1, T, 2, 16))
    with pytest.raises(error, match=match):
        local(mesh_of(context=4), strategy)(q, q, q, **options)
