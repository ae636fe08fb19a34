"""Serialization of the library's pytrees by `jax.export` and `flax.serialization`.

`jax.export` writes the structure of an exported function's arguments and results: names of types,
and their static parts. `flax.serialization` writes arrays, and restores them into a target value;
the static parts are written, too, and have to be those of the target.

Flax is not imported here. Once ``flax.serialization`` is imported, its registry gets the types at
the next of these events: a type is registered, a value of any of them is made, or `axattn.linen` or
`axattn.nnx` is imported.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

_Type = TypeVar("_Type")

# The types that are not in Flax's registry yet.
_unregistered: list[type] = []

# Stored artifacts and states hold names of types. They stay wherever a type moves: these, and for
# other types the path without the underscores of private modules.
_STORED_NAMES = {
    "axattn.parallel.sharded_cache.ShardedCache": "axattn.parallel.caches.ShardedCache",
    "axattn.parallel.striped_cache.StripedCache": "axattn.parallel.dealt.DealtCache",
    "axattn.stored.KVView": "axattn.stored.Stored",
}

# For each type its fields with arrays, and a function that returns the rest as plain values.
_registry: dict[type, tuple[tuple[str, ...], Callable[[Any], dict[str, Any]]]] = {}


def name_stored_type(cls: type) -> str:
    """Return the name by which a type is stored: the same in every release."""
    name = f"{cls.__module__}.{cls.__qualname__}".replace("._", ".")
    return _STORED_NAMES.get(name, name)


def register(
    cls: type,
    data: tuple[str, ...],
    static: Callable[[Any], dict[str, Any]] = lambda value: {},
    *,
    encode: Callable[[Any], Any] = lambda aux: aux,
    decode: Callable[[Any], Any] = lambda plain: plain,
) -> None:
    """Register a dataclass that is a pytree with both formats.

    Args:
      cls: the type.
      data: its fields with arrays.
      static: returns the other parts by name, as numbers and strings, which are compared.
      encode, decode: convert the pytree's static part to a value for JSON, and back.
    """
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=name_stored_type(cls),
        serialize_auxdata=lambda aux: json.dumps(encode(aux), default=int).encode(),
        deserialize_auxdata=lambda text: decode(json.loads(text)),
    )
    _registry[cls] = data, static
    _unregistered.append(cls)
    register_with_flax()


def register_dataclass(
    cls: type[_Type], data: tuple[str, ...], static: tuple[str, ...]
) -> type[_Type]:
    """Register a dataclass as a pytree and with both formats; see `register`."""
    jax.tree_util.register_dataclass(cls, data, static)

    def get_static(value: Any) -> dict[str, Any]:
        return {name: getattr(value, name) for name in static}

    register(cls, data, get_static, decode=tuple)
    return cls


def register_named_tuple(cls: type) -> None:
    """Register a named tuple with `jax.export`; Flax knows named tuples."""
    jax.export.register_namedtuple_serialization(cls, serialized_name=name_stored_type(cls))


def register_with_flax() -> None:
    """Register the remaining types with ``flax.serialization``, if that is imported."""
    flax = sys.modules.get("flax.serialization")
    while flax is not None and _unregistered:
        flax.register_serialization_state(_unregistered.pop(), _make_state, _restore_state)


class SerializableValue:
    """A base of dataclasses: making a value registers the types with Flax."""

    def __post_init__(self) -> None:
        if _unregistered:
            register_with_flax()


def _name_state(cls: type) -> str:
    return name_stored_type(cls).rpartition(".")[2]


def _make_state(value: Any) -> Any:
    """Return a state as ``to_state_dict`` does: dicts of arrays, numbers and strings."""
    if type(value) in _registry:
        data, static = _registry[type(value)]
        children = {name: _make_state(getattr(value, name)) for name in data}
        return {"type": _name_state(type(value)), "static": static(value), **children}
    if isinstance(value, tuple):
        return {name: _make_state(x) for name, x in _list_items(value)}
    return int(value) if isinstance(value, int) else value


def _restore_state(like: Any, state: Any) -> Any:
    """Restore a value like ``like``, as ``from_state_dict`` does.

    Raises:
      ValueError: the state is of another kind or size; the message names all differences.
    """
    differences: list[str] = []
    value = _restore_value(type(like).__name__, like, state, differences)
    if differences:
        raise ValueError(
            f"target takes the state of a {type(like).__name__} of its own sizes, got one with "
            + "; ".join(differences)
        )
    return value


def _restore_value(name: str, like: Any, state: Any, differences: list[str]) -> Any:
    def report(got: Any, takes: Any) -> None:
        differences.append(f"{name} {got} for {takes}")

    if type(like) in _registry:
        data, static = _registry[type(like)]
        kind = _name_state(type(like))
        if not isinstance(state, Mapping) or state.get("type") != kind:
            got = state.get("type") if isinstance(state, Mapping) else type(state).__name__
            return report(got, type(like).__name__)
        for key, takes in static(like).items():
            got = state.get("static", {}).get(key)
            if got != takes:
                differences.append(f"{key} {got} for {takes}")
        children = {
            key: _restore_value(key, getattr(like, key), state.get(key), differences)
            for key in data
        }
        return None if differences else dataclasses.replace(like, **children)
    if isinstance(like, tuple):
        items = _list_items(like)
        if not isinstance(state, Mapping) or set(state) != {key for key, _ in items}:
            got = sorted(state) if isinstance(state, Mapping) else state
            return report(got, [key for key, _ in items])
        values = [_restore_value(key, x, state[key], differences) for key, x in items]
        return type(like)(*values) if hasattr(like, "_fields") else tuple(values)
    if like is None or isinstance(like, int):
        same = (state is None) == (like is None) and (like is None or np.array_equal(state, like))
        return like if same else report(_describe(state), like)
    if not hasattr(state, "shape"):
        return report(_describe(state), _describe(like))
    array = np.asarray(state)
    if {array.dtype.name, like.dtype.name} == {"bfloat16", "uint16"}:
        array = array.view(like.dtype)  # the same bits: some backends store them as uint16
    if array.shape != like.shape or array.dtype != like.dtype:
        return report(_describe(state), _describe(like))
    # A copy, which can be donated, with the sharding of the target.
    copy = jnp.array(array, copy=True)
    sharding = getattr(like, "sharding", None)
    return copy if sharding is None else jax.device_put(copy, sharding)


def _list_items(value: tuple) -> list[tuple[str, Any]]:
    """Return the items of a tuple with their names or indices."""
    names = getattr(value, "_fields", None) or [str(i) for i in range(len(value))]
    return list(zip(names, value, strict=True))


def _describe(array: Any) -> str:
    """Return dtype and shape of an array, or what is in its place."""
    if not hasattr(array, "shape"):
        return repr(array)
    return f"{array.dtype} {list(array.shape)}"
