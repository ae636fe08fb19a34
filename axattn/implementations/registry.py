"""Which implementations there are, which of them take a call, and which ``None`` prefers.

A new implementation adds one entry to :data:`IMPLEMENTATIONS`: how it says no, and how it attends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from axattn.call import AttentionCall
from axattn.implementations import cudnn, flash, mosaic_gpu, mosaic_tpu, preference, xla
from axattn.implementations.flash import PLATFORMS


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to attend: ``refuses(call)`` is a reason or None.

    ``attend(call) -> (out, lse)``; None for those that `flash` joins into one function.
    """

    name: str
    attend: Callable[[AttentionCall], tuple[jax.Array, jax.Array | None]] | None
    refuses: Callable[[AttentionCall], str | None]
    platforms: tuple[str, ...]


def _takes_all(_: AttentionCall) -> None:
    return None


IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        Implementation("xla", xla.attend, _takes_all, PLATFORMS),
        Implementation("xla_chunked", None, _takes_all, PLATFORMS),
        Implementation("mosaic_gpu", None, mosaic_gpu.refuses, ("cuda",)),
        Implementation("mosaic_tpu", None, mosaic_tpu.refuses, ("tpu",)),
        Implementation("cudnn", cudnn.attend, cudnn.refuses, ("cuda",)),
    )
}

# "mosaic" is whichever kernel family fits the platform that the call is lowered for.
MOSAIC = {"cuda": "mosaic_gpu", "tpu": "mosaic_tpu"}

NAMES = (*IMPLEMENTATIONS, "mosaic")

Plan = tuple[tuple[str, str], ...]  # (platform, implementation name), hashable


def refusals(call: AttentionCall) -> dict[str, str | None]:
    """For every name: None where it takes the call, else the reason why not."""
    reasons = {name: impl.refuses(call) for name, impl in IMPLEMENTATIONS.items()}
    fitting = {name: reasons[name] for name in MOSAIC.values()}
    taken = any(reason is None for reason in fitting.values())
    reasons["mosaic"] = None if taken else "; ".join(f"{n} {r}" for n, r in fitting.items())
    return reasons


def check_names(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The preference as a tuple of known names, or None."""
    if implementation is None:
        return None
    takes = f"implementation takes None, one of {', '.join(NAMES)}, or a sequence of them"
    if not isinstance(implementation, (str, Sequence)):
        raise TypeError(f"{takes}, got {implementation!r}")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in NAMES for name in names):
        raise ValueError(f"{takes}, got {implementation!r}")
    return names


def plan(call: AttentionCall, implementation: str | Sequence[str] | None) -> Plan:
    """The implementation for every platform that the call may be lowered for.

    Raises ``NotImplementedError`` where a name (or every name of a sequence) cannot take the call.
    """
    names = check_names(implementation)
    if call.is_empty:
        # There is nothing to compute, and so no kernel to ask for: zeros, and an LSE of -inf.
        return tuple((platform, "xla") for platform in PLATFORMS)
    reasons = refusals(call)
    if names is None:
        return tuple(
            (platform, preference.choose(call, platform, reasons)) for platform in PLATFORMS
        )
    chosen = {}
    for platform in PLATFORMS:
        for name in names:
            name = MOSAIC.get(platform) if name == "mosaic" else name
            if name is None:
                continue
            if reasons[name] is None and platform in IMPLEMENTATIONS[name].platforms:
                chosen[platform] = name
                break
    if not chosen:
        raise NotImplementedError(
            "; ".join(f'implementation "{name}" {reasons[name]}' for name in names)
        )
    return tuple(chosen.items())


def attend(call: AttentionCall, plan: Plan) -> tuple[jax.Array, jax.Array | None]:
    """Run the plan: one implementation everywhere, or one per platform, resolved when lowered.

    Lowering for a platform that the plan leaves out is an error of JAX's: a named implementation
    never becomes another one.
    """
    names = {name for _, name in plan}
    if names <= set(flash.NAMES):
        return _with_lse(call, *flash.attend(call, flash.ways(call, plan)))
    if len(names) == 1 and len(plan) == len(PLATFORMS):
        return _attend_with(names.pop(), plan, call)
    attends = {
        platform: functools.partial(_attend_with, name, ((platform, name),))
        for platform, name in plan
    }
    return jax.lax.platform_dependent(call, **attends)


def _attend_with(name: str, plan: Plan, call: AttentionCall) -> tuple[jax.Array, jax.Array | None]:
    if name in flash.NAMES:
        return _with_lse(call, *flash.attend(call, flash.ways(call, plan)))
    return _with_lse(call, *IMPLEMENTATIONS[name].attend(call))


def _with_lse(call: AttentionCall, out: jax.Array, lse) -> tuple[jax.Array, jax.Array | None]:
    # Not every implementation has an LSE, and branches must agree on what they return.
    return out, lse if call.return_residual else None
