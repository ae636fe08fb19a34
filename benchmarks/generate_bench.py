"""Generating text: how long until the first token, and how long for each one after it.

    python benchmarks/generate_bench.py
    python benchmarks/generate_bench.py --hidden=1024 --layers=8 --kv_heads=8,1 --prompt=2000
    python benchmarks/generate_bench.py --caches=none,dense/int8,paged/int4 --batch=8

The model is the decoder of examples/ with random weights: multi-head, grouped-query and multi-query
attention by --kv_heads, and the caches of --caches. "none" is the baseline: every token takes all
of the text through the model again. With "ring" the layers are sliding-window ones, so it is
another model that does less.

Prompt processing is the time from a prompt to its first token, generation the time of each token
after it, choosing it (the likeliest) included. A step waits until the device is done. n is how
often that was measured; google-benchmark, which says nothing of single iterations, is not used.

Each row has its own process; one that fails costs one row. The exit status is 1 if one did, and 130
after Ctrl-C, which prints what there is.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.harness import (
    cache_sizes,
    command,
    environment,
    generation,
    generation_tables,
    output,
    report,
    sections,
)

PRESETS = {
    # Two minutes on two CPU cores.
    "default": dict(
        hidden=256,
        layers=2,
        heads=8,
        kv_heads=(8, 2, 1),
        prompt=501,
        generated=128,
        repetitions=5,
        caches=(
            "none",
            "dense/float32",
            "dense/bfloat16",
            "dense/int8",
            "ring/float32",
            "paged/float32",
            "paged/int8",
        ),
    ),
    # Whether it runs at all.
    "smoke": dict(
        hidden=32,
        layers=1,
        heads=4,
        kv_heads=(1,),
        prompt=9,
        generated=5,
        repetitions=2,
        caches=("none", "dense/bfloat16", "ring/int8", "paged/float32"),
    ),
}

CACHES = (
    f"none, or one of {', '.join(generation.KINDS[1:])} and, behind a slash, of "
    f"{', '.join(cache_sizes.BITS)}"
)

_PRESET = flags.DEFINE_enum("preset", "default", sorted(PRESETS), "sizes of everything")
_HIDDEN = flags.DEFINE_integer("hidden", None, "features of the model", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", None, "of the model", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", None, "query heads", lower_bound=1)
_KV_HEADS = flags.DEFINE_list("kv_heads", [], "key/value heads, a model for each")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 256, "tokens that there are", lower_bound=1)
_CACHES = flags.DEFINE_list("caches", [], CACHES)
_PROMPT = flags.DEFINE_integer("prompt", None, "tokens of the prompt", lower_bound=1)
_GENERATED = flags.DEFINE_integer("generated", None, "tokens to generate", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 1, "prompts at a time", lower_bound=1)
_REPETITIONS = flags.DEFINE_integer("repetitions", None, "prompts per row", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", 128, "of ring caches", lower_bound=1)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "tokens per page", lower_bound=1)
_ROW_TIMEOUT = flags.DEFINE_float("row_timeout", 900, "seconds after which a row is given up")
_OUTPUT = flags.DEFINE_list("output", [], "files to write: .json, .csv, .md")


def make_jobs() -> list[generation.Generate]:
    """What the flags ask for.

    Raises:
      ValueError: flags that ask for what there is not.
    """
    preset = PRESETS[_PRESET.value]
    size = {
        flag.name: preset[flag.name] if flag.value is None else flag.value
        for flag in (_HIDDEN, _LAYERS, _HEADS, _PROMPT, _GENERATED, _REPETITIONS)
    }
    jobs = []
    for kv_heads in command.numbers(_KV_HEADS) if _KV_HEADS.value else preset["kv_heads"]:
        model = generation.Model(
            size["hidden"], size["layers"], size["heads"], kv_heads, _VOCABULARY.value
        )
        for cache in _CACHES.value or preset["caches"]:
            kind, _, dtype = cache.strip().partition("/")
            if (kind, dtype) != ("none", "") and (
                kind not in generation.KINDS[1:] or dtype not in cache_sizes.BITS
            ):
                raise ValueError(f"--caches: {cache!r} is unknown; it takes {CACHES}")
            jobs.append(
                generation.Generate(
                    model,
                    kind,
                    dtype or "float32",
                    _BATCH.value,
                    size["prompt"],
                    size["generated"],
                    size["repetitions"],
                    _WINDOW.value,
                    _PAGE_SIZE.value,
                )
            )
    return jobs


def main(argv: Sequence[str]) -> int:
    try:
        files = [output.check_path(path) for path in _OUTPUT.value]
        jobs = make_jobs()
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    out = sections.Sections(report.ask_environment(environment.command_line(sys.argv)))
    finished = generation_tables.run(out, jobs, _ROW_TIMEOUT.value or None)
    out.close()
    for path in files:
        out.write(path)
    if not finished:
        return 130
    return 1 if out.failures else 0


if __name__ == "__main__":
    command.run(main)
