"""Trains the example model, and generates with it, on the devices of several hosts.

The same command on all. On a Cloud TPU slice (once per host), under SLURM (once per GPU) or Open
MPI, JAX finds the other processes itself:

    gcloud compute tpus tpu-vm ssh NAME --worker=all \\
        --command="python examples/multihost.py --coordinator=auto --model=2 --context=2"
    srun --nodes=2 --ntasks-per-node=4 --gres=gpu:4 \\
        python examples/multihost.py --coordinator=auto --model=2 --context=2

Elsewhere, on GPU servers say, once per host, each told where the first is and which it is itself:

    python examples/multihost.py --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0
    python examples/multihost.py --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=1

On one machine, processes that stand for hosts, with simulated CPU devices:

    python examples/multihost.py --simulate=2 --cpu_devices=2 --context=2 --model=2

Without any of these: one process on the devices of this machine. "train" as the only argument only
trains, "generate" only generates. The first process prints; what it prints does not depend on how
many there are, but for rounding.
"""

from __future__ import annotations

import functools
import pathlib
import random
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import axattn.nnx
from axattn import parallel
from axattn._sharded.layouts import LAYOUTS
from benchmarks.harness import command
from examples import checkpoint, data, processes, sharding, training
from examples.decoder import Config, Decoder
from examples.generation import jit_generate

_COORDINATOR = flags.DEFINE_string("coordinator", None, 'HOST:PORT of the first process, or "auto"')
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many there are")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which one this is, from 0")
_SIMULATE = flags.DEFINE_integer("simulate", 0, "start this many processes here, on the CPU", 0)
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "simulated devices per process", 1)

_DATA = flags.DEFINE_integer("data", None, "parts of a batch; as many as devices are left", 1)
_MODEL = flags.DEFINE_integer("model", 1, "parts of heads and hidden features", 1)
_CONTEXT = flags.DEFINE_integer("context", 1, "parts of a text", 1)
_STRATEGY = flags.DEFINE_enum(
    "strategy", None, ["ring", "gather", "ulysses"], "of attention between parts of a text"
)
_LAYOUT = flags.DEFINE_enum("layout", "contiguous", LAYOUTS, "of a text's parts")

_LAYERS = flags.DEFINE_integer("layers", 4, "of the model that is trained", 1)
_STEPS = flags.DEFINE_integer("steps", 3, "of training", 1)
_BATCH = flags.DEFINE_integer("batch_size", 8, "texts of a step, on all devices", 1)
_LENGTH = flags.DEFINE_integer("length", 256, "tokens of a text, in training and of prompts", 1)
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "of AdamW")
_SEED = flags.DEFINE_integer("seed", 0, "of the first parameters and of the text")


def say(*words: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(*words, flush=True)


def train(mesh: jax.sharding.Mesh) -> None:
    """Steps from new parameters, and what came of each."""
    config = new_config()
    attend = functools.partial(
        parallel.attention,
        axes=sharding.AXES,
        mesh=mesh,
        strategy=_STRATEGY.value,
        layout=_LAYOUT.value,
    )
    attention_fn = functools.partial(axattn.nnx.dot_product_attention, attend=attend)
    positions = parallel.positions(_LAYOUT.value, _CONTEXT.value, _LENGTH.value)

    def make() -> tuple[Decoder, nnx.Optimizer]:
        model = Decoder(config, attention_fn=attention_fn, rngs=nnx.Rngs(_SEED.value))
        transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(_RATE.value))
        return model, nnx.Optimizer(model, transform, wrt=nnx.Param)

    def step(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        before = jax.tree.leaves(nnx.state(model, nnx.Param))
        value_and_grad = nnx.value_and_grad(training.loss_of, has_aux=True)
        (loss, _), gradients = value_and_grad(model, *batch, positions)
        optimizer.update(model, gradients)
        after = jax.tree.leaves(nnx.state(model, nnx.Param))
        moved = jax.tree.map(jnp.subtract, after, before)
        report = loss, optax.global_norm(gradients), optax.global_norm(moved)
        return nnx.split((model, optimizer))[1], report

    graphdef, state = sharding.made(make, mesh)
    step = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(sharding.shardings(state, mesh), NamedSharding(mesh, P())),
    )
    for i in range(_STEPS.value):
        state, report = step(state, texts(i, mesh, positions))
        loss, gradient, moved = map(float, report)
        say(f"step {i + 1}: loss {loss:.6f}, gradient {gradient:.6f}, update {moved:.6f}")


def new_config() -> Config:
    """Of the model that is trained: every other layer is local."""
    windows = tuple(7 if i % 2 == 0 else None for i in range(_LAYERS.value))
    return Config(len(data.VOCABULARY), windows=windows)


def texts(step: int, mesh: jax.sharding.Mesh, positions: np.ndarray) -> list[jax.Array]:
    """A step's tokens, those that follow them, and which of these are answers; ``[B, T]``.

    A process makes the rows, and of them keeps the tokens, that its devices get.
    """

    def load(rows: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
        rngs = [random.Random(f"{_SEED.value} {step} {row}") for row in rows]
        documents = [data.document(rng, _LENGTH.value + 1, (0.1, 0.5)) for rng in rngs]
        tokens = np.array(documents, np.int32)
        at = positions[slots]
        return [tokens[:, at], tokens[:, at + 1], data.is_answer(tokens)[:, at + 1]]

    return sharding.from_own(load, (_BATCH.value, _LENGTH.value), mesh, sharding.TOKENS)


def generate(mesh: jax.sharding.Mesh) -> None:
    """Answers of the trained model to questions about facts in long texts."""
    model = sharding.placed(checkpoint.load(), mesh)
    prompts, answers = data.needles(_SEED.value, _LENGTH.value, _BATCH.value)
    count = answers.shape[1]
    caches = sharding.caches(model.config, mesh, _BATCH.value, _LENGTH.value + count)
    given = sharding.from_own(
        lambda rows, slots: prompts[np.ix_(rows, slots)], prompts.shape, mesh, P("data")
    )
    generated = jit_generate(model, caches, given, max_new_tokens=count, stop_token=data.STOP)
    tokens = np.asarray(sharding.everywhere(generated.tokens, mesh))
    for row, row_tokens in enumerate(tokens):
        say(f"row {row}: {data.decode(prompts[row, -6:])} {data.decode(row_tokens)}")
    say(f"{(tokens == answers).all(1).sum()} of {len(tokens)} answers are right")


def start() -> None:
    """Joins the other processes; before anything else asks JAX for devices."""
    if _CPU_DEVICES.value is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if _COORDINATOR.value == "auto":
        jax.distributed.initialize()
    elif _COORDINATOR.value is not None:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


def checked(devices: int) -> dict[str, int]:
    """The mesh's axes and sizes; UsageError where they do not fit the flags."""
    try:
        shape = sharding.sizes(devices, _DATA.value, _MODEL.value, _CONTEXT.value)
        batch, length, layout = _BATCH.value, _LENGTH.value, _LAYOUT.value
        sharding.check(shape, new_config(), batch=batch, length=length, layout=layout)
        data.needle(random.Random(0), length, 0.0)  # whether a text is long enough for one
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    return shape


def simulate() -> int:
    """Runs the processes of ``--simulate`` and returns their exit status."""
    count = _SIMULATE.value
    given = ["--simulate=0", f"--cpu_devices={_CPU_DEVICES.value or 1}"]
    given += [f"--coordinator=localhost:{processes.free_port()}", f"--num_processes={count}"]
    command = [sys.executable, *sys.argv, *given]
    return processes.run_together([[*command, f"--process_id={i}"] for i in range(count)])


def check_processes() -> None:
    """UsageError for flags about processes that do not go together."""
    coordinator, count, own = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if _SIMULATE.value and coordinator is not None:
        raise app.UsageError("--simulate starts all processes: it takes no --coordinator")
    explicit = coordinator not in (None, "auto")
    for name, value in (("num_processes", count), ("process_id", own)):
        if explicit and value is None:
            raise app.UsageError(f"--coordinator=HOST:PORT takes --{name} with it, got none")
        if not explicit and value is not None:
            raise app.UsageError(f"--{name} goes with --coordinator=HOST:PORT")
    if explicit and not 0 <= own < count:
        raise app.UsageError(f"--process_id takes 0 to {count - 1}, got {own}")


def main(argv: Sequence[str]) -> int | None:
    what = {"train": train, "generate": generate}
    wanted = argv[1:] or list(what)
    for name in wanted:
        if name not in what:
            raise app.UsageError(f"takes {' and '.join(what)}, got {name!r}")
    check_processes()
    if _SIMULATE.value:
        checked(_SIMULATE.value * (_CPU_DEVICES.value or 1))
        return simulate()
    start()
    shape = checked(jax.device_count())
    mesh = sharding.make_mesh(shape)
    axes = " x ".join(f"{name} {size}" for name, size in shape.items())
    say(f"{jax.device_count()} devices in {jax.process_count()} processes: {axes}")
    for name in wanted:
        what[name](mesh)


if __name__ == "__main__":
    command.run(main, arguments=True)
