"""What type checkers see of the library: overloads, names in strings, a user's module."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
import typing

import pytest
from jax import lax

import axattn
import axattn.nnx
from axattn import _typing, cache, linen, parallel
from axattn._implementations import registry
from axattn._layers.config import QK_NORMS
from axattn._sharded import costs, layouts
from axattn.parallel import _partitioned_cache
from tests.markdown import ROOT

USER = ROOT / "tests" / "typed_user.py"


def check(tool, arguments, tmp_path):
    """What the tool says of the user's module, in a folder where axattn is an installed package."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    try:
        importlib.metadata.version("axattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("axattn is not installed: pip install -e .")
    shutil.copyfile(USER, tmp_path / "user.py")
    command = [sys.executable, "-m", tool, *arguments, "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.ci
def test_mypy(tmp_path):
    check("mypy", ["--strict", f"--cache-dir={tmp_path / 'cache'}"], tmp_path)


@pytest.mark.ci
def test_pyright(tmp_path):
    """By basedpyright, which is pyright with everything that it runs on in one wheel."""
    config = {
        "typeCheckingMode": "standard",
        "enableTypeIgnoreComments": True,
        "reportUnnecessaryTypeIgnoreComment": True,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    check("basedpyright", ["--pythonpath", sys.executable], tmp_path)


OVERLOADED = {
    axattn.dot_product_attention: "return_residual",
    parallel.attention: "return_residual",
    parallel.local_attention: "return_residual",
    cache.Cache.attend: "return_residual",
    cache.Cache.extend: "return_residual",
    cache.RingCache.extend: "return_residual",
    _partitioned_cache.PartitionedCache.attend: "return_residual",
    linen.MultiHeadDotProductAttention.__call__: "cache",
    linen.SelfAttention.__call__: "cache",
    linen.MultiHeadLatentAttention.__call__: "cache",
    axattn.nnx.MultiHeadAttention.__call__: "cache",
    axattn.nnx.SelfAttention.__call__: "cache",
    axattn.nnx.MultiHeadLatentAttention.__call__: "cache",
}


@pytest.mark.parametrize("function", OVERLOADED, ids=lambda function: function.__qualname__)
def test_overloads_are_of_the_function(function):
    """An argument that is added, or changes its type, does so for type checkers, too."""
    own = inspect.signature(function).parameters
    overloads = typing.get_overloads(function)
    assert len(overloads) == (2 if OVERLOADED[function] == "cache" else 3)
    for one in overloads:
        theirs = dict(inspect.signature(one).parameters)
        distinguishing = theirs.pop(OVERLOADED[function])
        assert distinguishing.kind is inspect.Parameter.KEYWORD_ONLY
        for name, parameter in own.items():
            if name != OVERLOADED[function]:
                found = theirs.pop(name)
                assert (found.kind, found.annotation) == (parameter.kind, parameter.annotation)
                required = parameter.default is inspect.Parameter.empty
                assert (found.default is inspect.Parameter.empty) == required, name
        assert not theirs


def test_names_are_those_that_there_are():
    assert typing.get_args(_typing.Implementation) == registry.NAMES
    assert typing.get_args(_typing.Strategy) == costs.STRATEGIES
    assert typing.get_args(_typing.Layout) == layouts.LAYOUTS
    (names,) = (
        kind
        for kind in typing.get_args(_typing.Precision)
        if typing.get_origin(kind) is typing.Literal
    )
    assert len(typing.get_args(names)) == 8
    for name in typing.get_args(names):
        lax.Precision(name)
    assert typing.get_args(_typing.QkNorm) == QK_NORMS[1:]
