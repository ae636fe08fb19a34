"""The examples of all docstrings run, and print what they say.

Each is run by itself, with no names but its own: what a reader copies out of the documentation.
"""

from __future__ import annotations

import doctest
import importlib
import pathlib

import pytest

import axattn

ROOT = pathlib.Path(axattn.__file__).parent


def _modules() -> list[str]:
    """Those with an example; others are not imported, for some need a newer JAX."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>> " in path.read_text("utf-8"):
            parts = ("axattn", *path.relative_to(ROOT).with_suffix("").parts)
            found.append(".".join(parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", _modules())
def test_examples(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={}):
        runner.run(test, out=said.append)
    assert runner.tries
    assert not runner.failures, "".join(said)
