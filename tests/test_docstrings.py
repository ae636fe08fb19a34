"""Every public name has a docstring from which one can use it.

`problems` says what is missing. The rules, for the names that `tests.public` walks:

* A summary: one line, which ends with a full stop (or a colon, where an example is what follows).
* Every argument of a function or method, and every field of a class, is an entry of ``Args:`` or
  ``Attributes:``, its own or of a class that it derives from. Where its annotation is of arrays,
  the entry has the shape, in brackets between double backticks: ````[..., T, N, H]````. So has
  what is said of an array that is returned: ``Returns:``, or the text above all sections.
* An example with ``>>>``: every function and class. Methods may leave it to their class.
* ``Raises:``, each entry beginning with names of exceptions: every function, method and class, but
  those in `RAISES_NOTHING`. What a body raises by name is among them. Properties take no argument
  and need none.
* A name between single backticks is a link to a public name, and leads to one.
* A constant is named, between double backticks, in the docstring of its module.
* Sphinx reads what is meant: no entry is a letter and a full stop, which begin a list, the first
  line of ``Returns:`` and of a property has no colon, before which napoleon looks for a type, and an entry of
  ``Attributes:`` has one name, for of several all but the last would be its type.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import pathlib
import re
import textwrap
from typing import NamedTuple

import pytest

import axattn
from axattn._typing import Array, Float
from tests import public

# By the names that they were defined by: these check nothing of what they are given.
RAISES_NOTHING = frozenset(
    {
        "AttentionSpec",
        "Cache.next_positions",
        "Cache.stored",
        "Collective",
        "PartitionedCache.next_positions",
        "Links",
        "MultiHeadLatentAttention.set_view",
        "PagePool.statistics",
        "PagePool.take_copies",
        "PagedCache.stored",
        "PoolStatistics",
        "Quantized",
        "Refusal",
        "Report",
        "Report.to_dict",
        "Target",
        "cache_sizes",
        "key_center",
        "parse_refusal",
        "preferred_form",
    }
)

SECTIONS = ("Args", "Attributes", "Example", "Examples", "Note", "Raises", "Returns", "Yields")
ARRAY = re.compile(r"\b(Array|ArrayLike|ndarray|Bool|Float|Float32|Int|Integer|Num|Shaped)\b")
SHAPE = re.compile(r"``[^`]*\[[^`\]]*\][^`]*``")
LINK = re.compile(r"(?<![`:\w])`([^`]+)`(?!`)")


class Doc:
    """A docstring in Google style, in sections."""

    def __init__(self, text: str):
        first, _, rest = text.partition("\n")
        self.summary = first
        self.has_summary = first.endswith((".", ":")) and not rest.partition("\n")[0].strip()
        self.sections: dict[str, str] = {}
        above, name = [], None
        for line in text.splitlines():
            if line.endswith(":") and line[:-1] in SECTIONS:
                name = line[:-1]
                self.sections[name] = ""
            elif name is not None and (not line or line.startswith(" ")):
                self.sections[name] += line + "\n"
            else:
                name = None
                above.append(line)
        self.above = "\n".join(above)

    def entries(self, section: str) -> dict[str, str]:
        """What a section says of each name: ``a, b: text`` says it of both."""
        text = textwrap.dedent(self.sections.get(section, "")).strip("\n")
        found = {}
        for block in re.split(r"\n(?=\S)", text):
            names, colon, said = block.partition(":")
            if colon and "\n" not in names:  # which Sphinx reads off one line
                found |= {name.strip().lstrip("*"): said for name in names.split(",")}
        return found


class Taken(NamedTuple):
    """An argument or a field."""

    name: str
    annotation: object


def is_array(annotation: object) -> bool:
    return (
        isinstance(annotation, str)
        and not annotation.startswith("Callable")
        and ARRAY.search(annotation) is not None
    )


def arguments(item: public.Public) -> list[Taken]:
    """What a function takes, and what a class is made of."""
    if item.kind == "class":
        found = _of_class(item.object)
    elif item.kind in ("function", "method"):
        found = list(inspect.signature(item.object).parameters.values())
        static = item.kind == "method" and inspect.getattr_static(item.owner, _last(item.name))
        if item.kind == "method" and not isinstance(static, staticmethod):
            found = found[1:]
    else:
        found = []
    return [Taken(p.name, p.annotation) for p in found if not p.name.startswith("_")]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _of_class(cls: type) -> list[inspect.Parameter]:
    made = cls.__new__ if issubclass(cls, tuple) else cls.__init__
    if not hasattr(inspect.unwrap(made), "__code__"):
        return []  # a builtin's, of an exception
    of_flax = ("parent", "name")  # of every Linen module
    given = list(inspect.signature(made).parameters.values())[1:]
    return [parameter for parameter in given if parameter.name not in of_flax]


def documented(item: public.Public) -> dict[str, str]:
    """What is said of each argument, by the item and by what it overrides."""
    docs = [item.doc]
    if item.kind == "class":
        docs += [base.__doc__ or "" for base in item.object.__mro__ if base is not object]
    elif item.kind == "method":
        bases = (vars(base).get(_last(item.name)) for base in item.owner.__mro__)
        docs += [getattr(base, "__doc__", None) or "" for base in bases]
    found: dict[str, str] = {}
    for doc in (Doc(inspect.cleandoc(text)) for text in docs):
        found = {**doc.entries("Attributes"), **doc.entries("Args"), **found}
    return found


def raised(item: public.Public) -> set[str]:
    """The exceptions that the item's own body raises by name."""
    bodies = [item.object]
    if item.kind == "class":
        names = ("__init__", "__post_init__")
        bodies = [vars(item.object)[name] for name in names if name in vars(item.object)]
    found = set()
    for body in bodies:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(body)))
        except (OSError, TypeError):  # made by dataclasses
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", "")
                found |= {name} if is_exception(name) else set()
    return found


def is_exception(name: str) -> bool:
    found = getattr(builtins, name, None) or EXCEPTIONS.get(name)
    return isinstance(found, type) and issubclass(found, Exception)


def leads_nowhere(target: str, item: public.Public) -> bool:
    """Whether a link in this docstring finds nothing, as Sphinx looks for it."""
    ours = (name for name in public.MODULES if f"{item.name}.".startswith(f"{name}."))
    module = max(ours, key=len)
    within = item.name.removeprefix(module).lstrip(".").partition(".")[0]
    places = ("", f"{module}.", f"{module}.{within}.")
    return not any(f"{place}{target}" in NAMES for place in places)


def problems(item: public.Public) -> list[str]:
    """What the docstring of a public name lacks, a line each."""
    if item.kind == "constant":
        there = f"``{_last(item.name)}``" in (item.owner.__doc__ or "")
        return [] if there else ["its module does not name it"]
    if not item.doc:
        return ["no docstring"]
    doc, found = Doc(item.doc), []
    if not doc.has_summary:
        found.append(f"no summary line: {doc.summary!r}")

    said = documented(item)
    for argument in arguments(item):
        if argument.name not in said:
            found.append(f"{argument.name} is not in Args: or Attributes:")
        elif is_array(argument.annotation) and not SHAPE.search(said[argument.name]):
            found.append(f"{argument.name} is an array without a shape: {said[argument.name]!r}")
    if item.kind in ("function", "method", "property"):
        about = doc.above + doc.sections.get("Returns", "")
        returned = inspect.signature(item.object).return_annotation
        if is_array(returned) and not SHAPE.search(about):
            found.append("an array is returned, of a shape that is not said")

    if item.kind in ("function", "class") and ">>> " not in item.doc:
        found.append("no example")

    if item.kind in ("function", "method", "class"):
        errors = doc.entries("Raises")
        silent = item.object.__qualname__ in RAISES_NOTHING
        if silent == bool(errors):
            found.append("Raises:, and in RAISES_NOTHING" if silent else "no Raises:")
        found += [
            f"{name!r} in Raises: is no exception" for name in errors if not is_exception(name)
        ]
        found += [f"{name} is raised, not in Raises:" for name in sorted(raised(item) - {*errors})]

    found += [
        f"{name} reads as the item of a list: {said!r}"
        for section in ("Args", "Attributes", "Raises")
        for name, said in doc.entries(section).items()
        if re.match(r"\s*\w\.(\s|$)", said)
    ]
    if re.search(r"^  \w+, [\w, ]+:", doc.sections.get("Attributes", ""), re.M):
        found.append("Attributes: has an entry of several names")
    returns = doc.summary if item.kind == "property" else doc.sections.get("Returns", "")
    returns = re.sub(r"`.*?`", "", returns.partition("\n")[0]).strip()
    if ": " in returns:
        found.append(f"what is returned begins with what reads as a type: {returns!r}")

    prose = re.sub(r"``.*?``", "", item.doc, flags=re.DOTALL)
    links = (" ".join(target.split()) for target in LINK.findall(prose))
    return found + [f"`{target}` leads nowhere" for target in links if leads_nowhere(target, item)]


WALK = tuple(public.walk())
# What a link can lead to: constants have no entry of their own.
NAMES = frozenset(item.name for item in WALK if item.kind != "constant")
EXCEPTIONS = {_last(item.name): item.object for item in WALK if item.kind == "class"}


@pytest.mark.parametrize("item", WALK, ids=lambda item: item.name)
def test_docstring(item):
    assert not problems(item)


def test_exceptions_to_the_rule_exist():
    assert {getattr(item.object, "__qualname__", "") for item in WALK} >= RAISES_NOTHING


def test_the_walk_finds_everything():
    """Modules that say what is public are walked, with what classes inherit and what they wrap."""
    root = pathlib.Path(axattn.__file__).parent
    paths = [*root.glob("[!_]*.py"), *root.glob("*/__init__.py"), root / "__init__.py"]
    public_ones = [p for p in paths if re.search(r"^__all__ = ", p.read_text("utf-8"), re.M)]
    names = {".".join(("axattn", *p.relative_to(root).with_suffix("").parts)) for p in public_ones}
    assert {name.removesuffix(".__init__") for name in names} == {*public.MODULES}

    kinds = {item.name: item.kind for item in WALK}
    assert kinds["axattn.__version__"] == kinds["axattn.aot.TARGETS"] == "constant"
    assert kinds["axattn.rotary.Scaling"] == "constant"
    assert kinds["axattn.cache.RingCache.fork"] == "method"  # of Cache
    assert kinds["axattn.parallel.StripedCache.extend"] == "method"  # borrowed from Cache
    assert kinds["axattn.aot.tracing_for"] == "function"  # decorated
    assert kinds["axattn.linen.MultiHeadLatentAttention.cache_sizes"] == "property"
    assert kinds["axattn.linen.SelfAttention.__call__"] == "method"
    assert "axattn.linen.SelfAttention.init" not in kinds  # Flax's
    assert "axattn.linen.SelfAttention.attention_fn" not in kinds  # a field


# ---- the rules themselves ---------------------------------------------------------------------


def scaled(x: Float[Array, "B T"], factor: int = 1) -> Float[Array, "B T"]:
    """Multiplies an array; see `axattn.Mask`.

    Args:
      x: ``[B, T]``, any dtype.
      factor: how much.

    Returns:
      ``[B, T]`` in its dtype.

    Raises:
      ValueError: a factor below 0.

    Example:
      >>> scaled(2, 3)
      6
    """
    if factor < 0:
        raise ValueError(f"factor takes an int >= 0, got {factor}")
    return x * factor


@dataclasses.dataclass
class Made:
    """A class.

    Attributes:
      size: of it.

    Raises:
      ValueError: as `scaled` would.

    Example:
      >>> Made(1).size
      1
    """

    size: int

    @property
    def array(self) -> Array:
        """``[size]``."""


def test_a_good_docstring_has_no_problems():
    assert problems(public.Public("axattn.scaled", "function", scaled, axattn)) == []


@pytest.mark.parametrize(
    "good, bad, problem",
    [
        ("Multiplies an array; see", "Multiplies\nan array; see", "no summary line"),
        ("`axattn.Mask`.", "`axattn.Mask`", "no summary line"),
        ("`axattn.Mask`", "`Masked`", "`Masked` leads nowhere"),
        ("factor: how much.", "", "factor is not in Args:"),
        ("x: ``[B, T]``", "y, x: ``[B, T]``", None),
        ("x: ``[B, T]``", "x,\n        z: ``[B, T]``", "x is not in Args:"),
        ("x: ``[B, T]``", "x: [B, T]", "x is an array without a shape"),
        ("x: ``[B, T]``", "x: ``B x T``", "x is an array without a shape"),
        ("factor: how much.", "factor: A.", "factor reads as the item of a list"),
        ("``[B, T]`` in its", "In its", "an array is returned"),
        ("``[B, T]`` in its", "An array: ``[B, T]`` in its", "what is returned begins with"),
        ("ValueError: a", "TypeError: a", "ValueError is raised, not in Raises:"),
        ("ValueError: a", "ValueError, OSError: a", None),
        ("ValueError: a", "ValueError, Oops: a", "'Oops' in Raises: is no exception"),
        ("ValueError: a factor below 0.", "As scaled.", "no Raises:"),
        ("Raises:", "It raises:", "no Raises:"),
        (">>> scaled(2, 3)", "scaled(2, 3)", "no example"),
    ],
)
def test_a_bad_docstring_is_found(monkeypatch, good, bad, problem):
    monkeypatch.setattr(scaled, "__doc__", scaled.__doc__.replace(good, bad))
    assert bad in scaled.__doc__
    found = problems(public.Public("axattn.scaled", "function", scaled, axattn))
    assert bool(found) == (problem is not None)
    assert problem is None or any(line.startswith(problem) for line in found)


def test_no_docstring_is_found(monkeypatch):
    monkeypatch.setattr(scaled, "__doc__", None)
    item = public.Public("axattn.scaled", "function", scaled, axattn)
    assert problems(item) == ["no docstring"]


def test_classes_are_looked_at(monkeypatch):
    whole, array = public.of_object("axattn.Made", Made, axattn)
    assert problems(whole) == ["`scaled` leads nowhere"] and problems(array) == []
    monkeypatch.setattr(array.object, "__doc__", "It.")
    assert problems(array) == ["an array is returned, of a shape that is not said"]
    monkeypatch.setattr(Made, "__doc__", Made.__doc__.replace("size: of", "size, kind: of"))
    assert "Attributes: has an entry of several names" in problems(whole)
    monkeypatch.setattr(Made, "__doc__", Made.__doc__.replace("size, kind: of it.", ""))
    assert "size is not in Args: or Attributes:" in problems(whole)


def test_constants_are_looked_at():
    (item,) = public.of_object("axattn.MADE_UP", 3, axattn)
    assert problems(item) == ["its module does not name it"]
