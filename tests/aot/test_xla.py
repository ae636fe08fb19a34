"""``"xla"`` beside the einsum over repeated keys and values, as compilers for absent chips see them."""

from __future__ import annotations

import functools
import re

import pytest

import axattn
from axattn import aot
from benchmarks.harness import baselines
from tests.aot.compilers import need
from tests.aot.test_tpu import gradients, structs

pytestmark = pytest.mark.aot

# HBM, bytes and the TPU compiler's own count of cycles, as shares of the baseline's. The sum of the
# rounded weights is one more pass (v6e), and GPUs transpose queries and outputs for grouped heads.
LIMITS = {
    ("v5p", "fwd"): (1.0, 1.0, 1.0),
    ("v5p", "fwd+bwd"): (0.6, 0.8, 0.8),
    ("v6e", "fwd"): (1.0, 1.0, 1.0),
    ("v6e", "fwd+bwd"): (0.4, 0.7, 1.05),
    ("h200", "fwd"): (1.0, 1.05, None),
    ("h200", "fwd+bwd"): (0.7, 1.1, None),
}


def count_cycles(text: str) -> int:
    """Sum the estimates of the operations of the program's entry."""
    entry = text[text.index("\nENTRY ") :]
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry)))


@pytest.mark.parametrize("target, direction", LIMITS)
def test_takes_no_more_than_repeating_keys_and_values(target, direction):
    found = []
    for attend in (
        functools.partial(axattn.dot_product_attention, implementation="xla"),
        baselines.repeat_kv,
    ):
        fn = functools.partial(attend, is_causal=True)
        fn = fn if direction == "fwd" else gradients(fn)
        report = aot.analyze(fn, *structs(T=1024), target=need(target))
        found.append((report.total_bytes, report.bytes_accessed, count_cycles(report.hlo_text())))
    for own, other, limit in zip(*found, LIMITS[target, direction], strict=True):
        assert limit is None or 0 < own <= limit * other, found
