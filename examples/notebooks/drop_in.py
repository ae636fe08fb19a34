# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Replace one import
#
# (to be written)

# %% tags=["install"]
# Installs axattn and matplotlib where they are missing. The JAX that is here stays as it is: pip is
# held to the versions of everything that belongs to it, and fails rather than take others.
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

CHECKOUT = pathlib.Path("../..").resolve()  # the repository; another place than this works, too
if any(importlib.util.find_spec(name) is None for name in ("axattn", "matplotlib")):
    here = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    kept = [f"{n}=={v}" for n, v in here.items() if n.startswith(("jax", "libtpu", "nvidia-"))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = pathlib.Path(folder, "constraints.txt")
        constraints.write_text("\n".join(kept))
        pip = [sys.executable, "-m", "pip", "install", "-q", "-c", constraints]
        subprocess.run([*pip, "-e", f"{CHECKOUT}[plot]"], check=True)
    importlib.invalidate_caches()
sys.path.insert(0, str(CHECKOUT))  # for `examples` and `benchmarks`, which are not installed
TINY = os.environ.get("AXATTN_TINY") == "1"  # the sizes of the tests

# %%
import jax

import axattn

print(f"axattn {axattn.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
