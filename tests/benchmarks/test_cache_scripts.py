"""``kv_cache_bench.py`` and ``generate_bench.py`` as a user calls them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def script(name, *args, timeout=240):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *args],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=timeout,
    )


def test_kv_cache_bench(tmp_path):
    files = [tmp_path / f"out{suffix}" for suffix in (".json", ".csv", ".md")]
    done = script(
        "kv_cache_bench.py",
        "--preset=smoke",
        "--target=cpu",
        "--seconds=0",
        f"--output={','.join(map(str, files))}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text = done.stdout
    assert "MQA, K=1: N=4 H=128, 2 x 1024 tokens" in text and "264 B" in text and "512 B" in text
    assert "16.00 GiB" in text and "1.00 GiB" in text and "17.18 GB" in text
    assert "FAILED" not in text
    document = json.loads(files[0].read_text())
    found = document["tables"]
    assert list(found) == ["bytes", "million", "trace", "error", "steps"]
    assert all(found.values()) and document["failures"] == []
    for row in found["bytes"] + found["million"]:
        assert row["compiled_bytes"] == row["layer_bytes"] == row["claimed_bytes"]
    assert document["environment"]["command"].startswith("python benchmarks/kv_cache_bench.py")
    assert len(files[1].read_text().splitlines()) == 2 + sum(map(len, found.values()))
    assert "| Cache | dtype | Token, head |" in files[2].read_text()


@pytest.mark.aot
def test_kv_cache_bench_on_targets():
    arguments = ["--preset=smoke", "--tables=bytes,million", "--target=v5p,h200"]
    done = script("kv_cache_bench.py", *arguments, timeout=480)
    assert done.returncode == 0, done.stderr
    assert "compiled for v5p" in done.stdout and "compiled for h200" in done.stdout


def test_generate_bench(tmp_path):
    path = tmp_path / "out.json"
    done = script(
        "generate_bench.py",
        "--preset=smoke",
        "--caches=none,dense/int8",
        f"--output={path}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Prompt processing (time to first token): 9 tokens" in done.stdout
    assert "Token generation: 5 tokens" in done.stdout
    found = json.loads(path.read_text())["tables"]
    assert [row["cache"] for row in found["prompt"]] == ["none", "dense"]
    assert [row["n"] for row in found["prompt"]] == [2, 2]
    assert [row["n"] for row in found["generation"]] == [8, 8]
    for row in found["prompt"] + found["generation"]:
        assert row["median"] > 0 and row["rate"] > 0
    assert found["generation"][1]["speedup"] > 0


@pytest.mark.ci
def test_generate_bench_smoke():
    done = script("generate_bench.py", "--preset=smoke")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("MQA, K=1")]
    assert [line[2] for line in lines] == ["none", "dense", "ring", "paged"] * 2
