"""What all tests share: simulated devices, and block sizes small enough for small shapes."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os

# The GPU interpreter blocks a thread of XLA's pool per warpgroup, and needs more than a small
# machine's pool has. Before JAX starts its CPU backend.
os.environ.setdefault("NPROC", "16")
# numpy's products are small here: threads of each worker would wait for those of the others.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from axattn import _attention
from axattn._implementations import registry
from axattn._implementations.chunked import block_sizes

# Before any backend starts: shard_map is tested on simulated devices.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling is most of the time of these tests, and takes a fifth of it without the optimizations of
# LLVM: the program that XLA hands to it is the same. `precision.optimized_jit` has them.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):  # and, where this can be chosen, with the older code generator
    older, given = "--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")
    if older not in given:  # as a worker of pytest-xdist has them; the cache tells flags apart
        os.environ["XLA_FLAGS"] = f"{older} {given}"


def pytest_configure(config):
    """Keep what XLA compiles, for all workers and for the next run: compiling is most of the time.

    In the folder that JAX_COMPILATION_CACHE_DIR names, or with pytest's own cache (which
    ``--cache-clear`` empties). A program is found by its text, its options and the versions of JAX
    and XLA, so what is found is what would have been compiled.
    """
    if not jax.config.jax_compilation_cache_dir and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def compiled_anew():
    """As users have it, and not from the cache: what compilers say and make is looked at."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_disable_most_optimizations", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_disable_most_optimizations", True)
    compilation_cache.reset_cache()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("aot"):
            item.fixturenames.insert(0, "compiled_anew")
    gc.freeze()  # modules and tests stay: they need not be searched


# Python looks for cycles again and again while programs are traced, a fifth of these tests' time.
gc.disable()

_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs():
    """JAX keeps thousands of compiled programs alive; these tests would take gigabytes."""
    yield
    n = next(_tests)
    if n % 400 == 0:
        jax.clear_caches()
    if n % 100 == 0:
        gc.collect()


@pytest.fixture
def force_blocks(monkeypatch):
    """``force_blocks(q, kv, **fields)``: "xla_chunked" cuts into blocks of these sizes."""
    choose = block_sizes.choose_chunk_sizes

    def force(q: int, kv: int, **fields) -> None:
        def forced(call, platform, **options):
            sizes = {"q": min(call.q_len, q), "kv": min(call.kv_len, kv)}
            return dataclasses.replace(choose(call, platform, **options), **sizes, **fields)

        # The sizes are no part of the key under which jit caches: a function of our own has no cache.
        def attend(call, plan):
            return registry.run_plan(call, plan)

        monkeypatch.setattr(block_sizes, "choose_chunk_sizes", forced)
        monkeypatch.setattr(_attention, "_run_compiled", jax.jit(attend, static_argnames="plan"))

    return force


@pytest.fixture
def small_blocks(force_blocks):
    """Blocks of 32 queries and 48 keys: 113 x 203 has full, partial and empty blocks and tails."""
    force_blocks(32, 48)


@pytest.fixture(scope="session")
def mesh_of():
    """A function of the sizes of the axes "data", "model" and "context"."""

    def make(data=1, model=1, context=1):
        devices = np.array(jax.devices()[: data * model * context])
        return jax.sharding.Mesh(
            devices.reshape(data, model, context), ("data", "model", "context")
        )

    return make
