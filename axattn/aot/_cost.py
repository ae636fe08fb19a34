"""FLOPs and bytes accessed of a compiled program, with its loops counted as often as they run."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from axattn import _jax_compat
from axattn.aot import _hlo


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """What a program does, as its compiler estimates it.

    Attributes:
      flops: floating-point operations; None when they are not known.
      bytes_accessed: bytes read and written by all operations, on-chip copies included, so on a
        TPU it is more than the traffic to HBM; None when they are not known.
      is_lower_bound: True when some part is not counted, or counted too few times.
      notes: what is not counted and why, one sentence each.
    """

    flops: float | None
    bytes_accessed: float | None
    is_lower_bound: bool = False
    notes: tuple[str, ...] = ()


def compute_program_cost(compiled: Any) -> ProgramCost:
    """Compute the cost of one run of a compiled program on one device.

    The compiler's own analysis is the basis (XLA's generic one on CUDA, which has none), with
    three amendments: loop bodies count as often as they run (XLA counts them once), a
    ``conditional`` counts as its dearest branch, and kernels count by their own estimates. A loop
    counts once where the program does not show its trip count, and kernels without an estimate do
    not count; the notes name them. Nothing is known of a program that cannot be read.

    Args:
      compiled: a ``jax.stages.Compiled``.

    Returns:
      Its FLOPs and bytes, and notes on what is left out.
    """
    own = _read_analysis(_jax_compat.read_compiler_cost(compiled))
    try:
        module = _jax_compat.read_optimized_hlo(compiled)
        counter = _CostCounter(_hlo.Program(module))
        if _jax_compat.analyze_hlo_cost(module) is not None:
            once = counter.count_run(counter.program.entry, lambda computation, loop: 1)
            more = counter.count_run(counter.program.entry, counter.program.count_trips) - once
            total = more + (once if own is None else own)
        elif own is None or counter.program.has_loops:
            return _report_unknown("counting them needs JAX's CPU backend")
        else:
            total = own
        kernels = counter.note_missing_estimates()
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        return _report_unknown(f"this jaxlib's HLO is not understood ({error})")
    notes = counter.program.format_notes("loop bodies count") + kernels
    flops, bytes_accessed = total
    if kernels and flops <= 0:
        return ProgramCost(None, None, True, notes)
    return ProgramCost(float(flops), float(bytes_accessed), bool(notes), notes)


def _report_unknown(reason: str) -> ProgramCost:
    """Return a cost without figures, with the reason."""
    return ProgramCost(None, None, True, (f"FLOPs and bytes are not known: {reason}",))


class _CostCounter:
    """Counter of what the computations of a program do: arrays of FLOPs and bytes."""

    def __init__(self, program: _hlo.Program):
        self.program = program
        self._analyses: dict[str, np.ndarray] = {}

    def count_run(self, name: str, trips: Callable[[str, Any], int]) -> np.ndarray:
        """Count a run of a computation whose loops run ``trips(computation, loop)`` times."""
        total = self.analyze(name)
        for i in self.program.instructions[name]:
            kind = i.opcode.name
            if kind == "kCustomCall":
                total = total + (_read_estimate(i) or (0.0, 0.0))  # XLA's analysis has none
            elif kind == "kWhile":
                body = _hlo.get_body(i)
                total = total + trips(name, i) * self.count_run(body, trips) - self.analyze(body)
            elif kind in ("kConditional", "kCall", "kAsyncStart"):
                called = self.program.get_callees(i)
                total = total + np.max([self.count_run(n, trips) for n in called], 0)
                total = total - np.max([self.analyze(n) for n in called], 0)
        return total

    def analyze(self, name: str) -> np.ndarray:
        """Return XLA's analysis of a computation, which counts its loops once and no kernels."""
        if name not in self._analyses:
            module = _jax_compat.make_hlo_module(self.program.isolate(name))
            found = _read_analysis(_jax_compat.analyze_hlo_cost(module))
            self._analyses[name] = np.zeros(2) if found is None else found
        return self._analyses[name]

    def note_missing_estimates(self) -> tuple[str, ...]:
        """Return a note on kernels without a cost estimate, if there are any."""
        found = collections.Counter(
            target
            for instructions in self.program.instructions.values()
            for i in instructions
            if i.opcode.name == "kCustomCall" and _read_estimate(i) is None
            if _is_kernel(target := _hlo.find_attribute(i, r'custom_call_target="([^"]*)"'))
        )
        names = ", ".join(f"{name} x{count}" for name, count in sorted(found.items()))
        if not found:
            return ()
        note = f"kernels without a cost estimate are left out of the FLOPs ({names})"
        if any(name.startswith("mosaic_gpu") for name in found) and jax.__version_info__ < (0, 12):
            note += "; Mosaic GPU takes no estimate before jax 0.12"
        return (note,)


def _read_analysis(analysis: Mapping[str, float] | None) -> np.ndarray | None:
    """Return FLOPs and bytes of an XLA analysis, which has -1 for what it does not know."""
    if analysis is None:
        return None
    return np.maximum([analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0)], 0.0)


def _read_estimate(kernel: Any) -> tuple[float, float] | None:
    """Return a custom call's own estimate of FLOPs and bytes; None where it has none."""
    # Mosaic TPU writes a field of JSON, Mosaic GPU a string with its quotes escaped.
    text = kernel.to_string().partition(", backend_config=")[2]
    found = re.search(r'\bcost_estimate(?:":|_json = ")(\{[^}]*\})', text)
    if found is None:
        return None
    said = json.loads(found[1].replace(r"\22", '"'))
    return float(said.get("flops", 0)), float(said.get("bytes_accessed", 0))


def _is_kernel(name: str) -> bool:
    return name.startswith(("tpu_custom_call", "mosaic_gpu", "__cu", "__gpu$", "__onednn"))
