"""Bytes that a compiled program sends from device to device.

They are those of the values, without a layout's padding, that one device sends in one run, by the
arithmetic of rings. Of n devices, each with an operand of b bytes, a device sends::

    all-gather           (n - 1) b             reduce-scatter     (n - 1) / n b
    all-reduce           2 (n - 1) / n b       all-to-all         (n - 1) / n b
    collective-permute   b

A compiler may do one by way of another: libtpu gathers over three dimensions of a torus by an
all-reduce. The collectives that the program has are counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from axattn import _jax_compat
from axattn.aot import _hlo

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
    """All collectives of one kind in a program.

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


_KINDS = {"k" + kind.title().replace("-", ""): kind for kind in KINDS}

Counts = dict[str, tuple[int, float]]  # by kind: count, bytes


def program_collectives(
    compiled: Any, num_devices: int
) -> tuple[tuple[Collective, ...], tuple[str, ...]]:
    """Find the collectives of a compiled program.

    Args:
      compiled: a ``jax.stages.Compiled``.
      num_devices: how many devices the program is for.

    Returns:
      The collectives, those that send most first, and notes on what is not counted. A program that
      jaxlib does not let us read has none, and a note.

    Raises:
      TypeError: ``compiled`` is not a compiled program.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from axattn import aot
      >>> program = jax.jit(jnp.sin).lower(jnp.ones(8)).compile()
      >>> aot.program_collectives(program, 1)
      ((), ())
    """
    if not isinstance(compiled, jax.stages.Compiled):
        raise TypeError(f"compiled takes a jax.stages.Compiled, got {type(compiled).__name__}")
    if num_devices == 1:
        return (), ()
    try:
        return count_collectives(_jax_compat.read_optimized_hlo(compiled), num_devices)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        return (), (f"collectives are not known: this jaxlib's HLO is not understood ({error})",)


def count_collectives(
    module: Any, num_devices: int
) -> tuple[tuple[Collective, ...], tuple[str, ...]]:
    """Find the collectives of jaxlib's ``HloModule``, as `program_collectives` returns them."""
    counter = _CollectiveCounter(_hlo.Program(module), num_devices)
    found = counter.count_computation(counter.program.entry)
    listed = (Collective(kind, count, sent) for kind, (count, sent) in found.items())
    notes = counter.program.format_notes("what loops send counts")
    return tuple(sorted(listed, key=lambda c: -c.sent_bytes)), notes


class _CollectiveCounter:
    """Counter of what the computations of a program send."""

    def __init__(self, program: _hlo.Program, num_devices: int):
        self.program, self.num_devices = program, num_devices

    def count_computation(self, name: str) -> Counts:
        """Count what a computation sends."""
        found = Counts()
        for instruction in self.program.instructions[name]:
            opcode = instruction.opcode.name
            kind = _KINDS.get(opcode.removesuffix("Start"))
            if kind:
                _add_counts(found, {kind: (1, self._count_sent_bytes(instruction, kind))})
            elif opcode == "kWhile":
                body = self.count_computation(_hlo.get_body(instruction))
                if body:
                    _add_counts(found, body, self.program.count_trips(name, instruction))
            elif opcode == "kConditional":
                branches = map(self.count_computation, self.program.get_callees(instruction))
                _add_counts(found, max(branches, key=_sum_bytes))
            elif opcode in ("kCall", "kFusion", "kAsyncStart"):
                for callee in self.program.get_callees(instruction):
                    _add_counts(found, self._count_fused(callee))
        return found

    def _count_fused(self, callee: str) -> Counts:
        """Count what a computation sends that libtpu fused with the users of its collective."""
        found = self.count_computation(callee)
        if callee.startswith("all-reduce-scatter") and "all-reduce" in found:
            count, sent = found.pop("all-reduce")
            _add_counts(found, {"reduce-scatter": (count, sent / 2)})
        return found

    def _count_sent_bytes(self, instruction: Any, kind: str) -> float:
        """Return the bytes that one device sends in a collective."""
        operands = instruction.operands()
        if kind in ("collective-permute", "ragged-all-to-all"):
            operands = operands[:1]  # others may be the buffers of the results
        size = sum(map(_count_value_bytes, operands))
        if kind == "collective-permute":
            return size
        n = parse_group_size(instruction.to_string(), self.num_devices)
        share = (n - 1) / n
        return size * {"all-gather": n - 1, "all-reduce": 2 * share}.get(kind, share)


def _count_value_bytes(value: Any) -> float:
    """Return the bytes of a value, or of all elements of a tuple, without a layout's padding."""
    shape = _hlo.find_attribute(value, r" = (.*?) [\w\-]+\(")
    total = 0.0
    for dtype, sizes in re.findall(r"\b([a-z]+[a-z0-9]*)\[([\d,]*)\]", shape):
        total += math.prod(map(int, filter(None, sizes.split(",")))) * _parse_bits(dtype) / 8
    return total


def _parse_bits(dtype: str) -> int:
    """Return the bits of an element: the first number in a type's name, as in ``f8e4m3fn``."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8 if dtype == "pred" else 0


def parse_group_size(attributes: str, num_devices: int) -> int:
    """Return how many devices take part together, by any of three forms of ``replica_groups``."""
    listed = re.search(r"replica_groups=\{\{([^}]*)\}", attributes)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if iota:
        return int(iota.group(1).split(",")[-1])
    axes = re.search(r"replica_groups=@?\w*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if axes:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", axes.group(1)))
        # 'x':(4)2 is a part of an axis: of size 2, within an outer part of size 4.
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes.group(2))
        return math.prod(int(part or sizes[name]) for name, part in used)
    return num_devices


def _add_counts(found: Counts, more: Counts, times: int = 1) -> None:
    for kind, (count, sent) in more.items():
        before = found.get(kind, (0, 0.0))
        found[kind] = before[0] + times * count, before[1] + times * sent


def _sum_bytes(found: Counts) -> float:
    return sum(sent for _, sent in found.values())
