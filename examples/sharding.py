"""The example model on a mesh of devices: where parameters, batches and caches are.

    mesh = make_mesh(sizes(jax.device_count(), data=None, model=2, context=2))
    graphdef, state = made(lambda: Decoder(config, rngs=nnx.Rngs(0)), mesh)

Rows of a batch are shared out over "data", tokens over "context", and over "model" heads and the
hidden features of MLPs. The devices may be those of several processes: then no process can read
more of an array than its own devices have, and every process runs every line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from axattn.cache import Cache, DenseCache
from axattn.parallel import Axes, ShardedCache
from examples.decoder import Config

AXES = Axes(batch="data", heads="model", sequence="context")
TOKENS = P("data", "context")  # of arrays [B, T]

# Of parameters, by the end of their paths, and of what the optimizer keeps for each; others are
# the same everywhere.
_SPECS = {
    ("query", "kernel"): P(None, "model", None),
    ("key", "kernel"): P(None, "model", None),
    ("value", "kernel"): P(None, "model", None),
    ("out", "kernel"): P("model", None, None),
    ("up", "kernel"): P(None, "model"),
    ("down", "kernel"): P("model", None),
}


def sizes(devices: int, data: int | None, model: int, context: int) -> dict[str, int]:
    """The mesh's axes and their sizes; ``data`` None: as many as the devices then are enough for.

    Raises:
      ValueError: sizes that are not those of so many devices.
    """
    for name, size in (("data", data), ("model", model), ("context", context)):
        if size is not None and size < 1:
            raise ValueError(f"{name} takes at least 1, got {size}")
    if data is None:
        data = max(1, devices // (model * context))
    if data * model * context != devices:
        raise ValueError(
            f"data x model x context takes sizes of {devices} devices in all, got "
            f"{data} x {model} x {context} = {data * model * context}"
        )
    return {"data": data, "context": context, "model": model}


def check(
    shape: dict[str, int], config: Config, *, batch: int, length: int, layout: str = "contiguous"
) -> None:
    """ValueError for ``batch`` texts of ``length`` tokens, or a model, that the axes do not divide.

    Before anything is compiled, and on every process alike.
    """
    chunks = 2 if layout == "zigzag" else 1
    for name, count, axis, parts in (
        ("batch", batch, "data", 1),
        ("length", length, "context", chunks),
        ("heads", config.heads, "model", 1),
        ("hidden", config.hidden, "model", 1),
    ):
        unit = parts * shape[axis]
        if count % unit:
            times = f"{parts} x " if parts > 1 else ""
            raise ValueError(f"{name} takes a multiple of {times}{axis} = {unit}, got {count}")


def make_mesh(shape: dict[str, int]) -> Mesh:
    """Over all devices of all processes; neighbours in "model", and then in "context", are near."""
    return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape))


def shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """A NamedSharding in the place of each array."""

    def of(path: tuple, variable: nnx.Variable) -> NamedSharding:
        spec = _SPECS.get(path[-2:], P())
        pairs = itertools.zip_longest(variable.shape, spec)
        # Fewer key/value heads than devices for them: every device has all.
        fits = all(axis is None or size % mesh.shape[axis] == 0 for size, axis in pairs)
        return NamedSharding(mesh, spec if fits else P())

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, v.replace(of(path, v))) for path, v in flat])


def made(make: Callable[[], Any], mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """What ``make()`` gives, modules and optimizers, split: its arrays are born on their devices.

    Every process takes part, and what is drawn at random is what one device would draw.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    run = jax.jit(lambda: nnx.split(make())[1], out_shardings=shardings(abstract, mesh))
    return graphdef, run()


def placed(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """The module with arrays that every process has (from a file, say) on the mesh."""
    graphdef, state = nnx.split(module)

    def place(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return nnx.merge(graphdef, jax.tree.map(place, state, shardings(state, mesh)))


def own_indices(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Along each dimension the indices of an array that this process's devices have, in order."""
    slices = sharding.addressable_devices_indices_map(shape).values()
    return tuple(
        np.unique(np.concatenate([np.arange(size)[index[i]] for index in slices]))
        for i, size in enumerate(shape)
    )


def from_own(load: Callable[..., Any], shape: tuple[int, ...], mesh: Mesh, spec: P) -> Any:
    """Global arrays of which each process loads its own part: ``load(*own_indices)``, a pytree."""
    sharding = NamedSharding(mesh, spec)

    def whole(own: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, own, shape)

    return jax.tree.map(whole, load(*own_indices(sharding, shape)))


def caches(config: Config, mesh: Mesh, batch: int, length: int) -> tuple[Cache, ...]:
    """Empty caches for texts of up to ``length`` tokens, one per layer, in parts on all devices."""
    shards = mesh.shape[AXES.sequence]
    slots = -(-length // shards) * shards

    def cache() -> Cache:
        heads = config.kv_heads, config.head_dim
        return ShardedCache.create(
            DenseCache, batch, slots, *heads, dtype=config.dtype, axes=AXES, mesh=mesh
        )

    return tuple(cache() for _ in config.windows)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """The arrays whole on every device, where every process can read them."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(tree)
