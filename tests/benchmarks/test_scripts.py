"""The scripts as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from absl.testing import flagsaver

from benchmarks import mqa_bench
from benchmarks.harness import (
    cases,
    decode_programs,
    jobs,
    kernel_programs,
    output,
    tile_table,
    torch_peer,
)
from tests.aot.compilers import need
from tests.benchmarks.test_tune_hopper import needs_kernels
from tests.markdown import ROOT

# What is timed takes longer to compile than to run.
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}
ENVIRONMENT["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
TINY = ["--configs=32/2/1/8", "--dtypes=float32", "--min_time=0.001", "--repetitions=2"]


def script(name, *flags):
    """What it says, on standard output and on standard error, where it ends well."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *flags],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=480,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def read(path):
    return json.loads(path.read_text("utf-8"))


# ---- mqa_bench ----------------------------------------------------------------------------------


@pytest.mark.ci
def test_mqa_bench(tmp_path):
    files = [tmp_path / f"out{suffix}" for suffix in (".json", ".csv", ".md")]
    plot = tmp_path / "out.png"
    out, err = script(
        "mqa_bench.py",
        *TINY,
        "--directions=fwd,decode",
        "--implementations=xla,repeat_kv,cudnn",
        f"--output={','.join(map(str, files))}",
        f"--plot={plot}",
    )
    lines = [line for line in out.splitlines() if line.startswith("MQABenchmark/32/2/1/8")]
    assert [line.split()[1] for line in lines] == ["repeat_kv", "xla", "cudnn"] * 2
    assert "unsupported: implementation" in out
    assert err == ""  # no terminal, no progress
    rows, environment = output.read(files[0])
    assert [row.status for row in rows] == ["ok", "ok", "unsupported"] * 2
    assert environment["command"].startswith("python benchmarks/mqa_bench.py --configs=32/2/1/8")
    for row in rows:
        if row.status == "ok":
            assert row.time > 0 and row.cpu_time > 0 and row.iterations > 0 and row.speedup
            assert row.memory_kind == "host" and row.memory_bytes > row.temp_bytes > 0
            assert row.compile_seconds > 0
    assert output.read(files[1])[0] == rows
    assert "MQABenchmark/32/2/1/8" in files[2].read_text()
    assert plot.stat().st_size > 10_000


@pytest.mark.ci
def test_ctrl_c_keeps_finished_rows(tmp_path):
    path = tmp_path / "out.json"
    long = ["--directions=fwd", "--repetitions=20", "--min_time=0.1", f"--output={path}"]
    names = "--implementations=repeat_kv,xla,xla_chunked,jax_nn,default"
    with subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/mqa_bench.py"), *TINY, *long, names],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A shell's background jobs, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        for line in process.stdout:
            if line.startswith("MQABenchmark"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130
    assert "interrupted: " in rest
    assert 1 <= len(output.read(path)[0]) < 5


@pytest.fixture
def wanted():
    """The jobs of a command line's flags."""
    if not mqa_bench.flags.FLAGS.is_parsed():
        mqa_bench.flags.FLAGS.mark_as_parsed()

    def make(platform=None, **flags):
        with flagsaver.flagsaver(**flags):
            return mqa_bench.make_jobs(platform)

    return make


def test_targets_may_be_repeated_or_listed(wanted):
    made = wanted(target=["v5p,h100", "v5p"], preset="smoke", directions=["decode"])
    assert list(dict.fromkeys(job.where for job in made)) == ["v5p", "h100"]
    assert all(isinstance(job, jobs.Compile) for job in made)


def test_axlearn_on_v5p_asks_for_every_implementation(wanted):
    made = wanted(target=["v5p"], preset="axlearn", directions=["fwd", "decode"])
    names = [job.case.name for job in made if job.case.implementation == "repeat_kv"]
    decoded = "2048/16/2/32768"
    assert names == [f"MQABenchmark/{config}" for config in (*cases.AXLEARN, decoded)]
    assert {"repeat_kv", "xla", "xla_chunked"} <= {job.case.implementation for job in made}


def test_here_comes_before_targets_and_the_baseline_first(wanted):
    made = wanted("cpu", target=["v5p"], implementations=["xla", "repeat_kv"], preset="smoke")
    places = [job.where for job in made]
    assert places == sorted(places, key=lambda place: place != "here")
    assert set(places) == {"here", "v5p"}
    assert [job.case.implementation for job in made[:2]] == ["repeat_kv", "xla"]


@pytest.mark.aot
def test_mqa_bench_for_a_target(tmp_path):
    path = tmp_path / "out.json"
    script(
        "mqa_bench.py", "--configs=64/4/1/32,4096/16/2/65536", "--directions=fwd",
        "--dtypes=bfloat16", "--implementations=repeat_kv", "--target=v5p", f"--output={path}",
    )  # fmt: skip
    small, large = output.read(path)[0]
    assert small.memory_kind == "HBM" and small.memory_bytes > 0 and small.flops > 0
    assert small.time is None
    assert large.status == "out_of_memory" and large.requested_bytes > large.available_bytes


@pytest.mark.aot
def test_the_star_is_what_the_target_takes():
    need("v5p")
    config = cases.parse_config("512/4/1/512")
    for name in ("xla_chunked", "mosaic_tpu"):
        case = cases.Case(config, name, 1, "bfloat16", "fwd")
        row = jobs._compile(jobs.Compile(case, "v5p"))
        assert row.is_default == (name == "mosaic_tpu")


# ---- the function and the kernels ---------------------------------------------------------------


@pytest.mark.ci
def test_function_benchmarks():
    flags = ["--cases=fwd/128,decode", "--heads=4,2,8", "--dtypes=float32", "--seconds=0"]
    out, _ = script("attention_bench.py", *flags, "--bounds")
    tables = out.partition("What XLA takes for all products")
    for table, names in ((tables[0], ["fwd/128", "decode/8192"]), (tables[2], ["fwd/128"])):
        lines = [line.split() for line in table.splitlines() if " float32 " in line]
        assert [line[0] for line in lines] == names
    assert ("absent" in tables[0]) == (torch_peer.find_refusal() is not None)


@pytest.mark.ci
def test_crossover_bench(tmp_path):
    path = tmp_path / "out.json"
    out, _ = script(
        "crossover_bench.py", "--batches=1", "--lengths=8,16", "--heads=4/2", "--head_dims=8",
        "--dtypes=float32", "--seconds=0", "--rounds=2", f"--output={path}",
    )  # fmt: skip
    assert "\n4 rows; default / better of repeat_kv and jax_nn: over 1.05 in " in out
    rows = read(path)["tables"]["rows"]
    assert sorted((row["length"], row["direction"]) for row in rows) == [
        (length, direction) for length in (8, 16) for direction in ("fwd", "fwd+bwd")
    ]
    for row in rows:
        assert row["chosen"] in ("xla", "xla_chunked")
        assert row["is_slower"] == (row["ratio"] > 1.05)
        assert row["rounds"] >= 2 and row["best"] in ("repeat_kv", "jax_nn")


@pytest.mark.ci
@pytest.mark.parametrize(
    "name, case, table, count, line",
    [
        ("kernel_bench.py", "packed", "kernels", 3 * len(kernel_programs.IMPLEMENTATIONS),
         "| packed | 3 documents |"),
        ("decode_bench.py", "mla", "decode", len(decode_programs.IMPLEMENTATIONS),
         "| mla4/b2/64/dense/fp8 | mosaic_gpu |"),
    ],
)  # fmt: skip
def test_benches_of_kernels(tmp_path, name, case, table, count, line):
    files = {"json": tmp_path / "out.json", "markdown": tmp_path / "out.md"}
    flags = (f"--{flag}={path}" for flag, path in files.items())
    script(name, "--preset=smoke", f"--cases={case}", "--seconds=0", *flags)
    document = read(files["json"])
    assert document["environment"]["command"].startswith(f"python benchmarks/{name}")
    cells = document["tables"][table]
    assert len(cells) == count
    assert {cell["status"] for cell in cells if cell["implementation"] == "xla"} == {"ok"}
    kernels = [cell for cell in cells if cell["implementation"] == "mosaic_gpu"]
    assert {cell["status"] for cell in kernels} == {"unsupported"}
    assert line in files["markdown"].read_text()
    script(name, "--preset=smoke", "--budget_minutes=0", f"--json={files['json']}")
    cells = read(files["json"])["tables"][table]
    assert {cell["reason"] for cell in cells} == {"time is up"}


@pytest.mark.aot
def test_decode_bench_for_a_target():
    out, _ = script(
        "decode_bench.py", "--preset=smoke", "--target=h200", "--cases=mla", "--implementations=xla"
    )
    assert "Compiled for h200, not measured" in out
    assert "MiB" in out or "KiB" in out


@needs_kernels
@pytest.mark.aot
def test_tune_hopper(tmp_path):
    path = tmp_path / "block_sizes.json"
    tile_table.write(tile_table.read(), path)
    out, _ = script(
        "tune_hopper.py", "--mode=compile", "--kernels=query_grad", "--kinds=full",
        "--head_dims=192/128", "--write", f"--path={path}",
    )  # fmt: skip
    lines = [line for line in out.splitlines() if line.startswith("query_grad full 192/128")]
    assert len(lines) >= 2 and all("compiler" not in line for line in lines)
    document = read(path)
    (row,) = [
        row
        for row in document["rows"]
        if row.get("run") in document["provenance"]
        and row["kernel"] == "query_grad"
        and row["kind"] == "full"
        and (row["head_dim"], row["value_head_dim"]) == (192, 128)
    ]
    assert row["how"] == "compiled" and set(row["block_sizes"]) >= {"block_kv", "key_stages"}
    run = document["provenance"][row["run"]]
    assert run["target"] == "h200" and run["command"].startswith("python benchmarks/tune_hopper.py")


# ---- caches -------------------------------------------------------------------------------------


@pytest.mark.ci
def test_kv_cache_bench(tmp_path):
    files = [tmp_path / f"out{suffix}" for suffix in (".json", ".csv", ".md")]
    flags = "--preset=smoke", "--target=cpu", "--seconds=0"
    text, err = script("kv_cache_bench.py", *flags, f"--output={','.join(map(str, files))}")
    assert err == ""
    assert "MQA, K=1: N=4 H=128, 2 x 1024 tokens" in text and "264 B" in text and "512 B" in text
    assert "16.00 GiB" in text and "1.00 GiB" in text and "17.18 GB" in text
    assert "FAILED" not in text
    document = read(files[0])
    found = document["tables"]
    assert list(found) == ["bytes", "million", "trace", "error", "steps"]
    assert all(found.values()) and document["failures"] == []
    for row in found["bytes"] + found["million"]:
        assert row["compiled_bytes"] == row["layer_bytes"] == row["claimed_bytes"]
    assert document["environment"]["command"].startswith("python benchmarks/kv_cache_bench.py")
    assert len(files[1].read_text().splitlines()) == 2 + sum(map(len, found.values()))
    assert "| Cache | dtype | Token, head |" in files[2].read_text()


@pytest.mark.aot
def test_kv_cache_bench_for_targets():
    flags = "--preset=smoke", "--tables=bytes,million", "--target=v5p,h200"
    out, _ = script("kv_cache_bench.py", *flags)
    assert "compiled for v5p" in out and "compiled for h200" in out


@pytest.mark.ci
def test_generate_bench(tmp_path):
    path = tmp_path / "out.json"
    out, err = script("generate_bench.py", "--preset=smoke", f"--output={path}")
    assert err == ""
    assert "Prompt processing (time to first token): 9 tokens" in out
    assert "Token generation: 5 tokens" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("MQA, K=1")]
    assert [line[2] for line in lines] == ["none", "dense", "ring", "paged"] * 2
    found = read(path)["tables"]
    for table, count in (("prompt", 2), ("generation", 8)):
        for row in found[table]:
            assert row["n"] == count and row["median"] > 0 and row["rate"] > 0
    assert found["generation"][1]["speedup"] > 0


# ---- layers, and many chips ---------------------------------------------------------------------


@pytest.mark.ci
def test_layer_bench(tmp_path):
    files = [tmp_path / "out.md", tmp_path / "out.json"]
    out, _ = script(
        "layer_bench.py", "--models=tiny", "--layers=MultiQueryAttention,LatentAttention",
        "--dtype=float32", "--implementations=einsum,xla_chunked,jax_nn", "--tables=models",
        "--num_runs=2", "--warmup=0", f"--output={','.join(map(str, files))}",
    )  # fmt: skip
    assert "median of 2 runs after 0" in out and "+-" in out
    tables = read(files[1])["tables"]
    assert len(tables["models"]) == 3 + 5
    for cell in tables["models"]:
        assert cell["time"] or cell["reason"], cell
    assert {row["layer"] for row in tables["best"]} == {"MultiQueryAttention", "LatentAttention"}
    text = files[0].read_text("utf-8")
    assert "LatentAttention" in text and "this layer has none" in text


@pytest.mark.ci
def test_layer_benchs_best_is_of_the_models_tables(tmp_path):
    """Rows of the optimisations are compared with others than einsum; no sweeps, no picture."""
    png = tmp_path / "none.png"
    out, _ = script(
        "layer_bench.py", "--models=tiny", "--layers=GroupedQueryAttention", "--num_runs=1",
        "--warmup=0", "--implementations=einsum,xla", "--tables=models,optimisations",
        f"--plot={png}",
    )  # fmt: skip
    assert "head by head" in out and "one QKV product" in out
    best = out.split("Best against einsum")[1]
    assert "xla *" in best and "default" not in best
    assert not png.exists() and "is not drawn: there are no sweeps" in out


@pytest.mark.ci
def test_layer_benchs_report_with_a_picture(tmp_path):
    """Of sweeps, here compiled for this machine."""
    path, png = tmp_path / "report.md", tmp_path / "sweeps.png"
    script(
        "layer_bench.py", "--target=cpu", "--models=tiny", "--tables=length", "--lengths=8,16",
        "--hidden=128", "--dtype=float32", "--implementations=einsum,xla_chunked",
        f"--output={path}", f"--plot={png}",
    )  # fmt: skip
    assert png.read_bytes()[:4] == b"\x89PNG"
    text = path.read_text("utf-8")
    assert "![sweeps](sweeps.png)" in text and "by seq len" in text


@pytest.mark.ci
def test_scale_bench(tmp_path):
    files = [tmp_path / "out.md", tmp_path / "out.json"]
    script(
        "scale_bench.py", "--preset=smoke", "--chips=4", "--heads=4/2",
        "--strategies=ring,ulysses", f"--output={','.join(map(str, files))}",
    )  # fmt: skip
    tables = read(files[1])["tables"]
    assert [cell["strategy"] for cell in tables["layer"]] == ["ring", "ulysses"]
    assert [cell["dtype"] for cell in tables["decode"]] == ["bfloat16", "int8"]
    for cell in (*tables["layer"], *tables["decode"]):
        assert cell["status"] == "ok" and cell["memory_bytes"] > 0
        assert sum(cell["sent"].values()) > 0
    text = files[0].read_text("utf-8")
    assert "compiled for cpu, nothing was run" in text and "upper bounds" in text
