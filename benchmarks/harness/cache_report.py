"""The tables of ``kv_cache_bench.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from benchmarks.harness import (
    cache_compile,
    cache_error,
    cache_sizes,
    cache_steps,
    cache_tables,
    cache_trace,
)
from benchmarks.harness.cache_sizes import CacheCase
from benchmarks.harness.sections import Sections


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model's shape, and the sizes of what is run rather than compiled.

    Attributes:
      layers, heads, kv_heads, head_dim: of the model; several numbers of key/value heads.
      tokens, batch: tokens per row, at most, and rows.
      page_size: tokens per page.
      dtypes: of caches.
      requests, rows: of the trace: how many, and how many at a time.
      error_tokens: keys to attend to.
      points: (tokens, capacity) of the steps that are timed.
      step_dtypes: of these.
    """

    layers: int = 32
    heads: int = 32
    kv_heads: tuple[int, ...] = (32, 8, 4, 1)
    head_dim: int = 128
    tokens: int = 4096
    batch: int = 4
    page_size: int = 16
    dtypes: tuple[str, ...] = tuple(cache_sizes.BITS)
    requests: int = 400
    rows: int = 16
    error_tokens: int = 2048
    points: tuple[tuple[int, int], ...] = (
        (512, 1024),
        (512, 4096),
        (512, 16384),
        (2048, 16384),
        (8192, 16384),
    )
    step_dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8")

    def __post_init__(self):
        if self.tokens < 2:
            raise ValueError(
                f"tokens must be at least 2: a prompt and an answer, got {self.tokens}"
            )
        for kv_heads in self.kv_heads:
            for dtype in self.dtypes:
                self.case("paged", dtype, kv_heads)  # its checks

    def case(self, kind: str, dtype: str, kv_heads: int) -> CacheCase:
        return CacheCase(
            kind,
            dtype,
            self.layers,
            self.heads,
            kv_heads,
            self.head_dim,
            self.batch,
            self.tokens,
            self.page_size,
        )


PRESETS = {
    "default": Sizes(),
    # Whether it runs at all.
    "smoke": Sizes(
        layers=2,
        heads=4,
        kv_heads=(1,),
        tokens=1024,
        batch=2,
        dtypes=("bfloat16", "int8"),
        requests=40,
        rows=4,
        error_tokens=128,
        points=((32, 64), (32, 256)),
        step_dtypes=("int8",),
    ),
}

_MILLION = 1 << 20


def bytes_tables(out: Sections, sizes: Sizes, targets: Sequence[str]) -> None:
    """A table for each target and number of key/value heads."""
    for target in targets:
        for kv_heads in sizes.kv_heads:
            name = cache_sizes.heads_name(sizes.heads, kv_heads)
            out.begin(
                "bytes",
                f"{name}, K={kv_heads}: N={sizes.heads} H={sizes.head_dim}, {sizes.batch} x "
                f"{sizes.tokens} tokens, pages of {sizes.page_size}; compiled for {target}",
                cache_tables.size_columns(sizes.layers),
            )
            cases = (sizes.case(k, d, kv_heads) for k in cache_sizes.KINDS for d in sizes.dtypes)
            compare(out, cases, target)


def compare(out: Sections, cases: Iterable[CacheCase], target: str) -> None:
    """Adds a row for each case, by hand and compiled; what does not agree is a failure."""
    copied = []
    for case in cases:
        size = cache_tables.Size.of(case, target, cache_compile.compile_append(case, target))
        out.row(size, size.disagreement)
        if size.copies:
            copied.append(f"{case.kind} {case.dtype}")
    if copied:
        names = ", ".join(copied)
        out.note(f"! to append one token takes as much memory again as all keys: {names}")


def million_tables(out: Sections, targets: Sequence[str]) -> None:
    """Key/value heads repeated for each query head, and shared."""
    for target in targets:
        out.begin(
            "million",
            f"One layer, one sequence of 2**20 = {_MILLION} tokens: N=32 H=128, bfloat16; compiled "
            f"for {target}",
            cache_tables.MILLION_COLUMNS,
        )
        cases = (
            CacheCase("dense", "bfloat16", 1, 32, kv_heads, 128, 1, _MILLION, 1)
            for kv_heads in (32, 4)
        )
        compare(out, cases, target)
        out.note("GiB = 2**30 bytes, GB = 10**9 bytes")


def trace_table(out: Sections, sizes: Sizes) -> None:
    """Reserved against used while requests come and go."""
    trace = cache_trace.make_trace(sizes.requests, sizes.rows, sizes.tokens)
    dtype = "bfloat16" if "bfloat16" in sizes.dtypes else sizes.dtypes[0]
    kv_heads, page = sizes.kv_heads[0], sizes.page_size
    slot = cache_sizes.analytical(sizes.case("dense", dtype, kv_heads)).token * sizes.layers
    lengths = sorted(request.prompt + request.generated for request in trace)
    out.begin(
        "trace",
        f"{sizes.requests} requests, at most {sizes.rows} at a time, of {lengths[0]} to "
        f"{lengths[-1]} tokens (median {lengths[len(lengths) // 2]}); rows of {sizes.tokens}; "
        f"{dtype} K={kv_heads} H={sizes.head_dim}, {sizes.layers} layers",
        cache_tables.TRACE_COLUMNS,
    )
    found = cache_trace.replay(
        trace,
        rows=sizes.rows,
        max_length=sizes.tokens,
        page_sizes=(page, 4 * page, 16 * page),
        slot_bytes=slot,
    )
    for occupancy in found:
        out.row(occupancy)
    out.note(
        "Slots: reserved for the requests at work, a whole row for each in a dense cache, whole "
        f"pages in a paged one. Peak: when most tokens were stored, {found[0].peak_tokens}."
    )


def error_table(out: Sections, sizes: Sizes) -> None:
    """What short types do to the output."""
    heads, kv_heads = 8, 2
    out.begin(
        "error",
        f"Error of the output / output, against float64: {sizes.error_tokens} keys, N={heads} "
        f"K={kv_heads} H={sizes.head_dim}, N(0, 1). Offset: two channels of the keys 10 sigma off",
        cache_tables.ERROR_COLUMNS,
    )
    for dtype in sizes.dtypes:
        out.row(
            cache_error.quantization_error(
                dtype,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=sizes.head_dim,
                tokens=sizes.error_tokens,
            )
        )


def steps_table(out: Sections, sizes: Sizes, seconds: float) -> None:
    """Time of decoding steps here; ``seconds`` are for each kind and dtype."""
    batch, heads, kv_heads = 4, 8, 2
    out.begin(
        "steps",
        f"A decoding step of one layer on {out.environment.platform}: B={batch} N={heads} "
        f"K={kv_heads} H={sizes.head_dim}, pages of {sizes.page_size}",
        cache_tables.STEP_COLUMNS,
    )
    dtypes = [d for d in sizes.dtypes if d in sizes.step_dtypes] or sizes.dtypes
    for kind in cache_sizes.KINDS:
        for dtype in dtypes:
            case = dataclasses.replace(
                sizes.case(kind, dtype, 1), layers=1, heads=heads, kv_heads=kv_heads, batch=batch
            )
            for time in cache_steps.time_steps(case, sizes.points, seconds):
                out.row(time)
    out.note_noise("growth_is_noise")
    out.note(
        "Growth: time / that of the first row of the same cache, measured in turn. Read: bytes of "
        "the tokens in the cache / time."
    )
