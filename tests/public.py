"""The public API of axattn: its modules, and every name in them with what it documents.

A name is public where it is in the ``__all__`` of a module of `MODULES`. Of a class the public
members are the methods and properties that it defines, or inherits from another class of axattn,
under a name without an underscore; ``__call__`` is one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

MODULES = (
    "axattn",
    "axattn.aot",
    "axattn.cache",
    "axattn.checkpoints",
    "axattn.huggingface",
    "axattn.latent",
    "axattn.linen",
    "axattn.nnx",
    "axattn.parallel",
    "axattn.plotting",
    "axattn.quantization",
    "axattn.rotary",
)

# JAX calls these of a pytree; nobody else does.
_PYTREE = ("tree_flatten", "tree_unflatten")


@dataclasses.dataclass(frozen=True)
class Public:
    """A public name.

    Attributes:
      name: from ``axattn`` on, by way of the module that has it in ``__all__``.
      kind: "module", "class", "function", "method", "property" or "constant".
      object: what the name stands for; the plain function of a method or property.
      owner: the class of a method or property, the module of all else.
    """

    name: str
    kind: str
    object: Any
    owner: Any

    @property
    def doc(self) -> str:
        """Its own docstring or the one that it inherits, without indentation."""
        if self.kind == "constant":
            return ""
        if self.kind in ("method", "property"):
            return inspect.getdoc(self.object) or _inherited(self)
        own = self.object.__doc__ if inspect.isclass(self.object) else inspect.getdoc(self.object)
        return inspect.cleandoc(own or "")


def _inherited(item: Public) -> str:
    name = item.name.rpartition(".")[2]
    docs = (
        inspect.getdoc(vars(base).get(name)) for base in item.owner.__mro__ if name in vars(base)
    )
    return next(filter(None, docs), "")


def walk(modules: tuple[str, ...] = MODULES) -> Iterator[Public]:
    """All public names of these modules, each once, and the modules themselves."""
    for name in modules:
        module = importlib.import_module(name)
        yield Public(name, "module", module, module)
        for attribute in module.__all__:
            yield from of_object(f"{name}.{attribute}", getattr(module, attribute), module)


def of_object(name: str, found: Any, module: Any) -> Iterator[Public]:
    """A name of a module, and where it stands for a class that class's public members."""
    if not inspect.isclass(found):
        kind = "function" if callable(found) and hasattr(found, "__code__") else "constant"
        if isinstance(found, functools.partial) or hasattr(found, "__wrapped__"):
            kind = "function"
        yield Public(name, kind, found, module)
        return
    yield Public(name, "class", found, module)
    for attribute in _members(found):
        static = inspect.getattr_static(found, attribute)
        static = getattr(static, "wrapped", static)  # Linen's, of a property
        if isinstance(static, (property, functools.cached_property)):
            function = getattr(static, "fget", None) or static.func
            yield Public(f"{name}.{attribute}", "property", function, found)
        elif isinstance(static, (staticmethod, classmethod, types.FunctionType)):
            function = getattr(static, "__func__", static)
            yield Public(f"{name}.{attribute}", "method", function, found)


def _members(cls: type) -> list[str]:
    ours = [b for b in cls.__mro__ if b is cls or b.__module__.split(".")[0] == "axattn"]
    names = dict.fromkeys(name for base in ours for name in vars(base))
    fields = getattr(cls, "__dataclass_fields__", {})  # whose defaults may be functions
    return [
        name
        for name in names
        if (name == "__call__" or not name.startswith("_"))
        and name not in _PYTREE
        and name not in fields
    ]
