"""How long a program takes to be traced, lowered and compiled, and the code that runs meanwhile."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

import axattn
from benchmarks.harness import refusals, tables, units

_PACKAGE = str(pathlib.Path(axattn.__file__).parent)


@dataclasses.dataclass
class Program:
    """One line of the table; seconds."""

    what: str  # "layer" or "call"
    name: str
    direction: str
    fn: Any
    args: tuple[Any, ...]
    trace: float | None = None
    lower: float | None = None
    compile: float | None = None
    code: int = 0
    files: int = 0
    reason: str = ""

    @property
    def made(self) -> float | None:
        return None if self.lower is None else (self.trace or 0.0) + self.lower


def measure(program: Program, compiles: bool) -> None:
    """Makes a program, and keeps the least time that each stage took."""
    jax.clear_caches()
    start = time.perf_counter()
    try:
        traced = program.fn.trace(*program.args)
        middle = time.perf_counter()
        lowered = traced.lower()
        end = time.perf_counter()
        seconds = {"trace": middle - start, "lower": end - middle}
        if compiles:
            lowered.compile()
            seconds["compile"] = time.perf_counter() - end
    except Exception as error:
        program.reason = refusals.of_error(error)["reason"].splitlines()[0]
        return
    for stage, value in seconds.items():
        before = getattr(program, stage)
        setattr(program, stage, value if before is None else min(before, value))


def count_code(program: Program) -> None:
    """Counts the functions of axattn that run while the program is made."""
    seen = set()

    def look(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(_PACKAGE):
            seen.add(frame.f_code)

    jax.clear_caches()
    sys.setprofile(look)
    try:
        program.fn.trace(*program.args).lower()
    finally:
        sys.setprofile(None)
    program.code, program.files = len(seen), len({code.co_filename for code in seen})


def columns(found: Sequence[Program], named: str, compiles: bool) -> list[tables.Column]:
    """Of a table in which ``named`` is what None takes."""
    made = {(p.what, p.name, p.direction): p.made for p in found}

    def ratio(p: Program, other: str, what: str) -> str:
        base = made.get((what, other, p.direction))
        return units.ratio(p.made / base) if p.made and base else units.NOTHING

    def flax(p: Program) -> str:
        return ratio(p, "flax", "layer") if p.what == "layer" else ratio(p, "jax.nn", "call")

    stages = [
        tables.Column(name.capitalize(), 8, lambda p, name=name: units.seconds(getattr(p, name)))
        for name in ("trace", "lower", "made", "compile")
        if name != "compile" or compiles
    ]
    return [
        tables.Column("What", 5, lambda p: p.what, "left"),
        tables.Column("Implementation", 14, lambda p: p.name, "left"),
        tables.Column("Direction", 9, lambda p: p.direction, "left"),
        *stages,
        tables.Column("vs. Flax, jax.nn", 8, flax),
        tables.Column("vs. named", 9, lambda p: ratio(p, named, p.what)),
        tables.Column("Code", 5, lambda p: str(p.code)),
        tables.Column("Files", 5, lambda p: str(p.files)),
        tables.Column("", 0, lambda p: p.reason, "left"),
    ]
