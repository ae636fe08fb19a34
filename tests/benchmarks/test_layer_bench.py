"""``layer_bench.py``: its cases, layers, cells and tables."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axattn import aot
from benchmarks.harness import (
    inputs,
    layer_build,
    layer_cases,
    layer_jobs,
    layer_plots,
    layer_report,
    layer_rows,
)
from benchmarks.harness import rows as statuses
from benchmarks.harness.layer_cases import BASELINE, LAYERS, MODELS, Case, Latent, Model
from benchmarks.harness.layer_rows import HERE
from benchmarks.harness.sections import Sections

SMALL = Model("small", 32, 4, 2, 8, 24, 2, Latent(12, 10, 8, 4, 6))


def case(layer="GroupedQueryAttention", implementation="xla", model=SMALL, **fields):
    return Case(model, layer, implementation, "float32", **fields)


def output(case):
    workload = layer_build.build(case, "cpu")
    return np.asarray(jax.jit(workload.fn)(*inputs.random_like(workload.args)))


# ---- cases --------------------------------------------------------------------------------------


def test_heads_of_layers():
    found = {layer: case(layer).kv_heads for layer in LAYERS}
    assert list(found.values()) == [4, 4, 2, 1, None]


def test_latent_layers_have_both_forms():
    names = (BASELINE, "xla", "default")
    latent = layer_cases.cases(SMALL, "LatentAttention", names, "float32", "fwd")
    assert [(c.implementation, c.form) for c in latent] == [
        (BASELINE, "naive"), ("xla", "naive"), ("xla", "absorbed"), ("default", "naive"),
    ]  # fmt: skip
    grouped = layer_cases.cases(SMALL, "MultiQueryAttention", names, "float32", "fwd")
    assert [(c.implementation, c.form) for c in grouped] == [(n, None) for n in names]


def test_optimisations_differ_in_one_thing():
    for name, found in layer_cases.optimisations(MODELS["tiny"], "float32", "fwd", "xla").items():
        first = dataclasses.asdict(found[0])
        for other in map(dataclasses.asdict, found[1:]):
            changed = {field for field in first if first[field] != other[field]}
            assert len(changed) == 1, (name, changed)
    counts = layer_cases.optimisations(MODELS["llama-3-70b"], "float32", "fwd", "xla")["kv heads"]
    assert [c.kv_heads for c in counts] == [8, 4, 2, 1]


def test_sweeps():
    def sizes(name):
        found = layer_cases.sweep(name, (512, 8192), (4096, 16384))
        return [(m.seq_len, m.hidden, m.heads, m.kv_heads) for m in found]

    assert sizes("length") == [(length, 4096, 32, 4) for length in (512, 8192)]
    assert sizes("hidden") == [(2048, 4096, 32, 4), (2048, 16384, 128, 16)]


# ---- layers -------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("layer", LAYERS)
def test_implementations_agree(layer):
    """The same parameters, inputs and result, whatever is measured of a layer."""
    want = output(case(layer, BASELINE, form="naive" if layer == "LatentAttention" else None))
    assert want.shape == (2, 24, 32)
    others = [case(layer, name) for name in ("xla", "xla_chunked", "default")]
    if layer == "LatentAttention":
        others = [dataclasses.replace(c, form=form) for c in others for form in layer_cases.FORMS]
    elif layer == "GroupedQueryAttention":
        others += [case(layer, heads_at_once=False), case(layer, fused_qkv=True)]
    for other in others:
        np.testing.assert_allclose(output(other), want, atol=1e-5, err_msg=str(other))


def test_gradients_are_of_parameters_and_inputs():
    workload = layer_build.build(case(direction="fwd+bwd"), "cpu")
    value, (params, x) = jax.eval_shape(workload.fn, *workload.args)
    assert value.shape == ()
    assert jax.tree.map(jnp.shape, (params, x)) == jax.tree.map(jnp.shape, workload.args)


@pytest.mark.ci
@pytest.mark.parametrize("layer", LAYERS)
def test_flops_are_those_of_the_program(layer):
    """XLA counts all T x T pairs, and the softmax."""
    model = dataclasses.replace(SMALL, hidden=256, head_dim=64, seq_len=128, batch=1)
    model = dataclasses.replace(model, latent=Latent(64, 64, 64, 32, 64))
    wanted = case(layer, model=model, form="naive" if layer == "LatentAttention" else None)
    workload = layer_build.build(wanted, "cpu")
    counted = jax.jit(workload.fn).lower(*workload.args).compile().cost_analysis()["flops"]
    size = 2 * 64 if layer != "LatentAttention" else 64 + 32 + 64
    pairs = model.seq_len * (model.seq_len - 1) / 2
    by_hand = layer_build.flops(wanted) + 2 * pairs * model.heads * size
    assert by_hand < counted < 1.1 * by_hand


def test_default_is_what_none_takes():
    assert layer_build.default_implementation(case(), "cpu") == "xla"
    long = dataclasses.replace(SMALL, seq_len=4096)
    assert layer_build.default_implementation(case(model=long), "cpu") == "xla_chunked"
    assert layer_build.default_implementation(case("LatentAttention", model=long), "cpu")


# ---- cells --------------------------------------------------------------------------------------


def test_a_cell_that_ran():
    cell = layer_jobs.Run(case(), warmup=1, runs=3)()
    assert cell.status == statuses.OK, cell.reason
    assert cell.where == HERE and cell.runs == 3 and cell.clock == "wall" and cell.is_default
    assert cell.time > 0 and cell.time_std >= 0
    assert cell.memory_kind == "host" and cell.memory_bytes > cell.temp_bytes > 0
    assert cell.kv_heads == 2 and cell.name == "xla *"


def test_warmup_does_not_count():
    calls = iter(range(100))
    assert layer_jobs.measure(lambda: next(calls), warmup=10, runs=3) == [10, 11, 12]


@pytest.mark.parametrize(
    "wanted, words",
    [
        (case("LatentAttention", "jax_nn", form="naive"), "this layer has none"),
        (case("LatentAttention", "cudnn", form="absorbed"), "cudnn"),
        (case("GroupedQueryAttention", "mosaic_tpu"), "needs a TPU"),
        (case("GroupedQueryAttention", "splash"), "splash is for TPUs, not for cpu"),
    ],
)
def test_a_reason_in_place_of_a_number(wanted, words):
    cell = layer_jobs.Run(wanted, warmup=0, runs=1)()
    assert cell.status == statuses.UNSUPPORTED and words in cell.reason
    texts = [column.cell(cell) for column in layer_rows.columns(HERE, "cpu")]
    assert words in texts[-1]


def test_compiled_cells_have_no_time():
    cell = layer_jobs.Compile(case(), "cpu")()
    assert cell.status == statuses.OK, cell.reason
    assert cell.time is None and cell.roofline is None and cell.flops > 0


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5p", "h200"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_compiles(layer, target):
    model = Model("wide", 512, 16, 4, 128, 512, 1)
    name = {"v5p": "mosaic_tpu", "h200": "mosaic_gpu"}[target]
    wanted = Case(model, layer, name, "bfloat16", form="naive" if "Latent" in layer else None)
    cell = layer_jobs.Compile(wanted, target)()
    assert cell.status == statuses.OK, cell.reason
    assert cell.is_default and cell.roofline > 0 and cell.memory_kind == "HBM"


def test_roofline():
    chip = aot.target("v5p")
    assert layer_jobs.roofline(chip, 459e12, 1.0) == 1.0
    assert layer_jobs.roofline(chip, 1.0, 2 * 2.765e12) == 2.0
    assert layer_jobs.roofline(chip, None, 1.0) is None
    assert layer_jobs.roofline(aot.target("cpu"), 1.0, 1.0) is None


def test_ratios_and_the_best():
    def cell(name, time, memory, **values):
        wanted = case(implementation=name, model=MODELS["tiny"])
        return layer_rows.of_case(wanted, HERE, time=time, memory_bytes=memory, **values)

    base, fast, small = cell(BASELINE, 4.0, 100), cell("xla", 1.0, 50), cell("xla_chunked", 2.0, 10)
    failed = cell("cudnn", None, None, status=statuses.UNSUPPORTED, reason="no")
    fast, small = (layer_rows.compared(c, base) for c in (fast, small))
    assert (fast.speedup, fast.memory_ratio, small.memory_ratio) == (4.0, 0.5, 0.1)
    assert layer_rows.compared(failed, base).speedup is None
    (best,) = layer_rows.best([base, fast, small, failed])
    assert (best.best, best.speedup, best.layer) == ("xla", 4.0, "GroupedQueryAttention")
    unmeasured = [dataclasses.replace(c, time=None) for c in (base, fast, small)]
    assert layer_rows.best(unmeasured)[0].best == "xla_chunked"


def test_plot(tmp_path, environment):
    cells = [
        layer_rows.of_case(
            case(implementation=name, model=model), where, time=i + 1.0, roofline=i + 0.5,
            memory_bytes=(i + 1) << 30, memory_kind="HBM",
        )
        for where in (HERE, "v5p")
        for sweep in ("length", "hidden")
        for name in (BASELINE, "xla")
        for i, model in enumerate(layer_cases.sweep(sweep, (512, 1024), (4096, 8192)))
    ]  # fmt: skip
    path = tmp_path / "sweeps.png"
    assert layer_plots.plot(path, cells, environment)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert not layer_plots.plot(tmp_path / "none.png", [], environment)


def test_what_bounds_leave_out_stands_under_the_table(environment):
    out = Sections(environment)
    bench = layer_report.Bench(out, warmup=0, runs=1, timeout=None)
    out.begin("models", "title", [])
    cells = [
        layer_rows.of_case(case(implementation=name), "v5p", notes=notes)
        for name, notes in (("xla", None), ("splash", "a loop"), ("cudnn", "a loop"))
    ]
    bench.explain([*cells, cells[1]])
    assert out.sections[0].notes == ["splash, cudnn: a loop"]


def test_bounds_have_no_ratio():
    base, other = (
        layer_rows.of_case(case(implementation=name), "v5p", roofline=time)
        for name, time in ((BASELINE, 4.0), ("xla", 2.0))
    )
    assert layer_rows.compared(other, base).roofline_ratio == 2.0
    bound = dataclasses.replace(other, cost_is_lower_bound=True)
    assert layer_rows.compared(bound, base).roofline_ratio is None
