"""What attention layers of real models cost, with every implementation: time, memory, arithmetic.

    python benchmarks/layer_bench.py                              # runs tiny, compiles the others
    python benchmarks/layer_bench.py --models=tiny --layers=LatentAttention
    python benchmarks/layer_bench.py --models=deepseek-v3 --target=v5p,h200 --output=report.md

Models: DeepSeek-V3, Llama-3 70B and 405B, and a tiny one; each as multi-head, self-, grouped-query
(8 key/value heads), multi-query and latent attention, causal, with projections but no biases, all
in one dtype. The latent layer has DeepSeek-V3's ranks and head sizes in the Llamas, too; "naive"
and "absorbed" are its two forms. "einsum" is the baseline, which repeats keys and values for each
query head (in the latent layer: naive, plain einsum). A star marks what axattn takes by itself.

On a machine with an accelerator all models run on it, unless --target is given. On one without, the
tiny model runs; the others are compiled for --target (default: v5p and h200, where the compilers
are installed), and nothing that is printed of them is measured: HBM, FLOPs and bytes are the
compiler's, and the roofline is the longer of FLOPs and bytes at the chip's published rates.

Besides: what single decisions are worth (heads in turn or at once, products apart or fused, 8 to 1
key/value heads), and sweeps over sequence lengths and hidden sizes. Every cell has its own process,
and is a number or a reason. The exit status is 1 if a cell failed for another reason than that an
implementation does not take it or memory does not suffice, and 130 after Ctrl-C.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axattn import aot
from benchmarks.harness import (
    cases,
    command,
    environment,
    jobs,
    layer_cases,
    layer_plots,
    layer_report,
    output,
    plotting,
    report,
    sections,
)
from benchmarks.harness.layer_cases import BASELINE, LAYERS, MODELS
from benchmarks.harness.layer_rows import HERE

TABLES = ("models", "optimisations", "length", "hidden")
DEFAULT_TARGETS = ("v5p", "h200")

_MODELS = flags.DEFINE_list("models", [*MODELS], f"of {', '.join(MODELS)}")
_LAYERS = flags.DEFINE_list("layers", [*LAYERS], f"of {', '.join(LAYERS)}")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", cases.DTYPES, "of parameters and activations")
_DIRECTIONS = flags.DEFINE_list("directions", ["fwd"], f"of {', '.join(layer_cases.DIRECTIONS)}")
_NUM_RUNS = flags.DEFINE_integer("num_runs", 100, "that are measured", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 10, "runs before these", lower_bound=0)
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", [], "of einsum, jax_nn, splash, default and axattn's; empty: all that fit"
)
_TARGET = flags.DEFINE_multi_string(
    "target", [], "compile for this chip (v5p, h200, ...); repeatable, or separated by commas"
)
_TABLES = flags.DEFINE_list("tables", [*TABLES], f"of {', '.join(TABLES)}")
_SWEEP_LAYER = flags.DEFINE_enum(
    "sweep_layer", "GroupedQueryAttention", [*LAYERS], "the layer of the sweeps"
)
_LENGTHS = flags.DEFINE_list(
    "lengths", [str(n) for n in layer_cases.SWEEP_LENGTHS], "of the sweep over sequence lengths"
)
_HIDDEN = flags.DEFINE_list(
    "hidden", [str(n) for n in layer_cases.SWEEP_HIDDEN], "of the sweep over hidden sizes"
)
_CELL_TIMEOUT = flags.DEFINE_float("cell_timeout", 900, "seconds after which a cell is given up")
_OUTPUT = flags.DEFINE_list("output", [], "files to write: .json, .csv, .md")
_PLOT = flags.DEFINE_string("plot", None, "a .png to draw: the sweeps")


def check_flags() -> None:
    """ValueError for what there is not, with the name of the flag."""
    for flag, given, known in (
        ("models", _MODELS.value, MODELS),
        ("layers", _LAYERS.value, LAYERS),
        ("directions", _DIRECTIONS.value, layer_cases.DIRECTIONS),
        ("tables", _TABLES.value, TABLES),
        ("implementations", _IMPLEMENTATIONS.value, known_implementations()),
    ):
        if not given and flag != "implementations":
            raise ValueError(f"--{flag}: takes one or more of {', '.join(known)}")
        for value in given:
            if value not in known:
                raise ValueError(f"--{flag}: {value!r} is unknown; it takes {', '.join(known)}")
    for flag, given, unit in (("lengths", _LENGTHS.value, 1), ("hidden", _HIDDEN.value, 128)):
        if not given:
            raise ValueError(f"--{flag}: takes one or more numbers")
        for value in given:
            if not value.isdecimal() or int(value) < 1 or int(value) % unit:
                raise ValueError(f"--{flag}: takes multiples of {unit}, got {value!r}")


def known_implementations() -> list[str]:
    return [BASELINE, *(n for n in jobs.implementations() if n != cases.BASELINE)]


def implementations(platform: str) -> list[str]:
    """--implementations, or all that there are for a platform; the baseline first."""
    every = [BASELINE, *jobs.implementations_for(platform), *jobs.peers_for(platform)]
    names = _IMPLEMENTATIONS.value or every
    return sorted(dict.fromkeys(names), key=lambda name: name != BASELINE)


def targets() -> list[str]:
    """--target as a list without repetitions."""
    return jobs.named_targets(_TARGET.value)


def installed_targets() -> list[str]:
    """Those that are compiled for where none is named."""
    found = []
    for name in DEFAULT_TARGETS:
        try:
            jobs.check_target(name)
        except aot.MissingCompilerError:
            continue
        found.append(name)
    return found


def places(platform: str) -> list[str]:
    """Where models are run or compiled; not the tiny one, see `places_of`."""
    return targets() or ([HERE] if platform != "cpu" else installed_targets())


def places_of(model: str, platform: str) -> list[str]:
    return [HERE] if model == "tiny" and not targets() else places(platform)


def sweeps() -> list[str]:
    """Those to be made: who asks for the tiny model has not asked for them, but by name."""
    if _MODELS.value == ["tiny"] and not _TABLES.present:
        return []
    return [name for name in ("length", "hidden") if name in _TABLES.value]


def run(bench: layer_report.Bench, platform: str) -> None:
    """All tables that are asked for."""

    def names(where: str) -> list[str]:
        return implementations(bench.platform(where))

    def none_for(what: str) -> None:
        bench.out.print(
            f"\n{what}: not run on a CPU, and no compiler for {' or '.join(DEFAULT_TARGETS)} "
            "is installed (pip install -e '.[aot]')"
        )

    of_models = []
    for model in _MODELS.value:
        there = places_of(model, platform)
        if not there:
            none_for(model)
        for where in there:
            if "models" in _TABLES.value:
                of_models += layer_report.model_table(
                    bench, MODELS[model], _LAYERS.value, names(where), _DTYPE.value,
                    _DIRECTIONS.value, where,
                )  # fmt: skip
            if "optimisations" in _TABLES.value:
                layer_report.optimisation_tables(
                    bench, MODELS[model], _DTYPE.value, "default", where
                )
    lengths, hidden = (tuple(map(int, f.value)) for f in (_LENGTHS, _HIDDEN))
    if sweeps() and not places(platform):
        none_for(f"the sweeps over {' and '.join(sweeps())}")
    for where in places(platform):
        for sweep in sweeps():
            models = list(layer_cases.sweep(sweep, lengths, hidden))
            layer_report.sweep_table(
                bench, sweep, models, _SWEEP_LAYER.value, names(where), _DTYPE.value, where
            )
    layer_report.best_table(bench, of_models)


def main(argv: Sequence[str]) -> int:
    try:
        check_flags()
        files = [output.check_path(path) for path in _OUTPUT.value]
        png = plotting.check_path(_PLOT.value) if _PLOT.value else None
        jobs.check_targets(targets())
    except (ValueError, ImportError) as error:
        raise app.UsageError(str(error)) from None

    where = report.ask_environment(environment.command_line(sys.argv))
    out = sections.Sections(where)
    bench = layer_report.Bench(
        out, warmup=_WARMUP.value, runs=_NUM_RUNS.value, timeout=_CELL_TIMEOUT.value or None
    )
    interrupted = False
    try:
        run(bench, where.platform)
    except KeyboardInterrupt:
        interrupted = True
        out.print("\ninterrupted")
    drawn = png is not None and layer_plots.plot(png, bench.cells, where)
    if png is not None and not drawn:
        out.print(f"\n{png} is not drawn: there are no sweeps")
    out.close()
    for path in files:
        out.write(path, png if drawn else None)
    if interrupted:
        return 130
    return 1 if out.failures else 0


if __name__ == "__main__":
    command.run(main)
