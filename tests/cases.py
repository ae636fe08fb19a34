"""Every feature of the call, as a table: name -> what makes a :class:`tests.precision.Call`."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from axattn import Mask
from tests.precision import Call


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call. With few rows per block (32 * G < 128) the chunked path evaluates the mask in
    every block that it visits, in one loop, which halves the time to compile; ``WIDE`` has G = 4,
    and loops of their own for full blocks, where the mask is not evaluated."""

    B: int | tuple[int, ...] = 2
    T: int = 113
    S: int = 203
    N: int = 4
    K: int = 2
    H: int = 64
    h: int = 48

    @property
    def lead(self) -> tuple[int, ...]:
        return self.B if isinstance(self.B, tuple) else (self.B,)

    @property
    def scores(self) -> tuple[int, ...]:
        return (*self.lead, self.N, self.T, self.S)


def arrays(rng, shape: Shape, dtype, *, outliers: bool = False) -> dict[str, jax.Array]:
    """query, key, value: N(0, 1), and a thousandth of them N(0, 100) more (FlashAttention-3's)."""

    def array(*size):
        x = rng.normal(size=(*shape.lead, *size))
        if outliers:
            x = x + rng.normal(scale=10, size=x.shape) * (rng.random(x.shape) < 0.001)
        return jnp.asarray(x.astype(dtype))

    s = shape
    return {
        "query": array(s.T, s.N, s.H),
        "key": array(s.S, s.K, s.H),
        "value": array(s.S, s.K, s.h),
    }


CASES = {}


def case(shape: Shape = Shape(), *, name: str | None = None):
    def add(function):
        CASES[name or function.__name__] = (shape, function)
        return function

    return add


def make(name: str, dtype, *, outliers: bool = False) -> Call:
    """The call of a case: its function gives options (and may add inputs, or change the call)."""
    shape, function = CASES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    call = Call(arrays(rng, shape, dtype, outliers=outliers))
    options = function(rng, shape, call)
    call.options.update(options or {})
    for extra in ("bias", "sinks"):
        if extra in call.options:
            call.inputs[extra] = jnp.asarray(call.options.pop(extra).astype(dtype))
    return call


def simple(name, shape=Shape(), **options):
    case(shape, name=name)(lambda rng, s, call: dict(options))


SQUARE = Shape(T=113, S=113)
WIDE = Shape(N=8)

simple("nothing", WIDE)
simple("causal", WIDE, is_causal=True)
simple("causal_offset", WIDE, is_causal=True, q_offset=np.array([90, 90]))
# The first 40 rows see nothing.
simple("causal_before_all_keys", WIDE, is_causal=True, q_offset=np.array([-40, -40]))
simple("causal_offset_number", is_causal=True, q_offset=90)
simple("window", local_window_size=9)
simple("window_pair", WIDE, local_window_size=(20, 5))
simple("window_left_only", local_window_size=(7, 0))
simple("window_self", SQUARE, local_window_size=0)
simple("window_open_left", local_window_size=(None, 4))
simple("window_open_right", local_window_size=(6, None))
simple(
    "causal_window", WIDE, is_causal=True, local_window_size=(30, 3), q_offset=np.array([60, 60])
)
simple("scale", scale=0.31, is_causal=True)
simple("soft_cap", logits_soft_cap=2.0, scale=1.0)
simple("precision", precision=jax.lax.Precision.HIGHEST)
simple("mha", Shape(N=4, K=4), is_causal=True)
simple("mqa_16", Shape(N=16, K=1, H=128, h=128), is_causal=True, q_offset=90)
simple("head_256", Shape(N=4, K=2, H=256, h=256), is_causal=True)
simple("head_192_128", Shape(N=4, K=1, H=192, h=128), is_causal=True)
simple("small_head", Shape(N=4, K=2, H=5, h=3), is_causal=True)
simple("one_query_one_key", Shape(T=1, S=1))
simple("one_key", Shape(S=1), is_causal=True)
simple("no_batch", Shape(B=()), is_causal=True)


@case(WIDE)
def offset_per_row(rng, s, call):
    return dict(is_causal=True, local_window_size=(30, 3), q_offset=np.array([3, 150]))


@case()
def positions(rng, s, call):
    return dict(
        is_causal=True,
        local_window_size=(40, None),
        q_positions=rng.integers(0, 200, (2, s.T)),
        kv_positions=rng.permutation(s.S),
    )


@case(WIDE)
def lengths(rng, s, call):
    q, kv = np.array([113, 50]), np.array([60, 170])
    call.poison = dict(query=behind(s.T, q), key=behind(s.S, kv), value=behind(s.S, kv))
    return dict(query_seq_lengths=q, key_value_seq_lengths=kv)


@case(WIDE)
def lengths_zero(rng, s, call):
    q, kv = np.array([0, 113]), np.array([203, 0])
    call.poison = dict(query=behind(s.T, q), key=behind(s.S, kv), value=behind(s.S, kv))
    return dict(query_seq_lengths=q, key_value_seq_lengths=kv)


@case(Shape(B=3, T=1, S=203))
def decode(rng, s, call):
    kv = np.array([203, 1, 77])
    call.poison = dict(key=behind(s.S, kv), value=behind(s.S, kv))
    return dict(key_value_seq_lengths=kv, is_causal=True, q_offset=kv - 1)


@case(Shape(B=3, T=3, S=100, N=8, K=4, H=24, h=40))
def decode_three(rng, s, call):
    kv = np.array([100, 20, 64])
    call.poison = dict(key=behind(s.S, kv), value=behind(s.S, kv))
    offset = kv - 3
    return dict(
        key_value_seq_lengths=kv, is_causal=True, q_offset=offset, local_window_size=(31, 0)
    )


@case(WIDE)
def segments_sorted(rng, s, call):
    return dict(
        query_segment_ids=np.sort(rng.integers(0, 4, (2, s.T))),
        key_value_segment_ids=np.sort(rng.integers(0, 4, (2, s.S))),
    )


@case(WIDE)
def segments_unsorted(rng, s, call):
    return dict(
        query_segment_ids=rng.integers(0, 5, (2, s.T)),
        key_value_segment_ids=rng.integers(1, 5, (2, s.S)),
    )


@case(Shape(T=113, S=113, N=8))
def packed(rng, s, call):
    ids = np.stack([np.repeat([1, 2, 3], [40, 60, 13]), np.repeat([7, 8], [100, 13])])
    return dict(query_segment_ids=ids, is_causal=True, local_window_size=(33, 0))


@case(WIDE)
def prefix(rng, s, call):
    n = np.array([30, 150])
    call.reference_options = dict(prefix=n, q_offset=20)
    return dict(mask=Mask.prefix(n), q_offset=20)


@case()
def prefix_number(rng, s, call):
    call.reference_options = dict(prefix=70)
    return dict(mask=Mask.prefix(70))


@case()
def mask_object(rng, s, call):
    offset, array = np.array([5, 60]), rng.random((s.N, s.T, s.S)) < 0.7
    call.reference_options = dict(causal_offset=offset, local_window_size=(50, 20), mask=array)
    return dict(
        mask=Mask.causal(offset) & Mask.window(50, None) & Mask.dense(array),
        local_window_size=(None, 20),
    )


def dense(name, *size, shape=Shape()):
    @case(shape, name=f"mask_{name}")
    def build(rng, s, call):
        mask = rng.random([getattr(s, n) if isinstance(n, str) else n for n in size]) < 0.4
        mask[..., : min(50, mask.shape[-2]), :1] = False
        if mask.shape[-1] > 1:
            mask[..., 3, :] = False  # a row that sees nothing
            mask[..., 100:] &= mask.shape[-2] == 1  # and empty blocks
        return dict(mask=mask)


dense("TS", "T", "S")
dense("NTS", "N", "T", "S")
dense("BNTS", "B", "N", "T", "S", shape=WIDE)
dense("B1TS", "B", 1, "T", "S")


@case()
def mask_of_rows(rng, s, call):
    return dict(mask=rng.random((2, 1, s.T, 1)) < 0.5)


@case()
def mask_of_keys(rng, s, call):
    return dict(mask=rng.random((2, s.N, 1, s.S)) < 0.5, is_causal=True)


@case(WIDE)
def sinks(rng, s, call):
    offset = np.array([0, 7])
    return dict(sinks=rng.normal(scale=3, size=s.N), is_causal=True, q_offset=offset)


@case(WIDE)
def sinks_empty_rows(rng, s, call):
    return dict(sinks=rng.normal(size=s.N), is_causal=True, q_offset=np.array([-60, 90]))


@case(WIDE)
def sinks_far_from_scores(rng, s, call):
    # exp(89) is infinite in float32: the largest of a row's scores and its sink is subtracted.
    sinks = np.resize([200, -200, 0, 1], s.N)
    return dict(sinks=sinks, is_causal=True, q_offset=np.array([0, 7]))


@case()
def alibi(rng, s, call):
    slopes = (2.0 ** -np.arange(1, s.N + 1)).astype(np.float32)
    return dict(alibi_slopes=slopes, q_offset=40)


@case(WIDE)
def alibi_causal_rows(rng, s, call):
    slopes = (2.0 ** -np.arange(1, s.N + 1)).astype(np.float32) * np.float32([[1], [0.3]])
    return dict(alibi_slopes=slopes, q_offset=np.array([3, 90]), is_causal=True)


def biased(name, *size, shape=Shape(), **options):
    @case(shape, name=f"bias_{name}")
    def build(rng, s, call):
        shape = [getattr(s, n) if isinstance(n, str) else n for n in size]
        return dict(bias=rng.normal(size=shape), **options)


biased("NTS", 1, "N", "T", "S", shape=WIDE, logits_soft_cap=3.0)
biased("B11S", "B", 1, 1, "S", is_causal=True)
biased("TS", "T", "S")
biased("BNTS", "B", "N", "T", "S", is_causal=True)
biased("N1", "N", 1, 1)  # a constant per head: no effect, no gradient in the output
biased("BNT1", "B", "N", "T", 1, local_window_size=(20, 0))


@case()
def bias_infinite(rng, s, call):
    bias = rng.normal(size=(2, 1, s.T, s.S))
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    bias[0, :, 7] = -np.inf  # a row that sees nothing
    bias[:, :, :32, :48] = -np.inf  # and a block
    return dict(bias=bias)


@case(WIDE)
def dropout(rng, s, call):
    return dict(dropout_rate=0.3, dropout_rng=jax.random.key(5), is_causal=True)


@case()
def dropout_broadcast(rng, s, call):
    key = jax.random.PRNGKey(6)
    return dict(dropout_rate=0.5, dropout_rng=key, broadcast_dropout=True)


@case(Shape(B=(2, 1, 3), T=40, S=70, N=6, K=3, H=16, h=8))
def three_batch_dimensions(rng, s, call):
    return dict(
        bias=rng.normal(size=(3, 1, 1, 70)),
        mask=rng.random((2, 1, 1, 1, 40, 70)) < 0.8,
        key_value_seq_lengths=rng.integers(1, 71, (2, 1, 3)),
        q_offset=rng.integers(0, 30, (2, 1, 3)),
        is_causal=True,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(9),
    )


@case(Shape(B=(2, 2), T=60, S=60))
def two_batch_dimensions(rng, s, call):
    ids = np.sort(rng.integers(0, 3, (2, 2, 60)))
    return dict(query_segment_ids=ids, q_positions=rng.integers(0, 60, (2, 60)), is_causal=True)


@case(WIDE)
def everything(rng, s, call):
    kv = np.array([190, 120])
    call.poison = dict(key=behind(s.S, kv), value=behind(s.S, kv))
    return dict(
        bias=rng.normal(size=(2, 1, s.T, s.S)),
        mask=rng.random((2, s.N, s.T, s.S)) < 0.8,
        scale=0.4,
        is_causal=True,
        key_value_seq_lengths=kv,
        local_window_size=(100, 7),
        logits_soft_cap=4.0,
        sinks=rng.normal(size=s.N),
        query_segment_ids=np.repeat([0, 1], [60, 53]),
        key_value_segment_ids=np.repeat([0, 1], [100, 103]),
        dropout_rate=0.1,
        dropout_rng=jax.random.key(3),
        alibi_slopes=np.linspace(0.01, 0.2, s.N).astype(np.float32),
        q_offset=np.array([60, 30]),
    )


# Those that differ in values only: one program serves a group, and a group has one test.
GROUPS = {
    "causal_offset": ("causal_offset", "causal_before_all_keys"),
    "causal_window": ("causal_window", "offset_per_row"),
    "lengths": ("lengths", "lengths_zero"),
    "segments": ("segments_sorted", "segments_unsorted"),
    "sinks": ("sinks", "sinks_empty_rows", "sinks_far_from_scores"),
}
GROUPS |= {name: (name,) for name in CASES if name not in sum(GROUPS.values(), ())}


def behind(length, lengths):
    """Slots behind the lengths: bool ``[B, length]``."""
    return np.arange(length) >= lengths[:, None]
