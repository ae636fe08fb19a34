"""The scripts as a user calls them."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from absl import app
from absl.testing import flagsaver

from benchmarks import mqa_bench
from benchmarks.harness import cases, jobs, output

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}
TINY = ["--configs=32/2/1/8", "--dtypes=float32", "--min_time=0.001", "--repetitions=2"]


def script(name, *args, timeout=120):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *args],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=timeout,
    )


@pytest.fixture(autouse=True, scope="module")
def parsed_flags():
    if not mqa_bench.flags.FLAGS.is_parsed():
        mqa_bench.flags.FLAGS.mark_as_parsed()


def test_mqa_bench(tmp_path):
    files = [tmp_path / f"out{suffix}" for suffix in (".json", ".csv", ".md")]
    plot = tmp_path / "out.png"
    done = script(
        "mqa_bench.py",
        *TINY,
        "--directions=fwd,decode",
        "--implementations=xla,repeat_kv,cudnn",
        f"--output={','.join(map(str, files))}",
        f"--plot={plot}",
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("MQABenchmark/32/2/1/8")]
    assert [line.split()[1] for line in lines] == ["repeat_kv", "xla", "cudnn"] * 2
    assert "unsupported: implementation" in done.stdout
    assert done.stderr == ""  # no terminal, no progress
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"directions": ["up"]}, "--directions: 'up'"),
        ({"dtypes": ["int8"]}, "--dtypes: 'int8'"),
        ({"preset": "axlearn", "directions": ["fwd"], "configs": ["1/2"]}, "configuration '1/2'"),
        ({"implementations": ["xlb"]}, "--implementations: 'xlb'"),
        ({"target": ["v99"]}, "v99"),
        ({"output": ["out.xml"]}, "--output: 'out.xml'"),
        ({"plot": "out.jpg"}, "--plot: 'out.jpg'"),
    ],
)
def test_strict_flags(given, message):
    with flagsaver.flagsaver(**given), pytest.raises(app.UsageError, match=message):
        mqa_bench.main(["mqa_bench.py"])


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


@pytest.mark.ci
@pytest.mark.parametrize("name", ["attention_bench.py", "crossover_bench.py"])
def test_function_benchmarks(name):
    arguments = {
        "attention_bench.py": ["--cases=fwd/128,decode", "--heads=4,2,8", "--dtypes=float32"],
        "crossover_bench.py": ["--shapes=1/4/2/8", "--lengths=8,16"],
    }
    done = script(name, *arguments[name], "--seconds=0")
    assert done.returncode == 0, done.stderr
    assert "float32" in done.stdout


def wanted(platform=None, **flags):
    with flagsaver.flagsaver(**flags):
        return mqa_bench.make_jobs(platform)


def test_targets_may_be_repeated_or_listed():
    made = wanted(target=["v5p,h100", "v5p"], preset="smoke", directions=["decode"])
    assert list(dict.fromkeys(job.where for job in made)) == ["v5p", "h100"]
    assert all(isinstance(job, jobs.Compile) for job in made)


def test_axlearn_on_v5p_asks_for_every_implementation():
    made = wanted(target=["v5p"], preset="axlearn", directions=["fwd", "decode"])
    names = [job.case.name for job in made if job.case.implementation == "repeat_kv"]
    assert names == [
        "MQABenchmark/2048/16/2/1024",
        "MQABenchmark/4096/16/2/1024",
        "MQABenchmark/4096/16/2/4096",
        "MQABenchmark/4096/16/2/8192",
        "MQABenchmark/2048/16/2/32768",
    ]
    assert {"repeat_kv", "xla", "xla_chunked"} <= {job.case.implementation for job in made}


def test_here_comes_before_targets():
    made = wanted("cpu", target=["v5p"], preset="smoke")
    places = [job.where for job in made]
    assert places == sorted(places, key=lambda place: place != "here")
    assert {"here", "v5p"} == set(places)


def test_the_baseline_is_first():
    made = wanted("cpu", implementations=["xla", "repeat_kv"], preset="smoke", directions=["fwd"])
    assert [job.case.implementation for job in made[:2]] == ["repeat_kv", "xla"]


@pytest.mark.aot
def test_a_target_that_is_not_here(tmp_path):
    path = tmp_path / "out.json"
    done = script(
        "mqa_bench.py",
        "--configs=64/4/1/32,4096/16/2/65536",
        "--directions=fwd",
        "--dtypes=bfloat16",
        "--implementations=repeat_kv",
        "--target=v5p",
        f"--output={path}",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    small, large = output.read(path)[0]
    assert small.memory_kind == "HBM" and small.memory_bytes > 0 and small.flops > 0
    assert small.time is None
    assert large.status == "out_of_memory" and large.requested_bytes > large.available_bytes


@pytest.mark.aot
def test_the_star_is_what_the_target_takes():
    from axattn import aot

    try:
        aot.check_installed(aot.target("v5p"))
    except aot.MissingCompilerError as error:
        pytest.skip(str(error))
    config = cases.parse_config("512/4/1/512")
    for name in ("xla_chunked", "mosaic_tpu"):
        case = cases.Case(config, name, 1, "bfloat16", "fwd")
        row = jobs._compile(jobs.Compile(case, "v5p"))
        assert row.is_default == (name == "mosaic_tpu")
