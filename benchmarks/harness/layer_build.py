"""A case of ``layer_bench.py`` as a function of parameters and inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import axattn
import axattn.linen
from axattn._layers.config import drop_unset
from axattn.rotary import RotaryEmbedding
from benchmarks.harness.baselines import BASELINES
from benchmarks.harness.functions import in_direction
from benchmarks.harness.layer_cases import BASELINE, Case

PEERS = {name: fn for name, fn in BASELINES.items() if name != "repeat_kv"}


@dataclasses.dataclass(frozen=True)
class Workload:
    """``fn(params, inputs)``, not yet jitted, and the shapes of both."""

    fn: Callable[[Any, jax.Array], Any]
    args: tuple[Any, jax.ShapeDtypeStruct]


def build(case: Case, platform: str) -> Workload:
    """Causal, no biases, no dropout, one dtype throughout, projections included.

    Args:
      case: which layer.
      platform: that it is for: cpu, cuda, rocm or tpu.

    Raises:
      NotImplementedError: here or when traced, an implementation that does not take the case.
    """
    if case.implementation == "splash" and platform != "tpu":
        raise NotImplementedError(f"splash is for TPUs, not for {platform}")
    model, dtype = case.model, jnp.dtype(case.dtype)
    layer, bare = (_latent if case.kv_heads is None else _grouped)(case, dtype)
    inputs = jax.ShapeDtypeStruct((model.batch, model.seq_len, model.hidden), dtype)
    # Parameters do not depend on the attention inside, and need not trace it.
    params = jax.eval_shape(bare.init, jax.random.key(0), inputs)["params"]

    def apply(params, x):
        return layer.apply({"params": params}, x, is_causal=True)

    return Workload(in_direction(apply, case.direction), (params, inputs))


def _grouped(case: Case, dtype: Any) -> tuple[Any, Any]:
    cls = getattr(axattn.linen, case.layer)
    model = case.model
    fields = dict(
        num_heads=model.heads,
        qkv_features=model.heads * model.head_dim,
        out_features=model.hidden,
        num_kv_heads=case.kv_heads,
        fused_qkv=case.fused_qkv,
        dtype=dtype,
        param_dtype=dtype,
        use_bias=False,
    )
    bare = cls(**fields, attention_fn=first_value)
    name = case.implementation
    if name == BASELINE:
        return cls(**fields, attention_fn=BASELINES["repeat_kv"]), bare
    if name in PEERS:
        return cls(**fields, attention_fn=PEERS[name]), bare
    implementation = None if name == "default" else name
    if not case.heads_at_once:
        one_by_one = functools.partial(heads_in_turn, implementation=implementation)
        return cls(**fields, attention_fn=one_by_one), bare
    return cls(**fields, implementation=implementation), bare


def _latent(case: Case, dtype: Any) -> tuple[Any, Any]:
    name = case.implementation
    if name in PEERS:
        raise NotImplementedError(f"{name} is an attention_fn, and this layer has none")
    layer = axattn.linen.MultiHeadLatentAttention(
        num_heads=case.model.heads,
        **dataclasses.asdict(case.model.latent),
        rope=RotaryEmbedding(interleaved=True, output_halves=True),
        dtype=dtype,
        param_dtype=dtype,
        form="naive" if name == BASELINE else case.form,
        implementation={BASELINE: "xla", "default": None}.get(name, name),
    )
    return layer, layer.clone(implementation="xla_chunked")


def heads_in_turn(query, key, value, mask=None, *, implementation=None, is_causal: bool = False):
    """Attention with one key/value head, and its group of query heads, after the other."""
    kv_heads = key.shape[-2]
    groups = query.reshape(*query.shape[:-2], kv_heads, -1, query.shape[-1])

    def one(heads):
        q, k, v = heads
        return axattn.dot_product_attention(
            q, k[..., None, :], v[..., None, :],
            **drop_unset(mask=mask, is_causal=is_causal, implementation=implementation),
        )  # fmt: skip

    by_head = jnp.moveaxis(groups, -3, 0), jnp.moveaxis(key, -2, 0), jnp.moveaxis(value, -2, 0)
    out = jnp.moveaxis(lax.map(one, by_head), 0, -3)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def first_value(query, key, value, mask=None, *, is_causal: bool = False):
    return query


def flops(case: Case) -> float:
    """Of the layer, by arithmetic: two per multiply-add, half of T x S (causal).

    With gradients thrice as many, whatever is computed twice.
    """
    return _forward_flops(case) * (1 if case.direction == "fwd" else 3)


def _forward_flops(case: Case) -> float:
    model = case.model
    tokens = model.batch * model.seq_len
    pairs = model.batch * model.seq_len * (model.seq_len + 1) / 2
    if case.kv_heads is None:
        sizes = model.latent
        key = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        weights = model.hidden * (sizes.q_lora_rank + sizes.kv_lora_rank + sizes.qk_rope_head_dim)
        weights += model.heads * sizes.q_lora_rank * key
        weights += model.heads * sizes.kv_lora_rank * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        weights += model.heads * sizes.v_head_dim * model.hidden
        return 2 * tokens * weights + 2 * pairs * model.heads * (key + sizes.v_head_dim)
    features = model.head_dim * (2 * model.heads + 2 * case.kv_heads)
    attention = 4 * pairs * model.heads * model.head_dim
    return 2 * tokens * model.hidden * features + attention


def default_implementation(case: Case, platform: str) -> str:
    """What axattn takes on ``platform`` when it is not told which."""
    model = case.model
    size = value_size = model.head_dim
    kv_heads = case.kv_heads or model.heads
    if case.kv_heads is None:
        size = model.latent.qk_nope_head_dim + model.latent.qk_rope_head_dim
        value_size = model.latent.v_head_dim
    shapes = ((model.heads, size), (kv_heads, size), (kv_heads, value_size))
    query, key, value = (
        jax.ShapeDtypeStruct((model.batch, model.seq_len, *shape), case.dtype) for shape in shapes
    )
    why = axattn.explain_implementations(query, key, value, is_causal=True)
    return why.by_platform[platform]
