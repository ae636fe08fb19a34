"""An attention layer as a function of arrays: what ``mqa_bench.py`` runs and compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import axattn
import axattn.linen
from benchmarks.harness.baselines import BASELINES
from benchmarks.harness.cases import Case
from benchmarks.harness.functions import in_direction


@dataclasses.dataclass(frozen=True)
class Workload:
    """A function and the shapes of its arguments.

    Attributes:
      fn: ``fn(params, cache, inputs) -> (result, cache)``, not yet jitted. The cache is an empty
        tuple where there is none; the one that comes out goes into the next step.
      args: the three, as trees of ``jax.ShapeDtypeStruct``.
      donate_argnums: the cache in a decoding step, which is updated in place as a server would
        do; nothing else is donated.
      ints: values of integer arguments, by name; everything else is to be random.
      notes: what a reader of the row should know.
    """

    fn: Callable[..., Any]
    args: tuple[Any, Any, Any]
    donate_argnums: tuple[int, ...] = ()
    ints: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def build(case: Case) -> Workload:
    """The layer of a case: projections without biases, causal, no dropout, one dtype throughout.

    Raises:
      ValueError: an implementation that neither axattn nor ``baselines`` has.
      NotImplementedError: when traced, an implementation that does not take the case.
    """
    config, dtype = case.config, jnp.dtype(case.dtype)
    attention = (
        {"attention_fn": BASELINES[case.implementation]}
        if case.implementation in BASELINES
        else {"implementation": None if case.implementation == "default" else case.implementation}
    )
    decode = case.direction == "decode"
    layer = axattn.linen.MultiHeadAttention(
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        qkv_features=config.model_dim,
        dtype=dtype,
        param_dtype=dtype,
        use_bias=False,
        decode=decode,
        **attention,
    )
    full = jax.ShapeDtypeStruct((case.batch, config.seq_len, config.model_dim), dtype)
    # Parameters and cache do not depend on the attention inside, and need not trace it.
    variables = jax.eval_shape(layer.clone(**_NO_ATTENTION).init, jax.random.key(0), full)
    params = variables["params"]

    if decode:
        cache = dict(variables["cache"])
        index = cache.pop("cache_index")
        token = jax.ShapeDtypeStruct((case.batch, 1, config.model_dim), dtype)

        def step(params, cache, inputs):
            # The index is an argument that stays: every step decodes the last token of the cache.
            out, new = layer.apply(
                {"params": params, "cache": {**cache, "cache_index": inputs["index"]}},
                inputs["x"],
                mutable=["cache"],
            )
            return out, {name: new["cache"][name] for name in cache}

        return Workload(
            step,
            (params, cache, {"x": token, "index": index}),
            donate_argnums=(1,),
            ints={"index": config.seq_len - 1},
            notes=("one token through the Linen layer, its cache full and updated in place",),
        )

    def apply(params, x):
        return layer.apply({"params": params}, x, is_causal=True)

    direction = in_direction(apply, case.direction)
    return Workload(lambda params, cache, x: (direction(params, x), cache), (params, (), full))


def _first_value(query, key, value, mask=None, *, is_causal: bool = False):
    return query


_NO_ATTENTION = {"attention_fn": _first_value, "implementation": None}


def default_implementation(case: Case, platform: str) -> str:
    """The implementation that axattn takes on ``platform`` when it is not told which."""
    config, chosen = case.config, []
    q_len = 1 if case.direction == "decode" else config.seq_len

    def ask(query, key, value):
        offset = config.seq_len - 1 if case.direction == "decode" else None
        why = axattn.explain_implementations(query, key, value, is_causal=True, q_offset=offset)
        chosen.append(why.by_platform[platform])
        return ()

    def array(length, heads):
        return jax.ShapeDtypeStruct((case.batch, length, heads, config.head_dim), case.dtype)

    kv = array(config.seq_len, config.kv_heads)
    jax.eval_shape(ask, array(q_len, config.heads), kv, kv)
    return chosen[0]
