"""The parts of ``tune_hopper.py`` that time and compile."""

from __future__ import annotations

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import pytest

from axattn.kernels._hopper.block_sizes import (
    BLOCK_SIZES,
    KINDS,
    ForwardBlockSizes,
    KeyGradBlockSizes,
    classify_call,
)
from benchmarks.harness import (
    ptxas,
    rounds,
    tile_calls,
    tile_candidates,
    tile_compile,
    tile_measure,
    tile_report,
)
from benchmarks.harness.calls import make_call
from benchmarks.harness.tile_calls import Shape
from benchmarks.harness.tile_candidates import Place

needs_kernels = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels need jax >= 0.11"
)
TINY = Shape(1, 32, 4, 2)


# ---- the calls ------------------------------------------------------------------------------


def test_calls_are_of_their_kind():
    for name, features in itertools.product(KINDS, (tile_calls.TYPICAL, tile_calls.HEAVIEST)):
        structs = tile_calls.inputs(Place("forward", name, 64, 64), TINY, features[name])
        kinds = []

        def make(arrays, features=features[name], kinds=kinds):
            kinds.append(classify_call(make_call(**arrays, **tile_calls.options(features))))

        jax.eval_shape(make, structs)
        assert kinds == [name]


def test_the_heaviest_call_has_all_that_the_kinds_before_it_have():
    for one, next_one in zip(KINDS, KINDS[1:], strict=False):
        assert set(tile_calls.HEAVIEST[one]) < set(tile_calls.HEAVIEST[next_one])


# ---- measuring ------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that run here: the chunked path in their place. What to do by ``tiles``."""
    faults = {}

    def runner(place, tiles, features):
        def run(lse=None, dout=None, delta=None, **arrays):
            fault = faults.get(tiles)
            if isinstance(fault, Exception):
                raise fault

            def attend(query, key, value):
                given = {**arrays, "query": query, "key": key, "value": value}
                return tile_calls.attend(given, features, implementation="xla_chunked")

            out, vjp = jax.vjp(attend, *(arrays[name] for name in ("query", "key", "value")))
            if place.kernel == "forward":
                results = (out,)
            else:
                dquery, *rest = vjp(dout)
                results = (dquery,) if place.kernel == "query_grad" else tuple(rest)
            return tuple(2 * x for x in results) if fault == "wrong" else results

        return run

    monkeypatch.setattr(tile_calls, "runner", runner)
    return faults


@pytest.mark.ci
@pytest.mark.parametrize(("kernel", "name"), [("forward", "full"), ("key_grad", "general")])
def test_right_candidates_are_timed(kernels, kernel, name):
    place = Place(kernel, name, 16, 16)
    job = tile_measure.Measure(place, TINY, ("one", "two"), 0.0)
    found = [message for message in job() if isinstance(message, tile_measure.Measured)]
    assert [one.tiles for one in found] == ["one", "two"]
    for one in found:
        assert one.reason is None and one.seconds > 0 and one.error <= one.allowed


@pytest.mark.ci
def test_wrong_and_failing_candidates_are_not(kernels, monkeypatch):
    kernels.update({"wrong": "wrong", "broken": ValueError("too much\nshared memory")})
    monkeypatch.setattr(rounds, "timer", lambda *_, **__: (lambda: 1e-3, "a note"))
    place = Place("query_grad", "masked", 16, 16)
    job = tile_measure.Measure(place, TINY, ("wrong", "broken", "good"), 0.0)
    found = {one.tiles: one for one in job() if isinstance(one, tile_measure.Measured)}
    assert found["wrong"].seconds is None and found["wrong"].reason.startswith("wrong: error")
    assert found["broken"].reason == "ValueError: too much shared memory"
    assert found["good"].seconds == 1e-3 and found["good"].note == "a note"


def test_flops_of_a_kernel():
    shape = Shape(2, 128, 4, 2)
    pairs = 2 * 4 * 128 * 128
    assert tile_measure.flops(Place("forward", "full", 192, 128), shape) == 2 * 320 * pairs
    assert tile_measure.flops(Place("query_grad", "full", 64, 64), shape) == 2 * 192 * pairs
    assert tile_measure.flops(Place("key_grad", "full", 64, 64), shape) == 2 * 256 * pairs
    causal = tile_measure.flops(Place("forward", "masked", 64, 64), shape)
    assert causal == 2 * 128 * 2 * 4 * 128 * 129 // 2


@dataclasses.dataclass(frozen=True)
class Dies(tile_measure.Measure):
    def __call__(self):
        timed = []
        for tiles in self.candidates:
            yield tile_measure.Doing(tiles)
            if tiles == "dies":
                os._exit(7)
            timed.append(tiles)
        for tiles in timed:
            yield tile_measure.Measured(self.place, tiles, seconds=1.0)


@pytest.mark.ci
def test_a_candidate_that_ends_its_process_costs_itself(worker):
    job = Dies(Place("forward", "full", 64, 64), TINY, ("a", "dies", "b"), 0.0)
    found = {one.tiles: one for one in tile_measure.tried(worker, job, 60)}
    assert "exit code 7" in found.pop("dies").reason
    assert {tiles: one.seconds for tiles, one in found.items()} == {"a": 1.0, "b": 1.0}


def test_measured_row():
    place = Place("forward", "full", 64, 64)
    one = tile_measure.Measured(place, ForwardBlockSizes(128, 2, 3), seconds=2e-3, note="wall time")
    row = tile_report.measured_row(one, TINY)
    assert row["how"] == "measured" and row["microseconds"] == 2000.0
    assert row["block_sizes"] == {"block_kv": 128, "stages": 2, "warpgroups": 3}
    assert row["note"] == "wall time"


# ---- compiling ------------------------------------------------------------------------------


def compiled(tiles, spills=0, heaviest=0, refusal=None):
    place = Place("forward", "masked", 64, 64)
    if refusal:
        return tile_compile.Compiled(place, tiles, 0, refusal=refusal)
    usual, most = (ptxas.Kernel("k", 168, size, 0) for size in (spills, heaviest))
    return tile_compile.Compiled(place, tiles, 0, usual, most)


def test_the_best_is_the_first_that_spills_least():
    def best(*found):
        return getattr(tile_compile.best(found), "tiles", None)

    refused, usual, heaviest = (
        compiled("a", refusal="no"), compiled("b", 500), compiled("c", heaviest=4),
    )  # fmt: skip
    assert best(refused, usual, compiled("d"), compiled("e")) == "d"
    # In a usual call before the heaviest one.
    assert best(heaviest, compiled("d")) == "d"
    assert best(usual, compiled("d", heaviest=500)) == "d"
    assert best(compiled("a", 4, 4), compiled("d", heaviest=500)) == "d"
    assert best(usual, compiled("d", 90), compiled("e", 400)) == "d"
    assert best(refused) is None


def test_more_are_tried_where_all_spill(monkeypatch):
    """The candidates come in the order of preference: those that do not spill may be the last."""
    candidates = [ForwardBlockSizes(block, 2) for block in (256, 192, 128, 96, 64)]
    monkeypatch.setattr(tile_candidates, "candidates", lambda place: candidates)
    monkeypatch.setattr(
        tile_compile,
        "compile_tiles",
        lambda place, tiles, target: compiled(tiles, spills=4 * (tiles.block_kv > least)),
    )
    place = Place("forward", "masked", 64, 64)
    for least, tried in ((96, 4), (256, 2), (64, 5), (0, 5)):
        found = list(tile_compile.tried(place, 2, "h200"))
        assert [one.tiles.block_kv for one in found] == [256, 192, 128, 96, 64][:tried]
        if least:
            assert tile_compile.best(found).tiles.block_kv == min(least, 256)


@needs_kernels
@pytest.mark.aot
@pytest.mark.parametrize(
    ("place", "tiles"),
    [
        # More than there is: the compiler says how much it is.
        (Place("forward", "masked", 256, 256), ForwardBlockSizes(64, 4)),
        (Place("forward", "masked", 192, 128), ForwardBlockSizes(128, 3, 1)),
        (Place("query_grad", "biased", 256, 256), BLOCK_SIZES["query_grad"](64, 2, 2)),
        (Place("key_grad", "biased", 128, 128), KeyGradBlockSizes(128, 2, 2, True)),
        (Place("key_grad", "full", 256, 256), KeyGradBlockSizes(64, 3)),
    ],
    ids=str,
)
def test_shared_memory_is_what_the_compiler_says(place, tiles):
    from axattn import aot

    features = tile_calls.HEAVIEST[place.kind]
    structs = tile_calls.inputs(place, Shape(1, 256, 2, 1), features)
    report = aot.analyze(tile_calls.runner(place, tiles, features), target="h200", **structs)
    assert report.refusal is not None, "fits; take more stages"
    assert report.refusal.requested_bytes == tile_candidates.shared_bytes(place, tiles)


@needs_kernels
@pytest.mark.aot
def test_what_does_not_compile_is_a_refusal():
    tile_compile.prepare("h200")
    tiles = ForwardBlockSizes(256, 4)
    found = tile_compile.compile_tiles(Place("forward", "full", 256, 256), tiles, "h200")
    assert found.usual is None and "out of memory (smem)" in found.refusal


def test_short_names_of_tiles():
    assert tile_report.short(ForwardBlockSizes(128, 2)) == "128 x2, 2 wg"
    assert tile_report.short(KeyGradBlockSizes(64, 2, split=True)) == "64 x2, 2 wg, split"


def test_inputs_have_the_calls_dtypes():
    structs = tile_calls.inputs(Place("key_grad", "biased", 64, 32), TINY, ("bias32", "mask"))
    assert structs["bias"].dtype == jnp.float32 and structs["mask"].dtype == bool
    assert structs["dout"].shape == (1, 32, 4, 32) and structs["lse"].shape == (1, 32, 4)
