"""What a multi-query attention layer costs: in time here, in HBM on chips that are not here.

    python benchmarks/mqa_bench.py                                  # two minutes on two CPU cores
    python benchmarks/mqa_bench.py --preset=axlearn --target=v5p    # compiles, runs nothing
    python benchmarks/mqa_bench.py --configs=2048/16/2/1024 --dtypes=bfloat16 --directions=fwd

One row per configuration, named MQABenchmark/<model_dim>/<heads>/<kv_heads>/<seq_len>, and
implementation, of the layer as a whole: projections (without biases) and causal attention, all in
one dtype. "repeat_kv" is the baseline, which copies K and V for each query head; "Speed-up" is its
time over the row's, "ratio" the row's memory over the baseline's. A star marks what axattn takes
by itself. "fwd+bwd" adds the gradients of parameters and inputs; "decode" is one token against a
full cache of seq_len tokens, updated in place.

Rows print as they finish, and each has its own process: one that fails costs one row, and Ctrl-C
prints what there is. The exit status is 1 if a row failed, other than for want of memory or because
an implementation does not take it, and 130 after Ctrl-C.

With --target nothing is run here unless --run is given.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.harness import cases, command, environment, jobs, output, plotting, report

_PRESET = flags.DEFINE_enum("preset", "default", sorted(cases.PRESETS), "a set of cases")
_CONFIGS = flags.DEFINE_list(
    "configs", [], "model_dim/heads/kv_heads/seq_len, ... in place of the preset's"
)
_BATCH = flags.DEFINE_integer("batch", None, "batch size in place of the preset's", lower_bound=1)
_DTYPES = flags.DEFINE_list("dtypes", [], f"of {', '.join(cases.DTYPES)}")
_DIRECTIONS = flags.DEFINE_list("directions", [], f"of {', '.join(cases.DIRECTIONS)}")
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", [], "of repeat_kv, jax_nn, splash, default and axattn's; empty: all that fit"
)
_TARGET = flags.DEFINE_multi_string(
    "target", [], "compile for this chip (v5p, h200, ...); repeatable, or separated by commas"
)
_RUN = flags.DEFINE_bool("run", None, "run on this machine; by default only without --target")
_MIN_TIME = flags.DEFINE_float("min_time", 0.1, "seconds per repetition, at least", lower_bound=0)
_REPETITIONS = flags.DEFINE_integer(
    "repetitions", 5, "of which the median is taken (slow rows: 3)", lower_bound=1
)
_ROW_TIMEOUT = flags.DEFINE_float("row_timeout", 900, "seconds after which a row is given up")
_OUTPUT = flags.DEFINE_list("output", [], "files to write: .json, .csv, .md")
_PLOT = flags.DEFINE_string("plot", None, "a .png to draw: time and memory by sequence length")


def make_jobs(platform: str | None) -> list[jobs.Job]:
    """What the flags ask for: rows of this machine (on ``platform``; None: none), then targets'.

    Raises:
      ValueError: flags that ask for what there is not.
    """
    blocks = cases.select(
        _PRESET.value, _CONFIGS.value, _BATCH.value, _DTYPES.value, _DIRECTIONS.value
    )
    if not blocks:
        raise ValueError(f"--directions: preset {_PRESET.value} has none of them")
    wanted: list[jobs.Job] = []
    for place in ([platform] if platform else []) + targets():
        here = place is platform
        names = implementations(platform if here else jobs.target_platform(place))
        for block in blocks:
            for case in block.cases(names):
                if here:
                    wanted.append(jobs.Run(case, _MIN_TIME.value, _REPETITIONS.value))
                else:
                    wanted.append(jobs.Compile(case, place))
    return wanted


def targets() -> list[str]:
    """--target, as a list without repetitions."""
    return jobs.named_targets(_TARGET.value)


def implementations(platform: str) -> list[str]:
    """--implementations, or all that there are for a platform; the baseline first."""
    known = jobs.implementations()
    unknown = [name for name in _IMPLEMENTATIONS.value if name not in known]
    if unknown:
        raise ValueError(
            f"--implementations: {unknown[0]!r} is unknown; there are {', '.join(known)}"
        )
    every = [cases.BASELINE, *jobs.implementations_for(platform), *jobs.peers_for(platform)]
    names = _IMPLEMENTATIONS.value or every
    return sorted(dict.fromkeys(names), key=lambda name: name != cases.BASELINE)


def main(argv: Sequence[str]) -> int:
    try:
        files = [output.check_path(path) for path in _OUTPUT.value]
        png = plotting.check_path(_PLOT.value) if _PLOT.value else None
        jobs.check_targets(targets())
        make_jobs("cpu")  # the flags; the platform does not matter for that
    except (ValueError, ImportError) as error:
        raise app.UsageError(str(error)) from None

    where = report.ask_environment(environment.command_line(sys.argv))
    run = not targets() if _RUN.value is None else _RUN.value
    todo = make_jobs(where.platform if run else None)
    if not todo:
        raise app.UsageError("--norun without --target leaves nothing to do")
    session = report.Session(where)
    finished = session.run(todo, _ROW_TIMEOUT.value or None)
    session.close(with_published=_PRESET.value == "axlearn")
    for path in files:
        output.write(path, session.rows, where)
    if png is not None and session.rows:
        plotting.plot(png, session.rows, where)
    if not finished:
        return 130
    return 1 if session.failed else 0


if __name__ == "__main__":
    command.run(main)
