"""Imports of the library go one way."""

from __future__ import annotations

import ast
import graphlib
import os
import pathlib
import subprocess
import sys

import axattn
import axattn.kernels
from axattn import _submodules
from tests import public

PACKAGE = pathlib.Path(axattn.__file__).parent

# From the ground up. A part imports from its own and from lower ones, nothing from higher ones.
# `rotary` stands for `_rotary`, too: a module without an underscore is the face of one with it.
FLOORS = (
    ("typing", "checks", "dtypes", "serialization", "submodules", "version"),
    ("jax_compat", "mask_parts", "rotary", "checkpoints"),
    ("primitives", "masks", "quantization", "aot"),
    ("options", "stored", "plotting"),
    ("call",),
    ("dropout",),
    ("arguments", "kernels"),
    ("implementations",),
    ("sharded",),
    ("attention",),
    ("cache",),
    ("latent", "parallel"),
    ("layers",),
    ("linen", "nnx"),
    ("huggingface",),
)

HEIGHT = {part: height for height, parts in enumerate(FLOORS) for part in parts}


def imported(path: pathlib.Path) -> set[str]:
    """Names of modules and of what is taken from them, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("axattn.")}


def test_no_import_goes_up():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        own = path.relative_to(PACKAGE).with_suffix("").parts[0].removeprefix("_")
        seen.add(own)
        for name in imported(path):
            other = name.split(".")[1].removeprefix("_")
            if other != own:
                assert HEIGHT[other] < HEIGHT[own], f"{path} imports {name}"
    assert seen == set(HEIGHT)


def test_no_modules_import_each_other():
    files = {
        ".".join(("axattn", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {name: imported(path) & files.keys() for name, path in files.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(files)


def test_public_modules_are_faces():
    """A path without an underscore is public: it has `__all__`, docs, and no code of its own."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        parts = ("axattn", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in name.split(".")):
            continue
        found.add(name)
        tree = ast.parse(path.read_text("utf-8"))
        kinds = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.If)
        assert all(isinstance(node, kinds) for node in tree.body), f"{path} has code"
    assert found == {*public.MODULES, "axattn.kernels"}
    assert not hasattr(axattn.kernels, "__all__")


def test_public_modules_are_there_when_asked_for():
    """``import axattn`` needs neither Flax nor an import of each module that is used."""
    assert {f"axattn.{name}" for name in _submodules.NAMES} == {*public.MODULES} - {"axattn"}
    code = (
        "import sys, axattn\n"
        "assert axattn.rotary.RotaryEmbedding and axattn.cache.DenseCache\n"
        "assert axattn.quantization.quantize and not hasattr(axattn, 'rotatory')\n"
        "assert 'flax' not in sys.modules\n"
    )
    path = os.pathsep.join([str(PACKAGE.parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
