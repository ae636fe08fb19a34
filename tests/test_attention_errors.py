"""Bad input is refused by name, with what was given and what is taken, before anything runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import axattn
from axattn import Mask

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


Q, KV = zeros(B, T, N, H), zeros(B, S, K, H)
KEY = jax.random.key(0)


def bad(id, error, words, *, q=Q, k=KV, v=KV, **kwargs):
    return pytest.param(q, k, v, kwargs, error, words, id=id)


TABLE = [
    # ---- query, key, value
    bad("split_size", ValueError, ["kv_split_size", "None or an int >= 1", "0"], kv_split_size=0),
    bad("heads_divide", ValueError, ["query", "2 key/value heads", "5"], q=zeros(B, T, 5, H)),
    bad("fewer_heads", ValueError, ["query", "multiple", "4", "2 heads"], q=zeros(B, T, 2, H), k=zeros(B, S, 4, H), v=zeros(B, S, 4, H)),
    bad("head_size", ValueError, ["key", "H = 8", "(2, 7, 2, 9)"], k=zeros(B, S, K, 9)),
    bad("kv_length", ValueError, ["value", "S = 7", "(2, 6, 2, 8)"], v=zeros(B, 6, K, H)),
    bad("kv_heads", ValueError, ["value", "K = 2", "(2, 7, 1, 8)"], v=zeros(B, S, 1, H)),
    bad("key_batch", ValueError, ["key", "(2,)", "(3, 7, 2, 8)"], k=zeros(3, S, K, H)),
    bad("value_batch", ValueError, ["value", "(2,)", "(1, 7, 2, 8)"], v=zeros(1, S, K, H)),
    bad("batch_rank", ValueError, ["key", "(2,)", "(1, 2, 7, 2, 8)"], k=KV[None], v=KV[None]),
    bad("query_rank", ValueError, ["query", "T, N, H", "(4, 8)"], q=zeros(N, H)),
    bad("value_rank", ValueError, ["value", "S, K, h", "(8,)"], v=zeros(H)),
    bad("key_dtype", TypeError, ["key", "float32", "float16"], k=KV.astype(np.float16)),
    bad("value_dtype", TypeError, ["value", "float32", "bfloat16"], v=KV.astype(jnp.bfloat16)),
    bad("query_int", TypeError, ["query", "floating", "int32"], q=Q.astype(np.int32)),
    bad("key_bool", TypeError, ["key", "floating", "bool"], k=KV.astype(bool)),
    bad("value_complex", TypeError, ["value", "floating", "complex64"], v=KV.astype(np.complex64)),
    bad("query_none", TypeError, ["query", "array", "None"], q=None),
    bad("key_string", TypeError, ["key", "array", "str"], k="key"),
    bad("value_object", TypeError, ["value", "array", "object"], v=object()),
    bad("no_heads", ValueError, ["query", "N >= 1", "(2, 5, 0, 8)"], q=Q[:, :, :0]),
    bad("no_kv_heads", ValueError, ["key", "K >= 1", "(2, 7, 0, 8)"], k=KV[:, :, :0], v=KV[:, :, :0]),
    bad("no_head_size", ValueError, ["query", "H >= 1", "(2, 5, 4, 0)"], q=Q[..., :0], k=KV[..., :0]),
    bad("no_value_size", ValueError, ["value", "h >= 1", "(2, 7, 2, 0)"], v=KV[..., :0]),
    # ---- bias
    bad("bias_bool", TypeError, ["bias", "floating", "bool", "mask"], bias=np.ones((T, S), bool)),
    bad("bias_shape", ValueError, ["bias", "4, 5, 7", "(5, 6)"], bias=zeros(T, 6)),
    bad("bias_heads", ValueError, ["bias", "4, 5, 7", "(2, 2, 5, 7)"], bias=zeros(B, K, T, S)),
    bad("bias_batch", ValueError, ["bias", "(2,)", "(3, 1, 1, 7)"], bias=zeros(3, 1, 1, S)),
    bad("bias_rank", ValueError, ["bias", "(2,)", "(2, 2, 4, 5, 7)"], bias=zeros(2, B, N, T, S)),
    bad("bias_mask", TypeError, ["bias", "Mask"], bias=Mask.causal()),
    # ---- mask
    bad("mask_float", TypeError, ["mask", "boolean", "float32", "bias"], mask=np.ones((T, S), np.float32)),
    bad("mask_int", TypeError, ["mask", "boolean", "int32"], mask=np.ones((T, S), np.int32)),
    bad("mask_shape", ValueError, ["mask", "4, 5, 7", "(7, 5)"], mask=np.ones((S, T), bool)),
    bad("mask_heads", ValueError, ["mask", "4, 5, 7", "(3, 5, 7)"], mask=np.ones((3, T, S), bool)),
    bad("mask_batch", ValueError, ["mask", "(2,)", "(3, 1, 5, 7)"], mask=np.ones((3, 1, T, S), bool)),
    bad("mask_dense_heads", ValueError, ["mask", "4, 5, 7"], mask=Mask.dense(np.ones((3, T, S), bool))),
    bad("mask_dense_shape", ValueError, ["mask", "5", "7", "(5, 6)"], mask=Mask.dense(np.ones((T, 6), bool))),
    bad("mask_lengths_batch", ValueError, ["mask", "(2,)", "(3,)"], mask=Mask.lengths(kv=np.array([1, 2, 3]))),
    bad("mask_segments_length", ValueError, ["mask", "5", "(2, 7)"], mask=Mask.segments(np.zeros((B, S), int))),
    bad("mask_string", TypeError, ["mask", "array", "str"], mask="causal"),
    # ---- numbers and flags
    bad("scale_nan", ValueError, ["scale", "finite", "nan"], scale=float("nan")),
    bad("scale_inf", ValueError, ["scale", "finite", "inf"], scale=np.inf),
    bad("scale_array_nan", ValueError, ["scale", "finite", "nan"], scale=jnp.float32(np.nan)),
    bad("scale_string", TypeError, ["scale", "number", "'0.5'"], scale="0.5"),
    bad("scale_bool", TypeError, ["scale", "number", "True"], scale=True),
    bad("scale_vector", TypeError, ["scale", "number"], scale=np.ones(3)),
    bad("cap_zero", ValueError, ["logits_soft_cap", "> 0", "0.0"], logits_soft_cap=0.0),
    bad("cap_negative", ValueError, ["logits_soft_cap", "> 0", "-3"], logits_soft_cap=-3),
    bad("cap_nan", ValueError, ["logits_soft_cap", "finite", "nan"], logits_soft_cap=np.nan),
    bad("cap_bool", TypeError, ["logits_soft_cap", "number", "True"], logits_soft_cap=True),
    bad("causal_string", TypeError, ["is_causal", "True or False", "'yes'"], is_causal="yes"),
    bad("causal_none", TypeError, ["is_causal", "True or False", "None"], is_causal=None),
    bad("residual_number", TypeError, ["return_residual", "True or False", "1"], return_residual=1),
    bad("precision", (TypeError, ValueError), ["recision", "bogus"], precision="bogus"),
    # ---- windows
    bad("window_negative", ValueError, ["local_window_size", ">= 0", "-1"], local_window_size=-1),
    bad("window_negative_left", ValueError, ["local_window_size", ">= 0", "(-2, 0)"], local_window_size=(-2, 0)),
    bad("window_negative_right", ValueError, ["local_window_size", ">= 0", "(None, -2)"], local_window_size=(None, -2)),
    bad("window_float", TypeError, ["local_window_size", "int", "2.5"], local_window_size=2.5),
    bad("window_floats", TypeError, ["local_window_size", "int", "(1.0, 2)"], local_window_size=(1.0, 2)),
    bad("window_bool", TypeError, ["local_window_size", "int", "True"], local_window_size=True),
    bad("window_three", ValueError, ["local_window_size", "pair", "(1, 2, 3)"], local_window_size=(1, 2, 3)),
    bad("window_string", TypeError, ["local_window_size", "int", "'4'"], local_window_size="4"),
    bad("window_array", (TypeError, ValueError), ["local_window_size", "int"], local_window_size=np.array([1, 2])),
    # ---- lengths, segments, positions
    bad("lengths_float", TypeError, ["query_seq_lengths", "int", "float32"], query_seq_lengths=np.ones(B, np.float32)),
    bad("lengths_bool", TypeError, ["key_value_seq_lengths", "int", "bool"], key_value_seq_lengths=np.ones(B, bool)),
    bad("lengths_shape", ValueError, ["key_value_seq_lengths", "(2,)", "(3,)"], key_value_seq_lengths=np.ones(3, int)),
    bad("lengths_rank", ValueError, ["query_seq_lengths", "(2,)", "(2, 5)"], query_seq_lengths=np.ones((B, T), int)),
    bad("segments_missing_q", ValueError, ["query_segment_ids", "key_value_segment_ids"], key_value_segment_ids=np.zeros((B, S), int)),
    bad("segments_missing_kv", ValueError, ["key_value_segment_ids", "T = 5", "S = 7"], query_segment_ids=np.zeros((B, T), int)),
    bad("segments_length", ValueError, ["query_segment_ids", "5", "(2, 6)"], query_segment_ids=np.zeros((B, 6), int), key_value_segment_ids=np.zeros((B, S), int)),
    bad("segments_kv_length", ValueError, ["key_value_segment_ids", "7", "(2, 5)"], query_segment_ids=np.zeros((B, T), int), key_value_segment_ids=np.zeros((B, T), int)),
    bad("segments_float", TypeError, ["query_segment_ids", "int", "float"], query_segment_ids=zeros(B, T), key_value_segment_ids=np.zeros((B, S), int)),
    bad("segments_batch", ValueError, ["(2,)", "(3, 5)"], query_segment_ids=np.zeros((3, T), int), key_value_segment_ids=np.zeros((B, S), int)),
    bad("offset_float", TypeError, ["q_offset", "int", "float"], q_offset=1.5),
    bad("offset_batch", ValueError, ["q_offset", "(2,)"], q_offset=np.array([1, 2, 3])),
    bad("offset_and_positions", ValueError, ["q_offset", "q_positions"], q_offset=1, q_positions=np.arange(T)),
    bad("positions_length", ValueError, ["q_positions", "5", "(7,)"], q_positions=np.arange(S)),
    bad("kv_positions_length", ValueError, ["kv_positions", "7", "(5,)"], kv_positions=np.arange(T)),
    bad("positions_float", TypeError, ["kv_positions", "int", "float"], kv_positions=np.arange(7.0)),
    bad("positions_scalar", ValueError, ["q_positions", "5", "()"], q_positions=3),
    bad("positions_batch", ValueError, ["q_positions", "(2,)", "(3, 5)"], q_positions=np.zeros((3, T), int)),
    # ---- sinks, slopes
    bad("sinks_length", ValueError, ["sinks", "[4]", "(2,)"], sinks=zeros(K)),
    bad("sinks_rank", ValueError, ["sinks", "[4]", "(2, 4)"], sinks=zeros(B, N)),
    bad("sinks_int", TypeError, ["sinks", "floating", "int"], sinks=np.zeros(N, np.int32)),
    bad("slopes_length", ValueError, ["alibi_slopes", "[4]", "(8,)"], alibi_slopes=zeros(8)),
    bad("slopes_batch", ValueError, ["alibi_slopes", "(2,)", "(3, 4)"], alibi_slopes=zeros(3, N)),
    bad("slopes_scalar", ValueError, ["alibi_slopes", "[4]", "()"], alibi_slopes=np.float32(0.5)),
    bad("slopes_int", TypeError, ["alibi_slopes", "floating", "int"], alibi_slopes=np.zeros(N, np.int32)),
    # ---- dropout
    bad("dropout_no_key", ValueError, ["dropout_rng", "0.1", "None"], dropout_rate=0.1),
    bad("dropout_one", ValueError, ["dropout_rate", "[0, 1)", "1.0"], dropout_rate=1.0, dropout_rng=KEY),
    bad("dropout_negative", ValueError, ["dropout_rate", "[0, 1)", "-0.1"], dropout_rate=-0.1, dropout_rng=KEY),
    bad("dropout_nan", ValueError, ["dropout_rate", "[0, 1)", "nan"], dropout_rate=np.nan, dropout_rng=KEY),
    bad("dropout_string", TypeError, ["dropout_rate", "number", "'0.1'"], dropout_rate="0.1", dropout_rng=KEY),
    bad("dropout_seed", TypeError, ["dropout_rng", "key", "7"], dropout_rate=0.1, dropout_rng=7),
    bad("dropout_keys", TypeError, ["dropout_rng", "one"], dropout_rate=0.1, dropout_rng=jax.random.split(KEY)),
    bad("broadcast_number", TypeError, ["broadcast_dropout", "True or False", "2"], broadcast_dropout=2),
    # ---- implementation
    bad("unknown", ValueError, ["implementation", "xla_chunked", "cudnn", "'flash'"], implementation="flash"),
    bad("unknown_in_sequence", ValueError, ["implementation", "'flash'"], implementation=("xla", "flash")),
    bad("empty_sequence", ValueError, ["implementation", "()"], implementation=()),
    bad("number", (TypeError, ValueError), ["implementation", "3"], implementation=3),
    bad("none_in_sequence", (TypeError, ValueError), ["implementation", "None"], implementation=("xla", None)),
    bad("not_there_gpu", NotImplementedError, ["mosaic_gpu"], implementation="mosaic_gpu"),
    bad("not_there_tpu", NotImplementedError, ["mosaic_tpu"], implementation="mosaic_tpu"),
    bad("not_there_mosaic", NotImplementedError, ["mosaic", "mosaic_gpu", "mosaic_tpu"], implementation="mosaic"),
    bad("cudnn_float32", NotImplementedError, ["cudnn", "bfloat16", "float32"], implementation="cudnn"),
    bad("all_refuse", NotImplementedError, ["cudnn", "mosaic"], implementation=("cudnn", "mosaic")),
]  # fmt: skip


@pytest.mark.parametrize("q, k, v, kwargs, error, words", TABLE)
def test_refused(q, k, v, kwargs, error, words):
    for function in (axattn.dot_product_attention, axattn.explain_implementations):
        if error is NotImplementedError and function is axattn.explain_implementations:
            continue  # it says no by its answer
        with pytest.raises(error) as caught:
            function(q, k, v, **kwargs)
        message = str(caught.value)
        for word in words:
            assert word in message, f"{word!r} is not in {message!r}"


OTHER_ARRAYS = [
    row
    for row in TABLE
    if any(x is not good for x, good in zip(row.values[:3], (Q, KV, KV), strict=True))
    and all(isinstance(x, np.ndarray) for x in row.values[:3])
]


@pytest.mark.parametrize("q, k, v, kwargs, error, words", OTHER_ARRAYS)
def test_refused_while_tracing(q, k, v, kwargs, error, words):
    """Values of tracers cannot be looked at; shapes and dtypes can."""
    with pytest.raises(error) as caught:
        # Which devices a program is for is known when it is lowered.
        jax.jit(lambda *x: axattn.dot_product_attention(*x, **kwargs)).lower(q, k, v)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("logits_soft_cap", 2.0, TypeError),
        ("dropout_rate", 0.1, TypeError),
        ("is_causal", True, TypeError),
        ("local_window_size", 3, (TypeError, ValueError)),
        ("scale", jnp.ones(3), (TypeError, ValueError)),
    ],
)
def test_traced_where_it_must_be_known(name, value, error):
    def attend(x):
        return axattn.dot_product_attention(Q, KV, KV, **{name: x}, dropout_rng=KEY)

    with pytest.raises(error, match=name):
        jax.eval_shape(attend, value)


def test_unknown_argument():
    with pytest.raises(TypeError, match="is_casual"):
        axattn.dot_product_attention(Q, KV, KV, is_casual=True)


def test_good_input_is_taken():
    """The table above refuses for the reason it says: its arrays are fine as they are."""
    assert axattn.dot_product_attention(Q, KV, KV).shape == (B, T, N, H)
