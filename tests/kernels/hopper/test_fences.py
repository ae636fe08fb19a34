"""Shared memory that threads touch and asynchronous copies or products touch next: fenced between.

The interpreter knows no proxies, so this is read from the traced kernels: what threads have read or
written since their last fence (`commit_smem`), when they hand memory over.
"""

from __future__ import annotations

import collections
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn._implementations import mosaic_gpu
from tests.kernels.cached import CAPACITY, B, filled, queries
from tests.kernels.calls import call_of_cache, make_call
from tests.tiers import ci

LENGTHS = np.array([200, 65, 4])


class State(NamedTuple):
    """Buffers of shared memory that threads have touched since their last fence."""

    read: frozenset = frozenset()
    written: frozenset = frozenset()

    def __or__(self, other: State) -> State:
        return State(self.read | other.read, self.written | other.written)


class Walk:
    """Through the jaxpr of one kernel; ``faults`` says what is not fenced.

    A buffer or a barrier is the variable that allocated it. ``freed``: which buffers are filled
    again from HBM after a wait at a barrier.
    """

    def __init__(self, jaxpr: Any):
        self.freed, self.faults = collections.defaultdict(set), []
        for _ in range(2):  # which barrier frees what is known after the first time
            self.faults.clear()
            self.waited = None
            self.jaxpr(jaxpr, {}, State())

    def jaxpr(self, jaxpr: Any, places: dict, state: State) -> State:
        for eqn in jaxpr.eqns:
            state = self.equation(eqn, places, state)
        return state

    def equation(self, eqn: Any, places: dict, state: State) -> State:
        name = eqn.primitive.name
        touched = [places[x] for x in eqn.invars if not hasattr(x, "val") and x in places]
        inner = _inner_jaxprs(eqn)
        if inner:
            results = [self.inner(one, eqn, places, state) for one in inner]
            results += [state] if name in ("while", "scan") else []  # of no step
            return functools.reduce(State.__or__, results)
        if name == "commit_smem":
            return State()
        if name == "barrier_wait":
            (self.waited,) = touched
        elif name == "copy_gmem_to_smem" and self.waited is not None:
            self.freed[self.waited] |= set(touched)
        elif name in ("copy_smem_to_gmem", "wgmma_ref"):
            self.check(eqn, state.written & set(touched))
        elif name == "barrier_arrive":
            (barrier,) = touched
            self.check(eqn, (state.read | state.written) & self.freed[barrier])
        elif name in ("get", "load"):
            return state._replace(read=state.read | set(touched[:1]))
        elif name == "swap":
            return state._replace(written=state.written | set(touched[:1]))
        return state

    def inner(self, jaxpr: Any, eqn: Any, places: dict, state: State) -> State:
        given = list(eqn.invars)
        own = [*jaxpr.constvars, *jaxpr.invars]
        if eqn.primitive.name == "run_scoped":
            places = places | {x: x for x in jaxpr.invars if str(x.aval.memory_space) == "smem"}
            own = jaxpr.constvars
        elif eqn.primitive.name == "cond":
            given, self.waited = given[1:], None  # a branch may be another warpgroup's
        elif eqn.primitive.name == "while":
            skip = eqn.params["cond_nconsts"]
            condition = jaxpr is _open(eqn.params["cond_jaxpr"])
            consts = given[:skip] if condition else given[skip:][: eqn.params["body_nconsts"]]
            given = consts + given[skip + eqn.params["body_nconsts"] :]
        places = places | {
            x: places[y]
            for x, y in zip(own, given, strict=True)
            if not hasattr(y, "val") and y in places
        }
        if eqn.primitive.name in ("while", "scan"):  # what one step leaves, the next one finds
            state |= self.jaxpr(jaxpr, places, state)
        return self.jaxpr(jaxpr, places, state)

    def check(self, eqn: Any, unfenced: set) -> None:
        if unfenced:
            self.faults.append(f"{eqn.primitive.name} after {[x.aval for x in unfenced]}")


def _inner_jaxprs(eqn: Any) -> list:
    found = (_open(x) for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_has_jaxpr))
    return [x for x in found if hasattr(x, "eqns")]


def _has_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def kernels(function, *arguments) -> dict[str, Any]:
    """The jaxprs of the kernels that a function runs, by name."""
    found = {}

    def search(jaxpr):
        for eqn in jaxpr.eqns:
            if "meshes" in eqn.params:
                (body,) = eqn.params["jaxprs"]
                found[eqn.params["name"]] = _open(body)
            else:
                for inner in _inner_jaxprs(eqn):
                    search(inner)

    # A function of our own, or JAX remembers the jaxpr of an earlier time.
    search(jax.make_jaxpr(lambda *x: function(*x))(*arguments).jaxpr)
    return found


def over_cache(kind, dtype, tokens, *, tiles=False, head_dim=64, **sizes):
    """``tiles``: with a bias and a mask over queries and keys."""
    cache = filled(kind, dtype, LENGTHS, head_dim=head_dim, **{"value_dim": head_dim, **sizes})
    options = {}
    if tiles:
        options["mask"] = np.ones((B, 1, tokens, CAPACITY), bool)
        options["bias"] = np.zeros((1, 6, tokens, CAPACITY), np.float32)
    call = call_of_cache(cache, queries(tokens, 6, head_dim), **options)
    return kernels(mosaic_gpu.forward, call)


def of_arrays(head_dim, *, tiles=False):
    B, T, S, N, K = 1, 72, 104, 4, 2
    options = {}
    if tiles:
        options["mask"] = np.ones((T, S), bool)
        options["bias"] = np.zeros((B, N, T, S), np.float32)
    call = make_call(B, T, S, N, K, head_dim, is_causal=True, **options)
    out, lse = jnp.zeros((B, T, N, head_dim), jnp.bfloat16), jnp.zeros((B, T, N))

    def both(call):
        return mosaic_gpu.forward(call), mosaic_gpu.backward(call, out, lse, out, lse)

    return kernels(both, call)


LATENT = dict(head_dim=192, value_dim=128, kv_heads=1, values_in_keys=True)
CALLS = {
    "decode": lambda: over_cache("dense", "bfloat16", 1, tiles=True),
    "decode of int8": lambda: over_cache("dense", "int8", 1),
    "decode of float8": lambda: over_cache("ring", "float8_e4m3fn", 1),
    "decode of int8, tiles": lambda: over_cache("paged", "int8", 1, tiles=True),
    "latent": lambda: over_cache("paged", "bfloat16", 1, **LATENT),
    "latent of float8": lambda: over_cache("paged", "float8_e4m3fn", 1, **LATENT),
    "forward": lambda: over_cache("dense", "bfloat16", 20, tiles=True),
    "forward of int8": lambda: over_cache("paged", "int8", 20),
    "arrays": lambda: of_arrays(64),
    "arrays, tiles": lambda: of_arrays(64, tiles=True),
    "arrays of large heads": lambda: of_arrays(256),
}


@pytest.mark.parametrize("name", ["arrays", *ci(*(n for n in CALLS if n != "arrays"))])
def test_every_handover_is_fenced(hopper, name):
    found = {kernel: Walk(jaxpr) for kernel, jaxpr in CALLS[name]().items()}
    assert {kernel: walk.faults for kernel, walk in found.items()} == dict.fromkeys(found, [])
    assert all(walk.freed for kernel, walk in found.items() if kernel != "axattn_combine")


@pytest.mark.parametrize("name", [*ci("decode of int8"), "arrays"])
def test_a_missing_fence_is_seen(hopper, name, monkeypatch):
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    found = {kernel: Walk(jaxpr).faults for kernel, jaxpr in CALLS[name]().items()}
    assert all(found.values()), found
