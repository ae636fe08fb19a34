"""A family of kernels behind the one door, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
from jax._src import callback as jax_callback

from axattn import _attention
from axattn._implementations import flash, registry


def behind_the_door(monkeypatch, name, call_refusal):
    """``implementation=name`` runs on the CPU, with the name's own rules about calls."""
    make_on_devices = flash.make_backends

    def make_backends(*args, **options):
        found = make_on_devices(*args, **options)
        own = tuple((p, replace(backend, interpret=True)) for p, backend in found.per_platform)
        return replace(found, per_platform=own)

    entry = registry.Implementation(name, None, call_refusal, registry.PLATFORMS)
    monkeypatch.setitem(registry.IMPLEMENTATIONS, name, entry)
    monkeypatch.setattr(flash, "make_backends", make_backends)
    # A function of our own: jit must not find the programs of other backends.
    attend = jax.jit(lambda call, plan: registry.run_plan(call, plan), static_argnames="plan")
    monkeypatch.setattr(_attention, "_run_compiled", attend)


def numpy_in_callbacks(monkeypatch, *, integers: bool):
    """The interpreters' callbacks are given numpy's arrays, as XLA hands them over.

    JAX puts each argument on a device first, which takes half of the time of all callbacks.
    ``integers``: numbers as Python's, which is what the GPU interpreter takes besides jax's.
    """

    def given(x):
        x = np.asarray(x)
        return int(x) if integers and x.ndim == 0 and x.dtype.kind in "iu" else x

    def call(*args, callback, result_avals, **_):
        results = callback(*map(given, args))
        return [np.asarray(x, a.dtype) for x, a in zip(results, result_avals, strict=True)]

    monkeypatch.setattr(jax_callback, "io_callback_impl", call)
