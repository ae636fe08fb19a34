"""What an installation of axattn brings and what importing it needs."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import pytest

import axattn
from axattn._version import __version__

PACKAGE = pathlib.Path(axattn.__file__).parent

# Everything that setup.py installs beside jax and numpy, and what those bring.
OPTIONAL = ["flax", "optax", "absl", "jaxtyping", "google_benchmark", "rich", "matplotlib"]
OPTIONAL += ["safetensors"]

WITHOUT_OPTIONAL = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {optional!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
{body}
"""


def run_without_optional(body: str) -> None:
    script = WITHOUT_OPTIONAL.format(optional=set(OPTIONAL), body=body)
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_import_needs_jax_and_numpy_only():
    run_without_optional(
        "import axattn, axattn.rotary, axattn.aot, axattn.latent, axattn.huggingface, axattn.plotting\n"
        "import jax.numpy as jnp\n"
        "x = jnp.ones((1, 4, 2, 8))\n"
        "y = axattn.dot_product_attention(x, x, x, is_causal=True)\n"
        "assert y.shape == x.shape\n"
        "assert axattn.rotary.apply_rotary(x, jnp.arange(4)).shape == x.shape\n"
        f"loaded = set({OPTIONAL!r}) & {{name.split('.')[0] for name in sys.modules}}\n"
        "assert not loaded, loaded\n"
    )


@pytest.mark.ci
def test_errors_say_what_to_install():
    run_without_optional(
        "import axattn\n"
        "from axattn.plotting import plot_mask\n"
        "from axattn.huggingface._files import SafeTensors\n"
        "calls = {'plot': lambda: plot_mask(axattn.Mask.causal(), 4, 4)}\n"
        "calls['huggingface'] = lambda: SafeTensors('.')\n"
        "for extra, call in calls.items():\n"
        "    try:\n"
        "        call()\n"
        "    except ImportError as error:\n"
        "        message = str(error)\n"
        "    assert f\"in a checkout of axattn, pip install -e '.[{extra}]'\" in message, message\n"
    )


def test_nothing_is_installed_from_an_index_that_has_no_axattn():
    """What a reader or an error is told to install comes from a checkout."""
    root = PACKAGE.parent
    files = [path for name in ("README.md", "WORKSPACE.md", "setup.py") for path in root.glob(name)]
    for folder in ("axattn", "benchmarks", "docs", "examples"):
        files += [*(root / folder).rglob("*.py"), *(root / folder).rglob("*.md")]
    named = re.compile(r"""pip\s+install\s+(?:-\S+\s+)*["'`]*axattn\b|axattn\[[a-z]""")
    found = {str(path) for path in files if named.search(path.read_text("utf-8"))}
    assert len(files) > 100 and not found
    for command in ("pip install axattn", "pip install -U\n'axattn[plot]'", 'extra: "axattn[aot]"'):
        assert named.search(command)


def test_version_has_one_home():
    assert axattn.__version__ == __version__
    metadata = _metadata()
    assert metadata["Version"] == __version__


def test_package_is_typed_and_whole():
    assert (PACKAGE / "py.typed").exists()
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"without __init__.py these are left out of the wheel: {missing}"


def _metadata():
    try:
        return importlib.metadata.metadata("axattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("axattn is not installed: pip install -e .")


def test_extras_go_through_jax():
    metadata = _metadata()
    extras = {"cuda12", "cuda13", "tpu", "aot", "huggingface", "test", "peers"}
    extras |= {"plot", "notebooks", "docs"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    requirements = metadata.get_all("Requires-Dist")
    assert any(r.startswith("jax>=") for r in requirements)
    assert not any(r.startswith("jaxlib") for r in requirements)
    for extra in ("cuda12", "cuda13", "tpu"):
        marked = [
            r.partition(";")[0].strip() for r in requirements if re.search(extra + r"\W*$", r)
        ]
        assert marked == [f"jax[{extra}]"]
