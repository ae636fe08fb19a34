"""How long JAX takes to trace, lower and compile a layer and a call, and how much code that runs.

    python benchmarks/trace_bench.py                          # for this machine
    python benchmarks/trace_bench.py --target=h200            # for a chip that is not here
    python benchmarks/trace_bench.py --nocompile --length=4096

Every program is made anew in the same process (``jax.clear_caches()`` before each), one after the
other, ``--rounds`` times; a figure is the least of these. "Made" is tracing and lowering together:
where an implementation is chosen by platform, its code is traced when the program is lowered.
"vs. Flax, jax.nn" compares a layer with Flax's own of the same size (multi-head), and a call with
jax.nn's; "vs. named" compares None with the implementation that it takes. "Code" and "Files" count
the functions of axattn that run while a program is made, and the files that they are in.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

import axattn
from axattn import aot, linen
from axattn._implementations import registry
from benchmarks.harness import command, environment, functions, tables, trace_rows
from benchmarks.harness.trace_rows import Program

_TARGET = flags.DEFINE_enum("target", None, sorted(aot.TARGETS), "a chip that need not be here")
_LENGTH = flags.DEFINE_integer("length", 2048, "T = S", lower_bound=1)
_HEADS = flags.DEFINE_string("heads", "16/2/128", "query heads/kv heads/head size")
_FEATURES = flags.DEFINE_integer("features", 1024, "of a layer's inputs", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 4, "programs of each kind", lower_bound=1)
_COMPILE = flags.DEFINE_bool("compile", True, "compile the programs, too")


def programs(heads: int, kv_heads: int, size: int, place: Callable[[Any], Any]) -> list[Program]:
    """Layers and calls in both directions; ``place`` gives shapes a device."""
    dtype, causal = jnp.bfloat16, dict(is_causal=True)
    names = (None, *registry.IMPLEMENTATIONS)

    x = place(jax.ShapeDtypeStruct((1, _LENGTH.value, _FEATURES.value), dtype))
    sizes = dict(num_heads=heads, qkv_features=heads * size, use_bias=False, dtype=dtype)
    grouped = functools.partial(linen.MultiHeadDotProductAttention, num_kv_heads=kv_heads, **sizes)
    found = []

    def add_layer(name: str, layer: nn.Module, **options: Any) -> None:
        # No parameter depends on the implementation, and some have no device here.
        shaped = layer.clone(implementation="xla") if name != "flax" else layer
        init = functools.partial(shaped.init, **options)
        params = place(jax.eval_shape(init, jax.random.key(0), x))
        fn = functools.partial(layer.apply, **options)
        for direction in functions.DIRECTIONS:
            jitted = functions.in_direction(fn, direction)
            found.append(Program("layer", name, direction, jitted, (params, x)))

    for name in names:
        add_layer(str(name), grouped(implementation=name), **causal)
    add_layer("flax", nn.MultiHeadDotProductAttention(**sizes))

    shapes = [(1, _LENGTH.value, n, size) for n in (heads, kv_heads, kv_heads)]
    arrays = tuple(place(jax.ShapeDtypeStruct(shape, dtype)) for shape in shapes)
    calls = {
        str(name): functools.partial(axattn.dot_product_attention, implementation=name, **causal)
        for name in names
    }
    calls["jax.nn"] = functools.partial(jax.nn.dot_product_attention, **causal)
    for name, fn in calls.items():
        for direction in functions.DIRECTIONS:
            jitted = functions.in_direction(fn, direction)
            found.append(Program("call", name, direction, jitted, arrays))
    return found


def main(argv: Sequence[str]) -> None:
    try:
        sizes = command.numbers(_HEADS, _HEADS.value, count=3, split="/")
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    environment.choose_backend()
    where = dataclasses.replace(environment.describe(), command=environment.command_line(sys.argv))
    chip = aot.target(_TARGET.value or "cpu")
    try:
        device = aot.device(chip) if chip.platform != "cpu" else jax.devices()[0]
    except aot.MissingCompilerError as error:
        raise app.UsageError(f"--target: {error}") from None
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(tree):
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    console = Console()
    console.print(f"{where.header()}\n", soft_wrap=True, highlight=False, markup=False)
    with aot.tracing_for(chip):
        found = programs(*sizes, place)
        for _ in range(_ROUNDS.value):
            for program in found:
                if not program.reason:
                    trace_rows.measure(program, _COMPILE.value)
        for program in found:
            if not program.reason:
                trace_rows.count_code(program)
    # The last ones are calls.
    why = axattn.explain_implementations(*found[-1].args, is_causal=True, target=_TARGET.value)
    stream = tables.Stream(console, trace_rows.columns(found, why.chosen, _COMPILE.value))
    stream.header()
    for program in found:
        stream.row(program)


if __name__ == "__main__":
    command.run(main)
