"""The tables of ``generate_bench.py``."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from benchmarks.harness import cache_sizes, noise, processes, report, units
from benchmarks.harness.generation import Generate, Result
from benchmarks.harness.sections import Sections
from benchmarks.harness.tables import Column


@dataclasses.dataclass(frozen=True)
class Figures:
    """A row of either table; seconds of one prompt, or of one token.

    Attributes:
      heads_name: MHA, GQA or MQA.
      cache, dtype: of the cache.
      tokens: that one measurement takes, in all rows of the batch.
      n: measurements.
      median, stddev: of these.
      rate: tokens per second: tokens / median.
      cache_bytes: of all layers.
      compile_seconds: of both programs, tracing included.
      speedup: median of the same model without a cache / median; ``speedup_is_noise`` where the
        times spread by more than they differ.
      failure: why there are no figures.
    """

    heads_name: str
    kv_heads: int
    cache: str
    dtype: str
    batch: int
    tokens: int
    n: int = 0
    median: float | None = None
    rate: float | None = None
    stddev: float | None = None
    cache_bytes: int | None = None
    compile_seconds: float | None = None
    speedup: float | None = None
    speedup_is_noise: bool = False
    failure: str | None = None


_COLUMNS = (
    Column("Model", 10, lambda f: f"{f.heads_name}, K={f.kv_heads}", "left"),
    Column("Cache", 5, lambda f: f.cache, "left"),
    Column("dtype", 13, lambda f: units.NOTHING if f.cache == "none" else f.dtype, "left"),
    Column("Median", 8, lambda f: units.seconds(f.median)),
    Column("tokens/s", 8, lambda f: units.amount(f.rate)),
    Column("stddev", 8, lambda f: units.seconds(f.stddev)),
    Column("n", 4, lambda f: str(f.n)),
)
PROMPT_COLUMNS = (*_COLUMNS, Column("Compile", 7, lambda f: units.seconds(f.compile_seconds)))
TOKEN_COLUMNS = (
    *_COLUMNS,
    Column("Speed-up", 8, lambda f: units.ratio(f.speedup, f.speedup_is_noise)),
    Column("Cache size", 10, lambda f: units.size(f.cache_bytes)),
)


def figures(job: Generate, tokens: int, samples: Sequence[float], **values) -> Figures:
    """Statistics of the samples, none for none."""
    if samples:
        median = statistics.median(samples)
        values |= dict(
            median=median,
            rate=tokens / median,
            stddev=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        )
    model = job.model
    name = cache_sizes.heads_name(model.heads, model.kv_heads)
    return Figures(
        name, model.kv_heads, job.kind, job.dtype, job.batch, tokens, len(samples), **values
    )


def finish(job: Generate, timeout: float | None) -> tuple[Figures, Figures]:
    """The job's rows of both tables, whatever becomes of its process."""
    failure, result = None, Result((), (), None, None)
    try:
        result = processes.call(job, timeout)
    except RuntimeError as error:  # ProcessError, too
        failure = f"{job.name}: {str(error).strip().splitlines()[-1]}"
    values = dict(
        compile_seconds=result.compile_seconds, cache_bytes=result.cache_bytes, failure=failure
    )
    return (
        figures(job, job.batch * job.prompt, result.prompts, **values),
        figures(job, job.batch, result.tokens, **values),
    )


def with_speedup(row: Figures, rows: Sequence[Figures]) -> Figures:
    """The row with its ratio to the one without a cache, if that is among ``rows``."""
    for base in rows:
        if base.cache == "none" and base.kv_heads == row.kv_heads and base.median and row.median:
            noisy = noise.of_times(row.median, row.stddev, base.median, base.stddev)
            return dataclasses.replace(
                row,
                speedup=base.median / row.median,
                speedup_is_noise=noisy and base is not row,
            )
    return row


def run(out: Sections, jobs: Sequence[Generate], timeout: float | None) -> bool:
    """Prints prompts' rows as they are measured, then those of tokens; False after Ctrl-C."""
    one, tokens, finished = jobs[0], [], True
    model = one.model
    sizes = (
        f"layers {model.layers}, features {model.hidden}, N={model.heads} H={model.head_dim}, "
        f"batch {one.batch}"
    )
    out.begin(
        "prompt",
        f"Prompt processing (time to first token): {one.prompt} tokens; {sizes}",
        PROMPT_COLUMNS,
    )
    with report.progress(len(jobs)) as bar:
        try:
            for job in jobs:
                bar.show(job.name)
                prompt, token = finish(job, timeout)
                tokens.append(token)
                with bar.paused():
                    out.row(prompt, prompt.failure)
                bar.advance()
        except KeyboardInterrupt:
            finished = False
            with bar.paused():
                out.print(f"\ninterrupted: {len(tokens)} of {len(jobs)} rows finished")
    out.begin(
        "generation",
        f"Token generation: {one.generated} tokens, the first of them with the prompt; {sizes}",
        TOKEN_COLUMNS,
    )
    for token in tokens:
        if token.failure is None:
            out.row(with_speedup(token, tokens))
    if any(job.kind == "none" for job in jobs):
        out.note("Speed-up: median of the same model without a cache / median.")
    out.note_noise("speedup_is_noise")
    if any(job.kind == "ring" for job in jobs):
        out.note(f"ring: its layers see {one.window} tokens to their left, the others' see all.")
    return finished
