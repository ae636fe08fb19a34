"""FLOPs and bytes accessed of a compiled program, with its loops counted as often as they run."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from axattn import _jax_compat
from axattn.aot import hlo


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program does, as its compiler estimates it.

    Attributes:
      flops: floating-point operations; None when nothing is known.
      bytes_accessed: bytes read and written by all operations, on-chip copies included, so on a
        TPU it is more than the traffic to HBM; None when nothing is known.
      is_lower_bound: True when some part is not counted, or counted too few times.
      notes: what is not counted and why, one sentence each.
    """

    flops: float | None
    bytes_accessed: float | None
    is_lower_bound: bool = False
    notes: tuple[str, ...] = ()


def program_cost(compiled: Any) -> Cost:
    """Returns the cost of one run of a compiled program on one device.

    The compiler's own analysis is the basis (XLA's generic one on CUDA, which has none), with
    three amendments: loop bodies are multiplied by their trip counts (XLA counts them once), a
    `conditional` counts as its dearest branch, and kernels that XLA cannot look into are named in
    the notes unless they carry a cost estimate.

    Args:
      compiled: a `jax.stages.Compiled`.
    """
    own = _known(_jax_compat.compiler_cost_analysis(compiled))
    try:
        module = _jax_compat.optimized_hlo(compiled)
    except RuntimeError:
        return _without_hlo(own)
    base = own or _known(_jax_compat.hlo_cost_analysis(module))
    if base is None:
        return Cost(None, None, True, ("FLOPs are unknown: counting them needs JAX's CPU backend",))
    text = module.to_string()
    notes = []
    opaque = _opaque_kernels(text)
    if opaque:
        names = ", ".join(f"{name} x{count}" for name, count in sorted(opaque.items()))
        notes.append(f"kernels without a cost estimate are left out of the FLOPs ({names})")
    flops, bytes_accessed = base
    try:
        loops = _Loops(hlo.Module(text), module)
        extra_flops, extra_bytes = loops.extra(loops.text.entry)
        flops, bytes_accessed = flops + extra_flops, bytes_accessed + extra_bytes
        if loops.unknown:
            notes.append(f"{loops.unknown} loop(s) of a trip count not known here count once")
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        # The format is XLA's own and changes; a number that may be low is still a number.
        if re.search(r" while\(", text):
            notes.append(f"loop bodies count once (HLO not understood: {error})")
    if opaque and flops <= 0:
        return Cost(None, None, True, tuple(notes))
    return Cost(float(flops), float(bytes_accessed), bool(notes), tuple(notes))


def _without_hlo(base: tuple[float, float] | None) -> Cost:
    note = "loop bodies count once: this jaxlib cannot read the compiler's HLO"
    if base is None:
        return Cost(None, None, True, ("FLOPs are unknown: jaxlib cannot read the compiler's HLO",))
    return Cost(*base, True, (note,))


class _Loops:
    """Adds up what the loops of a module do beyond their first round."""

    def __init__(self, text: hlo.Module, module: Any):
        self.text = text
        self.unknown = 0
        self._proto = module.as_serialized_hlo_module_proto()
        self._once: dict[str, tuple[float, float]] = {}

    def extra(self, name: str) -> tuple[float, float]:
        """FLOPs and bytes of computation `name` that XLA's analysis of it leaves out."""
        flops = bytes_accessed = 0.0
        for instruction in self.text.computations[name].instructions.values():
            if instruction.opcode == "while":
                body = instruction.attribute("body") or ""
                trips = self.text.trip_count(name, instruction)
                if trips is None:
                    self.unknown += 1
                    trips = 1
                more = self.extra(body)
                once = self.once(body) if trips != 1 else (0.0, 0.0)
                flops += trips * more[0] + (trips - 1) * once[0]
                bytes_accessed += trips * more[1] + (trips - 1) * once[1]
            elif instruction.opcode == "conditional":
                branches = [self.extra(callee) for callee in instruction.called()]
                flops += max((b[0] for b in branches), default=0.0)
                bytes_accessed += max((b[1] for b in branches), default=0.0)
            elif instruction.opcode in ("call", "async-start"):
                for callee in instruction.called():
                    more = self.extra(callee)
                    flops += more[0]
                    bytes_accessed += more[1]
        return flops, bytes_accessed

    def once(self, name: str) -> tuple[float, float]:
        """FLOPs and bytes of computation `name` with its own loops counted once."""
        if name not in self._once:
            body = _jax_compat.hlo_module_from_proto(hlo.with_entry(self._proto, name))
            found = _known(_jax_compat.hlo_cost_analysis(body)) or (0.0, 0.0)
            # XLA's generic analysis knows nothing of kernels, not even what they say themselves.
            estimated = self.estimated(name)
            self._once[name] = found[0] + estimated[0], found[1] + estimated[1]
        return self._once[name]

    def estimated(self, name: str) -> tuple[float, float]:
        """FLOPs and bytes by the kernels' own estimates in `name`, its loops counted once."""
        flops = bytes_accessed = 0.0
        for instruction in self.text.computations[name].instructions.values():
            if instruction.opcode == "custom-call":
                found = _estimate(instruction.attributes)
            elif instruction.opcode in ("while", "conditional", "call", "async-start"):
                branches = [self.estimated(callee) for callee in instruction.called()]
                found = max(branches, default=(0.0, 0.0))
            else:
                continue
            flops, bytes_accessed = flops + found[0], bytes_accessed + found[1]
        return flops, bytes_accessed


def _known(analysis: Mapping[str, float] | None) -> tuple[float, float] | None:
    """(FLOPs, bytes) of an XLA analysis, which says -1 for what it does not know."""
    if analysis is None:
        return None
    return max(analysis.get("flops", 0.0), 0.0), max(analysis.get("bytes accessed", 0.0), 0.0)


def _estimate(attributes: str) -> tuple[float, float]:
    """What a custom call says of its cost: FLOPs and bytes, 0 where it says nothing."""
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', attributes)
    said = dict(re.findall(r'"(\w+)":"?(\d+)', estimate.group(1))) if estimate else {}
    return float(said.get("flops", 0)), float(said.get("bytes_accessed", 0))


def _opaque_kernels(text: str) -> collections.Counter[str]:
    """Custom calls that do the work of a kernel and say nothing of its cost, by target name."""
    found: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        match = re.search(r'custom-call\(.*custom_call_target="([^"]+)"', line)
        if match and _is_kernel(match.group(1)) and '"cost_estimate"' not in line:
            found[match.group(1)] += 1
    return found


def _is_kernel(name: str) -> bool:
    return name.startswith(("tpu_custom_call", "mosaic_gpu", "__cu", "__gpu$", "__onednn"))
