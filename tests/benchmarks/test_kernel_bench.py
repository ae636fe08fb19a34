"""The parts of ``kernel_bench.py`` and the script, on a CPU."""

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

from axattn import Mask
from benchmarks.harness import (
    kernel_cases,
    kernel_job,
    kernel_programs,
    kernel_rows,
    processes,
    rounds,
)
from benchmarks.harness.kernel_cases import PRESETS, Case

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {case.name: case for case in PRESETS["smoke"]()}
PRESET_CASES = {name: preset() for name, preset in PRESETS.items()}


def run(case: Case, *names: str, directions=("fwd",), stop=math.inf, seconds=0.0):
    job = kernel_job.Measure(case, directions, names, seconds, stop)
    return [message for message in job() if isinstance(message, kernel_rows.Cell)]


# ---- FLOPs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL.values(), ids=lambda case: case.name)
def test_pairs_are_those_of_the_mask(case):
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
    np.testing.assert_array_equal(case.keys_per_row(), allowed[0, 0].sum(-1))
    sizes = case.head_dim + case.value_head_dim
    assert case.flops("fwd") == 2 * case.heads * sizes * allowed.sum()


def test_directions_by_convention():
    case = SMALL["causal"]
    assert case.flops("bwd") == 2.5 * case.flops("fwd")
    assert case.flops("fwd+bwd") == 3.5 * case.flops("fwd")


def test_published_shape():
    # FlashAttention-2's count for 16k tokens, hidden size 2048, H=128, full: 4 * T^2 * H * N.
    case = Case("", 1, 16384, 16, 16, 128, 128, causal=False)
    assert case.flops("fwd") == 4 * 16384**2 * 128 * 16


# ---- the presets ----------------------------------------------------------------------------


def test_issue_has_what_was_asked_for():
    cases = PRESET_CASES["issue"]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    causal = {
        (c.heads, c.kv_heads, c.length, c.head_dim) for c in cases if c.name.startswith("causal")
    }
    lengths = (4096, 8192, 16384, 32768)
    assert causal == {
        (*heads, length, size)
        for heads in ((32, 8), (16, 1))
        for length in lengths
        for size in (64, 128, 256)
    }
    for case in cases:
        assert case.batch * case.length == max(16384, case.length)
        assert case.dtype == "bfloat16"
    packed = next(case for case in cases if case.documents)
    assert len(packed.documents) == 12 and sum(packed.documents) == packed.length == 16384
    assert min(packed.documents) > 0
    assert {"full", "window 1024", "12 documents"} <= {case.mask for case in cases}
    assert any(case.soft_cap for case in cases) and any(case.sinks for case in cases)
    assert any((c.head_dim, c.value_head_dim) == (192, 128) for c in cases)


def test_sets_of_inputs_are_bounded():
    for case in PRESET_CASES["issue"]:
        assert 2 * case.input_bytes() < 8 << 30


def test_inputs_differ_from_set_to_set():
    first, second, *_ = kernel_job._inputs(SMALL["causal"])
    for a, b in zip(first, second, strict=True):
        assert a.dtype == jnp.bfloat16 and not np.array_equal(a, b)


# ---- cells ----------------------------------------------------------------------------------


def test_every_cell_is_a_number_or_a_reason():
    names = kernel_programs.IMPLEMENTATIONS
    directions = tuple(kernel_cases.DIRECTIONS)
    cells = run(SMALL["causal"], *names, directions=directions)
    assert {(c.direction, c.implementation) for c in cells} == {
        (direction, name) for direction in directions for name in names
    }
    for cell in cells:
        assert (cell.seconds is None) == (cell.status != kernel_rows.OK)
        assert cell.seconds is not None or cell.reason
        if cell.implementation in ("xla", "xla_chunked"):
            assert cell.status == kernel_rows.OK, cell
            assert cell.clock == "wall" and cell.rounds >= 3
            assert 0 < cell.error <= cell.allowed and cell.against == "plain"


@pytest.mark.parametrize("name", [n for n in SMALL if n != "causal"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_every_case_is_right(name, direction):
    (cell,) = run(SMALL[name], "xla_chunked", directions=(direction,))
    assert cell.status == kernel_rows.OK, cell.why


def test_cudnn_is_given_documents_as_an_array(monkeypatch):
    case = SMALL["packed"]
    given = []

    def attention(query, key, value, mask=None, *, implementation, **options):
        given.append((implementation, options))
        return real(query, key, value, mask=mask, **options)

    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    (cell,) = run(case, "cudnn")
    assert cell.status == kernel_rows.OK, cell.why
    assert given[0] == ("cudnn", {"is_causal": True})


def test_ratio_is_to_cudnn(monkeypatch):
    monkeypatch.setitem(
        kernel_programs._MAKERS, "cudnn", lambda case, _: kernel_programs.attention(case, "xla")
    )
    times = iter([1.0, 2.0] * 100)
    monkeypatch.setattr(rounds, "timer", lambda *_: (functools.partial(abs, next(times)), None))
    cudnn, ours = run(SMALL["causal"], "cudnn", "xla_chunked")
    assert (cudnn.ratio, ours.ratio) == (1.0, 0.5)
    assert (cudnn.seconds, ours.seconds) == (1.0, 2.0)


def test_a_wrong_result_is_not_timed(monkeypatch):
    def wrong(case, name):
        return lambda query, key, value, extras: jnp.zeros_like(query)

    monkeypatch.setitem(kernel_programs._MAKERS, "mosaic_gpu", wrong)
    cell, other = run(SMALL["causal"], "mosaic_gpu", "xla_chunked")
    assert cell.status == kernel_rows.WRONG and cell.seconds is None
    assert "out is off by 1 of its row" in cell.reason
    assert cell.failure and other.status == kernel_rows.OK


def test_an_exception_costs_one_cell(monkeypatch):
    def broken(case, name):
        def attend(query, key, value, extras):
            raise ValueError("a | reason\nof two lines")

        return attend

    monkeypatch.setitem(kernel_programs._MAKERS, "mosaic_gpu", broken)
    cell, other = run(SMALL["causal"], "mosaic_gpu", "xla_chunked")
    assert (cell.status, cell.reason) == (kernel_rows.FAILED, "ValueError: a | reason of two lines")
    assert cell.failure and other.status == kernel_rows.OK


def test_a_timer_that_breaks_costs_its_cell(monkeypatch):
    def timer(step, platform):
        raise RuntimeError("the clock stands")

    monkeypatch.setattr(rounds, "timer", timer)
    (cell,) = run(SMALL["causal"], "xla")
    assert cell.status == kernel_rows.FAILED and "the clock stands" in cell.reason


def test_nothing_is_begun_when_the_time_is_up():
    cells = run(SMALL["causal"], "xla", "xla_chunked", stop=0.0)
    assert [cell.status for cell in cells] == [kernel_rows.NOT_MEASURED] * 2
    assert not any(cell.failure for cell in cells)


def test_full_logits_that_do_not_fit():
    case = Case("", 1, 32768, 32, 8, 64, 64)
    with pytest.raises(NotImplementedError, match="its logits take 128 GiB"):
        kernel_programs.attention(case, "xla")


# ---- rates ----------------------------------------------------------------------------------


def cell_of(case, seconds):
    return kernel_rows.Cell.of(case, "fwd", "mosaic_gpu", seconds=seconds)


def test_rates():
    case = SMALL["causal"]
    ceiling = kernel_rows.Ceiling(measured=case.flops("fwd"), peak=None)
    cell = kernel_rows.rated(cell_of(case, 2.0), case, ceiling)
    assert cell.of_matmul == 0.5
    assert cell.tflops == pytest.approx(case.flops("fwd") / 2e12)
    assert cell.status == kernel_rows.OK


def test_faster_than_the_peak_fails():
    case = PRESET_CASES["issue"][0]
    ceiling = kernel_rows.Ceiling(measured=790e12, peak=kernel_rows.peak_of("NVIDIA H200"))
    fair = case.flops("fwd") / 600e12
    assert kernel_rows.rated(cell_of(case, fair), case, ceiling).failure is None
    cell = kernel_rows.rated(cell_of(case, fair / 2), case, ceiling)
    assert cell.status == kernel_rows.IMPOSSIBLE
    assert "1.20 PFLOP/s are beyond the peak, 989 TFLOP/s" in cell.failure


def test_peaks_by_device():
    assert kernel_rows.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert kernel_rows.peak_of("cpu") is None and kernel_rows.peak_of("") is None


def test_a_peers_failure_is_its_own():
    case = SMALL["causal"]
    for name, own in (("mosaic_gpu", True), ("xla_chunked", True), ("cudnn", False)):
        cell = kernel_rows.Cell.of(case, "fwd", name, status=kernel_rows.FAILED, reason="why")
        assert (cell.failure is not None) == own
    wrong = kernel_rows.Cell.of(case, "fwd", "cudnn", status=kernel_rows.WRONG)
    assert wrong.failure


# ---- processes ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dies(kernel_job.Measure):
    """Ends its process at one cell."""

    at: tuple[str, str] = ("fwd", "xla")

    def __call__(self):
        for direction in self.directions:
            for name in self.implementations:
                if (direction, name) in self.skip:
                    continue
                yield kernel_job.Doing(direction, (name,))
                if (direction, name) == self.at:
                    os._exit(7)
                yield kernel_rows.Cell.of(self.case, direction, name, seconds=1.0)


def test_a_process_that_dies_costs_the_cell_it_was_at(worker):
    job = Dies(SMALL["causal"], ("fwd", "bwd"), ("xla_chunked", "xla"), 0.0, math.inf)
    cells = list(kernel_job.cells(worker, job, 60))
    found = {(cell.direction, cell.implementation): cell for cell in cells}
    assert len(found) == len(cells) == 4
    dead = found.pop(("fwd", "xla"))
    assert dead.status == kernel_rows.FAILED and "exit code 7" in dead.reason
    assert all(cell.seconds == 1.0 for cell in found.values())


@dataclasses.dataclass(frozen=True)
class FailsForGood(kernel_job.Measure):
    """Tells of a failure and is of no use after it, as after an illegal access on a GPU."""

    def __call__(self):
        for name in self.implementations:
            if ("fwd", name) in self.skip:
                continue
            yield kernel_job.Doing("fwd", (name,))
            if name == "xla":
                yield kernel_rows.Cell.of(self.case, "fwd", name, status="failed", reason="a")
                raise RuntimeError("nothing works any more")
            yield kernel_rows.Cell.of(self.case, "fwd", name, seconds=1.0)


@dataclasses.dataclass(frozen=True)
class NeverStarts(kernel_job.Measure):
    def __call__(self):
        raise RuntimeError("no device")
        yield


@pytest.fixture
def worker():
    worker = processes.Worker()
    yield worker
    worker.close()


def test_a_failure_that_was_told_costs_its_own_cell_alone(worker):
    names = ("xla_chunked", "xla", "cudnn")
    job = FailsForGood(SMALL["causal"], ("fwd",), names, 0.0, math.inf)
    found = [(cell.implementation, cell.reason) for cell in kernel_job.cells(worker, job, 60)]
    assert found == [("xla_chunked", None), ("xla", "a"), ("cudnn", None)]


def test_a_case_that_never_starts_has_reasons(worker):
    job = NeverStarts(SMALL["causal"], ("fwd", "bwd"), ("xla", "cudnn"), 0.0, math.inf)
    found = list(kernel_job.cells(worker, job, 60))
    assert len(found) == 4
    assert all("RuntimeError: no device" in cell.reason for cell in found)


# ---- the script -----------------------------------------------------------------------------


def script(*args, timeout=120):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kernel_bench.py"), *args],
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
    assert document["environment"]["command"].startswith("python benchmarks/kernel_bench.py")
    cells = document["tables"]["kernels"]
    assert len(cells) == 7 * 3 * len(kernel_programs.IMPLEMENTATIONS)
    assert {cell["status"] for cell in cells if cell["implementation"] == "xla"} == {"ok"}
    kernels = [cell for cell in cells if cell["implementation"] == "mosaic_gpu"]
    assert {cell["status"] for cell in kernels} == {"unsupported"}
    assert "| packed | 3 documents |" in files["markdown"].read_text()


@pytest.mark.ci
def test_budget():
    done = script("--preset=smoke", "--cases=causal", "--budget_minutes=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not measured: time is up") == 3 * 5
