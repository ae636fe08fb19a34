"""What a compiled program sends from device to device.

Bytes are those of the values (a layout's padding is left out) that one device sends in one run, by
the arithmetic of rings. Of n devices, each with an operand of b bytes, a device sends::

    all-gather           (n - 1) b             reduce-scatter     (n - 1) / n b
    all-reduce           2 (n - 1) / n b       all-to-all         (n - 1) / n b
    collective-permute   b

A compiler may do one by way of another: libtpu gathers over three dimensions of a torus by an
all-reduce. What is counted is what the program has.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from axattn.aot import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All operations of one kind in a program.

    Attributes:
      kind: as in HLO, e.g. ``"all-gather"``.
      count: how often one device takes part in one run; loops count as often as they run.
      sent_bytes: bytes that one device sends in all of these.

    Example:
      >>> import jax
      >>> from axattn import aot
      >>> x = jax.ShapeDtypeStruct((8, 8), "float32")
      >>> aot.analyze(lambda x: x + 1, x, target="cpu").collectives  # one device sends nothing
      ()
      >>> aot.Collective("all-gather", count=2, sent_bytes=4096.0).kind
      'all-gather'
    """

    kind: str
    count: int
    sent_bytes: float


Found = dict[str, tuple[int, float]]  # by kind: count, bytes


def program_collectives(
    compiled: Any, num_devices: int
) -> tuple[tuple[Collective, ...], tuple[str, ...]]:
    """The collectives of a compiled program, the largest first, and what is not counted.

    Args:
      compiled: a ``jax.stages.Compiled``.
      num_devices: that the program is for.
    """
    if num_devices == 1:
        return (), ()
    try:
        return collectives(compiled.as_text(), num_devices)
    except (ValueError, KeyError, IndexError) as error:
        # The format is XLA's own and changes.
        return (), (f"collectives are not counted (HLO not understood: {error})",)


def collectives(text: str, num_devices: int) -> tuple[tuple[Collective, ...], tuple[str, ...]]:
    """The same of a program's HLO text."""
    reader = _Reader(hlo.Module(text), num_devices)
    found = reader.read(reader.module.entry)
    notes: tuple[str, ...] = ()
    if reader.unknown:
        notes = (f"{reader.unknown} loop(s) of a trip count not known here send once",)
    listed = (Collective(kind, count, sent) for kind, (count, sent) in found.items())
    return tuple(sorted(listed, key=lambda c: -c.sent_bytes)), notes


class _Reader:
    def __init__(self, module: hlo.Module, num_devices: int):
        self.module, self.num_devices = module, num_devices
        self.unknown = 0

    def read(self, name: str) -> Found:
        """What computation `name` sends."""
        computation, found = self.module.computations[name], Found()
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                _add(found, {kind: (1, self.sent(computation, instruction, kind))})
            elif instruction.opcode == "while":
                trips = self.module.trip_count(name, instruction)
                body = self.read(instruction.attribute("body") or "")
                if trips is None and body:
                    self.unknown += 1
                _add(found, body, 1 if trips is None else trips)
            elif instruction.opcode == "conditional":
                branches = map(self.read, instruction.called())
                _add(found, max(branches, key=_total, default={}))
            elif instruction.opcode in ("call", "fusion", "async-start"):
                for callee in instruction.called():
                    _add(found, self._in_one(callee))
        return found

    def _in_one(self, callee: str) -> Found:
        """Of a computation that is one operation for libtpu, which fuses with their users."""
        found = self.read(callee)
        if callee.startswith("all-reduce-scatter") and "all-reduce" in found:
            count, sent = found.pop("all-reduce")
            _add(found, {"reduce-scatter": (count, sent / 2)})
        return found

    def sent(self, computation: hlo.Computation, instruction: hlo.Instruction, kind: str) -> float:
        operands = instruction.operands
        if kind in ("collective-permute", "ragged-all-to-all"):
            operands = operands[:1]  # behind it may be where the results go
        size = sum(computation.instructions[name].nbytes for name in operands)
        if kind == "collective-permute":
            return size
        n = group_size(instruction.attributes, self.num_devices)
        share = (n - 1) / n
        return size * {"all-gather": n - 1, "all-reduce": 2 * share}.get(kind, share)


def group_size(attributes: str, num_devices: int) -> int:
    """How many devices take part together, by `replica_groups` in any of its three forms."""
    listed = re.search(r"replica_groups=\{\{([^}]*)\}", attributes)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if iota:
        return int(iota.group(1).split(",")[-1])
    axes = re.search(r"replica_groups=@?\w*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if axes:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", axes.group(1)))
        # An axis in parts is written 'x':(4)2: the part of size 2, above which there are 4.
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes.group(2))
        return math.prod(int(part or sizes[name]) for name, part in used)
    return num_devices


def _add(found: Found, more: Found, times: int = 1) -> None:
    for kind, (count, sent) in more.items():
        before = found.get(kind, (0, 0.0))
        found[kind] = before[0] + times * count, before[1] + times * sent


def _total(found: Found) -> float:
    return sum(sent for _, sent in found.values())
