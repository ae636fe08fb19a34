"""Names and docstrings of the whole package, private code too, read off its syntax trees.

* No function is named ``of`` or ``of_...``, nor by a lone preposition, participle or adjective.
* A class name has one home.
* The docstring of a function begins with a verb: with a capital letter, and with none of the words that
  begin a noun phrase or a clause, such as "The" and "What". Properties are nouns, and so may theirs be.

What public names have to say besides is in `tests.test_docstrings`.
"""

from __future__ import annotations

import ast
import collections
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import axattn

ROOT = pathlib.Path(axattn.__file__).parent

# Names that stay although they break a rule, each with the reason.
ALLOWED = {
    "Links.of": "public; deprecated for from_target",
    "PartitionedCache.whole": "a public property: the whole cache",
    "RooflinePoint.of": "public; deprecated for from_report",
    "ShardedCache.whole": "a public property: the whole cache",
    "StripedCache.whole": "a public property: the whole cache",
}

# Classes with a home in each dialect of Flax, where users look for them by Flax's names.
DIALECTS = ("linen", "nnx")

# Words that say nothing alone; a leading underscore does not help.
LONE_WORDS = frozenset(
    "above after alone asked before behind below beside called cleaned closed cut dealt done drawn"
    " finished found given here held here joined kept known like made mixed moving named needed"
    " normalized only opened other over own packed padded placed promoted raised readable rotated"
    " same scaled sent shared stacked taken there together turned under unpacked visit visits whole"
    " with within without wrapped written".split()
)

# With these a docstring says what something is, not what a call does.
NO_VERBS = frozenset(
    "a all an as at both by each either every for from how if in it its of on one only such that the"
    " these this those to two what where whether which with".split()
)


class Definition(NamedTuple):
    """A function or class of the package.

    Attributes:
      path: of its file, from axattn/ on.
      name: with the names of the classes and functions that it stands in.
      node: its syntax tree.
    """

    path: str
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

    def __str__(self) -> str:
        return f"{self.path}:{self.node.lineno}: {self.name}"


def walk(tree: ast.AST, path: str, within: str = "") -> Iterator[Definition]:
    """Yield the functions and classes of a syntax tree, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{within}{node.name}"
            yield Definition(path, name, node)
            yield from walk(node, path, f"{name}.")
        else:
            yield from walk(node, path, within)


def problems(definition: Definition) -> Iterator[str]:
    """Yield what is wrong with the name and the docstring of a function."""
    if isinstance(definition.node, ast.ClassDef):
        return
    name = definition.node.name
    if definition.name not in ALLOWED:
        if name.strip("_") == "of" or name.lstrip("_").startswith("of_"):
            yield f"{definition} says of what, and not what it does"
        if name.strip("_") in LONE_WORDS:
            yield f"{definition} is no verb"
    if is_property(definition.node):
        return
    docstring = ast.get_docstring(definition.node) or ""
    if docstring[:1].islower():
        yield f"{definition} has a docstring that begins with a lower-case letter"
    first = (docstring.split() or [""])[0].lower()
    if first in NO_VERBS:
        yield f"{definition} has a docstring that begins with no verb: {first}"


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def namesakes(definitions: list[Definition]) -> Iterator[str]:
    """Yield the classes that have several homes, those of Flax's dialects apart."""
    homes = collections.defaultdict(list)
    for definition in definitions:
        if isinstance(definition.node, ast.ClassDef):
            homes[definition.node.name].append(definition)
    for name, found in homes.items():
        rooms = [definition.path.split("/")[0] for definition in found]
        if len(found) > 1 and sorted(rooms) != sorted(DIALECTS):
            yield f"{name} is defined in {', '.join(map(str, found))}"


DEFINITIONS = [
    definition
    for path in sorted(ROOT.rglob("*.py"))
    for definition in walk(ast.parse(path.read_text("utf-8")), path.relative_to(ROOT).as_posix())
]


def test_names_and_docstrings_of_functions():
    found = [line for definition in DEFINITIONS for line in problems(definition)]
    assert not found, "\n".join(found)


def test_a_class_name_has_one_home():
    found = list(namesakes(DEFINITIONS))
    assert not found, "\n".join(found)


def test_exceptions_exist():
    """What is excused has to be there: a list that outlives its reasons hides what comes after."""
    assert {*ALLOWED} <= {definition.name for definition in DEFINITIONS}
    assert len(DEFINITIONS) > 1000


@pytest.mark.parametrize(
    "code, problem",
    [
        ("def of(): ...", "says of what"),
        ("class A:\n  def of_call(self): ...", "A.of_call says of what"),
        ("def _of_rows(): ...", "says of what"),
        ("def _held(): ...", "_held is no verb"),
        ("def f():\n  '''The same of a call.'''", "begins with no verb: the"),
        ("def f():\n  '''give it.'''", "begins with a lower-case letter"),
        ("def f():\n  def whole(): ...", "f.whole is no verb"),
        ("def f():\n  '''What it does.'''", "begins with no verb: what"),
        ("@property\ndef size():\n  '''The bytes.'''", None),
        ("def hold():\n  '''Return what is held.'''", None),
        ("class Cut: ...", None),
    ],
)
def test_rules(code, problem):
    found = [line for one in walk(ast.parse(code), "x.py") for line in problems(one)]
    assert (len(found) == 1 and problem in found[0]) if problem else not found


def test_namesakes_are_found():
    code = "class A: ...\nclass B:\n  class A: ..."
    definitions = list(walk(ast.parse(code), "x.py"))
    assert [line.split()[0] for line in namesakes(definitions)] == ["A"]
    twice = [Definition(f"{room}/x.py", "A", definitions[0].node) for room in DIALECTS]
    assert not list(namesakes(twice))
