"""Meshes of chips that are not here."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np

from axattn.aot import _toolchain
from axattn.aot._targets import Target
from axattn.aot._targets import target as find_target


def mesh(target: str | Target, axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """Make a mesh of absent chips, for shardings of the arguments of `axattn.aot.analyze`.

    Along each axis chips are in the order of a ring, neighbours linked to each other, as far as the
    topology has one.

    Args:
      target: a TPU of ``axattn.aot.TARGETS``, or ``"cpu"`` for the CPU devices of this process
        (``jax_num_cpu_devices``).
      axes: names and sizes. Their product is the size of a slice that there is: 4, 8, 16, ... 512
        chips of v4 and v5p, up to 256 of v5e and v6e, or 1.

    Returns:
      A ``jax.sharding.Mesh``, whose devices one can compile for, not run on.

    Raises:
      ValueError: a target or a number of chips that there is not.
      MissingCompilerError: the compiler for the target is not installed.

    Example:
      >>> import jax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from axattn import aot
      >>> mesh = aot.mesh("cpu", {"data": 1})  # ("v5p", {"data": 4, "context": 16}) with the extra
      >>> rows = NamedSharding(mesh, PartitionSpec("data"))
      >>> x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=rows)
      >>> aot.analyze(lambda x: x.sum(), x, target="cpu").num_devices
      1
    """
    chip = find_target(target)
    shape, names = tuple(axes.values()), tuple(axes)
    if not names or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"axes takes names of axes with sizes of at least 1, got {dict(axes)}")
    devices = _select_devices(chip, math.prod(shape))
    return jax.sharding.Mesh(_arrange_devices(devices, shape), names)


def _select_devices(chip: Target, count: int) -> tuple[jax.Device, ...]:
    """Return ``count`` devices of a target."""
    if chip.platform == "cpu":
        there = jax.devices("cpu")
        if count > len(there):
            raise ValueError(
                f"axes takes sizes whose product is at most {len(there)}, the CPU devices of this "
                f"process (jax_num_cpu_devices), got {count}"
            )
        return tuple(there[:count])
    if not chip.slices:
        raise ValueError(f"target takes a TPU for a mesh, got {chip.name!r}")
    if count == 1:
        return (_toolchain.device(chip),)
    if count not in chip.slices:
        sizes = ", ".join(map(str, (1, *chip.slices)))
        raise ValueError(
            f"axes takes sizes whose product is a slice of {chip.name}: {sizes}; got {count}"
        )
    return _toolchain.get_tpu_devices(chip, chip.slices[count])


def _arrange_devices(devices: tuple[jax.Device, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Return devices in the shape of a mesh, in the order of rings along each axis."""
    from jax.experimental import mesh_utils

    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.array(devices).reshape(shape)
    # JAX finds which physical axes make up which logical one, but its order along a logical axis
    # jumps from the end of a row of chips to the start of the next.
    found = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    for axis in range(found.ndim):
        line = found[tuple(slice(None) if i == axis else 0 for i in range(found.ndim))]
        found = np.take(found, _order_ring([_get_coordinates(d) for d in line]), axis)
    return found


def _get_coordinates(device: jax.Device) -> tuple[int, ...]:
    """Return where a device is in its topology."""
    return (*device.coords, getattr(device, "core_on_chip", 0))


def _order_ring(places: list[tuple[int, ...]]) -> list[int]:
    """Return the indices of ``places`` in the order of a ring, or unchanged if they are no grid."""
    levels = [sorted(set(coordinates)) for coordinates in zip(*places, strict=True)]
    sizes = tuple(len(level) for level in levels if len(level) > 1)
    if math.prod(sizes) != len(set(places)) or len(set(places)) != len(places):
        return list(range(len(places)))
    index = {place: i for i, place in enumerate(places)}
    varying = [i for i, level in enumerate(levels) if len(level) > 1]

    def find_index(point: tuple[int, ...]) -> int:
        place = list(places[0])
        for i, step in zip(varying, point, strict=True):
            place[i] = levels[i][step]
        return index[tuple(place)]

    return [find_index(point) for point in make_grid_ring(sizes)]


def make_grid_ring(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """List all points of a grid, each a step from the one before and the last from the first.

    Where no size is even, or only one is not 1, there is no such ring: the points are a path then,
    which the wrap-around links of a torus close.
    """
    even = next((i for i, n in enumerate(sizes) if n % 2 == 0), None)
    if even is None or len(sizes) < 2:
        return _make_path(sizes)
    # Rows go to and fro over all columns but the first, which leads back.
    rows, columns = sizes[even], _make_path(sizes[:even] + sizes[even + 1 :])
    ring = []
    for row in range(rows):
        line = columns[1:] if row % 2 == 0 else columns[:0:-1]
        ring += [(row, column) for column in line]
    ring += [(row, columns[0]) for row in reversed(range(rows))]
    return [(*column[:even], row, *column[even:]) for row, column in ring]


def _make_path(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """List all points of a grid, each a step from the one before."""
    if not sizes:
        return [()]
    rest = _make_path(sizes[1:])
    return [
        (i, *point) for i in range(sizes[0]) for point in (rest if i % 2 == 0 else reversed(rest))
    ]
