"""Pytrees of the library in the formats of others: `jax.export`, and `flax.serialization`.

`jax.export` writes down the structure of what an exported function takes and returns: the types'
names and what is static in them. `flax.serialization` writes down arrays, and is given a value to
restore them into; what is static is written beside them, and has to be that of this value.

Flax is not imported here. Its registry hears of a type when the type is registered, when a value of
one is made, or when `axattn.linen` or `axattn.nnx` is imported: the first of these after
``flax.serialization`` itself was imported.
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

# The types that Flax has not heard of yet.
_waiting: list[type] = []

# Of each type: the fields with arrays in them, and a function that gives the rest as plain values.
_fields: dict[type, tuple[tuple[str, ...], Callable[[Any], dict[str, Any]]]] = {}


def register(
    cls: type,
    data: tuple[str, ...],
    static: Callable[[Any], dict[str, Any]] = lambda value: {},
    *,
    encode: Callable[[Any], Any] = lambda aux: aux,
    decode: Callable[[Any], Any] = lambda plain: plain,
) -> None:
    """Makes a pytree, a dataclass, one that both formats know.

    Args:
      cls: the type; a pytree already.
      data: its fields with arrays in them.
      static: what else it has, by name, as numbers and strings: it is compared.
      encode, decode: between the pytree's static part and what JSON has.
    """
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"{cls.__module__}.{cls.__qualname__}",
        serialize_auxdata=lambda aux: json.dumps(encode(aux), default=int).encode(),
        deserialize_auxdata=lambda text: decode(json.loads(text)),
    )
    _fields[cls] = data, static
    _waiting.append(cls)
    tell_flax()


def register_dataclass(
    cls: type[_Type], data: tuple[str, ...], static: tuple[str, ...]
) -> type[_Type]:
    """``jax.tree_util.register_dataclass``, and `register`."""
    jax.tree_util.register_dataclass(cls, data, static)

    def values(one: Any) -> dict[str, Any]:
        return {name: getattr(one, name) for name in static}

    register(cls, data, values, decode=tuple)
    return cls


def register_named_tuple(cls: type) -> None:
    """The same for a named tuple, which Flax knows by itself."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    jax.export.register_namedtuple_serialization(cls, serialized_name=name)


def tell_flax() -> None:
    """Registers with ``flax.serialization``, if that is imported, what it has not heard of."""
    flax = sys.modules.get("flax.serialization")
    while flax is not None and _waiting:
        flax.register_serialization_state(_waiting.pop(), _state_of, _restored)


class Serializable:
    """A base of dataclasses: Flax has heard of a type that there are values of."""

    def __post_init__(self) -> None:
        if _waiting:
            tell_flax()


def _state_of(value: Any) -> Any:
    """As ``to_state_dict``: dicts of arrays, numbers and strings."""
    if type(value) in _fields:
        data, static = _fields[type(value)]
        children = {name: _state_of(getattr(value, name)) for name in data}
        return {"type": type(value).__name__, "static": static(value), **children}
    if isinstance(value, tuple):
        return {name: _state_of(x) for name, x in _named(value)}
    return int(value) if isinstance(value, int) else value


def _restored(like: Any, state: Any) -> Any:
    """As ``from_state_dict``: a value like ``like``; ValueError names what of it is another's."""
    differences: list[str] = []
    value = _restore(type(like).__name__, like, state, differences)
    if differences:
        raise ValueError(
            f"target takes the state of a {type(like).__name__} of its own sizes, got one with "
            + "; ".join(differences)
        )
    return value


def _restore(name: str, like: Any, state: Any, differences: list[str]) -> Any:
    def differs(got: Any, takes: Any) -> None:
        differences.append(f"{name} {got} for {takes}")

    if type(like) in _fields:
        data, static = _fields[type(like)]
        kind = type(like).__name__
        if not isinstance(state, Mapping) or state.get("type") != kind:
            got = state.get("type") if isinstance(state, Mapping) else type(state).__name__
            return differs(got, kind)
        for key, takes in static(like).items():
            got = state.get("static", {}).get(key)
            if got != takes:
                differences.append(f"{key} {got} for {takes}")
        children = {
            key: _restore(key, getattr(like, key), state.get(key), differences) for key in data
        }
        return None if differences else dataclasses.replace(like, **children)
    if isinstance(like, tuple):
        named = _named(like)
        if not isinstance(state, Mapping) or set(state) != {key for key, _ in named}:
            got = sorted(state) if isinstance(state, Mapping) else state
            return differs(got, [key for key, _ in named])
        found = [_restore(key, x, state[key], differences) for key, x in named]
        return type(like)(*found) if hasattr(like, "_fields") else tuple(found)
    if like is None or isinstance(like, int):
        same = (state is None) == (like is None) and (like is None or np.array_equal(state, like))
        return like if same else differs(_of(state), like)
    if not hasattr(state, "shape"):
        return differs(_of(state), _of(like))
    array = np.asarray(state)
    if {array.dtype.name, like.dtype.name} == {"bfloat16", "uint16"}:
        array = array.view(like.dtype)  # the same numbers, as another backend moves them
    if array.shape != like.shape or array.dtype != like.dtype:
        return differs(_of(state), _of(like))
    # A copy that can be donated, where the target lies.
    copied = jnp.array(array, copy=True)
    sharding = getattr(like, "sharding", None)
    return copied if sharding is None else jax.device_put(copied, sharding)


def _named(value: tuple) -> list[tuple[str, Any]]:
    names = getattr(value, "_fields", None) or [str(i) for i in range(len(value))]
    return list(zip(names, value, strict=True))


def _of(array: Any) -> str:
    """A few words on what stands in the place of an array."""
    if not hasattr(array, "shape"):
        return repr(array)
    return f"{array.dtype} {list(array.shape)}"
