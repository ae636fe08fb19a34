"""Which implementations there are, which of them take a call, and which ``None`` prefers.

A new implementation adds one entry to :data:`IMPLEMENTATIONS`: how it says no, and how it attends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from axattn.call import AttentionCall
from axattn.implementations import cudnn, preference, xla, xla_chunked

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to attend: ``attend(call) -> (out, lse)``; ``refuses(call)`` is a reason or None."""

    name: str
    attend: Callable[[AttentionCall], tuple[jax.Array, jax.Array | None]] | None
    refuses: Callable[[AttentionCall], str | None]
    platforms: tuple[str, ...]


def _takes_all(_: AttentionCall) -> None:
    return None


def _not_there(what: str) -> Callable[[AttentionCall], str]:
    return lambda _: f"is not part of this version: {what} have not landed yet"


IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        Implementation("xla", xla.attend, _takes_all, PLATFORMS),
        Implementation("xla_chunked", xla_chunked.attend, _takes_all, PLATFORMS),
        Implementation("mosaic_gpu", None, _not_there("the Hopper kernels"), ("cuda",)),
        Implementation("mosaic_tpu", None, _not_there("the TPU kernels"), ("tpu",)),
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
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(
            f"implementation takes None, one of {', '.join(NAMES)}, or a sequence of them, "
            f"got {implementation!r}"
        )
    return names


def plan(call: AttentionCall, implementation: str | Sequence[str] | None) -> Plan:
    """The implementation for every platform that the call may be lowered for.

    Raises ``NotImplementedError`` where a name (or every name of a sequence) cannot take the call.
    """
    names = check_names(implementation)
    reasons = refusals(call)
    if names is None:
        return tuple(
            (platform, preference.choose(call, platform, reasons)) for platform in PLATFORMS
        )
    chosen = {}
    for platform in PLATFORMS:
        for name in names:
            name = MOSAIC.get(platform, "mosaic") if name == "mosaic" else name
            if reasons[name] is None and platform in IMPLEMENTATIONS[name].platforms:
                chosen[platform] = name
                break
    if not chosen:
        raise NotImplementedError(
            "; ".join(f'implementation "{name}" {reasons[name]}' for name in names)
        )
    return tuple(chosen.items())


def attend(call: AttentionCall, plan: Plan) -> tuple[jax.Array, jax.Array | None]:
    """Run the plan: one implementation, or one for each platform, resolved when it is lowered."""
    by_name: dict[str, list[str]] = {}
    for platform, name in plan:
        by_name.setdefault(name, []).append(platform)
    if len(by_name) == 1:
        return IMPLEMENTATIONS[next(iter(by_name))].attend(call)
    attends = {p: IMPLEMENTATIONS[name].attend for p, name in plan}
    default = attends.pop("rocm", None)
    return jax.lax.platform_dependent(call, default=default, **attends)
