"""A case of ``scale_bench.py`` as a function, and its arguments over a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import axattn.linen
from axattn import parallel
from axattn.cache import DenseCache
from axattn.parallel._sharded_cache import ShardedCache
from benchmarks.harness import layer_build, layer_cases
from benchmarks.harness.functions import in_direction
from benchmarks.harness.scale_cases import Case


@dataclasses.dataclass(frozen=True)
class Workload:
    """A jitted ``fn(*args)``, and shapes with shardings."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]


def build(case: Case, mesh: Mesh) -> Workload:
    """The case over ``mesh``, which has the axes of the case.

    Raises:
      NotImplementedError: when traced, a strategy that does not take the case.
    """
    return {"layer": _layer, "decode": _decode}[case.table](case, mesh)


def axes(case: Case) -> parallel.Axes:
    return parallel.Axes(heads="model" if case.head_ways > 1 else None, sequence="context")


def _layer(case: Case, mesh: Mesh) -> Workload:
    """Causal, projections included, without biases; parameters are whole on every chip, or by
    heads."""
    sizes = case.sizes
    attend = functools.partial(
        parallel.attention, axes=axes(case), mesh=mesh, strategy=case.strategy, layout=case.layout
    )
    layer = axattn.linen.GroupedQueryAttention(
        num_heads=sizes.heads,
        qkv_features=sizes.heads * sizes.head_dim,
        out_features=sizes.hidden,
        num_kv_heads=sizes.kv_heads,
        dtype=case.dtype,
        param_dtype=case.dtype,
        use_bias=False,
        attention_fn=functools.partial(axattn.linen.dot_product_attention, attend=attend),
    )
    tokens = NamedSharding(mesh, PartitionSpec(None, "context", None))
    shape = case.batch, case.length, sizes.hidden
    x = jax.ShapeDtypeStruct(shape, case.dtype, sharding=tokens)
    # Shapes of parameters do not depend on the attention inside.
    bare = layer.clone(attention_fn=layer_build.first_value)
    few = jax.ShapeDtypeStruct((1, 8, sizes.hidden), case.dtype)
    params = jax.eval_shape(bare.init, jax.random.key(0), few)["params"]
    params = jax.tree_util.tree_map_with_path(functools.partial(_of_heads, case, mesh), params)

    def apply(params, x):
        return layer.apply({"params": params}, x, is_causal=True)

    shardings = jax.tree.map(lambda p: p.sharding, params)
    out = tokens
    if case.direction == "fwd+bwd":
        out = NamedSharding(mesh, PartitionSpec()), (shardings, tokens)
    fn = jax.jit(in_direction(apply, case.direction), out_shardings=out)
    return Workload(fn, (params, x))


def _of_heads(case: Case, mesh: Mesh, path: Any, param: jax.ShapeDtypeStruct) -> Any:
    """A kernel ``[E, N or K, H]``, or ``[N, H, E]`` of the output, with heads over "model"."""
    dim = 0 if path[0].key == "out" else 1
    cut = param.shape[dim] % case.head_ways == 0
    spec = PartitionSpec(*(None,) * dim, "model" if cut else None)
    return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=NamedSharding(mesh, spec))


def _decode(case: Case, mesh: Mesh) -> Workload:
    """One token per row is appended and attends to all; without projections."""
    sizes, where = case.sizes, axes(case)
    cache = ShardedCache.create(
        DenseCache, case.batch, case.length, sizes.kv_heads, sizes.head_dim,
        dtype=jnp.dtype(case.dtype), axes=where, mesh=mesh, abstract=True,
    )  # fmt: skip
    whole = NamedSharding(mesh, PartitionSpec())
    query, key, value = (
        jax.ShapeDtypeStruct((case.batch, 1, n, sizes.head_dim), jnp.bfloat16, sharding=whole)
        for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )

    def step(cache, query, key, value):
        return cache.extend(query, key, value)

    return Workload(jax.jit(step, donate_argnums=0), (cache, query, key, value))


def flops(case: Case) -> float:
    """Of one chip, by arithmetic: what is asked for, not what is computed twice or masked out."""
    sizes = case.sizes
    if case.table == "decode":
        return 4.0 * case.batch * sizes.heads * sizes.head_dim * case.length / case.chips
    return layer_build.flops(on_one_device(case)) / case.chips


def on_one_device(case: Case) -> layer_cases.Case:
    """The layer of a case as `benchmarks.harness.layer_build` makes it, with plain attention."""
    sizes = case.sizes
    model = layer_cases.Model(
        "layer", sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim, case.length, case.batch
    )
    return layer_cases.Case(model, "GroupedQueryAttention", "xla", case.dtype, case.direction)


def estimate(case: Case, mesh: Mesh, links: parallel.Links) -> float | None:
    """Seconds of the attention forward, by the cost model of axattn.parallel; None over caches."""
    if case.table == "decode":
        return None
    sizes = case.sizes
    query, kv = (
        jax.ShapeDtypeStruct((case.batch, case.length, n, sizes.head_dim), case.dtype)
        for n in (sizes.heads, sizes.kv_heads)
    )
    found = parallel.explain(
        query, kv, kv, axes=axes(case), mesh=mesh, layout=case.layout, links=links, is_causal=True
    )
    cost = next(cost for cost in found if cost.strategy == case.strategy)
    return None if cost.refusal else cost.seconds
