"""The result of compiling for a target, as data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from axattn._typing import present
from axattn.aot._collectives import Collective
from axattn.aot._targets import target as find_target


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a program cannot run on a target.

    Attributes:
      kind: ``"out_of_memory"``, ``"unsupported"`` (the platform or an implementation has no such
        operation) or ``"compiler_error"`` (anything else the compiler refuses).
      message: the compiler's own words, or ours where the compiler does not check.
      memory: which memory ran out: ``"hbm"``, ``"vmem"``, ``"smem"``; None for the other kinds.
      requested_bytes: what the program needs of it, where the message says.
      available_bytes: what there is of it, where the message says.

    Example:
      >>> from axattn import aot
      >>> refusal = aot.Refusal("out_of_memory", "...", "hbm", 120 * 2**30, 95 * 2**30)
      >>> print(refusal)
      out of memory (hbm): 120.00 GiB requested, 95.00 GiB available
    """

    kind: str
    message: str
    memory: str | None = None
    requested_bytes: int | None = None
    available_bytes: int | None = None

    def __str__(self) -> str:
        if self.kind == "out_of_memory" and self.requested_bytes and self.available_bytes:
            asked, there = _format_bytes(self.requested_bytes), _format_bytes(self.available_bytes)
            return f"out of memory ({self.memory}): {asked} requested, {there} available"
        return f"{self.kind.replace('_', ' ')}: {self.message.splitlines()[0]}"


_SIZE = r"([\d.]+)([KMGT]?)(?:i?B)?"
# Newest wording first; each has two sizes, requested and available.
_OUT_OF_MEMORY = (
    # libtpu: whole program
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} (?:hbm|vmem|smem|sflag)", re.IGNORECASE),
    # libtpu: one kernel's blocks
    re.compile(r"Allocation \(size=(\d+)()\) would exceed memory \(size=(\d+)()\)"),
    re.compile(rf"allocation with size {_SIZE} and limit {_SIZE} exceeded"),
    # Mosaic GPU: one kernel's shared memory
    re.compile(r"smem_bytes=(\d+)() > max_smem_bytes=(\d+)()"),
    # ptxas
    re.compile(r"shared data \((0x[0-9a-f]+)() bytes, (0x[0-9a-f]+)() max\)"),
)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_refusal(message: str) -> Refusal:
    """Read a compiler's error message.

    Sizes that a message gives as "97.44G" are rounded there; they come back as such.

    Args:
      message: the text of the error, as XLA, libtpu, Mosaic or ptxas wrote it.

    Returns:
      A `Refusal`; its kind is ``"compiler_error"`` where nothing else is recognized.

    Example:
      >>> from axattn import aot
      >>> message = "RESOURCE_EXHAUSTED: Used 97.44G of 95.73G hbm. Exceeded hbm capacity"
      >>> refusal = aot.parse_refusal(message)
      >>> refusal.kind, refusal.memory
      ('out_of_memory', 'hbm')
    """
    for pattern in _OUT_OF_MEMORY:
        match = pattern.search(message)
        if match:
            requested, unit, available, available_unit = match.groups()
            return Refusal(
                "out_of_memory",
                message,
                _find_memory(message),
                _parse_size(requested, unit),
                _parse_size(available, available_unit),
            )
    if "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower():
        return Refusal("out_of_memory", message, _find_memory(message))
    if "UNIMPLEMENTED" in message or "not implemented" in message.lower():
        return Refusal("unsupported", message)
    return Refusal("compiler_error", message)


def _parse_size(digits: str, unit: str) -> int:
    if digits.startswith("0x"):
        return int(digits, 16)
    return int(float(digits) * _UNITS[unit])


def _find_memory(message: str) -> str | None:
    """Return the memory that a message is about."""
    lowered = message.lower()
    if "smem" in lowered or "shared" in lowered:
        return "smem"
    # Messages about HBM do not mention VMEM; those about VMEM may mention HBM operands.
    return "vmem" if "vmem" in lowered else "hbm" if "hbm" in lowered else None


@dataclasses.dataclass(frozen=True)
class Report:
    """The cost of a program on a target, per device, as that target's compiler sees it.

    Sizes are bytes and None when the compiler refused the program.

    Attributes:
      target: name of the target, as in ``axattn.aot.TARGETS``.
      device_kind: what JAX calls the device.
      function: name of the function.
      num_devices: devices that the program is shared out over.
      argument_bytes: memory of the inputs, in the target's layout (padding included).
      output_bytes: memory of the outputs.
      temp_bytes: memory of the intermediate results alive at the same time.
      alias_bytes: part of the outputs that reuses inputs (donation).
      generated_code_bytes: size of the program; 0 where the compiler does not say (GPU).
      flops: floating-point operations of one run: XLA's analysis, with all rounds of loops, and
        the kernels' own estimates.
      bytes_accessed: bytes that operations read and write in one run.
      collectives: what one device sends to others in one run, by kind, each a `Collective`.
      cost_is_lower_bound: True when ``notes`` name something that those two leave out.
      compile_seconds: wall time of the compiler in seconds, without tracing and lowering.
      versions: of jax, jaxlib and the wheels of the compiler.
      notes: caveats, one sentence each.
      refusal: why the program cannot run there; None if it can.
      compiled: the ``jax.stages.Compiled``; None when the compiler refused.

    Example:
      >>> import jax
      >>> from axattn import aot
      >>> x = jax.ShapeDtypeStruct((256, 256), "float32")
      >>> report = aot.analyze(lambda x: x @ x, x, target="cpu")
      >>> report.argument_bytes, report.output_bytes, report.memory
      (262144, 262144, 'host memory')
      >>> report.hbm_bytes is None  # a CPU has none; with target="v5p" it is an int
      True
    """

    target: str
    device_kind: str
    function: str
    num_devices: int = 1
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temp_bytes: int | None = None
    alias_bytes: int | None = None
    generated_code_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    collectives: tuple[Collective, ...] = ()
    cost_is_lower_bound: bool = False
    compile_seconds: float | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refusal: Refusal | None = None
    compiled: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the program compiles for the target and fits in its memory."""
        return self.refusal is None

    @property
    def total_bytes(self) -> int | None:
        """Arguments + outputs + temporaries - aliased, in whatever memory the target has."""
        if self.argument_bytes is None:
            return None
        made = present(self.output_bytes) + present(self.temp_bytes)
        return self.argument_bytes + made - present(self.alias_bytes)

    @property
    def hbm_bytes(self) -> int | None:
        """`total_bytes` where the target has HBM, else None, for host memory is not HBM."""
        return self.total_bytes if self.target != "cpu" else None

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends to others in one run, by ``collectives``."""
        return sum(found.sent_bytes for found in self.collectives)

    @property
    def memory(self) -> str:
        """The memory that the bytes are of, ``"HBM"`` or ``"host memory"``."""
        return "host memory" if self.target == "cpu" else "HBM"

    def hlo_text(self) -> str:
        """Return the optimized HLO.

        Raises:
          ValueError: the compiler refused the program, so there is none.
        """
        if self.compiled is None:
            raise ValueError(f"no compiled program for {self.target}: {self.refusal}")
        return self.compiled.as_text()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the compiled program, in types that ``json`` writes."""
        out = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "compiled"
        }
        out["versions"] = dict(self.versions)
        out["notes"] = list(self.notes)
        out["collectives"] = [dataclasses.asdict(found) for found in self.collectives]
        out["refusal"] = dataclasses.asdict(self.refusal) if self.refusal else None
        return out | {
            "memory": self.memory,
            "total_bytes": self.total_bytes,
            "hbm_bytes": self.hbm_bytes,
        }

    def __str__(self) -> str:
        bound = ">= " if self.cost_is_lower_bound else ""
        rows = [
            ("arguments", _format_bytes(self.argument_bytes)),
            ("outputs", _format_bytes(self.output_bytes)),
            ("temporaries", _format_bytes(self.temp_bytes)),
            ("aliased", _format_bytes(self.alias_bytes)),
            (f"{self.memory} in all", _format_bytes(self.total_bytes)),
            ("FLOPs", bound + _format_si(self.flops) if self.flops is not None else "unknown"),
            (
                "bytes accessed",
                bound + _format_si(self.bytes_accessed) + "B"
                if self.bytes_accessed is not None
                else "unknown",
            ),
        ]
        capacity = find_target(self.target).hbm_bytes
        if capacity and self.total_bytes is not None:
            share = f"  ({100 * self.total_bytes / capacity:.1f} % of {_format_bytes(capacity)})"
            rows[4] = (rows[4][0], rows[4][1] + share)
        for found in self.collectives:
            rows.append((found.kind, f"{_format_si(found.sent_bytes)}B sent, x{found.count:g}"))
        if self.compile_seconds is not None:
            rows.append(("compiled in", f"{self.compile_seconds:.2f} s"))
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in self.versions.items())))
        if self.target == "cpu":
            rows.append(("note", "compiled for the CPU: the bytes are host memory, not HBM"))
        rows.extend(("note", note) for note in self.notes)
        if self.compiled is None:
            rows = [r for r in rows if r[0] in ("versions", "note")]
        if self.refusal is not None:
            rows.insert(0, ("refused", str(self.refusal)))
        width = max(len(name) for name, _ in rows)
        where = f"{self.target} ({self.device_kind})"
        if self.num_devices > 1:
            where += f", one of {self.num_devices}"
        lines = [f"{self.function} on {where}"]
        lines.extend(f"  {name:<{width}}  {value}" for name, value in rows)
        return "\n".join(lines)


def _format_bytes(n: int | None) -> str:
    """Format bytes in binary units, as memory is sold."""
    if n is None:
        return "unknown"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"


def _format_si(n: float | None) -> str:
    """Format a number in decimal units, as rates are quoted."""
    if n is None:
        return "unknown"
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} "
