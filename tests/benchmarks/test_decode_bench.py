"""The parts of ``decode_bench.py`` and the script, on a CPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import Mask, aot
from axattn.stored import NEVER
from benchmarks.harness import (
    bandwidth,
    decode_check,
    decode_compile,
    decode_inputs,
    decode_job,
    decode_peers,
    decode_programs,
    decode_rows,
    kernel_rows,
    rounds,
)
from benchmarks.harness.decode_cases import PRESETS, Case

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMOKE, ISSUE = PRESETS["smoke"](), PRESETS["issue"]()
DENSE, PAGED, LATENT = SMOKE
RING = Case(3, 40, 4, 2, 32, kind="ring", window=16)
TREE = Case(2, 24, 4, 2, 32, tokens=4, tree=True)
WINDOW = Case(2, 64, 4, 2, 32, tokens=2, window=8)
H200 = decode_rows.Ceiling.of(aot.target("h200"))


def run(case: Case, *names: str, stop=math.inf):
    job = decode_job.Measure(case, ("fwd",), names, 0.0, stop)
    return [message for message in job() if isinstance(message, decode_rows.Cell)]


# ---- bytes, FLOPs and the floor -------------------------------------------------------------


def test_bytes_by_hand():
    case = Case(32, 4096, 32, 8)
    # Keys and values of 128 bfloat16; then the query and the output.
    assert case.cache_bytes() == 32 * 4096 * 8 * 2 * 256 == 536_870_912
    assert case.bytes() - case.cache_bytes() == 2 * 32 * 32 * 128 * 2
    quantized = dataclasses.replace(case, dtype="int8")
    # A byte for each number and a float32 for each vector.
    assert quantized.cache_bytes() == 32 * 4096 * 8 * 2 * (128 + 4)
    latent = Case(64, 8192, 128, 1, 576, 512, latent=True, dtype="float8_e4m3fn")
    assert latent.cache_bytes() == 64 * 8192 * (576 + 4)
    assert latent.bytes() - latent.cache_bytes() == 64 * 128 * (576 + 512) * 2


def test_bytes_are_those_of_the_cache():
    for case in (DENSE, LATENT):
        assert case.cache_bytes() == decode_inputs.structs(case).cache.nbytes


def test_what_a_window_leaves_counts():
    case = Case(2, 64, 4, 2, 32, tokens=2, window=8)
    # The first of two tokens, at 62, sees 54 to 62; the second 55 to 63.
    assert case.keys_read().tolist() == [10, 10]
    assert case.keys_seen().tolist() == [[9, 9], [9, 9]]


def test_ragged_rows():
    lengths = PAGED.lengths()
    assert sorted(lengths) == [0, 8, 23, 64] and lengths.dtype == np.int32
    np.testing.assert_array_equal(lengths, PAGED.lengths())
    np.testing.assert_array_equal(PAGED.keys_seen()[:, 0], lengths)


@pytest.mark.parametrize(
    "case",
    [Case(2, 24, 4, 2, 32, tokens=5), TREE, WINDOW, dataclasses.replace(WINDOW, window=100)],
    ids=lambda case: case.name,
)
def test_pairs_are_those_of_the_mask(case):
    mask = Mask.causal()
    if case.window is not None:
        mask = mask & Mask.window(case.window, 0)
    if case.tree:
        mask = mask & Mask.dense(jnp.asarray(case.mask()))
    newest = jnp.arange(case.length - case.tokens, case.length)
    allowed = np.asarray(mask.materialize(case.tokens, case.length, q_positions=newest))
    allowed = np.broadcast_to(allowed, (case.batch, 1, case.tokens, case.length))
    np.testing.assert_array_equal(case.keys_seen(), allowed[:, 0].sum(-1))
    np.testing.assert_array_equal(case.keys_read(), allowed[:, 0].any(1).sum(-1))
    sizes = case.head_dim + case.value_size
    assert case.flops() == 2 * case.heads * sizes * allowed.sum()


def test_floor_by_hand():
    case = Case(32, 4096, 32, 8)
    seconds, bound = H200.floor(case)
    assert bound == "memory"
    assert seconds == pytest.approx((536_870_912 + 524_288) / 4.8e12)  # 112 us
    latent = Case(64, 8192, 128, 1, 576, 512, latent=True)
    seconds, bound = H200.floor(latent)
    # 242 FLOPs per byte of the cache are beyond 989e12 / 4.8e12 = 206.
    assert bound == "compute"
    assert seconds == pytest.approx(2 * 64 * 128 * 8192 * (576 + 512) / 989e12)
    assert decode_rows.Ceiling.of(None).floor(case) == (None, None)


def test_rates_and_what_is_beyond_the_peak():
    case = Case(32, 4096, 32, 8)
    ceiling = dataclasses.replace(H200, copied=4e12)
    cell = decode_rows.Cell.of(case, "fwd", "mosaic_gpu", seconds=case.bytes() / 4e12)
    rated = decode_rows.rated(cell, case, ceiling)
    assert rated.failure is None and rated.of_copy == pytest.approx(1.0)
    assert rated.of_floor == pytest.approx(4 / 4.8)
    assert rated.bytes_per_second == pytest.approx(4e12)
    fast = dataclasses.replace(cell, seconds=case.bytes() / 5e12)
    rated = decode_rows.rated(fast, case, ceiling)
    assert rated.status == kernel_rows.IMPOSSIBLE
    assert "5.00 TB/s are beyond the peak, 4.80 TB/s" in rated.failure
    latent = Case(64, 8192, 128, 1, 576, 512, latent=True)
    fast = decode_rows.Cell.of(latent, "fwd", "xla", seconds=latent.flops() / 1e15)
    failure = decode_rows.rated(fast, latent, ceiling).failure
    assert "1.00 PFLOP/s are beyond the peak, 989 TFLOP/s" in failure


def test_a_copy_counts_both_ways(monkeypatch):
    monkeypatch.setattr(rounds, "timer", lambda *_: (lambda: 0.5, None))
    (rate,) = bandwidth.Copy(1 << 12)()
    assert rate == 2 * (1 << 12) / 0.5


# ---- the preset -----------------------------------------------------------------------------


def test_issue_has_what_was_asked_for():
    names = [case.name for case in ISSUE]
    assert len(set(names)) == len(names)
    assert names[0] == "gqa32/8/b32/4k/dense/bf16"
    for name in (
        "gqa32/8/b32/4k/paged16/bf16",
        "gqa32/8/b32/4k/paged64/int8",
        "gqa32/8/b32/4k/dense/fp8",
        "gqa32/8/b1/128k/paged64/bf16",
        "mqa16/1/b1/128k/dense/int8",
        "gqa32/8/b32/ragged/paged64/bf16/split2k",
        "gqa32/8/h64/b64/4k/dense/bf16",
        "gqa16/8/h256/b16/4k/cap50/window4k/dense/bf16",
        "gqa32/8/b32/12k/window4k/ring/bf16",
        "gqa32/8/b16/4k/t16/dense/bf16",
        "gqa32/8/b16/4k/t8/tree/dense/bf16",
        "mla128/b64/8k/paged64/fp8",
        "mla16/b32/8k/dense/bf16",
        "gqa32/8/b4/8k/t512/paged64/int8",
    ):
        assert name in names


@pytest.mark.parametrize("case", ISSUE, ids=lambda case: case.name)
def test_sets_of_inputs_are_larger_than_l2_and_fit(case):
    shape = decode_inputs.structs(case)
    assert decode_inputs.count(case) * case.cache_bytes() > 4 * 50e6
    # Twice more in layouts of others.
    assert 3 * decode_inputs.count(case) * shape.cache.nbytes < 64 << 30
    assert (shape.query.shape[0], shape.cache.batch) == (case.batch, case.batch)
    if case.page is not None:
        assert shape.cache.num_pages > decode_inputs.pages_needed(case).sum()


# ---- inputs ---------------------------------------------------------------------------------


def test_pages_are_shuffled_and_nobodys_twice():
    given = decode_inputs.make(PAGED, 0)
    table = np.asarray(given.cache.block_table)
    used = table[table >= 0]
    assert len(used) == len(set(used)) == decode_inputs.pages_needed(PAGED).sum()
    assert used.max() < given.cache.num_pages and not np.array_equal(used, np.sort(used))
    np.testing.assert_array_equal((table >= 0).sum(1), decode_inputs.pages_needed(PAGED))
    other = decode_inputs.block_table(PAGED, given.cache.num_pages, 1)
    assert not np.array_equal(table, other)


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_caches_are_full_and_differ_from_set_to_set(case):
    first, second = (decode_inputs.make(case, seed) for seed in range(2))
    shape = decode_inputs.structs(case)
    for a, b, struct in zip(*map(jax.tree.leaves, (first, second, shape)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (struct.shape, struct.dtype)
    assert not np.array_equal(first.query, second.query)
    for a, b in zip(*(jax.tree.leaves(x.cache.arrays) for x in (first, second)), strict=True):
        assert not np.array_equal(a, b)
    np.testing.assert_array_equal(first.cache.lengths, case.lengths())
    keys = np.asarray(decode_peers._numbers(first.cache)[0], np.float32)
    assert np.isfinite(keys).all() and keys.std() > 0.5


def test_a_ring_is_as_if_it_had_been_filled():
    cache = decode_inputs.empty(RING)
    while int(cache.lengths[0]) < RING.length:
        key = jnp.zeros((RING.batch, 8, RING.kv_heads, RING.head_dim), jnp.bfloat16)
        cache = cache.append(key, key)
    given = decode_inputs.make(RING, 0).cache
    np.testing.assert_array_equal(given.positions, cache.positions)
    np.testing.assert_array_equal(given.lengths, cache.lengths)
    short = decode_inputs.make(dataclasses.replace(RING, length=5), 0).cache
    assert sorted(set(np.asarray(short.positions)[0])) == [0, 1, 2, 3, 4, NEVER]


# ---- cells ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*SMOKE, RING, TREE, WINDOW], ids=lambda case: case.name)
def test_every_case_is_right(case):
    kernels, chunked = run(case, "mosaic_gpu", "xla_chunked")
    assert kernels.status == kernel_rows.UNSUPPORTED
    assert "needs a Hopper GPU" in kernels.reason or "needs jax >= 0.11" in kernels.reason
    assert kernels.failure is None and kernels.seconds is None
    assert chunked.status == kernel_rows.OK, chunked.why
    assert chunked.clock == "wall" and chunked.rounds >= 3
    assert 0 < chunked.error <= chunked.allowed and chunked.against == "xla"


@pytest.mark.parametrize(
    "case",
    [DENSE, TREE, WINDOW, dataclasses.replace(LATENT, dtype="bfloat16")],
    ids=lambda case: case.name,
)
def test_jax_nn_answers_the_same_call(case):
    (cell,) = run(case, "jax_nn_xla")
    assert cell.status == kernel_rows.OK, cell.why


@pytest.mark.parametrize(
    "case",
    [Case(2, 512, 4, 2, 32), dataclasses.replace(PAGED, dtype="bfloat16"), PAGED],
    ids=lambda case: case.name,
)
def test_triton_kernels_answer_the_same_call(case, monkeypatch):
    imported = decode_peers._imported

    def interpreted(module, function):
        found = imported(module, function)
        return lambda *args, **options: found(*args, **{**options, "interpret": True})

    monkeypatch.setattr(decode_peers, "_imported", interpreted)
    (cell,) = run(case, "pallas_triton")
    assert cell.status == kernel_rows.OK, cell.why


def test_a_peer_that_is_not_there_has_a_reason():
    with pytest.raises(NotImplementedError, match="is not in jax"):
        decode_peers._imported("no_such_attention", "attention")
    cells = run(LATENT, "jax_nn_cudnn", "pallas_triton")
    assert [cell.reason for cell in cells] == [
        "does not take quantized caches",
        "does not take latent caches",
    ]


def test_a_wrong_output_is_not_timed(monkeypatch):
    def wrong(case, name):
        right = decode_programs._axattn(case, "xla")
        # One row, one head: by a few hundredths.
        return right._replace(attend=lambda given: right.attend(given).at[1, 0, 2].multiply(1.05))

    monkeypatch.setitem(decode_programs._MAKERS, "mosaic_gpu", wrong)
    cell, other = run(DENSE, "mosaic_gpu", "xla")
    assert cell.status == kernel_rows.WRONG and cell.seconds is None
    assert cell.error == pytest.approx(0.05, abs=0.005) and "out is off by" in cell.failure
    assert other.status == kernel_rows.OK


def test_an_empty_row_is_zero_in_this_library(monkeypatch):
    def nonzero(case, name):
        right = decode_programs._axattn(case, "xla")
        row = int(case.lengths().argmin())
        return right._replace(attend=lambda given: right.attend(given).at[row].set(1.0))

    for name in ("mosaic_gpu", "jax_nn_xla"):
        monkeypatch.setitem(decode_programs._MAKERS, name, nonzero)
    ours, peer = run(PAGED, "mosaic_gpu", "jax_nn_xla")
    assert (ours.status, peer.status) == (kernel_rows.WRONG, kernel_rows.OK)


def test_rows_are_sampled_where_all_do_not_fit(monkeypatch):
    (ragged,) = (case for case in ISSUE if case.name == "gqa32/8/b32/ragged/dense/bf16")
    rows = decode_check.sampled(ragged)
    assert {ragged.lengths().argmin(), ragged.lengths().argmax()} <= set(rows.tolist())
    assert 2 < len(set(rows.tolist())) == len(rows) < 32
    assert decode_check.sampled(DENSE).tolist() == [0, 1, 2]
    monkeypatch.setattr(decode_check, "_REFERENCE_BYTES", 1)
    for case in (PAGED, TREE):
        cells = run(case, "xla_chunked")
        assert [cell.status for cell in cells] == [kernel_rows.OK]


def test_ratio_is_to_the_best_other(monkeypatch):
    xla = decode_programs.program(DENSE, "xla")
    monkeypatch.setitem(decode_programs._MAKERS, "mosaic_gpu", lambda case, name: xla)
    times = iter([1.0, 4.0, 2.0])
    monkeypatch.setattr(rounds, "timer", lambda *_: (functools.partial(abs, next(times)), None))
    cells = run(DENSE, "mosaic_gpu", "xla_chunked", "xla")
    found = {cell.implementation: (cell.best, cell.ratio) for cell in cells}
    assert found == {
        "mosaic_gpu": ("xla", 2.0),
        "xla_chunked": ("xla", 0.5),
        "xla": ("xla", 1.0),
    }


def test_nothing_is_begun_when_the_time_is_up():
    cells = run(DENSE, "mosaic_gpu", "xla", stop=0.0)
    assert [cell.status for cell in cells] == [kernel_rows.NOT_MEASURED] * 2


# ---- compiled, not measured -----------------------------------------------------------------


def test_what_cannot_be_compiled_has_a_reason(monkeypatch):
    monkeypatch.setattr(decode_compile.aot, "device", lambda target: None)
    job = decode_compile.Compile(LATENT, ("fwd",), ("jax_nn_xla",), 0.0, math.inf)
    (row,) = (message for message in job() if isinstance(message, decode_compile.Row))
    assert (row.status, row.reason) == ("unsupported", "does not take quantized caches")
    assert row.floor_seconds == H200.floor(LATENT)[0]


# ---- the script -----------------------------------------------------------------------------


def script(*args, timeout=120):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "decode_bench.py"), *args],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=timeout,
    )


@pytest.mark.ci
def test_smoke(tmp_path):
    files = {"json": tmp_path / "out.json", "markdown": tmp_path / "out.md"}
    flags = (f"--{flag}={path}" for flag, path in files.items())
    done = script("--preset=smoke", "--seconds=0", *flags, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(files["json"].read_text())
    cells = document["tables"]["decode"]
    assert len(cells) == len(SMOKE) * len(decode_programs.IMPLEMENTATIONS)
    assert {cell["status"] for cell in cells if cell["implementation"] == "xla"} == {"ok"}
    kernels = [cell for cell in cells if cell["implementation"] == "mosaic_gpu"]
    assert {cell["status"] for cell in kernels} == {"unsupported"}
    assert "| mla4/b2/64/dense/fp8 | mosaic_gpu |" in files["markdown"].read_text()


@pytest.mark.ci
def test_budget(tmp_path):
    path = tmp_path / "out.json"
    done = script("--preset=smoke", "--cases=mla", "--budget_minutes=0", f"--json={path}")
    assert done.returncode == 0, done.stderr
    cells = json.loads(path.read_text())["tables"]["decode"]
    assert {cell["reason"] for cell in cells} == {"time is up"}


@pytest.mark.aot
def test_compiled_for_a_gpu_that_is_not_here():
    done = script("--preset=smoke", "--target=h200", "--cases=mla", "--implementations=xla")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Compiled for h200, not measured" in done.stdout
    assert "MiB" in done.stdout or "KiB" in done.stdout
