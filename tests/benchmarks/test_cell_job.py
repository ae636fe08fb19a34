"""What ``kernel_bench.py`` and ``decode_bench.py`` make of a cell, on a CPU: a number, or a reason."""

from __future__ import annotations

import dataclasses
import functools
import math
import os

import jax
import pytest

from axattn import aot
from benchmarks.harness import (
    cell_job,
    decode_cases,
    decode_check,
    decode_job,
    decode_peers,
    decode_programs,
    decode_rows,
    kernel_cases,
    kernel_job,
    kernel_programs,
    kernel_rows,
    rounds,
)

KERNELS = {case.name: case for case in kernel_cases.PRESETS["smoke"]()}
CAUSAL = KERNELS["causal"]
DENSE, PAGED, LATENT = decode_cases.PRESETS["smoke"]()
RING = decode_cases.Case(3, 40, 4, 2, 32, kind="ring", window=16)
TREE = decode_cases.Case(2, 24, 4, 2, 32, tokens=4, tree=True)
WINDOW = decode_cases.Case(2, 64, 4, 2, 32, tokens=2, window=8)
ISSUE = {case.name: case for case in decode_cases.PRESETS["issue"]()}

both = pytest.mark.parametrize("case", [CAUSAL, DENSE], ids=["kernel", "decode"])


def run(case, *names, directions=("fwd",), stop=math.inf):
    job = kernel_job if isinstance(case, kernel_cases.Case) else decode_job
    messages = job.Measure(case, directions, names, 0.0, stop)()
    return [message for message in messages if not isinstance(message, cell_job.Doing)]


def install(monkeypatch, name, change):
    """In both scripts ``name`` becomes "xla", on whose output ``change`` is called."""

    def kernel(case, _):
        attend = kernel_programs._axattn(case, "xla")
        return lambda *args: change(attend(*args))

    def decode(case, _):
        program = decode_programs._axattn(case, "xla")
        return program._replace(attend=lambda given: change(program.attend(given)))

    monkeypatch.setitem(kernel_programs._MAKERS, name, kernel)
    monkeypatch.setitem(decode_programs._MAKERS, name, decode)


# ---- cells --------------------------------------------------------------------------------------


@pytest.mark.ci
def test_every_cell_is_a_number_or_a_reason():
    names, directions = kernel_programs.IMPLEMENTATIONS, tuple(kernel_cases.DIRECTIONS)
    cells = run(CAUSAL, *names, directions=directions)
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


@pytest.mark.ci
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "causal"])
def test_every_kernel_case_is_right(name):
    """In both directions, which have the output and all gradients."""
    (cell,) = run(KERNELS[name], "xla_chunked", directions=("fwd+bwd",))
    assert cell.status == kernel_rows.OK, cell.why


@pytest.mark.ci
@pytest.mark.parametrize(
    "case", [DENSE, PAGED, LATENT, RING, TREE, WINDOW], ids=lambda case: case.name
)
def test_every_decode_case_is_right(case):
    kernels, chunked = run(case, "mosaic_gpu", "xla_chunked")
    assert kernels.status == kernel_rows.UNSUPPORTED
    assert "needs a Hopper GPU" in kernels.reason or "needs jax >= 0.11" in kernels.reason
    assert kernels.failure is None and kernels.seconds is None
    assert chunked.status == kernel_rows.OK, chunked.why
    assert chunked.clock == "wall" and chunked.rounds >= 3
    assert 0 < chunked.error <= chunked.allowed and chunked.against == "xla"


@pytest.mark.ci
@both
def test_a_wrong_output_is_not_timed(monkeypatch, case):
    # One row, one head: by a few hundredths.
    install(monkeypatch, "mosaic_gpu", lambda out: out.at[0, 0, 1].multiply(1.05))
    cell, other = run(case, "mosaic_gpu", "xla")
    assert cell.status == kernel_rows.WRONG and cell.seconds is None
    assert cell.error == pytest.approx(0.05, abs=0.005) and "out is off by" in cell.failure
    assert other.status == kernel_rows.OK


@pytest.mark.ci
@both
def test_an_exception_costs_one_cell(monkeypatch, case):
    def broken(out):
        raise ValueError("a | reason\nof two lines")

    install(monkeypatch, "mosaic_gpu", broken)
    cell, other = run(case, "mosaic_gpu", "xla")
    assert (cell.status, cell.reason) == (kernel_rows.FAILED, "ValueError: a | reason of two lines")
    assert cell.failure and other.status == kernel_rows.OK


@pytest.mark.ci
def test_a_timer_that_breaks_costs_its_cell(monkeypatch):
    def timer(step, platform):
        raise RuntimeError("the clock stands")

    monkeypatch.setattr(rounds, "timer", timer)
    (cell,) = run(CAUSAL, "xla")
    assert cell.status == kernel_rows.FAILED and "the clock stands" in cell.reason


@both
def test_nothing_is_begun_when_the_time_is_up(case):
    cells = run(case, "mosaic_gpu", "xla", stop=0.0)
    assert [cell.status for cell in cells] == [kernel_rows.NOT_MEASURED] * 2
    assert not any(cell.failure for cell in cells)


@pytest.mark.ci
@pytest.mark.parametrize(
    "case, times, ratios",
    [
        (CAUSAL, {"cudnn": 1.0, "xla": 2.0}, {"cudnn": 1.0, "xla": 0.5}),
        # The best of the others than the kernels.
        (
            DENSE,
            {"mosaic_gpu": 1.0, "xla_chunked": 4.0, "xla": 2.0},
            {"mosaic_gpu": 2.0, "xla_chunked": 0.5, "xla": 1.0},
        ),
    ],
    ids=["kernel", "decode"],
)
def test_what_ratios_are_to(monkeypatch, case, times, ratios):
    install(monkeypatch, next(iter(times)), lambda out: out)
    clocks = iter(times.values())
    monkeypatch.setattr(rounds, "timer", lambda *_: (functools.partial(abs, next(clocks)), None))
    cells = run(case, *times)
    assert {cell.implementation: cell.seconds for cell in cells} == times
    assert {cell.implementation: cell.ratio for cell in cells} == ratios
    assert {getattr(cell, "best", "xla") for cell in cells} == {"xla"}


# ---- peers --------------------------------------------------------------------------------------


@pytest.mark.ci
def test_cudnn_is_given_documents_as_an_array(monkeypatch):
    given = []

    def attention(query, key, value, mask=None, *, implementation, **options):
        given.append((implementation, options))
        return real(query, key, value, mask=mask, **options)

    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    (cell,) = run(KERNELS["packed"], "cudnn")
    assert cell.status == kernel_rows.OK, cell.why
    assert given[0] == ("cudnn", {"is_causal": True})


def test_full_logits_that_do_not_fit():
    case = kernel_cases.Case("", 1, 32768, 32, 8, 64, 64)
    with pytest.raises(NotImplementedError, match="its logits take 128 GiB"):
        kernel_programs.attention(case, "xla")


@pytest.mark.ci
@pytest.mark.parametrize(
    "case",
    [DENSE, TREE, WINDOW, dataclasses.replace(LATENT, dtype="bfloat16")],
    ids=lambda case: case.name,
)
def test_jax_nn_answers_the_same_call(case):
    (cell,) = run(case, "jax_nn_xla")
    assert cell.status == kernel_rows.OK, cell.why


@pytest.mark.ci
@pytest.mark.parametrize(
    "case", [decode_cases.Case(2, 512, 4, 2, 32), PAGED], ids=["dense", "paged"]
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


@pytest.mark.ci
def test_an_empty_row_is_zero_in_this_library(monkeypatch):
    row = int(PAGED.lengths().argmin())
    for name in ("mosaic_gpu", "jax_nn_xla"):
        install(monkeypatch, name, lambda out: out.at[row].set(1.0))
    ours, peer = run(PAGED, "mosaic_gpu", "jax_nn_xla")
    assert (ours.status, peer.status) == (kernel_rows.WRONG, kernel_rows.OK)


@pytest.mark.ci
def test_rows_are_sampled_where_all_do_not_fit(monkeypatch):
    ragged = ISSUE["gqa32/8/b32/ragged/dense/bf16"]
    rows = decode_check.sampled(ragged)
    assert {ragged.lengths().argmin(), ragged.lengths().argmax()} <= set(rows.tolist())
    assert 2 < len(set(rows.tolist())) == len(rows) < 32
    assert decode_check.sampled(DENSE).tolist() == [0, 1, 2]
    monkeypatch.setattr(decode_check, "_REFERENCE_BYTES", 1)
    for case in (PAGED, TREE):
        (cell,) = run(case, "xla_chunked")
        assert cell.status == kernel_rows.OK, cell.why


# ---- rates --------------------------------------------------------------------------------------


def kernel_cell(case, seconds):
    return kernel_rows.Cell.of(case, "fwd", "mosaic_gpu", seconds=seconds)


def test_rates_of_kernels_and_what_is_beyond_the_peak():
    case = kernel_cases.PRESETS["issue"]()[0]
    peak = kernel_rows.peak_of("NVIDIA H200")
    assert peak == kernel_rows.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert kernel_rows.peak_of("cpu") is None and kernel_rows.peak_of("") is None
    fair = case.flops("fwd") / 600e12
    cell = kernel_rows.rated(kernel_cell(case, fair), case, kernel_rows.Ceiling(800e12, peak))
    assert cell.failure is None and cell.status == kernel_rows.OK
    assert (cell.tflops, cell.of_matmul) == (pytest.approx(600), pytest.approx(0.75))
    cell = kernel_rows.rated(kernel_cell(case, fair / 2), case, kernel_rows.Ceiling(800e12, peak))
    assert cell.status == kernel_rows.IMPOSSIBLE
    assert "1.20 PFLOP/s are beyond the peak, 989 TFLOP/s" in cell.failure


def test_rates_of_decoding_and_what_is_beyond_the_peak():
    dense, latent = ISSUE["gqa32/8/b32/4k/dense/bf16"], ISSUE["mla128/b64/8k/dense/bf16"]
    h200 = decode_rows.Ceiling.of(aot.target("h200"), copied=4e12)
    # 242 FLOPs per byte of the latent cache are beyond 989e12 / 4.8e12 = 206.
    assert h200.floor(dense) == (pytest.approx(dense.bytes() / 4.8e12), "memory")
    assert h200.floor(latent) == (pytest.approx(latent.flops() / 989e12), "compute")
    assert decode_rows.Ceiling.of(None).floor(dense) == (None, None)
    cell = decode_rows.Cell.of(dense, "fwd", "mosaic_gpu", seconds=dense.bytes() / 4e12)
    rated = decode_rows.rated(cell, dense, h200)
    assert rated.failure is None and rated.of_copy == pytest.approx(1.0)
    assert rated.of_floor == pytest.approx(4 / 4.8)
    assert rated.bytes_per_second == pytest.approx(4e12)
    fast = dataclasses.replace(cell, seconds=dense.bytes() / 5e12)
    rated = decode_rows.rated(fast, dense, h200)
    assert rated.status == kernel_rows.IMPOSSIBLE
    assert "5.00 TB/s are beyond the peak, 4.80 TB/s" in rated.failure
    fast = decode_rows.Cell.of(latent, "fwd", "xla", seconds=latent.flops() / 1e15)
    failure = decode_rows.rated(fast, latent, h200).failure
    assert "1.00 PFLOP/s are beyond the peak, 989 TFLOP/s" in failure


def test_a_peers_failure_is_its_own():
    for name, own in (("mosaic_gpu", True), ("xla_chunked", True), ("cudnn", False)):
        cell = kernel_rows.Cell.of(CAUSAL, "fwd", name, status=kernel_rows.FAILED, reason="why")
        assert (cell.failure is not None) == own
    assert kernel_rows.Cell.of(CAUSAL, "fwd", "cudnn", status=kernel_rows.WRONG).failure


# ---- processes ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Faulty(kernel_job.Measure):
    """Tells of its cells until "xla" forward, and then does what ``end`` says."""

    end: str = "dies"

    def __call__(self):
        if self.end == "never starts":
            raise RuntimeError("no device")
        for direction in self.directions:
            for name in self.names(direction):
                yield cell_job.Doing(direction, (name,))
                if (direction, name) == ("fwd", "xla"):
                    if self.end == "dies":
                        os._exit(7)
                    # As after an illegal access on a GPU: nothing works any more.
                    yield self.cell(direction, name, status="failed", reason="a")
                    raise RuntimeError("nothing works any more")
                yield self.cell(direction, name, seconds=1.0)


@pytest.mark.ci
def test_what_becomes_of_a_process_costs_the_cell_it_was_at(worker):
    names, directions = ("xla_chunked", "xla", "cudnn"), ("fwd", "bwd")
    for end, reason in (("dies", "exit code 7"), ("fails for good", "a")):
        job = Faulty(CAUSAL, directions, names, 0.0, math.inf, end=end)
        cells = list(cell_job.cells(worker, job, 60))
        found = {(cell.direction, cell.implementation): cell for cell in cells}
        assert len(found) == len(cells) == 6
        lost = found.pop(("fwd", "xla"))
        assert lost.status == kernel_rows.FAILED and reason in lost.reason
        assert all(cell.seconds == 1.0 for cell in found.values())


@pytest.mark.ci
def test_a_case_that_never_starts_has_reasons(worker):
    job = Faulty(CAUSAL, ("fwd", "bwd"), ("xla", "cudnn"), 0.0, math.inf, end="never starts")
    found = list(cell_job.cells(worker, job, 60))
    assert len(found) == 4
    assert all("RuntimeError: no device" in cell.reason for cell in found)
