"""What the scripts say of a command line that they do not take: the error, and its flag's help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.markdown import ROOT

WRONG = {
    "benchmarks/attention_bench.py": {
        "--dtypes=int8": "--dtypes: takes some of float32, bfloat16, float16, got 'int8'",
        "--heads=4,x,8": "--heads: takes 3 numbers above 0, with ',' between them, got '4,x,8'",
        "--heads=4,3,8": "--heads: takes key/value heads that divide 4, got 3",
        "--cases=huge": "--cases: 'huge' is in none of fwd/128, ",
        "--implementation=xlb": "value should be one of <xla|",
        "--seconds=-1": "-1.0 is not a non-negative number",
    },
    "benchmarks/crossover_bench.py": {
        "--heads=1/2/3": "--heads: takes 2 numbers above 0, with '/' between them, got '1/2/3'",
        "--heads=3/2": "--heads: takes key/value heads that divide the heads, got 3/2",
        "--rows=1/64/16/2/128/float32": "--rows: takes B/T/N/K/H/dtype/direction, got '1/64/",
        "--rows=1/64/3/2/8/float32/fwd": "--rows: takes key/value heads that divide",
        "--lengths=0": "--lengths: takes one or more numbers above 0",
        "--directions=bwd": "--directions: takes some of fwd, fwd+bwd, got 'bwd'",
    },
    "benchmarks/decode_bench.py": {
        "--implementations=xlb": "--implementations: takes some of mosaic_gpu, ",
        "--json=out.csv": "--json: 'out.csv' does not end in .json",
        "--target=v99": "--target: target='v99' is unknown",
        "--preset=huge": "value should be one of <issue|smoke>",
    },
    "benchmarks/generate_bench.py": {
        "--caches=sparse/int8": "--caches: 'sparse/int8' is unknown",
        "--caches=dense": "--caches: 'dense' is unknown",
        "--kv_heads=a": "--kv_heads: takes one or more numbers above 0",
        "--kv_heads=3": "kv_heads must divide heads, 8, got 3",
        "--hidden=7": "hidden must be a multiple of 2 * heads, got 7",
        "--generated=1": "1 is not integer >= 2",
    },
    "benchmarks/kernel_bench.py": {
        "--directions=up": "--directions: takes some of fwd, bwd, fwd+bwd, got 'up'",
        "--markdown=nowhere/out.md": "--markdown: 'nowhere/out.md': the folder does not exist",
    },
    "benchmarks/kv_cache_bench.py": {
        "--tables=bits": "--tables: takes some of bytes, million, trace, error, steps, got 'bits'",
        "--dtypes=int2": "--dtypes: takes some of float32, ",
        "--kv_heads=4,x": "got '4,x'",
        "--kv_heads=3": "kv_heads must divide heads",
        "--target=v99": "--target: target='v99' is unknown",
        "--output=out.xml": "--output: 'out.xml'",
    },
    "benchmarks/layer_bench.py": {
        "--layers=": "--layers: takes one or more of MultiHeadAttention",
        "--hidden=": "--hidden: takes one or more numbers",
        "--models=gpt": "--models: 'gpt' is unknown; it takes deepseek-v3",
        "--implementations=fast": "--implementations: 'fast' is unknown",
        "--hidden=100": "--hidden: takes multiples of 128, got '100'",
        "--target=v99": "--target: target='v99' is unknown",
    },
    "benchmarks/mqa_bench.py": {
        "--configs=1/2": "--configs: configuration '1/2' takes model_dim/heads/kv_heads/seq_len",
        "--directions=up": "--directions: 'up'",
        "--dtypes=int8": "--dtypes: 'int8'",
        "--implementations=xlb": "--implementations: 'xlb'",
        "--target=v99": "v99",
        "--output=out.xml": "--output: 'out.xml'",
        "--norun": "--norun without --target leaves nothing to do",
        "--batch=x": "invalid literal for int()",
        "--plot=out.jpg": "--plot: 'out.jpg'",
    },
    "benchmarks/scale_bench.py": {
        "--strategies=star": "--strategies: takes some of ring, gather, ulysses, got 'star'",
        "--directions=": "--directions: takes some of fwd, fwd+bwd",
        "--heads=32/5": "--heads: takes query heads and a divisor of them",
        "--chips=four": "--chips: takes one or more numbers above 0",
        "--head_ways=3": "--head_ways: takes a divisor of all --chips, got 3 of 4",
        "--target=v99": "--target: target='v99' is unknown",
    },
    "benchmarks/tpu_roofline.py": {
        "--target=v99": "value should be one of <v4|",
        "--heads=1/2": "--heads: takes 3 numbers above 0, with '/' between them, got '1/2'",
        "--lengths=x": "--lengths: takes one or more numbers above 0",
    },
    "benchmarks/trace_bench.py": {
        "--heads=4/2": "--heads: takes 3 numbers above 0, with '/' between them, got '4/2'",
        "--target=v99": "value should be one of <a100|",
        "--length=0": "0 is not a positive integer",
    },
    "benchmarks/tune_hopper.py": {
        "--kinds=empty": "--kinds: takes some of full, masked, ",
        "--kernels=fwd": "--kernels: takes some of forward, query_grad, key_grad, got 'fwd'",
        "--head_dims=100": "--head_dims: takes some of 64, ",
        "--shape=1,2": "--shape: takes 4 numbers above 0",
        "--target=v99": "--target: target='v99' is unknown",
    },
    "examples/evaluate.py": {"--chunk_size=x": "invalid literal for int()"},
    "examples/multihost.py": {
        "--process_id=1": "--process_id goes with --coordinator=HOST:PORT",
        "--layout=odd": "value should be one of <",
    },
    "examples/train.py": {"--seed=x": "invalid literal for int()"},
}

# All in one process, as if each were the first: JAX is imported once.
DRIVER = """
import contextlib, io, json, runpy, sys
from absl import app, flags

def said(script, argument):
    before, out, err = set(flags.FLAGS), io.StringIO(), io.StringIO()
    sys.argv = [script, argument]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    return code, out.getvalue(), err.getvalue()

sys.path.insert(0, "")
print(json.dumps([said(*given) for given in json.load(sys.stdin)]))
"""


@pytest.mark.ci
def test_errors_come_with_the_help_of_their_flag():
    asked = [
        (script, argument)
        for script, arguments in WRONG.items()
        for argument in ("--nope=1", "what", *arguments)
    ]
    scripts = {f"{path.parent.name}/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts <= set(WRONG)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for (script, argument), (code, out, err) in zip(asked, json.loads(done.stdout), strict=True):
        flag = re.fullmatch(r"--(?:no)?(\w+).*", argument)
        known = argument in WRONG[script]
        want = WRONG[script].get(argument, argument.split("=")[0].strip("-"))
        assert (code, out) == (1, ""), (script, argument)
        lines = err.splitlines()
        assert want in lines[0], (script, argument, lines)
        assert len(lines) <= 12, (script, argument, lines)
        helped = [line for line in lines[1:] if re.match(r"  --(\[no\])?\w+: ", line)]
        if known and flag:
            assert any(f"{flag[1]}:" in line for line in helped), (script, argument, lines)
        else:
            assert not helped and "  Flags: --" in err, (script, argument, lines)
        assert lines[-1] == f"All flags: python {script} --help"


@pytest.mark.parametrize("script", ["kernel_bench.py", "decode_bench.py"])
def test_help_has_the_flags_that_scripts_share(script):
    text = (ROOT / "benchmarks" / script).read_text("utf-8")
    assert "flags.adopt_module_key_flags(kernel_script)" in text
