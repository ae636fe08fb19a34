"""Rows and columns of ``kv_cache_bench.py``."""

from __future__ import annotations

import dataclasses

from benchmarks.harness import cache_sizes, units
from benchmarks.harness.cache_compile import Compiled
from benchmarks.harness.cache_sizes import CacheCase
from benchmarks.harness.tables import Column


@dataclasses.dataclass(frozen=True)
class Size:
    """A cache's bytes by hand (see `cache_sizes.Bytes`) and compiled (see `Compiled`)."""

    kind: str
    dtype: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    page_size: int
    token_head_bytes: int
    token_bytes: int
    key_bytes: int
    value_bytes: int
    layer_bytes: int
    total_bytes: int
    of_bfloat16: float
    target: str
    claimed_bytes: int
    compiled_bytes: int | None
    tiled_bytes: int | None
    append_temp_bytes: int | None
    refusal: str | None

    @staticmethod
    def of(case: CacheCase, target: str, compiled: Compiled) -> Size:
        """The two side by side."""
        size = cache_sizes.analytical(case)
        short = cache_sizes.analytical(dataclasses.replace(case, dtype="bfloat16"))
        return Size(
            **dataclasses.asdict(case),
            token_head_bytes=size.token_head,
            token_bytes=size.token,
            key_bytes=size.keys,
            value_bytes=size.values,
            layer_bytes=size.layer,
            total_bytes=size.total,
            of_bfloat16=size.layer / short.layer,
            target=target,
            claimed_bytes=compiled.claimed,
            compiled_bytes=compiled.aliased,
            tiled_bytes=compiled.tiled,
            append_temp_bytes=compiled.temp,
            refusal=compiled.refusal,
        )

    @property
    def disagreement(self) -> str | None:
        """What does not agree, in a line; None where all does, or nothing was compiled."""
        name = f"{self.kind} {self.dtype}, K={self.kv_heads}, {self.target}"
        if self.claimed_bytes != self.layer_bytes:
            return f"{name}: by hand {self.layer_bytes} B, nbytes says {self.claimed_bytes} B"
        if self.compiled_bytes is None:
            return None
        if self.compiled_bytes < self.layer_bytes:
            return (
                f"{name}: by hand {self.layer_bytes} B, of which only {self.compiled_bytes} B are "
                "updated in place"
            )
        if self.compiled_bytes != self.tiled_bytes:
            return (
                f"{name}: by hand {self.layer_bytes} B, in tiles {self.tiled_bytes} B, compiled "
                f"{self.compiled_bytes} B"
            )
        return None

    @property
    def copies(self) -> bool:
        """Whether the temporaries of an append have room for all keys, without their scales."""
        vector = cache_sizes.vector_bytes(self.dtype, self.head_dim)
        elements = cache_sizes.BITS[self.dtype] * self.head_dim // 8
        return (self.append_temp_bytes or 0) >= self.key_bytes // vector * elements


def _compiled(size: Size) -> str:
    return units.size(size.compiled_bytes) if size.refusal is None else size.refusal


def _tiles(size: Size) -> str:
    if size.tiled_bytes is None:
        return units.NOTHING
    return f"+{100 * (size.tiled_bytes / size.layer_bytes - 1):.1f}%"


def _agrees(size: Size) -> str:
    if size.compiled_bytes is None:
        return units.NOTHING
    return "no" if size.disagreement else "yes"


def _temp(size: Size) -> str:
    return units.size(size.append_temp_bytes) + ("!" if size.copies else " ")


_COMPILED = (
    Column("Compiled", 10, _compiled),
    Column("Tiles", 6, _tiles),
    Column("Agree", 5, _agrees),
    Column("Append temp", 11, _temp),
)


def size_columns(layers: int) -> tuple[Column, ...]:
    return (
        Column("Cache", 5, lambda s: s.kind, "left"),
        Column("dtype", 13, lambda s: s.dtype, "left"),
        Column("Token, head", 11, lambda s: f"{s.token_head_bytes} B"),
        Column("Token", 9, lambda s: units.size(s.token_bytes)),
        Column("Of bf16", 7, lambda s: units.ratio(s.of_bfloat16)),
        Column("Layer", 10, lambda s: units.size(s.layer_bytes)),
        Column(f"{layers} layers", 10, lambda s: units.size(s.total_bytes)),
        *_COMPILED,
    )


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f} GB"


MILLION_COLUMNS = (
    Column(
        "Heads stored", 14, lambda s: "32, repeated" if s.kv_heads == 32 else "4, shared", "left"
    ),
    Column("K", 9, lambda s: units.size(s.key_bytes)),
    Column("V", 9, lambda s: units.size(s.value_bytes)),
    Column("K and V", 9, lambda s: units.size(s.layer_bytes)),
    Column("K", 8, lambda s: _gb(s.key_bytes)),
    Column("V", 8, lambda s: _gb(s.value_bytes)),
    Column("K and V", 8, lambda s: _gb(s.layer_bytes)),
    *_COMPILED,
)

TRACE_COLUMNS = (
    Column("Cache", 5, lambda o: o.kind, "left"),
    Column("Page", 4, lambda o: units.NOTHING if o.page_size is None else str(o.page_size)),
    Column("Slots/token", 11, lambda o: f"{o.slots_per_token:.3f}x"),
    Column("Unused", 6, lambda o: f"{100 * o.unused:.1f}%"),
    Column("Slots at peak", 13, lambda o: str(o.peak_slots)),
    Column("Memory at peak", 14, lambda o: units.size(o.peak_bytes)),
    Column("Of dense", 8, lambda o: units.ratio(o.of_dense)),
)


def _error(value: float) -> str:
    return "< 0.001%" if value < 1e-5 else f"{100 * value:.3f}%"


ERROR_COLUMNS = (
    Column("dtype", 13, lambda e: e.dtype, "left"),
    Column("Gaussian", 9, lambda e: _error(e.gaussian)),
    Column("Offset", 9, lambda e: _error(e.offset)),
    Column("With key_center", 15, lambda e: _error(e.centered)),
)

STEP_COLUMNS = (
    Column("Cache", 5, lambda t: t.kind, "left"),
    Column("dtype", 13, lambda t: t.dtype, "left"),
    Column("Tokens", 6, lambda t: str(t.tokens)),
    Column("Capacity", 8, lambda t: str(t.capacity)),
    Column("Time", 8, lambda t: units.seconds(t.seconds)),
    Column("Growth", 6, lambda t: units.ratio(t.growth, t.growth_is_noise)),
    Column("Read", 9, lambda t: units.amount(t.bytes / t.seconds, "B") + "/s"),
    Column("Rounds", 6, lambda t: str(t.rounds)),
)
