"""What a key/value cache costs: bytes, by hand and by the compiler; error; time of a step.

    python benchmarks/kv_cache_bench.py
    python benchmarks/kv_cache_bench.py --tables=bytes,million --target=v5p,h200
    python benchmarks/kv_cache_bench.py --tables=trace --page_size=64 --tokens=32768

Tables:
  bytes    what a cache takes at the model's shape, and whether the compiled program agrees
  million  one sequence of 2**20 tokens: what repeating key/value heads for each query head takes
  trace    slots reserved against tokens stored while requests of mixed lengths come and go
  error    what short types do to the output of attention
  steps    time of a decoding step on this machine, by tokens in the cache and by room for them

"Compiled" is the memory of the donated cache that the result takes over in a program which appends
a token to each row of one layer's cache; totals are that times the layers. It has to be what the
arithmetic says, rounded up to the compiler's tiles (and to pages, which the arithmetic does too):
where it is not, the row says so and the exit status is 1. Without --target programs are compiled
for v5p where libtpu is installed, else for this CPU.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axattn import aot
from benchmarks.harness import (
    cache_report,
    cache_sizes,
    command,
    environment,
    jobs,
    output,
    sections,
)

TABLES = ("bytes", "million", "trace", "error", "steps")

_PRESET = flags.DEFINE_enum(
    "preset", "default", sorted(cache_report.PRESETS), "sizes of everything"
)
_TABLES = flags.DEFINE_list("tables", [*TABLES], "which")
_LAYERS = flags.DEFINE_integer("layers", None, "of the model", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", None, "query heads", lower_bound=1)
_KV_HEADS = flags.DEFINE_list("kv_heads", None, "key/value heads, a table for each")
_HEAD_DIM = flags.DEFINE_integer("head_dim", None, "head size", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", None, "per row, at most", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", None, "rows", lower_bound=1)
_PAGE_SIZE = flags.DEFINE_integer("page_size", None, "tokens per page", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", None, f"of {', '.join(cache_sizes.BITS)}")
_TARGET = flags.DEFINE_multi_string(
    "target", [], "compile for this chip (v5p, h200, cpu, ...); repeatable, or separated by commas"
)
_SECONDS = flags.DEFINE_float(
    "seconds", 1.0, "time to measure the steps of a kind and dtype for", lower_bound=0
)
_OUTPUT = flags.DEFINE_list("output", [], "files to write: .json, .csv, .md")


def sizes() -> cache_report.Sizes:
    """The preset, with what flags replace of it; ValueError for what cannot be."""
    given = {
        flag.name: flag.value
        for flag in (_LAYERS, _HEADS, _HEAD_DIM, _TOKENS, _BATCH, _PAGE_SIZE)
        if flag.value is not None
    }
    if _KV_HEADS.value is not None:
        given["kv_heads"] = tuple(command.numbers(_KV_HEADS))
    if _DTYPES.value is not None:
        given["dtypes"] = tuple(command.names(_DTYPES, cache_sizes.BITS))
    return dataclasses.replace(cache_report.PRESETS[_PRESET.value], **given)


def targets() -> list[str]:
    """--target as a list without repetitions, or the compiler that there is."""
    named = jobs.named_targets(_TARGET.value)
    if named:
        return named
    try:
        aot.check_installed(aot.target("v5p"))
    except aot.MissingCompilerError:
        return ["cpu"]
    return ["v5p"]


def main(argv: Sequence[str]) -> int:
    try:
        files = [output.check_path(path) for path in _OUTPUT.value]
        asked = sizes()
        command.names(_TABLES, TABLES)
        jobs.check_targets(targets())
        chips = [aot.target(name) for name in targets()]
    except (ValueError, ImportError) as error:
        raise app.UsageError(str(error)) from None
    environment.choose_backend()
    for chip in chips:
        aot.device(chip)  # before JAX starts: it prepares the environment
    where = dataclasses.replace(environment.describe(), command=environment.command_line(sys.argv))
    out = sections.Sections(where)
    names = [chip.name for chip in chips]
    makers = {
        "bytes": lambda: cache_report.bytes_tables(out, asked, names),
        "million": lambda: cache_report.million_tables(out, names),
        "trace": lambda: cache_report.trace_table(out, asked),
        "error": lambda: cache_report.error_table(out, asked),
        "steps": lambda: cache_report.steps_table(out, asked, _SECONDS.value),
    }
    interrupted = False
    try:
        for name in TABLES:
            if name in _TABLES.value:
                makers[name]()
    except KeyboardInterrupt:
        interrupted = True
        out.print("\ninterrupted")
    out.close()
    for path in files:
        out.write(path)
    if interrupted:
        return 130
    return 1 if out.failures else 0


if __name__ == "__main__":
    command.run(main)
