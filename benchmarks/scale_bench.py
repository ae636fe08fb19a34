"""What attention over many chips costs each of them: HBM, bytes sent, a roofline. Nothing is run.

    python benchmarks/scale_bench.py                              # v5p, 4 to 256 chips, 1M tokens
    python benchmarks/scale_bench.py --target=v6e --chips=64 --lengths=131072,524288
    python benchmarks/scale_bench.py --preset=smoke               # simulated CPU devices, no libtpu

"layer" is a grouped-query layer, projections included, in bfloat16, of one causal sequence that all
chips share out, with each strategy of `axattn.parallel.attention`. "decode" is one token for each
row of a batch, over a cache that all chips share out. libtpu compiles them for meshes of chips that
are not here. All figures are of one chip: HBM in all, its arguments and temporaries, the bytes that
it sends in permutes, gathers, reductions (of gradients of parameters, too) and all-to-alls.

"FLOPs" is arithmetic (causal: half of all pairs; backward: twice the forward). "Compiled" and
"Accessed" are the compiler's: its kernels count all pairs where positions are known at run time
only, so that they are upper bounds. "Roofline" is the longest of FLOPs, bytes accessed and bytes
sent at the chip's published rates, a permute over one link and all else over all links; no time.
"Estimate" is what `axattn.parallel.explain` reckons for the attention alone, forward.

Every cell has its own process. The exit status is 1 if a cell failed for another reason than that a
strategy does not take it or memory does not suffice, and 130 after Ctrl-C.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axattn._sharded.layouts import LAYOUTS
from benchmarks.harness import (
    command,
    environment,
    jobs,
    output,
    report,
    scale_cases,
    scale_report,
    sections,
)
from benchmarks.harness.scale_cases import DIRECTIONS, STRATEGIES, TABLES, Sizes

# What --preset sets where a flag is not given.
PRESETS = {
    "smoke": dict(
        target=["cpu"], chips=["2", "4"], lengths=["256"], heads=["4/2", "4/1"],
        directions=["fwd"], hidden=32, head_dim=8, batch=2,
    ),
}  # fmt: skip

_TARGET = flags.DEFINE_multi_string(
    "target", ["v5p"], "compile for these chips; repeatable, or separated by commas"
)
_CHIPS = flags.DEFINE_list("chips", ["4", "64", "256"], "of the mesh")
_LENGTHS = flags.DEFINE_list("lengths", ["1048576"], "tokens")
_HEADS = flags.DEFINE_list("heads", ["32/4", "32/1"], "query heads / key/value heads")
_STRATEGIES = flags.DEFINE_list("strategies", [*STRATEGIES], f"of {', '.join(STRATEGIES)}")
_DIRECTIONS = flags.DEFINE_list("directions", [*DIRECTIONS], f"of {', '.join(DIRECTIONS)}")
_LAYOUT = flags.DEFINE_enum("layout", "zigzag", LAYOUTS, "of the sequence")
_HEAD_WAYS = flags.DEFINE_integer(
    "head_ways", 1, "into which the chips share out heads, before the sequence", lower_bound=1
)
_HIDDEN = flags.DEFINE_integer("hidden", 4096, "of the layer", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "of all heads", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 8, "rows of the cache", lower_bound=1)
_TABLES = flags.DEFINE_list("tables", [*TABLES], f"of {', '.join(TABLES)}")
_PRESET = flags.DEFINE_enum("preset", None, [*PRESETS], "smaller values for flags not given")
_CELL_TIMEOUT = flags.DEFINE_float("cell_timeout", 900, "seconds after which a cell is given up")
_OUTPUT = flags.DEFINE_list("output", [], "files to write: .json, .csv, .md")


def apply_preset() -> None:
    """Sets the flags of --preset that were not given."""
    for name, value in PRESETS.get(_PRESET.value, {}).items():
        if not flags.FLAGS[name].present:
            flags.FLAGS[name].value = value


def check_flags() -> None:
    """ValueError for what there is not, with the name of the flag."""
    for flag, known in (
        (_STRATEGIES, STRATEGIES),
        (_DIRECTIONS, DIRECTIONS),
        (_TABLES, TABLES),
    ):
        command.names(flag, known)
    for count in command.numbers(_CHIPS):
        if count % _HEAD_WAYS.value:
            raise ValueError(
                f"--head_ways: takes a divisor of all --chips, got {_HEAD_WAYS.value} of {count}"
            )
    command.numbers(_LENGTHS)
    for text in _HEADS.value:
        try:
            scale_cases.parse_heads(text)
        except ValueError as error:
            raise ValueError(f"--heads: {error}") from None


def run(out: sections.Sections) -> None:
    """All tables that are asked for."""
    shared = dict(chips=command.numbers(_CHIPS), head_ways=_HEAD_WAYS.value)
    timeout = _CELL_TIMEOUT.value or None
    for where in jobs.named_targets(_TARGET.value):
        for text in _HEADS.value:
            heads, kv_heads = scale_cases.parse_heads(text)
            sizes = Sizes(_HIDDEN.value, heads, kv_heads, _HEAD_DIM.value)
            for length in command.numbers(_LENGTHS):
                what = f"{length} tokens, {text} heads of {sizes.head_dim}"
                if _HEAD_WAYS.value > 1:
                    what += f", {_HEAD_WAYS.value} ways of heads"
                for direction in _DIRECTIONS.value if "layer" in _TABLES.value else ():
                    wanted = scale_cases.layers(
                        sizes, length, direction, strategies=_STRATEGIES.value,
                        layout=_LAYOUT.value, **shared,
                    )  # fmt: skip
                    title = f"layer: {what}, hidden {sizes.hidden}, {_LAYOUT.value}, {direction}"
                    scale_report.table(out, title, where, wanted, timeout)
                if "decode" in _TABLES.value:
                    wanted = scale_cases.steps(sizes, length, _BATCH.value, **shared)
                    title = f"decode: {_BATCH.value} rows of {what}, one token each"
                    scale_report.table(out, title, where, wanted, timeout)


def main(argv: Sequence[str]) -> int:
    try:
        apply_preset()
        check_flags()
        files = [output.check_path(path) for path in _OUTPUT.value]
        jobs.check_targets(jobs.named_targets(_TARGET.value))
    except (ValueError, ImportError) as error:
        raise app.UsageError(str(error)) from None

    out = sections.Sections(report.ask_environment(environment.command_line(sys.argv)))
    interrupted = False
    try:
        run(out)
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
