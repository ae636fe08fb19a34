"""Two processes train and generate as one does; what does not fit is said before anything starts."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples import checkpoint, data, generation, multihost, processes, sharding
from examples.caches import make_caches
from examples.decoder import Config, Decoder

pytestmark = pytest.mark.ci
ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS, LENGTH = 4, 128
SMALL = ["--layers=2", f"--batch_size={ROWS}", f"--length={LENGTH}", "--steps=3"]


def script(*arguments, timeout=240):
    """Exit status, standard output and standard error; nothing that it started is left."""
    command = [sys.executable, str(ROOT / "examples/multihost.py"), *SMALL, *arguments]
    # Compiling is most of the time.
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # all have ended
                pass
    return process.returncode, out, err


def results(*arguments):
    """Steps' figures [3, 3], the lines of what was generated, and the line about devices."""
    status, out, err = script(*arguments)
    assert status == 0, err
    steps = re.findall(r"^step \d: loss (\S+), gradient (\S+), update (\S+)$", out, re.M)
    rows = re.findall(r"^row \d: .*$", out, re.M)
    return np.array(steps, float), rows, re.findall(r"^\d+ devices in .*$", out, re.M)


@functools.cache
def steps_of_one():
    steps, _, devices = results("train", "--cpu_devices=1")
    assert devices == ["1 devices in 1 processes: data 1 x context 1 x model 1"]
    return steps


@functools.cache
def rows_of_one():
    """By `generate`, over caches of one device."""
    prompts, answers = data.needles(0, LENGTH, ROWS)
    model, count = checkpoint.load(), answers.shape[1]
    generated = generation.jit_generate(
        model,
        make_caches(model.config, "dense", ROWS, LENGTH + count),
        prompts,
        max_new_tokens=count,
        stop_token=data.STOP,
    )
    return [
        f"row {i}: {data.decode(prompts[i, -6:])} {data.decode(tokens)}"
        for i, tokens in enumerate(np.asarray(generated.tokens))
    ]


@pytest.mark.parametrize(
    ("arguments", "mesh"),
    [
        # Parts of texts in different processes; in each, parts of heads.
        (["--context=2", "--model=2"], "data 1 x context 2 x model 2"),
        # Rows of the batch in different processes.
        pytest.param(
            ["--context=2", "--layout=zigzag"],
            "data 2 x context 2 x model 1",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_two_processes_do_as_one(arguments, mesh):
    steps, rows, devices = results("--simulate=2", "--cpu_devices=2", *arguments)
    assert devices == [f"4 devices in 2 processes: {mesh}"]
    want = steps_of_one()
    assert want.shape == (3, 3) and (want[:, 1:] > 0.01).all()
    assert (np.diff(want[:, 0]) < -0.05).all()  # so that a wrong update would show
    np.testing.assert_allclose(steps, want, rtol=1e-4)
    assert rows == rows_of_one()


@pytest.fixture
def parsed_flags():
    if not multihost.flags.FLAGS.is_parsed():
        multihost.flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(context=3), r"data x model x context takes sizes of 4 devices in all, got 1 x 1 x 3"),
        (dict(data=4, model=2), r"got 4 x 2 x 1 = 8"),
        (dict(batch_size=6), "batch takes a multiple of data = 4, got 6"),
        (dict(context=4, length=130), "length takes a multiple of context = 4, got 130"),
        (dict(context=4, length=132, layout="zigzag"), "multiple of 2 x context = 8, got 132"),
        (dict(simulate=3, cpu_devices=1, model=3), "heads takes a multiple of model = 3, got 4"),
        (dict(length=40), "length must be at least"),
        (dict(coordinator="here:1"), "--coordinator=HOST:PORT takes --num_processes"),
        (
            dict(num_processes=2, coordinator=None),
            "--num_processes goes with --coordinator=HOST:PORT",
        ),
        (
            dict(process_id=1, coordinator="h:1", num_processes=1),
            "--process_id takes 0 to 0, got 1",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    parsed_flags, monkeypatch, given, message
):
    monkeypatch.setattr(processes, "run_together", lambda commands: pytest.fail("started"))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: pytest.fail("started"))
    if "coordinator" not in given:
        given = dict(simulate=2, cpu_devices=2) | given
    with flagsaver.flagsaver(**given), pytest.raises(app.UsageError, match=message):
        multihost.main(["multihost.py"])


def test_one_that_fails_ends_the_others():
    start = time.monotonic()
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    fails = [sys.executable, "-c", "import sys; sys.exit(7)"]
    assert processes.run_together([sleeps, fails, sleeps]) == 7
    assert time.monotonic() - start < 30
    assert processes.run_together([[sys.executable, "-c", ""]] * 2) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_signals_end_all(number, status):
    # In one piece: both write to one pipe.
    sleeps = r"import os, time; os.write(1, b'%d\n' % os.getpid()); time.sleep(60)"
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from examples import processes\n"
        f"processes.run_together([[sys.executable, '-c', {sleeps!r}]] * 2)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        started = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(number)
        assert process.wait(30) == status
    for one in started:
        with pytest.raises(ProcessLookupError):
            os.kill(one, 0)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "context", "model"), (jax.sharding.AxisType.Auto,) * 3)


def config(kv_heads):
    return Config(11, 16, heads=4, kv_heads=kv_heads, head_dim=8, windows=(7,), hidden=32)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_parameters_made_on_the_mesh_are_those_of_one_device(mesh, kv_heads):
    def make():
        return Decoder(config(kv_heads), rngs=nnx.Rngs(3))

    graphdef, state = sharding.made(make, mesh)
    want = nnx.state(make())
    jax.tree.map(np.testing.assert_array_equal, state, want)
    block = nnx.merge(graphdef, state).blocks[0]
    specs = {
        "query": P(None, "model", None),
        "key": P(None, "model", None) if kv_heads == 2 else P(),
        "out": P("model", None, None),
    }
    for name, spec in specs.items():
        kernel = getattr(block.attention, name).kernel[...]
        assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), kernel.ndim), name
    assert block.up.kernel[...].sharding.spec == P(None, "model")
    again = nnx.state(sharding.placed(make(), mesh))
    jax.tree.map(np.testing.assert_array_equal, again, want)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, again, state))


def test_a_process_loads_what_its_devices_have(mesh):
    asked = []

    def load(rows, columns):
        asked.append((rows.tolist(), columns.tolist()))
        return 10 * rows[:, None] + columns

    array = sharding.from_own(load, (4, 6), mesh, sharding.TOKENS)
    assert asked == [([0, 1, 2, 3], [0, 1, 2, 3, 4, 5])]
    np.testing.assert_array_equal(array, 10 * np.arange(4)[:, None] + np.arange(6))
    assert array.sharding.shard_shape(array.shape) == (2, 3)


def test_a_process_may_have_parts_that_are_apart():
    class Sharding:
        def addressable_devices_indices_map(self, shape):
            assert shape == (6, 4)
            return {
                i: (slice(*rows), slice(None)) for i, rows in enumerate([(4, 6), (0, 2), (4, 6)])
            }

    rows, columns = sharding.own_indices(Sharding(), (6, 4))
    assert rows.tolist() == [0, 1, 4, 5] and columns.tolist() == [0, 1, 2, 3]
