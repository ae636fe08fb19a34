"""The calls of ``kernel_bench.py``: their FLOPs, and what the presets have."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask
from benchmarks.harness import kernel_job
from benchmarks.harness.kernel_cases import PRESETS, Case

SMOKE, ISSUE = PRESETS["smoke"](), PRESETS["issue"]()
CAUSAL = SMOKE[0]


def test_pairs_are_those_of_the_mask():
    for case in SMOKE:
        mask = Mask()
        if case.causal:
            mask = mask & Mask.causal()
        if case.window is not None:
            mask = mask & Mask.window(case.window, 0)
        if case.documents:
            ids = np.repeat(np.arange(len(case.documents)), case.documents)[None]
            mask = mask & Mask.segments(ids, ids)
        allowed = np.asarray(mask.materialize(case.length, case.length)).astype(bool)
        allowed = np.broadcast_to(allowed, (1, 1, case.length, case.length))
        np.testing.assert_array_equal(case.keys_per_row(), allowed[0, 0].sum(-1), case.name)
        sizes = case.head_dim + case.value_head_dim
        assert case.flops("fwd") == 2 * case.heads * sizes * allowed.sum()


def test_flops_by_convention():
    assert CAUSAL.flops("bwd") == 2.5 * CAUSAL.flops("fwd")
    assert CAUSAL.flops("fwd+bwd") == 3.5 * CAUSAL.flops("fwd")
    # FlashAttention-2's count for 16k tokens, hidden size 2048, H=128, full: 4 * T^2 * H * N.
    published = Case("", 1, 16384, 16, 16, 128, 128, causal=False)
    assert published.flops("fwd") == 4 * 16384**2 * 128 * 16


def test_issue_has_what_was_asked_for():
    names = [case.name for case in ISSUE]
    assert len(set(names)) == len(names)
    assert len({c.length for c in ISSUE}) == 4 and {64, 128, 256} <= {c.head_dim for c in ISSUE}
    for case in ISSUE:
        assert case.batch * case.length == max(16384, case.length)
        assert case.dtype == "bfloat16"
        assert 2 * case.input_bytes() < 8 << 30  # of which there are two sets at least
    packed = next(case for case in ISSUE if case.documents)
    assert len(packed.documents) == 12 and sum(packed.documents) == packed.length == 16384
    assert min(packed.documents) > 0
    assert {"full", "window 1024", "12 documents"} <= {case.mask for case in ISSUE}
    assert any(case.soft_cap for case in ISSUE) and any(case.sinks for case in ISSUE)
    assert any((c.head_dim, c.value_head_dim) == (192, 128) for c in ISSUE)


@pytest.mark.ci
def test_inputs_differ_from_set_to_set():
    first, second, *_ = kernel_job._inputs(CAUSAL)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == jnp.bfloat16 and not np.array_equal(a, b)
