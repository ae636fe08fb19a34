"""Packaging of axattn; the settings of the tools are in pyproject.toml."""

from __future__ import annotations

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "axattn" / "_version.py").read_text("utf-8"), re.MULTILINE
).group(1)
README = ROOT / "README.md"

PLOT = ["matplotlib>=3.9"]
# To run examples/notebooks, and to make them from their sources.
NOTEBOOKS = [*PLOT, "jupytext", "nbclient", "ipykernel"]

LINUX = "sys_platform == 'linux'"
LINUX_X86 = f"{LINUX} and platform_machine == 'x86_64'"

# jax's own extras pin libtpu and the CUDA plugin to the version of jax that is installed.
EXTRAS = {
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # Compilers for TPUs and NVIDIA GPUs that are not here. "local" leaves out the CUDA libraries
    # (cuDNN, cuBLAS, ...; 2 GB), which running needs and compiling does not; ptxas, libdevice and
    # nvvm it does need.
    "aot": [
        f"jax[tpu]; {LINUX_X86}",
        f"jax[cuda13-local]; {LINUX}",
        f"nvidia-cuda-nvcc>=13.0.48; {LINUX}",
        f"nvidia-nvvm>=13.0.48; {LINUX}",
    ],
    "test": [
        "pytest>=8",
        "pytest-xdist",
        "hypothesis",
        "beartype",
        "flatbuffers",  # jax.export writes with it
        "ruff",
        "mypy",
        "basedpyright",  # pyright with its Node.js, so that nothing is fetched when it runs
        "safetensors",
        *NOTEBOOKS,
    ],
    # axattn.plotting draws with it, and `--plot` of the benchmarks.
    "plot": PLOT,
    "notebooks": NOTEBOOKS,
    "docs": [*PLOT, "sphinx>=8.1", "myst-nb>=1.3", "furo", "sphinx-copybutton", "safetensors"],
    # axattn.huggingface reads files with it.
    "huggingface": ["safetensors>=0.6"],
    # What the benchmarks measure against. Of torch the build for CPUs suffices.
    "peers": ["tokamax", "torch"],
}

setup(
    name="axattn",
    version=VERSION,
    description="Efficient multi-query attention for JAX: one function, Flax layers, AOT reports",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # Type checkers find what is installed with -e where it stands for a folder on the path; without
    # this it stands for a hook, which they do not run.
    package_dir={"": "."},
    packages=find_packages(include=["axattn", "axattn.*"]),
    package_data={"axattn": ["py.typed"], "axattn.kernels._hopper": ["block_sizes.json"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "numpy",
        "flax>=0.12.8",
        "optax",
        "absl-py",
        "jaxtyping",
        # benchmarks/
        "google-benchmark",
        "rich",
    ],
    extras_require=EXTRAS,
)
