"""What is measured: one configuration, implementation, dtype and direction; and the presets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

DIRECTIONS = ("fwd", "fwd+bwd", "decode")
DTYPES = ("float32", "bfloat16", "float16")
BASELINE = "repeat_kv"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an attention layer; heads are ``model_dim // heads`` wide."""

    model_dim: int
    heads: int
    kv_heads: int
    seq_len: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"configuration {self}: {field.name} must be at least 1")
        if self.model_dim % self.heads:
            raise ValueError(f"configuration {self}: heads must divide model_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"configuration {self}: kv_heads must divide heads")

    def __str__(self) -> str:
        return f"{self.model_dim}/{self.heads}/{self.kv_heads}/{self.seq_len}"

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.heads


def parse_config(text: str) -> Config:
    """``"2048/16/2/1024"``: model_dim, heads, kv_heads, seq_len."""
    parts = text.strip().split("/")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"--configs: configuration {text!r} takes model_dim/heads/kv_heads/seq_len, "
            "e.g. 2048/16/2/1024"
        )
    return Config(*map(int, parts))


@dataclasses.dataclass(frozen=True)
class Case:
    """One row's question.

    Attributes:
      config: the sizes. ``seq_len`` is T = S; in a decoding step, S, with T = 1.
      implementation: of axattn, ``"default"`` (axattn's own choice), or one of
        ``benchmarks.harness.baselines``.
      batch: B.
      dtype: of parameters, activations and cache.
      direction: ``"fwd"``, ``"fwd+bwd"`` or ``"decode"``.
    """

    config: Config
    implementation: str
    batch: int
    dtype: str
    direction: str

    @property
    def name(self) -> str:
        return f"MQABenchmark/{self.config}"


@dataclasses.dataclass(frozen=True)
class Block:
    """Cases of one batch size and set of directions, without implementations."""

    configs: tuple[str, ...]
    batch: int
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]

    def cases(self, implementations: Sequence[str]) -> list[Case]:
        """All combinations; the implementations of one question follow each other."""
        return [
            Case(parse_config(config), implementation, self.batch, dtype, direction)
            for config, dtype, direction, implementation in itertools.product(
                self.configs, self.dtypes, self.directions, implementations
            )
        ]


AXLEARN = ("2048/16/2/1024", "4096/16/2/1024", "4096/16/2/4096", "4096/16/2/8192")

PRESETS: dict[str, tuple[Block, ...]] = {
    # Two minutes on two CPU cores, compilation included.
    "default": (
        Block(("1024/8/1/128", "1024/8/1/512"), 1, ("float32", "bfloat16"), ("fwd", "fwd+bwd")),
        Block(("1024/8/1/2048",), 1, ("float32",), ("fwd", "fwd+bwd")),
        Block(("1024/8/1/2048", "1024/8/1/8192"), 8, ("float32",), ("decode",)),
    ),
    # The configurations that the change this library grew from published (published.py), and
    # one decoding step.
    "axlearn": (
        Block(AXLEARN, 1, ("bfloat16",), ("fwd", "fwd+bwd")),
        Block(("2048/16/2/32768",), 8, ("bfloat16",), ("decode",)),
    ),
    # Whether it runs at all.
    "smoke": (
        Block(("64/4/1/64",), 1, ("float32",), ("fwd", "fwd+bwd", "decode")),
        Block(("64/4/1/64",), 1, ("bfloat16",), ("fwd",)),
    ),
}


def select(
    preset: str,
    configs: Sequence[str] = (),
    batch: int | None = None,
    dtypes: Sequence[str] = (),
    directions: Sequence[str] = (),
) -> tuple[Block, ...]:
    """A preset with parts of it replaced.

    ``configs`` replaces all its blocks by one, with every direction of the preset; ``directions``
    leaves out the others, or, with ``configs``, is taken as it is.

    Raises:
      ValueError: a part that is none, with the name of the flag.
    """
    for flag, given, known in (
        ("dtypes", dtypes, DTYPES),
        ("directions", directions, DIRECTIONS),
        ("preset", (preset,), tuple(PRESETS)),
    ):
        for value in given:
            if value not in known:
                raise ValueError(f"--{flag}: {value!r} is unknown; it takes {', '.join(known)}")
    if batch is not None and batch < 1:
        raise ValueError(f"--batch: must be at least 1, got {batch}")
    blocks = PRESETS[preset]
    if configs:
        every = (d for d in DIRECTIONS if any(d in block.directions for block in blocks))
        all_dtypes = dict.fromkeys(dtype for block in blocks for dtype in block.dtypes)
        blocks = (
            Block(
                tuple(str(parse_config(text)) for text in configs),
                blocks[0].batch,
                tuple(all_dtypes),
                tuple(directions) or tuple(every),
            ),
        )
    chosen = []
    for block in blocks:
        kept = tuple(d for d in block.directions if not directions or d in directions)
        if kept:
            chosen.append(
                dataclasses.replace(
                    block,
                    directions=kept,
                    batch=batch or block.batch,
                    dtypes=tuple(dtypes) or block.dtypes,
                )
            )
    return tuple(chosen)
