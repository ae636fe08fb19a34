"""``scale_bench.py``: its cases, cells and tables."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from axattn import aot, parallel
from benchmarks.harness import inputs, layer_build, scale_build, scale_cases, scale_jobs, scale_rows
from benchmarks.harness import rows as statuses
from benchmarks.harness.scale_cases import Sizes

SMALL = Sizes(hidden=32, heads=4, kv_heads=2, head_dim=8)


def layer(strategy="ring", *, length=64, chips=4, head_ways=1, direction="fwd", sizes=SMALL):
    (case,) = scale_cases.layers(
        sizes, length, direction, chips=[chips], strategies=[strategy], head_ways=head_ways,
        layout="zigzag",
    )  # fmt: skip
    return dataclasses.replace(case, dtype="float32")


def step(dtype="bfloat16", *, chips=4, head_ways=1):
    cases = scale_cases.steps(SMALL, 64, 2, chips=[chips], head_ways=head_ways)
    return next(case for case in cases if case.dtype == dtype)


def compiled(case):
    """The cell, in this process and over its CPU devices."""
    return scale_jobs.compiled(case, aot.target("cpu"))


# ---- cases --------------------------------------------------------------------------------------


def test_cases():
    found = list(
        scale_cases.layers(
            SMALL, 64, "fwd", chips=[4, 8], strategies=["ring", "gather"], head_ways=2,
            layout="zigzag",
        )
    )  # fmt: skip
    assert [(c.chips, c.strategy, c.dtype) for c in found] == [
        (n, name, "bfloat16") for n in (4, 8) for name in ("ring", "gather")
    ]
    assert found[-1].axes == {"model": 2, "context": 4}
    assert [(c.dtype, c.batch) for c in scale_cases.steps(SMALL, 64, 2, chips=[4], head_ways=1)] == [
        ("bfloat16", 2), ("int8", 2),
    ]  # fmt: skip


def test_heads_that_are_wrong():
    for text in ("32", "32/5", "32/0", "a/b", "4/32"):
        with pytest.raises(ValueError, match=f"as 32/4, got '{text}'"):
            scale_cases.parse_heads(text)


@pytest.mark.ci
@pytest.mark.parametrize("head_ways", [1, 2])
def test_the_layer_is_that_of_one_device(head_ways):
    """But for the order of tokens, which here is the layout's."""
    case = layer(head_ways=head_ways)
    mesh = aot.mesh("cpu", case.axes)
    workload = scale_build.build(case, mesh)
    params, x = inputs.random_like(workload.args)
    order = parallel.positions("zigzag", mesh.shape["context"], case.length)
    one = layer_build.build(scale_build.on_one_device(case), "cpu")
    want = np.asarray(one.fn(params, x))
    got = np.asarray(workload.fn(*jax.device_put((params, x[:, order]), shardings(workload))))
    np.testing.assert_allclose(got, want[:, order], atol=1e-5)


def shardings(workload):
    return jax.tree.map(lambda x: x.sharding, workload.args)


def test_flops_are_those_of_the_layer():
    whole = scale_build.flops(layer(chips=1))
    assert scale_build.flops(layer(chips=4)) == whole / 4
    tokens, sizes = 64, SMALL
    weights = sizes.hidden * sizes.head_dim * (2 * sizes.heads + 2 * sizes.kv_heads)
    pairs = tokens * (tokens + 1) / 2
    by_hand = 2 * tokens * weights + 4 * pairs * sizes.heads * sizes.head_dim
    assert whole == by_hand
    assert scale_build.flops(step(chips=4)) == 4 * 2 * 4 * 8 * 64 / 4


# ---- cells --------------------------------------------------------------------------------------

KV = 2 * 64 // 4 * SMALL.kv_heads * SMALL.head_dim * 4  # keys and values of one of four shards


def test_the_ring_sends_keys_and_values():
    cell = compiled(layer("ring"))
    assert cell.status == statuses.OK, cell.reason
    positions = 64 // 4 * 4
    assert cell.sent == {"collective-permute": 3 * (KV + positions)}
    assert cell.memory_kind == "host" and cell.memory_bytes > cell.temp_bytes > 0
    # A quarter of the input, and all parameters.
    params = 4 * SMALL.hidden * SMALL.head_dim * (2 * SMALL.heads + 2 * SMALL.kv_heads)
    assert cell.argument_bytes == 64 // 4 * SMALL.hidden * 4 + params
    assert cell.roofline is None and cell.estimate is None
    assert (cell.chips, cell.heads, cell.kv_heads, cell.length) == (4, 4, 2, 64)


@pytest.mark.ci
def test_gradients_of_parameters_are_summed():
    cell = compiled(layer("gather", direction="fwd+bwd"))
    assert cell.status == statuses.OK, cell.reason
    params = 4 * SMALL.hidden * SMALL.head_dim * (2 * SMALL.heads + 2 * SMALL.kv_heads)
    assert cell.sent["all-reduce"] >= 2 * 3 / 4 * params


@pytest.mark.ci
def test_over_a_cache_only_queries_outputs_are_sent():
    cell = compiled(step("int8"))
    assert cell.status == statuses.OK, cell.reason
    rows = 2 * SMALL.heads
    # Output, maximum and sum of every row.
    assert cell.sent == {"all-reduce": 2 * 3 / 4 * 4 * rows * (SMALL.head_dim + 2)}
    assert cell.argument_bytes < compiled(step("bfloat16")).argument_bytes


def test_a_strategy_that_does_not_take_it():
    cell = compiled(layer("ulysses", chips=8))
    assert cell.status == statuses.UNSUPPORTED and "multiples of 8, got 4" in cell.reason
    last = scale_rows.columns("layer", "cpu")[-1].cell(cell)
    assert "multiples of 8" in last


def test_roofline():
    chip = aot.target("v5p")
    assert scale_rows.roofline(chip, 459e12, 1.0, {}) == (1.0, "FLOPs")
    assert scale_rows.roofline(chip, 1.0, 2 * 2.765e12, {}) == (2.0, "HBM")
    # A neighbour is at the end of one of six links.
    assert scale_rows.roofline(chip, 1.0, 1.0, {"collective-permute": 3e11}) == (3.0, "links")
    assert scale_rows.roofline(chip, 1.0, 1.0, {"all-gather": 6e11}) == (1.0, "links")
    assert scale_rows.roofline(aot.target("cpu"), 1.0, 1.0, {}) == (None, None)
    assert scale_rows.roofline(chip, 1.0, None, {}) == (None, None)  # not known is not 0


def test_columns():
    case = layer()
    cell = scale_rows.of_case(
        case, "v5p", memory_bytes=2**31, argument_bytes=2**20, temp_bytes=2**30, flops=1e12,
        sent={"collective-permute": 2**20, "all-reduce": 2**10, "reduce-scatter": 2**10},
        compiled_flops=2e12, bytes_accessed=1e9, roofline=0.5, bound="HBM", estimate=0.25,
    )  # fmt: skip
    columns = {c.header: c.cell(cell) for c in scale_rows.columns("layer", "tpu")}
    shown = {"Chips": "4", "Strategy": "ring", "HBM": "2.00 GiB", "Permuted": "1.00 MiB"}
    # All reductions are one column; a bound says of what, and that it is one.
    shown |= {"Reduced": "2.00 KiB", "Gathered": "-", "Roofline": "<500 ms (HBM)", "": ""}
    assert columns.items() >= shown.items()
    assert columns["FLOPs"] == "1.00 T" and columns["Compiled"] == "2.00 T"
    assert "Estimate" not in [c.header for c in scale_rows.columns("decode", "tpu")]
    assert "Host memory" in [c.header for c in scale_rows.columns("decode", "cpu")]


@pytest.mark.aot
def test_cells_of_a_tpu():
    sizes = Sizes(hidden=512, heads=8, kv_heads=2, head_dim=128)
    case = dataclasses.replace(layer(length=4096, sizes=sizes), dtype="bfloat16")
    cell = scale_jobs.compiled(case, aot.target("v5p"))
    assert cell.status == statuses.OK, cell.reason
    assert (
        cell.memory_kind == "HBM" and cell.roofline > 0 and cell.bound in ("FLOPs", "HBM", "links")
    )
    assert cell.estimate > 0 and cell.compiled_flops >= 0.9 * cell.flops
