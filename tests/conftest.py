"""What all tests share: simulated devices, and block sizes small enough for small shapes."""

from __future__ import annotations

import dataclasses
import itertools
import os

# The GPU interpreter blocks a thread of XLA's pool per warpgroup, and needs more than a small
# machine's pool has. Before JAX starts its CPU backend.
os.environ.setdefault("NPROC", "16")

import jax
import pytest

from axattn import attention
from axattn.implementations import blocks, registry

# Before any backend starts: shard_map is tested on simulated devices.
jax.config.update("jax_num_cpu_devices", 8)


_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs():
    """JAX keeps thousands of compiled programs alive; these tests would take gigabytes."""
    yield
    if next(_tests) % 50 == 0:
        jax.clear_caches()


@pytest.fixture
def force_blocks(monkeypatch):
    """``force_blocks(q, kv, **fields)``: "xla_chunked" cuts into blocks of these sizes."""
    choose = blocks.choose

    def force(q: int, kv: int, **fields) -> None:
        def forced(call, platform):
            sizes = {"q": min(call.q_len, q), "kv": min(call.kv_len, kv)}
            return dataclasses.replace(choose(call, platform), **sizes, **fields)

        # The sizes are no part of the key under which jit caches: a function of our own has no cache.
        def attend(call, plan):
            return registry.attend(call, plan)

        monkeypatch.setattr(blocks, "choose", forced)
        monkeypatch.setattr(attention, "_attend", jax.jit(attend, static_argnames="plan"))

    return force


@pytest.fixture
def small_blocks(force_blocks):
    """Blocks of 32 queries and 48 keys: 113 x 203 has full, partial and empty blocks and tails."""
    force_blocks(32, 48)
